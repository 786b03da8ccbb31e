//! One new pod: its sandbox, its ADD as kubelet has it made, and what sends and listens in it from before its device is there.

use std::fs::File;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Value, json};
use towpath_walkthrough::api::Api;
use towpath_walkthrough::cluster::field;
use towpath_walkthrough::libcni::Libcni;
use towpath_walkthrough::traffic::{Clock, Packet};

/// Kubelet tries a sandbox again; so long it may take until an agent that dies again and again has made one.
const PATIENCE: Duration = Duration::from_secs(150);
/// Between two tries.
const AGAIN: Duration = Duration::from_millis(400);
/// How long a pod that nobody may hear sends after its ADD.
const SILENT: Duration = Duration::from_millis(150);
/// How long one that must be heard has for it.
const HEARD: Duration = Duration::from_secs(90);
/// Rounds without a pause, from the first packet that goes.
const BURST: u32 = 20;
const PODS: &str = "/api/v1/namespaces/default/pods";

/// What policies say of a new pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Role {
    /// It may send to nobody.
    Quiet,
    /// It may send, but not to who hears only friends.
    Stranger,
    /// It may send to everybody.
    Friend,
    /// Nobody may send to it.
    Walled,
}

impl Role {
    pub(crate) const ALL: [Role; 4] = [Role::Quiet, Role::Stranger, Role::Friend, Role::Walled];

    fn label(self) -> &'static str {
        match self {
            Role::Quiet => "quiet",
            Role::Stranger => "stranger",
            Role::Friend => "friend",
            Role::Walled => "walled",
        }
    }
}

/// Where new pods send, and who says which of them was heard.
pub(crate) struct Surroundings<'s> {
    pub(crate) api: &'s Api,
    pub(crate) clock: Clock,
    /// Sockets that any pod may send to, then those that hear only friends.
    pub(crate) targets: Vec<SocketAddr>,
    /// Whether all targets that may hear this pod have.
    pub(crate) was_heard: &'s (dyn Fn(u32, Role) -> bool + Sync),
}

/// What came of one pod.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outcome {
    pub(crate) role: Role,
    /// How long the ADD took that was answered.
    pub(crate) add: Duration,
    /// ADDs that failed before.
    pub(crate) failed: usize,
    /// Datagrams that it handed to the kernel before its ADD was answered, and after.
    pub(crate) before: usize,
    pub(crate) after: usize,
    /// What was heard in it, and what of that from a peer that is no node.
    pub(crate) received: usize,
    /// When the ADD was answered.
    pub(crate) answered: u64,
}

fn object(name: &str, role: Role, node: &str) -> Value {
    // Kubelet never starts it: it waits for a volume. So its sandbox is made here.
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"role": role.label()}},
        "spec": {
            "nodeName": node, "terminationGracePeriodSeconds": 0,
            "volumes": [{"name": "never", "configMap": {"name": "never-there"}}],
            "containers": [{
                "name": "c", "image": "busybox", "command": ["sleep", "1"],
                "volumeMounts": [{"name": "never", "mountPath": "/never"}],
            }],
        },
    })
}

/// A network namespace, and the sockets in it.
struct Sandbox {
    netns: File,
    talker: UdpSocket,
    listener: UdpSocket,
}

impl Sandbox {
    /// In a thread of its own: the plugin must not stand in the namespace that it is given.
    fn make(v4: bool) -> Result<Self> {
        let any = move |port| if v4 { SocketAddr::from(([0; 4], port)) } else { SocketAddr::from(([0_u16; 8], port)) };
        let made = std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).context("a network namespace")?;
            let (talker, listener) = (UdpSocket::bind(any(0))?, UdpSocket::bind(any(super::KNOCK))?);
            listener.set_read_timeout(Some(Duration::from_millis(20)))?;
            Ok(Self { netns: File::open("/proc/thread-self/ns/net")?, talker, listener })
        });
        made.join().map_err(|_| anyhow!("making a namespace panicked"))?
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.netns.as_raw_fd()))
    }
}

/// The life of a pod.
pub(crate) fn live(number: u32, role: Role, node: &str, cni: &Libcni, around: &Surroundings<'_>) -> Result<Outcome> {
    let sandbox = Sandbox::make(around.targets.first().is_none_or(SocketAddr::is_ipv4))?;
    let (talker, listener, netns) = (&sandbox.talker, &sandbox.listener, sandbox.path());
    let name = format!("new-{number}");
    let made = around.api.create(PODS, &object(&name, role, node))?;
    let cni = cni.for_pod(&name, &field(&made, "/metadata/uid"));
    let over = AtomicBool::new(false);
    let answered = AtomicU64::new(u64::MAX);
    let (before, after, received) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    let outcome = std::thread::scope(|scope| {
        // Sockets belong to where they were made: these threads may stand anywhere.
        scope.spawn(|| {
            let mut burst = 0_u32;
            for sent in 0_u32.. {
                if over.load(Ordering::Relaxed) {
                    return;
                }
                let mut went = false;
                for (flow, to) in (0_u32..).zip(&around.targets) {
                    let packet = Packet { sender: number, flow, number: sent, sent: around.clock.now() };
                    if talker.send_to(&packet.bytes(), to).is_err() {
                        break;
                    }
                    let count = if packet.sent < answered.load(Ordering::Relaxed) { &before } else { &after };
                    count.fetch_add(1, Ordering::Relaxed);
                    went = true;
                }
                // As soon as there is a way out, as much as goes; then now and then.
                burst += u32::from(went);
                if !(1..=BURST).contains(&burst) {
                    std::thread::sleep(if went { Duration::from_millis(50) } else { Duration::from_millis(4) });
                }
            }
        });
        scope.spawn(|| {
            let mut buffer = [0; 64];
            while !over.load(Ordering::Relaxed) {
                received.fetch_add(usize::from(listener.recv(&mut buffer).is_ok()), Ordering::Relaxed);
            }
        });
        let lived = add(&cni, number, &netns).and_then(|(took, failed)| {
            answered.store(around.clock.now(), Ordering::Relaxed);
            stay(number, role, around)?;
            Ok((took, failed))
        });
        over.store(true, Ordering::Relaxed);
        lived
    });
    let gone = delete(&cni, number, &netns);
    around.api.delete(&format!("{PODS}/{name}?gracePeriodSeconds=0"))?;
    let (add, failed) = outcome.with_context(|| format!("{name} on {node}, {role:?}"))?;
    gone?;
    let count = |count: &AtomicUsize| count.load(Ordering::Relaxed);
    let answered = answered.load(Ordering::Relaxed);
    Ok(Outcome {
        role,
        add,
        failed,
        before: count(&before),
        after: count(&after),
        received: count(&received),
        answered,
    })
}

fn container(number: u32, netns: &std::path::Path) -> (String, PathBuf) {
    (format!("towpath-e2e-first-{number:08}"), netns.to_owned())
}

/// ADDs until one is answered, as kubelet does; how long that one took, and how many failed before.
fn add(cni: &Libcni, number: u32, netns: &std::path::Path) -> Result<(Duration, usize)> {
    let until = Instant::now() + PATIENCE;
    for failed in 0.. {
        let (id, path) = container(number, netns);
        let begun = Instant::now();
        match cni.call_in("ADD", Some((&id, path)), "1.1.0", &json!({}))? {
            Ok(_) => return Ok((begun.elapsed(), failed)),
            Err(error) => ensure!(Instant::now() < until, "ADD, {} times: {error}", failed + 1),
        }
        std::thread::sleep(AGAIN);
    }
    bail!("no ADD was tried")
}

fn delete(cni: &Libcni, number: u32, netns: &std::path::Path) -> Result<()> {
    let (id, path) = container(number, netns);
    match cni.call_in("DEL", Some((&id, path)), "1.1.0", &json!({}))? {
        Ok(_) => Ok(()),
        Err(error) => bail!("DEL: {error}"),
    }
}

/// Stays as long as it must to show something.
fn stay(number: u32, role: Role, around: &Surroundings<'_>) -> Result<()> {
    let begun = Instant::now();
    if matches!(role, Role::Quiet) {
        std::thread::sleep(SILENT);
        return Ok(());
    }
    while !(around.was_heard)(number, role) {
        ensure!(begun.elapsed() < HEARD, "it may send, and was not heard within {HEARD:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(SILENT.saturating_sub(begun.elapsed()));
    Ok(())
}
