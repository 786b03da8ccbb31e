//! Plugin and agent die in the system calls of ADD and DEL, as processes do that are killed, or whose machine has no memory left. Whatever the call:
//! the runtime's next try succeeds, no address has two owners, and after the last DEL nothing is left.
//!
//! The plugin dies in every call that it makes; the agent, which has to be started again each time, in a few of its calls, with
//! `TOWPATH_FULL=1` in many (nextest's profile `full` has the time). Then many lives at once, with plugins and agents killed at random moments; the
//! seed is printed, and `TOWPATH_SEED` repeats its choices.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};
use towpath_walkthrough::cluster::{Cluster, Families, wait};
use towpath_walkthrough::containerd::can_run;
use towpath_walkthrough::libcni::{Libcni, address_of, answer_of};
use towpath_walkthrough::machine::{self, can_run_labs};
use towpath_walkthrough::strace::{self, Call, Tracer};

const NODE: &str = "n1";
const VERSION: &str = "1.1.0";
const SEED: u64 = 0x0043_4e49_4b49_4c4c;
/// What a runtime's call may need until it succeeds: an agent that was killed again and again is started after 10 s.
const PATIENCE: Duration = Duration::from_secs(40);
/// Queued DELs and stray leases are looked at every 10 s, devices every 30 s.
const TIDY: Duration = Duration::from_secs(60);
/// Calls by which an agent changes or tells something.
const TELLING: [&str; 13] = [
    "sendto", "sendmsg", "recvmsg", "recvfrom", "openat", "write", "rename", "fsync", "unlink", "bpf", "setns",
    "clone3", "socket",
];

fn full() -> bool {
    std::env::var_os("TOWPATH_FULL").is_some_and(|value| value == "1")
}

/// A network namespace as a runtime makes one; it is there as long as the value.
struct Namespace(File);

impl Namespace {
    fn new() -> Result<Self> {
        let made = std::thread::spawn(|| -> Result<File> {
            unshare(CloneFlags::CLONE_NEWNET).context("make a network namespace")?;
            File::open("/proc/thread-self/ns/net").context("open a network namespace")
        });
        Ok(Self(made.join().map_err(|_| anyhow!("the thread that makes a namespace died"))??))
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()))
    }
}

/// A node of a lab, as its runtime and its administrator see it.
struct Node<'c> {
    cluster: &'c Cluster,
    cni: Libcni,
    run: PathBuf,
    state: PathBuf,
}

/// Names of a directory's entries; none where there is no such directory.
fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

impl<'c> Node<'c> {
    fn of(cluster: &'c Cluster) -> Result<Self> {
        let of = |root: &str| Path::new(root).join("towpath/lab").join(cluster.name()).join("nodes").join(NODE);
        Ok(Self { cluster, cni: Libcni::of_node(cluster, NODE)?, run: of("/run"), state: of("/var/lib") })
    }

    fn call(&self, cni: &Libcni, verb: &str, id: &str, netns: &Namespace) -> Result<Result<Value, Value>> {
        cni.call_in(verb, Some((id, netns.path())), VERSION, &json!({}))
    }

    /// ADD as a runtime asks again until it is answered; the first address.
    fn add(&self, id: &str, netns: &Namespace) -> Result<String> {
        wait(&format!("ADD of {id}"), PATIENCE, || match self.call(&self.cni, "ADD", id, netns)? {
            Ok(result) => address_of(&result),
            Err(error) => bail!("{error}"),
        })
    }

    /// DEL must succeed at once, whatever there is.
    fn del(&self, id: &str, netns: &Namespace) -> Result<()> {
        self.call(&self.cni, "DEL", id, netns)?.map(drop).map_err(|error| anyhow!("DEL of {id}: {error}"))
    }

    /// All that ADD makes anywhere, as lines.
    fn things(&self) -> Result<BTreeSet<String>> {
        let mut things = BTreeSet::new();
        let leases = self.state.join("towpath/leases");
        for (what, dir) in [
            ("lease", leases.clone()),
            ("damaged lease", leases.join("damaged")),
            ("queued DEL", self.state.join("towpath/deletes")),
            ("record", self.run.join("towpath/pods")),
        ] {
            // What was released rests in a directory of its own.
            let entries = names(&dir).into_iter().filter(|name| !dir.join(name).is_dir());
            things.extend(entries.map(|name| format!("{what} {name}")));
        }
        for version in names(&self.run.join("bpf")) {
            let pins = names(&self.run.join("bpf").join(&version).join("links"));
            things.extend(pins.into_iter().map(|pin| format!("pin {version}/{pin}")));
        }
        let said = self.cluster.node(
            NODE,
            "ip -o link show type veth | cut -d: -f2 | cut -d@ -f1; ip -4 route show table all | grep ' dev tp'; \
             ip -6 route show table all | grep ' dev tp'; ip neigh show nud permanent; true",
        )?;
        things.extend(said.out.lines().map(|line| line.trim().to_owned()));
        Ok(things)
    }

    /// Fails if two leases on the disk have one address.
    fn nobody_shares(&self) -> Result<()> {
        let dir = self.state.join("towpath/leases");
        let mut owners: BTreeMap<String, String> = BTreeMap::new();
        for name in names(&dir).into_iter().filter(|name| name.ends_with(".lease")) {
            // It may go while it is looked at.
            let Ok(text) = fs::read_to_string(dir.join(&name)) else { continue };
            let lease: Value = serde_json::from_str(text.lines().next().unwrap_or_default())?;
            for address in lease.get("addresses").and_then(Value::as_array).into_iter().flatten() {
                if let Some(other) = owners.insert(address.to_string(), name.clone()) {
                    bail!("{address} is of {other} and of {name}");
                }
            }
        }
        Ok(())
    }

    fn comes_to_be_as(&self, before: &BTreeSet<String>) -> Result<()> {
        wait("nothing to be left", TIDY, || {
            let now = self.things()?;
            let odd: Vec<&String> = now.symmetric_difference(before).collect();
            ensure!(odd.is_empty(), "not as before: {odd:#?}");
            Ok(())
        })?;
        // What the agent itself finds, also in the programs' maps.
        let mut check = Command::new(self.cluster.towpath());
        let said = check.args(["ipam", "check", "--lab", self.cluster.name()]).output()?;
        ensure!(said.status.success(), "towpath ipam check: {}", String::from_utf8_lossy(&said.stdout));
        Ok(())
    }

    fn agent(&self) -> Result<i32> {
        wait("an agent", PATIENCE, || machine::lab_agent(self.cluster.name(), NODE))
    }

    /// Waits until an agent takes requests.
    fn ready(&self) -> Result<()> {
        wait("the agent to take ADDs", PATIENCE, || self.cni.agent_is_ready())
    }
}

/// The calls that the plugin makes for a verb, with these fields in its configuration.
fn calls_of(node: &Node<'_>, verb: &str, id: &str, netns: &Namespace, extra: &Value) -> Result<Vec<Call>> {
    let record = std::env::temp_dir().join(format!("towpath-calls-{}-{verb}", std::process::id()));
    let traced = node.cni.under(&strace::recording(&record));
    let answer = traced.call_in(verb, Some((id, netns.path())), VERSION, extra)?;
    ensure!(answer.is_ok(), "{verb} under strace: {answer:?}");
    let text = fs::read_to_string(&record)?;
    fs::remove_file(&record)?;
    let calls = strace::calls(&text);
    ensure!(calls.len() > 20 && calls.iter().any(|call| call.name == "connect"), "strace saw {calls:?} of {verb}");
    Ok(calls)
}

/// Runs the plugin and has it killed in a call; whether it was.
fn killed_in(node: &Node<'_>, call: &Call, verb: &str, id: &str, netns: &Namespace, extra: &Value) -> Result<bool> {
    let plugin = node.cni.under(&strace::killing(call));
    let out = plugin.start(verb, Some((id, netns.path())), VERSION, extra)?.wait_with_output()?;
    Ok(!out.status.success() && out.stdout.is_empty())
}

/// Kills the plugin in each call of an ADD. Every other time the runtime asks again for the same sandbox, else it deletes it and makes another.
fn adds_killed(node: &Node<'_>, taken: &str) -> Result<(usize, usize)> {
    let first = Namespace::new()?;
    let calls = calls_of(node, "ADD", "recorded", &first, &json!({}))?;
    node.del("recorded", &first)?;
    let mut killed = 0;
    for (number, call) in calls.iter().enumerate() {
        let what = || format!("the plugin killed in {call} of ADD");
        let (id, netns) = (format!("add-{number}"), Namespace::new()?);
        killed += usize::from(killed_in(node, call, "ADD", &id, &netns, &json!({}))?);
        let (id, netns) = if number % 2 == 0 {
            (id, netns)
        } else {
            node.del(&id, &netns).with_context(what)?;
            (format!("again-{number}"), Namespace::new()?)
        };
        let address = node.add(&id, &netns).with_context(what)?;
        ensure!(address != taken, "{}: {address} is another's", what());
        node.nobody_shares().with_context(what)?;
        node.del(&id, &netns).with_context(what)?;
    }
    Ok((killed, calls.len()))
}

/// Kills the plugin in each call of a DEL; `extra` may lead it to a socket that nobody listens on.
fn dels_killed(node: &Node<'_>, kind: &str, extra: &Value) -> Result<(usize, usize)> {
    let first = Namespace::new()?;
    node.add(&format!("{kind}-recorded"), &first)?;
    let calls = calls_of(node, "DEL", &format!("{kind}-recorded"), &first, extra)?;
    let mut killed = 0;
    for (number, call) in calls.iter().enumerate() {
        let what = || format!("the plugin killed in {call} of DEL ({kind})");
        let (id, netns) = (format!("{kind}-{number}"), Namespace::new()?);
        node.add(&id, &netns).with_context(what)?;
        killed += usize::from(killed_in(node, call, "DEL", &id, &netns, extra)?);
        node.nobody_shares().with_context(what)?;
        let again = node.cni.call_in("DEL", Some((&id, netns.path())), VERSION, extra)?;
        ensure!(again.is_ok(), "{}: DEL again: {again:?}", what());
    }
    Ok((killed, calls.len()))
}

#[test]
fn a_plugin_killed_in_any_call_leaves_nothing_and_gives_no_address_twice() -> Result<()> {
    if !can_run_labs()? || !can_run(&["strace"])? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-cni-killed", 1, Families::Dual)?;
    let node = Node::of(&cluster)?;
    let before = node.things()?;
    let bystander = Namespace::new()?;
    let taken = node.add("bystander", &bystander)?;
    let with_bystander = node.things()?;
    ensure!(with_bystander.len() >= before.len() + 7, "a look that misses things: {before:?}, then {with_bystander:?}");
    let nobody = json!({ "socket": "/run/towpath/nobody-listens-here.sock" });
    for (what, (killed, calls)) in [
        ("ADD", adds_killed(&node, &taken)?),
        ("DEL", dels_killed(&node, "del", &json!({}))?),
        ("DEL without an agent", dels_killed(&node, "queued", &nobody)?),
    ] {
        println!("{what}: killed in {killed} of {calls} calls");
        // The loader and the allocator do not make quite the same calls each time.
        ensure!(killed * 10 >= calls * 9, "{what}: it was killed in {killed} of {calls} calls only");
    }
    ensure!(cluster.node(NODE, &format!("ping -c 1 -W 2 {taken}"))?.ok, "the bystander at {taken} does not answer");
    node.del("bystander", &bystander)?;
    node.comes_to_be_as(&before)?;
    cluster.down()
}

/// The agent's telling calls during an ADD and a DEL: by name and number, each once, in the order in which a thread first came to it.
fn calls_of_agent(node: &Node<'_>) -> Result<Vec<Call>> {
    let record = std::env::temp_dir().join(format!("towpath-agent-calls-{}", std::process::id()));
    let netns = Namespace::new()?;
    let tracer = Tracer::recording(node.agent()?, &TELLING, &record)?;
    node.add("recorded", &netns)?;
    node.del("recorded", &netns)?;
    drop(tracer);
    let text = fs::read_to_string(&record)?;
    fs::remove_file(&record)?;
    let mut seen = BTreeSet::new();
    let calls: Vec<Call> = strace::calls(&text).into_iter().filter(|call| seen.insert(call.clone())).collect();
    ensure!(["bpf", "rename", "setns", "fsync"].iter().all(|name| calls.iter().any(|c| c.name == *name)), "{calls:?}");
    Ok(calls)
}

#[test]
fn an_agent_killed_in_its_calls_leaves_nothing_and_gives_no_address_twice() -> Result<()> {
    if !can_run_labs()? || !can_run(&["strace"])? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-cni-agent-killed", 1, Families::Dual)?;
    let node = Node::of(&cluster)?;
    let before = node.things()?;
    let bystander = Namespace::new()?;
    let taken = node.add("bystander", &bystander)?;
    let calls = calls_of_agent(&node)?;
    let tries = if full() { calls.len() } else { 7 };
    let mut killed = 0;
    for number in 0..tries {
        let call = calls.get(number * calls.len() / tries).context("no call")?;
        let what = || format!("the agent killed in {call}");
        node.ready().with_context(what)?;
        let (id, netns) = (format!("agent-{number}"), Namespace::new()?);
        let tracer = Tracer::killing(node.agent()?, call)?;
        let added = node.call(&node.cni, "ADD", &id, &netns)?;
        // As a runtime does whose ADD failed, and one whose pod ends at once.
        node.del(&id, &netns).with_context(what)?;
        killed += usize::from(tracer.has_ended());
        drop(tracer);
        let netns = Namespace::new()?;
        let id = format!("agent-again-{number}");
        let address = node.add(&id, &netns).with_context(what)?;
        ensure!(address != taken, "{}: {address} is another's; the ADD before gave {added:?}", what());
        node.nobody_shares().with_context(what)?;
        node.del(&id, &netns).with_context(what)?;
    }
    println!("the agent was killed in {killed} of {tries} calls, of {} that it makes", calls.len());
    ensure!(killed * 2 >= tries, "the agent was killed in {killed} of {tries} calls only");
    ensure!(cluster.node(NODE, &format!("ping -c 1 -W 2 {taken}"))?.ok, "the bystander at {taken} does not answer");
    node.del("bystander", &bystander)?;
    node.comes_to_be_as(&before)?;
    cluster.down()
}

/// Who has which address, as the runtime was told.
type Owners = Mutex<BTreeMap<String, String>>;

/// Numbers from a seed (splitmix64).
struct Dice(AtomicU32, u64);

impl Dice {
    fn below(&self, limit: u64) -> u64 {
        let turn = u64::from(self.0.fetch_add(1, Ordering::Relaxed));
        let mut z = self.1.wrapping_add(turn.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }
}

/// Calls the plugin and kills it after a moment, every fifth time; its answer, if it came to one.
fn perhaps_killed(node: &Node<'_>, verb: &str, id: &str, netns: &Namespace, dice: &Dice) -> Result<Option<Value>> {
    let child = node.cni.start(verb, Some((id, netns.path())), VERSION, &json!({}))?;
    if dice.below(5) == 0 {
        std::thread::sleep(Duration::from_micros(dice.below(8_000)));
        machine::kill(i32::try_from(child.id())?)?;
    }
    let out = child.wait_with_output()?;
    // One that was killed may have said half of it.
    Ok(answer_of(&out).ok().and_then(Result::ok).filter(|_| out.status.success()))
}

/// A container's life, with a runtime that asks again until it is answered.
fn live(node: &Node<'_>, number: usize, owners: &Owners, dice: &Dice) -> Result<()> {
    let (id, netns) = (format!("life-{number}"), Namespace::new()?);
    let deadline = Instant::now() + PATIENCE;
    let address = loop {
        ensure!(Instant::now() < deadline, "{id} gets no address");
        if let Some(result) = perhaps_killed(node, "ADD", &id, &netns, dice)? {
            break address_of(&result)?;
        }
        std::thread::sleep(Duration::from_millis(20 + dice.below(50)));
    };
    let told = owners.lock().unwrap_or_else(PoisonError::into_inner).insert(address.clone(), id.clone());
    ensure!(told.is_none(), "{address} is of {} and of {id}", told.unwrap_or_default());
    std::thread::sleep(Duration::from_millis(dice.below(10)));
    owners.lock().unwrap_or_else(PoisonError::into_inner).remove(&address);
    while perhaps_killed(node, "DEL", &id, &netns, dice)?.is_none() {
        ensure!(Instant::now() < deadline + PATIENCE, "{id} is not deleted");
    }
    Ok(())
}

#[test]
fn many_lives_at_once_with_plugins_and_agents_killed_leave_nothing() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let seed = std::env::var("TOWPATH_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(SEED);
    println!("TOWPATH_SEED={seed}");
    let (lives, workers, most_kills) = if full() { (10_000, 16, 60) } else { (300, 16, 4) };
    let cluster = Cluster::up("e2e-cni-lives", 1, Families::Dual)?;
    let node = Node::of(&cluster)?;
    let before = node.things()?;
    let (dice, owners, next) = (Dice(AtomicU32::new(0), seed), Owners::default(), AtomicUsize::new(0));
    let (over, mut kills) = (AtomicBool::new(false), 0);
    let begun = Instant::now();
    std::thread::scope(|scope| -> Result<()> {
        let live_on = || -> Result<()> {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= lives {
                    return Ok(());
                }
                live(&node, number, &owners, &dice)?;
            }
        };
        let all: Vec<_> = (0..workers).map(|_| scope.spawn(live_on)).collect();
        let killer = scope.spawn(|| -> Result<usize> {
            let mut kills = 0;
            while kills < most_kills && !over.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(100 + dice.below(400)));
                // One that has just started is not at work yet.
                if node.cni.agent_is_ready().is_ok() {
                    machine::kill(machine::lab_agent(cluster.name(), NODE)?)?;
                    kills += 1;
                }
            }
            Ok(kills)
        });
        let ended: Vec<_> = all.into_iter().map(|one| one.join().map_err(|_| anyhow!("a worker panicked"))).collect();
        over.store(true, Ordering::Relaxed);
        kills = killer.join().map_err(|_| anyhow!("the killer panicked"))??;
        ended.into_iter().try_for_each(|one| one?)
    })
    .with_context(|| format!("TOWPATH_SEED={seed}"))?;
    println!("{lives} lives in {:.1} s, {kills} agents killed", begun.elapsed().as_secs_f64());
    ensure!(kills > 1, "too little was tried: {kills} agents killed");
    node.ready()?;
    node.nobody_shares()?;
    node.comes_to_be_as(&before).with_context(|| format!("TOWPATH_SEED={seed}"))?;
    cluster.down()
}
