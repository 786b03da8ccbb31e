//! `Pod.status` from the state of its containers. Pure.

use std::net::IpAddr;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{HostIP, Pod, PodCondition, PodIP, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde_json::{Value, json};

use super::slot::{Kind, Slot};

/// What a pod is in, beyond its containers.
pub(crate) struct Facts<'a> {
    /// The pod as last read.
    pub(crate) pod: &'a Pod,
    /// Its containers, init ones first.
    pub(crate) slots: &'a [Slot],
    /// Whether its network is complete.
    pub(crate) networked: bool,
    /// Its addresses.
    pub(crate) pod_ips: &'a [IpAddr],
    /// The node's addresses.
    pub(crate) host_ips: &'a [IpAddr],
    /// Whether all init containers are done.
    pub(crate) initialized: bool,
    /// Whether nothing will run any more.
    pub(crate) finished: bool,
    /// `Failed` whatever the containers say, with reason and message.
    pub(crate) failure: Option<(&'a str, &'a str)>,
    /// When the kubelet first saw it.
    pub(crate) started: Timestamp,
}

fn phase(facts: &Facts<'_>) -> &'static str {
    if facts.failure.is_some() {
        return "Failed";
    }
    let mains = || facts.slots.iter().filter(|slot| slot.kind == Kind::Main);
    if facts.finished {
        let failed_init =
            facts.slots.iter().any(|s| s.kind == Kind::Init && s.exit_code().is_some_and(|code| code != 0));
        let good = !failed_init && mains().all(|slot| slot.exit_code() == Some(0));
        return if good { "Succeeded" } else { "Failed" };
    }
    if !facts.initialized {
        return "Pending";
    }
    // A container that has run before (and crashed, or restarts) is part of a running pod; one that never ran is not.
    if mains().all(|slot| slot.ever_started) { "Running" } else { "Pending" }
}

/// Names of the containers for which `good` does not hold.
fn unmet<'a>(slots: impl Iterator<Item = &'a Slot>, good: impl Fn(&Slot) -> bool) -> Vec<String> {
    slots.filter(|slot| !good(slot)).map(|slot| slot.name().to_owned()).collect()
}

fn conditions(facts: &Facts<'_>, phase: &str) -> Vec<PodCondition> {
    let done = facts.finished && phase != "Failed";
    let verdict = |list: &[String], reason: &str, what: &str| -> (bool, Option<String>, Option<String>) {
        if facts.finished {
            let reason = if phase == "Succeeded" { "PodCompleted" } else { "PodFailed" };
            return (false, Some(reason.to_owned()), None);
        }
        if list.is_empty() {
            return (true, None, None);
        }
        (false, Some(reason.to_owned()), Some(format!("containers with {what} status: [{}]", list.join(" "))))
    };
    let uninitialized = unmet(facts.slots.iter().filter(|s| s.kind != Kind::Main), |s| match s.kind {
        Kind::Sidecar => s.started,
        _ => s.exit_code() == Some(0),
    });
    let unready = unmet(facts.slots.iter().filter(|s| s.kind != Kind::Init), |s| s.ready && s.is_running());
    let initialized = if facts.initialized || done {
        (true, facts.finished.then(|| "PodCompleted".to_owned()).filter(|_| done), None)
    } else {
        let (_, reason, message) = verdict(&uninitialized, "ContainersNotInitialized", "incomplete");
        (false, reason, message)
    };
    let containers = verdict(&unready, "ContainersNotReady", "unready");
    let gates = missing_gates(facts.pod);
    let ready = if containers.0 && !gates.is_empty() {
        let text = format!("the status of pod readiness gate {:?} is not \"True\", but False", gates.join(", "));
        (false, Some("ReadinessGatesNotReady".to_owned()), Some(text))
    } else {
        containers.clone()
    };
    [
        ("PodReadyToStartContainers", (facts.networked, None, None)),
        ("Initialized", initialized),
        ("Ready", ready),
        ("ContainersReady", containers),
        ("PodScheduled", (true, None, None)),
    ]
    .into_iter()
    .map(|(kind, (yes, reason, message))| condition(facts.pod, kind, yes, reason, message))
    .collect()
}

/// Readiness gates whose condition is not true.
fn missing_gates(pod: &Pod) -> Vec<String> {
    let have = pod.status.as_ref().and_then(|s| s.conditions.clone()).unwrap_or_default();
    let gates = pod.spec.iter().flat_map(|spec| spec.readiness_gates.iter().flatten());
    gates
        .map(|gate| gate.condition_type.clone())
        .filter(|kind| !have.iter().any(|c| c.type_ == *kind && c.status == "True"))
        .collect()
}

fn condition(pod: &Pod, kind: &str, yes: bool, reason: Option<String>, message: Option<String>) -> PodCondition {
    let status = if yes { "True" } else { "False" };
    let before =
        pod.status.iter().flat_map(|s| s.conditions.iter().flatten()).find(|c| c.type_ == kind && c.status == status);
    PodCondition {
        type_: kind.to_owned(),
        status: status.to_owned(),
        reason,
        message,
        last_transition_time: before.and_then(|c| c.last_transition_time.clone()).or(Some(Time(Timestamp::now()))),
        observed_generation: pod.metadata.generation,
        ..PodCondition::default()
    }
}

/// The status that the kubelet reports.
pub(crate) fn compute(facts: &Facts<'_>) -> PodStatus {
    let phase = phase(facts);
    let statuses = |main: bool| {
        let list: Vec<_> = facts.slots.iter().filter(|s| (s.kind == Kind::Main) == main).map(Slot::status).collect();
        (!list.is_empty()).then_some(list)
    };
    PodStatus {
        phase: Some(phase.to_owned()),
        reason: facts.failure.map(|(reason, _)| reason.to_owned()),
        message: facts.failure.map(|(_, message)| message.to_owned()),
        conditions: Some(conditions(facts, phase)),
        host_ip: facts.host_ips.first().map(IpAddr::to_string),
        host_ips: Some(facts.host_ips.iter().map(|ip| HostIP { ip: ip.to_string() }).collect()),
        pod_ip: facts.pod_ips.first().map(IpAddr::to_string),
        pod_ips: (!facts.pod_ips.is_empty())
            .then(|| facts.pod_ips.iter().map(|ip| PodIP { ip: ip.to_string() }).collect()),
        start_time: Some(Time(facts.started)),
        init_container_statuses: statuses(false),
        container_statuses: statuses(true),
        observed_generation: facts.pod.metadata.generation,
        ..PodStatus::default()
    }
}

/// The strategic merge patch that makes the stored status this one: addresses that are not the pod's any more are deleted.
pub(crate) fn patch(pod: &Pod, status: &PodStatus) -> Value {
    let mut value = json!(status);
    let keep: Vec<&str> = status.pod_ips.iter().flatten().map(|ip| ip.ip.as_str()).collect();
    let stale = pod.status.iter().flat_map(|s| s.pod_ips.iter().flatten()).filter(|ip| !keep.contains(&ip.ip.as_str()));
    let stale: Vec<Value> = stale.map(|ip| json!({"ip": ip.ip, "$patch": "delete"})).collect();
    if let Some(object) = value.as_object_mut() {
        if !stale.is_empty() {
            let list = object.entry("podIPs").or_insert_with(|| json!([]));
            if let Some(list) = list.as_array_mut() {
                list.extend(stale);
            }
        }
        if status.pod_ip.is_none() && pod.status.as_ref().is_some_and(|s| s.pod_ip.is_some()) {
            object.insert("podIP".to_owned(), Value::Null);
        }
    }
    json!({"metadata": {"uid": pod.metadata.uid}, "status": value})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "d", "uid": "u"},
            "spec": {"initContainers": [{"name": "i"}], "containers": [{"name": "c", "image": "busybox"}],
                     "readinessGates": [{"conditionType": "x/y"}]},
            "status": {"podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}]}
        }))
        .unwrap()
    }

    fn facts<'a>(pod: &'a Pod, slots: &'a [Slot]) -> Facts<'a> {
        Facts {
            pod,
            slots,
            networked: true,
            pod_ips: &[],
            host_ips: &[],
            initialized: false,
            finished: false,
            failure: None,
            started: Timestamp::UNIX_EPOCH,
        }
    }

    fn slots(pod: &Pod) -> Vec<Slot> {
        let spec = pod.spec.as_ref().unwrap();
        let init = spec.init_containers.iter().flatten().map(|c| Slot::new(c.clone(), Kind::Init, None));
        init.chain(spec.containers.iter().map(|c| Slot::new(c.clone(), Kind::Main, None))).collect()
    }

    #[test]
    fn a_pod_is_pending_until_its_init_containers_are_done() {
        let pod = pod();
        let slots = slots(&pod);
        let status = compute(&facts(&pod, &slots));
        assert_eq!(status.phase.as_deref(), Some("Pending"));
        let conditions = status.conditions.unwrap();
        let initialized = conditions.iter().find(|c| c.type_ == "Initialized").unwrap();
        assert_eq!(initialized.status, "False");
        assert_eq!(initialized.message.as_deref(), Some("containers with incomplete status: [i]"));
    }

    #[test]
    fn an_ended_pod_succeeds_only_when_all_of_it_did() {
        let pod = pod();
        let mut slots = slots(&pod);
        let ended = |code| crate::runtime::container::Ended { code, at: Timestamp::UNIX_EPOCH };
        for (init, main, phase) in [(0, 0, "Succeeded"), (0, 1, "Failed"), (1, 0, "Failed")] {
            slots[0].end(&ended(init), None);
            slots[1].end(&ended(main), None);
            let status = compute(&Facts { finished: true, initialized: true, ..facts(&pod, &slots) });
            assert_eq!(status.phase.as_deref(), Some(phase));
        }
    }

    #[test]
    fn addresses_of_an_earlier_life_are_deleted() {
        let pod = pod();
        let slots = slots(&pod);
        let ip = ["10.0.0.2".parse().unwrap()];
        let status = compute(&Facts { pod_ips: &ip, ..facts(&pod, &slots) });
        let patch = patch(&pod, &status);
        assert_eq!(patch["status"]["podIPs"], json!([{"ip": "10.0.0.2"}, {"ip": "10.0.0.1", "$patch": "delete"}]));
    }

    #[test]
    fn readiness_gates_hold_ready_back_but_not_containers_ready() {
        assert_eq!(missing_gates(&pod()), ["x/y"]);
    }
}
