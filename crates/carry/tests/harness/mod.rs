//! A carry on a loopback address of this process's own, a client, and an upstream server that does what names tell it to.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use domain::base::iana::Rcode;
use domain::base::message_builder::AdditionalBuilder;
use domain::base::{Message, MessageBuilder, Name, Rtype, Ttl};
use domain::rdata::{A, AllRecordData};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use towpath_wire::config::CarryConfig;
use towpath_wire::dns::{DnsAnswer, DnsPort, DnsService, FeedMessage, Shared};

/// A loopback address that no other test process uses.
pub(crate) fn address(last: u8) -> IpAddr {
    let [.., high, middle, low] = std::process::id().to_be_bytes();
    IpAddr::V4(Ipv4Addr::new(127, 64 | high << 3 | last, middle, low))
}

pub(crate) const PORT: u16 = 5353;

/// A running carry; ends when dropped.
pub(crate) struct Carry {
    pub(crate) dns: SocketAddr,
    stop: CancellationToken,
    task: Option<JoinHandle<Result<(), towpath_carry::CarryError>>>,
}

pub(crate) fn config(dir: &Path, upstreams: Vec<SocketAddr>) -> CarryConfig {
    CarryConfig {
        run_dir: dir.join("run"),
        state_dir: dir.join("state"),
        dns_addresses: vec![address(0)],
        upstreams,
        resolv_conf: dir.join("resolv.conf"),
    }
}

impl Carry {
    pub(crate) async fn start(config: CarryConfig) -> Carry {
        let (stop, dns) = (CancellationToken::new(), SocketAddr::new(config.dns_addresses[0], PORT));
        let task = tokio::spawn(towpath_carry::run_on(config, PORT, stop.clone()));
        let carry = Carry { dns, stop, task: Some(task) };
        // Up when it answers both ways; before it is fed it says SERVFAIL.
        eventually("carry answers", async || {
            ask_once(carry.dns, &query("up.test", Rtype::A, None)).await.is_some()
                && TcpStream::connect(carry.dns).await.is_ok()
        })
        .await;
        carry
    }

    pub(crate) async fn stop(mut self) {
        self.stop.cancel();
        let ended = timeout(Duration::from_secs(5), self.task.take().unwrap()).await;
        ended.expect("carry stops when told to").unwrap().unwrap();
    }
}

impl Drop for Carry {
    fn drop(&mut self) {
        self.stop.cancel();
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

/// Polls until `check` holds.
pub(crate) async fn eventually(what: &str, mut check: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !check().await {
        assert!(Instant::now() < deadline, "in vain: {what}");
        sleep(Duration::from_millis(10)).await;
    }
}

pub(crate) fn cluster(services: Vec<Shared<DnsService>>) -> FeedMessage {
    FeedMessage::Snapshot {
        domain: "cluster.local".to_owned(),
        services,
        namespaces: vec!["default".to_owned()],
        pods: vec![],
        rules: None,
    }
}

pub(crate) fn web(address: [u8; 4]) -> Shared<DnsService> {
    service(
        "web",
        DnsAnswer::ClusterIps {
            addresses: vec![address.into()],
            ports: vec![DnsPort { name: "http".to_owned(), protocol: "tcp".to_owned(), port: 80 }],
            endpoints: vec![],
        },
    )
}

pub(crate) fn service(name: &str, answer: DnsAnswer) -> Shared<DnsService> {
    DnsService { namespace: "default".to_owned(), name: name.to_owned(), answer }.into()
}

/// Starts a client of the feed, sends `messages` and waits until they are applied.
pub(crate) async fn feed(dir: &Path, messages: Vec<FeedMessage>) -> towpath_carry::feed::Client {
    let client = towpath_carry::feed::Client::start(dir.join("run/carry.sock"));
    client.send(messages);
    eventually("the feed is applied", async || client.is_synced()).await;
    client
}

// ---- client -----------------------------------------------------------------------------------------------------------

pub(crate) fn query(name: &str, rtype: Rtype, edns: Option<u16>) -> Vec<u8> {
    let mut builder = MessageBuilder::new_vec();
    builder.header_mut().set_id(0x4242);
    builder.header_mut().set_rd(true);
    let mut question = builder.question();
    question.push((Name::vec_from_str(name).unwrap(), rtype)).unwrap();
    let mut additional = question.additional();
    if let Some(size) = edns {
        additional
            .opt(|opt| {
                opt.set_udp_payload_size(size);
                Ok(())
            })
            .unwrap();
    }
    additional.finish()
}

/// What an answer says, in a form that tests compare.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Said {
    pub(crate) rcode: Rcode,
    pub(crate) authoritative: bool,
    pub(crate) truncated: bool,
    pub(crate) answers: Vec<String>,
    pub(crate) ttls: Vec<u32>,
    pub(crate) authority: usize,
    pub(crate) edns: bool,
}

pub(crate) fn said(bytes: &[u8]) -> Said {
    let message = Message::from_octets(bytes).unwrap();
    let mut answers = Vec::new();
    let mut ttls = Vec::new();
    for record in message.answer().unwrap() {
        let record = record.unwrap().into_any_record::<AllRecordData<_, _>>().unwrap();
        answers.push(format!("{} {} {}", record.owner(), record.rtype(), record.data()));
        ttls.push(record.ttl().as_secs());
    }
    answers.sort();
    assert!(message.header().qr() && message.header().ra());
    Said {
        rcode: message.header().rcode(),
        authoritative: message.header().aa(),
        truncated: message.header().tc(),
        answers,
        ttls,
        authority: usize::from(message.header_counts().nscount()),
        edns: message.opt().is_some(),
    }
}

async fn ask_once(server: SocketAddr, query: &[u8]) -> Option<Vec<u8>> {
    let socket = UdpSocket::bind((address(7), 0)).await.unwrap();
    socket.connect(server).await.unwrap();
    socket.send(query).await.ok()?;
    let mut buffer = vec![0; 65536];
    let length = timeout(Duration::from_secs(6), socket.recv(&mut buffer)).await.ok()?.ok()?;
    buffer.truncate(length);
    assert_eq!(buffer[..2], query[..2], "the id comes back");
    Some(buffer)
}

pub(crate) async fn udp(server: SocketAddr, name: &str, rtype: Rtype) -> Said {
    udp_edns(server, name, rtype, None).await
}

pub(crate) async fn udp_edns(server: SocketAddr, name: &str, rtype: Rtype, edns: Option<u16>) -> Said {
    said(&ask_once(server, &query(name, rtype, edns)).await.unwrap_or_else(|| panic!("no answer for {name}")))
}

/// Sends bytes as they are; what comes back within `patience`, if anything.
pub(crate) async fn raw(server: SocketAddr, bytes: &[u8], patience: Duration) -> Option<Vec<u8>> {
    let socket = UdpSocket::bind((address(7), 0)).await.unwrap();
    socket.connect(server).await.unwrap();
    socket.send(bytes).await.unwrap();
    let mut buffer = vec![0; 65536];
    let length = timeout(patience, socket.recv(&mut buffer)).await.ok()?.ok()?;
    buffer.truncate(length);
    Some(buffer)
}

/// Asks for so many names of a zone, to which a server as [`Upstream`] never answers, without waiting for answers; until they are all read.
pub(crate) async fn flood(carry: &Carry, dir: &Path, from: IpAddr, names: u32, zone: &str) -> UdpSocket {
    let socket = UdpSocket::bind((from, 0)).await.unwrap();
    socket.connect(carry.dns).await.unwrap();
    let queries = async || towpath_carry::feed::counters(&dir.join("run/carry.sock")).await.unwrap().udp_queries;
    let before = queries().await;
    for name in 0..names {
        socket.send(&query(&format!("silent.{name}.{from}.{zone}"), Rtype::A, None)).await.unwrap();
        // No more at a time than a socket has room for.
        if name % 50 == 49 || name + 1 == names {
            eventually("they are read", async || queries().await > before + u64::from(name)).await;
        }
    }
    socket
}

/// A TCP connection to a DNS server.
pub(crate) struct Tcp(TcpStream);

impl Tcp {
    pub(crate) async fn connect(server: SocketAddr) -> Tcp {
        Tcp(TcpStream::connect(server).await.unwrap())
    }

    pub(crate) async fn send(&mut self, id: u16, name: &str, rtype: Rtype) {
        let mut query = query(name, rtype, None);
        query[..2].copy_from_slice(&id.to_be_bytes());
        // A server that closed the connection shows when the answer is read.
        let _ = self.0.write_u16(u16::try_from(query.len()).unwrap()).await;
        let _ = self.0.write_all(&query).await;
    }

    pub(crate) async fn send_bytes(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).await.unwrap();
    }

    /// The next answer and its id; none when the server closed the connection.
    pub(crate) async fn receive(&mut self) -> Option<(u16, Said)> {
        let receiving = async {
            let length = self.0.read_u16().await.ok()?;
            let mut answer = vec![0; usize::from(length)];
            self.0.read_exact(&mut answer).await.ok()?;
            Some((u16::from_be_bytes([answer[0], answer[1]]), said(&answer)))
        };
        timeout(Duration::from_secs(15), receiving).await.expect("an answer or an end in time")
    }
}

// ---- upstream ---------------------------------------------------------------------------------------------------------

/// A server that answers `A` queries; the first label of a name says how:
/// `slow` after 300 ms, `big` truncated over UDP and with 40 records over TCP, `forged` after forgeries, `lower` with the
/// name's letter case lost, `fail` SERVFAIL, `silent` never, `gone` NXDOMAIN with a SOA-less authority, `short` TTL 1,
/// `noedns` FORMERR to queries with EDNS.
pub(crate) struct Upstream {
    pub(crate) address: SocketAddr,
    asked: Arc<Mutex<BTreeMap<String, u32>>>,
    tasks: JoinSet<()>,
}

impl Upstream {
    pub(crate) async fn start(last: u8) -> Upstream {
        let address = SocketAddr::new(address(last), PORT);
        let asked: Arc<Mutex<BTreeMap<String, u32>>> = Arc::default();
        let (udp, tcp) = (UdpSocket::bind(address).await.unwrap(), TcpListener::bind(address).await.unwrap());
        let mut tasks = JoinSet::new();
        tasks.spawn(serve_udp(Arc::new(udp), Arc::clone(&asked)));
        tasks.spawn(serve_tcp(tcp, Arc::clone(&asked)));
        Upstream { address, asked, tasks }
    }

    /// How often a name was asked for over `udp` or `tcp`.
    pub(crate) fn asked(&self, transport: &str, name: &str) -> u32 {
        self.asked.lock().unwrap().get(&format!("{transport} {name}")).copied().unwrap_or(0)
    }

    pub(crate) fn stop(mut self) {
        self.tasks.abort_all();
        drop(std::mem::take(&mut self.tasks));
    }
}

fn note(asked: &Mutex<BTreeMap<String, u32>>, transport: &str, query: &[u8]) -> String {
    let message = Message::from_octets(query).unwrap();
    let name = message.sole_question().unwrap().qname().to_string();
    *asked.lock().unwrap().entry(format!("{transport} {}", name.to_ascii_lowercase())).or_default() += 1;
    name
}

async fn serve_udp(socket: Arc<UdpSocket>, asked: Arc<Mutex<BTreeMap<String, u32>>>) {
    let mut pending = JoinSet::new();
    loop {
        let mut buffer = vec![0; 2048];
        let (length, client) = socket.recv_from(&mut buffer).await.unwrap();
        buffer.truncate(length);
        let name = note(&asked, "udp", &buffer);
        let socket = Arc::clone(&socket);
        pending.spawn(async move {
            for reply in replies_udp(&name.to_ascii_lowercase(), &buffer).await {
                let _ = socket.send_to(&reply, client).await;
            }
        });
    }
}

async fn replies_udp(name: &str, query: &[u8]) -> Vec<Vec<u8>> {
    let plain = answer(query, Rcode::NOERROR, 60, 1).finish();
    match name.split('.').next().unwrap() {
        "slow" => {
            sleep(Duration::from_millis(300)).await;
            vec![plain]
        }
        "big" => {
            let mut truncated = answer(query, Rcode::NOERROR, 60, 0);
            truncated.header_mut().set_tc(true);
            vec![truncated.finish()]
        }
        "forged" => {
            let mut wrong_id = answer(query, Rcode::NOERROR, 9999, 2).finish();
            wrong_id[0] ^= 0xff;
            let mut wrong_name = answer(query, Rcode::NOERROR, 9999, 2).finish();
            wrong_name[13] ^= 0x02;
            vec![wrong_id, wrong_name, vec![0; 5], plain]
        }
        "lower" => vec![plain.to_ascii_lowercase()],
        "fail" => vec![answer(query, Rcode::SERVFAIL, 60, 0).finish()],
        "gone" => vec![answer(query, Rcode::NXDOMAIN, 60, 0).finish()],
        "short" => vec![answer(query, Rcode::NOERROR, 1, 1).finish()],
        "noedns" if Message::from_octets(query).unwrap().opt().is_some() => {
            vec![answer(query, Rcode::FORMERR, 60, 0).finish()]
        }
        "silent" => vec![],
        _ => vec![plain],
    }
}

async fn serve_tcp(listener: TcpListener, asked: Arc<Mutex<BTreeMap<String, u32>>>) {
    let mut connections = JoinSet::new();
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        let asked = Arc::clone(&asked);
        connections.spawn(async move {
            let Ok(length) = stream.read_u16().await else { return };
            let mut query = vec![0; usize::from(length)];
            if stream.read_exact(&mut query).await.is_err() {
                return;
            }
            let name = note(&asked, "tcp", &query).to_ascii_lowercase();
            let reply = answer(&query, Rcode::NOERROR, 60, if name.starts_with("big") { 40 } else { 1 }).finish();
            let _ = stream.write_u16(u16::try_from(reply.len()).unwrap()).await;
            let _ = stream.write_all(&reply).await;
        });
    }
}

/// A reply with `count` addresses, 192.0.2.1 and up.
fn answer(query: &[u8], rcode: Rcode, ttl: u32, count: u8) -> AdditionalBuilder<Vec<u8>> {
    let message = Message::from_octets(query).unwrap();
    let mut section = MessageBuilder::new_vec().start_answer(&message, rcode).unwrap();
    section.header_mut().set_ra(true);
    let question = message.sole_question().unwrap();
    for last in 1..=count {
        section.push((question.qname(), Ttl::from_secs(ttl), A::from_octets(192, 0, 2, last))).unwrap();
    }
    section.additional()
}
