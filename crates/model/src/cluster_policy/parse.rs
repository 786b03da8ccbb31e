//! From the object to the noun.

use ipnet::IpNet;

use super::object;
use super::{
    Action, ClusterNetworkPolicy, ClusterPeer, ClusterRule, HIGHEST_PRIORITY, LONGEST_RULE_NAME, MOST_ITEMS,
    ProtocolMatch, Subject, Tier,
};
use crate::error::{At, Refuse, with_problems};
use crate::{Direction, DomainName, Enforcement, Invalid, PolicyPort, PortMatch, Protocol, Selector};

fn at_most(at: &At<'_>, below: &str, count: usize) -> Result<(), Invalid> {
    if count > MOST_ITEMS {
        return Err(at.invalid(below, format!("{count} items; at most {MOST_ITEMS} are allowed")));
    }
    Ok(())
}

impl TryFrom<&object::ClusterNetworkPolicy> for ClusterNetworkPolicy {
    type Error = Invalid;

    fn try_from(object: &object::ClusterNetworkPolicy) -> Result<Self, Invalid> {
        Self::parse(object, &mut Err)
    }
}

impl ClusterNetworkPolicy {
    /// As `try_from`, but fails closed:
    /// - a rule that cannot be understood is as [`ClusterRule::closed`] says, in its place;
    /// - where the tier cannot, the policy stands first in the admin tier, and where the priority cannot, at the end of the range that it is beyond;
    /// - where the tier or the subject cannot be understood, its `Accept` rules match nobody and its `Pass` rules deny what they would have
    ///   passed; and the subject is every pod;
    /// - what is only too much of something (rules, peers, letters) is taken all the same.
    ///
    /// What was impossible comes with it.
    ///
    /// # Errors
    /// The object has no name.
    pub fn fail_closed(object: &object::ClusterNetworkPolicy) -> Result<(Self, Vec<Invalid>), Invalid> {
        with_problems(|refuse| Self::parse(object, refuse))
    }

    fn parse(object: &object::ClusterNetworkPolicy, refuse: Refuse<'_>) -> Result<Self, Invalid> {
        let Some(name) = &object.metadata.name else {
            return Err(Invalid::new("ClusterNetworkPolicy", "metadata.name", "missing"));
        };
        let who = format!("ClusterNetworkPolicy {name}");
        let (spec, at) = (&object.spec, At { who: &who, field: "spec".to_owned() });
        let mut understood = true;
        let tier = match spec.tier.as_str() {
            "Admin" => Tier::Admin,
            "Baseline" => Tier::Baseline,
            other => {
                refuse(at.invalid(".tier", format!("{other:?} is neither Admin nor Baseline")))?;
                understood = false;
                Tier::Admin
            }
        };
        let clamped = spec.priority.unwrap_or_default().clamp(0, i64::from(HIGHEST_PRIORITY));
        if spec.priority != Some(clamped) {
            let said = spec.priority.map_or_else(|| "missing, or no number".to_owned(), |said| said.to_string());
            refuse(at.invalid(".priority", format!("{said}; it must be between 0 and {HIGHEST_PRIORITY}")))?;
        }
        let priority = u16::try_from(clamped).unwrap_or(HIGHEST_PRIORITY);
        let subject = match subject(&at, &spec.subject) {
            Ok(subject) => subject,
            Err(problem) => {
                refuse(problem)?;
                understood = false;
                Subject::default()
            }
        };
        let mut ingress = Vec::new();
        let list = spec.ingress.as_deref().unwrap_or_default();
        at_most(&at, ".ingress", list.len()).or_else(&mut *refuse)?;
        for (index, rule) in list.iter().enumerate() {
            let raw = RawRule {
                at: at.below(&format!(".ingress[{index}]")),
                direction: Direction::Ingress,
                name: rule.name.as_deref().unwrap_or_default(),
                action: &rule.action,
                peers: rule.from.as_deref().unwrap_or_default(),
                protocols: rule.protocols.as_deref(),
            };
            ingress.push(raw.parse(refuse)?);
        }
        let mut egress = Vec::new();
        let list = spec.egress.as_deref().unwrap_or_default();
        at_most(&at, ".egress", list.len()).or_else(&mut *refuse)?;
        for (index, rule) in list.iter().enumerate() {
            let raw = RawRule {
                at: at.below(&format!(".egress[{index}]")),
                direction: Direction::Egress,
                name: rule.name.as_deref().unwrap_or_default(),
                action: &rule.action,
                peers: rule.to.as_deref().unwrap_or_default(),
                protocols: rule.protocols.as_deref(),
            };
            egress.push(raw.parse(refuse)?);
        }
        if !understood {
            ingress.iter_mut().chain(&mut egress).for_each(close);
        }
        let priority = if understood { priority } else { 0 };
        let enforcement = Enforcement::of(object.metadata.annotations.as_ref());
        Ok(Self { name: name.clone(), tier, priority, subject, ingress, egress, enforcement })
    }
}

/// A rule of a policy of which it is not known where it stands or whom it is for.
fn close(rule: &mut ClusterRule) {
    match rule.action {
        Action::Accept => rule.peers.clear(),
        Action::Deny => {}
        Action::Pass => rule.action = Action::Deny,
    }
}

fn subject(at: &At<'_>, subject: &object::Subject) -> Result<Subject, Invalid> {
    match (&subject.namespaces, &subject.pods) {
        (Some(namespaces), None) => {
            Ok(Subject { namespaces: at.selector(".subject.namespaces", namespaces)?, pods: Selector::everything() })
        }
        (None, Some(pods)) => namespaced_pod(at, ".subject.pods", pods),
        (None, None) => {
            Err(at.invalid(".subject", "shows neither namespaces nor pods: it is empty, or of a later version"))
        }
        (Some(_), Some(_)) => Err(at.invalid(".subject", "may not have both namespaces and pods")),
    }
}

fn namespaced_pod(at: &At<'_>, below: &str, pods: &object::NamespacedPod) -> Result<Subject, Invalid> {
    Ok(Subject {
        namespaces: at.selector(&format!("{below}.namespaceSelector"), &pods.namespace_selector)?,
        pods: at.selector(&format!("{below}.podSelector"), &pods.pod_selector)?,
    })
}

/// A rule of either direction, as it came.
struct RawRule<'a> {
    at: At<'a>,
    direction: Direction,
    name: &'a str,
    action: &'a str,
    peers: &'a [object::RulePeer],
    protocols: Option<&'a [object::RuleProtocol]>,
}

impl RawRule<'_> {
    fn parse(&self, refuse: Refuse<'_>) -> Result<ClusterRule, Invalid> {
        self.limits().or_else(&mut *refuse)?;
        let action = match self.action {
            "Accept" => Ok(Action::Accept),
            "Deny" => Ok(Action::Deny),
            "Pass" => Ok(Action::Pass),
            other => Err(self.at.invalid(".action", format!("{other:?} is neither Accept, Deny nor Pass"))),
        };
        let known = action.as_ref().ok().copied();
        match action.and_then(|action| self.understood(action)) {
            Ok(rule) => Ok(rule),
            Err(problem) => {
                refuse(problem)?;
                Ok(ClusterRule::closed(self.name.to_owned(), known))
            }
        }
    }

    fn limits(&self) -> Result<(), Invalid> {
        if self.name.chars().count() > LONGEST_RULE_NAME {
            return Err(self.at.invalid(".name", format!("longer than {LONGEST_RULE_NAME} characters")));
        }
        at_most(&self.at, self.peers_field(), self.peers.len())?;
        at_most(&self.at, ".protocols", self.protocols.map_or(0, <[_]>::len))?;
        for (index, peer) in self.peers.iter().enumerate() {
            let field = |name: &str| format!("{}[{index}].{name}", self.peers_field());
            at_most(&self.at, &field("networks"), peer.networks.as_ref().map_or(0, Vec::len))?;
            at_most(&self.at, &field("domainNames"), peer.domain_names.as_ref().map_or(0, Vec::len))?;
        }
        Ok(())
    }

    fn peers_field(&self) -> &'static str {
        match self.direction {
            Direction::Ingress => ".from",
            Direction::Egress => ".to",
        }
    }

    fn understood(&self, action: Action) -> Result<ClusterRule, Invalid> {
        if self.peers.is_empty() {
            return Err(self.at.invalid(self.peers_field(), "needs at least one item that can be read"));
        }
        let mut peers = Vec::new();
        for (index, peer) in self.peers.iter().enumerate() {
            let at = self.at.below(&format!("{}[{index}]", self.peers_field()));
            peers.push(self.peer(&at, peer)?);
        }
        let mut protocols = Vec::new();
        if self.protocols.is_some_and(<[_]>::is_empty) {
            return Err(self.at.invalid(".protocols", "needs at least one item, or must be left out"));
        }
        for (index, protocol) in self.protocols.unwrap_or_default().iter().enumerate() {
            protocols.push(parse_protocol(&self.at.below(&format!(".protocols[{index}]")), protocol)?);
        }
        let named = protocols.iter().any(|p| matches!(p, ProtocolMatch::NamedPort(_)));
        if named && !peers.iter().all(|peer| matches!(peer, ClusterPeer::Pods(_))) {
            let reason = "nodes, networks and domainNames have no named ports; name a number, or write two rules";
            return Err(self.at.invalid(".protocols", reason));
        }
        let domains = peers.iter().any(|peer| matches!(peer, ClusterPeer::DomainNames(_)));
        if domains && action != Action::Accept {
            return Err(self.at.invalid(".to", "domainNames may stand in Accept rules only"));
        }
        Ok(ClusterRule { name: self.name.to_owned(), action, peers, protocols })
    }

    fn peer(&self, at: &At<'_>, peer: &object::RulePeer) -> Result<ClusterPeer, Invalid> {
        let egress_only = peer.nodes.is_some() || peer.networks.is_some() || peer.domain_names.is_some();
        if egress_only && self.direction == Direction::Ingress {
            return Err(at.invalid("", "nodes, networks and domainNames may stand in egress rules only"));
        }
        match (&peer.namespaces, &peer.pods, &peer.nodes, &peer.networks, &peer.domain_names) {
            (Some(namespaces), None, None, None, None) => Ok(ClusterPeer::Pods(Subject {
                namespaces: at.selector(".namespaces", namespaces)?,
                pods: Selector::everything(),
            })),
            (None, Some(pods), None, None, None) => Ok(ClusterPeer::Pods(namespaced_pod(at, ".pods", pods)?)),
            (None, None, Some(nodes), None, None) => Ok(ClusterPeer::Nodes(at.selector(".nodes", nodes)?)),
            (None, None, None, Some(networks), None) => parse_networks(at, networks),
            (None, None, None, None, Some(names)) => parse_names(at, names),
            (None, None, None, None, None) => {
                Err(at.invalid("", "shows no peer that is known here: it is empty, or of a later version"))
            }
            _ => Err(at.invalid("", "may have one field only")),
        }
    }
}

fn parse_networks(at: &At<'_>, networks: &[String]) -> Result<ClusterPeer, Invalid> {
    if networks.is_empty() {
        return Err(at.invalid(".networks", "needs at least one item"));
    }
    let mut parsed = Vec::new();
    for (index, text) in networks.iter().enumerate() {
        let below = format!(".networks[{index}]");
        let net: IpNet = text.parse().map_err(|e| at.invalid(&below, format!("{text:?} is no CIDR: {e}")))?;
        // As `isCIDR` of the definition: no packet carries such an address.
        if matches!(net, IpNet::V6(v6) if v6.addr().to_ipv4_mapped().is_some()) {
            return Err(at.invalid(&below, format!("{text:?} is an IPv4 range written as IPv6")));
        }
        parsed.push(net.trunc());
    }
    parsed.sort();
    parsed.dedup();
    Ok(ClusterPeer::Networks(parsed))
}

fn parse_names(at: &At<'_>, names: &[String]) -> Result<ClusterPeer, Invalid> {
    if names.is_empty() {
        return Err(at.invalid(".domainNames", "needs at least one item"));
    }
    let mut parsed = Vec::new();
    for (index, text) in names.iter().enumerate() {
        let name = DomainName::parse(text);
        let reason = || format!("{text:?} is no domain name");
        parsed.push(name.ok_or_else(|| at.invalid(&format!(".domainNames[{index}]"), reason()))?);
    }
    parsed.sort();
    parsed.dedup();
    Ok(ClusterPeer::DomainNames(parsed))
}

fn parse_protocol(at: &At<'_>, protocol: &object::RuleProtocol) -> Result<ProtocolMatch, Invalid> {
    match (&protocol.tcp, &protocol.udp, &protocol.sctp, protocol.destination_named_port.as_deref()) {
        (Some(ports), None, None, None) => parse_ports(&at.below(".tcp"), Protocol::Tcp, ports),
        (None, Some(ports), None, None) => parse_ports(&at.below(".udp"), Protocol::Udp, ports),
        (None, None, Some(ports), None) => parse_ports(&at.below(".sctp"), Protocol::Sctp, ports),
        (None, None, None, Some(name)) if !name.is_empty() => Ok(ProtocolMatch::NamedPort(name.to_owned())),
        (None, None, None, _) => {
            Err(at.invalid("", "shows no protocol that is known here: it is empty, or of a later version"))
        }
        _ => Err(at.invalid("", "may have one field only")),
    }
}

fn parse_ports(at: &At<'_>, protocol: Protocol, ports: &object::Ports) -> Result<ProtocolMatch, Invalid> {
    // The definition wants a property here (`minProperties`): an object without one may hold a field of a later version.
    let Some(port) = &ports.destination_port else {
        return Err(at.invalid("", "shows no destinationPort: it is empty, or of a later version"));
    };
    let matched = match (port.number, &port.range) {
        (Some(value), None) => {
            let port = at.port(".destinationPort.number", value)?;
            PortMatch::Range(port, port)
        }
        (None, Some(range)) => {
            let first = at.port(".destinationPort.range.start", range.start)?;
            let last = at.port(".destinationPort.range.end", range.end)?;
            if first >= last {
                return Err(at.invalid(".destinationPort.range", format!("start {first} must be less than end {last}")));
            }
            PortMatch::Range(first, last)
        }
        (None, None) => {
            return Err(
                at.invalid(".destinationPort", "shows neither number nor range: it is empty, or of a later version")
            );
        }
        (Some(_), Some(_)) => return Err(at.invalid(".destinationPort", "may not have both number and range")),
    };
    Ok(ProtocolMatch::Ports(PolicyPort { protocol, port: matched }))
}
