//! Policies of every kind, so that each path has both verdicts, and for different reasons.

use std::net::IpAddr;

use crate::scene::{CLOSED, OPEN};

/// What policies must know of the lab.
pub(crate) struct Addresses {
    /// Of node n1, where the endpoints are, one a family.
    pub(crate) here: Vec<IpAddr>,
    /// Of node n2.
    pub(crate) there: Vec<IpAddr>,
    /// Of the host outside that is let in.
    pub(crate) outside: Vec<IpAddr>,
    /// Pods in an allowed range that an exception takes out of it.
    pub(crate) except: Vec<IpAddr>,
    /// Of the pod whose egress is denied by its addresses.
    pub(crate) tiered: Vec<IpAddr>,
}

/// All pods of a lab, one range a family.
const PODS: [&str; 2] = ["10.244.0.0/16", "fd00:10:244::/56"];

fn single(address: &IpAddr) -> String {
    format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 })
}

fn listed(addresses: &[IpAddr]) -> String {
    addresses.iter().map(|ip| format!("\"{}\"", single(ip))).collect::<Vec<_>>().join(", ")
}

fn blocks(addresses: &[IpAddr]) -> String {
    addresses.iter().map(|ip| format!("{{ipBlock: {{cidr: \"{}\"}}}}", single(ip))).collect::<Vec<_>>().join(", ")
}

/// Everything in one text.
pub(crate) fn manifests(addresses: &Addresses) -> String {
    [guarded(), blocked(addresses), bound(addresses), tiered(), tied(addresses)].concat()
}

/// By selectors: two roles at one port (by its name and by its number), another namespace's role at every port and by ICMP.
fn guarded() -> String {
    format!(
        r#"---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: guarded}}
spec:
  podSelector: {{matchLabels: {{app: guarded}}}}
  ingress:
  - from: [{{podSelector: {{matchExpressions: [{{key: role, operator: In, values: [friend, bound]}}]}}}}]
    ports: [{{port: open}}, {{protocol: UDP, port: {OPEN}}}, {{protocol: SCTP, port: {OPEN}}}]
  - from: [{{namespaceSelector: {{matchLabels: {{team: others}}}}, podSelector: {{matchLabels: {{role: tied}}}}}}]
"#
    )
}

/// By addresses: a host outside and most pods at one port, the other node at every port.
fn blocked(addresses: &Addresses) -> String {
    let most: Vec<String> = PODS
        .iter()
        .map(|range| {
            let of_family = |ip: &&IpAddr| ip.is_ipv6() == range.contains(':');
            let except: Vec<String> = addresses.except.iter().filter(of_family).map(single).collect();
            format!("{{ipBlock: {{cidr: \"{range}\", except: [\"{}\"]}}}}", except.join("\", \""))
        })
        .collect();
    let ports: Vec<String> =
        ["TCP", "UDP", "SCTP"].iter().map(|p| format!("{{protocol: {p}, port: {OPEN}, endPort: {OPEN}}}")).collect();
    format!(
        r#"---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: blocked}}
spec:
  podSelector: {{matchLabels: {{app: blocked}}}}
  ingress:
  - from: [{outside}, {most}]
    ports: [{ports}]
  - from: [{there}]
"#,
        outside = blocks(&addresses.outside),
        most = most.join(", "),
        ports = ports.join(", "),
        there = blocks(&addresses.there),
    )
}

/// Of the client: to some pods at one port, to others at all, to a node's address at one port. Who answers it may not begin anything with it
/// but for one.
fn bound(addresses: &Addresses) -> String {
    let ports: Vec<String> =
        ["TCP", "UDP", "SCTP"].iter().map(|p| format!("{{protocol: {p}, port: {OPEN}}}")).collect();
    format!(
        r#"---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: bound}}
spec:
  podSelector: {{matchLabels: {{role: bound}}}}
  policyTypes: [Ingress, Egress]
  ingress:
  - from: [{{podSelector: {{matchLabels: {{app: plain}}}}}}]
  egress:
  - to: [{{podSelector: {{matchExpressions: [{{key: app, operator: In, values: [plain, guarded]}}]}}}}, {here}]
    ports: [{ports}]
  - to: [{{podSelector: {{matchLabels: {{app: blocked}}}}}}]
"#,
        here = blocks(&addresses.here),
        ports = ports.join(", "),
    )
}

fn cluster(name: &str, tier: &str, priority: u32, labels: &str, direction: &str, rules: &str) -> String {
    format!(
        "---\napiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\nmetadata: {{name: {name}}}\nspec:\n  \
         tier: {tier}\n  priority: {priority}\n  \
         subject: {{pods: {{namespaceSelector: {{}}, podSelector: {{matchLabels: {{{labels}}}}}}}}}\n  {direction}:\n{rules}"
    )
}

fn pods(labels: &str) -> String {
    format!("{{pods: {{namespaceSelector: {{}}, podSelector: {{matchLabels: {{{labels}}}}}}}}}")
}

fn at(protocols: &[&str], port: u16) -> String {
    let list = protocols.iter().map(|p| format!("{{{p}: {{destinationPort: {{number: {port}}}}}}}"));
    list.collect::<Vec<_>>().join(", ")
}

const ALL: [&str; 3] = ["tcp", "udp", "sctp"];

/// Of the endpoint, in both tiers.
fn tiered() -> String {
    let admin = format!(
        "  - {{action: Deny, from: [{stranger}], protocols: [{{destinationNamedPort: open}}, {open}]}}\n  \
         - {{action: Accept, from: [{{namespaces: {{matchLabels: {{team: others}}}}}}], protocols: [{closed}]}}\n  \
         - {{action: Pass, from: [{{namespaces: {{}}}}]}}\n",
        stranger = pods("role: stranger"),
        open = at(&["udp", "sctp"], OPEN),
        closed = at(&ALL, CLOSED),
    );
    let baseline = format!(
        "  - {{action: Deny, from: [{bound}]}}\n  - {{action: Deny, from: [{{namespaces: {{}}}}], protocols: [{closed}]}}\n",
        bound = pods("role: bound"),
        closed = at(&ALL, CLOSED),
    );
    cluster("tiered-admin", "Admin", 10, "app: tiered", "ingress", &admin)
        + &cluster("tiered-baseline", "Baseline", 10, "app: tiered", "ingress", &baseline)
}

/// Of the client, in both tiers, with `nodes` and `networks`.
fn tied(addresses: &Addresses) -> String {
    let admin = format!(
        "  - {{action: Deny, to: [{{nodes: {{matchLabels: {{kubernetes.io/hostname: n1}}}}}}], protocols: [{closed}]}}\n  \
         - {{action: Deny, to: [{{networks: [{tiered}]}}], protocols: [{some}]}}\n  \
         - {{action: Accept, to: [{guarded}]}}\n",
        closed = at(&ALL, CLOSED),
        some = at(&["tcp", "udp"], CLOSED),
        tiered = listed(&addresses.tiered),
        guarded = pods("app: guarded"),
    );
    let baseline = format!(
        "  - {{action: Deny, to: [{plain}], protocols: [{open}, {closed}]}}\n",
        plain = pods("app: plain"),
        open = at(&["udp", "sctp"], OPEN),
        closed = at(&["tcp"], CLOSED),
    );
    let answers = format!("  - {{action: Deny, from: [{}, {}]}}\n", pods("app: guarded"), pods("app: blocked"));
    cluster("tied-admin", "Admin", 20, "role: tied", "egress", &admin)
        + &cluster("tied-answers", "Admin", 30, "role: tied", "ingress", &answers)
        + &cluster("tied-baseline", "Baseline", 20, "role: tied", "egress", &baseline)
}
