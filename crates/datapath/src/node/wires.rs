//! Which devices forward packets of Services in their drivers (native XDP), and why others do not.
//!
//! What a device's driver does not forward the hooks of tc do, so nothing here is ever an error: what cannot be had is named, once in the
//! log and as long as it lasts in the status. A device whose driver runs somebody else's program keeps it.

use std::collections::BTreeMap;

use rtnetlink::packet_route::link::InfoKind;
use towpath_model::custom::Acceleration;

use super::Node;
use crate::bpf::{self, Programs};
use crate::error::Error;
use crate::net::link::{self, Link};

/// What became of a device that was to.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    Forwards,
    /// It does, and what it sends arrives only if the other end runs a program, too: its driver gives frames to nobody else, and says nothing.
    ForwardsToVeth,
    Cannot(String),
}

impl Outcome {
    fn in_words(&self, device: &str) -> Option<String> {
        match self {
            Self::Forwards => None,
            Self::ForwardsToVeth => Some(format!(
                "Services are accelerated (XDP) on device {device}, which is a veth: what it forwards is lost unless the other end runs an XDP \
                 program, too; where it does not, set serviceAcceleration to best-effort"
            )),
            Self::Cannot(reason) => Some(format!("Services are not accelerated (XDP) on device {device}: {reason}")),
        }
    }
}

/// What became of the devices that were to.
#[derive(Debug, Default)]
pub(super) struct Wires {
    /// By name.
    outcomes: BTreeMap<String, Outcome>,
    /// Whether they are to be told by the status.
    told: bool,
}

impl Wires {
    /// Devices that forward.
    pub(super) fn accelerated(&self) -> Vec<String> {
        let forward = self.outcomes.iter().filter(|(_, outcome)| !matches!(outcome, Outcome::Cannot(_)));
        forward.map(|(device, _)| device.clone()).collect()
    }

    /// What the status has to say.
    pub(super) fn notes(&self) -> Vec<String> {
        let told = self.outcomes.iter().filter(|_| self.told);
        told.filter_map(|(device, outcome)| outcome.in_words(device)).collect()
    }

    fn note(&mut self, outcomes: BTreeMap<String, Outcome>, acceleration: Acceleration) {
        self.told = acceleration == Acceleration::Native;
        for (device, outcome) in outcomes.iter().filter(|(device, outcome)| self.outcomes.get(*device) != Some(outcome))
        {
            match outcome.in_words(device) {
                None => tracing::info!(device, "packets of Services are forwarded by its driver (XDP)"),
                Some(words) if self.told => tracing::warn!("{words}"),
                Some(words) => tracing::info!("{words}"),
            }
        }
        self.outcomes = outcomes;
    }
}

/// Devices that are software: what the machine itself sends them has checksums that nobody computed yet, and there is no driver to save.
fn is_software(link: &Link) -> bool {
    !matches!(&link.kind, None | Some(InfoKind::Bond))
}

/// A refusal in words that say what to do.
fn in_words(error: &bpf::Error, device: &str) -> String {
    let bpf::Error::Kernel { source, .. } = error else { return error.to_string() };
    match source.raw_os_error() {
        Some(libc::EBUSY) => {
            format!(
                "it runs another XDP program, which stays; `bpftool net show dev {device}` names it, and without it ours comes at the next check"
            )
        }
        Some(libc::EOPNOTSUPP) => "its driver cannot run XDP programs".to_owned(),
        _ => format!(
            "{error}; drivers refuse for an MTU or a queue setting that leaves XDP no room: the kernel's log (`dmesg`) may say which"
        ),
    }
}

/// Whether the program runs on the device, or why not. Where another version's is, it stays until ours have what they need (`attach`); then it
/// gives way to ours without a gap.
fn ensure_one(programs: &mut Programs, link: &Link, attach: bool) -> Result<bool, String> {
    let mac = link.mac.ok_or_else(|| "it is no Ethernet device".to_owned())?;
    programs.prepare_wire(link.index, mac).map_err(|error| error.to_string())?;
    if !attach {
        return Ok(false);
    }
    programs.attach_wire(link.index).map(|()| true).map_err(|error| in_words(&error, &link.name))
}

impl Node {
    /// Has those devices that lead out, and are to, run the program of XDP, and no other device.
    pub(super) fn ensure_wires(&mut self) -> Result<(), Error> {
        let Some(programs) = &mut self.programs else { return Ok(()) };
        let acceleration = self.config.acceleration;
        let mut wanted = Vec::new();
        if acceleration != Acceleration::Disabled {
            wanted = link::list(&mut self.netlink)?;
            wanted.retain(|link| self.facts.outside.contains(&(link.index, link.name.clone())));
        }
        let mut outcomes = BTreeMap::new();
        if acceleration == Acceleration::BestEffort {
            for link in wanted.extract_if(.., |link| is_software(link)) {
                outcomes.insert(link.name, Outcome::Cannot("it is no device of hardware".to_owned()));
            }
        }
        for link in &wanted {
            let outcome = match ensure_one(programs, link, self.awaited.is_empty()) {
                Ok(false) => continue,
                Ok(true) if link.kind == Some(InfoKind::Veth) => Outcome::ForwardsToVeth,
                Ok(true) => Outcome::Forwards,
                Err(reason) => Outcome::Cannot(reason),
            };
            outcomes.insert(link.name.clone(), outcome);
        }
        let kept: Vec<u32> = wanted.iter().map(|link| link.index).collect();
        if self.awaited.is_empty() {
            for index in programs.retain_wires(&kept)? {
                tracing::info!(index, "packets of Services are no longer forwarded by the driver of this device");
            }
        }
        self.wires.note(outcomes, acceleration);
        Ok(())
    }
}
