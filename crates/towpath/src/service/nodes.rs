//! Open connections, as the nodes' agents count them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use anyhow::Result;
use kube::Client;
use towpath_lab::layout::LabName;
use towpath_wire::config::AgentConfig;
use towpath_wire::service::NodeConnections;

use crate::{kubernetes, nodes, place};

/// Protocol, Service address and backend.
pub(super) type Flow = (String, SocketAddr, SocketAddr);

/// What all nodes say.
#[derive(Debug, Default)]
pub(super) struct Counted {
    /// Open connections.
    pub(super) open: BTreeMap<Flow, u64>,
    /// Nodes that answered.
    pub(super) nodes: BTreeSet<String>,
    /// What is not in it, for people.
    pub(super) incomplete: Vec<String>,
}

impl Counted {
    /// Takes one node's answer, or why there is none.
    pub(super) fn take(&mut self, node: &str, answer: Result<NodeConnections>) {
        match answer {
            Ok(answer) => {
                self.incomplete.extend(answer.incomplete.iter().map(|why| format!("node {node}: {why}")));
                self.nodes.insert(node.to_owned());
                for one in answer.connections {
                    *self.open.entry((one.protocol, one.service, one.backend)).or_default() += one.open;
                }
            }
            Err(error) => self.incomplete.push(format!("node {node}: its connections are not counted: {error:#}")),
        }
    }
}

/// Every node of a lab.
pub(super) fn of_lab(lab: &LabName) -> Counted {
    let mut counted = Counted::default();
    match place::agents_of_lab(lab) {
        Ok(agents) => agents
            .iter()
            .for_each(|(node, config)| counted.take(node, nodes::ask::<NodeConnections>(&config.service_socket()))),
        Err(error) => counted.incomplete.push(format!("connections are not counted: {error:#}")),
    }
    counted
}

/// Every node of a cluster that has an agent, all at once; the node this runs on by its own socket.
pub(super) async fn of_cluster(client: &Client) -> Counted {
    let mut counted = Counted::default();
    let own = nodes::ask::<NodeConnections>(&AgentConfig::default().service_socket()).ok();
    let own_name = own.as_ref().map(|own| own.node.clone());
    if let Some(own) = own {
        counted.take(&own.node.clone(), Ok(own));
    }
    let agents = match kubernetes::agents(client).await {
        Ok(agents) => agents,
        Err(error) => {
            counted.incomplete.push(format!("connections of other nodes are not counted: {error:#}"));
            return counted;
        }
    };
    if agents.is_empty() && own_name.is_none() {
        counted.incomplete.push(
            "connections are not counted: kube-system has no pods of the DaemonSet towpath, and no agent runs here"
                .to_owned(),
        );
    }
    let others = agents.into_iter().filter(|(node, _)| own_name.as_ref() != Some(node));
    let command = ["/usr/bin/towpath", "service", "connections"];
    let asked = others.map(|(node, pod)| async move { (node, nodes::said_by(client, &pod, &command).await) });
    for (node, answer) in futures::future::join_all(asked).await {
        counted.take(&node, answer);
    }
    counted
}
