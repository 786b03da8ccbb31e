//! Table columns and cells as `kubectl get` shows them.

mod age;
mod cluster;
mod network;
mod pod;
mod workload;

use serde_json::{Value, json};

use super::read::Read;
use super::strategy::Rules;
use crate::resource::Column;

pub(crate) use age::age;

/// A column: name, type, description, priority.
pub(crate) struct ColumnRow(pub(crate) &'static str, pub(crate) &'static str, pub(crate) &'static str, pub(crate) i32);

impl ColumnRow {
    /// The column as the API sends it.
    pub(crate) fn column(&self) -> Column {
        let format = if self.0 == "Name" { "name" } else { "" };
        Column {
            name: self.0.into(),
            kind: self.1.into(),
            format: format.into(),
            description: self.2.into(),
            priority: self.3,
        }
    }
}

/// The name column, first everywhere.
pub(crate) const NAME: ColumnRow = ColumnRow(
    "Name",
    "string",
    "Name must be unique within a namespace. Is required when creating resources, although some resources may allow a client to request the generation of an appropriate name automatically.",
    0,
);
/// The age column.
pub(crate) const AGE: ColumnRow = ColumnRow(
    "Age",
    "string",
    "CreationTimestamp is a timestamp representing the server time when this object was created.",
    0,
);

/// Columns of kinds that have none of their own.
pub(crate) const PLAIN: &[ColumnRow] = &[
    NAME,
    ColumnRow(
        "Created At",
        "date",
        "CreationTimestamp is a timestamp representing the server time when this object was created.",
        0,
    ),
];

/// Cells of [`PLAIN`].
pub(crate) fn plain_row(object: &Value, _now: &str) -> Vec<Value> {
    let metadata = object.at("metadata");
    vec![json!(metadata.text("name")), json!(metadata.text("creationTimestamp"))]
}

/// The object's name.
pub(crate) fn name(object: &Value) -> Value {
    json!(object.deep(&["metadata", "name"]).as_str().unwrap_or_default())
}

/// The object's age.
pub(crate) fn object_age(object: &Value, now: &str) -> Value {
    json!(age(object.deep(&["metadata", "creationTimestamp"]).as_str().unwrap_or_default(), now))
}

/// Labels as `a=b,c=d`, sorted; `<none>` when there are none.
pub(crate) fn labels(labels: &Value) -> String {
    let mut pairs: Vec<String> = labels
        .as_object()
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
        .collect();
    pairs.sort();
    if pairs.is_empty() { "<none>".to_owned() } else { pairs.join(",") }
}

/// A `LabelSelector` as kubectl writes it: `app=web,tier in (a,b),!old`.
pub(crate) fn selector(selector: &Value) -> String {
    let mut parts: Vec<(String, String)> = selector
        .entries("matchLabels")
        .map(|(key, value)| (key.clone(), format!("{key}={}", value.as_str().unwrap_or_default())))
        .collect();
    for requirement in selector.list("matchExpressions") {
        let key = requirement.text("key");
        let mut values = requirement.texts("values");
        values.sort_unstable();
        let values = values.join(",");
        let text = match requirement.text("operator") {
            "In" => format!("{key} in ({values})"),
            "NotIn" => format!("{key} notin ({values})"),
            "Exists" => key.to_owned(),
            _ => format!("!{key}"),
        };
        parts.push((key.to_owned(), text));
    }
    parts.sort();
    let texts: Vec<String> = parts.into_iter().map(|(_, text)| text).collect();
    if texts.is_empty() { "<none>".to_owned() } else { texts.join(",") }
}

/// The rules with the columns of the kind in `row`.
pub(crate) fn with_columns(row: &super::table::Row, rules: Rules) -> Rules {
    type Cells = fn(&Value, &str) -> Vec<Value>;
    let (columns, cells): (&'static [ColumnRow], Cells) = match (row.group, row.kind) {
        ("", "Pod") => (pod::COLUMNS, pod::row),
        ("", "PodTemplate") => (workload::POD_TEMPLATE, workload::pod_template),
        ("", "ReplicationController") | ("apps", "ReplicaSet") => (workload::REPLICA_SET, workload::replica_set),
        ("apps", "Deployment") => (workload::DEPLOYMENT, workload::deployment),
        ("apps", "DaemonSet") => (workload::DAEMON_SET, workload::daemon_set),
        ("apps", "StatefulSet") => (workload::STATEFUL_SET, workload::stateful_set),
        ("apps", "ControllerRevision") => (workload::CONTROLLER_REVISION, workload::controller_revision),
        ("batch", "Job") => (workload::JOB, workload::job),
        ("batch", "CronJob") => (workload::CRON_JOB, workload::cron_job),
        ("autoscaling", _) => (workload::AUTOSCALER, workload::autoscaler),
        ("policy", _) => (workload::DISRUPTION_BUDGET, workload::disruption_budget),
        ("", "Service") => (network::SERVICE, network::service),
        ("", "Endpoints") => (network::ENDPOINTS, network::endpoints),
        ("discovery.k8s.io", _) => (network::ENDPOINT_SLICE, network::endpoint_slice),
        (_, "NetworkPolicy") => (network::NETWORK_POLICY, network::network_policy),
        (_, "Ingress") => (network::INGRESS, network::ingress),
        (_, "IngressClass") => (network::INGRESS_CLASS, network::ingress_class),
        (_, "ServiceCIDR") => (network::SERVICE_CIDR, network::service_cidr),
        (_, "IPAddress") => (network::IP_ADDRESS, network::ip_address),
        ("", "Node") => (cluster::NODE, cluster::node),
        ("", "Namespace") => (cluster::NAMESPACE, cluster::namespace),
        ("", "ConfigMap") => (cluster::CONFIG_MAP, cluster::config_map),
        ("", "Secret") => (cluster::SECRET, cluster::secret),
        ("", "ServiceAccount") => (cluster::SERVICE_ACCOUNT, cluster::service_account),
        (_, "Event") => (cluster::EVENT, cluster::event),
        ("", "PersistentVolume") => (cluster::VOLUME, cluster::volume),
        ("", "PersistentVolumeClaim") => (cluster::CLAIM, cluster::claim),
        ("", "ResourceQuota") => (cluster::QUOTA, cluster::quota),
        (_, "StorageClass") => (cluster::STORAGE_CLASS, cluster::storage_class),
        (_, "Lease") => (cluster::LEASE, cluster::lease),
        (_, "RoleBinding" | "ClusterRoleBinding") => (cluster::BINDING, cluster::binding),
        (_, "PriorityClass") => (cluster::PRIORITY_CLASS, cluster::priority_class),
        (_, "CertificateSigningRequest") => (cluster::SIGNING_REQUEST, cluster::signing_request),
        (_, "RuntimeClass") => (cluster::RUNTIME_CLASS, cluster::runtime_class),
        (_, "MutatingWebhookConfiguration" | "ValidatingWebhookConfiguration") => {
            (cluster::WEBHOOKS, cluster::webhooks)
        }
        ("" | "rbac.authorization.k8s.io" | "apiextensions.k8s.io", _) => (PLAIN, plain_row),
        _ => (cluster::NAME_AGE, cluster::name_age),
    };
    Rules { columns, row: cells, ..rules }
}
