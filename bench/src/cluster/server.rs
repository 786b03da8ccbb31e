//! An API server as a node's agent sees it: lists in pages, watches, single objects. It keeps what it is given in memory, as text
//! that is ready to send, and takes no writes: an agent that wants to write something down is told that the kind is not installed.
//!
//! HTTP/1.1 without TLS on the loopback of the node's network namespace, a thread a connection. Events are written to the agent's
//! sockets by whoever changes an object, so that the time is known at which they were.

use std::collections::{BTreeMap, VecDeque};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};

use crate::swap;

/// Events of a kind that are kept for watches that begin late.
const LOG: usize = 4096;
/// How long an agent may leave its socket unread.
const STUCK: Duration = Duration::from_secs(30);
/// A watch without a limit of its own ends after this.
const WATCH: u64 = 300;

/// Objects of one kind.
#[derive(Debug, Default)]
struct Collection {
    /// By namespace and name.
    items: BTreeMap<String, String>,
    /// The last events, each as a chunk of a watch's answer, with its version.
    log: VecDeque<(u64, Vec<u8>)>,
    /// Whether there were more.
    truncated: bool,
    watches: Vec<(u64, TcpStream)>,
}

#[derive(Debug, Default)]
struct State {
    version: u64,
    watches: u64,
    collections: BTreeMap<String, Collection>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct ApiServer {
    shared: Arc<Shared>,
    listener: Arc<TcpListener>,
    address: SocketAddr,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    ended: Mutex<bool>,
    end: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a path means.
#[derive(Debug, PartialEq, Eq)]
struct Target {
    /// Path of the kind over all namespaces.
    collection: String,
    /// `namespace/name`, or the name alone.
    key: Option<String>,
}

impl Target {
    fn parse(path: &str) -> Option<Self> {
        let mut rest = path.trim_matches('/').split('/');
        let prefix = match rest.next()? {
            "api" => format!("/api/{}", rest.next()?),
            "apis" => format!("/apis/{}/{}", rest.next()?, rest.next()?),
            _ => return None,
        };
        let rest: Vec<&str> = rest.collect();
        let (namespace, rest) = match rest.as_slice() {
            ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (Some(*namespace), rest),
            rest => (None, rest),
        };
        let name = rest.get(1).map(|name| namespace.map_or((*name).to_owned(), |space| format!("{space}/{name}")));
        Some(Self { collection: format!("{prefix}/{}", rest.first()?), key: name })
    }

    /// Where an object is.
    fn of(object: &Value) -> Result<(Self, String)> {
        let text = |pointer| object.pointer(pointer).and_then(Value::as_str);
        let (version, kind) = text("/apiVersion").zip(text("/kind")).context("an object without a kind")?;
        let prefix = if version.contains('/') { "/apis" } else { "/api" };
        let kind = kind.to_ascii_lowercase();
        let plural = kind.strip_suffix('y').map_or_else(|| format!("{kind}s"), |stem| format!("{stem}ies"));
        let name = text("/metadata/name").context("an object without a name")?;
        let key = text("/metadata/namespace").map_or(name.to_owned(), |space| format!("{space}/{name}"));
        Ok((Self { collection: format!("{prefix}/{version}/{plural}"), key: None }, key))
    }
}

impl ApiServer {
    /// Listens in a network namespace.
    ///
    /// # Errors
    /// The namespace cannot be entered.
    pub(crate) fn listen(netns: &std::path::Path) -> Result<Self> {
        let file = std::fs::File::open(netns).with_context(|| format!("open {}", netns.display()))?;
        let inside = std::thread::spawn(move || -> Result<TcpListener> {
            setns(file, CloneFlags::CLONE_NEWNET).context("enter the node's network namespace")?;
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listen for the agent")
        });
        let Ok(listener) = inside.join() else { bail!("the thread that listens for the agent died") };
        let listener = Arc::new(listener?);
        let address = listener.local_addr()?;
        let shared = Arc::<Shared>::default();
        let (accepting, served) = (listener.clone(), shared.clone());
        std::thread::spawn(move || {
            while let Ok((stream, _)) = accepting.accept() {
                let shared = served.clone();
                // A connection that breaks is the agent's affair.
                std::thread::spawn(move || drop(serve(&shared, stream)));
            }
        });
        Ok(Self { shared, listener, address })
    }

    /// A kubeconfig for it.
    pub(crate) fn kubeconfig(&self) -> String {
        let server = format!("http://{}", self.address);
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": server}}],
            "users": [{"name": "u", "user": {"token": "none"}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        })
        .to_string()
    }

    /// Makes an object, or puts it in the place of the one that has its name; when its event was given to the agents' sockets, in
    /// nanoseconds of [`swap::now`].
    ///
    /// # Errors
    /// It is no object.
    pub(crate) fn apply(&self, mut object: Value) -> Result<u64> {
        let (target, key) = Target::of(&object)?;
        let mut state = self.shared.state();
        state.version += 1;
        let version = state.version;
        if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.insert("resourceVersion".to_owned(), json!(version.to_string()));
        }
        let text = object.to_string();
        let collection = state.collections.entry(target.collection).or_default();
        let kind = if collection.items.contains_key(&key) { "MODIFIED" } else { "ADDED" };
        let event = chunk(&format!("{{\"type\":\"{kind}\",\"object\":{text}}}\n"));
        collection.items.insert(key, text);
        let at = swap::now()?;
        collection.watches.retain_mut(|(_, stream)| stream.write_all(&event).is_ok());
        collection.log.push_back((version, event));
        if collection.log.len() > LOG {
            collection.log.pop_front();
            collection.truncated = true;
        }
        Ok(at)
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        // Ends the waiting for connections, and so the thread.
        let _ = nix::sys::socket::shutdown(self.listener.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        *self.shared.ended.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.shared.end.notify_all();
        for (_, stream) in self.shared.state().collections.values().flat_map(|found| &found.watches) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn chunk(text: &str) -> Vec<u8> {
    format!("{:x}\r\n{text}\r\n", text.len()).into_bytes()
}

/// A request's line and body.
struct Request {
    method: String,
    path: String,
    query: BTreeMap<String, String>,
}

impl Request {
    /// The next one; none at the end of the connection.
    fn read(from: &mut BufReader<TcpStream>) -> Result<Option<Self>> {
        let mut line = String::new();
        if from.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let mut parts = line.split_whitespace();
        let (method, target) = parts.next().zip(parts.next()).context("a request without a path")?;
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let query = query.split('&').filter_map(|pair| pair.split_once('='));
        let query = query.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        let request = Self { method: method.to_owned(), path: path.to_owned(), query };
        let mut length = 0;
        loop {
            let mut header = String::new();
            if from.read_line(&mut header)? == 0 {
                return Ok(None);
            }
            let header = header.trim_end().to_ascii_lowercase();
            if header.is_empty() {
                break;
            }
            if let Some(value) = header.strip_prefix("content-length:") {
                length = value.trim().parse().context("a Content-Length")?;
            }
        }
        std::io::copy(&mut from.by_ref().take(length), &mut std::io::sink())?;
        Ok(Some(request))
    }

    fn number(&self, name: &str) -> Option<u64> {
        self.query.get(name)?.parse().ok()
    }
}

fn serve(shared: &Shared, stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    stream.set_write_timeout(Some(STUCK))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    while let Some(request) = Request::read(&mut reader)? {
        match Target::parse(&request.path) {
            Some(target) if request.method == "GET" && request.query.contains_key("watch") => {
                watch(shared, &stream, &target.collection, &request)?;
            }
            Some(target) if request.method == "GET" && target.key.is_none() => {
                answer(&stream, 200, &list(&shared.state(), &target.collection, &request))?;
            }
            // Also what is to be patched: as if it said so already.
            Some(target) => {
                let found = target
                    .key
                    .and_then(|key| shared.state().collections.get(&target.collection)?.items.get(&key).cloned());
                match found {
                    Some(object) => answer(&stream, 200, &object)?,
                    None => answer(&stream, 404, &status(404, "NotFound"))?,
                }
            }
            None => answer(&stream, 404, &status(404, "NotFound"))?,
        }
    }
    Ok(())
}

fn status(code: u16, reason: &str) -> String {
    json!({
        "apiVersion": "v1", "kind": "Status", "metadata": {}, "status": "Failure", "code": code, "reason": reason,
        "message": "the benchmark's API server has no such thing",
    })
    .to_string()
}

fn answer(mut stream: &TcpStream, code: u16, body: &str) -> Result<()> {
    let head = format!("HTTP/1.1 {code} x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes())?;
    Ok(stream.write_all(body.as_bytes())?)
}

/// A page of a list. The token of the next one is the number of items before it.
fn list(state: &State, collection: &str, request: &Request) -> String {
    let items = state.collections.get(collection).map(|found| &found.items);
    let skip = request.number("continue").and_then(|skip| usize::try_from(skip).ok()).unwrap_or(0);
    let limit = request.number("limit").filter(|limit| *limit > 0).and_then(|limit| usize::try_from(limit).ok());
    let limit = limit.unwrap_or(usize::MAX);
    let all = items.map_or(0, BTreeMap::len);
    let page: Vec<&str> =
        items.into_iter().flat_map(BTreeMap::values).skip(skip).take(limit).map(String::as_str).collect();
    let next = skip + page.len();
    let token = if next < all { format!(",\"continue\":\"{next}\"") } else { String::new() };
    format!(
        "{{\"apiVersion\":\"v1\",\"kind\":\"List\",\"metadata\":{{\"resourceVersion\":\"{}\"{token}}},\"items\":[{}]}}",
        state.version,
        page.join(",")
    )
}

/// Streams the events after the version that the request names, until its time is over.
fn watch(shared: &Shared, mut stream: &TcpStream, collection: &str, request: &Request) -> Result<()> {
    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")?;
    let since = request.number("resourceVersion").unwrap_or(0);
    let id = {
        let mut state = shared.state();
        state.watches += 1;
        let id = state.watches;
        let found = state.collections.entry(collection.to_owned()).or_default();
        if found.truncated && found.log.front().is_some_and(|(oldest, _)| since + 1 < *oldest) {
            let gone = format!("{{\"type\":\"ERROR\",\"object\":{}}}\n", status(410, "Expired"));
            stream.write_all(&chunk(&gone))?;
            return Ok(stream.write_all(b"0\r\n\r\n")?);
        }
        for (_, event) in found.log.iter().filter(|(version, _)| *version > since) {
            stream.write_all(event)?;
        }
        found.watches.push((id, stream.try_clone()?));
        id
    };
    let limit = Duration::from_secs(request.number("timeoutSeconds").unwrap_or(WATCH));
    let ended = shared.ended.lock().unwrap_or_else(PoisonError::into_inner);
    drop(shared.end.wait_timeout_while(ended, limit, |ended| !*ended));
    let mut state = shared.state();
    let found = state.collections.entry(collection.to_owned()).or_default();
    found.watches.retain(|(other, _)| *other != id);
    Ok(stream.write_all(b"0\r\n\r\n")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(name: &str) -> Value {
        json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": {"name": name, "namespace": "a"}})
    }

    fn ask(server: &ApiServer, path: &str) -> BufReader<TcpStream> {
        let mut stream = TcpStream::connect(server.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let mut reader = BufReader::new(stream);
        let mut line = String::from("x");
        while !line.trim_end().is_empty() {
            line.clear();
            reader.read_line(&mut line).unwrap();
        }
        reader
    }

    fn page(server: &ApiServer, query: &str) -> Value {
        let reader = ask(server, &format!("/apis/discovery.k8s.io/v1/endpointslices?{query}"));
        Value::deserialize(&mut serde_json::Deserializer::from_reader(reader)).unwrap()
    }
    use serde::Deserialize;

    #[test]
    fn paths_name_kinds_and_objects() {
        let target = |path| Target::parse(path).unwrap();
        let of = |collection: &str, key: Option<&str>| Target {
            collection: collection.to_owned(),
            key: key.map(str::to_owned),
        };
        assert_eq!(target("/api/v1/nodes"), of("/api/v1/nodes", None));
        assert_eq!(target("/api/v1/namespaces/x"), of("/api/v1/namespaces", Some("x")));
        assert_eq!(target("/api/v1/namespaces/x/pods/p/status"), of("/api/v1/pods", Some("x/p")));
        assert_eq!(target("/apis/g/v1/things"), of("/apis/g/v1/things", None));
        assert!(Target::parse("/version").is_none());
        let path = |kind| {
            let object = json!({"apiVersion": "g/v1", "kind": kind, "metadata": {"name": "x", "namespace": "a"}});
            Target::of(&object).unwrap().0.collection
        };
        assert_eq!(
            [path("EndpointSlice"), path("NetworkPolicy")],
            ["/apis/g/v1/endpointslices", "/apis/g/v1/networkpolicies"]
        );
    }

    #[test]
    fn a_list_comes_in_pages_and_a_watch_goes_on_where_it_was() {
        let server = ApiServer::listen(std::path::Path::new("/proc/self/ns/net"));
        // Entering a namespace, even one's own, needs root.
        let Ok(server) = server else { return assert!(!nix::unistd::Uid::effective().is_root()) };
        for name in ["one", "two", "three"] {
            server.apply(object(name)).unwrap();
        }
        let first = page(&server, "limit=2");
        assert_eq!(first["items"].as_array().unwrap().len(), 2);
        let token = first["metadata"]["continue"].as_str().unwrap();
        let last = page(&server, &format!("limit=2&continue={token}"));
        assert_eq!((&last["items"][0]["metadata"]["name"], last["metadata"].get("continue")), (&json!("two"), None));

        let mut events = ask(&server, "/apis/discovery.k8s.io/v1/endpointslices?watch=true&resourceVersion=2");
        let mut next = || {
            let mut line = String::new();
            while !line.starts_with('{') {
                line.clear();
                assert!(events.read_line(&mut line).unwrap() > 0);
            }
            let event: Value = serde_json::from_str(&line).unwrap();
            (event["type"].clone(), event["object"]["metadata"]["name"].clone())
        };
        assert_eq!(next(), (json!("ADDED"), json!("three")));
        server.apply(object("one")).unwrap();
        assert_eq!(next(), (json!("MODIFIED"), json!("one")));
    }
}
