//! Which node announces a load balancer's address, as Events on its Service: `nodeAssigned`, as MetalLB has it, written by the node that begins.
//!
//! One for each time that a node begins to announce an address of a Service; so many an hour for the Services of a namespace, and for all
//! together, so that an address that moves to and fro fills nobody's store. (The Lease says who it is now, `towpath service show` too.)

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, PostParams};
use tokio::time::Instant;
use towpath_model::load_balancer::is_our_class;
use towpath_model::{NamespacedName, NodeName, ServiceKind, World};
use towpath_plan::services::Asks;
use tracing::debug;

use super::refusals::{OF_A_NAMESPACE, OF_ALL, Written, hash, uid};
use crate::announce::local_network::Announced;
use crate::index::Kind;
use crate::{SharedIndex, read};

/// How often it is looked what is announced.
const LOOK: Duration = Duration::from_secs(1);

type Pair = (NamespacedName, IpAddr);

/// What is announced, and how much was said of it.
#[derive(Debug, Default)]
struct Told {
    standing: BTreeSet<Pair>,
    of: BTreeMap<String, Written>,
    all: Written,
}

impl Told {
    /// Takes what this node announces now; what to say of it. What there is no room for is not said later: it is history by then.
    fn look(&mut self, now: BTreeSet<Pair>, at: Instant) -> Vec<Pair> {
        let begun: Vec<Pair> = now.difference(&self.standing).cloned().collect();
        self.standing = now;
        let mut due = Vec::new();
        for (service, address) in begun {
            let of = self.of.entry(service.namespace.clone()).or_default();
            if of.may(OF_A_NAMESPACE, at) && self.all.may(OF_ALL, at) {
                of.0.push_back(at);
                self.all.0.push_back(at);
                due.push((service, address));
            }
        }
        self.of.retain(|_, written| written.may(1, at) || !written.0.is_empty());
        due
    }
}

/// Services with the addresses that are announced for them.
fn pairs(world: &World, announced: &BTreeSet<IpAddr>) -> BTreeSet<Pair> {
    let ours = world.services.values().filter(|service| {
        service.kind == ServiceKind::LoadBalancer && is_our_class(service.load_balancer_class.as_deref())
    });
    let of = ours.flat_map(|service| service.load_balancer_ips.iter().map(|address| (service.name.clone(), *address)));
    of.filter(|(_, address)| announced.contains(address)).collect()
}

/// Writes an Event whenever this node begins to announce an address. Runs for ever.
pub(crate) async fn tell(client: kube::Client, node: NodeName, index: SharedIndex, announced: Announced) {
    let mut told = Told::default();
    let mut seen = None;
    loop {
        tokio::time::sleep(LOOK).await;
        let addresses = announced.addresses();
        let now = {
            let index = read(&index);
            // Both as they were: every Service would be looked at to find what stands already.
            let state = (addresses, index.revision(Kind::Service));
            if seen.as_ref() == Some(&state) {
                continue;
            }
            let (addresses, _) = seen.insert(state);
            if addresses.is_empty() { BTreeSet::new() } else { pairs(index.world(), addresses) }
        };
        for (service, address) in told.look(now, Instant::now()) {
            if let Err(error) = say(&client, &node, &service, address).await {
                debug!(%error, %service, %address, "event not written");
            }
        }
    }
}

/// Writes one Event; fine when the Service is gone.
async fn say(
    client: &kube::Client,
    node: &NodeName,
    service: &NamespacedName,
    address: IpAddr,
) -> Result<(), kube::Error> {
    let Some(uid) = uid(client, Asks::Service, service).await? else { return Ok(()) };
    let api: Api<Event> = Api::namespaced(client.clone(), &service.namespace);
    let now = Timestamp::try_from(SystemTime::now()).unwrap_or_default();
    match api.create(&PostParams::default(), &event(node, service, address, &uid, now)).await {
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
        other => other.map(drop),
    }
}

fn event(node: &NodeName, service: &NamespacedName, address: IpAddr, uid: &str, now: Timestamp) -> Event {
    let note = format!("announcing {address} from node \"{node}\" with protocol \"layer2\"");
    let beginning: String = service.name.chars().take(200).collect();
    let digest = hash(&[uid, &note, &now.to_string()]);
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{beginning}.{digest:016x}")),
            namespace: Some(service.namespace.clone()),
            ..ObjectMeta::default()
        },
        regarding: Some(ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Service".to_owned()),
            name: Some(service.name.clone()),
            namespace: Some(service.namespace.clone()),
            uid: Some(uid.to_owned()),
            ..ObjectReference::default()
        }),
        action: Some("AnnounceAddress".to_owned()),
        reason: Some("nodeAssigned".to_owned()),
        note: Some(note),
        type_: Some("Normal".to_owned()),
        event_time: Some(MicroTime(now)),
        reporting_controller: Some("towpath-agent".to_owned()),
        reporting_instance: Some(node.to_string()),
        ..Event::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(service: &str, address: &str) -> Pair {
        (NamespacedName::new("shop", service), address.parse().unwrap())
    }

    #[test]
    fn each_beginning_is_said_once_and_a_flapping_address_has_an_end() {
        let (mut told, start) = (Told::default(), Instant::now());
        let both = || BTreeSet::from([pair("web", "192.0.2.1"), pair("api", "192.0.2.1")]);
        assert_eq!(told.look(both(), start).len(), 2, "two Services share it");
        assert!(told.look(both(), start).is_empty());
        assert!(told.look([pair("api", "192.0.2.1")].into(), start).is_empty(), "an end is no beginning");
        assert_eq!(told.look(both(), start), [pair("web", "192.0.2.1")]);
        let mut said = 3;
        for _ in 0..100 {
            told.look(BTreeSet::new(), start);
            said += told.look([pair("web", "192.0.2.1")].into(), start).len();
        }
        assert_eq!(said, OF_A_NAMESPACE);
        told.look(BTreeSet::new(), start);
        assert_eq!(told.look([pair("web", "192.0.2.1")].into(), start + Duration::from_secs(3600)).len(), 1);
    }

    #[test]
    fn it_says_what_people_look_for_and_two_times_are_two_events() {
        let (node, service) = (NodeName::new("n2"), NamespacedName::new("shop", "web"));
        let of = |seconds| {
            event(&node, &service, "192.0.2.1".parse().unwrap(), "u", Timestamp::from_second(seconds).unwrap())
        };
        let first = of(1);
        assert_eq!(first.reason.as_deref(), Some("nodeAssigned"));
        assert_eq!(first.note.as_deref(), Some("announcing 192.0.2.1 from node \"n2\" with protocol \"layer2\""));
        assert_ne!(first.metadata.name, of(2).metadata.name);
    }
}
