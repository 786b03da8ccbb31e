//! NetworkPolicy (`networking.k8s.io/v1`), parsed.

use ipnet::IpNet;
use k8s_openapi::api::networking::v1 as networking;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde::{Deserialize, Serialize};

use crate::error::{At, Refuse, with_problems};
use crate::labels::Requirement;
use crate::{Enforcement, Invalid, NamespacedName, Protocol, Selector};

/// Which way a rule looks, seen from the pod it isolates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Direction {
    /// Towards the pod.
    Ingress,
    /// From the pod.
    Egress,
}

/// A NetworkPolicy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkPolicy {
    /// Namespace and name.
    pub name: NamespacedName,
    /// The pods of its namespace that it isolates.
    pub pod_selector: Selector,
    /// Its ingress rules, if it isolates ingress (an empty list then denies all).
    pub ingress: Option<Vec<PolicyRule>>,
    /// Its egress rules, if it isolates egress.
    pub egress: Option<Vec<PolicyRule>>,
    /// Whether that is done, or only reported.
    #[serde(default)]
    pub enforcement: Enforcement,
}

impl NetworkPolicy {
    /// The policy that isolates every pod of its namespace in both directions and admits nobody.
    pub fn deny_all(name: NamespacedName) -> Self {
        Self {
            name,
            pod_selector: Selector::everything(),
            ingress: Some(Vec::new()),
            egress: Some(Vec::new()),
            enforcement: Enforcement::Enforced,
        }
    }

    /// What stands for it where there is no room for its rules: it isolates the same pods in the same directions and admits nobody. One that
    /// is only audited isolates none.
    pub fn closed(&self) -> Self {
        let closed = |rules: &Option<Vec<PolicyRule>>| {
            rules.as_ref().filter(|_| !self.enforcement.is_audited()).map(|_| Vec::new())
        };
        Self {
            name: self.name.clone(),
            pod_selector: self.pod_selector.clone(),
            ingress: closed(&self.ingress),
            egress: closed(&self.egress),
            enforcement: self.enforcement.clone(),
        }
    }

    /// How much it asks for, as far as its text says: peers times ports, of all rules.
    pub fn weight(&self) -> usize {
        let of_rule = |rule: &PolicyRule| rule.peers.len().max(1).saturating_mul(rule.ports.len().max(1));
        self.ingress.iter().chain(&self.egress).flatten().map(of_rule).fold(0, usize::saturating_add)
    }

    /// The rules of a direction, if the policy isolates it.
    pub fn rules(&self, direction: Direction) -> Option<&[PolicyRule]> {
        match direction {
            Direction::Ingress => self.ingress.as_deref(),
            Direction::Egress => self.egress.as_deref(),
        }
    }
}

/// One rule: any of the peers on any of the ports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyRule {
    /// `from` or `to`; empty: everyone.
    pub peers: Vec<Peer>,
    /// `ports`; empty: every port of every protocol.
    pub ports: Vec<PolicyPort>,
}

/// One peer of a rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Peer {
    /// Pods by labels.
    Pods {
        /// Which namespaces; none: the policy's own.
        namespaces: Option<Selector>,
        /// Which pods in them.
        pods: Selector,
    },
    /// Addresses.
    IpBlock {
        /// `cidr`, truncated to its network.
        cidr: IpNet,
        /// `except`, each inside `cidr`.
        except: Vec<IpNet>,
    },
}

/// One entry of `ports`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PolicyPort {
    /// Its protocol.
    pub protocol: Protocol,
    /// Which ports of it.
    pub port: PortMatch,
}

/// Which ports of a protocol.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum PortMatch {
    /// All.
    Any,
    /// `port` to `endPort`, both included; a single port is a range of one.
    Range(u16, u16),
    /// The destination pod's container port of this name.
    Named(String),
}

fn parse_block(at: &At<'_>, block: &networking::IPBlock) -> Result<Peer, Invalid> {
    let parse = |below: &str, text: &str| {
        text.parse::<IpNet>().map(|n| n.trunc()).map_err(|e| at.invalid(below, format!("{text:?} is no CIDR: {e}")))
    };
    let cidr = parse(".ipBlock.cidr", &block.cidr)?;
    let mut except = Vec::new();
    for text in block.except.iter().flatten() {
        let inner = parse(".ipBlock.except", text)?;
        if !cidr.contains(&inner) || cidr == inner {
            return Err(at.invalid(".ipBlock.except", format!("{inner} must be a strict subset of {cidr}")));
        }
        except.push(inner);
    }
    except.sort();
    except.dedup();
    Ok(Peer::IpBlock { cidr, except })
}

fn parse_peer(at: &At<'_>, peer: &networking::NetworkPolicyPeer) -> Result<Peer, Invalid> {
    match (&peer.ip_block, &peer.namespace_selector, &peer.pod_selector) {
        (Some(block), None, None) => parse_block(at, block),
        (Some(_), _, _) => Err(at.invalid(".ipBlock", "may not be combined with selectors")),
        (None, None, None) => Err(at.invalid("", "must name an ipBlock, a podSelector or a namespaceSelector")),
        (None, namespaces, pods) => Ok(Peer::Pods {
            namespaces: namespaces.as_ref().map(|s| at.selector(".namespaceSelector", s)).transpose()?,
            pods: pods.as_ref().map(|s| at.selector(".podSelector", s)).transpose()?.unwrap_or_default(),
        }),
    }
}

fn parse_port(at: &At<'_>, port: &networking::NetworkPolicyPort) -> Result<PolicyPort, Invalid> {
    // Only a field that is not there is defaulted; the API server refuses an empty one.
    let protocol = Some(port.protocol.as_deref())
        .filter(|protocol| *protocol != Some(""))
        .and_then(Protocol::parse)
        .ok_or_else(|| at.invalid(".protocol", format!("unknown protocol {:?}", port.protocol)))?;
    let matched = match (&port.port, port.end_port) {
        (None, None) => PortMatch::Any,
        (None, Some(_)) => return Err(at.invalid(".endPort", "needs port")),
        (Some(IntOrString::String(name)), None) => PortMatch::Named(name.clone()),
        (Some(IntOrString::String(_)), Some(_)) => return Err(at.invalid(".endPort", "needs a numeric port")),
        (Some(IntOrString::Int(value)), None) => {
            let first = at.port(".port", *value)?;
            PortMatch::Range(first, first)
        }
        (Some(IntOrString::Int(value)), Some(end)) => {
            let (first, last) = (at.port(".port", *value)?, at.port(".endPort", end)?);
            if last < first {
                return Err(at.invalid(".endPort", format!("{last} is below port {first}")));
            }
            PortMatch::Range(first, last)
        }
    };
    Ok(PolicyPort { protocol, port: matched })
}

fn parse_rule(
    who: &str,
    field: &str,
    peers: Option<&Vec<networking::NetworkPolicyPeer>>,
    peer_field: &str,
    ports: Option<&Vec<networking::NetworkPolicyPort>>,
) -> Result<PolicyRule, Invalid> {
    let peers = peers
        .into_iter()
        .flatten()
        .enumerate()
        .map(|(i, peer)| parse_peer(&At { who, field: format!("{field}.{peer_field}[{i}]") }, peer))
        .collect::<Result<_, _>>()?;
    let ports = ports
        .into_iter()
        .flatten()
        .enumerate()
        .map(|(i, port)| parse_port(&At { who, field: format!("{field}.ports[{i}]") }, port))
        .collect::<Result<_, _>>()?;
    Ok(PolicyRule { peers, ports })
}

/// A rule that nobody matches: what stands for one that says something impossible. It keeps its place, so that the others
/// keep their numbers.
fn matching_nobody() -> PolicyRule {
    let key = "kubernetes.io/metadata.name".to_owned();
    let never = Selector::of([Requirement::Exists(key.clone()), Requirement::DoesNotExist(key)]);
    PolicyRule { peers: vec![Peer::Pods { namespaces: None, pods: never }], ports: Vec::new() }
}

/// The directions that a policy isolates.
struct Types {
    ingress: bool,
    egress: bool,
}

impl Types {
    /// `spec.policyTypes`. Without it: Ingress always, Egress when there are egress rules (API default). One that is not understood stands for
    /// both directions: read as none, a misspelt word would open what the policy closes.
    fn parse(spec: &networking::NetworkPolicySpec, who: &str, refuse: Refuse<'_>) -> Result<Self, Invalid> {
        let Some(said) = spec.policy_types.as_ref().filter(|types| !types.is_empty()) else {
            return Ok(Self { ingress: true, egress: spec.egress.as_ref().is_some_and(|rules| !rules.is_empty()) });
        };
        let mut types = Self { ingress: false, egress: false };
        for (index, name) in said.iter().enumerate() {
            match name.as_str() {
                "Ingress" => types.ingress = true,
                "Egress" => types.egress = true,
                other => {
                    let field = format!("spec.policyTypes[{index}]");
                    refuse(Invalid::new(who, field, format!("{other:?} is neither Ingress nor Egress")))?;
                    types = Self { ingress: true, egress: true };
                }
            }
        }
        Ok(types)
    }
}

impl TryFrom<&networking::NetworkPolicy> for NetworkPolicy {
    type Error = Invalid;

    fn try_from(object: &networking::NetworkPolicy) -> Result<Self, Invalid> {
        Self::parse(object, &mut Err)
    }
}

impl NetworkPolicy {
    /// As `try_from`, but fails closed: a policy that says something impossible in one place still isolates the pods it selects.
    /// A rule that cannot be understood matches nobody; a pod selector that cannot selects the whole namespace, and then no rule matches
    /// anybody; with a policy type that cannot both directions are isolated. What was impossible comes with it.
    ///
    /// # Errors
    /// The object has no name.
    pub fn fail_closed(object: &networking::NetworkPolicy) -> Result<(Self, Vec<Invalid>), Invalid> {
        with_problems(|refuse| Self::parse(object, refuse))
    }

    /// Parses; `refuse` decides whether something impossible ends it or is left out.
    fn parse(object: &networking::NetworkPolicy, refuse: Refuse<'_>) -> Result<Self, Invalid> {
        let meta = &object.metadata;
        let (Some(namespace), Some(name)) = (&meta.namespace, &meta.name) else {
            return Err(Invalid::new("NetworkPolicy", "metadata", "namespace or name missing"));
        };
        let name = NamespacedName::new(namespace, name);
        let who = format!("NetworkPolicy {name}");
        // The API server shows the empty spec as what it means: every pod of the namespace, and nobody may come in.
        let none = networking::NetworkPolicySpec::default();
        let spec = match &object.spec {
            Some(spec) => spec,
            None => {
                refuse(Invalid::new(&who, "spec", "missing"))?;
                &none
            }
        };
        let selector = spec.pod_selector.as_ref().map(|s| Selector::parse(s, &who, "spec.podSelector"));
        let (pod_selector, for_whom_is_known) = match selector {
            Some(Ok(selector)) => (selector, true),
            None => (Selector::everything(), true),
            Some(Err(problem)) => {
                refuse(problem)?;
                (Selector::everything(), false)
            }
        };
        let types = Types::parse(spec, &who, refuse)?;
        let mut keep = |rule: Result<PolicyRule, Invalid>| match rule {
            Ok(rule) => Ok(rule),
            Err(problem) => refuse(problem).map(|()| matching_nobody()),
        };
        let mut ingress = Vec::new();
        for (i, rule) in spec.ingress.iter().flatten().enumerate().filter(|_| types.ingress) {
            let field = format!("spec.ingress[{i}]");
            ingress.push(keep(parse_rule(&who, &field, rule.from.as_ref(), "from", rule.ports.as_ref()))?);
        }
        let mut egress = Vec::new();
        for (i, rule) in spec.egress.iter().flatten().enumerate().filter(|_| types.egress) {
            let field = format!("spec.egress[{i}]");
            egress.push(keep(parse_rule(&who, &field, rule.to.as_ref(), "to", rule.ports.as_ref()))?);
        }
        // What it allows is for the pods that it selects: others, which other policies may isolate, would be opened by it.
        if !for_whom_is_known {
            ingress.iter_mut().chain(&mut egress).for_each(|rule| *rule = matching_nobody());
        }
        Ok(Self {
            name,
            pod_selector,
            ingress: types.ingress.then_some(ingress),
            egress: types.egress.then_some(egress),
            enforcement: Enforcement::of(meta.annotations.as_ref()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(spec: serde_json::Value) -> networking::NetworkPolicy {
        let object = serde_json::json!({"metadata": {"namespace": "default", "name": "p"}, "spec": spec});
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn a_policy_that_cannot_be_understood_in_one_place_still_isolates() {
        let object = policy(serde_json::json!({
            "podSelector": {"matchLabels": {"app": "web"}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {"from": [{"ipBlock": {"cidr": "10.0.0.0/33"}}]},
                {"from": [{"podSelector": {}}]},
            ],
            "egress": [{"ports": [{"port": 80, "endPort": 79}]}],
        }));
        assert!(NetworkPolicy::try_from(&object).is_err());
        let (parsed, problems) = NetworkPolicy::fail_closed(&object).unwrap();
        assert_eq!(problems.len(), 2);
        assert!(problems[0].to_string().contains("10.0.0.0/33"), "{}", problems[0]);
        let ingress = parsed.ingress.unwrap();
        assert_eq!(ingress.len(), 2, "rules keep their numbers");
        let labels = [("kubernetes.io/metadata.name".to_owned(), "x".to_owned())].into();
        for rule in [&ingress[0], &parsed.egress.unwrap()[0]] {
            let [Peer::Pods { pods, .. }] = rule.peers.as_slice() else { panic!("{rule:?}") };
            assert!(!pods.matches(&labels) && !pods.matches(&Default::default()));
        }
    }

    #[test]
    fn an_empty_protocol_is_not_the_default_one() {
        let with =
            |port: serde_json::Value| policy(serde_json::json!({"podSelector": {}, "ingress": [{"ports": [port]}]}));
        assert!(NetworkPolicy::try_from(&with(serde_json::json!({"port": 80}))).is_ok());
        let refused = NetworkPolicy::try_from(&with(serde_json::json!({"port": 80, "protocol": ""}))).unwrap_err();
        assert_eq!(refused.field, "spec.ingress[0].ports[0].protocol");
    }

    #[test]
    fn what_there_is_no_room_for_closes_the_directions_that_it_isolates() {
        let peers = serde_json::json!([{"podSelector": {}}, {"ipBlock": {"cidr": "10.0.0.0/8"}}]);
        let rules = serde_json::json!([{"from": peers, "ports": [{"port": 1}, {"port": 2}, {"port": 3}]}, {}]);
        let mut object = policy(serde_json::json!({"podSelector": {"matchLabels": {"app": "web"}}, "ingress": rules}));
        let written = NetworkPolicy::try_from(&object).unwrap();
        assert_eq!(written.weight(), 2 * 3 + 1);
        let closed = written.closed();
        assert_eq!((closed.ingress.as_deref(), closed.egress.as_deref()), (Some([].as_slice()), None));
        assert_eq!((&closed.pod_selector, closed.weight()), (&written.pod_selector, 0));
        object.metadata.annotations = Some([("towpath.dev/audit".to_owned(), "true".to_owned())].into());
        let closed = NetworkPolicy::try_from(&object).unwrap().closed();
        assert_eq!((closed.ingress, closed.egress), (None, None), "what is not enforced closes nobody");
    }

    #[test]
    fn a_pod_selector_that_cannot_be_understood_selects_everything() {
        let selector = serde_json::json!({"matchExpressions": [{"key": "a", "operator": "Near", "values": ["b"]}]});
        let object = policy(serde_json::json!({"podSelector": selector}));
        let (parsed, problems) = NetworkPolicy::fail_closed(&object).unwrap();
        assert!(parsed.pod_selector.is_everything());
        assert_eq!((parsed.ingress, problems.len()), (Some(Vec::new()), 1));
    }

    #[test]
    fn a_misspelt_policy_type_isolates_both_directions() {
        let rules = serde_json::json!([{"from": [{"podSelector": {}}]}]);
        let object = policy(serde_json::json!({"podSelector": {}, "policyTypes": ["ingress"], "ingress": rules}));
        let refused = NetworkPolicy::try_from(&object).unwrap_err();
        assert_eq!(refused.field, "spec.policyTypes[0]");
        let (parsed, problems) = NetworkPolicy::fail_closed(&object).unwrap();
        assert_eq!(problems, [refused]);
        assert_eq!((parsed.ingress.map(|rules| rules.len()), parsed.egress), (Some(1), Some(Vec::new())));
        let object = policy(serde_json::json!({"podSelector": {}, "policyTypes": ["Egress"], "ingress": rules}));
        let parsed = NetworkPolicy::try_from(&object).unwrap();
        assert_eq!((parsed.ingress, parsed.egress), (None, Some(Vec::new())));
    }

    #[test]
    fn a_policy_without_a_spec_isolates_its_namespace() {
        let object = policy(serde_json::Value::Null);
        assert!(NetworkPolicy::try_from(&object).is_err());
        let (parsed, problems) = NetworkPolicy::fail_closed(&object).unwrap();
        assert!(parsed.pod_selector.is_everything());
        assert_eq!((parsed.ingress, parsed.egress, problems.len()), (Some(Vec::new()), None, 1));
    }

    #[test]
    fn a_policy_for_nobody_knows_whom_allows_nothing() {
        let selector = serde_json::json!({"matchExpressions": [{"key": "a", "operator": "Near", "values": ["b"]}]});
        let object = policy(serde_json::json!({"podSelector": selector, "ingress": [{}], "egress": [{}]}));
        let (parsed, _) = NetworkPolicy::fail_closed(&object).unwrap();
        for rules in [parsed.ingress.unwrap(), parsed.egress.unwrap()] {
            let [PolicyRule { peers, .. }] = rules.as_slice() else { panic!("{rules:?}") };
            let [Peer::Pods { pods, .. }] = peers.as_slice() else { panic!("{peers:?}") };
            assert!(!pods.matches(&Default::default()));
        }
    }
}
