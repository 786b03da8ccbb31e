//! Which pods of a node have their sockets left alone, and what is translated for them at their device instead.
//!
//! A pod of which the API has said nothing yet is among them: what has to be left alone would otherwise be translated in its first moment,
//! and at the device everything is. It is joined to the others when it is known.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use towpath_model::{NamespacedName, SOCKET_SERVICES_ANNOTATION, SocketServices, World};

use crate::services::{Asks, Refusal, RefusedPart};

/// What comes of the annotations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SocketPlan {
    /// Addresses of the pods that are left alone.
    pub at_device: BTreeSet<IpAddr>,
    /// The pods that asked for it, or whose namespace did.
    pub asked: Vec<NamespacedName>,
    /// Annotations that mean nothing, by the pods that they are about.
    pub refusals: Vec<Refusal>,
}

/// Plans for the pods of a node, by the addresses they were given.
pub fn plan(world: &World, own: &BTreeMap<NamespacedName, Vec<IpAddr>>) -> SocketPlan {
    let mut plan = SocketPlan::default();
    for (name, addresses) in own {
        let Some(pod) = world.pods.get(name) else {
            plan.at_device.extend(addresses);
            continue;
        };
        let said = of_namespace(world, &name.namespace);
        if !pod.socket_services.translates(said) {
            plan.at_device.extend(addresses);
            plan.asked.push(name.clone());
        }
        plan.refusals.extend(misunderstood("", &pod.socket_services).map(|reason| refusal(name, reason)));
        let of = format!("namespace {}: ", name.namespace);
        plan.refusals.extend(misunderstood(&of, said).map(|reason| refusal(name, reason)));
    }
    plan
}

/// What a namespace says; one that is not known says nothing.
pub fn of_namespace<'a>(world: &'a World, namespace: &str) -> &'a SocketServices {
    world.namespaces.get(namespace).map_or(&SocketServices::Unsaid, |namespace| &namespace.socket_services)
}

fn misunderstood(of: &str, said: &SocketServices) -> Option<String> {
    let SocketServices::Misunderstood(value) = said else { return None };
    Some(format!(
        "{of}annotation {SOCKET_SERVICES_ANNOTATION}: {value:?} means nothing and counts as absent; write {} or {}",
        SocketServices::ENABLED,
        SocketServices::DISABLED,
    ))
}

fn refusal(name: &NamespacedName, reason: String) -> Refusal {
    Refusal { asks: Asks::Pod, name: name.clone(), part: RefusedPart::Field, reason }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1 as core;
    use serde_json::json;
    use towpath_model::{Namespace, Pod};

    use super::*;

    fn world(namespace: Option<&str>, pods: &[(&str, Option<&str>)]) -> World {
        let annotations = |value: Option<&str>| value.map(|value| json!({SOCKET_SERVICES_ANNOTATION: value}));
        let mut world = World::default();
        let object = json!({"metadata": {"name": "a", "annotations": annotations(namespace)}});
        let object: core::Namespace = serde_json::from_value(object).unwrap();
        world.namespaces.insert("a".to_owned(), Namespace::try_from(&object).unwrap());
        for (name, value) in pods {
            let object = json!({"metadata": {"namespace": "a", "name": name, "annotations": annotations(*value)},
                "spec": {"containers": []}});
            let pod = Pod::try_from(&serde_json::from_value::<core::Pod>(object).unwrap()).unwrap();
            world.pods.insert(pod.name.clone(), pod);
        }
        world
    }

    fn own(names: &[&str]) -> BTreeMap<NamespacedName, Vec<IpAddr>> {
        let addresses =
            |last| vec![IpAddr::from([10, 0, 0, last]), IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, last.into()])];
        names.iter().zip(1..).map(|(name, last)| (NamespacedName::new("a", *name), addresses(last))).collect()
    }

    #[test]
    fn pods_that_ask_and_those_of_a_namespace_that_asks_are_left_alone_in_both_families() {
        let pods = [("off", Some("disabled")), ("on", Some("enabled")), ("plain", None)];
        let own = own(&["off", "on", "plain"]);
        let of = |names: &[&str]| -> BTreeSet<IpAddr> {
            names.iter().flat_map(|name| own[&NamespacedName::new("a", *name)].clone()).collect()
        };
        assert_eq!(plan(&world(None, &pods), &own).at_device, of(&["off"]));
        let asked = plan(&world(Some("disabled"), &pods), &own);
        assert_eq!(asked.at_device, of(&["off", "plain"]));
        assert_eq!(asked.asked, [NamespacedName::new("a", "off"), NamespacedName::new("a", "plain")]);
        assert_eq!(asked.refusals, []);
    }

    #[test]
    fn a_pod_that_nobody_knows_yet_is_left_alone_and_has_not_asked() {
        let plan = plan(&world(None, &[]), &own(&["new"]));
        assert_eq!((plan.at_device.len(), plan.asked.len()), (2, 0));
    }

    #[test]
    fn what_means_nothing_is_named_with_what_would() {
        let nonsense = plan(&world(Some("off"), &[("p", Some("no"))]), &own(&["p"]));
        assert_eq!(nonsense.at_device, BTreeSet::new());
        let said: Vec<String> = nonsense.refusals.iter().map(ToString::to_string).collect();
        assert_eq!(
            said,
            [
                "Pod a/p: annotation towpath.dev/socket-services: \"no\" means nothing and counts as absent; write enabled or disabled",
                "Pod a/p: namespace a: annotation towpath.dev/socket-services: \"off\" means nothing and counts as absent; write enabled or disabled",
            ]
        );
    }
}
