//! A stand-in that leaves on the nodes of a lab exactly what Flannel leaves: its device, addresses, routes, ARP and forwarding
//! entries, iptables rules, annotations, subnet file, CNI configuration, bridge and leases (flannel `pkg/backend/{vxlan,hostgw}`,
//! `pkg/trafficmngr/iptables`, `pkg/subnet/kube`; the CNI plugin `flannel`, which hands over to `bridge`).

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use towpath_walkthrough::cluster::{Cluster, Families};

/// Flannel's backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backend {
    Vxlan,
    HostGw,
}

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
}

/// The CNI plugin `flannel`: makes a configuration of `bridge` out of the subnet file, as the real one does.
const PLUGIN: &str = r#"#!/bin/sh
conf=$(cat)
field() { printf %s "$conf" | sed -n 's/.*"'$1'": *"\([^"]*\)".*/\1/p'; }
. "$(field subnetFile)"
printf '{"cniVersion":"0.3.1","name":"cbr0","type":"bridge","bridge":"cni0","mtu":%s,"isGateway":true,"isDefaultGateway":true,"hairpinMode":true,"ipMasq":false,"ipam":{"type":"host-local","dataDir":"%s","ranges":[[{"subnet":"%s"}]],"routes":[{"dst":"%s"}]}}' \
  "$FLANNEL_MTU" "$(field dataDir)" "${FLANNEL_SUBNET%.1/24}.0/24" "$FLANNEL_NETWORK" | exec /usr/lib/cni/bridge
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

/// A directory with the plugin, ours beside it, and the configuration.
pub(crate) struct Files {
    dir: PathBuf,
}

impl Files {
    pub(crate) fn new(name: &str, towpath: &Path) -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("towpath-flannel-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir)?;
        let plugin = dir.join("flannel");
        std::fs::write(&plugin, PLUGIN)?;
        std::fs::set_permissions(&plugin, std::fs::Permissions::from_mode(0o755))?;
        std::os::unix::fs::symlink(towpath.with_file_name("towpath-cni"), dir.join("towpath-cni"))?;
        std::fs::write(dir.join("10-flannel.conflist"), CONFLIST)?;
        Ok(Self { dir })
    }

    /// A lab whose nodes are Flannel's.
    pub(crate) fn lab(&self, name: &str, nodes: u32) -> Result<Cluster> {
        let conf = self.dir.join("10-flannel.conflist").display().to_string();
        let bin = self.dir.display().to_string();
        Cluster::up_with(name, nodes, Families::Ipv4, &["--cni-conf", &conf, "--cni-bin-dir", &bin])
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
    for (name, ip) in cluster.nodes()? {
        let object = cluster.get("node", &name)?;
        let range = object.pointer("/spec/podCIDR").and_then(|v| v.as_str()).context("no podCIDR")?.to_owned();
        let network = range.trim_end_matches("/24").to_owned();
        let mut node = FlannelNode { name, ip, range, network, mac: String::new() };
        prepare(cluster, &mut node, backend)?;
        nodes.push(node);
    }
    for node in &nodes {
        learn(cluster, node, &nodes, backend)?;
    }
    Ok(nodes)
}

/// flanneld's start on one node.
pub(crate) fn prepare(cluster: &Cluster, node: &mut FlannelNode, backend: Backend) -> Result<()> {
    let lab = cluster.name().to_owned();
    let FlannelNode { name, ip, range, network, .. } = node.clone();
    let state = state_dir(&lab, &name);
    std::fs::create_dir_all(state.join("cni/networks"))?;
    let first = format!("{}.1/24", network.rsplit_once('.').map_or("", |(head, _)| head));
    let mtu = if backend == Backend::Vxlan { 1450 } else { 1500 };
    std::fs::write(
        state.join("subnet.env"),
        format!("FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET={first}\nFLANNEL_MTU={mtu}\nFLANNEL_IPMASQ=true\n"),
    )?;
    let conf = conf_dir(&lab, &name);
    if conf.join("10-given.conflist").exists() {
        std::fs::rename(conf.join("10-given.conflist"), conf.join("10-flannel.conflist"))?;
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
    if backend == Backend::Vxlan {
        script += &format!(
            "ip link show flannel.1 >/dev/null 2>&1 || ip link add flannel.1 mtu 1450 type vxlan id 1 dev eth0 local {ip} dstport 8472 nolearning\n\
             ip addr replace {network}/32 dev flannel.1\nip link set flannel.1 up\n\
             ip -o link show flannel.1 | sed -n 's/.*link.ether \\([0-9a-f:]*\\).*/\\1/p'\n"
        );
    }
    let said = on_node(cluster, &name, &script)?;
    node.mac = said.lines().last().unwrap_or_default().trim().to_owned();
    let (kind, data) = match backend {
        Backend::Vxlan => ("vxlan", format!(r#"{{"VNI":1,"VtepMAC":"{}"}}"#, node.mac)),
        Backend::HostGw => ("host-gw", "null".to_owned()),
    };
    let annotate = |key: &str, value: &str| format!("flannel.alpha.coreos.com/{key}={value}");
    let said = cluster.try_kubectl(&[
        "annotate",
        "node",
        &name,
        "--overwrite",
        &annotate("backend-type", kind),
        &annotate("backend-data", &data),
        &annotate("public-ip", &ip),
        &annotate("kube-subnet-manager", "true"),
    ])?;
    ensure!(said.status.success(), "annotate {name}: {}", String::from_utf8_lossy(&said.stderr));
    Ok(())
}

/// What flanneld does on `node` for every other: routes, ARP and forwarding entries.
pub(crate) fn learn(cluster: &Cluster, node: &FlannelNode, nodes: &[FlannelNode], backend: Backend) -> Result<()> {
    let mut script = String::new();
    for FlannelNode { ip, range, network, mac, .. } in nodes.iter().filter(|other| other.name != node.name) {
        script += &match backend {
            Backend::Vxlan => format!(
                "ip neigh replace {network} lladdr {mac} dev flannel.1 nud permanent\n\
                 bridge fdb replace {mac} dev flannel.1 dst {ip} self permanent\n\
                 ip route replace {range} via {network} dev flannel.1 onlink\n"
            ),
            Backend::HostGw => format!("ip route replace {range} via {ip} dev eth0\n"),
        };
    }
    on_node(cluster, &node.name, &script).map(drop)
}
