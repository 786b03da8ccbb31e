//! What this node must have on its object for the Flannel of other nodes to send packets here.
//!
//! A node that Flannel knew has it already, and it is left as it is: its device is there still, and ours takes a frame for any MAC
//! address. A node that joins while others still run Flannel gets it from us.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;
use towpath_datapath::{Datapath, NodeFacts};
use towpath_model::flannel::{FlannelBackend, Vtep, announcing_host_gw, announcing_vxlan};
use towpath_model::{NodeName, Readable, family_of};
use tracing::{info, warn};

use crate::settings::OwnNode;
use crate::{SharedIndex, read};

/// How often it is looked at.
const EVERY: Duration = Duration::from_secs(2);
/// After a refusal.
const AGAIN: Duration = Duration::from_secs(30);

/// Writes the annotations when others need them; runs for ever.
pub async fn keep(
    client: kube::Client,
    node: NodeName,
    own: OwnNode,
    datapath: Datapath,
    vni: u32,
    index: SharedIndex,
) {
    let nodes: Api<Readable<Node>> = Api::all(client);
    loop {
        tokio::time::sleep(EVERY).await;
        // Asked each time: the tunnel device may be another one by now.
        let Ok(facts) = datapath.facts().await else { continue };
        let Some(annotations) = wanted(&index, &node, &own, &facts, vni) else { continue };
        let patch = json!({"metadata": {"annotations": annotations}});
        match nodes.patch(node.as_str(), &PatchParams::default(), &Patch::Merge(patch)).await {
            Ok(_) => info!(%node, "nodes of this cluster still run Flannel: told them how to reach this one"),
            Err(error) => {
                warn!(%node, %error, "could not write the annotations by which nodes that still run Flannel reach this one; trying again");
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

/// The annotations to write; none: nobody needs them, or they are there.
fn wanted(
    index: &SharedIndex,
    node: &NodeName,
    own: &OwnNode,
    facts: &NodeFacts,
    vni: u32,
) -> Option<BTreeMap<String, String>> {
    let index = read(index);
    let nodes = &index.world().nodes;
    if nodes.get(node)?.flannel.is_some() {
        return None;
    }
    let mut others = nodes.values().filter(|other| other.name != *node && !index.given().contains_key(&other.name));
    let backend = others.find_map(|other| other.flannel.as_ref().map(|flannel| flannel.backend.clone()))?;
    // Of each family that pods have here.
    let reached = |address: &IpAddr| own.pod_cidrs.iter().any(|range| family_of(range.addr()) == family_of(*address));
    let addresses: Vec<IpAddr> = own.addresses.iter().copied().filter(reached).collect();
    match backend {
        FlannelBackend::Vxlan => {
            let vtep = Vtep { vni, mac: facts.tunnel_mac };
            let ends: Vec<(IpAddr, Vtep)> = addresses.into_iter().map(|address| (address, vtep)).collect();
            Some(announcing_vxlan(&ends))
        }
        FlannelBackend::HostGw => Some(announcing_host_gw(&addresses)),
        FlannelBackend::Other(_) => None,
    }
}
