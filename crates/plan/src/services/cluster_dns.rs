//! Cluster DNS: port 53 at its addresses leads to this node's own server, whatever the API says of that Service.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use towpath_model::desired::{BackendAddress, Frontend, FrontendTarget};
use towpath_model::{NamespacedName, Protocol, family_of};

use super::frontends::target_of_one;
use super::{Claim, Planner, PortKey, Rank, Scope};

impl Planner {
    /// From now on this node's own server answers cluster DNS at these addresses and no others; whether the table is another.
    /// At addresses that are given up, port 53 leads where the Service that has them says, from the same moment on.
    pub fn answer_dns_at(&mut self, addresses: &[IpAddr], now: Duration) -> bool {
        if self.config.cluster_dns == addresses {
            return false;
        }
        self.config.cluster_dns = addresses.to_vec();
        let ours = |(rank, _): &Claim| *rank == Rank::ClusterDns;
        let given_up: Vec<(Frontend, Claim, Arc<FrontendTarget>)> = self
            .claims
            .iter()
            .filter(|(frontend, _)| frontend.address.is_none_or(|address| !addresses.contains(&address)))
            .flat_map(|(frontend, claims)| claims.iter().map(move |(claim, target)| (*frontend, claim, target)))
            .filter(|(_, claim, _)| ours(claim))
            .map(|(frontend, claim, claimed)| (frontend, claim.clone(), claimed.target.clone()))
            .collect();
        for (frontend, claim, target) in given_up {
            if let Some(claims) = self.claims.get_mut(&frontend) {
                claims.remove(&claim);
            }
            self.settle(frontend);
            for id in &target.backends {
                self.release(*id, now);
            }
        }
        self.claim_cluster_dns();
        true
    }

    /// Port 53 at the cluster DNS addresses leads to this node's own server, whatever the API says of that Service.
    pub(super) fn claim_cluster_dns(&mut self) {
        let pairs: Vec<(IpAddr, IpAddr)> = self
            .config
            .cluster_dns
            .iter()
            .filter_map(|front| {
                let family = family_of(*front);
                self.config.dns_addresses.iter().find(|a| family_of(**a) == family).map(|back| (*front, *back))
            })
            .collect();
        for (front, back) in pairs {
            for (protocol, port_name) in [(Protocol::Udp, "dns"), (Protocol::Tcp, "dns-tcp")] {
                let frontend = Frontend { address: Some(front), family: family_of(front), port: 53, protocol };
                let key = Arc::new(PortKey {
                    service: NamespacedName::new("kube-system", "kube-dns"),
                    port: port_name.to_owned(),
                    protocol,
                    scope: Scope::Internal,
                });
                if self.claims.get(&frontend).is_some_and(|c| c.contains_key(&(Rank::ClusterDns, key.clone()))) {
                    continue;
                }
                let backend = self.hold(BackendAddress { address: back, port: 53, protocol });
                let id = self.port_id(&key, self.adopted_id(&[frontend]));
                let target = target_of_one(id, backend, &key);
                self.claims.entry(frontend).or_default().insert((Rank::ClusterDns, key), target.into());
                self.settle(frontend);
            }
        }
    }
}
