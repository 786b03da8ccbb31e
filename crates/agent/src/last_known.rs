//! What the agent knows of the cluster, kept on disk for a start at which the API server is away.
//!
//! An agent that starts again while the API server is gone goes on with what the one before it knew: it gives pods that kubelet
//! starts again their addresses, with their policies, and repairs what others break. The kernel's own state needs none of this:
//! it is pinned, and stays as it is until something is known.
//!
//! A file a kind, `last-known/<kind>.jsonl` in the state directory: a header, a line an object, a line that counts them. It is
//! written whole, synced and renamed; one that is not whole, or of another format, counts as absent. It is written when the kind has
//! changed, [`EVERY`] at most, and so that writing takes no more than a two-hundredth of the time. What is there is used only of
//! kinds that the API server has not listed since the start, and only when it has been silent for a while, be it before its
//! first word or in the middle: an API server that answers slowly is waited for, because what it says is newer, and until then the
//! kernel goes on with what was newer, too.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use towpath_model::{
    ClusterNetworkPolicy, EndpointSlice, Namespace, NamespacedName, NetworkPolicy, Node, Pod, Service, Sharing,
};
use tracing::{debug, info, warn};

use crate::index::{Index, Kind, Noun};
use crate::watch::Update;
use crate::{SharedIndex, counts, read};

/// How long the API server is waited for when the agent starts.
const PATIENCE: Patience =
    Patience { unheard: Duration::from_secs(5), once_heard: Duration::from_secs(15), look: Duration::from_secs(1) };
/// Nothing is written more often.
const EVERY: Duration = Duration::from_secs(5);
/// Writing rests for so many times as long as it took.
const REST_FACTOR: u32 = 200;
/// Objects that are written under one lock of the index: what the API server says meanwhile waits for a fraction of a millisecond.
const CHUNK: usize = 50;
/// What a file says first. Another number: another shape of the nouns, or of the file.
const FORMAT: u32 = 4;

/// See [`PATIENCE`].
#[derive(Clone, Copy, Debug)]
struct Patience {
    /// So long nothing may come after the start before what is kept is used.
    unheard: Duration,
    /// The same where something was listed: the API server was there a moment ago, and may only be slow.
    once_heard: Duration,
    /// How often it is looked whether anything came.
    look: Duration,
}

impl Patience {
    /// Whether the API server counts as silent when the last word of any watch, or the start, was so long ago.
    fn is_over(&self, any_listed: bool, silent: Duration) -> bool {
        silent >= if any_listed { self.once_heard } else { self.unheard }
    }
}

#[derive(Serialize, Deserialize, PartialEq, Eq)]
struct Header {
    format: u32,
    version: String,
}

impl Header {
    /// Nouns have no promise of their shape from one version to the next.
    fn ours() -> Self {
        Self { format: FORMAT, version: env!("CARGO_PKG_VERSION").to_owned() }
    }
}

#[derive(Serialize, Deserialize)]
struct Trailer {
    objects: usize,
}

/// Where it is kept.
#[derive(Clone, Debug)]
pub struct LastKnown {
    dir: PathBuf,
    /// One at a time: a write that is cut off by the end goes on for a moment.
    writing: Arc<Mutex<()>>,
}

/// The revision of each kind that is on disk, and until when its next one waits.
type Kept = BTreeMap<Kind, (u64, Instant)>;
type WriteKind = fn(&Path, &SharedIndex) -> Result<()>;
type RecallKind = fn(&Path) -> Result<Update>;

/// How each kind is written and read.
const KINDS: [(Kind, &str, WriteKind, RecallKind); 7] = [
    (Kind::Node, "nodes", write_kind::<Node>, recall_kind::<Node>),
    (Kind::Namespace, "namespaces", write_kind::<Namespace>, recall_kind::<Namespace>),
    (Kind::Pod, "pods", write_kind::<Pod>, recall_kind::<Pod>),
    (Kind::Service, "services", write_kind::<Service>, recall_kind::<Service>),
    (Kind::EndpointSlice, "endpointslices", write_kind::<EndpointSlice>, recall_kind::<EndpointSlice>),
    (Kind::NetworkPolicy, "networkpolicies", write_kind::<NetworkPolicy>, recall_kind::<NetworkPolicy>),
    (
        Kind::ClusterNetworkPolicy,
        "clusternetworkpolicies",
        write_kind::<ClusterNetworkPolicy>,
        recall_kind::<ClusterNetworkPolicy>,
    ),
];

impl LastKnown {
    /// Below the state directory.
    pub fn new(state_dir: &Path) -> Self {
        Self { dir: state_dir.join("last-known"), writing: Arc::default() }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.jsonl"))
    }

    /// The NetworkPolicies that an earlier run knew; none that can be read: none.
    pub async fn policies(self) -> BTreeMap<NamespacedName, NetworkPolicy> {
        let file = self.file("networkpolicies");
        let read = tokio::task::spawn_blocking(move || read_objects::<NetworkPolicy>(&file)).await;
        match read {
            Ok(Ok(policies)) => policies,
            Ok(Err(error)) => {
                debug!("policies of an earlier run: {error:#}");
                BTreeMap::new()
            }
            Err(error) => {
                debug!(%error, "reading the policies of an earlier run was cut");
                BTreeMap::new()
            }
        }
    }

    /// Keeps what the index learns, until it is dropped.
    pub async fn keep(self, index: SharedIndex) {
        let mut kept = Kept::default();
        let mut complained = false;
        loop {
            tokio::time::sleep(EVERY).await;
            let (this, now, before) = (self.clone(), index.clone(), kept.clone());
            match tokio::task::spawn_blocking(move || this.write(&now, before)).await {
                Ok(Ok(now)) => (kept, complained) = (now, false),
                Ok(Err(error)) => {
                    if !complained {
                        let consequence = "an agent that starts while the API server is away will know less";
                        warn!("could not keep what is known of the cluster: {error:#}; {consequence}");
                        complained = true;
                    }
                    tokio::time::sleep(EVERY * 12).await;
                }
                Err(error) => debug!(%error, "keeping what is known was cut"),
            }
        }
    }

    /// Keeps it once more, before the agent ends.
    pub async fn keep_now(self, index: SharedIndex) {
        if let Ok(Err(error)) = tokio::task::spawn_blocking(move || self.write(&index, Kept::default())).await {
            warn!("could not keep what is known of the cluster: {error:#}");
        }
    }

    /// Writes the kinds that have changed and have rested; what is on disk now.
    fn write(&self, index: &SharedIndex, mut kept: Kept) -> Result<Kept> {
        let _alone = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        fs::create_dir_all(&self.dir).with_context(|| format!("make {}", self.dir.display()))?;
        for (kind, name, write, _) in KINDS {
            let (listed, revision) = {
                let index = read(index);
                (index.listed().contains(&kind), index.revision(kind))
            };
            let due = kept.get(&kind).is_none_or(|(known, rests)| *known != revision && Instant::now() >= *rests);
            // What was only recalled is on disk already.
            if listed && due {
                let begun = Instant::now();
                write(&self.file(name), index)?;
                // A policy that is missing at the next start is one that does not hold.
                let rest = match kind {
                    Kind::NetworkPolicy | Kind::ClusterNetworkPolicy | Kind::Namespace => Duration::ZERO,
                    _ => begun.elapsed() * REST_FACTOR,
                };
                kept.insert(kind, (revision, Instant::now() + rest));
            }
        }
        Ok(kept)
    }

    /// Hands over what an earlier run knew of the kinds that are missing, when the API server has said nothing for some time. Ends when
    /// no kind is missing.
    pub async fn recall_when_silent(self, index: SharedIndex, updates: mpsc::Sender<Update>) {
        self.recall_after(PATIENCE, index, updates).await;
    }

    async fn recall_after(self, patience: Patience, index: SharedIndex, updates: mpsc::Sender<Update>) {
        let begun = Instant::now();
        let mut complained = false;
        loop {
            tokio::time::sleep(patience.look).await;
            let (missing, any_listed) = {
                let index = read(&index);
                (index.missing(), !index.listed().is_empty())
            };
            if missing.is_empty() {
                return;
            }
            let heard = counts::last_heard().map_or(begun, |heard| heard.max(begun));
            if !patience.is_over(any_listed, heard.elapsed()) {
                continue;
            }
            match self.clone().recall_on_another_thread(missing.clone()).await {
                Ok(recalled) => {
                    warn!(?missing, "the API server does not answer: of these, going on with what an earlier run knew");
                    // Judged again by each: what has been listed meanwhile is newer.
                    for update in recalled {
                        if updates.send(update).await.is_err() {
                            return;
                        }
                    }
                }
                Err(error) if !complained => {
                    info!(?missing, "nothing more is known of the cluster until the API server answers: {error:#}");
                    complained = true;
                }
                Err(_) => {}
            }
            tokio::time::sleep(patience.unheard).await;
        }
    }

    async fn recall_on_another_thread(self, kinds: Vec<Kind>) -> Result<Vec<Update>> {
        tokio::task::spawn_blocking(move || self.recall(&kinds)).await.context("recalling was cut")?
    }

    /// All of these kinds, or none: a world in which one kind is missing would be another cluster.
    fn recall(&self, kinds: &[Kind]) -> Result<Vec<Update>> {
        let wanted = KINDS.iter().filter(|(kind, ..)| kinds.contains(kind));
        wanted.map(|(_, name, _, recall)| recall(&self.file(name))).collect()
    }
}

fn write_kind<N: Noun>(path: &Path, index: &SharedIndex) -> Result<()> {
    let unfinished = path.with_extension("new");
    write_objects::<N>(&unfinished, index)
        .and_then(|()| fs::rename(&unfinished, path))
        .and_then(|()| path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all()))
        .with_context(|| format!("write {}", path.display()))
}

fn write_objects<N: Noun>(path: &Path, index: &SharedIndex) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    let mut out = BufWriter::new(file);
    line(&mut out, &Header::ours())?;
    let mut objects = 0;
    let mut last: Option<N::Key> = None;
    loop {
        // Serialised under the lock, written without it: a slow disk holds up nobody.
        let (chunk, count, reached) = serialise::<N>(&read(index), last.as_ref())?;
        out.write_all(&chunk)?;
        objects += count;
        match reached {
            Some(key) => last = Some(key),
            None => break,
        }
    }
    line(&mut out, &Trailer { objects })?;
    // Else a machine that loses power may keep the name, and not what is under it.
    out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
}

/// The next objects after a key; the last one's key if there may be more.
fn serialise<N: Noun>(index: &Index, after: Option<&N::Key>) -> io::Result<(Vec<u8>, usize, Option<N::Key>)> {
    use std::ops::Bound::{Excluded, Unbounded};
    let mut text = Vec::new();
    let mut count = 0;
    for (key, noun) in N::all(index.world()).range((after.map_or(Unbounded, Excluded), Unbounded)).take(CHUNK) {
        line(&mut text, &(key, N::as_written(index, key).unwrap_or(noun)))?;
        count += 1;
        if count == CHUNK {
            return Ok((text, count, Some(key.clone())));
        }
    }
    Ok((text, count, None))
}

fn line(out: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(&mut *out, value)?;
    out.write_all(b"\n")
}

fn recall_kind<N: Noun>(path: &Path) -> Result<Update> {
    let all = read_objects::<N>(path).with_context(|| format!("read {}", path.display()))?;
    Ok(Box::new(move |index| index.recall(all)))
}

fn read_objects<N: Noun>(path: &Path) -> Result<BTreeMap<N::Key, N>> {
    let mut lines = BufReader::new(File::open(path)?).lines();
    let header: Header = serde_json::from_str(&lines.next().context("it is empty")??).context("its first line")?;
    ensure!(header == Header::ours(), "it is of another version ({})", header.version);
    let mut all = BTreeMap::new();
    let mut sharing = Sharing::default();
    let mut before: Option<String> = None;
    for text in lines {
        if let Some(object) = before.replace(text?) {
            let (key, mut noun): (N::Key, N) =
                serde_json::from_str(&object).with_context(|| format!("object {}", all.len() + 1))?;
            noun.slim(&mut sharing);
            all.insert(key, noun);
        }
    }
    let trailer: Trailer = serde_json::from_str(&before.context("it is cut")?).context("its last line")?;
    ensure!(trailer.objects == all.len(), "{} of {} objects are there", all.len(), trailer.objects);
    Ok(all)
}

#[cfg(test)]
mod tests {
    use towpath_model::SocketServices;

    use super::*;
    use towpath_model::cluster_policy::object;

    fn namespace(name: &str) -> Namespace {
        let labels = BTreeMap::from([("a/b".to_owned(), "c".to_owned())]);
        Namespace {
            name: name.to_owned(),
            labels,
            socket_services: SocketServices::Disabled,
            pods_choose: false,
            terminating: false,
        }
    }

    fn policy(text: &str) -> NetworkPolicy {
        let object: k8s_openapi::api::networking::v1::NetworkPolicy = serde_json::from_str(text).unwrap();
        NetworkPolicy::fail_closed(&object).unwrap().0
    }

    /// An index in which every kind is listed, with more namespaces than fit one chunk.
    fn listed() -> SharedIndex {
        let index: SharedIndex = Arc::default();
        {
            let mut index = crate::write(&index);
            let many = (0..CHUNK * 2 + 3).map(|i| format!("n{i}"));
            index.reset(many.map(|name| (name.clone(), namespace(&name))).collect());
            index.reset::<Node>(BTreeMap::new());
            index.reset::<Pod>(BTreeMap::new());
            index.reset::<Service>(BTreeMap::new());
            index.reset::<EndpointSlice>(BTreeMap::new());
            let key = NamespacedName::new("a", "p");
            let odd = policy(
                r#"{"metadata":{"name":"p","namespace":"a"},"spec":{"podSelector":{"matchExpressions":[{"key":"k","operator":"NotIn","values":["x"]}]},
                "ingress":[{"from":[{"ipBlock":{"cidr":"10.0.0.0/8","except":["10.1.0.0/16"]}},{"namespaceSelector":{}}],
                "ports":[{"port":80,"endPort":90},{"port":"web","protocol":"UDP"}]}]}}"#,
            );
            index.reset(BTreeMap::from([(key, odd)]));
            let all = r#"{"metadata":{"name":"c"},"spec":{"tier":"Baseline","priority":3,"subject":{"namespaces":{}},"egress":[
                {"name":"r","action":"Accept","to":[{"nodes":{}},{"networks":["fd00::/8"]},{"domainNames":["*.a.b"]}]},
                {"action":"Pass","to":[{"pods":{"namespaceSelector":{},"podSelector":{}}}],"protocols":[{"destinationNamedPort":"web"}]},
                {"action":"Deny","to":[{"later":{}}]}]}}"#;
            let object: object::ClusterNetworkPolicy = serde_json::from_str(all).unwrap();
            let (policy, _) = ClusterNetworkPolicy::fail_closed(&object).unwrap();
            index.reset(BTreeMap::from([("c".to_owned(), policy)]));
        }
        index
    }

    #[test]
    fn what_is_kept_is_recalled_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let last_known = LastKnown::new(dir.path());
        let index = listed();
        last_known.write(&index, BTreeMap::new()).unwrap();
        let mut again = Index::default();
        last_known.recall(&Kind::ALL).unwrap().into_iter().for_each(|update| update(&mut again));
        assert_eq!(again.world(), read(&index).world());
        assert!(again.is_synced() && again.listed().is_empty());
    }

    #[test]
    fn only_what_changed_is_written_and_nothing_that_was_only_recalled() {
        let dir = tempfile::tempdir().unwrap();
        let last_known = LastKnown::new(dir.path());
        let index = listed();
        let kept = last_known.write(&index, BTreeMap::new()).unwrap();
        for (_, name, _, _) in KINDS {
            fs::remove_file(last_known.file(name)).unwrap();
        }
        crate::write(&index).apply("new".to_owned(), Some(namespace("new")));
        last_known.write(&index, kept).unwrap();
        let there: Vec<&str> = KINDS.iter().map(|k| k.1).filter(|name| last_known.file(name).exists()).collect();
        assert_eq!(there, ["namespaces"]);

        let recalled: SharedIndex = Arc::default();
        crate::write(&recalled).recall::<Namespace>(BTreeMap::new());
        fs::remove_file(last_known.file("namespaces")).unwrap();
        last_known.write(&recalled, BTreeMap::new()).unwrap();
        assert!(!last_known.file("namespaces").exists());
    }

    #[test]
    fn what_is_cut_damaged_or_of_another_version_counts_as_absent() {
        let dir = tempfile::tempdir().unwrap();
        let last_known = LastKnown::new(dir.path());
        last_known.write(&listed(), BTreeMap::new()).unwrap();
        let file = last_known.file("namespaces");
        let whole = fs::read_to_string(&file).unwrap();
        let lines: Vec<&str> = whole.lines().collect();
        let without_one = [&lines[..3], &lines[4..]].concat().join("\n");
        for (damage, text) in [
            ("empty", String::new()),
            ("no trailer", lines[..lines.len() - 1].join("\n")),
            ("cut in an object", whole[..whole.len() / 2].to_owned()),
            ("one is missing", without_one),
            ("another version", whole.replacen(env!("CARGO_PKG_VERSION"), "99.0.0", 1)),
            (
                "another format",
                whole.replacen(&format!("\"format\":{FORMAT}"), &format!("\"format\":{}", FORMAT + 1), 1),
            ),
        ] {
            fs::write(&file, text).unwrap();
            assert!(last_known.recall(&Kind::ALL).is_err(), "{damage}");
        }
        fs::write(&file, &whole).unwrap();
        assert_eq!(last_known.recall(&Kind::ALL).unwrap().len(), 7);
    }

    #[tokio::test]
    async fn kinds_that_were_not_listed_before_the_api_server_went_away_are_recalled_beside_those_that_were() {
        let dir = tempfile::tempdir().unwrap();
        let last_known = LastKnown::new(dir.path());
        last_known.write(&listed(), BTreeMap::new()).unwrap();
        let (updates, mut inbox) = mpsc::channel(16);
        let index: SharedIndex = Arc::default();
        // The smallest list comes, and nothing after it.
        crate::write(&index).reset(BTreeMap::from([("new".to_owned(), namespace("new"))]));
        counts::heard(Kind::Namespace);
        let (unheard, look) = (Duration::from_secs(3600), Duration::from_millis(1));
        let patience = Patience { unheard, once_heard: Duration::from_millis(20), look };
        let _recalling = tokio::spawn(last_known.recall_after(patience, index.clone(), updates));
        while !read(&index).is_synced() {
            let update = tokio::time::timeout(Duration::from_secs(30), inbox.recv()).await;
            update.expect("the other kinds are waited for").unwrap()(&mut crate::write(&index));
        }
        let namespaces: Vec<String> = read(&index).world().namespaces.keys().cloned().collect();
        assert_eq!(namespaces, ["new"], "what was listed is newer");
        assert_eq!(read(&index).world().policies.len(), 1);
    }

    #[test]
    fn an_api_server_that_was_heard_is_waited_for_longer_than_one_that_never_was() {
        let waits = |any_listed, seconds| !PATIENCE.is_over(any_listed, Duration::from_secs(seconds));
        assert!(waits(false, 4) && !waits(false, 5));
        assert!(waits(true, 14) && !waits(true, 15));
    }

    #[tokio::test]
    async fn every_word_of_a_watch_is_a_sign_of_life() {
        let dir = tempfile::tempdir().unwrap();
        let last_known = LastKnown::new(dir.path());
        last_known.write(&listed(), BTreeMap::new()).unwrap();
        let (updates, mut inbox) = mpsc::channel(16);
        let (unheard, look) = (Duration::from_millis(1500), Duration::from_millis(1));
        let patience = Patience { unheard, once_heard: unheard, look };
        let begun = Instant::now();
        let _recalling = tokio::spawn(last_known.recall_after(patience, Arc::default(), updates));
        let mut last = begun;
        // Pages of a long list: none of it is in the index before its end.
        while begun.elapsed() < unheard * 2 && last.elapsed() < unheard {
            (_, last) = (counts::heard(Kind::Pod), Instant::now());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let recalled = inbox.try_recv().is_ok();
        assert!(!recalled || last.elapsed() >= unheard, "it goes on listing");
        assert!(tokio::time::timeout(Duration::from_secs(30), inbox.recv()).await.unwrap().is_some());
    }
}
