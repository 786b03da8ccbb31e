//! Four judges of one packet: the oracle, which reads the API's words; the evaluator; the compiled image, interpreted; and the kernel that
//! holds the image. They must agree on the verdict, and all but the oracle on the rule. The translation check looks at every image besides.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use towpath_model::desired::{PolicyImage, RuleId, Verdict};
use towpath_model::{Direction, NodeName, World};
use towpath_oracle::{Cluster, Traffic};
use towpath_policy::check::{Checker, Mismatch, check};
use towpath_policy::compile::Touched;
use towpath_policy::names::NOTHING_LEARNED;
use towpath_policy::{Compiler, Evaluator, Flow, Holder, Reason, Side, View, image};

use crate::cluster::{NODES, Parsed, Spec};
use crate::kernel::Kernel;
use crate::packet::{Ingress, Packet, Way};
use crate::tally::Tally;

/// That judges differ.
#[derive(Clone, Debug)]
pub struct Difference {
    /// The packet.
    pub packet: Packet,
    /// Who says what.
    pub what: String,
}

/// What all but the kernel say of a packet: at the ends that are pods of the first node, the verdict and the rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreed {
    /// At its source.
    pub egress: Option<(Verdict, RuleId)>,
    /// At its destination.
    pub ingress: Option<(Verdict, RuleId)>,
}

impl Agreed {
    /// Whether it may pass.
    pub fn allowed(&self) -> bool {
        [self.egress, self.ingress].iter().flatten().all(|(verdict, _)| *verdict == Verdict::Allow)
    }

    /// The counter of the kernel that says why not.
    pub fn denied_by(&self) -> Option<&'static str> {
        let denies = |end: Option<(Verdict, RuleId)>| end.is_some_and(|(verdict, _)| verdict == Verdict::Deny);
        match (denies(self.egress), denies(self.ingress)) {
            (true, _) => Some("egress_policy"),
            (false, true) => Some("ingress_policy"),
            (false, false) => None,
        }
    }
}

/// The pure judges of one cluster.
pub struct Judges<'a> {
    parsed: &'a Parsed,
    evaluator: Evaluator<'a>,
    image: &'a PolicyImage,
    /// The cluster with a known pod behind an address of which nobody is known to hold it.
    disguised: RefCell<HashMap<IpAddr, Option<Cluster>>>,
}

/// The view that compiler and evaluator have of a cluster.
pub fn view(parsed: &Parsed) -> View<'_> {
    View { world: &parsed.world, dns: &parsed.dns, pod_ips: &parsed.given, names: &NOTHING_LEARNED }
}

/// The image of the first node.
///
/// # Panics
/// It is larger than what is compiled, which no case here is meant to be.
#[expect(clippy::expect_used, reason = "tests only; no random case is so large")]
pub fn compile(parsed: &Parsed, compiler: &mut Compiler, now: Duration) -> PolicyImage {
    compiler.compile(&view(parsed), &NodeName::new(NODES[0]), now).expect("not too large")
}

/// A compiler, and a check of what it makes, that follow a cluster as it changes, looking at what has changed only.
#[derive(Debug)]
pub struct Following {
    compiler: Compiler,
    checker: Checker,
    before: Option<World>,
}

/// The keys at which two maps differ.
fn differing<'m, K: Ord, V: PartialEq>(
    one: &'m BTreeMap<K, V>,
    other: &'m BTreeMap<K, V>,
) -> impl Iterator<Item = &'m K> {
    let gone = one.keys().filter(|key| !other.contains_key(*key));
    gone.chain(other.iter().filter(|(key, value)| one.get(*key) != Some(*value)).map(|(key, _)| key))
}

impl Following {
    /// One that has seen nothing yet. `grace`: how long ids rest.
    pub fn new(grace: Duration) -> Self {
        let checker = Checker::new(NodeName::new(NODES[0]));
        Self { compiler: Compiler::new(grace), checker, before: None }
    }

    /// The image of the first node; and what the check has against it.
    ///
    /// # Panics
    /// As [`compile`].
    #[expect(clippy::expect_used, reason = "tests only; no random case is so large")]
    pub fn image(&mut self, parsed: &Parsed, now: Duration) -> (PolicyImage, Option<Box<Mismatch>>) {
        let world = &parsed.world;
        let mut touched = Touched::nothing();
        match &self.before {
            None => touched.all(),
            Some(before) => {
                differing(&before.pods, &world.pods).for_each(|name| touched.pod(name.clone()));
                differing(&before.namespaces, &world.namespaces).for_each(|name| touched.namespace(name.clone()));
                differing(&before.policies, &world.policies).for_each(|name| touched.policy(name.clone()));
                if before.cluster_policies != world.cluster_policies {
                    touched.cluster_policies();
                }
            }
        }
        self.compiler.follow(&view(parsed), &NodeName::new(NODES[0]), now, &touched).expect("not too large");
        self.before = Some(world.clone());
        let (image, changes) = (self.compiler.image(), self.compiler.changes());
        let wrong = self.checker.follow(&view(parsed), image, changes, &touched).err();
        (image.clone(), wrong)
    }
}

impl<'a> Judges<'a> {
    /// Judges of a cluster and its image.
    pub fn new(parsed: &'a Parsed, image: &'a PolicyImage) -> Self {
        Self { parsed, evaluator: Evaluator::new(&view(parsed)), image, disguised: RefCell::default() }
    }

    /// What they say of a packet; else how they differ.
    ///
    /// # Errors
    /// They differ, and how.
    pub fn judge(&self, packet: &Packet, tally: &mut Tally) -> Result<Agreed, String> {
        let mut flow = Flow::new(packet.source, packet.destination, packet.transport.row(), packet.port);
        flow.forwarded = packet.is_forwarded();
        let mut agreed = Agreed::default();
        for direction in [Direction::Egress, Direction::Ingress] {
            let (own, peer) = match direction {
                Direction::Egress => (packet.source, packet.destination),
                Direction::Ingress => (packet.destination, packet.source),
            };
            if !self.is_local(own) {
                continue;
            }
            let Some(side) = self.evaluator.side(&flow, direction) else {
                return Err(format!("the evaluator knows no pod at {own}, where the node has one"));
            };
            tally.count(&side);
            self.ask_oracle(packet, &flow, &side, peer, tally)?;
            let rule = self.image_agrees(own, peer, &flow, &side)?;
            match direction {
                Direction::Egress => agreed.egress = Some((side.verdict, rule)),
                Direction::Ingress => agreed.ingress = Some((side.verdict, rule)),
            }
        }
        Ok(agreed)
    }

    fn is_local(&self, address: IpAddr) -> bool {
        match self.evaluator.holder(address) {
            Some(Holder::Pod(pod)) => pod.node.as_ref().is_some_and(|node| node.as_str() == NODES[0]),
            Some(Holder::UnknownPod(_)) => true,
            _ => false,
        }
    }

    fn oracle_allows(cluster: &Cluster, packet: &Packet, direction: Direction) -> bool {
        let traffic = Traffic {
            from: packet.source,
            to: packet.destination,
            protocol: packet.transport.name(),
            port: packet.port,
        };
        match direction {
            Direction::Ingress => towpath_oracle::ingress_allowed(cluster, &traffic),
            Direction::Egress => towpath_oracle::egress_allowed(cluster, &traffic),
        }
    }

    fn ask_oracle(
        &self,
        packet: &Packet,
        flow: &Flow,
        side: &Side,
        peer: IpAddr,
        tally: &mut Tally,
    ) -> Result<(), String> {
        // It knows nothing of pods that the API does not know, nor of who passes a packet on that carries the node's address.
        let masqueraded = flow.forwarded && matches!(packet.way, Some(Way::ToPod(_, Ingress::Uplink)));
        let held_by_node = matches!(self.evaluator.holder(peer), Some(Holder::Node(node)) if node.as_str() == NODES[0]);
        if matches!(side.reason, Reason::Unknown) || (masqueraded && held_by_node) {
            return Ok(());
        }
        if matches!(side.reason, Reason::OwnNode) && side.direction == Direction::Egress {
            return Ok(());
        }
        if !self.evaluator.may_be_pod(peer) {
            let allowed = Self::oracle_allows(&self.parsed.oracle, packet, side.direction);
            tally.oracle += 1;
            return if allowed == (side.verdict == Verdict::Allow) {
                Ok(())
            } else {
                Err(format!("the oracle {}, the evaluator says {side}", if allowed { "allows" } else { "denies" }))
            };
        }
        // What becomes known of it later must not turn out to have been forbidden.
        let mut disguised = self.disguised.borrow_mut();
        let known = disguised.entry(peer).or_insert_with(|| self.disguise(peer));
        if let Some(cluster) = known
            && side.verdict == Verdict::Allow
            && !Self::oracle_allows(cluster, packet, side.direction)
        {
            return Err(format!("the oracle denies it to a pod that may be at {peer}, the evaluator says {side}"));
        }
        tally.unknown += u64::from(side.verdict == Verdict::Deny);
        Ok(())
    }

    /// The cluster with a copy of one of its pods behind an address.
    fn disguise(&self, address: IpAddr) -> Option<Cluster> {
        let mut cluster = self.parsed.oracle.clone();
        let octets = match address {
            IpAddr::V4(a) => a.octets().iter().map(|byte| usize::from(*byte)).sum::<usize>(),
            IpAddr::V6(a) => a.octets().iter().map(|byte| usize::from(*byte)).sum::<usize>(),
        };
        let usual =
            |pod: &&k8s_openapi::api::core::v1::Pod| pod.spec.as_ref().is_some_and(|s| s.host_network != Some(true));
        let pods: Vec<_> = cluster.pods.iter().filter(usual).collect();
        let mut pod = (*pods.get(octets.checked_rem(pods.len())?)?).clone();
        pod.metadata.name = Some("disguised".to_owned());
        let status = serde_json::json!({"phase": "Running", "podIPs": [{"ip": address.to_string()}]});
        pod.status = serde_json::from_value(status).ok();
        cluster.pods.push(pod);
        Some(cluster)
    }

    /// The image's verdict must be the evaluator's, with the same rule or the same isolating policies; the rule that the kernel is to name.
    fn image_agrees(&self, own: IpAddr, peer: IpAddr, flow: &Flow, side: &Side) -> Result<RuleId, String> {
        let (verdict, rule) = image::judge_pod(self.image, own, side.direction, peer, flow.protocol, flow.port);
        let same = match &side.reason {
            // The kernel knows these without a look-up: the packet comes from its own namespace, or never leaves the pod.
            Reason::OwnNode if side.direction == Direction::Ingress => return Ok(RuleId::OWN_NODE),
            Reason::OwnNode => return Ok(RuleId::HOST_ONLY),
            Reason::Itself => return Ok(RuleId::SELF),
            Reason::Unknown => rule == RuleId::HOST_ONLY,
            Reason::NotIsolated => rule == RuleId::NOT_ISOLATED,
            Reason::Rule { rule: wanted } => self.image.rules.get(&rule) == Some(wanted),
            Reason::DefaultDeny { isolating, .. } => {
                let sets = self.image.pods.get(&own).copied().unwrap_or_default();
                let set = if side.direction == Direction::Ingress { sets.ingress } else { sets.egress };
                let named = self.image.isolating.get(&set);
                rule == RuleId::DEFAULT_DENY && named.is_some_and(|named| named.iter().eq(isolating))
            }
        };
        if same && verdict == side.verdict {
            return Ok(rule);
        }
        let by = self.image.rules.get(&rule).map_or_else(|| format!("rule {:#x}", rule.0), |rule| format!("{rule:?}"));
        Err(format!("the image says {verdict:?} by {by}, the evaluator says {side}"))
    }
}

/// Has everybody judge packets of a cluster. What of the kernel's differs is found packet by packet, by its counters, and by the rules that it
/// noted of connections.
///
/// # Errors
/// The cluster is none, or the kernel cannot be asked.
pub fn judge(
    spec: &Spec,
    packets: &[Packet],
    compiler: &mut Following,
    now: Duration,
    kernel: Option<&mut Kernel>,
    tally: &mut Tally,
) -> Result<Vec<Difference>> {
    let parsed = spec.parse().context("a generated object")?;
    let (image, followed) = compiler.image(&parsed, now);
    let judges = Judges::new(&parsed, &image);
    let mut differences = Vec::new();
    let anew = check(&view(&parsed), &NodeName::new(NODES[0]), &image).err();
    let checks = [(followed, "the translation check that follows"), (anew, "the translation check")];
    for (mismatch, which) in checks {
        if let (Some(mismatch), Some(packet)) = (mismatch, packets.first()) {
            differences.push(Difference { packet: *packet, what: format!("(another packet) {which}: {mismatch}") });
        }
    }
    let mut agreed: Vec<(&Packet, Agreed)> = Vec::new();
    for packet in packets {
        match judges.judge(packet, tally) {
            Ok(verdict) => agreed.push((packet, verdict)),
            Err(what) => differences.push(Difference { packet: *packet, what }),
        }
    }
    tally.cases += u64::try_from(packets.len()).unwrap_or_default();
    tally.clusters += 1;
    if let Some(kernel) = kernel {
        kernel.apply(&spec.local, &image)?;
        differences.extend(ask_kernel(kernel, &agreed, tally)?);
    }
    Ok(differences)
}

fn ask_kernel(kernel: &Kernel, agreed: &[(&Packet, Agreed)], tally: &mut Tally) -> Result<Vec<Difference>> {
    let mut differences = Vec::new();
    let before = kernel.dropped()?;
    let mut expected = before.clone();
    for (packet, verdict) in agreed.iter().filter(|(packet, _)| packet.way.is_some()) {
        let passes = kernel.passes(packet)?;
        tally.kernel += 1;
        if let Some(reason) = verdict.denied_by() {
            *expected.entry(reason).or_default() += 1;
        }
        if passes != verdict.allowed() {
            let said = if passes { "passes" } else { "drops" };
            let what = format!("the kernel {said} it, evaluator and image say {verdict:?}");
            differences.push(Difference { packet: **packet, what });
        }
    }
    let after = kernel.dropped()?;
    if differences.is_empty()
        && after != expected
        && let Some((packet, _)) = agreed.first()
    {
        let odd: Vec<_> = after
            .iter()
            .filter(|(reason, count)| expected.get(*reason) != Some(*count))
            .map(|(reason, count)| (*reason, before.get(reason), expected.get(reason), *count))
            .collect();
        let what = format!("dropped for other reasons than said (before, expected, found): {odd:?}");
        differences.push(Difference { packet: **packet, what });
    }
    differences.extend(compare_rules(kernel, agreed, tally)?);
    Ok(differences)
}

/// The rules that the kernel noted of connections that it let pass.
fn compare_rules(kernel: &Kernel, agreed: &[(&Packet, Agreed)], tally: &mut Tally) -> Result<Vec<Difference>> {
    let noted: HashMap<_, _> = kernel
        .connections()?
        .into_iter()
        .map(|c| ((c.protocol, c.opener, c.responder), (c.egress, c.ingress)))
        .collect();
    let mut differences = Vec::new();
    // The last packet of a connection decides, where one was asked twice on different ways.
    let mut last: HashMap<_, _> = HashMap::new();
    for (packet, verdict) in agreed.iter().filter(|(packet, verdict)| packet.way.is_some() && verdict.allowed()) {
        let number = packet.transport.number(packet.source.is_ipv4());
        let echo = packet.transport == crate::packet::Transport::Icmp;
        let ports = match packet.transport.row() {
            towpath_model::desired::RowProtocol::Ports(_) => (packet.source_port, packet.port),
            towpath_model::desired::RowProtocol::Other if echo => (packet.source_port, packet.source_port),
            towpath_model::desired::RowProtocol::Other => (0, 0),
        };
        let key = (number, (packet.source, ports.0), (packet.destination, ports.1));
        last.insert(key, (*packet, *verdict));
    }
    for (key, (packet, verdict)) in last {
        // An echo the other way round has the same entry, and took its place.
        let Some((egress, ingress)) = noted.get(&key) else {
            if packet.transport != crate::packet::Transport::Icmp {
                let what = format!("the kernel let it pass by {verdict:?} and tracks no such connection");
                differences.push(Difference { packet: *packet, what });
            }
            continue;
        };
        tally.rules += 1;
        let found = Agreed {
            egress: egress.map(|judged| (judged.verdict, judged.rule)),
            ingress: ingress.map(|judged| (judged.verdict, judged.rule)),
        };
        if found != verdict {
            let what = format!("the kernel noted {found:?}, evaluator and image say {verdict:?}");
            differences.push(Difference { packet: *packet, what });
        }
    }
    Ok(differences)
}
