//! A stand-in that leaves on the nodes of a lab exactly what Flannel leaves: its device, addresses, routes, ARP and forwarding
//! entries, iptables rules, annotations, subnet file, CNI configuration, bridge and leases (flannel `pkg/backend/{vxlan,hostgw}`,
//! `pkg/trafficmngr/iptables`, `pkg/subnet/kube`; the CNI plugin `flannel`, which hands over to `bridge`).

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use towpath_walkthrough::cluster::{Cluster, Families};
use towpath_walkthrough::place::Place;

/// Flannel's backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backend {
    Vxlan,
    HostGw,
    /// Flannel's `vxlan`, with Calico's devices and policy.
    Canal,
    /// `vxlan` of both families.
    Dual,
    /// `vxlan` of both families with DirectRouting: routes to all nodes, which are of one network here.
    Direct,
    /// `vxlan` over another card (`--iface`).
    Card,
    /// `host-gw` over another card.
    CardHostGw,
}

impl Backend {
    /// Name of the CNI network, which names the directory of leases.
    pub(crate) fn network(self) -> &'static str {
        if self == Backend::Canal { "k8s-pod-network" } else { "cbr0" }
    }

    /// Name of the CNI configuration.
    pub(crate) fn conflist(self) -> &'static str {
        if self == Backend::Canal { "10-canal.conflist" } else { "10-flannel.conflist" }
    }

    fn has_tunnel(self) -> bool {
        !matches!(self, Backend::HostGw | Backend::CardHostGw)
    }

    /// Addresses of a pod.
    pub(crate) fn families(self) -> Families {
        if matches!(self, Backend::Dual | Backend::Direct) { Families::Dual } else { Families::Ipv4 }
    }

    /// The card that flanneld uses.
    fn card(self) -> &'static str {
        if matches!(self, Backend::Card | Backend::CardHostGw) { OTHER_CARD } else { "eth0" }
    }
}

/// A second card of every node, where flanneld is given one.
pub(crate) const OTHER_CARD: &str = "eth1";

/// A node as Flannel knows it.
#[derive(Clone, Debug)]
pub(crate) struct FlannelNode {
    pub(crate) name: String,
    pub(crate) ip: String,
    /// `10.244.1.0/24`
    pub(crate) range: String,
    /// `10.244.1.0`
    pub(crate) network: String,
    pub(crate) mac: String,
    /// Of both families: what IPv6 has of all this.
    pub(crate) v6: Option<V6>,
}

/// The IPv6 side of a node.
#[derive(Clone, Debug)]
pub(crate) struct V6 {
    pub(crate) ip: String,
    /// `fd00:10:244:1::/64`
    pub(crate) range: String,
    /// `fd00:10:244:1::`
    pub(crate) network: String,
    pub(crate) mac: String,
}

/// The CNI plugin `flannel`: makes a configuration of `bridge` out of the subnet file, as the real one does.
const PLUGIN: &str = r#"#!/bin/sh
conf=$(cat)
field() { printf %s "$conf" | sed -n 's/.*"'$1'": *"\([^"]*\)".*/\1/p'; }
. "$(field subnetFile)"
v6=
[ -z "$FLANNEL_IPV6_SUBNET" ] || v6=',[{"subnet":"'$FLANNEL_IPV6_SUBNET'"}]'
printf '{"cniVersion":"0.3.1","name":"cbr0","type":"bridge","bridge":"cni0","mtu":%s,"isGateway":true,"isDefaultGateway":true,"hairpinMode":true,"ipMasq":false,"ipam":{"type":"host-local","dataDir":"%s","ranges":[[{"subnet":"%s"}]%s],"routes":[{"dst":"%s"}]}}' \
  "$FLANNEL_MTU" "$(field dataDir)" "${FLANNEL_SUBNET%.1/24}.0/24" "$v6" "$FLANNEL_NETWORK" | exec /usr/lib/cni/bridge
"#;

const CONFLIST: &str = r#"{
  "name": "cbr0", "cniVersion": "0.3.1",
  "plugins": [
    {"type": "flannel", "subnetFile": "$STATE/subnet.env", "dataDir": "$STATE/cni/networks",
     "delegate": {"hairpinMode": true, "isDefaultGateway": true}},
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
"#;

/// The CNI plugin `calico`, as far as it is seen from outside: a device `cali…` a pod with a host route and proxy ARP, no bridge. `ptp`
/// does the work.
const CALICO: &str = r#"#!/bin/sh
conf=$(cat)
field() { printf %s "$conf" | sed -n 's/.*"'$1'": *"\([^"]*\)".*/\1/p'; }
. "$(field subnetFile)"
out=$(printf '{"cniVersion":"0.3.1","name":"k8s-pod-network","type":"ptp","mtu":%s,"ipMasq":false,"ipam":{"type":"host-local","dataDir":"%s","ranges":[[{"subnet":"%s"}]],"routes":[{"dst":"0.0.0.0/0"}]}}' \
  "$FLANNEL_MTU" "$(field dataDir)" "${FLANNEL_SUBNET%.1/24}.0/24" | /usr/lib/cni/ptp) || { printf %s "$out"; exit 1; }
if [ "$CNI_COMMAND" = ADD ]; then
  device=$(printf %s "$out" | tr ',' '\n' | sed -n 's/.*"name": *"\(veth[0-9a-f]*\)".*/\1/p' | head -1)
  address=$(printf %s "$out" | tr ',' '\n' | sed -n 's/.*"address": *"\(10[0-9.]*\).*/\1/p' | head -1)
  name=cali$(printf %s "$CNI_CONTAINERID" | cut -c1-11)
  ip link set "$device" down && ip link set "$device" name "$name" && ip link set "$name" up
  ip route replace "$address/32" dev "$name" scope link
  echo 1 > "/proc/sys/net/ipv4/conf/$name/proxy_arp"
  out=$(printf %s "$out" | sed "s/$device/$name/g")
fi
printf %s "$out"
"#;

const CANAL_CONFLIST: &str = r#"{
  "name": "k8s-pod-network", "cniVersion": "0.3.1",
  "plugins": [
    {"type": "calico", "log_level": "info", "datastore_type": "kubernetes", "policy": {"type": "k8s"},
     "ipam": {"type": "host-local", "subnet": "usePodCidr"},
     "subnetFile": "$STATE/subnet.env", "dataDir": "$STATE/cni/networks"},
    {"type": "portmap", "snat": true, "capabilities": {"portMappings": true}}
  ]
}
"#;

/// Rules like Calico's: a pod is reached on port 80 and by ICMP, and gets the answers to what it asked, by connection tracking.
const CALICO_RULES: &str = "*filter\n:cali-FORWARD - [0:0]\n:cali-from-wl-dispatch - [0:0]\n:cali-to-wl-dispatch - [0:0]\n\
    -I FORWARD -m comment --comment \"cali:wUHhoiAYhphO9Mso\" -j cali-FORWARD\n\
    -A cali-FORWARD -i cali+ -j cali-from-wl-dispatch\n-A cali-FORWARD -o cali+ -j cali-to-wl-dispatch\n\
    -A cali-from-wl-dispatch -m conntrack --ctstate INVALID -j DROP\n\
    -A cali-to-wl-dispatch -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
    -A cali-to-wl-dispatch -m conntrack --ctstate INVALID -j DROP\n\
    -A cali-to-wl-dispatch -p tcp --dport 80 -j ACCEPT\n-A cali-to-wl-dispatch -p icmp -j ACCEPT\n-A cali-to-wl-dispatch -j DROP\nCOMMIT\n";

/// A directory with the plugin, ours beside it, and the configuration.
pub(crate) struct Files {
    dir: PathBuf,
}

impl Files {
    pub(crate) fn new(name: &str, towpath: &Path, backend: Backend) -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("towpath-flannel-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir)?;
        let canal = backend == Backend::Canal;
        let plugin = dir.join(if canal { "calico" } else { "flannel" });
        std::fs::write(&plugin, if canal { CALICO } else { PLUGIN })?;
        std::fs::set_permissions(&plugin, std::fs::Permissions::from_mode(0o755))?;
        std::os::unix::fs::symlink(towpath.with_file_name("towpath-cni"), dir.join("towpath-cni"))?;
        std::fs::write(dir.join("given.conflist"), if canal { CANAL_CONFLIST } else { CONFLIST })?;
        Ok(Self { dir })
    }

    /// A lab whose nodes are Flannel's.
    pub(crate) fn lab(&self, name: &str, nodes: u32, families: Families) -> Result<Cluster> {
        let conf = self.dir.join("given.conflist").display().to_string();
        let bin = self.dir.display().to_string();
        Cluster::up_with(name, nodes, families, &["--cni-conf", &conf, "--cni-bin-dir", &bin])
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

pub(crate) fn run_dir(lab: &str, node: &str) -> PathBuf {
    Path::new("/run/towpath/lab").join(lab).join("nodes").join(node)
}

pub(crate) fn state_dir(lab: &str, node: &str) -> PathBuf {
    Path::new("/var/lib/towpath/lab").join(lab).join("nodes").join(node)
}

pub(crate) fn conf_dir(lab: &str, node: &str) -> PathBuf {
    run_dir(lab, node).join("cni/net.d")
}

/// A shell script on a node, which must work.
pub(crate) fn on_node(cluster: &Cluster, node: &str, script: &str) -> Result<String> {
    let said = cluster.node(node, &format!("set -e\n{script}"))?;
    ensure!(said.ok, "on {node}: {script}: {}", said.all());
    Ok(said.out)
}

/// The nodes, with what Flannel does before it knows of others: device, address, subnet file, rules, annotations.
pub(crate) fn start(cluster: &Cluster, backend: Backend) -> Result<Vec<FlannelNode>> {
    let mut nodes = Vec::new();
    for (number, (name, mut ip)) in cluster.nodes()?.into_iter().enumerate() {
        if backend.card() == OTHER_CARD {
            ip = format!("10.77.0.{}", 11 + number);
            second_card(cluster, &name, &ip)?;
        }
        let object = cluster.get("node", &name)?;
        let range = object.pointer("/spec/podCIDR").and_then(|v| v.as_str()).context("no podCIDR")?.to_owned();
        let network = range.trim_end_matches("/24").to_owned();
        let v6 = if backend.families() == Families::Dual { Some(v6_of(&object)?) } else { None };
        let mut node = FlannelNode { name, ip, range, network, mac: String::new(), v6 };
        prepare(cluster, &mut node, backend)?;
        nodes.push(node);
    }
    for node in &nodes {
        learn(cluster, node, &nodes, backend)?;
    }
    Ok(nodes)
}

/// A card of a node in a network besides that of the nodes' own addresses.
fn second_card(cluster: &Cluster, node: &str, address: &str) -> Result<()> {
    let (lab, other) = (cluster.name(), OTHER_CARD);
    let script = format!(
        "set -e\nip link show cards0 >/dev/null 2>&1 || {{ ip link add cards0 type bridge; ip link set cards0 up; }}\n\
         ip link add card-{node} type veth peer name {other} netns tp-{lab}-{node}\n\
         ip link set card-{node} master cards0 up"
    );
    in_underlay(cluster, &script)?;
    on_node(cluster, node, &format!("ip addr add {address}/24 dev {other}\nip link set {other} up")).map(drop)
}

/// A shell script in the network that the nodes are on.
pub(crate) fn in_underlay(cluster: &Cluster, script: &str) -> Result<()> {
    let path = Path::new("/run/netns").join(format!("tp-{}-underlay", cluster.name()));
    let out = Place::of_netns("underlay", &path)?.enter(|| Ok(Command::new("sh").args(["-c", script]).output()?))?;
    ensure!(out.status.success(), "in the underlay: {script}: {}", String::from_utf8_lossy(&out.stderr));
    Ok(())
}

fn v6_of(node: &serde_json::Value) -> Result<V6> {
    let range = node.pointer("/spec/podCIDRs/1").and_then(|v| v.as_str()).context("no second podCIDR")?.to_owned();
    let addresses = node.pointer("/status/addresses").and_then(|v| v.as_array()).context("no addresses")?;
    let ips = addresses.iter().filter_map(|a| a.pointer("/address")?.as_str());
    let ip = ips.into_iter().find(|ip| ip.contains(':')).context("no IPv6 address")?.to_owned();
    let network = range.trim_end_matches("/64").to_owned();
    Ok(V6 { ip, range, network, mac: String::new() })
}

/// The IPv6 side of flanneld's start: the device's MAC address and its annotations.
fn prepare_v6(cluster: &Cluster, node: &str, v6: &mut V6) -> Result<Vec<String>> {
    let V6 { ip, network, .. } = v6.clone();
    let script = format!(
        "echo 1 > /proc/sys/net/ipv6/conf/all/forwarding\n\
         ip link add flannel-v6.1 mtu 1430 type vxlan id 1 dev eth0 local {ip} dstport 8472 nolearning\n\
         ip addr replace {network}/128 dev flannel-v6.1 nodad\nip link set flannel-v6.1 up\n\
         ip -o link show flannel-v6.1 | sed -n 's/.*link.ether \\([0-9a-f:]*\\).*/\\1/p'\n"
    );
    let said = on_node(cluster, node, &script)?;
    v6.mac = said.lines().last().unwrap_or_default().trim().to_owned();
    Ok(vec![
        format!(r#"flannel.alpha.coreos.com/backend-v6-data={{"VNI":1,"VtepMAC":"{}"}}"#, v6.mac),
        format!("flannel.alpha.coreos.com/public-ipv6={ip}"),
    ])
}

/// flanneld's start on one node.
pub(crate) fn prepare(cluster: &Cluster, node: &mut FlannelNode, backend: Backend) -> Result<()> {
    let (lab, card) = (cluster.name().to_owned(), backend.card());
    let FlannelNode { name, ip, range, network, .. } = node.clone();
    let state = state_dir(&lab, &name);
    std::fs::create_dir_all(state.join("cni/networks"))?;
    let first = format!("{}.1/24", network.rsplit_once('.').map_or("", |(head, _)| head));
    let mtu = if backend.has_tunnel() { 1450 } else { 1500 };
    let mtu = if node.v6.is_some() { 1430 } else { mtu };
    let v6_subnet = node.v6.as_ref().map(|v6| format!("FLANNEL_IPV6_SUBNET={}\n", v6.range)).unwrap_or_default();
    std::fs::write(
        state.join("subnet.env"),
        format!(
            "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET={first}\nFLANNEL_MTU={mtu}\nFLANNEL_IPMASQ=true\n{v6_subnet}"
        ),
    )?;
    let conf = conf_dir(&lab, &name);
    if conf.join("10-given.conflist").exists() {
        std::fs::rename(conf.join("10-given.conflist"), conf.join(backend.conflist()))?;
    }
    let rules = format!(
        "*nat\n:FLANNEL-POSTRTG - [0:0]\n-A POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG\n\
         -A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment \"flanneld masq\" -j RETURN\n\
         -A FLANNEL-POSTRTG -s {range} -d 10.244.0.0/16 -m comment --comment \"flanneld masq\" -j RETURN\n\
         -A FLANNEL-POSTRTG -s 10.244.0.0/16 -d {range} -m comment --comment \"flanneld masq\" -j RETURN\n\
         -A FLANNEL-POSTRTG ! -s 10.244.0.0/16 -d {range} -m comment --comment \"flanneld masq\" -j RETURN\n\
         -A FLANNEL-POSTRTG -s 10.244.0.0/16 ! -d 224.0.0.0/4 -m comment --comment \"flanneld masq\" -j MASQUERADE --random-fully\n\
         -A FLANNEL-POSTRTG ! -s 10.244.0.0/16 -d 10.244.0.0/16 -m comment --comment \"flanneld masq\" -j MASQUERADE --random-fully\n\
         COMMIT\n*filter\n:FLANNEL-FWD - [0:0]\n-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD\n\
         -A FLANNEL-FWD -s 10.244.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT\n\
         -A FLANNEL-FWD -d 10.244.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT\nCOMMIT\n"
    );
    let mut script = format!(
        "echo 1 > /proc/sys/net/ipv4/ip_forward\n\
         iptables -t nat -nL FLANNEL-POSTRTG >/dev/null 2>&1 || iptables-restore --noflush <<'EOF'\n{rules}EOF\n"
    );
    if backend == Backend::Canal {
        script += &format!(
            "iptables -nL cali-FORWARD >/dev/null 2>&1 || iptables-restore --noflush <<'EOF'\n{CALICO_RULES}EOF\n"
        );
    }
    if backend.has_tunnel() {
        script += &format!(
            "ip link show flannel.1 >/dev/null 2>&1 || ip link add flannel.1 mtu 1450 type vxlan id 1 dev {card} local {ip} dstport 8472 nolearning\n\
             ip addr replace {network}/32 dev flannel.1\nip link set flannel.1 up\n\
             ip -o link show flannel.1 | sed -n 's/.*link.ether \\([0-9a-f:]*\\).*/\\1/p'\n"
        );
    }
    let said = on_node(cluster, &name, &script)?;
    node.mac = said.lines().last().unwrap_or_default().trim().to_owned();
    let (kind, data) = match backend {
        Backend::Vxlan | Backend::Canal | Backend::Dual | Backend::Direct | Backend::Card => {
            ("vxlan", format!(r#"{{"VNI":1,"VtepMAC":"{}"}}"#, node.mac))
        }
        Backend::HostGw | Backend::CardHostGw => ("host-gw", "null".to_owned()),
    };
    let annotate = |key: &str, value: &str| format!("flannel.alpha.coreos.com/{key}={value}");
    let mut annotations = vec![
        annotate("backend-type", kind),
        annotate("backend-data", &data),
        annotate("public-ip", &ip),
        annotate("kube-subnet-manager", "true"),
    ];
    if let Some(v6) = &mut node.v6 {
        annotations.extend(prepare_v6(cluster, &name, v6)?);
    }
    let mut arguments = vec!["annotate", "node", &name, "--overwrite"];
    arguments.extend(annotations.iter().map(String::as_str));
    let said = cluster.try_kubectl(&arguments)?;
    ensure!(said.status.success(), "annotate {name}: {}", String::from_utf8_lossy(&said.stderr));
    Ok(())
}

/// What flanneld does on `node` for every other: routes, ARP and forwarding entries.
pub(crate) fn learn(cluster: &Cluster, node: &FlannelNode, nodes: &[FlannelNode], backend: Backend) -> Result<()> {
    let mut script = String::new();
    for FlannelNode { ip, range, network, mac, .. } in nodes.iter().filter(|other| other.name != node.name) {
        script += &match backend {
            Backend::Vxlan | Backend::Canal | Backend::Dual | Backend::Card => format!(
                "ip neigh replace {network} lladdr {mac} dev flannel.1 nud permanent\n\
                 bridge fdb replace {mac} dev flannel.1 dst {ip} self permanent\n\
                 ip route replace {range} via {network} dev flannel.1 onlink\n"
            ),
            Backend::HostGw | Backend::CardHostGw | Backend::Direct => {
                format!("ip route replace {range} via {ip} dev {}\n", backend.card())
            }
        };
    }
    for V6 { ip, range, network, mac } in
        nodes.iter().filter(|other| other.name != node.name).filter_map(|n| n.v6.clone())
    {
        if backend == Backend::Direct {
            script += &format!("ip -6 route replace {range} via {ip} dev eth0\n");
            continue;
        }
        script += &format!(
            "ip -6 neigh replace {network} lladdr {mac} dev flannel-v6.1 nud permanent\n\
             bridge fdb replace {mac} dev flannel-v6.1 dst {ip} self permanent\n\
             ip -6 route replace {range} via {network} dev flannel-v6.1 onlink\n"
        );
    }
    on_node(cluster, &node.name, &script).map(drop)
}
