//! The observe socket: what the kernel programs drop, and what audited policies would deny, as it happens, a line each ([`Told`]) to whoever connects. Root only.
//!
//! ```text
//! programs ─► ring ─► thread "towpath-drops" ─► named (pods, Services, rules) ─► every reader's queue ─► its socket
//! ```
//!
//! Promises that the programs tell only while somebody reads, and that a slow reader holds up nobody: it misses lines, and is told how
//! many.

mod name;

use std::sync::{Arc, Weak};

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{Mutex, broadcast, mpsc};
use tokio_util::task::AbortOnDropHandle;
use towpath_datapath::bpf::{Dropped, DropsEar};
use towpath_model::NodeName;
use towpath_wire::config::AgentConfig;
use towpath_wire::observe::{DropEvent, Told};
use tracing::{debug, warn};

use crate::json_socket;
use crate::status::{SharedSources, Sources};
use name::Names;
pub(crate) use name::words;

/// Lines that may wait for a reader.
const WAITING: usize = 4096;

/// Events that may wait to be named.
const UNNAMED: usize = 1024;

/// A line for readers.
#[derive(Clone, Debug)]
struct Line {
    text: Arc<str>,
    /// Nothing will come any more.
    is_last: bool,
}

/// Those who listen, as long as one of them holds it. The lines are their namer's alone: when that is over, however it ended, they learn of
/// it, and who comes then gets another hub.
#[derive(Debug)]
struct Hub {
    lines: broadcast::WeakSender<Line>,
    _naming: AbortOnDropHandle<()>,
}

/// A reader's place: the lines from now on, and the hub, which goes with the last who holds it.
type Seat = (broadcast::Receiver<Line>, Arc<Hub>);

/// The hub, if anybody listens, and the thread of it or of the one before. Only one may listen to the programs at a time: whoever ends has
/// them be silent.
#[derive(Debug, Default)]
struct Listening {
    hub: Weak<Hub>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Listening {
    /// A seat at the hub; none: there is none, or it has nothing to say any more.
    fn seat(&self) -> Option<Seat> {
        let hub = self.hub.upgrade()?;
        let lines = hub.lines.upgrade()?.subscribe();
        Some((lines, hub))
    }
}

/// What the thread tells.
enum News {
    Dropped(Dropped),
    Untold(u64),
    Broken(String),
}

/// Serves the socket until the handle is dropped.
///
/// # Errors
/// The socket cannot be made.
pub(crate) fn serve(config: &AgentConfig, node: &NodeName, sources: SharedSources) -> Result<AbortOnDropHandle<()>> {
    let listener = json_socket::listen(&config.observe_socket())?;
    let node = node.to_string();
    Ok(AbortOnDropHandle::new(tokio::spawn(async move {
        let listening: Arc<Mutex<Listening>> = Arc::default();
        let mut readers = tokio::task::JoinSet::new();
        loop {
            let stream = tokio::select! {
                stream = json_socket::accept(&listener) => stream,
                Some(_) = readers.join_next() => continue,
            };
            let (listening, node, sources) = (listening.clone(), node.clone(), sources.clone());
            readers.spawn(async move {
                if let Err(error) = tell(stream, &listening, &node, &sources).await {
                    debug!(%error, "a reader of drops went away");
                }
            });
        }
    })))
}

async fn tell(mut stream: UnixStream, listening: &Mutex<Listening>, node: &str, sources: &SharedSources) -> Result<()> {
    let seat = match sources.get() {
        Some(sources) => joined(listening, node, sources).await.map_err(|error| format!("{error:#}")),
        None => Err("the agent has just started, and has not opened its data path yet: ask again".to_owned()),
    };
    match seat {
        Ok((lines, _hub)) => pass_on(stream, lines, node).await,
        Err(why) => Ok(stream.write_all(text(&Told::End { node: node.to_owned(), why })?.as_bytes()).await?),
    }
}

/// Writes lines until the reader is gone, or there are no more; then the last one says why.
async fn pass_on(mut stream: UnixStream, mut lines: broadcast::Receiver<Line>, node: &str) -> Result<()> {
    let node = node.to_owned();
    let (mut from, mut to) = stream.split();
    to.write_all(text(&Told::Listening { node: node.clone() })?.as_bytes()).await?;
    let mut gone = [0; 1];
    loop {
        let told = tokio::select! {
            told = lines.recv() => told,
            // A reader says nothing: it is its end.
            _ = from.read(&mut gone) => return Ok(()),
        };
        match told {
            Ok(line) => {
                to.write_all(line.text.as_bytes()).await?;
                if line.is_last {
                    return Ok(());
                }
            }
            Err(RecvError::Lagged(count)) => {
                to.write_all(text(&Told::Untold { node: node.clone(), count })?.as_bytes()).await?;
            }
            Err(RecvError::Closed) => {
                let why =
                    "the agent stopped listening to its kernel programs, its log may say why: ask again".to_owned();
                return Ok(to.write_all(text(&Told::End { node, why })?.as_bytes()).await?);
            }
        }
    }
}

/// A seat at the hub, which begins to listen when the first reader comes.
async fn joined(listening: &Mutex<Listening>, node: &str, sources: &Sources) -> Result<Seat> {
    let mut listening = listening.lock().await;
    if let Some(seat) = listening.seat() {
        return Ok(seat);
    }
    if let Some(thread) = listening.thread.take() {
        // It sees within a moment that nobody hears it, and has the programs be silent; not after they were made to tell again.
        tokio::task::spawn_blocking(move || thread.join()).await.ok();
    }
    let ear = sources.datapath.listen_to_drops().await?;
    let ear = ear.context("this node has no kernel programs to listen to")?;
    let mut names = Names::new(node, sources);
    let (begun, seat) = begin(node, move |news| listen(&ear, &news), move |dropped| names.event(dropped))?;
    *listening = begun;
    Ok(seat)
}

/// Has a thread listen, and what it tells named for whoever has a seat; the first one.
fn begin(
    node: &str,
    listen: impl FnOnce(mpsc::Sender<News>) + Send + 'static,
    name: impl FnMut(&Dropped) -> DropEvent + Send + 'static,
) -> Result<(Listening, Seat)> {
    let (news, heard) = mpsc::channel(UNNAMED);
    let thread = std::thread::Builder::new().name("towpath-drops".to_owned()).spawn(move || listen(news))?;
    let (lines, first) = broadcast::channel(WAITING);
    let hub = lines.downgrade();
    let naming = AbortOnDropHandle::new(tokio::spawn(name_all(heard, name, lines, node.to_owned())));
    let hub = Arc::new(Hub { lines: hub, _naming: naming });
    Ok((Listening { hub: Arc::downgrade(&hub), thread: Some(thread) }, (first, hub)))
}

/// The thread's work, until nobody hears any more.
fn listen(ear: &DropsEar, news: &mpsc::Sender<News>) {
    let (mut missed, mut told) = (0, 0);
    let outcome = ear.listen(|dropped| match dropped {
        Some(dropped) => match news.try_send(News::Dropped(dropped)) {
            Err(mpsc::error::TrySendError::Full(_)) => {
                missed += 1;
                true
            }
            sent => sent.is_ok(),
        },
        None => {
            if let Ok(untold) = ear.untold()
                && untold + missed > told
                && news.try_send(News::Untold(untold + missed - told)).is_ok()
            {
                told = untold + missed;
            }
            !news.is_closed()
        }
    });
    if let Err(error) = outcome {
        warn!(%error, "drops are not told any more");
        drop(news.blocking_send(News::Broken(error.to_string())));
    }
}

/// Names what is heard, until the thread ends or can go on no more.
async fn name_all(
    mut heard: mpsc::Receiver<News>,
    mut name: impl FnMut(&Dropped) -> DropEvent,
    lines: broadcast::Sender<Line>,
    node: String,
) {
    while let Some(news) = heard.recv().await {
        let is_last = matches!(news, News::Broken(_));
        let told = match news {
            // Who has which address is worked out from all pods now and then.
            News::Dropped(dropped) => Told::Drop(Box::new(tokio::task::block_in_place(|| name(&dropped)))),
            News::Untold(count) => Told::Untold { node: node.clone(), count },
            News::Broken(why) => Told::End { node: node.clone(), why },
        };
        if let Ok(text) = text(&told) {
            // Nobody there: the last one has just gone.
            drop(lines.send(Line { text, is_last }));
        }
        if is_last {
            return;
        }
    }
}

fn text(told: &Told) -> Result<Arc<str>> {
    let mut line = serde_json::to_string(told)?;
    line.push('\n');
    Ok(line.into())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::AsyncBufReadExt;

    use super::*;

    /// What a reader gets until its end.
    async fn read_all(lines: broadcast::Receiver<Line>) -> Vec<Told> {
        let (here, there) = UnixStream::pair().unwrap();
        let passing = pass_on(there, lines, "n1");
        let reading = async {
            let mut all = Vec::new();
            let mut lines = tokio::io::BufReader::new(here).lines();
            while let Some(line) = lines.next_line().await.unwrap() {
                all.push(serde_json::from_str(&line).unwrap());
            }
            all
        };
        let both = async { tokio::join!(passing, reading) };
        let (passed, all) = tokio::time::timeout(Duration::from_secs(10), both).await.expect("it has an end");
        passed.unwrap();
        all
    }

    fn node() -> String {
        "n1".to_owned()
    }

    /// When nothing tells any more, who comes gets no seat.
    async fn ends(listening: &Listening) {
        for _ in 0..1000 {
            if listening.seat().is_none() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("a seat at a hub that tells nothing");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn when_the_ring_breaks_readers_are_told_so_and_who_comes_gets_another_hub() {
        let (go, wait) = std::sync::mpsc::channel();
        let listen = move |news: mpsc::Sender<News>| {
            wait.recv().unwrap();
            news.blocking_send(News::Untold(3)).unwrap();
            news.blocking_send(News::Broken("no more".to_owned())).unwrap();
        };
        let (listening, (first, hub)) = begin("n1", listen, |_| DropEvent::default()).unwrap();
        let (second, _) = listening.seat().expect("it listens");
        go.send(()).unwrap();
        let (first, second) = tokio::join!(read_all(first), read_all(second));
        let wanted = [
            Told::Listening { node: node() },
            Told::Untold { node: node(), count: 3 },
            Told::End { node: node(), why: "no more".to_owned() },
        ];
        assert_eq!((first.as_slice(), second.as_slice()), (wanted.as_slice(), wanted.as_slice()));
        // Also while a reader of the old one is still there.
        ends(&listening).await;
        drop(hub);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn who_is_told_nothing_any_more_learns_of_it_also_when_naming_dies() {
        let event = Dropped {
            at: std::time::SystemTime::now(),
            reason: towpath_datapath::bpf::Reason::new(16),
            rule: None,
            audit_set: None,
            place: towpath_datapath::bpf::Place::Device,
            ends: None,
            backend: None,
            protocol: 0,
            tcp_flags: 0,
            icmp_type: 0,
            ifindex: 0,
            bytes: 0,
        };
        let listen = move |news: mpsc::Sender<News>| {
            news.blocking_send(News::Dropped(event)).unwrap();
            // As the true one: until nobody hears.
            while !news.is_closed() {
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        let (mut listening, (lines, hub)) = begin("n1", listen, |_| panic!("a name that nobody can read")).unwrap();
        let all = read_all(lines).await;
        assert!(matches!(all.as_slice(), [Told::Listening { .. }, Told::End { .. }]), "{all:?}");
        ends(&listening).await;
        listening.thread.take().unwrap().join().unwrap();
        drop(hub);
    }
}
