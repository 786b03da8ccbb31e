//! Policy changes under packets, cut at every step: before each single write of a change, and after the writer was killed there, every packet is
//! judged as before the change or as after it; and who comes after the killed one brings the change to its end.
//!
//! The policies are compiled and written as an agent does it, an agent that goes on and one that has just started, and all of it is real but the
//! death ([`crate::supervised`]) and the frames.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use towpath_datapath::bpf::{BpfConfig, Hook, Limits, Programs};
use towpath_model::desired::*;
use towpath_model::{
    ClusterNetworkPolicy, Direction, Namespace, NetworkPolicy, Node, NodeName, Pod, Protocol, World as Objects,
};
use towpath_policy::compile::{Touched, UsedIds};
use towpath_policy::{Compiler, View, image};

use crate::frame::{ACK, L4, SYN};
use crate::supervised::{Pieces, Then, attend, hold_up_this_thread};
use crate::world::*;

/// As the agent has it.
const GRACE: Duration = Duration::from_secs(10);
/// After this nothing of an image before is kept for its own sake.
const LATER: Duration = Duration::from_secs(20);

/// What decides: labels of pods and of the other namespace, and policies.
#[derive(Clone)]
struct Wanted {
    /// By the pod's name: `a` and `b` are of the node, `remote` and `other` of another.
    labels: BTreeMap<&'static str, &'static str>,
    /// The label `warm` of the namespace that `other` is in.
    warm: bool,
    policies: Vec<Value>,
    cluster_policies: Vec<Value>,
}

const PODS: [(&str, &str, &str, [&str; 2]); 4] = [
    ("default", "a", "node1", ["10.1.0.10", "fd01::10"]),
    ("default", "b", "node1", ["10.1.0.11", "fd01::11"]),
    ("default", "remote", "node2", ["10.2.0.20", "fd02::20"]),
    ("elsewhere", "other", "node2", ["10.2.0.21", "fd02::21"]),
];

impl Wanted {
    fn new(policies: &[Value]) -> Self {
        Self {
            labels: [("a", "friend"), ("b", "server"), ("remote", "friend"), ("other", "stranger")].into(),
            warm: false,
            policies: policies.to_vec(),
            cluster_policies: Vec::new(),
        }
    }

    /// As the agent parses it.
    fn objects(&self) -> Objects {
        fn object<T: serde::de::DeserializeOwned>(value: Value) -> T {
            serde_json::from_value(value).unwrap()
        }
        let mut world = Objects::default();
        for (name, addresses, ranges) in [
            ("node1", ["192.168.50.1", "fd50::1"], ["10.1.0.0/24", "fd01::/64"]),
            ("node2", ["192.168.50.2", "fd50::2"], ["10.2.0.0/24", "fd02::/64"]),
        ] {
            let addresses = addresses.map(|address| json!({"type": "InternalIP", "address": address}));
            let node: k8s_openapi::api::core::v1::Node = object(json!({
                "metadata": {"name": name}, "spec": {"podCIDRs": ranges}, "status": {"addresses": addresses}
            }));
            world.nodes.insert(NodeName::new(name), Node::try_from(&node).unwrap());
        }
        for (name, warm) in [("default", false), ("elsewhere", self.warm)] {
            let labels = if warm { json!({"warm": "yes"}) } else { json!({}) };
            let space: k8s_openapi::api::core::v1::Namespace =
                object(json!({"metadata": {"name": name, "labels": labels}}));
            world.namespaces.insert(name.to_owned(), Namespace::try_from(&space).unwrap());
        }
        for (namespace, name, node, addresses) in PODS {
            let ips = addresses.map(|ip| json!({"ip": ip}));
            let pod: k8s_openapi::api::core::v1::Pod = object(json!({
                "metadata": {"namespace": namespace, "name": name, "labels": {"app": self.labels[name]}},
                "spec": {"nodeName": node, "containers": []}, "status": {"phase": "Running", "podIPs": ips}
            }));
            let pod = Pod::try_from(&pod).unwrap();
            world.pods.insert(pod.name.clone(), pod);
        }
        for policy in &self.policies {
            let policy: k8s_openapi::api::networking::v1::NetworkPolicy = object(policy.clone());
            let policy = NetworkPolicy::try_from(&policy).unwrap();
            world.policies.insert(policy.name.clone(), policy);
        }
        for policy in &self.cluster_policies {
            let (policy, _) = ClusterNetworkPolicy::fail_closed(&object(policy.clone())).unwrap();
            world.cluster_policies.insert(policy.name.clone(), policy);
        }
        world
    }
}

fn policy(name: &str, spec: Value) -> Value {
    json!({"metadata": {"namespace": "default", "name": name}, "spec": spec})
}

/// The pods with that label hear only these, on port 80.
fn admits(name: &str, pods: &str, from: &str) -> Value {
    policy(
        name,
        json!({"podSelector": {"matchLabels": {"app": pods}}, "policyTypes": ["Ingress"], "ingress": [{
            "from": [{"podSelector": {"matchLabels": {"app": from}}}], "ports": [{"protocol": "TCP", "port": 80}]}]}),
    )
}

/// The pods with that label send nothing.
fn silences(name: &str, pods: &str) -> Value {
    policy(name, json!({"podSelector": {"matchLabels": {"app": pods}}, "policyTypes": ["Egress"]}))
}

fn denies(pods: &str, from: &str) -> Value {
    let of = |app: &str| json!({"pods": {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": app}}}});
    json!({"metadata": {"name": "denies"}, "spec": {"tier": "Admin", "priority": 1, "subject": of(pods),
        "ingress": [{"action": "Deny", "from": [of(from)]}]}})
}

// ---- who writes --------------------------------------------------------------------------------------------------------

/// An agent's part in it: what it has open, and what it compiled last.
struct Agent {
    programs: Programs,
    compiler: Compiler,
    now: Duration,
    /// The kernel has the image that was compiled last.
    followed: bool,
}

impl Agent {
    /// Takes over what another left, as [`towpath_datapath`]'s facade and the agent do: its pods keep their sets until the first image.
    fn start(pins: &Path, pods: &[LocalPod]) -> Self {
        let config = BpfConfig { pin_dir: pins.to_owned(), limits: Limits::default() };
        let mut programs = Programs::open_for_tests(config).unwrap();
        pods.iter().for_each(|pod| programs.adopt_pod(pod).unwrap());
        let adopted = programs.adopted().unwrap();
        let used = UsedIds { sets: adopted.sets, classes: adopted.classes, rules: adopted.rules, held: adopted.policy };
        let compiler = Compiler::resume(GRACE, &used, Duration::ZERO);
        Self { programs, compiler, now: Duration::ZERO, followed: false }
    }

    fn compile(&mut self, objects: &Objects, after: Duration) {
        self.now += after;
        self.compiler.follow(&View::of(objects), &NodeName::new("node1"), self.now, &Touched::everything()).unwrap();
    }

    /// What became different, or the whole image where nobody knows what the kernel holds.
    fn write(&mut self) -> Result<(), String> {
        let changes = self.compiler.changes().filter(|_| self.followed).cloned();
        let image = self.compiler.image().clone();
        self.followed = false;
        let written = match changes {
            Some(changes) => self.programs.apply_policy_changes(&PolicyChanges { pods: image.pods, ..changes }),
            None => self.programs.apply_policy(&image),
        };
        self.followed = written.is_ok();
        written.map(drop).map_err(|error| error.to_string())
    }
}

type Job = Box<dyn FnOnce(&mut Agent) + Send>;

/// A process with an agent in it, as a thread: what holds its calls up is the thread's, and goes with it.
struct Process {
    jobs: mpsc::Sender<Job>,
    thread: thread::JoinHandle<()>,
}

impl Process {
    fn start(pins: &Path, pods: &[LocalPod]) -> Self {
        let (jobs, todo) = mpsc::channel::<Job>();
        let (pins, pods) = (pins.to_owned(), pods.to_vec());
        let thread = thread::spawn(move || {
            let mut agent = Agent::start(&pins, &pods);
            todo.iter().for_each(|job| job(&mut agent));
        });
        Self { jobs, thread }
    }

    fn begin<T: Send + 'static>(&self, work: impl FnOnce(&mut Agent) -> T + Send + 'static) -> mpsc::Receiver<T> {
        let (answer, answered) = mpsc::channel();
        self.jobs.send(Box::new(move |agent| drop(answer.send(work(agent))))).unwrap();
        answered
    }

    fn run<T: Send + 'static>(&self, work: impl FnOnce(&mut Agent) -> T + Send + 'static) -> T {
        self.begin(work).recv().unwrap()
    }

    /// Compiles and writes, with nobody in between. The image.
    fn follow(&self, wanted: &Wanted, after: Duration) -> PolicyImage {
        let objects = wanted.objects();
        self.run(move |agent| {
            agent.compile(&objects, after);
            agent.write().unwrap();
            agent.compiler.image().clone()
        })
    }

    /// The same, held up: `each` is asked before every write, and told both the write and the image. How often it was, whether all was written, and
    /// the image.
    fn follow_held_up(
        &self,
        wanted: &Wanted,
        after: Duration,
        pieces: Pieces,
        mut each: impl FnMut(&str, &PolicyImage) -> Then,
    ) -> (usize, Result<(), String>, PolicyImage) {
        let objects = wanted.objects();
        let (image, listener) = self.run(move |agent| {
            agent.compile(&objects, after);
            (agent.compiler.image().clone(), hold_up_this_thread())
        });
        let (done, written) = (std::cell::OnceCell::new(), self.begin(Agent::write));
        let over = || written.try_recv().is_ok_and(|outcome| done.set(outcome).is_ok());
        let asked = attend(&listener, over, pieces, |what| each(what, &image));
        (asked, done.into_inner().unwrap(), image)
    }

    fn end(self) {
        drop(self.jobs);
        self.thread.join().unwrap();
    }
}

// ---- who sends ---------------------------------------------------------------------------------------------------------

#[derive(Clone, Copy, Debug)]
struct Flow {
    from: IpAddr,
    to: IpAddr,
    port: u16,
}

/// Every way between pods of the node, pods of another, one there that nobody has heard of, and the world outside; of IPv6 some.
fn flows() -> Vec<Flow> {
    let [h, h6] = BOTH.map(hosts);
    let (other, unheard) = (ip("10.2.0.21"), ip("10.2.0.99"));
    let all = [
        (h.a, h.b, 80),
        (h.a, h.b, 81),
        (h.b, h.a, 80),
        (h.remote, h.b, 80),
        (other, h.b, 80),
        (unheard, h.b, 80),
        (h.b, h.remote, 80),
        (h.a, other, 80),
        (h.remote, h.a, 80),
        (h.outside, h.b, 80),
        (h.a, h.outside, 80),
        (h6.a, h6.b, 80),
        (h6.remote, h6.b, 80),
        (h6.b, h6.remote, 80),
    ];
    all.map(|(from, to, port)| Flow { from, to, port }).to_vec()
}

/// A connection that was opened over a flow, by its source port.
#[derive(Clone, Copy, Debug)]
struct Open {
    flow: Flow,
    sport: u16,
}

/// Verdicts of an image over a flow: at the sender's end, at the receiver's.
fn ends(image: &PolicyImage, flow: &Flow) -> [bool; 2] {
    let allowed = |pod: IpAddr, direction, peer| {
        let judged = image::judge_pod(image, pod, direction, peer, RowProtocol::Ports(Protocol::Tcp), flow.port);
        !is_local(pod) || judged.0 == Verdict::Allow
    };
    [allowed(flow.from, Direction::Egress, flow.to), allowed(flow.to, Direction::Ingress, flow.from)]
}

fn allowed(image: &PolicyImage, flow: &Flow) -> bool {
    ends(image, flow) == [true, true]
}

fn is_local(address: IpAddr) -> bool {
    BOTH.map(hosts).iter().any(|h| [h.a, h.b].contains(&address))
}

/// One node's traffic, held against the images before and after a change.
struct Judge<'w> {
    world: &'w World,
    flows: Vec<Flow>,
    sport: u16,
    /// Connections that were opened before the change.
    before: Vec<Open>,
    /// Those that were opened since.
    since: Vec<Open>,
    /// Whether each end is held against the images by itself: it may be judged by one, and the other end by the other.
    each_end: bool,
    judged: usize,
}

impl<'w> Judge<'w> {
    fn new(world: &'w World) -> Self {
        Self { world, flows: flows(), sport: 1024, before: Vec::new(), since: Vec::new(), each_end: false, judged: 0 }
    }

    /// A packet of that many, by where it comes from. Whether it passed.
    fn sends(&mut self, from: IpAddr, sport: u16, to: IpAddr, dport: u16, l4: L4) -> bool {
        let w = self.world;
        self.judged += 1;
        let outcome = if is_local(from) {
            w.from_pod(&sent_by(from, sport, to, dport, l4))
        } else if BOTH.map(hosts).iter().any(|h| h.outside == from) {
            let (mac, pod) =
                if BOTH.map(hosts).iter().any(|h| h.a == to) { (MAC_A, w.pod_a) } else { (MAC_B, w.pod_b) };
            w.run(Hook::ToPod, &arriving(mac, from, sport, to, dport, l4).bytes(), pod, w.uplink, None)
        } else {
            w.from_tunnel(&arriving(MAC_TUNNEL, from, sport, to, dport, l4), "192.168.50.2")
        };
        if outcome.verdict == DROP {
            let policy =
                ["egress_policy", "ingress_policy"].contains(&outcome.counted.first().copied().unwrap_or_default());
            assert!(policy, "{from}:{sport} to {to}:{dport}: {outcome:?}");
        }
        outcome.verdict != DROP
    }

    fn opens(&mut self, flow: Flow) -> Option<Open> {
        self.sport += 1;
        let open = Open { flow, sport: self.sport };
        self.sends(flow.from, open.sport, flow.to, flow.port, L4::syn()).then_some(open)
    }

    /// The next packets of a connection: the opener's, and the answer.
    fn goes_on(&mut self, open: Open) -> [bool; 2] {
        let Open { flow, sport } = open;
        let there = self.sends(flow.from, sport, flow.to, flow.port, L4::tcp(ACK));
        [there, self.sends(flow.to, flow.port, flow.from, sport, L4::tcp(ACK))]
    }

    /// Opens a connection of every flow, while nothing forbids any.
    fn settle(&mut self) {
        (self.before, self.since) = (Vec::new(), Vec::new());
        for flow in self.flows.clone() {
            let open = self.opens(flow).unwrap_or_else(|| panic!("{flow:?} is forbidden"));
            assert!(self.sends(flow.to, flow.port, flow.from, open.sport, L4::tcp(SYN | ACK)), "{flow:?}");
            assert_eq!(self.goes_on(open), [true; 2], "{flow:?}");
            self.before.push(open);
        }
    }

    /// Every packet is judged as one image or the other has it.
    fn between(&mut self, images: [&PolicyImage; 2], step: &str) {
        let each_end = self.each_end;
        let may = |flow: &Flow, passed: bool| match images.map(|image| ends(image, flow)) {
            [old, new] if each_end && passed => (old[0] || new[0]) && (old[1] || new[1]),
            both => both.into_iter().any(|ends| (ends == [true, true]) == passed),
        };
        for open in self.before.clone() {
            for passed in self.goes_on(open) {
                assert!(may(&open.flow, passed), "{step}: {open:?}: passed {passed}");
            }
        }
        for flow in self.flows.clone() {
            let open = self.opens(flow);
            assert!(may(&flow, open.is_some()), "{step}: {flow:?}: passed {}", open.is_some());
            self.since.extend(open);
        }
    }

    /// Every packet is judged as this image has it, whenever its connection was opened.
    fn all_by(&mut self, image: &PolicyImage, step: &str) {
        for open in self.before.iter().chain(&self.since).copied().collect::<Vec<_>>() {
            assert_eq!(self.goes_on(open), [allowed(image, &open.flow); 2], "{step}: {open:?}");
        }
        // From here on they are like those that are opened now.
        self.since.clear();
        self.between([image, image], step);
    }
}

// ---- the changes -------------------------------------------------------------------------------------------------------

/// When the agent that is killed heard of the change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hears {
    /// While it ran: it writes what became different.
    Running,
    /// When it started: it knows nothing of what was before but what the kernel holds, and writes a whole image.
    Starting,
}

fn cut_everywhere(hears: Hears, before: Wanted, after: Wanted) {
    cut(hears, before, after, false);
}

fn cut(hears: Hears, before: Wanted, after: Wanted, each_end: bool) {
    in_namespaces(move |dir| {
        let w = World::new(dir, Limits::default());
        let pods = [w.local_a(), w.local_b()];
        let mut judge = Judge { each_end, ..Judge::new(&w) };
        let start = || Process::start(dir, &pods);
        let (old, new) = looked_at(&mut judge, &start, &before, &after);
        let both = judge.flows.iter().filter(|flow| allowed(&old, flow) && allowed(&new, flow)).count();
        let changed = judge.flows.iter().filter(|flow| allowed(&old, flow) != allowed(&new, flow)).count();
        assert!(changed > 0 && both > 0, "the change tells nothing");
        let kills = killed_at_every_write(&mut judge, &start, &before, &after, hears);
        println!(
            "{hears:?}: {changed} of {} flows changed; {kills} kills, {} packets judged",
            judge.flows.len(),
            judge.judged
        );
        w.programs.unpin_all().unwrap();
    });
}

/// What holds before the change, with connections that were opened when nothing was forbidden.
fn settled(judge: &mut Judge<'_>, process: &Process, before: &Wanted) -> PolicyImage {
    process.follow(&Wanted { policies: Vec::new(), cluster_policies: Vec::new(), ..before.clone() }, LATER);
    judge.settle();
    process.follow(before, Duration::ZERO);
    let old = process.follow(before, LATER);
    judge.all_by(&old, "before the change");
    old
}

/// Looks before every entry that a change writes, with nobody killed, and when what is retired goes. The images before and after.
fn looked_at(
    judge: &mut Judge<'_>,
    start: &impl Fn() -> Process,
    before: &Wanted,
    after: &Wanted,
) -> (PolicyImage, PolicyImage) {
    let process = start();
    let old = settled(judge, &process, before);
    let (writes, written, new) = process.follow_held_up(after, Duration::ZERO, Pieces::Entries, |what, new| {
        judge.between([&old, new], what);
        Then::Made
    });
    assert!(written.is_ok() && writes > 2, "{written:?} after {writes}");
    judge.all_by(&new, "at the end");
    process.end();
    let process = start();
    judge.all_by(&new, "after a start");
    process.follow(after, Duration::ZERO);
    judge.all_by(&new, "as another wrote it");
    let (_, written, _) = process.follow_held_up(after, LATER, Pieces::Entries, |what, _| {
        judge.all_by(&new, what);
        Then::Made
    });
    assert_eq!(written, Ok(()));
    judge.all_by(&new, "when what is retired has gone");
    process.end();
    (old, new)
}

/// Kills the writer before its first call, before its second, and so on; judges what it left, starts another, and has that one end it. How often.
fn killed_at_every_write(
    judge: &mut Judge<'_>,
    start: &impl Fn() -> Process,
    before: &Wanted,
    after: &Wanted,
    hears: Hears,
) -> usize {
    let mut process = start();
    for kill_at in 0.. {
        let old = settled(judge, &process, before);
        if hears == Hears::Starting {
            process.end();
            process = start();
        }
        let mut at = 0;
        let (_, written, new) = process.follow_held_up(after, Duration::ZERO, Pieces::Whole, |_, _| {
            at += 1;
            if at > kill_at { Then::Killed } else { Then::Made }
        });
        process.end();
        let step = format!("{hears:?}, killed before write {kill_at}");
        judge.between([&old, &new], &step);
        process = start();
        judge.between([&old, &new], &format!("{step}, and another started"));
        process.follow(after, Duration::ZERO);
        judge.all_by(&new, &format!("{step}, and another ended it"));
        if written.is_ok() {
            process.end();
            return kill_at;
        }
    }
    unreachable!("a change ends")
}

fn isolating() -> [Wanted; 2] {
    let before = Wanted::new(&[silences("quiet", "stranger")]);
    let mut after = before.clone();
    after.policies.push(admits("friends", "server", "friend"));
    [before, after]
}

#[test]
fn a_policy_that_isolates() {
    let [before, after] = isolating();
    cut_everywhere(Hears::Running, before, after);
}

#[test]
fn a_policy_that_isolates_heard_of_at_the_start() {
    let [before, after] = isolating();
    cut_everywhere(Hears::Starting, before, after);
}

#[test]
fn a_policy_that_opens() {
    let before = Wanted::new(&[admits("nobody", "server", "nobody")]);
    let mut after = before.clone();
    after.policies.push(admits("friends", "server", "friend"));
    cut_everywhere(Hears::Running, before, after);
}

#[test]
fn a_policy_that_goes_beside_others() {
    let mut before = Wanted::new(&[admits("friends", "server", "friend"), admits("closed", "stranger", "nobody")]);
    before.labels.insert("a", "stranger");
    let mut after = before.clone();
    after.policies.remove(0);
    cut_everywhere(Hears::Running, before, after);
}

/// Nothing is left that whoever comes after the killed one would write otherwise.
#[test]
fn the_last_policy_of_all_goes() {
    let before = Wanted::new(&[admits("friends", "server", "friend")]);
    let mut after = before.clone();
    after.policies.clear();
    cut_everywhere(Hears::Running, before, after);
}

/// Its set has no rows, so that what its pods had is the only trace of it.
#[test]
fn the_last_policy_of_all_goes_which_let_nobody_in() {
    let nobody =
        policy("nobody", json!({"podSelector": {"matchLabels": {"app": "server"}}, "policyTypes": ["Ingress"]}));
    let before = Wanted::new(&[nobody]);
    let mut after = before.clone();
    after.policies.clear();
    cut_everywhere(Hears::Running, before, after);
}

/// A pod of the node: the class in which others see it and its own sets change.
fn relabelling() -> [Wanted; 2] {
    let before = Wanted::new(&[admits("friends", "server", "friend"), silences("quiet", "stranger")]);
    let mut after = before.clone();
    after.labels.insert("a", "stranger");
    [before, after]
}

#[test]
fn a_label_that_takes_a_pod_of_the_node_into_a_worse_class() {
    let [before, after] = relabelling();
    cut_everywhere(Hears::Running, before, after);
}

#[test]
fn a_label_that_takes_a_pod_of_the_node_into_a_better_class() {
    let [before, after] = relabelling();
    cut_everywhere(Hears::Running, after, before);
}

#[test]
fn a_label_of_a_pod_of_the_node_heard_of_at_the_start() {
    let [before, after] = relabelling();
    cut_everywhere(Hears::Starting, before, after);
}

/// Its own egress closes and its peer's ingress opens: neither image lets it through, and between two writes one end may be judged by each.
#[test]
fn a_label_that_turns_both_ends_is_judged_at_each_by_old_or_new() {
    let before = Wanted::new(&[admits("strangers", "server", "stranger"), silences("quiet", "stranger")]);
    let mut after = before.clone();
    after.labels.insert("a", "stranger");
    cut(Hears::Running, before, after, true);
}

#[test]
fn a_label_of_a_pod_of_another_node() {
    let before = Wanted::new(&[admits("friends", "server", "friend")]);
    let mut after = before.clone();
    after.labels.insert("remote", "stranger");
    cut_everywhere(Hears::Running, before, after);
}

#[test]
fn a_label_of_a_namespace() {
    let warm = json!({"podSelector": {"matchLabels": {"app": "server"}}, "policyTypes": ["Ingress"], "ingress": [{
        "from": [{"namespaceSelector": {"matchLabels": {"warm": "yes"}}}]}]});
    let before = Wanted::new(&[policy("warm", warm), admits("friends", "server", "friend")]);
    let mut after = before.clone();
    after.warm = true;
    cut_everywhere(Hears::Running, before, after);
}

fn auditing() -> [Wanted; 2] {
    let before = Wanted::new(&[admits("friends", "server", "friend"), admits("closed", "friend", "nobody")]);
    let mut after = before.clone();
    after.policies[0]["metadata"]["annotations"] = json!({"towpath.dev/audit": "true"});
    [before, after]
}

#[test]
fn an_audit_that_begins() {
    let [before, after] = auditing();
    cut_everywhere(Hears::Running, before, after);
}

#[test]
fn an_audit_that_ends() {
    let [before, after] = auditing();
    cut_everywhere(Hears::Running, after, before);
}

fn denying() -> [Wanted; 2] {
    let before = Wanted::new(&[admits("friends", "server", "friend")]);
    let mut after = before.clone();
    after.cluster_policies.push(denies("server", "friend"));
    [before, after]
}

#[test]
fn a_deny_above_an_allow_that_comes() {
    let [before, after] = denying();
    cut_everywhere(Hears::Running, before, after);
}

#[test]
fn a_deny_above_an_allow_that_comes_heard_of_at_the_start() {
    let [before, after] = denying();
    cut_everywhere(Hears::Starting, before, after);
}

#[test]
fn a_deny_above_an_allow_that_goes() {
    let [before, after] = denying();
    cut_everywhere(Hears::Running, after, before);
}
