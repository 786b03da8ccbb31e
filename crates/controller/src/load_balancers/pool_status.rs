//! What `AddressPool` objects say, and what is said of them in their status.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;
use towpath_model::custom::{API_VERSION, AddressPool as PoolObject, AddressPoolStatus};
use towpath_model::{AddressPool, Readable};
use towpath_plan::load_balancer::{Plan, PoolState};

/// Field manager of what is written.
const MANAGER: &str = "towpath-controller";
/// So many overlaps are named in a message.
const NAMED: usize = 5;

/// A pool as it was read.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct SeenPool {
    /// What it gives; of one that cannot be understood any more, what it gave before.
    pub(super) pool: Option<AddressPool>,
    /// Why it cannot be understood.
    pub(super) unclear: Option<String>,
    generation: Option<i64>,
    status: Option<AddressPoolStatus>,
}

impl SeenPool {
    /// The object as it is now. A mistake in it takes no address from a Service, so what was understood last goes on.
    pub(super) fn of(object: &Readable<PoolObject>, before: Option<&Self>) -> Self {
        let read = match object.object() {
            Ok(object) => (AddressPool::try_from(object).map_err(|error| error.to_string()), Some(object)),
            Err(error) => (Err(error.to_owned()), None),
        };
        let (generation, status) =
            read.1.map_or((None, None), |object| (object.metadata.generation, object.status.clone()));
        match read.0 {
            Ok(pool) => Self { pool: Some(pool), unclear: None, generation, status },
            Err(error) => {
                let pool = before.and_then(|before| before.pool.clone());
                Self { pool, unclear: Some(error), generation, status }
            }
        }
    }
}

/// The statuses that are not as they should be.
pub(super) fn stale(pools: &BTreeMap<String, SeenPool>, planned: &Plan) -> Vec<(String, AddressPoolStatus)> {
    let now = Timestamp::now();
    let wanted = pools.iter().map(|(name, seen)| (name, seen, status(seen, planned.pools.get(name), now)));
    let stale = wanted.filter(|(_, seen, wanted)| seen.status.as_ref() != Some(wanted));
    stale.map(|(name, _, wanted)| (name.clone(), wanted)).collect()
}

fn count(number: u128) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// What is to be said; a condition's time is that of its last change of `status`.
fn status(seen: &SeenPool, state: Option<&PoolState>, now: Timestamp) -> AddressPoolStatus {
    let before = seen.status.clone().unwrap_or_default();
    let state = state.cloned().unwrap_or_default();
    let conditions = [ready(seen, &state), overlaps(&state)].map(|(type_, holds, reason, message)| {
        let status = if holds { "True" } else { "False" };
        let same = before.conditions.iter().find(|old| old.type_ == type_ && old.status == status);
        Condition {
            type_: type_.to_owned(),
            status: status.to_owned(),
            reason: reason.to_owned(),
            message,
            last_transition_time: same.map_or(Time(now), |old| old.last_transition_time.clone()),
            observed_generation: seen.generation,
        }
    });
    AddressPoolStatus {
        observed_generation: seen.generation,
        total: count(state.total),
        assigned: count(state.assigned),
        available: count(state.available),
        conditions: conditions.to_vec(),
    }
}

type Finding = (&'static str, bool, &'static str, String);

fn ready(seen: &SeenPool, state: &PoolState) -> Finding {
    match &seen.unclear {
        Some(error) if seen.pool.is_some() => {
            ("Ready", false, "Invalid", format!("{error}; it goes on as it was before, until that is corrected"))
        }
        Some(error) => {
            ("Ready", false, "Invalid", format!("{error}; nothing is given from it until that is corrected"))
        }
        None if state.total == 0 => {
            ("Ready", false, "NoAddresses", "every address in it is the cluster's own: add others".to_owned())
        }
        None if state.available == 0 => ("Ready", true, "Full", "every address in it is in use".to_owned()),
        None => ("Ready", true, "AddressesAvailable", "Services get addresses from it".to_owned()),
    }
}

fn overlaps(state: &PoolState) -> Finding {
    let list = |all: &[String]| {
        let mut text = all.iter().take(NAMED).cloned().collect::<Vec<_>>().join("; ");
        if all.len() > NAMED {
            text.push_str(&format!("; and {} more", all.len() - NAMED));
        }
        text
    };
    let (cluster, pools) = (&state.overlaps_cluster, &state.overlaps_pools);
    match (cluster.is_empty(), pools.is_empty()) {
        (true, true) => {
            ("Overlaps", false, "None", "no address in it is in another pool, or the cluster's own".to_owned())
        }
        (true, false) => {
            let message = format!("{}: each address is still given to one Service only", list(pools));
            ("Overlaps", true, "OtherPools", message)
        }
        (false, _) => {
            let all: Vec<String> = cluster.iter().chain(pools).cloned().collect();
            ("Overlaps", true, "Cluster", format!("{}: what is the cluster's own is not given", list(&all)))
        }
    }
}

/// Writes the status of a pool.
pub(super) async fn write(api: &Api<PoolObject>, name: &str, status: &AddressPoolStatus) -> Result<(), kube::Error> {
    let patch = json!({"apiVersion": API_VERSION, "kind": "AddressPool", "metadata": {"name": name}, "status": status});
    match api.patch_status(name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&patch)).await {
        // Deleted meanwhile: the watch says so.
        Err(kube::Error::Api(gone)) if gone.code == 404 => Ok(()),
        written => written.map(drop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(addresses: &[&str]) -> Readable<PoolObject> {
        serde_json::from_value(json!({
            "apiVersion": API_VERSION, "kind": "AddressPool", "metadata": {"name": "p", "generation": 3},
            "spec": {"addresses": addresses},
        }))
        .unwrap()
    }

    fn said(seen: &SeenPool, state: &PoolState) -> BTreeMap<String, (String, String, String)> {
        let status = status(seen, Some(state), Timestamp::UNIX_EPOCH);
        status.conditions.into_iter().map(|c| (c.type_, (c.status, c.reason, c.message))).collect()
    }

    #[test]
    fn a_mistake_is_said_and_takes_nothing_away() {
        let good = SeenPool::of(&object(&["192.0.2.0/28"]), None);
        assert!(good.unclear.is_none());
        let bad = SeenPool::of(&object(&["192.0.2.300"]), Some(&good));
        assert_eq!(bad.pool, good.pool);
        let state = PoolState { total: 16, assigned: 2, available: 14, ..PoolState::default() };
        let (status, reason, message) = said(&bad, &state)["Ready"].clone();
        assert_eq!((status.as_str(), reason.as_str()), ("False", "Invalid"));
        assert!(message.contains("spec.addresses[0]") && message.contains("as it was before"), "{message}");
        let unknown = SeenPool::of(&object(&["192.0.2.300"]), None);
        assert!(said(&unknown, &PoolState::default())["Ready"].2.contains("nothing is given"));
    }

    #[test]
    fn counts_and_overlaps_are_said_and_a_status_that_is_right_is_not_written_again() {
        let mut seen = SeenPool::of(&object(&["2001:db8::/64"]), None);
        let state = PoolState {
            total: 1 << 64,
            assigned: 1,
            available: (1 << 64) - 1,
            overlaps_cluster: vec!["a overlaps b".to_owned()],
            ..PoolState::default()
        };
        let planned = Plan { pools: BTreeMap::from([("p".to_owned(), state.clone())]), ..Plan::default() };
        let all = BTreeMap::from([("p".to_owned(), seen.clone())]);
        let (_, status) = stale(&all, &planned).remove(0);
        assert_eq!((status.total, status.assigned, status.observed_generation), (i64::MAX, 1, Some(3)));
        assert_eq!(said(&seen, &state)["Overlaps"].1, "Cluster");
        seen.status = Some(status);
        assert_eq!(stale(&BTreeMap::from([("p".to_owned(), seen)]), &planned), []);
    }
}
