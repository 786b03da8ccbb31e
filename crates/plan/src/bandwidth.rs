//! What the pods of a node ask for of bandwidth.

use std::collections::BTreeMap;
use std::net::IpAddr;

use towpath_model::{AskedBandwidth, NamespacedName, World};

use crate::services::{Asks, Refusal, RefusedPart};

/// What comes of the annotations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BandwidthPlan {
    /// What each pod asks for, by its addresses. One of which the API has said nothing is not among them: it keeps what it has.
    pub asked: BTreeMap<IpAddr, AskedBandwidth>,
    /// Annotations that mean nothing, by their pods.
    pub refusals: Vec<Refusal>,
}

/// Plans for the pods of a node, by the addresses they were given.
pub fn plan(world: &World, own: &BTreeMap<NamespacedName, Vec<IpAddr>>) -> BandwidthPlan {
    let mut plan = BandwidthPlan::default();
    for (name, addresses) in own {
        let Some(pod) = world.pods.get(name) else { continue };
        let asked = pod.bandwidth.as_deref().cloned().unwrap_or_default();
        plan.refusals.extend(asked.misunderstood().map(|why| Refusal {
            asks: Asks::Pod,
            name: name.clone(),
            part: RefusedPart::Field,
            reason: format!("{why}; the limit that it had before stays"),
        }));
        plan.asked.extend(addresses.iter().map(|address| (*address, asked.clone())));
    }
    plan
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1 as core;
    use serde_json::json;
    use towpath_model::bandwidth::{Asked, EGRESS_BANDWIDTH_ANNOTATION, INGRESS_BANDWIDTH_ANNOTATION};
    use towpath_model::{Pod, Rate};

    use super::*;

    #[test]
    fn each_pod_of_the_node_asks_for_what_it_says_and_strangers_for_nothing() {
        let mut world = World::default();
        let pods = [
            ("both", json!({INGRESS_BANDWIDTH_ANNOTATION: "10M", EGRESS_BANDWIDTH_ANNOTATION: "1Gi"})),
            ("plain", json!({"other": "10M"})),
            ("odd", json!({EGRESS_BANDWIDTH_ANNOTATION: "10 Mbit"})),
            ("elsewhere", json!({INGRESS_BANDWIDTH_ANNOTATION: "x"})),
        ];
        for (name, annotations) in pods {
            let object = json!({"metadata": {"namespace": "a", "name": name, "annotations": annotations}, "spec": {"containers": []}});
            let pod = Pod::try_from(&serde_json::from_value::<core::Pod>(object).unwrap()).unwrap();
            world.pods.insert(pod.name.clone(), pod);
        }
        let address = |last: u8| IpAddr::from([10, 0, 0, last]);
        let own = [("both", 1), ("plain", 2), ("odd", 3), ("unknown", 4)];
        let own = own
            .into_iter()
            .map(|(name, last)| (NamespacedName::new("a", name), vec![address(last), address(last + 100)]));
        let plan = plan(&world, &own.collect());
        let limit = |text| Asked::Limit(Rate::parse(text).unwrap());
        let both = AskedBandwidth { ingress: limit("10M"), egress: limit("1Gi") };
        for (last, wanted) in [(1, Some(&both)), (101, Some(&both)), (2, Some(&AskedBandwidth::default())), (4, None)] {
            assert_eq!(plan.asked.get(&address(last)), wanted, "{last}");
        }
        assert_eq!(plan.asked.len(), 6);
        let said: Vec<String> = plan.refusals.iter().map(ToString::to_string).collect();
        assert_eq!(
            said,
            [
                "Pod a/odd: annotation kubernetes.io/egress-bandwidth: \"10 Mbit\" is not a quantity of bits a second from 1k to 1P, \
              like 10M; the limit that it had before stays"
            ]
        );
    }
}
