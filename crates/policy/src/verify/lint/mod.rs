//! What in the policies is likely a mistake.
//!
//! A finding has a stable [`Code`], the object and the field that it is about, and says what is so; the code says what to do.
//! Checks that need workloads are left out where there are none: policies alone are no reason to say that nothing is selected.

mod dns;
mod shadow;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Serialize, Serializer};
use towpath_model::{Direction, Family, Selector, Tier, World};

use super::addresses::Addresses;
use super::clauses::{Clause, Namespaces, PeerSet, PodSet, Tiers};
use super::universe::{Endpoint, Universe, in_namespaces};

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Good to know.
    Note,
    /// Likely not what was meant.
    Warning,
    /// Not what the API takes.
    Error,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Level::Note => "note",
            Level::Warning => "warning",
            Level::Error => "error",
        })
    }
}

macro_rules! codes {
    ($($name:ident = $code:literal, $level:ident, $title:literal, $advice:literal;)*) => {
        /// What a finding is. The text form (`TP001`) is stable.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Code {
            $(#[doc = $title] $name,)*
        }

        impl Code {
            /// All of them.
            pub const ALL: &'static [Code] = &[$(Code::$name),*];

            /// `TP001`.
            pub fn id(self) -> &'static str {
                match self { $(Code::$name => $code,)* }
            }

            /// How bad it is.
            pub fn level(self) -> Level {
                match self { $(Code::$name => Level::$level,)* }
            }

            /// What it is, in a few words.
            pub fn title(self) -> &'static str {
                match self { $(Code::$name => $title,)* }
            }

            /// Why it matters and what to do.
            pub fn advice(self) -> &'static str {
                match self { $(Code::$name => $advice,)* }
            }
        }
    };
}

codes! {
    NoSubject = "TP001", Warning, "the policy selects no pod",
        "It protects nobody. Compare its selector with the labels of the pods (kubectl get pods --show-labels); labels of a Deployment's own metadata are not those of its pods.";
    NoPeer = "TP002", Warning, "a peer selects no pod",
        "The rule does nothing for this peer. Compare the selector with the labels of the pods; podSelector without namespaceSelector means the policy's own namespace.";
    NoNamespace = "TP003", Warning, "a namespaceSelector selects no namespace",
        "The rule does nothing for this peer. Namespaces are selected by labels, not by name: the label kubernetes.io/metadata.name holds the name.";
    Shadowed = "TP004", Warning, "a rule can never decide",
        "Another rule says as much already or is asked first. Delete it, or narrow the other one.";
    NoDns = "TP005", Warning, "egress forgets DNS",
        "Pods that may reach something but no DNS server cannot look its name up. Allow UDP and TCP 53 to the pods with k8s-app=kube-dns in namespace kube-system.";
    SamePriority = "TP006", Warning, "two ClusterNetworkPolicies of a tier have one priority",
        "The API leaves open which of them is asked first (Towpath: by name). Give each its own spec.priority.";
    NoPortName = "TP007", Warning, "a port's name that no selected pod has",
        "The rule matches no port. A named port is the name of a containerPort of the pods that the traffic leads to, with the same protocol; it is not the name of a Service's port.";
    EmptyNamespace = "TP008", Warning, "the policy is in a namespace without pods",
        "It protects nobody. A NetworkPolicy is about pods of its own namespace: see whether metadata.namespace is the one that was meant.";
    PartOfPods = "TP009", Warning, "an ipBlock holds some of the pods' addresses",
        "Pods get other addresses when they start anew, so the rule means other pods then. Select pods by labels.";
    AllPods = "TP010", Note, "an ipBlock holds every pod's address",
        "ipBlock is about pods too: the rule opens them as well, in every namespace. If only the world outside is meant, put the pod range into except.";
    NotInForce = "TP011", Warning, "rules of a direction that policyTypes does not name",
        "They are not in force. Add the direction to spec.policyTypes, or delete the rules.";
    Twice = "TP012", Error, "an object is there twice",
        "The last one counts. Delete one, or give it another name or namespace.";
    Invalid = "TP013", Error, "the API server would refuse this",
        "Correct the field. Where the object is in a cluster all the same, Towpath fails closed: a rule that accepts matches nobody, one of a ClusterNetworkPolicy that denies, passes or has an unknown action denies everything, and an impossible selector of a NetworkPolicy's own pods is all of them.";
    Except = "TP014", Error, "except is not within cidr",
        "Each entry of except must be a smaller range inside of cidr.";
    OtherKind = "TP015", Note, "a policy of a kind that Towpath does not enforce",
        "It has no effect here. Write it as a NetworkPolicy (networking.k8s.io/v1) or a ClusterNetworkPolicy (policy.networking.k8s.io/v1alpha2).";
    Domains = "TP016", Note, "a rule names domains",
        "Whom it accepts is what DNS says on each node (towpath dns names): reach, assert and diff leave it out, prove takes it as any address outside. It needs a rule behind it that denies the rest, and one before it that accepts DNS.";
    Unchecked = "TP017", Note, "not everything was compared",
        "There are more rules than are compared with each other in bounded time; TP004 looked at the first ones only.";
    Misread = "TP018", Warning, "an annotation that is not understood",
        "It counts as absent: the policy is enforced. Write towpath.dev/audit: \"true\" for a policy that is to be judged and reported only.";
}

impl Serialize for Code {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.id())
    }
}

/// Something that is likely a mistake.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Finding {
    /// What it is.
    pub code: Code,
    /// Kind and name: `NetworkPolicy shop/db`.
    pub object: String,
    /// Field path; may be empty.
    pub field: String,
    /// What is so.
    pub message: String,
}

impl Finding {
    /// A finding.
    pub fn new(code: Code, object: impl Into<String>, field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { code, object: object.into(), field: field.into(), message: message.into() }
    }
}

const DIRECTIONS: [Direction; 2] = [Direction::Ingress, Direction::Egress];

/// Looks at all policies of a universe, at those that are only audited as if they were enforced. Sorted by object and field.
pub fn lint(universe: &Universe) -> Vec<Finding> {
    let mut universe = universe.clone();
    let mut found = Vec::new();
    annotations(&universe.world, &mut found);
    universe.world.enforce_all();
    let universe = &universe;
    let pods: Vec<&Endpoint> = universe.endpoints.iter().filter(|e| e.namespace().is_some()).collect();
    if !pods.is_empty() {
        subjects(&universe.world, &pods, &mut found);
    }
    let tiers = DIRECTIONS.map(|direction| (direction, Tiers::of(&universe.world, direction)));
    for (direction, tiers) in &tiers {
        for (subject, clause) in with_subjects(tiers) {
            if !pods.is_empty() {
                peers(&universe.world, &pods, clause, &mut found);
                port_names(&universe.world, &pods, *direction, subject, clause, &mut found);
            }
            blocks(universe, clause, &mut found);
        }
        shadow::find(tiers, &mut found);
    }
    if let Some((_, egress)) = tiers.iter().find(|(direction, _)| *direction == Direction::Egress) {
        dns::find(&universe.world, &pods, egress, &mut found);
    }
    priorities(&universe.world, &mut found);
    found.sort_by(|a, b| (&a.object, &a.field, a.code, &a.message).cmp(&(&b.object, &b.field, b.code, &b.message)));
    found.dedup();
    found
}

/// Every clause with the pods that it is about.
fn with_subjects<'t, 'a>(tiers: &'t Tiers<'a>) -> impl Iterator<Item = (PodSet<'a>, &'t Clause<'a>)> {
    let isolation = tiers.isolation.iter().flat_map(|(namespace, list)| {
        list.iter().flat_map(|isolation| {
            let subject = PodSet { namespaces: Namespaces::Named(namespace), pods: isolation.selector };
            isolation.clauses.iter().map(move |clause| (subject, clause))
        })
    });
    tiers.ranked().map(|ranked| (ranked.subject, &ranked.clause)).chain(isolation)
}

fn is_in(world: &World, set: PodSet<'_>, endpoint: &Endpoint) -> bool {
    endpoint.namespace().is_some_and(|namespace| {
        set.pods.matches(&endpoint.labels)
            && in_namespaces(set.namespaces, namespace, &world.namespace_labels(namespace))
    })
}

fn annotations(world: &World, found: &mut Vec<Finding>) {
    let namespaced = world.policies.values();
    let namespaced = namespaced.map(|policy| (format!("NetworkPolicy {}", policy.name), &policy.enforcement));
    let cluster = world.cluster_policies.values();
    let cluster = cluster.map(|policy| (format!("ClusterNetworkPolicy {}", policy.name), &policy.enforcement));
    for (object, enforcement) in namespaced.chain(cluster) {
        let misread = enforcement.misread();
        found.extend(misread.map(|why| Finding::new(Code::Misread, object, "metadata.annotations", why)));
    }
}

fn subjects(world: &World, pods: &[&Endpoint], found: &mut Vec<Finding>) {
    let mut by_namespace: BTreeMap<&str, Vec<&Endpoint>> = BTreeMap::new();
    for endpoint in pods {
        by_namespace.entry(endpoint.namespace().unwrap_or_default()).or_default().push(endpoint);
    }
    for policy in world.policies.values() {
        let object = format!("NetworkPolicy {}", policy.name);
        match by_namespace.get(policy.name.namespace.as_str()) {
            None => {
                let message = format!("namespace {} has no pods on the pod network", policy.name.namespace);
                found.push(Finding::new(Code::EmptyNamespace, object, "metadata.namespace", message));
            }
            Some(own) if !own.iter().any(|e| policy.pod_selector.matches(&e.labels)) => {
                let message = format!("no pod of namespace {} has {}", policy.name.namespace, policy.pod_selector);
                found.push(Finding::new(Code::NoSubject, object, "spec.podSelector", message));
            }
            Some(_) => {}
        }
    }
    for policy in world.cluster_policies.values() {
        let set = PodSet { namespaces: Namespaces::Matching(&policy.subject.namespaces), pods: &policy.subject.pods };
        if !pods.iter().any(|endpoint| is_in(world, set, endpoint)) {
            let object = format!("ClusterNetworkPolicy {}", policy.name);
            let message = format!("no pod with {} is in a namespace with {}", set.pods, policy.subject.namespaces);
            found.push(Finding::new(Code::NoSubject, object, "spec.subject", message));
        }
    }
}

/// Names of all namespaces that are known.
fn namespaces(world: &World) -> BTreeSet<&str> {
    let with_pods = world.pods.keys().map(|name| name.namespace.as_str());
    world.namespaces.keys().map(String::as_str).chain(with_pods).collect()
}

fn peers(world: &World, pods: &[&Endpoint], clause: &Clause<'_>, found: &mut Vec<Finding>) {
    let PeerSet::Pods(set) = &clause.peer else { return };
    // What stands for a rule that cannot be understood is said where it is refused.
    if is_impossible(set.pods) || pods.iter().any(|endpoint| is_in(world, *set, endpoint)) {
        return;
    }
    let source = &clause.source;
    let finding = match set.namespaces {
        Namespaces::Matching(selector)
            if !namespaces(world).into_iter().any(|name| selector.matches(&world.namespace_labels(name))) =>
        {
            let message = format!("no namespace has {selector}");
            Finding::new(Code::NoNamespace, &source.policy, &source.path, message)
        }
        Namespaces::Matching(selector) => {
            let message = format!("no pod with {} is in a namespace with {selector}", set.pods);
            Finding::new(Code::NoPeer, &source.policy, &source.path, message)
        }
        Namespaces::Named(name) => {
            let message = format!("no pod of namespace {name} has {}", set.pods);
            Finding::new(Code::NoPeer, &source.policy, &source.path, message)
        }
    };
    found.push(finding);
}

/// Whether a selector wants a label to be there and not to be there.
fn is_impossible(selector: &Selector) -> bool {
    use towpath_model::labels::Requirement;
    selector.requirements().any(|wanted| {
        matches!(wanted, Requirement::DoesNotExist(key)
            if selector.requirements().any(|other| matches!(other, Requirement::Exists(k) | Requirement::In(k, _) if k == key)))
    })
}

fn port_names(
    world: &World,
    pods: &[&Endpoint],
    direction: Direction,
    subject: PodSet<'_>,
    clause: &Clause<'_>,
    found: &mut Vec<Finding>,
) {
    if clause.ports.named.is_empty() {
        return;
    }
    let targets: Vec<&&Endpoint> = match (direction, &clause.peer) {
        (Direction::Ingress, _) => pods.iter().filter(|e| is_in(world, subject, e)).collect(),
        (Direction::Egress, PeerSet::Pods(set)) => pods.iter().filter(|e| is_in(world, *set, e)).collect(),
        (Direction::Egress, PeerSet::Anyone | PeerSet::Addresses(_)) => pods.iter().collect(),
        (Direction::Egress, PeerSet::Nodes(_) | PeerSet::Names(_)) => Vec::new(),
    };
    if targets.is_empty() {
        return;
    }
    let mut by_name: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (name, protocol) in &clause.ports.named {
        by_name.entry(name).or_default().push(protocol.to_string());
    }
    for (name, protocols) in by_name {
        let has = |e: &&&Endpoint| {
            e.named_ports.iter().any(|p| p.name == name && protocols.contains(&p.protocol.to_string()))
        };
        if !targets.iter().any(has) {
            // A rule of a ClusterNetworkPolicy takes the name with any protocol.
            let of = if protocols.len() == 1 { format!("{} ", protocols.concat()) } else { String::new() };
            let message =
                format!("none of the {} workloads that the traffic leads to has a {of}port {name}", targets.len());
            // The ports are the rule's, whichever of its peers this is about.
            let rule =
                clause.source.path.split_once("].").map_or(clause.source.path.clone(), |(rule, _)| format!("{rule}]"));
            let list = if clause.source.policy.starts_with("Cluster") { "protocols" } else { "ports" };
            found.push(Finding::new(Code::NoPortName, &clause.source.policy, format!("{rule}.{list}"), message));
        }
    }
}

fn blocks(universe: &Universe, clause: &Clause<'_>, found: &mut Vec<Finding>) {
    let PeerSet::Addresses(block) = &clause.peer else { return };
    let ranges = Addresses::of_all(&universe.pod_ranges);
    for family in [Family::V4, Family::V6] {
        let pods = ranges.and(&Addresses::of_family(family));
        let common = block.and(&pods);
        if common.is_empty() {
            continue;
        }
        let source = &clause.source;
        let finding = if common == pods {
            let message = format!("it holds all of the pods' {pods}");
            Finding::new(Code::AllPods, &source.policy, &source.path, message)
        } else {
            let message = format!("it holds {} of the pods' {pods}", brief(&common));
            Finding::new(Code::PartOfPods, &source.policy, &source.path, message)
        };
        found.push(finding);
    }
}

fn brief(addresses: &Addresses) -> String {
    let prefixes = addresses.prefixes();
    let shown: Vec<String> = prefixes.iter().take(4).map(ToString::to_string).collect();
    let more = if prefixes.len() > shown.len() { " …" } else { "" };
    format!("{}{more}", shown.join(", "))
}

/// What is found in ClusterNetworkPolicies without any pod.
fn priorities(world: &World, found: &mut Vec<Finding>) {
    for policy in world.cluster_policies.values().filter(|policy| policy.has_domain_names()) {
        let object = format!("ClusterNetworkPolicy {}", policy.name);
        let mut names: Vec<String> = policy.domain_names().map(ToString::to_string).collect();
        names.dedup();
        let more = if names.len() > 4 { " …" } else { "" };
        names.truncate(4);
        let message = format!("what {}{more} stand for is known on nodes only", names.join(", "));
        found.push(Finding::new(Code::Domains, object, "spec.egress", message));
    }
    for tier in [Tier::Admin, Tier::Baseline] {
        let mut by_priority: BTreeMap<u16, Vec<&str>> = BTreeMap::new();
        for policy in world.cluster_policies_of(tier) {
            by_priority.entry(policy.priority).or_default().push(&policy.name);
        }
        for (priority, names) in by_priority.into_iter().filter(|(_, names)| names.len() > 1) {
            let [first, rest @ ..] = names.as_slice() else { continue };
            for name in rest {
                let message = format!("tier {tier} has {first} with priority {priority} too");
                let object = format!("ClusterNetworkPolicy {name}");
                found.push(Finding::new(Code::SamePriority, object, "spec.priority", message));
            }
        }
    }
}
