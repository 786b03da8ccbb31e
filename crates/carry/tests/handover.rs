//! One carry after another on the same node, under load: no query is lost, whoever comes or dies.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test ends at the first surprise; clippy.toml says so for test functions, and this is their harness"
)]
#![allow(dead_code, reason = "the harness is shared with tests/serve.rs, which uses more of it")]

mod harness;

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use domain::base::Rtype;
use harness::*;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use towpath_carry::feed::Client;
use towpath_wire::dns::FeedMessage;

const NAME: &str = "web.default.svc.cluster.local";

/// Clients that ask without a pause, each time from a new socket, until they are told to stop.
struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    clients: JoinSet<Vec<String>>,
}

impl Load {
    fn start(server: std::net::SocketAddr) -> Load {
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut clients = JoinSet::new();
        for kind in ["udp", "udp", "udp", "tcp", "slow"] {
            let (stop, answered) = (Arc::clone(&stop), Arc::clone(&answered));
            clients.spawn(async move {
                let (mut lost, mut count) = (Vec::new(), 0);
                while !stop.load(Ordering::Relaxed) {
                    count += 1;
                    let heard = match kind {
                        // From the cluster.
                        "udp" => raw(server, &query(NAME, Rtype::A, None), Duration::from_secs(2)).await,
                        // Under way upstream while the processes change.
                        "slow" => {
                            let name = format!("slow.n{count}.example");
                            raw(server, &query(&name, Rtype::A, None), Duration::from_secs(2)).await
                        }
                        _ => tcp_once(server).await,
                    };
                    match heard {
                        Some(answer) if answer[3] & 0xf == 0 => drop(answered.fetch_add(1, Ordering::Relaxed)),
                        Some(answer) => lost.push(format!("{kind} {count}: response code {}", answer[3] & 0xf)),
                        None => lost.push(format!("{kind} {count}: no answer")),
                    }
                }
                lost
            });
        }
        Load { stop, answered, clients }
    }

    async fn end(mut self) -> (u64, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        let mut lost = Vec::new();
        while let Some(client) = self.clients.join_next().await {
            lost.extend(client.unwrap());
        }
        (self.answered.load(Ordering::Relaxed), lost)
    }
}

async fn tcp_once(server: std::net::SocketAddr) -> Option<Vec<u8>> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let asking = async {
        let mut stream = tokio::net::TcpStream::connect(server).await.ok()?;
        let query = query(NAME, Rtype::A, None);
        stream.write_u16(u16::try_from(query.len()).unwrap()).await.ok()?;
        stream.write_all(&query).await.ok()?;
        let mut answer = vec![0; usize::from(stream.read_u16().await.ok()?)];
        stream.read_exact(&mut answer).await.ok()?;
        Some(answer)
    };
    timeout(Duration::from_secs(2), asking).await.ok()?
}

fn feed_socket(dir: &Path) -> Option<u64> {
    std::fs::metadata(dir.join("run/carry.sock")).ok().map(|found| found.ino())
}

/// Starts one more carry and waits until it is the one that is fed, which is after it began to answer.
async fn successor(config: towpath_wire::config::CarryConfig, dir: &Path, client: &Client) -> Carry {
    let before = feed_socket(dir);
    let carry = Carry::start(config).await;
    eventually("the successor is fed", async || feed_socket(dir) != before && client.is_synced()).await;
    carry
}

/// What every socket of the address says: with two that read, half of the askers would hear the other.
async fn all_say(server: std::net::SocketAddr, last: u8) {
    for _ in 0..32 {
        assert_eq!(udp(server, NAME, Rtype::A).await.answers, [format!("{NAME} A 10.96.0.{last}")]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn successors_take_over_and_no_query_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let upstream = Upstream::start(1).await;
    let config = config(dir.path(), vec![upstream.address]);
    let mut carry = Carry::start(config.clone()).await;
    let client = feed(dir.path(), vec![cluster(vec![web([10, 96, 0, 1])])]).await;
    let load = Load::start(carry.dns);
    for last in 2..8 {
        let next = successor(config.clone(), dir.path(), &client).await;
        client.send(vec![FeedMessage::Set { service: web([10, 96, 0, last]) }]);
        eventually("the change is applied", async || client.is_synced()).await;
        all_say(next.dns, last).await;
        std::mem::replace(&mut carry, next).stop().await;
        sleep(Duration::from_millis(100)).await;
        all_say(carry.dns, last).await;
    }
    let (answered, lost) = load.end().await;
    assert!(lost.is_empty(), "{} of {} lost: {lost:#?}", lost.len(), answered);
    assert!(answered > 1000, "only {answered}: that was no load");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_that_dies_gives_everything_back() {
    let dir = tempfile::tempdir().unwrap();
    let upstream = Upstream::start(1).await;
    let config = config(dir.path(), vec![upstream.address]);
    let first = Carry::start(config.clone()).await;
    let client = feed(dir.path(), vec![cluster(vec![web([10, 96, 0, 1])])]).await;
    let second = successor(config.clone(), dir.path(), &client).await;
    let third = successor(config.clone(), dir.path(), &client).await;
    client.send(vec![FeedMessage::Set { service: web([10, 96, 0, 3]) }]);
    eventually("the change is applied", async || client.is_synced()).await;
    all_say(first.dns, 3).await;
    // The one in the middle ends: the first waits on, or takes over from the third; either way all agree.
    second.stop().await;
    eventually("the feed is whole", async || client.is_synced()).await;
    all_say(first.dns, 3).await;
    client.send(vec![FeedMessage::Set { service: web([10, 96, 0, 4]) }]);
    eventually("the change is applied", async || client.is_synced()).await;
    all_say(first.dns, 4).await;
    // And the last dies without a word.
    let load = Load::start(first.dns);
    sleep(Duration::from_millis(50)).await;
    drop(third);
    client.send(vec![FeedMessage::Set { service: web([10, 96, 0, 5]) }]);
    eventually("the first is fed again", async || client.is_synced()).await;
    all_say(first.dns, 5).await;
    let (_, lost) = load.end().await;
    // What the dead one had taken on died with it, at most one of each client that it does not answer at once; nothing else.
    let of = |kind: &str| lost.iter().filter(|lost| lost.starts_with(kind)).count();
    assert!(of("udp") == 0 && of("slow") <= 1 && of("tcp") <= 1, "{lost:#?}");
    first.stop().await;
}

#[tokio::test]
async fn what_is_under_way_at_the_end_is_answered_first() {
    let dir = tempfile::tempdir().unwrap();
    let upstream = Upstream::start(1).await;
    let carry = Carry::start(config(dir.path(), vec![upstream.address])).await;
    let _client = feed(dir.path(), vec![cluster(vec![])]).await;
    let server = carry.dns;
    let asking = tokio::spawn(async move {
        raw(server, &query("slow.example", Rtype::A, None), Duration::from_secs(2)).await.is_some()
    });
    eventually("the question is upstream", async || upstream.asked("udp", "slow.example") == 1).await;
    carry.stop().await;
    assert!(timeout(Duration::from_millis(50), asking).await.unwrap().unwrap());
}
