//! Asking upstream servers: over UDP with a random id, port and letter case, over TCP where UDP does not do; the next
//! server when one fails.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{Instant, timeout, timeout_at};

use crate::message::response::{Mismatch, parse, question, random_case};
use crate::message::{Response, rcode};

/// All that is done for one question takes no longer: clients wait five seconds.
pub(crate) const TOTAL: Duration = Duration::from_millis(4200);
/// How long one server may take, the first, second and third time it is asked.
const ATTEMPTS: [Duration; 3] = [Duration::from_millis(800), Duration::from_millis(1500), Duration::from_millis(2000)];
/// After this many datagrams that are not the answer somebody is guessing: ask by TCP.
const MAX_FOREIGN: usize = 8;

/// A question for upstream servers.
#[derive(Clone, Debug)]
pub(crate) struct Ask {
    /// Wire form, lower case.
    pub(crate) qname: Vec<u8>,
    pub(crate) qtype: u16,
    pub(crate) dnssec_ok: bool,
    pub(crate) checking_disabled: bool,
}

/// The servers, and which of them answered last.
#[derive(Debug)]
pub(crate) struct Upstreams {
    servers: RwLock<Arc<[SocketAddr]>>,
    preferred: AtomicUsize,
}

/// Why one server gave no answer.
#[derive(Debug, thiserror::Error)]
enum AttemptError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("no answer in time")]
    TimedOut,
    #[error("its answer is malformed")]
    Malformed,
    #[error("no random numbers: {0}")]
    Entropy(getrandom::Error),
    #[error("answers that do not match the question")]
    Foreign,
}

impl Upstreams {
    pub(crate) fn new(servers: Vec<SocketAddr>) -> Self {
        Self { servers: RwLock::new(servers.into()), preferred: AtomicUsize::new(0) }
    }

    pub(crate) fn set(&self, servers: Vec<SocketAddr>) {
        *self.servers.write().unwrap_or_else(PoisonError::into_inner) = servers.into();
        self.preferred.store(0, Ordering::Relaxed);
    }

    /// The servers, whichever is asked first.
    pub(crate) fn servers(&self) -> Arc<[SocketAddr]> {
        Arc::clone(&self.servers.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn in_order(&self) -> Vec<(usize, SocketAddr)> {
        let mut order: Vec<(usize, SocketAddr)> = self.servers().iter().copied().enumerate().collect();
        let first = self.preferred.load(Ordering::Relaxed).checked_rem(order.len()).unwrap_or(0);
        order.rotate_left(first);
        order
    }

    /// Asks until a server answers; none when none does in time. An answer that is itself a failure is returned only when no
    /// server has a better one.
    pub(crate) async fn resolve(&self, ask: &Ask) -> Option<Response> {
        let deadline = Instant::now() + TOTAL;
        let mut failure = None;
        for patience in ATTEMPTS {
            for (index, server) in self.in_order() {
                if Instant::now() >= deadline {
                    return failure;
                }
                let until = (Instant::now() + patience).min(deadline);
                match attempt(server, ask, until).await {
                    Ok(response) if matches!(response.rcode(), rcode::NOERROR | rcode::NXDOMAIN) => {
                        self.preferred.store(index, Ordering::Relaxed);
                        return Some(response);
                    }
                    Ok(response) => failure = Some(response),
                    Err(error) => tracing::debug!(%server, %error, "upstream server did not answer"),
                }
            }
            if failure.is_some() {
                return failure;
            }
        }
        failure
    }
}

/// Asks one server: UDP with EDNS; without, if it does not know EDNS; TCP, if the answer is too long or looks forged.
async fn attempt(server: SocketAddr, ask: &Ask, until: Instant) -> Result<Response, AttemptError> {
    for edns in [true, false] {
        match over_udp(server, ask, edns, until).await {
            Ok(response) if edns && matches!(response.rcode(), rcode::FORMERR | rcode::NOTIMP) => {}
            Ok(response) if response.truncated => {
                // A truncated answer is better than none if the server has no TCP.
                return Ok(over_tcp(server, ask, edns).await.unwrap_or(response));
            }
            Err(AttemptError::Foreign) => return over_tcp(server, ask, edns).await,
            other => return other,
        }
    }
    Err(AttemptError::Malformed)
}

async fn over_udp(server: SocketAddr, ask: &Ask, edns: bool, until: Instant) -> Result<Response, AttemptError> {
    let mut random = [0u8; 34];
    getrandom::fill(&mut random).map_err(AttemptError::Entropy)?;
    let [id_high, id_low, bits @ ..] = random;
    let id = u16::from_be_bytes([id_high, id_low]);
    let qname = random_case(&ask.qname, &bits);
    let any: IpAddr = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    // A socket of its own for each question: the kernel picks a random port, and lets in nobody but that server.
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(&question(id, &qname, ask.qtype, edns, ask.dnssec_ok, ask.checking_disabled)).await?;
    let mut buffer = vec![0u8; 4096];
    for _ in 0..MAX_FOREIGN {
        let length = timeout_at(until, socket.recv(&mut buffer)).await.map_err(|_| AttemptError::TimedOut)??;
        match parse(buffer.get(..length).unwrap_or_default(), id, &qname, ask.qtype) {
            Ok(response) => return Ok(response),
            Err(Mismatch::Foreign) => {}
            Err(Mismatch::LetterCase) => return Err(AttemptError::Foreign),
            Err(Mismatch::Malformed) => return Err(AttemptError::Malformed),
        }
    }
    Err(AttemptError::Foreign)
}

async fn over_tcp(server: SocketAddr, ask: &Ask, edns: bool) -> Result<Response, AttemptError> {
    timeout(Duration::from_secs(2), exchange_tcp(server, ask, edns)).await.map_err(|_| AttemptError::TimedOut)?
}

async fn exchange_tcp(server: SocketAddr, ask: &Ask, edns: bool) -> Result<Response, AttemptError> {
    let mut id = [0u8; 2];
    getrandom::fill(&mut id).map_err(AttemptError::Entropy)?;
    let id = u16::from_be_bytes(id);
    let query = question(id, &ask.qname, ask.qtype, edns, ask.dnssec_ok, ask.checking_disabled);
    let mut stream = TcpStream::connect(server).await?;
    let mut message = u16::try_from(query.len()).map_err(|_| AttemptError::Malformed)?.to_be_bytes().to_vec();
    message.extend_from_slice(&query);
    stream.write_all(&message).await?;
    let mut answer = vec![0u8; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut answer).await?;
    parse(&answer, id, &ask.qname, ask.qtype).map_err(|mismatch| match mismatch {
        Mismatch::Foreign | Mismatch::LetterCase => AttemptError::Foreign,
        Mismatch::Malformed => AttemptError::Malformed,
    })
}
