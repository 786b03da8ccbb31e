//! Taking everything of ours out of the kernel without opening the data path: when the agent is gone for good, on a node that may
//! not even be able to run it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::Path;

use crate::error::Error;
use crate::net::link::{self, TUNNEL_DEVICE};
use crate::net::netlink::Netlink;
use crate::net::tap::UDP_DEVICE;
use crate::net::{self, MAIN_TABLE, NODE_TABLE, card, filter, neighbour, nft, pod, route, rule};

/// What the names of our directories on a bpffs begin with; the version of the shared layouts follows.
const PINS: &str = "towpath-v";

/// Removes from the calling thread's network namespace and from `bpffs` everything that any version of ours made: pods' devices,
/// the tunnel, routes, rules, addresses, the nftables table, pinned programs and maps. Sysctls stay.
///
/// # Errors
/// What could not be removed; the rest is.
pub fn uninstall(bpffs: &Path) -> Result<(), Error> {
    let mut errors: Vec<Error> = Vec::new();
    let mut note = |result: Result<(), Error>| errors.extend(result.err());
    match Netlink::open() {
        Ok(mut netlink) => network(&mut netlink, &mut note),
        Err(error) => note(Err(error.into())),
    }
    // Last: while a program is attached, what policy forbids stays forbidden.
    note(unpin(bpffs));
    Error::collect(errors)
}

/// Everything but pins; what cannot be removed is noted, and the rest goes.
pub(crate) fn network(netlink: &mut Netlink, note: &mut impl FnMut(Result<(), Error>)) {
    note(nft::delete().map_err(Error::from));
    match link::list(netlink) {
        Ok(links) => {
            let ours = |l: &&link::Link| {
                [TUNNEL_DEVICE, UDP_DEVICE].contains(&l.name.as_str()) || pod::is_host_device(&l.name)
            };
            // Those that pods chose are known by nothing else.
            let pods = links.iter().filter(|l| pod::is_host_device(&l.name));
            let macs: BTreeSet<[u8; 6]> =
                pods.filter_map(|l| neighbour::list(netlink, l.index).ok()).flat_map(BTreeMap::into_values).collect();
            for device in links.iter().filter(ours) {
                note(link::delete(netlink, device.index, &device.name).map_err(Error::from));
            }
            // On a kernel without tcx the uplink's program is a filter: whichever device it was, or is.
            for device in links.iter().filter(|l| !ours(l)) {
                note(filter::clear(netlink, device.index, &device.name).map_err(Error::from));
                note(keep_pods_out(netlink, device, &macs));
            }
        }
        Err(error) => note(Err(error.into())),
    }
    for table in [MAIN_TABLE, NODE_TABLE] {
        match route::ensure(netlink, table, |_| true, &[]) {
            Ok((_, failed)) => failed.into_iter().for_each(|e| note(Err(e.into()))),
            Err(error) => note(Err(error.into())),
        }
    }
    note(crate::node::lent::no_longer_answer());
    note(rule::ensure(netlink, &[]).map(drop).map_err(Error::from));
    let lo = link::existing(netlink, "lo");
    let addresses = lo.and_then(|lo| net::address::ensure(netlink, lo.index, "lo", &Default::default()));
    note(addresses.map(drop).map_err(Error::from));
}

/// Has a card let MAC addresses of pods in no longer.
fn keep_pods_out(netlink: &mut Netlink, device: &link::Link, chosen: &BTreeSet<[u8; 6]>) -> Result<(), Error> {
    let requests = card::ours(netlink, device.index, chosen)?;
    let requests = requests.into_iter().map(|mac| card::keep_out(device.index, &device.name, mac)).collect();
    let failed = netlink.batch(requests).into_iter().filter_map(Result::err).filter(|error| !error.is_absent());
    Error::collect(failed.map(Error::from).collect())
}

/// Removes the pins of every version of ours; what they held goes with them.
fn unpin(bpffs: &Path) -> Result<(), Error> {
    let failed = |e| Error::from(net::Error::system(format!("remove pins below {}", bpffs.display()), e));
    let entries = match fs::read_dir(bpffs) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(failed)?,
    };
    for entry in entries {
        let entry = entry.map_err(failed)?;
        if entry.file_name().to_string_lossy().starts_with(PINS) {
            fs::remove_dir_all(entry.path()).map_err(failed)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_of_every_version_go_and_others_stay() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["towpath-v1/maps", "towpath-v2/links", "cilium/globals", "towpath"] {
            fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join("towpath-v1/maps/tp_ct"), "").unwrap();
        unpin(dir.path()).unwrap();
        let mut left: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        left.sort();
        assert_eq!(left, ["cilium", "towpath"]);
        unpin(&dir.path().join("none")).unwrap();
    }
}
