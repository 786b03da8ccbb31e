//! Rows of nodes, namespaces, configuration, events, storage and access rules.

use serde_json::{Value, json};

use super::{AGE, ColumnRow, NAME, age, name, object_age};
use crate::kinds::read::Read;

fn or(text: &str, fallback: &str) -> Value {
    json!(if text.is_empty() { fallback } else { text })
}

fn count(value: &Value) -> usize {
    value.as_object().map_or(0, serde_json::Map::len)
}

/// Columns of Nodes.
pub(crate) const NODE: &[ColumnRow] = &[
    NAME,
    ColumnRow("Status", "string", "The status of the node", 0),
    ColumnRow("Roles", "string", "The roles of the node", 0),
    AGE,
    ColumnRow("Version", "string", "Kubelet Version reported by the node.", 0),
    ColumnRow("Internal-IP", "string", "The node's address inside the cluster.", 1),
    ColumnRow("External-IP", "string", "The node's address outside the cluster.", 1),
    ColumnRow("OS-Image", "string", "OS Image reported by the node.", 1),
    ColumnRow("Kernel-Version", "string", "Kernel Version reported by the node.", 1),
    ColumnRow("Container-Runtime", "string", "ContainerRuntime Version reported by the node.", 1),
];

/// The row of a Node.
pub(crate) fn node(object: &Value, now: &str) -> Vec<Value> {
    let (status, info) = (object.at("status"), object.deep(&["status", "nodeInfo"]));
    let ready = status.list("conditions").iter().rev().find(|condition| condition.text("type") == "Ready");
    let mut state = match ready.map(|condition| condition.text("status")) {
        Some("True") => "Ready",
        Some(_) => "NotReady",
        None => "Unknown",
    }
    .to_owned();
    if object.at("spec").flag("unschedulable") {
        state.push_str(",SchedulingDisabled");
    }
    let mut roles: Vec<&str> = object
        .at("metadata")
        .entries("labels")
        .filter_map(|(key, value)| match key.strip_prefix("node-role.kubernetes.io/") {
            Some(role) => Some(role),
            None if key == "kubernetes.io/role" => value.as_str(),
            None => None,
        })
        .filter(|role| !role.is_empty())
        .collect();
    roles.sort_unstable();
    roles.dedup();
    let address = |kind: &str| {
        let found = status.list("addresses").iter().find(|address| address.text("type") == kind);
        json!(found.map_or("<none>", |address| address.text("address")))
    };
    vec![
        name(object),
        json!(state),
        or(&roles.join(","), "<none>"),
        object_age(object, now),
        json!(info.text("kubeletVersion")),
        address("InternalIP"),
        address("ExternalIP"),
        or(info.text("osImage"), "<unknown>"),
        or(info.text("kernelVersion"), "<unknown>"),
        or(info.text("containerRuntimeVersion"), "<unknown>"),
    ]
}

/// Columns of Namespaces.
pub(crate) const NAMESPACE: &[ColumnRow] =
    &[NAME, ColumnRow("Status", "string", "The status of the namespace", 0), AGE];

/// The row of a Namespace.
pub(crate) fn namespace(object: &Value, now: &str) -> Vec<Value> {
    vec![name(object), json!(object.at("status").text("phase")), object_age(object, now)]
}

/// Columns of ConfigMaps.
pub(crate) const CONFIG_MAP: &[ColumnRow] = &[NAME, ColumnRow("Data", "string", "How many entries it has.", 0), AGE];

/// The row of a ConfigMap.
pub(crate) fn config_map(object: &Value, now: &str) -> Vec<Value> {
    vec![name(object), json!(count(object.at("data")) + count(object.at("binaryData"))), object_age(object, now)]
}

/// Columns of Secrets.
pub(crate) const SECRET: &[ColumnRow] = &[
    NAME,
    ColumnRow("Type", "string", "What the secret is used for.", 0),
    ColumnRow("Data", "string", "How many entries it has.", 0),
    AGE,
];

/// The row of a Secret.
pub(crate) fn secret(object: &Value, now: &str) -> Vec<Value> {
    vec![name(object), json!(object.text("type")), json!(count(object.at("data"))), object_age(object, now)]
}

/// Columns of ServiceAccounts.
pub(crate) const SERVICE_ACCOUNT: &[ColumnRow] =
    &[NAME, ColumnRow("Secrets", "string", "How many secrets it names.", 0), AGE];

/// The row of a ServiceAccount.
pub(crate) fn service_account(object: &Value, now: &str) -> Vec<Value> {
    vec![name(object), json!(object.list("secrets").len()), object_age(object, now)]
}

/// Columns of Events, of both groups.
pub(crate) const EVENT: &[ColumnRow] = &[
    ColumnRow("Last Seen", "string", "The time at which the most recent occurrence of this event was recorded.", 0),
    ColumnRow("Type", "string", "Type of this event (Normal, Warning).", 0),
    ColumnRow("Reason", "string", "Why it happened, in one word.", 0),
    ColumnRow("Object", "string", "The object that this event is about.", 0),
    ColumnRow("Subobject", "string", "The part of the object.", 1),
    ColumnRow("Source", "string", "The component reporting this event.", 1),
    ColumnRow("Message", "string", "A human-readable description.", 0),
    ColumnRow("First Seen", "string", "The time at which the event was first recorded.", 1),
    ColumnRow("Count", "string", "The number of times this event has occurred.", 1),
    ColumnRow("Name", "string", "The event's own name.", 1),
];

/// The first of these fields that has text.
fn either<'a>(object: &'a Value, fields: &[&str]) -> &'a str {
    fields.iter().map(|field| object.text(field)).find(|text| !text.is_empty()).unwrap_or_default()
}

/// The row of an Event, of either group.
pub(crate) fn event(object: &Value, now: &str) -> Vec<Value> {
    let first = either(object, &["firstTimestamp", "deprecatedFirstTimestamp", "eventTime"]);
    let last = either(object, &["lastTimestamp", "deprecatedLastTimestamp"]);
    let mut count = object.int("count").or_else(|| object.int("deprecatedCount")).unwrap_or(0).max(1);
    let mut seen = age(if last.is_empty() { first } else { last }, now);
    let series = object.at("series");
    if !series.is_null() {
        seen = age(series.text("lastObservedTime"), now);
        count = series.int("count").unwrap_or(0);
    }
    let about = if object.has("regarding") { object.at("regarding") } else { object.at("involvedObject") };
    let kind = about.text("kind").to_lowercase();
    let target = if about.text("name").is_empty() { kind } else { format!("{kind}/{}", about.text("name")) };
    let source = if object.has("deprecatedSource") { object.at("deprecatedSource") } else { object.at("source") };
    let component = match source.text("component") {
        "" => either(object, &["reportingComponent", "reportingController"]),
        component => component,
    };
    let host = match source.text("host") {
        "" => object.text("reportingInstance"),
        host => host,
    };
    vec![
        json!(seen),
        json!(object.text("type")),
        json!(object.text("reason")),
        json!(target),
        json!(about.text("fieldPath")),
        json!(if host.is_empty() { component.to_owned() } else { format!("{component}, {host}") }),
        json!(either(object, &["message", "note"]).trim()),
        json!(age(first, now)),
        json!(count),
        name(object),
    ]
}

/// `RWO,ROX` for access modes.
fn access_modes(list: &[&str]) -> String {
    let known =
        [("ReadWriteOnce", "RWO"), ("ReadOnlyMany", "ROX"), ("ReadWriteMany", "RWX"), ("ReadWriteOncePod", "RWOP")];
    let short: Vec<&str> = known.iter().filter(|(mode, _)| list.contains(mode)).map(|(_, short)| *short).collect();
    short.join(",")
}

fn phase(object: &Value) -> Value {
    json!(if object.at("metadata").has("deletionTimestamp") {
        "Terminating"
    } else {
        object.at("status").text("phase")
    })
}

/// Columns of PersistentVolumes.
pub(crate) const VOLUME: &[ColumnRow] = &[
    NAME,
    ColumnRow("Capacity", "string", "What the volume can hold.", 0),
    ColumnRow("Access Modes", "string", "How it can be mounted.", 0),
    ColumnRow("Reclaim Policy", "string", "What happens when its claim goes.", 0),
    ColumnRow("Status", "string", "Whether it is available or bound.", 0),
    ColumnRow("Claim", "string", "The claim it is bound to.", 0),
    ColumnRow("StorageClass", "string", "StorageClass of the pv", 0),
    ColumnRow("VolumeAttributesClass", "string", "VolumeAttributesClass of the pv", 0),
    ColumnRow("Reason", "string", "Why it is in this status.", 0),
    AGE,
    ColumnRow("VolumeMode", "string", "Filesystem or Block.", 1),
];

/// The row of a PersistentVolume.
pub(crate) fn volume(object: &Value, now: &str) -> Vec<Value> {
    let spec = object.at("spec");
    let claim = spec.at("claimRef");
    let claimed =
        if claim.is_null() { String::new() } else { format!("{}/{}", claim.text("namespace"), claim.text("name")) };
    vec![
        name(object),
        or(spec.at("capacity").text("storage"), "0"),
        json!(access_modes(&spec.texts("accessModes"))),
        json!(spec.text("persistentVolumeReclaimPolicy")),
        phase(object),
        json!(claimed),
        json!(spec.text("storageClassName")),
        or(spec.text("volumeAttributesClassName"), "<unset>"),
        json!(object.at("status").text("reason")),
        object_age(object, now),
        or(spec.text("volumeMode"), "<unset>"),
    ]
}

/// Columns of PersistentVolumeClaims.
pub(crate) const CLAIM: &[ColumnRow] = &[
    NAME,
    ColumnRow("Status", "string", "Whether it is bound.", 0),
    ColumnRow("Volume", "string", "The volume it is bound to.", 0),
    ColumnRow("Capacity", "string", "What that volume can hold.", 0),
    ColumnRow("Access Modes", "string", "How it can be mounted.", 0),
    ColumnRow("StorageClass", "string", "StorageClass of the pvc", 0),
    ColumnRow("VolumeAttributesClass", "string", "VolumeAttributesClass of the pvc", 0),
    AGE,
    ColumnRow("VolumeMode", "string", "Filesystem or Block.", 1),
];

/// The row of a PersistentVolumeClaim.
pub(crate) fn claim(object: &Value, now: &str) -> Vec<Value> {
    let (spec, status) = (object.at("spec"), object.at("status"));
    let bound = !spec.text("volumeName").is_empty();
    vec![
        name(object),
        phase(object),
        json!(spec.text("volumeName")),
        if bound { or(status.at("capacity").text("storage"), "0") } else { json!("") },
        json!(if bound { access_modes(&status.texts("accessModes")) } else { String::new() }),
        json!(spec.text("storageClassName")),
        or(spec.text("volumeAttributesClassName"), "<unset>"),
        object_age(object, now),
        or(spec.text("volumeMode"), "<unset>"),
    ]
}

/// Columns of StorageClasses.
pub(crate) const STORAGE_CLASS: &[ColumnRow] = &[
    NAME,
    ColumnRow("Provisioner", "string", "What makes its volumes.", 0),
    ColumnRow("ReclaimPolicy", "string", "What happens to a volume when its claim goes.", 0),
    ColumnRow("VolumeBindingMode", "string", "When a volume is made and bound.", 0),
    ColumnRow("AllowVolumeExpansion", "string", "Whether volumes may grow.", 0),
    AGE,
];

/// The row of a StorageClass.
pub(crate) fn storage_class(object: &Value, now: &str) -> Vec<Value> {
    let default =
        object.deep(&["metadata", "annotations", "storageclass.kubernetes.io/is-default-class"]) == &json!("true");
    let shown = object.at("metadata").text("name");
    vec![
        json!(if default { format!("{shown} (default)") } else { shown.to_owned() }),
        json!(object.text("provisioner")),
        or(object.text("reclaimPolicy"), "Delete"),
        or(object.text("volumeBindingMode"), "Immediate"),
        json!(object.flag("allowVolumeExpansion")),
        object_age(object, now),
    ]
}

/// Columns of Leases.
pub(crate) const LEASE: &[ColumnRow] = &[NAME, ColumnRow("Holder", "string", "Who holds the lease.", 0), AGE];

/// The row of a Lease.
pub(crate) fn lease(object: &Value, now: &str) -> Vec<Value> {
    vec![name(object), json!(object.at("spec").text("holderIdentity")), object_age(object, now)]
}

/// Columns of RoleBindings and ClusterRoleBindings.
pub(crate) const BINDING: &[ColumnRow] = &[
    NAME,
    ColumnRow("Role", "string", "The role that is granted.", 0),
    AGE,
    ColumnRow("Users", "string", "Users in the binding", 1),
    ColumnRow("Groups", "string", "Groups in the binding", 1),
    ColumnRow("ServiceAccounts", "string", "ServiceAccounts in the binding", 1),
];

/// The row of a RoleBinding or ClusterRoleBinding.
pub(crate) fn binding(object: &Value, now: &str) -> Vec<Value> {
    let role = object.at("roleRef");
    let subjects = |kind: &str| {
        let named: Vec<String> = object
            .list("subjects")
            .iter()
            .filter(|subject| subject.text("kind") == kind)
            .map(|subject| match subject.text("namespace") {
                namespace if kind == "ServiceAccount" => format!("{namespace}/{}", subject.text("name")),
                _ => subject.text("name").to_owned(),
            })
            .collect();
        json!(named.join(", "))
    };
    vec![
        name(object),
        json!(format!("{}/{}", role.text("kind"), role.text("name"))),
        object_age(object, now),
        subjects("User"),
        subjects("Group"),
        subjects("ServiceAccount"),
    ]
}

/// Columns of ResourceQuotas.
pub(crate) const QUOTA: &[ColumnRow] = &[
    NAME,
    ColumnRow(
        "Request",
        "string",
        "Request represents a minimum amount of cpu/memory that a container may consume.",
        0,
    ),
    ColumnRow(
        "Limit",
        "string",
        "Limits control the maximum amount of cpu/memory that a container may use independent of contention on the node.",
        0,
    ),
    AGE,
];

/// The row of a ResourceQuota.
pub(crate) fn quota(object: &Value, now: &str) -> Vec<Value> {
    let status = object.at("status");
    let mut entries: Vec<(&String, &Value)> = status.entries("hard").collect();
    entries.sort_by_key(|(name, _)| name.as_str());
    let side = |limits: bool| {
        let cells: Vec<String> = entries
            .iter()
            .filter(|(name, _)| name.starts_with("limits.") == limits)
            .map(|(name, hard)| {
                let used = status.at("used").text(name);
                format!("{name}: {}/{}", if used.is_empty() { "0" } else { used }, hard.as_str().unwrap_or_default())
            })
            .collect();
        json!(cells.join(", "))
    };
    vec![name(object), side(false), side(true), object_age(object, now)]
}

/// Columns of PriorityClasses.
pub(crate) const PRIORITY_CLASS: &[ColumnRow] = &[
    NAME,
    ColumnRow("Value", "integer", "The priority that pods of this class get.", 0),
    ColumnRow("Global-Default", "boolean", "Whether pods without a class get it.", 0),
    AGE,
    ColumnRow("PreemptionPolicy", "string", "Whether it makes room by evicting others.", 0),
];

/// The row of a PriorityClass.
pub(crate) fn priority_class(object: &Value, now: &str) -> Vec<Value> {
    let value = object.int("value").unwrap_or(0);
    vec![
        name(object),
        json!(value),
        json!(object.flag("globalDefault")),
        object_age(object, now),
        json!(object.text("preemptionPolicy")),
    ]
}

/// Columns of CertificateSigningRequests.
pub(crate) const SIGNING_REQUEST: &[ColumnRow] = &[
    NAME,
    AGE,
    ColumnRow("SignerName", "string", "Who is asked to sign.", 0),
    ColumnRow("Requestor", "string", "Who asks.", 0),
    ColumnRow("RequestedDuration", "string", "For how long.", 0),
    ColumnRow("Condition", "string", "What became of it.", 0),
];

/// The row of a CertificateSigningRequest.
pub(crate) fn signing_request(object: &Value, now: &str) -> Vec<Value> {
    let (spec, status) = (object.at("spec"), object.at("status"));
    let holds = |kind: &str| status.list("conditions").iter().any(|condition| condition.text("type") == kind);
    let mut state = if holds("Denied") {
        "Denied"
    } else if holds("Approved") {
        "Approved"
    } else {
        "Pending"
    }
    .to_owned();
    if holds("Failed") {
        state.push_str(",Failed");
    }
    if !status.text("certificate").is_empty() {
        state.push_str(",Issued");
    }
    let duration = spec.int("expirationSeconds").map_or_else(|| "<none>".to_owned(), super::age::short);
    vec![
        name(object),
        object_age(object, now),
        or(spec.text("signerName"), "<none>"),
        json!(spec.text("username")),
        json!(duration),
        json!(state),
    ]
}

/// Columns of RuntimeClasses.
pub(crate) const RUNTIME_CLASS: &[ColumnRow] =
    &[NAME, ColumnRow("Handler", "string", "The runtime's name on the node.", 0), AGE];

/// The row of a RuntimeClass.
pub(crate) fn runtime_class(object: &Value, now: &str) -> Vec<Value> {
    vec![name(object), json!(object.text("handler")), object_age(object, now)]
}

/// Columns of webhook configurations.
pub(crate) const WEBHOOKS: &[ColumnRow] =
    &[NAME, ColumnRow("Webhooks", "integer", "How many webhooks it names.", 0), AGE];

/// The row of a webhook configuration.
pub(crate) fn webhooks(object: &Value, now: &str) -> Vec<Value> {
    vec![name(object), json!(object.list("webhooks").len()), object_age(object, now)]
}

/// Columns of kinds that show only name and age.
pub(crate) const NAME_AGE: &[ColumnRow] = &[NAME, AGE];

/// The row of [`NAME_AGE`].
pub(crate) fn name_age(object: &Value, now: &str) -> Vec<Value> {
    vec![name(object), object_age(object, now)]
}
