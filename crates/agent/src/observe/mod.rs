//! The observe socket: what the kernel programs drop, as it happens, a line each ([`Told`]) to whoever connects. Root only.
//!
//! ```text
//! programs ─► ring ─► thread "towpath-drops" ─► named (pods, Services, rules) ─► every reader's queue ─► its socket
//! ```
//!
//! Promises that the programs tell only while somebody reads, and that a slow reader holds up nobody: it misses lines, and is told how
//! many.

mod name;

use std::os::unix::fs::PermissionsExt;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, mpsc};
use tokio_util::task::AbortOnDropHandle;
use towpath_datapath::bpf::{Dropped, DropsEar};
use towpath_model::NodeName;
use towpath_wire::config::AgentConfig;
use towpath_wire::observe::Told;
use tracing::{debug, warn};

use crate::status::{SharedSources, Sources};
use name::Names;

/// Lines that may wait for a reader.
const WAITING: usize = 4096;

/// Events that may wait to be named.
const UNNAMED: usize = 1024;

/// Lines of those who listen, as long as one of them holds it.
#[derive(Debug)]
struct Hub {
    lines: broadcast::Sender<Arc<str>>,
    _naming: AbortOnDropHandle<()>,
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
    let path = config.observe_socket();
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("could not replace {}", path.display()));
        }
        _ => {}
    }
    let listener = UnixListener::bind(&path).with_context(|| format!("could not listen on {}", path.display()))?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
    let node = node.to_string();
    Ok(AbortOnDropHandle::new(tokio::spawn(async move {
        let hub: Arc<Mutex<Weak<Hub>>> = Arc::default();
        let mut readers = tokio::task::JoinSet::new();
        loop {
            let stream = tokio::select! {
                Ok((stream, _)) = listener.accept() => stream,
                Some(_) = readers.join_next() => continue,
            };
            let (hub, node, sources) = (hub.clone(), node.clone(), sources.clone());
            readers.spawn(async move {
                if let Err(error) = tell(stream, &hub, &node, &sources).await {
                    debug!(%error, "a reader of drops went away");
                }
            });
        }
    })))
}

async fn tell(mut stream: UnixStream, hub: &Mutex<Weak<Hub>>, node: &str, sources: &SharedSources) -> Result<()> {
    let hub = match sources.get() {
        Some(sources) => joined(hub, node, sources).await.map_err(|error| format!("{error:#}")),
        None => Err("the agent has just started, and has not opened its data path yet: ask again".to_owned()),
    };
    let hub = match hub {
        Ok(hub) => hub,
        Err(why) => return Ok(stream.write_all(line(&Told::End { node: node.to_owned(), why })?.as_bytes()).await?),
    };
    let mut lines = hub.lines.subscribe();
    let (mut from, mut to) = stream.split();
    let mut gone = [0; 1];
    loop {
        let told = tokio::select! {
            told = lines.recv() => told,
            // A reader says nothing: it is its end.
            _ = from.read(&mut gone) => return Ok(()),
        };
        match told {
            Ok(told) => to.write_all(told.as_bytes()).await?,
            Err(RecvError::Lagged(count)) => {
                let told = line(&Told::Untold { node: node.to_owned(), count })?;
                to.write_all(told.as_bytes()).await?;
            }
            Err(RecvError::Closed) => return Ok(()),
        }
    }
}

/// The hub, which begins to listen when the first reader comes.
async fn joined(shared: &Mutex<Weak<Hub>>, node: &str, sources: &Sources) -> Result<Arc<Hub>> {
    let known = || shared.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
    if let Some(hub) = known() {
        return Ok(hub);
    }
    let ear = sources.datapath.listen_to_drops().await?;
    let ear = ear.context("this node has no kernel programs to listen to")?;
    let mut slot = shared.lock().unwrap_or_else(PoisonError::into_inner);
    // Another reader was as quick: its ear hears what this one would have.
    if let Some(hub) = slot.upgrade() {
        return Ok(hub);
    }
    let (news, heard) = mpsc::channel(UNNAMED);
    std::thread::Builder::new().name("towpath-drops".to_owned()).spawn(move || listen(&ear, &news))?;
    let (lines, _) = broadcast::channel(WAITING);
    let names = Names::new(node, sources);
    let naming = tokio::spawn(name_all(heard, names, lines.clone(), node.to_owned()));
    let hub = Arc::new(Hub { lines, _naming: AbortOnDropHandle::new(naming) });
    *slot = Arc::downgrade(&hub);
    Ok(hub)
}

/// The thread's work, until nobody hears any more.
fn listen(ear: &DropsEar, news: &mpsc::Sender<News>) {
    let (mut missed, mut untold) = (0, 0);
    let outcome = ear.listen(|dropped| match dropped {
        Some(dropped) => match news.try_send(News::Dropped(dropped)) {
            Err(mpsc::error::TrySendError::Full(_)) => {
                missed += 1;
                true
            }
            sent => sent.is_ok(),
        },
        None => {
            let all = missed + ear.untold().unwrap_or(untold);
            if all > untold && news.try_send(News::Untold(all - untold)).is_ok() {
                untold = all;
            }
            !news.is_closed()
        }
    });
    if let Err(error) = outcome {
        warn!(%error, "drops are not told any more");
        drop(news.blocking_send(News::Broken(error.to_string())));
    }
}

async fn name_all(mut heard: mpsc::Receiver<News>, mut names: Names, lines: broadcast::Sender<Arc<str>>, node: String) {
    while let Some(news) = heard.recv().await {
        let told = match news {
            News::Dropped(dropped) => Told::Drop(Box::new(names.event(&dropped))),
            News::Untold(count) => Told::Untold { node: node.clone(), count },
            News::Broken(why) => Told::End { node: node.clone(), why },
        };
        if let Ok(line) = line(&told) {
            // Nobody there: the last one has just gone.
            drop(lines.send(line));
        }
    }
}

fn line(told: &Told) -> Result<Arc<str>> {
    let mut line = serde_json::to_string(told)?;
    line.push('\n');
    Ok(line.into())
}
