//! The Service socket: [`NodeConnections`] to whoever connects (`towpath service`). Root only.

use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use tokio_util::task::AbortOnDropHandle;
use towpath_datapath::ServiceFlows;
use towpath_model::{NodeName, Protocol};
use towpath_wire::config::AgentConfig;
use towpath_wire::service::{BackendConnections, NodeConnections};

use crate::json_socket;
use crate::status::SharedSources;

/// Serves the socket until the handle is dropped.
///
/// # Errors
/// The socket cannot be made.
pub(crate) fn serve(config: &AgentConfig, node: &NodeName, sources: SharedSources) -> Result<AbortOnDropHandle<()>> {
    let node = node.to_string();
    json_socket::serve(&config.service_socket(), move || {
        let (node, sources) = (node.clone(), sources.clone());
        async move { collect(node, &sources).await }
    })
}

async fn collect(node: String, sources: &SharedSources) -> NodeConnections {
    let Some(sources) = sources.get() else {
        let incomplete = vec!["the agent has just started, and has not opened its data path yet: ask again".to_owned()];
        return NodeConnections { node, incomplete, ..NodeConnections::default() };
    };
    match sources.datapath.service_flows().await {
        Ok(flows) => answer(node, flows),
        Err(error) => NodeConnections { node, incomplete: vec![error.to_string()], ..NodeConnections::default() },
    }
}

fn answer(node: String, flows: ServiceFlows) -> NodeConnections {
    let at = |(ip, port): (IpAddr, u16)| SocketAddr::new(ip, port);
    let connections = flows.flows.into_iter().map(|(flow, open)| BackendConnections {
        protocol: name(flow.protocol),
        service: at(flow.service),
        backend: at(flow.backend),
        open,
    });
    let without = |why| format!("connections that were translated when their sockets connected are not counted: {why}");
    NodeConnections {
        node,
        connections: connections.collect(),
        incomplete: flows.without_sockets.map(without).into_iter().collect(),
    }
}

fn name(protocol: u8) -> String {
    let known = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter().find(|known| known.number() == protocol);
    known.map_or_else(|| protocol.to_string(), |known| known.to_string())
}
