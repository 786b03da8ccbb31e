//! The client of a probe pod: each thing is tried until it comes out as expected, or patience is over.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};

use super::{Action, Answer, Ask, Endpoint, Outcome, Served, Size, answered, http, pattern};

/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(200);
/// The longest text that is taken over, in bytes.
const LONGEST_TEXT: u64 = 4 * 1024 * 1024;
/// The pod's device, whose MTU is what a packet may have.
const DEVICE_MTU: &str = "/sys/class/net/eth0/mtu";

/// Tries all, and prints an answer for each. When one has been waited for in vain, what had to settle has had its time: the others
/// are given little more.
pub(super) async fn run(asks: &[Ask]) -> Result<()> {
    let mut in_vain = false;
    for ask in asks {
        let ask = if in_vain { ask.clone().impatient() } else { ask.clone() };
        let answer = one(&ask).await;
        in_vain |= !answer.outcome.is(ask.expect);
        crate::print(&serde_json::to_string(&answer)?)?;
    }
    Ok(())
}

async fn one(ask: &Ask) -> Answer {
    let begun = Instant::now();
    let mut attempts = 0;
    loop {
        attempts += 1;
        let attempt = Instant::now();
        let outcome = attempt_within(&ask.action, Duration::from_millis(ask.timeout)).await;
        let millis = u64::try_from(attempt.elapsed().as_millis()).unwrap_or(u64::MAX);
        if outcome.is(ask.expect) || begun.elapsed() >= Duration::from_millis(ask.patience) {
            return Answer { id: ask.id, outcome, attempts, millis };
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn attempt_within(action: &Action, limit: Duration) -> Outcome {
    match tokio::time::timeout(limit, attempt(action)).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(error)) => of_error(&error),
        Err(_) => Outcome::Silent,
    }
}

fn of_error(error: &anyhow::Error) -> Outcome {
    let kind = error.chain().find_map(|cause| cause.downcast_ref::<io::Error>()).map(io::Error::kind);
    match kind {
        Some(io::ErrorKind::ConnectionRefused) => Outcome::Refused,
        Some(io::ErrorKind::TimedOut) => Outcome::Silent,
        _ => Outcome::Failed(format!("{error:#}")),
    }
}

async fn attempt(action: &Action) -> Result<Outcome> {
    match action {
        Action::Http(to) => {
            let mut answer = get(to, "/").await?;
            Ok(Outcome::Served(served(&mut answer).await?))
        }
        Action::Download(to, bytes) => {
            let mut answer = get(to, &format!("/bytes/{bytes}")).await?;
            Ok(Outcome::Bytes(http::compare(&mut answer.rest, u64::from(*bytes)).await?))
        }
        Action::Upload(to, bytes) => {
            let body = pattern(*bytes as usize);
            let mut answer = exchange(to, "POST /bytes", &body).await?;
            Ok(Outcome::Bytes(served(&mut answer).await?.bytes))
        }
        Action::Udp(to, size) => datagram(to, *size).await,
        Action::Connect(to) => connect(to).await.map(|_| Outcome::Connected),
        Action::Resolve(name) => {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await;
            let found = found.with_context(|| format!("{name} was not found by the pod's resolver"))?;
            let mut addresses: Vec<IpAddr> = found.map(|a| a.ip().to_canonical()).collect();
            addresses.sort_unstable();
            addresses.dedup();
            Ok(Outcome::Addresses(addresses))
        }
        Action::Text(to, path) => {
            let answer = get(to, path).await?;
            let mut text = Vec::new();
            answer.rest.take(LONGEST_TEXT).read_to_end(&mut text).await?;
            Ok(Outcome::Text(String::from_utf8_lossy(&text).into_owned()))
        }
    }
}

async fn connect(to: &Endpoint) -> Result<TcpStream> {
    let stream = TcpStream::connect((to.host.as_str(), to.port)).await.with_context(|| format!("connect to {to}"))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn get(to: &Endpoint, path: &str) -> Result<http::Message> {
    exchange(to, &format!("GET {path}"), &[]).await
}

async fn exchange(to: &Endpoint, request: &str, body: &[u8]) -> Result<http::Message> {
    let mut stream = connect(to).await?;
    let head =
        format!("{request} HTTP/1.1\r\nHost: {to}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body).await.context("send the body")?;
    let answer = http::read(stream).await?;
    anyhow::ensure!(answer.line.contains(" 200"), "{to} answered {:?}", answer.line);
    Ok(answer)
}

async fn served(answer: &mut http::Message) -> Result<Served> {
    let length = answer.length.unwrap_or_default().min(64 * 1024);
    let mut text = vec![0; usize::try_from(length).unwrap_or_default()];
    answer.rest.read_exact(&mut text).await?;
    serde_json::from_slice(&text).context("what answers is no probe of this version")
}

async fn datagram(to: &Endpoint, size: Size) -> Result<Outcome> {
    let mut found = tokio::net::lookup_host((to.host.as_str(), to.port)).await?;
    let address: SocketAddr = found.next().with_context(|| format!("{} has no address", to.host))?;
    let payload = match size {
        Size::WhoAmI => b"whoami".to_vec(),
        Size::Bytes(bytes) => pattern(bytes as usize),
        Size::Mtu => pattern(full_datagram(address.is_ipv6())?),
    };
    let own: SocketAddr = if address.is_ipv6() { "[::]:0".parse()? } else { "0.0.0.0:0".parse()? };
    let socket = UdpSocket::bind(own).await?;
    socket.connect(address).await?;
    socket.send(&payload).await.with_context(|| format!("send {} bytes to {to}", payload.len()))?;
    let mut buffer = vec![0; 65536];
    let read = socket.recv(&mut buffer).await?;
    let got = buffer.get(..read).unwrap_or_default();
    if size == Size::WhoAmI {
        let served = serde_json::from_slice(got).context("what answers is no probe of this version")?;
        return Ok(Outcome::Served(served));
    }
    anyhow::ensure!(
        got == answered(&payload),
        "{} bytes came back for {}, or others than were sent",
        got.len(),
        payload.len()
    );
    Ok(Outcome::Bytes(read as u64))
}

/// Bytes that fill one packet of the pod's device: its MTU less the IP header (without options) and 8 bytes of UDP.
fn full_datagram(ipv6: bool) -> Result<usize> {
    let text = std::fs::read_to_string(DEVICE_MTU).with_context(|| format!("could not read {DEVICE_MTU}"))?;
    let mtu: usize = text.trim().parse().with_context(|| format!("{DEVICE_MTU} says {text:?}"))?;
    Ok(mtu.saturating_sub(if ipv6 { 40 } else { 20 } + 8))
}

#[cfg(test)]
mod tests {
    use super::super::{Expect, serve};
    use super::*;

    /// A server of this very module on a free port.
    async fn server() -> (Endpoint, tokio::task::JoinHandle<()>) {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let task = tokio::spawn(async move { serve::run(&serve::options_for_tests(port)).await.unwrap() });
        let to = Endpoint::new("127.0.0.1", port);
        while connect(&to).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        (to, task)
    }

    fn ask(action: Action, expect: Expect) -> Ask {
        Ask { id: 1, action, expect, patience: 0, timeout: 5000 }
    }

    #[tokio::test]
    async fn what_is_sent_comes_back_and_the_client_is_seen() {
        let (to, _task) = server().await;
        let client = Some("127.0.0.1".parse().unwrap());
        for action in [Action::Http(to.clone()), Action::Udp(to.clone(), Size::WhoAmI)] {
            let Outcome::Served(served) = one(&ask(action, Expect::Answer)).await.outcome else { panic!("no answer") };
            assert_eq!(served.client, client);
        }
        for action in [Action::Download(to.clone(), 300_000), Action::Upload(to.clone(), 300_000)] {
            assert_eq!(one(&ask(action, Expect::Answer)).await.outcome, Outcome::Bytes(300_000));
        }
        let echo = Action::Udp(to.clone(), Size::Bytes(8000));
        assert_eq!(one(&ask(echo, Expect::Answer)).await.outcome, Outcome::Bytes(8000));
        let text = one(&ask(Action::Text(to, "/healthz".to_owned()), Expect::Answer)).await.outcome;
        assert_eq!(text, Outcome::Text("ok\n".to_owned()));
    }

    #[tokio::test]
    async fn an_answer_is_answered_by_nobody() {
        let (to, _task) = server().await;
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.connect(("127.0.0.1", to.port)).await.unwrap();
        let mut buffer = [0; 64];
        socket.send(&pattern(8)).await.unwrap();
        let read = socket.recv(&mut buffer).await.unwrap();
        socket.send(&buffer[..read]).await.unwrap();
        let again = tokio::time::timeout(Duration::from_millis(300), socket.recv(&mut buffer)).await;
        assert!(again.is_err(), "the server answered an answer");
    }

    #[tokio::test]
    async fn nobody_there_is_refused_and_refused_is_not_silence() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let nobody = Action::Http(Endpoint::new("127.0.0.1", free));
        let answer = one(&ask(nobody, Expect::Silence)).await;
        assert_eq!(answer.outcome, Outcome::Refused);
        assert!(!answer.outcome.is(Expect::Silence) && !answer.outcome.is(Expect::Answer));
    }

    #[tokio::test]
    async fn who_never_answers_is_silent_and_patience_ends() {
        let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let to = Endpoint::new("127.0.0.1", silent.local_addr().unwrap().port());
        let action = Action::Udp(to, Size::WhoAmI);
        let tried = one(&Ask { patience: 300, timeout: 50, ..ask(action.clone(), Expect::Answer) }).await;
        assert!(tried.outcome == Outcome::Silent && tried.attempts > 1, "{tried:?}");
        assert_eq!(one(&Ask { timeout: 50, ..ask(action, Expect::Silence) }).await.attempts, 1);
    }

    #[tokio::test]
    async fn a_body_that_was_changed_on_the_way_is_found() {
        let mut body = pattern(1000);
        if let Some(byte) = body.get_mut(700) {
            *byte ^= 1;
        }
        let error = http::compare(&mut body.as_slice(), 1000).await.unwrap_err().to_string();
        assert!(error.contains("byte 700"), "{error}");
        assert!(http::compare(&mut pattern(10).as_slice(), 11).await.is_err());
    }
}
