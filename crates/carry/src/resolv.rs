//! The node's resolver configuration (resolv.conf(5)): its name servers, followed as the file changes.

use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::time::interval;
use tokio_util::sync::CancellationToken;

use crate::is_own;
use crate::upstream::Upstreams;

/// How often the file is looked at: DHCP clients replace it, so watching one inode would not do.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// More servers than this are not worth trying within a client's patience.
const MAX_SERVERS: usize = 8;

/// The name servers of a file. A file that is not there or cannot be read has none, which is logged.
pub(crate) fn read(path: &Path, own: &[SocketAddr]) -> Vec<SocketAddr> {
    match std::fs::read_to_string(path) {
        Ok(text) => without_own(parse(&text), own),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "no upstream name servers: names outside the cluster fail");
            Vec::new()
        }
    }
}

/// The `nameserver` lines.
pub(crate) fn parse(text: &str) -> Vec<SocketAddr> {
    let mut servers = Vec::new();
    for line in text.lines() {
        let line = line.split(['#', ';']).next().unwrap_or_default();
        let mut words = line.split_whitespace();
        if words.next() != Some("nameserver") {
            continue;
        }
        let Some(address) = words.next().and_then(parse_server) else { continue };
        if !servers.contains(&address) && servers.len() < MAX_SERVERS {
            servers.push(address);
        }
    }
    servers
}

fn parse_server(word: &str) -> Option<SocketAddr> {
    if let Some((address, scope)) = word.split_once('%') {
        // A scope is a device's index, or its name, which the kernel tells the index of.
        let scope: u32 = scope.parse().ok().or_else(|| {
            if scope.contains('/') {
                return None;
            }
            std::fs::read_to_string(Path::new("/sys/class/net").join(scope).join("ifindex")).ok()?.trim().parse().ok()
        })?;
        return Some(SocketAddr::V6(SocketAddrV6::new(address.parse().ok()?, 53, 0, scope)));
    }
    let address: IpAddr = word.parse().ok()?;
    (!address.is_unspecified() && !address.is_multicast()).then(|| SocketAddr::new(address.to_canonical(), 53))
}

/// Leaves out the addresses answered on here: a query to them would come back for ever.
pub(crate) fn without_own(servers: Vec<SocketAddr>, own: &[SocketAddr]) -> Vec<SocketAddr> {
    let (loops, servers): (Vec<SocketAddr>, Vec<SocketAddr>) = servers.into_iter().partition(|s| is_own(s.ip(), own));
    for server in loops {
        tracing::warn!(%server, "this name server is this process itself: left out of the upstreams");
    }
    if servers.is_empty() {
        tracing::warn!("no upstream name servers: names outside the cluster fail");
    }
    servers
}

/// Follows the file until shutdown.
pub(crate) async fn follow(
    path: PathBuf,
    own: Vec<SocketAddr>,
    upstreams: Arc<Upstreams>,
    shutdown: CancellationToken,
) {
    let mut seen = stamp(&path);
    let mut ticks = interval(LOOK_EVERY);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = shutdown.cancelled() => return,
        }
        let now = stamp(&path);
        if now != seen {
            seen = now;
            let servers = read(&path, &own);
            tracing::info!(?servers, path = %path.display(), "upstream name servers changed");
            upstreams.set(servers);
        }
    }
}

fn stamp(path: &Path) -> Option<(SystemTime, u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(path).ok()?;
    Some((metadata.modified().ok()?, metadata.len(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_are_read_as_resolvers_do() {
        let text = "# comment\nsearch a b\n nameserver 192.0.2.1 # first\nnameserver\t2001:db8::1\nnameserver 192.0.2.1\n\
                    nameserver nonsense\nnameserver 0.0.0.0\nnameservers 192.0.2.9\nnameserver ::ffff:192.0.2.3\n\
                    nameserver fe80::1%7\noptions ndots:5\n;nameserver 192.0.2.8\nnameserver fe80::2%../../x\nnameserver";
        let expected = ["192.0.2.1:53", "[2001:db8::1]:53", "192.0.2.3:53", "[fe80::1%7]:53"];
        assert_eq!(parse(text).iter().map(ToString::to_string).collect::<Vec<_>>(), expected);
        let many: String = (0..100).map(|n| format!("nameserver 192.0.2.{n}\n")).collect();
        assert_eq!(parse(&many).len(), MAX_SERVERS);
    }

    #[test]
    fn this_process_is_not_its_own_upstream() {
        let own = ["169.254.116.10:53".parse().unwrap()];
        let servers = parse("nameserver 169.254.116.10\nnameserver 192.0.2.1");
        assert_eq!(without_own(servers, &own), ["192.0.2.1:53".parse().unwrap()]);
    }
}
