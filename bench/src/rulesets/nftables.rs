//! The shape that kube-proxy has in nftables mode since 1.33: one look-up in a verdict map leads to the Service's chain, which picks
//! an endpoint's chain, which translates. It is loaded as kube-proxy loads it: one transaction of single additions.

use std::fmt::Write as _;

use super::{PODS, PORT, Port, hash};

/// Above so many Services those that nobody measures lead to their first endpoint without a choice among them. A choice is an anonymous
/// map, and the kernel (6.18) looks through all sets of a table to name a new one: 50,000 of them take half an hour. The packets that
/// are measured meet the same either way.
const CHOICES: usize = 10_000;

const TABLE: &str = "ip kube-proxy";

/// What is there without any Service.
const BASE: &str = "\
add table ip kube-proxy
add set ip kube-proxy cluster-ips { type ipv4_addr ; }
add set ip kube-proxy nodeport-ips { type ipv4_addr ; }
add map ip kube-proxy firewall-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy no-endpoint-nodeports { type inet_proto . inet_service : verdict ; }
add map ip kube-proxy service-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy service-nodeports { type inet_proto . inet_service : verdict ; }
add chain ip kube-proxy filter-prerouting-pre-dnat { type filter hook prerouting priority -110 ; }
add chain ip kube-proxy filter-output-pre-dnat { type filter hook output priority -110 ; }
add chain ip kube-proxy filter-input { type filter hook input priority 0 ; }
add chain ip kube-proxy filter-forward { type filter hook forward priority 0 ; }
add chain ip kube-proxy filter-output { type filter hook output priority 0 ; }
add chain ip kube-proxy nat-prerouting { type nat hook prerouting priority -100 ; }
add chain ip kube-proxy nat-output { type nat hook output priority -100 ; }
add chain ip kube-proxy nat-postrouting { type nat hook postrouting priority 100 ; }
add chain ip kube-proxy cluster-ips-check
add chain ip kube-proxy firewall-check
add chain ip kube-proxy nodeport-endpoints-check
add chain ip kube-proxy service-endpoints-check
add chain ip kube-proxy mark-for-masquerade
add chain ip kube-proxy masquerading
add chain ip kube-proxy services
add rule ip kube-proxy cluster-ips-check ip daddr @cluster-ips reject
add rule ip kube-proxy cluster-ips-check ip daddr { 10.96.0.0/12 } drop
add rule ip kube-proxy firewall-check ip daddr . meta l4proto . th dport vmap @firewall-ips
add rule ip kube-proxy nodeport-endpoints-check ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports
add rule ip kube-proxy service-endpoints-check ip daddr . meta l4proto . th dport vmap @no-endpoint-services
add rule ip kube-proxy filter-prerouting-pre-dnat ct state new jump firewall-check
add rule ip kube-proxy filter-output-pre-dnat ct state new jump firewall-check
add rule ip kube-proxy filter-input ct state new jump nodeport-endpoints-check
add rule ip kube-proxy filter-input ct state new jump service-endpoints-check
add rule ip kube-proxy filter-forward ct state new jump service-endpoints-check
add rule ip kube-proxy filter-forward ct state new jump cluster-ips-check
add rule ip kube-proxy filter-output ct state new jump service-endpoints-check
add rule ip kube-proxy filter-output ct state new jump cluster-ips-check
add rule ip kube-proxy mark-for-masquerade mark set mark or 0x4000
add rule ip kube-proxy masquerading mark and 0x4000 == 0 return
add rule ip kube-proxy masquerading mark set mark xor 0x4000
add rule ip kube-proxy masquerading masquerade fully-random
add rule ip kube-proxy nat-prerouting jump services
add rule ip kube-proxy nat-output jump services
add rule ip kube-proxy nat-postrouting jump masquerading
add rule ip kube-proxy services ip daddr . meta l4proto . th dport vmap @service-ips
add rule ip kube-proxy services ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
";

/// The ruleset.
pub(super) fn text(ports: &[Port]) -> String {
    let mut text = String::from(BASE);
    for port in ports {
        // Writing to a string cannot fail.
        let _ = service(&mut text, port, is_whole(ports.len()) || port.endpoints.len() == 1);
    }
    text
}

/// Whether all of so many Services have the rules that kube-proxy gives them.
pub(super) fn is_whole(count: usize) -> bool {
    count <= CHOICES
}

fn service(text: &mut String, port: &Port, chooses: bool) -> std::fmt::Result {
    let Port { name, address, endpoints } = port;
    let chain = format!("service-{}-bench/{name}/tcp/p", hash(name, 8));
    let of =
        |endpoint| format!("endpoint-{}-bench/{name}/tcp/p__{endpoint}/{PORT}", hash(&format!("{name}{endpoint}"), 8));
    writeln!(text, "add chain {TABLE} {chain}")?;
    for endpoint in endpoints {
        let chain = of(endpoint);
        writeln!(text, "add chain {TABLE} {chain}")?;
        writeln!(text, "add rule {TABLE} {chain} ip saddr {endpoint} jump mark-for-masquerade")?;
        writeln!(text, "add rule {TABLE} {chain} meta l4proto tcp dnat to {endpoint}:{PORT}")?;
    }
    writeln!(
        text,
        "add rule {TABLE} {chain} ip daddr {address} tcp dport {PORT} ip saddr != {PODS} jump mark-for-masquerade"
    )?;
    if let (false, Some(first)) = (chooses, endpoints.first()) {
        writeln!(text, "add rule {TABLE} {chain} goto {}", of(first))?;
        return elements(text, port, &chain);
    }
    let choices: Vec<String> =
        endpoints.iter().enumerate().map(|(number, endpoint)| format!("{number} : goto {}", of(endpoint))).collect();
    writeln!(
        text,
        "add rule {TABLE} {chain} numgen random mod {} vmap {{ {} }}",
        endpoints.len(),
        choices.join(" , ")
    )?;
    elements(text, port, &chain)
}

fn elements(text: &mut String, Port { address, .. }: &Port, chain: &str) -> std::fmt::Result {
    writeln!(text, "add element {TABLE} cluster-ips {{ {address} }}")?;
    writeln!(text, "add element {TABLE} service-ips {{ {address} . tcp . {PORT} : goto {chain} }}")
}
