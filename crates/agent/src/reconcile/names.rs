//! What `towpath carry` answers from: names of Services and pods, and what is configured of other DNS servers.

use std::net::IpAddr;

use towpath_plan::ChangedPods;
use towpath_plan::dns::rules;
use tracing::warn;

use super::Reconciler;
use crate::index::{Changes, Kind};
use crate::read;

impl Reconciler {
    pub(super) fn feed_names(&mut self, due: &Changes, pods: ChangedPods<'_>) {
        let index = self.index.clone();
        let places = due.any(&[Kind::Namespace, Kind::Pod]).then_some(pods);
        let messages = tokio::task::block_in_place(|| self.names.plan(read(&index).world(), due.services(), places));
        self.feed.send(messages);
    }

    /// What is configured of other DNS servers, as far as it can be done here.
    pub(super) fn feed_dns_config(&mut self) {
        let (sources, own) = {
            let index = read(&self.index);
            let Some(sources) = index.dns_config() else { return };
            let service = index.world().services.get(&towpath_plan::modes::dns_service());
            let mut own: Vec<IpAddr> = service.map(|service| service.cluster_ips.clone()).unwrap_or_default();
            own.extend(&self.dns);
            (sources, own)
        };
        let compiled = rules::compile(&sources, &rules::Cluster { domain: self.names.domain(), own: &own });
        let told = self.with_report(|report| std::mem::replace(&mut report.dns_left_out, compiled.left_out.clone()));
        for left_out in compiled.left_out.iter().filter(|line| !told.contains(line)) {
            warn!(left_out, "of CoreDNS's or kube-dns's configuration; Towpath answers without it");
        }
        let messages = self.names.configure(compiled.rules);
        self.feed.send(messages);
    }
}
