//! Which node announces a load balancer's address: who holds its Lease (`kube-system/towpath-lb-ADDRESS`).

use std::net::IpAddr;
use std::time::SystemTime;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::jiff::Timestamp;
use kube::api::Api;
use serde::Serialize;
use towpath_agent::announce::NAMESPACE;
use towpath_agent::announce::lease::lease_name;
use towpath_model::Service;
use towpath_model::load_balancer::is_our_class;

/// A Lease holds for a second; one that has not been renewed for so long is worth a word, whatever two clocks say.
const STALE_SECONDS: i64 = 10;

/// Who announces an address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Announcer {
    /// The address.
    pub(super) address: IpAddr,
    /// The node; none: nobody.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) node: Option<String>,
    /// What is odd about it, for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) note: Option<String>,
}

impl Announcer {
    /// What a Lease says; `now` in Unix time, seconds.
    fn of(address: IpAddr, lease: Option<&Lease>, now: i64) -> Self {
        let spec = lease.and_then(|lease| lease.spec.as_ref());
        let node = spec.and_then(|spec| spec.holder_identity.clone()).filter(|node| !node.is_empty());
        let silent = spec.and_then(|spec| spec.renew_time.as_ref()).map(|renewed| now - renewed.0.as_second());
        let note = match (&node, silent) {
            (None, _) => Some("no node announces it".to_owned()),
            (Some(_), Some(seconds)) if seconds > STALE_SECONDS => {
                Some(format!("its Lease was last renewed {seconds} s ago: is that node's agent running?"))
            }
            _ => None,
        };
        Self { address, node, note }
    }

    /// In words.
    pub(super) fn in_words(&self) -> String {
        match (&self.node, &self.note) {
            (Some(node), None) => format!("{} by node {node}", self.address),
            (Some(node), Some(note)) => format!("{} by node {node} ({note})", self.address),
            (None, note) => format!("{}: {}", self.address, note.as_deref().unwrap_or("not known")),
        }
    }
}

/// Asks for the Leases of a Service's addresses, if they are Towpath's to announce.
pub(super) async fn of(client: &kube::Client, service: &Service) -> Vec<Announcer> {
    if !is_our_class(service.load_balancer_class.as_deref()) {
        return Vec::new();
    }
    let api: Api<Lease> = Api::namespaced(client.clone(), NAMESPACE);
    let now = Timestamp::try_from(SystemTime::now()).unwrap_or_default().as_second();
    let mut all = Vec::new();
    for address in &service.load_balancer_ips {
        all.push(match api.get_opt(&lease_name(*address)).await {
            Ok(lease) => Announcer::of(*address, lease.as_ref(), now),
            Err(error) => Announcer {
                address: *address,
                node: None,
                note: Some(format!(
                    "who announces it is not known: Lease {NAMESPACE}/{}: {error}",
                    lease_name(*address)
                )),
            },
        });
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(holder: &str, renewed: &str) -> String {
        let lease: Lease = serde_json::from_value(serde_json::json!({
            "spec": {"holderIdentity": holder, "renewTime": renewed, "leaseDurationSeconds": 1},
        }))
        .unwrap();
        Announcer::of("192.0.2.1".parse().unwrap(), Some(&lease), 1000).in_words()
    }

    #[test]
    fn a_holder_is_named_a_silent_one_is_doubted_and_nobody_is_said() {
        assert_eq!(said("n2", "1970-01-01T00:16:39.500000Z"), "192.0.2.1 by node n2");
        let silent = said("n2", "1970-01-01T00:16:00.000000Z");
        assert!(silent.starts_with("192.0.2.1 by node n2 (its Lease was last renewed 40 s ago"), "{silent}");
        assert_eq!(said("", "1970-01-01T00:16:39.500000Z"), "192.0.2.1: no node announces it");
        let none = Announcer::of("2001:db8::1".parse().unwrap(), None, 0).in_words();
        assert_eq!(none, "2001:db8::1: no node announces it");
    }
}
