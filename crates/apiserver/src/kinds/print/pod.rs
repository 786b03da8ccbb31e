//! Rows of pods.

use serde_json::{Value, json};

use super::{AGE, ColumnRow, NAME, age, object_age};
use crate::kinds::read::Read;

/// Columns of pods.
pub(crate) const COLUMNS: &[ColumnRow] = &[
    NAME,
    ColumnRow("Ready", "string", "The aggregate readiness state of this pod for accepting traffic.", 0),
    ColumnRow("Status", "string", "The aggregate status of the containers in this pod.", 0),
    ColumnRow(
        "Restarts",
        "string",
        "The number of times the containers in this pod have been restarted and when the last container in this pod has restarted.",
        0,
    ),
    AGE,
    ColumnRow("IP", "string", "podIP address allocated to the pod.", 1),
    ColumnRow("Node", "string", "Name of the node this pod is scheduled onto.", 1),
    ColumnRow("Nominated Node", "string", "Node this pod is expected to run on once others made room for it.", 1),
    ColumnRow("Readiness Gates", "string", "Further conditions that must be true before the pod is ready.", 1),
];

/// What the statuses of a pod's containers add up to.
struct Summary {
    reason: String,
    ready: usize,
    total: usize,
    restarts: i64,
    last_restart: String,
}

fn later(last: &mut String, container: &Value) {
    let finished = container.deep(&["lastState", "terminated"]).text("finishedAt");
    let (known, new) = (last.parse::<jiff::Timestamp>().ok(), finished.parse::<jiff::Timestamp>().ok());
    if new.is_some() && new > known {
        *last = finished.to_owned();
    }
}

/// `ExitCode:1`, `Signal:9`, or the reason given.
fn terminated(state: &Value) -> String {
    match (state.text("reason"), state.int("signal").unwrap_or(0)) {
        ("", 0) => format!("ExitCode:{}", state.int("exitCode").unwrap_or(0)),
        ("", signal) => format!("Signal:{signal}"),
        (reason, _) => reason.to_owned(),
    }
}

fn condition_true(status: &Value, kind: &str) -> bool {
    status
        .list("conditions")
        .iter()
        .any(|condition| condition.text("type") == kind && condition.text("status") == "True")
}

fn summary(pod: &Value) -> Summary {
    let (spec, status) = (pod.at("spec"), pod.at("status"));
    let reason = match status.text("reason") {
        "" => status.text("phase"),
        reason => reason,
    };
    let sidecars = |name: &str| {
        let known = spec.list("initContainers").iter().find(|container| container.text("name") == name);
        known.is_some_and(|container| container.text("restartPolicy") == "Always")
    };
    let total = spec.list("containers").len()
        + spec.list("initContainers").iter().filter(|container| container.text("restartPolicy") == "Always").count();
    let mut sum = Summary { reason: reason.to_owned(), ready: 0, total, restarts: 0, last_restart: String::new() };
    if status
        .list("conditions")
        .iter()
        .any(|condition| condition.text("type") == "PodScheduled" && condition.text("reason") == "SchedulingGated")
    {
        sum.reason = "SchedulingGated".to_owned();
    }
    let (mut sidecar_restarts, mut sidecar_last) = (0, String::new());
    let mut initializing = false;
    for (index, container) in status.list("initContainerStatuses").iter().enumerate() {
        let restarts = container.int("restartCount").unwrap_or(0);
        sum.restarts += restarts;
        later(&mut sum.last_restart, container);
        let sidecar = sidecars(container.text("name"));
        if sidecar {
            sidecar_restarts += restarts;
            later(&mut sidecar_last, container);
        }
        let ended = container.deep(&["state", "terminated"]);
        if !ended.is_null() && ended.int("exitCode").unwrap_or(0) == 0 {
            continue;
        }
        if sidecar && container.flag("started") {
            sum.ready += usize::from(container.flag("ready"));
            continue;
        }
        let waiting = container.deep(&["state", "waiting"]).text("reason");
        sum.reason = if !ended.is_null() {
            format!("Init:{}", terminated(ended))
        } else if !waiting.is_empty() && waiting != "PodInitializing" {
            format!("Init:{waiting}")
        } else {
            format!("Init:{index}/{}", spec.list("initContainers").len())
        };
        initializing = true;
        break;
    }
    if !initializing || condition_true(status, "Initialized") {
        sum.restarts = sidecar_restarts;
        sum.last_restart = sidecar_last;
        main_containers(status, &mut sum);
    }
    let terminal = matches!(status.text("phase"), "Succeeded" | "Failed");
    if pod.at("metadata").has("deletionTimestamp") {
        if status.text("reason") == "NodeLost" {
            sum.reason = "Unknown".to_owned();
        } else if !terminal {
            sum.reason = "Terminating".to_owned();
        }
    }
    sum
}

fn main_containers(status: &Value, sum: &mut Summary) {
    let mut running = false;
    for container in status.list("containerStatuses").iter().rev() {
        sum.restarts += container.int("restartCount").unwrap_or(0);
        later(&mut sum.last_restart, container);
        let waiting = container.deep(&["state", "waiting"]).text("reason");
        let ended = container.deep(&["state", "terminated"]);
        if !waiting.is_empty() {
            sum.reason = waiting.to_owned();
        } else if !ended.is_null() {
            sum.reason = terminated(ended);
        } else if container.flag("ready") && container.at("state").has("running") {
            running = true;
            sum.ready += 1;
        }
    }
    if sum.reason == "Completed" && running {
        sum.reason = if condition_true(status, "Ready") { "Running" } else { "NotReady" }.to_owned();
    }
}

fn or_none(text: &str) -> Value {
    json!(if text.is_empty() { "<none>" } else { text })
}

/// The row of a pod.
pub(crate) fn row(pod: &Value, now: &str) -> Vec<Value> {
    let (spec, status) = (pod.at("spec"), pod.at("status"));
    let sum = summary(pod);
    let restarts = if sum.restarts != 0 && !sum.last_restart.is_empty() {
        format!("{} ({} ago)", sum.restarts, age(&sum.last_restart, now))
    } else {
        sum.restarts.to_string()
    };
    let gates = spec.list("readinessGates");
    let open = gates.iter().filter(|gate| condition_true(status, gate.text("conditionType"))).count();
    let ip = status.list("podIPs").first().map(|entry| entry.text("ip")).unwrap_or_default();
    vec![
        super::name(pod),
        json!(format!("{}/{}", sum.ready, sum.total)),
        json!(sum.reason),
        json!(restarts),
        object_age(pod, now),
        or_none(ip),
        or_none(spec.text("nodeName")),
        or_none(status.text("nominatedNodeName")),
        if gates.is_empty() { json!("<none>") } else { json!(format!("{open}/{}", gates.len())) },
    ]
}
