//! Health check NodePorts: what this node answers load balancers that ask whether a Service has an endpoint here.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use towpath_model::NodePortAddresses;
use towpath_model::desired::Clients;
use towpath_plan::services::health;
use tracing::warn;

use super::Reconciler;
use crate::proxy_health::At;
use crate::read;

impl Reconciler {
    /// Answers as Services and this node's addresses are now.
    pub(super) async fn answer_health_checks(&mut self) {
        // Whoever else serves the outside answers its load balancers, too.
        let checks = match self.services.clients() {
            Clients::All => {
                let (names, index) = (self.services.health_checked(), self.index.clone());
                tokio::task::block_in_place(|| health::plan(read(&index).world(), &self.node, names))
            }
            Clients::Pods => BTreeMap::new(),
        };
        let ports: BTreeSet<u16> = checks.keys().copied().collect();
        // No pod keeps a port on which a Service's health is asked for.
        self.host_ports_due |= ports != self.health_checked;
        self.health_checked = ports;
        if let Some(at) = self.node_port_addresses().await {
            self.health_ports.apply(&checks, &at);
        }
    }

    /// Where NodePorts answer now; none: it cannot be found out.
    async fn node_port_addresses(&self) -> Option<At> {
        let chosen = &self.parsed.ranges.node_port_addresses;
        if *chosen == NodePortAddresses::All {
            return Some(At::Everywhere);
        }
        let more = match self.datapath.facts().await {
            Ok(facts) => facts.more_addresses,
            Err(error) => {
                warn!(%error, "health check node ports stay where they are");
                return None;
            }
        };
        let loopback: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        let named = self.own.addresses.iter().map(|address| (*address, true));
        let all = named.chain(more.into_iter().chain(loopback).map(|address| (address, false)));
        let answering = all.filter(|(address, primary)| chosen.has(*address, *primary));
        Some(At::These(answering.map(|(address, _)| address).collect()))
    }
}
