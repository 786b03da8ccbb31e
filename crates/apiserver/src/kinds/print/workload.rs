//! Rows of the kinds that make pods.

use serde_json::{Value, json};

use super::{AGE, ColumnRow, NAME, age, labels, name, object_age, selector};
use crate::kinds::read::Read;

const CONTAINERS: ColumnRow = ColumnRow("Containers", "string", "Names of each container in the template.", 1);
const IMAGES: ColumnRow = ColumnRow("Images", "string", "Images referenced by each container in the template.", 1);
const SELECTOR: ColumnRow = ColumnRow("Selector", "string", "Which pods belong to this object.", 1);

fn number(object: &Value, section: &str, field: &str) -> i64 {
    object.at(section).int(field).unwrap_or(0)
}

/// Names and images of a template's containers, each joined by commas.
fn containers(template: &Value) -> [Value; 2] {
    ["name", "image"].map(|field| {
        let parts: Vec<&str> =
            template.at("spec").list("containers").iter().map(|container| container.text(field)).collect();
        json!(parts.join(","))
    })
}

/// Columns of Deployments.
pub(crate) const DEPLOYMENT: &[ColumnRow] = &[
    NAME,
    ColumnRow("Ready", "string", "Number of the pod with ready state", 0),
    ColumnRow("Up-to-date", "string", "Number of pods that have the template of now.", 0),
    ColumnRow("Available", "string", "Number of pods that have been ready long enough.", 0),
    AGE,
    CONTAINERS,
    IMAGES,
    SELECTOR,
];

/// The row of a Deployment.
pub(crate) fn deployment(object: &Value, now: &str) -> Vec<Value> {
    let ready = format!("{}/{}", number(object, "status", "readyReplicas"), number(object, "spec", "replicas"));
    let [names, images] = containers(object.deep(&["spec", "template"]));
    vec![
        name(object),
        json!(ready),
        json!(number(object, "status", "updatedReplicas")),
        json!(number(object, "status", "availableReplicas")),
        object_age(object, now),
        names,
        images,
        json!(selector(object.deep(&["spec", "selector"]))),
    ]
}

/// Columns of ReplicaSets and ReplicationControllers.
pub(crate) const REPLICA_SET: &[ColumnRow] = &[
    NAME,
    ColumnRow("Desired", "integer", "Number of pods wanted.", 0),
    ColumnRow("Current", "integer", "Number of pods there are.", 0),
    ColumnRow("Ready", "integer", "Number of pods that are ready.", 0),
    AGE,
    CONTAINERS,
    IMAGES,
    SELECTOR,
];

/// The row of a ReplicaSet or ReplicationController.
pub(crate) fn replica_set(object: &Value, now: &str) -> Vec<Value> {
    let [names, images] = containers(object.deep(&["spec", "template"]));
    let chosen = object.deep(&["spec", "selector"]);
    let chosen = if object.text("kind") == "ReplicationController" { labels(chosen) } else { selector(chosen) };
    vec![
        name(object),
        json!(number(object, "spec", "replicas")),
        json!(number(object, "status", "replicas")),
        json!(number(object, "status", "readyReplicas")),
        object_age(object, now),
        names,
        images,
        json!(chosen),
    ]
}

/// Columns of DaemonSets.
pub(crate) const DAEMON_SET: &[ColumnRow] = &[
    NAME,
    ColumnRow("Desired", "integer", "Number of nodes that should run the pod.", 0),
    ColumnRow("Current", "integer", "Number of nodes that run the pod and should.", 0),
    ColumnRow("Ready", "integer", "Number of nodes whose pod is ready.", 0),
    ColumnRow("Up-to-date", "integer", "Number of nodes whose pod has the template of now.", 0),
    ColumnRow("Available", "integer", "Number of nodes whose pod has been ready long enough.", 0),
    ColumnRow("Node Selector", "string", "Labels a node must have.", 0),
    AGE,
    CONTAINERS,
    IMAGES,
    SELECTOR,
];

/// The row of a DaemonSet.
pub(crate) fn daemon_set(object: &Value, now: &str) -> Vec<Value> {
    let count = |field: &str| json!(number(object, "status", field));
    let [names, images] = containers(object.deep(&["spec", "template"]));
    vec![
        name(object),
        count("desiredNumberScheduled"),
        count("currentNumberScheduled"),
        count("numberReady"),
        count("updatedNumberScheduled"),
        count("numberAvailable"),
        json!(labels(object.deep(&["spec", "template", "spec", "nodeSelector"]))),
        object_age(object, now),
        names,
        images,
        json!(selector(object.deep(&["spec", "selector"]))),
    ]
}

/// Columns of StatefulSets.
pub(crate) const STATEFUL_SET: &[ColumnRow] =
    &[NAME, ColumnRow("Ready", "string", "Number of the pod with ready state", 0), AGE, CONTAINERS, IMAGES];

/// The row of a StatefulSet.
pub(crate) fn stateful_set(object: &Value, now: &str) -> Vec<Value> {
    let ready = format!("{}/{}", number(object, "status", "readyReplicas"), number(object, "spec", "replicas"));
    let [names, images] = containers(object.deep(&["spec", "template"]));
    vec![name(object), json!(ready), object_age(object, now), names, images]
}

/// Columns of Jobs.
pub(crate) const JOB: &[ColumnRow] = &[
    NAME,
    ColumnRow("Status", "string", "Status of the job.", 0),
    ColumnRow("Completions", "string", "The number of pods which reached phase Succeeded.", 0),
    ColumnRow("Duration", "string", "Time required to complete the job.", 0),
    AGE,
    CONTAINERS,
    IMAGES,
    SELECTOR,
];

/// The row of a Job.
pub(crate) fn job(object: &Value, now: &str) -> Vec<Value> {
    let (spec, status) = (object.at("spec"), object.at("status"));
    let succeeded = status.int("succeeded").unwrap_or(0);
    let parallelism = spec.int("parallelism").unwrap_or(0);
    let completions = match spec.int("completions") {
        Some(wanted) => format!("{succeeded}/{wanted}"),
        None if parallelism > 1 => format!("{succeeded}/1 of {parallelism}"),
        None => format!("{succeeded}/1"),
    };
    let took = match (status.text("startTime"), status.text("completionTime")) {
        ("", _) => String::new(),
        (start, "") => age(start, now),
        (start, end) => age(start, end),
    };
    let holds = |kind: &str| {
        status
            .list("conditions")
            .iter()
            .any(|condition| condition.text("type") == kind && condition.text("status") == "True")
    };
    let state = if holds("Complete") {
        "Complete"
    } else if holds("Failed") {
        "Failed"
    } else if object.at("metadata").has("deletionTimestamp") {
        "Terminating"
    } else {
        ["Suspended", "FailureTarget", "SuccessCriteriaMet"].into_iter().find(|kind| holds(kind)).unwrap_or("Running")
    };
    let [names, images] = containers(spec.at("template"));
    vec![
        name(object),
        json!(state),
        json!(completions),
        json!(took),
        object_age(object, now),
        names,
        images,
        json!(selector(spec.at("selector"))),
    ]
}

/// Columns of CronJobs.
pub(crate) const CRON_JOB: &[ColumnRow] = &[
    NAME,
    ColumnRow("Schedule", "string", "When it runs, in Cron format.", 0),
    ColumnRow("Timezone", "string", "The time zone of the schedule.", 0),
    ColumnRow("Suspend", "boolean", "Whether it is held.", 0),
    ColumnRow("Active", "integer", "Jobs that run now.", 0),
    ColumnRow("Last Schedule", "string", "When a job was last started.", 0),
    AGE,
    CONTAINERS,
    IMAGES,
    SELECTOR,
];

/// The row of a CronJob.
pub(crate) fn cron_job(object: &Value, now: &str) -> Vec<Value> {
    let (spec, status) = (object.at("spec"), object.at("status"));
    let last = status.text("lastScheduleTime");
    let zone = spec.text("timeZone");
    let job = spec.deep(&["jobTemplate", "spec"]);
    let [names, images] = containers(job.at("template"));
    vec![
        name(object),
        json!(spec.text("schedule")),
        json!(if zone.is_empty() { "<none>" } else { zone }),
        json!(if spec.flag("suspend") { "True" } else { "False" }),
        json!(status.list("active").len()),
        json!(if last.is_empty() { "<none>".to_owned() } else { age(last, now) }),
        object_age(object, now),
        names,
        images,
        json!(selector(job.at("selector"))),
    ]
}

/// Columns of PodTemplates.
pub(crate) const POD_TEMPLATE: &[ColumnRow] = &[
    NAME,
    ColumnRow("Containers", "string", "Names of each container in the template.", 0),
    ColumnRow("Images", "string", "Images referenced by each container in the template.", 0),
    ColumnRow("Pod Labels", "string", "The labels for the pod template.", 0),
];

/// The row of a PodTemplate.
pub(crate) fn pod_template(object: &Value, _now: &str) -> Vec<Value> {
    let [names, images] = containers(object.at("template"));
    vec![name(object), names, images, json!(labels(object.deep(&["template", "metadata", "labels"])))]
}

/// Columns of PodDisruptionBudgets.
pub(crate) const DISRUPTION_BUDGET: &[ColumnRow] = &[
    NAME,
    ColumnRow("Min Available", "string", "The minimum number of pods that must be available.", 0),
    ColumnRow("Max Unavailable", "string", "The maximum number of pods that may be unavailable.", 0),
    ColumnRow("Allowed Disruptions", "integer", "Calculated number of pods that may be disrupted at this time.", 0),
    AGE,
];

/// The row of a PodDisruptionBudget.
pub(crate) fn disruption_budget(object: &Value, now: &str) -> Vec<Value> {
    let limit = |field: &str| match object.at("spec").at(field) {
        Value::Null => json!("N/A"),
        Value::String(text) => json!(text),
        other => json!(other.to_string()),
    };
    let allowed = number(object, "status", "disruptionsAllowed");
    vec![name(object), limit("minAvailable"), limit("maxUnavailable"), json!(allowed), object_age(object, now)]
}

/// Columns of ControllerRevisions.
pub(crate) const CONTROLLER_REVISION: &[ColumnRow] = &[
    NAME,
    ColumnRow("Controller", "string", "Controller of the object", 0),
    ColumnRow("Revision", "string", "The number of this revision.", 0),
    AGE,
];

/// The row of a ControllerRevision.
pub(crate) fn controller_revision(object: &Value, now: &str) -> Vec<Value> {
    let owner = object.at("metadata").list("ownerReferences").iter().find(|owner| owner.flag("controller"));
    let owner = owner.map_or_else(
        || "<none>".to_owned(),
        |owner| {
            let group =
                owner.text("apiVersion").split_once('/').map(|(group, _)| format!(".{group}")).unwrap_or_default();
            format!("{}{group}/{}", owner.text("kind").to_lowercase(), owner.text("name"))
        },
    );
    vec![name(object), json!(owner), json!(object.int("revision").unwrap_or(0)), object_age(object, now)]
}

/// Columns of HorizontalPodAutoscalers.
pub(crate) const AUTOSCALER: &[ColumnRow] = &[
    NAME,
    ColumnRow("Reference", "string", "What is scaled.", 0),
    ColumnRow("Targets", "string", "The metrics that steer it.", 0),
    ColumnRow("MinPods", "string", "The fewest pods.", 0),
    ColumnRow("MaxPods", "string", "The most pods.", 0),
    ColumnRow("Replicas", "string", "Pods there are now.", 0),
    AGE,
];

/// The row of a HorizontalPodAutoscaler.
pub(crate) fn autoscaler(object: &Value, now: &str) -> Vec<Value> {
    let spec = object.at("spec");
    let target = spec.at("scaleTargetRef");
    let least = spec.int("minReplicas").map_or_else(|| "<unset>".to_owned(), |least| least.to_string());
    vec![
        name(object),
        json!(format!("{}/{}", target.text("kind"), target.text("name"))),
        json!(metrics(spec, object.at("status"))),
        json!(least),
        json!(spec.int("maxReplicas").unwrap_or(0)),
        json!(number(object, "status", "currentReplicas")),
        object_age(object, now),
    ]
}

fn metrics(spec: &Value, status: &Value) -> String {
    let list = spec.list("metrics");
    if list.is_empty() {
        return "<none>".to_owned();
    }
    let cell = |index: usize, metric: &Value| {
        let kind = metric.text("type");
        let field = kind
            .chars()
            .next()
            .map(|first| first.to_ascii_lowercase().to_string() + kind.get(1..).unwrap_or_default())
            .unwrap_or_default();
        let source = metric.at(&field);
        let current = status
            .list("currentMetrics")
            .get(index)
            .map(|metric| metric.at(&field).at("current"))
            .unwrap_or(&Value::Null);
        let target = source.at("target");
        let label = if matches!(kind, "Resource" | "ContainerResource") {
            format!("{}: ", source.text("name"))
        } else {
            String::new()
        };
        match target.int("averageUtilization") {
            Some(wanted) => {
                let now =
                    current.int("averageUtilization").map_or_else(|| "<unknown>".to_owned(), |now| format!("{now}%"));
                format!("{label}{now}/{wanted}%")
            }
            None => {
                let text = |value: &Value| {
                    ["averageValue", "value"]
                        .iter()
                        .map(|field| value.text(field))
                        .find(|text| !text.is_empty())
                        .unwrap_or("<unknown>")
                        .to_owned()
                };
                format!("{label}{}/{}", text(current), text(target))
            }
        }
    };
    let cells: Vec<String> = list.iter().enumerate().take(2).map(|(index, metric)| cell(index, metric)).collect();
    let text = cells.join(", ");
    if list.len() > 2 { format!("{text} + {} more...", list.len() - 2) } else { text }
}
