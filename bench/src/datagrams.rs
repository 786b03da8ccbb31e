//! Datagrams of one flow that a policy lets in or keeps out: when that changes, and a bounded stream of such as are kept out.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::swap::now;
use crate::worker;

/// Between datagrams: the resolution of the figure. Without a pause they would take the CPU that the agent works on.
const AGAIN: Duration = Duration::from_micros(100);
/// How long a change may take before that is a failure.
const LIMIT: Duration = Duration::from_secs(60);

/// What to wait for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    /// A UDP server that echoes.
    pub(crate) to: SocketAddr,
    /// Whether datagrams are to be let in, or kept out.
    pub(crate) passes: bool,
    /// What is not answered by then was kept out, in milliseconds: much longer than an echo takes.
    pub(crate) silence: u64,
}

impl Request {
    /// To be certain of: an echo comes within a second on the busiest machine.
    pub(crate) fn certain(to: SocketAddr, passes: bool) -> Self {
        Self { to, passes, silence: 1000 }
    }
}

/// The client. Its flow stays the same from one request to the next: what is open when a policy changes is judged again, too.
#[derive(Debug, Default)]
pub(crate) struct Client {
    flow: Option<(SocketAddr, UdpSocket)>,
}

impl Client {
    /// Sends until it is so; when the first datagram was sent that was let in, or the first of those that all were kept out.
    ///
    /// # Errors
    /// It did not come to be so.
    pub(crate) fn until(&mut self, request: Request) -> Result<u64> {
        let flow = match self.flow.take() {
            Some((to, socket)) if to == request.to => socket,
            _ => {
                let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).context("make a UDP socket")?;
                socket.connect(request.to).with_context(|| format!("connect to {}", request.to))?;
                socket.set_nonblocking(true)?;
                socket
            }
        };
        let (_, flow) = self.flow.insert((request.to, flow));
        let (deadline, silence) = (Instant::now() + LIMIT, Duration::from_millis(request.silence));
        let mut waiting = Waiting::default();
        while Instant::now() < deadline {
            let at = now()?;
            waiting.sent(at);
            // What is refused by an ICMP error was kept out.
            let _ = flow.send(&at.to_be_bytes());
            std::thread::sleep(AGAIN);
            while let Some(sent) = echo(flow)? {
                let first = waiting.answered(sent);
                if request.passes
                    && let Some(first) = first
                {
                    return Ok(first);
                }
            }
            if !request.passes
                && let Some(first) = waiting.silent(now()?, silence)
            {
                return Ok(first);
            }
        }
        bail!("{} did not come to {} within {LIMIT:?}", request.to, if request.passes { "answer" } else { "be silent" })
    }
}

/// When an echoed datagram was sent; none: there is none yet.
fn echo(flow: &UdpSocket) -> Result<Option<u64>> {
    let mut sent = [0; 8];
    loop {
        match flow.recv(&mut sent) {
            Ok(8) => return Ok(Some(u64::from_be_bytes(sent))),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(error) if matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error).context("read an echo"),
        }
    }
}

/// Times of the datagrams of one request after the last one that was answered.
#[derive(Debug, Default)]
struct Waiting(VecDeque<u64>);

impl Waiting {
    fn sent(&mut self, at: u64) {
        self.0.push_back(at);
    }

    /// Takes note of an echo; the time, if its datagram is of this request.
    fn answered(&mut self, at: u64) -> Option<u64> {
        let known = self.0.contains(&at);
        while self.0.front().is_some_and(|oldest| *oldest <= at) {
            self.0.pop_front();
        }
        known.then_some(at)
    }

    /// The first of those without an answer, when it has waited too long for one.
    fn silent(&self, now: u64, silence: Duration) -> Option<u64> {
        self.0.front().copied().filter(|oldest| Duration::from_nanos(now.saturating_sub(*oldest)) >= silence)
    }
}

/// Sends datagrams to somebody who does not get them, so many a second, until the process is killed.
///
/// # Errors
/// No socket can be made.
pub(crate) fn knock(to: SocketAddr, a_second: u32) -> Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).context("make a UDP socket")?;
    socket.connect(to).with_context(|| format!("connect to {to}"))?;
    worker::say_ready()?;
    let (begun, pause) = (Instant::now(), Duration::from_secs(1) / a_second.max(1));
    for number in 0.. {
        // What is refused by an ICMP error was kept out, as it should be.
        let _ = socket.send(b"?");
        std::thread::sleep((pause * number).saturating_sub(begun.elapsed()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: u64 = 1000;

    #[test]
    fn silence_begins_with_the_first_datagram_after_the_last_answer() {
        let (mut waiting, silence) = (Waiting::default(), Duration::from_nanos(LONG));
        for at in [10, 20, 30, 40] {
            waiting.sent(at);
        }
        assert_eq!(waiting.silent(10 + LONG - 1, silence), None, "it may still be answered");
        // The one before it was lost, not kept out.
        assert_eq!(waiting.answered(20), Some(20));
        assert_eq!(waiting.silent(30 + LONG - 1, silence), None);
        assert_eq!(waiting.silent(30 + LONG, silence), Some(30));
        assert_eq!(waiting.answered(40), Some(40));
        assert_eq!(waiting.silent(1000 + LONG, silence), None, "nothing waits");
    }

    #[test]
    fn an_echo_of_an_earlier_request_says_nothing_of_this_one() {
        let mut waiting = Waiting::default();
        waiting.sent(30);
        assert_eq!(waiting.answered(20), None);
        assert_eq!(waiting.answered(30), Some(30));
    }

    #[test]
    fn a_client_sees_a_server_come_and_go() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let to = server.local_addr().unwrap();
        server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let begun = now().unwrap();
        let echo = std::thread::spawn(move || {
            let mut buffer = [0; 8];
            let mut last = 0;
            for _ in 0..50 {
                let (_, from) = server.recv_from(&mut buffer).unwrap();
                server.send_to(&buffer, from).unwrap();
                last = u64::from_be_bytes(buffer);
            }
            (server, last)
        });
        let mut client = Client::default();
        let first = client.until(Request::certain(to, true)).unwrap();
        let silent = client.until(Request { to, passes: false, silence: 100 }).unwrap();
        let (_server, last) = echo.join().unwrap();
        assert!(begun <= first && first < last && last < silent, "{begun} {first} {last} {silent}");
    }
}
