//! Whether a process listens yet: the built-in server counts as started when clients that are sent to it are not refused.

use std::time::Duration;

/// How long a server may take until it is taken for started anyway.
const LIMIT: Duration = Duration::from_secs(5);
/// State `LISTEN` in `/proc/net/tcp` (`TCP_LISTEN`, include/net/tcp_states.h).
const LISTEN: &str = "0A";

/// The first pause between two looks, and the longest: each look has the kernel walk its whole table of connections.
const PAUSE: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(32));

/// Waits until the process listens on all TCP ports, has ended, or has had its time.
pub(super) async fn wait(pid: u32, ports: &[u16]) {
    if ports.is_empty() {
        return;
    }
    let started = tokio::time::Instant::now();
    let mut pause = PAUSE.0;
    while started.elapsed() < LIMIT {
        let Ok(six) = std::fs::read_to_string(format!("/proc/{pid}/net/tcp6")) else { return };
        let missing: Vec<u16> = ports.iter().copied().filter(|port| !listens(&six, *port)).collect();
        if missing.is_empty() {
            return;
        }
        let four = std::fs::read_to_string(format!("/proc/{pid}/net/tcp")).unwrap_or_default();
        if missing.iter().all(|port| listens(&four, *port)) {
            return;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE.1);
    }
}

/// Whether a table of `/proc/net` has a listener on the port: `  0: 00000000:0050 00000000:0000 0A …`.
fn listens(table: &str, port: u16) -> bool {
    let suffix = format!(":{port:04X}");
    table.lines().any(|line| {
        let mut words = line.split_whitespace().skip(1);
        let (local, state) = (words.next().unwrap_or_default(), words.nth(1).unwrap_or_default());
        local.ends_with(&suffix) && state == LISTEN
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_is_told_from_a_connection() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let client = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        let table = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
        assert!(listens(&table, port));
        assert!(!listens(&table, client.local_addr().unwrap().port()));
        assert!(!listens("", port));
    }
}
