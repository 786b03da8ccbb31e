//! Services as the watch brings them and as our own writes left them, and how their status is written.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{ObjectReference, Service};
use kube::api::{Api, ApiResource, DynamicObject, Patch, PatchParams};
use kube::runtime::watcher::Event;
use kube::{Client, Resource, ResourceExt};
use serde_json::{Value, json};
use towpath_model::load_balancer::{ASSIGNED_ANNOTATION, MANAGER, assigned};
use towpath_model::{BalancedService, NamespacedName};

/// What came of writing.
#[derive(Debug, Default)]
pub(super) struct Written {
    /// Something was written.
    pub(super) any: bool,
    /// Something was not.
    pub(super) failed: bool,
}

#[derive(Clone, Debug)]
struct Seen {
    service: BalancedService,
    uid: Option<String>,
    version: Option<String>,
}

impl Seen {
    /// Whether this is the same object as it was before `known`: the watch may be behind what a write of ours answered.
    fn is_older_than(&self, known: &Self) -> bool {
        let number = |version: &Option<String>| version.as_ref().and_then(|version| version.parse::<u64>().ok());
        self.uid == known.uid && number(&self.version).zip(number(&known.version)).is_some_and(|(new, old)| new < old)
    }
}

/// All Services.
#[derive(Default)]
pub(super) struct Known {
    all: BTreeMap<NamespacedName, Seen>,
    listing: BTreeMap<NamespacedName, Seen>,
    /// By uid, those whose marks do not last: somebody takes them away again at once. They are not written for ever.
    unmarkable: BTreeSet<Option<String>>,
    /// Whether all are known: before that nothing may be given.
    pub(super) complete: bool,
}

impl Known {
    /// Takes an event; whether something is another than before.
    pub(super) fn take(&mut self, event: Event<DynamicObject>) -> bool {
        match event {
            Event::Init => {
                self.listing.clear();
                false
            }
            Event::InitApply(object) => {
                if let Some(seen) = self.seen(&object) {
                    self.listing.insert(seen.service.name.clone(), seen);
                }
                false
            }
            Event::InitDone => {
                let mut listed = std::mem::take(&mut self.listing);
                for (name, seen) in &mut listed {
                    if let Some(known) = self.all.get(name).filter(|known| seen.is_older_than(known)) {
                        seen.clone_from(known);
                    }
                }
                self.all = listed;
                self.complete = true;
                true
            }
            Event::Apply(object) => self.learn(&object),
            Event::Delete(object) => {
                let name = NamespacedName::new(object.namespace().unwrap_or_default(), object.name_any());
                self.all.remove(&name).is_some()
            }
        }
    }

    /// A Service is so now, unless more recent things are known of it; whether that is another than before.
    pub(super) fn learn(&mut self, object: &DynamicObject) -> bool {
        let Some(new) = self.seen(object) else { return false };
        let known = self.all.get(&new.service.name);
        if known.is_some_and(|known| new.is_older_than(known)) {
            return false;
        }
        let changed = known.is_none_or(|known| known.service != new.service);
        self.all.insert(new.service.name.clone(), new);
        changed
    }

    /// As [`Known::learn`], of what a write of ours answered.
    pub(super) fn learn_written(&mut self, object: &DynamicObject) {
        self.learn(object);
        let name = NamespacedName::new(object.namespace().unwrap_or_default(), object.name_any());
        let unmarked = self.all.get(&name).filter(|seen| seen.service.standing_is_ours && !seen.service.is_marked);
        if let Some(seen) = unmarked
            && self.unmarkable.insert(seen.uid.clone())
        {
            tracing::warn!(service = %name, "the marks that its load balancer's address is ours are not kept: does an admission webhook \
                take the annotation {ASSIGNED_ANNOTATION} away?");
        }
    }

    /// For the planner.
    pub(super) fn all(&self) -> BTreeMap<NamespacedName, BalancedService> {
        let as_planned = |seen: &Seen| {
            let mut service = seen.service.clone();
            service.is_marked |= self.unmarkable.contains(&seen.uid);
            service
        };
        self.all.iter().map(|(name, seen)| (name.clone(), as_planned(seen))).collect()
    }

    /// A Service as far as it matters here; none when its metadata name nothing. What was ours is ours while the same stands in its
    /// status: who may write a Service may forge who wrote what of it.
    fn seen(&self, object: &DynamicObject) -> Option<Seen> {
        let fresh = seen(object, false)?;
        let known = self.all.get(&fresh.service.name);
        let is_known = |known: &Seen| {
            known.uid == fresh.uid && known.service.standing_is_ours && known.service.standing == fresh.service.standing
        };
        if !fresh.service.standing_is_ours && known.is_some_and(is_known) {
            return seen(object, true);
        }
        Some(fresh)
    }

    /// For Events.
    pub(super) fn reference(&self, name: &NamespacedName) -> Option<ObjectReference> {
        let seen = self.all.get(name)?;
        Some(ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Service".to_owned()),
            namespace: Some(name.namespace.clone()),
            name: Some(name.name.clone()),
            uid: seen.uid.clone(),
            resource_version: seen.version.clone(),
            ..ObjectReference::default()
        })
    }

    /// The write that gives a Service these addresses and no others. It holds for the object as it is known and no other.
    pub(super) fn writing(
        &self,
        client: &Client,
        name: &NamespacedName,
        addresses: &BTreeSet<IpAddr>,
    ) -> Option<impl Future<Output = Result<DynamicObject, kube::Error>> + use<>> {
        let seen = self.all.get(name)?;
        let kind = ApiResource::erase::<Service>(&());
        let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), &name.namespace, &kind);
        let patch = applied(name, seen.version.as_deref(), addresses);
        // What another implementation wrote without a class of its own is not taken from it: the API server refuses (409). What is ours
        // is, whoever claims to have written it: of the object as it was seen, by its version.
        let explicit = seen.service.request.as_ref().is_some_and(|request| request.explicit);
        let mut params = PatchParams::apply(MANAGER);
        params.force = explicit || seen.service.standing_is_ours;
        let name = name.name.clone();
        Some(async move { api.patch_status(&name, &params, &Patch::Apply(patch)).await })
    }
}

/// The configuration that is applied: all that we say of the Service.
fn applied(name: &NamespacedName, version: Option<&str>, addresses: &BTreeSet<IpAddr>) -> Value {
    // VIP: packets come to the node with this address as their destination (KEP-1860).
    let ingress: Vec<Value> = addresses.iter().map(|address| json!({"ip": address, "ipMode": "VIP"})).collect();
    let mut applied = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name.name, "namespace": name.namespace, "resourceVersion": version},
    });
    // What is not applied any more goes, and with it our marks.
    if let (Some(object), false) = (applied.as_object_mut(), ingress.is_empty()) {
        object.insert("status".to_owned(), json!({"loadBalancer": {"ingress": ingress}}));
        if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
            metadata.insert("annotations".to_owned(), json!({ASSIGNED_ANNOTATION: assigned(addresses)}));
        }
    }
    applied
}

fn seen(object: &DynamicObject, known_as_ours: bool) -> Option<Seen> {
    let (uid, version) = (object.meta().uid.clone(), object.meta().resource_version.clone());
    let namespace = object.namespace()?;
    let name = NamespacedName::new(namespace, object.name_any());
    let typed = typed(object).map_err(|error| error.to_string());
    let service =
        typed.and_then(|service| BalancedService::read(&service, known_as_ours).map_err(|error| error.to_string()));
    let service = service.unwrap_or_else(|error| {
        tracing::warn!(service = %name, error, "this Service cannot be read, so it gets no load balancer address");
        unreadable(name, object)
    });
    Some(Seen { service, uid, version })
}

/// A Service that does not fit its type costs no other: it asks for nothing, and what stands in its status is nobody else's.
fn unreadable(name: NamespacedName, object: &DynamicObject) -> BalancedService {
    let ingress = object.data.pointer("/status/loadBalancer/ingress").and_then(Value::as_array);
    let texts = ingress.into_iter().flatten().filter_map(|entry| entry.get("ip")?.as_str());
    BalancedService {
        name,
        created: i64::MAX,
        labels: BTreeMap::new(),
        request: None,
        standing: texts.filter_map(|text| text.parse().ok()).collect(),
        standing_is_ours: false,
        is_marked: false,
        cluster_ips: BTreeSet::new(),
        external_ips: BTreeSet::new(),
    }
}

fn typed(object: &DynamicObject) -> Result<Service, serde_json::Error> {
    let mut value = serde_json::to_value(object)?;
    // Nobody here reads them, and one with a time that a client left out would cost the whole Service.
    if let Some(status) = value.get_mut("status").and_then(Value::as_object_mut) {
        status.remove("conditions");
    }
    serde_json::from_value(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(version: &str, ingress: &str) -> DynamicObject {
        serde_json::from_value(json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "web", "namespace": "default", "uid": "u", "resourceVersion": version},
            "spec": {"type": "LoadBalancer", "loadBalancerClass": "towpath.dev/lb", "ipFamilies": ["IPv4"], "ports": [{"port": 80}]},
            "status": {"loadBalancer": {"ingress": [{"ip": ingress}]},
                "conditions": [{"type": "A", "status": "True", "lastTransitionTime": null}]},
        }))
        .unwrap()
    }

    fn standing(known: &Known) -> String {
        let all = known.all();
        all[&NamespacedName::new("default", "web")].standing.first().unwrap().to_string()
    }

    #[test]
    fn an_event_that_is_behind_our_own_write_changes_nothing() {
        let mut known = Known::default();
        assert!(known.take(Event::Apply(object("9", "192.0.2.1"))));
        assert!(known.learn(&object("12", "192.0.2.2")), "what a write answered");
        assert!(!known.take(Event::Apply(object("10", "192.0.2.1"))), "the watch is behind");
        assert_eq!(standing(&known), "192.0.2.2");
        known.take(Event::Init);
        known.take(Event::InitApply(object("11", "192.0.2.1")));
        known.take(Event::InitDone);
        assert_eq!(standing(&known), "192.0.2.2", "nor a list that is");
        assert!(known.take(Event::Apply(object("13", "192.0.2.3"))));
        assert_eq!(standing(&known), "192.0.2.3");
    }

    #[test]
    fn another_service_of_the_same_name_is_another() {
        let mut known = Known::default();
        known.take(Event::Apply(object("9", "192.0.2.1")));
        let mut other = object("3", "192.0.2.2");
        other.metadata.uid = Some("v".to_owned());
        assert!(known.take(Event::Apply(other)));
        assert_eq!(standing(&known), "192.0.2.2");
    }

    #[test]
    fn one_that_cannot_be_read_asks_for_nothing_and_its_address_is_nobody_elses() {
        let mut known = Known::default();
        let mut odd = object("9", "192.0.2.1");
        odd.data["spec"]["ports"] = json!("none");
        known.take(Event::Apply(odd));
        let all = known.all();
        let service = &all[&NamespacedName::new("default", "web")];
        assert!(service.request.is_none() && !service.standing_is_ours);
        assert_eq!(standing(&known), "192.0.2.1");
    }

    #[test]
    fn without_an_address_nothing_is_said_of_the_status() {
        let name = NamespacedName::new("default", "web");
        let two = BTreeSet::from(["2001:db8::1".parse().unwrap(), "192.0.2.1".parse().unwrap()]);
        let patch = applied(&name, Some("7"), &two);
        assert_eq!(
            patch["status"]["loadBalancer"]["ingress"],
            json!([{"ip": "192.0.2.1", "ipMode": "VIP"}, {"ip": "2001:db8::1", "ipMode": "VIP"}])
        );
        assert_eq!(patch["metadata"]["resourceVersion"], "7");
        assert_eq!(patch["metadata"]["annotations"][ASSIGNED_ANNOTATION], "192.0.2.1,2001:db8::1");
        let nothing = applied(&name, None, &BTreeSet::new());
        assert_eq!((nothing.get("status"), nothing["metadata"].get("annotations")), (None, None));
    }

    #[test]
    fn what_was_ours_stays_ours_whoever_is_said_to_have_written_it() {
        let without_class = |version: &str, ingress: &str, ours: bool| {
            let mut object = object(version, ingress);
            object.data["spec"]["loadBalancerClass"] = Value::Null;
            if ours {
                object.metadata.annotations = Some([(ASSIGNED_ANNOTATION.to_owned(), ingress.to_owned())].into());
            }
            object
        };
        let mut known = Known::default();
        let name = NamespacedName::new("default", "web");
        known.take(Event::Apply(without_class("9", "192.0.2.1", true)));
        known.take(Event::Apply(without_class("10", "192.0.2.1", false)));
        assert!(known.all()[&name].request.is_some() && !known.all()[&name].is_marked);
        // An answer to a write that is not marked either: it is not written for ever.
        known.learn_written(&without_class("11", "192.0.2.1", false));
        assert!(known.all()[&name].is_marked);
        known.take(Event::Apply(without_class("12", "192.0.2.2", false)));
        assert!(known.all()[&name].request.is_none(), "another address is another's");
    }
}
