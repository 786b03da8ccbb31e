//! A stand-in for kube-proxy: its pods, which agents go by, and the rules that it leaves on a node in its mode `nftables`.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::cluster::Cluster;

const KUBE_PROXY: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: kube-proxy-NODE, namespace: kube-system, labels: {k8s-app: kube-proxy}}
spec:
  nodeName: NODE
  hostNetwork: true
  terminationGracePeriodSeconds: 0
  containers: [{name: stand-in, image: busybox, command: [sleep, "86400"]}]
"#;

/// The lab's Service as kube-proxy's rules have it on every node.
#[derive(Debug)]
pub struct KubeProxy<'a> {
    cluster: &'a Cluster,
    nodes: Vec<String>,
    ruleset: String,
}

impl<'a> KubeProxy<'a> {
    /// Of one Service at `service` and at `node_port` of the nodes (name, address), with TCP port 80 of these pods behind it.
    pub fn new(
        cluster: &'a Cluster,
        service: SocketAddr,
        node_port: u16,
        nodes: &[(String, String)],
        endpoints: &[String],
    ) -> Self {
        let node_ips: Vec<&str> = nodes.iter().map(|(_, ip)| ip.as_str()).collect();
        let mut text = format!(
            r#"table ip kube-proxy {{
  counter served {{ }}
  map service-ips {{ type ipv4_addr . inet_proto . inet_service : verdict; elements = {{ {vip} . tcp . 80 : goto service-web }} }}
  map service-nodeports {{ type inet_proto . inet_service : verdict; elements = {{ tcp . {node_port} : goto external-web }} }}
  set nodeport-ips {{ type ipv4_addr; elements = {{ {ips} }} }}
  chain nat-prerouting {{ type nat hook prerouting priority dstnat; policy accept; jump services; }}
  chain nat-output {{ type nat hook output priority -100; policy accept; jump services; }}
  chain nat-postrouting {{ type nat hook postrouting priority srcnat; policy accept; jump masquerading; }}
  chain services {{
    ip daddr . meta l4proto . th dport vmap @service-ips
    ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
  }}
  chain masquerading {{
    meta mark & 0x4000 == 0 return
    meta mark set meta mark ^ 0x4000
    masquerade fully-random
  }}
  chain mark-for-masquerade {{ meta mark set meta mark | 0x4000; }}
  chain external-web {{ jump mark-for-masquerade; goto service-web; }}
"#,
            vip = service.ip(),
            ips = node_ips.join(", "),
        );
        for (index, endpoint) in endpoints.iter().enumerate() {
            text.push_str(&format!(
                "  chain endpoint-{index} {{ ip saddr {endpoint} jump mark-for-masquerade; meta l4proto tcp dnat to {endpoint}:80; }}\n"
            ));
        }
        let choices: Vec<String> =
            (0..endpoints.len()).map(|index| format!("{index} : goto endpoint-{index}")).collect();
        text.push_str(&format!(
            "  chain service-web {{ counter name served; ip daddr {} ip saddr != 10.244.0.0/16 jump mark-for-masquerade; \
             numgen random mod {} vmap {{ {} }}; }}\n}}\n",
            service.ip(),
            endpoints.len(),
            choices.join(", ")
        ));
        Self { cluster, nodes: nodes.iter().map(|(name, _)| name.clone()).collect(), ruleset: declared(&text) }
    }

    /// Its rules on every node, and then its pods.
    ///
    /// # Errors
    /// The lab does not do it; what it said is in the message.
    pub fn arrives(&self) -> Result<()> {
        let file = std::env::temp_dir().join(format!("towpath-{}-kube-proxy.nft", self.cluster.name()));
        std::fs::write(&file, &self.ruleset)?;
        for node in &self.nodes {
            let said = self.cluster.node(node, &format!("nft -f {}", file.display()))?;
            ensure!(said.ok, "{}\n{}", said.all(), self.ruleset);
        }
        std::fs::remove_file(&file)?;
        self.nodes.iter().try_for_each(|node| self.pod_comes(node))
    }

    /// Its pod on a node.
    ///
    /// # Errors
    /// The lab does not do it; what it said is in the message.
    pub fn pod_comes(&self, node: &str) -> Result<()> {
        self.cluster.apply_text(&KUBE_PROXY.replace("NODE", node))
    }

    /// The pod's end; the rules stay.
    ///
    /// # Errors
    /// The lab does not do it; what it said is in the message.
    pub fn pod_goes(&self, node: &str) -> Result<()> {
        let name = format!("kube-proxy-{node}");
        let deleted = self.cluster.try_kubectl(&["delete", "pod", "-n", "kube-system", &name])?;
        ensure!(deleted.status.success(), "{}", String::from_utf8_lossy(&deleted.stderr));
        Ok(())
    }

    /// The rules' end on every node.
    ///
    /// # Errors
    /// The lab does not do it; what it said is in the message.
    pub fn rules_go(&self) -> Result<()> {
        for node in &self.nodes {
            let said = self.cluster.node(node, "nft delete table ip kube-proxy")?;
            ensure!(said.ok, "{}", said.all());
        }
        Ok(())
    }

    /// Connections that its rules have led to a pod so far, on every node.
    ///
    /// # Errors
    /// The lab does not do it; what it said is in the message.
    pub fn served(&self) -> Result<Vec<u64>> {
        let of = |node: &String| -> Result<u64> {
            let said = self.cluster.node(node, "nft -j list counter ip kube-proxy served")?;
            let value: Value = serde_json::from_str(&said.out).with_context(|| said.all())?;
            let counters = value.pointer("/nftables").and_then(Value::as_array).cloned().unwrap_or_default();
            let packets = counters.iter().find_map(|entry| entry.pointer("/counter/packets").and_then(Value::as_u64));
            packets.with_context(|| said.all())
        };
        self.nodes.iter().map(of).collect()
    }
}

/// With every chain declared first: nft reads from above.
fn declared(text: &str) -> String {
    let names = text.lines().filter_map(|line| line.trim().strip_prefix("chain ")?.split(' ').next());
    let ordinary = names.filter(|name| !name.starts_with("nat-"));
    let chains: String = ordinary.map(|name| format!("add chain ip kube-proxy {name}\n")).collect();
    format!("add table ip kube-proxy\n{chains}{text}")
}
