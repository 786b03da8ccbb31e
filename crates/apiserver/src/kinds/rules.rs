//! Which rules belong to which kind.

use serde_json::Value;

use super::defaults as d;
use super::metadata::NameRule;
use super::prepare as p;
use super::read::Read;
use super::selectable as s;
use super::strategy::Rules;
use super::table::Row;
use super::validate as v;

/// The rules of the kind in `row`.
pub(crate) fn of(row: &Row) -> Rules {
    let rules = match row.group {
        "" => core(row.kind),
        "apps" => apps(row.kind),
        "batch" => batch(row.kind),
        "networking.k8s.io" | "discovery.k8s.io" => network(row.kind),
        "rbac.authorization.k8s.io" => rbac(row.kind),
        _ => other(row.kind),
    };
    super::print::with_columns(row, rules)
}

fn core(kind: &str) -> Rules {
    let plain = Rules::PLAIN;
    match kind {
        "ConfigMap" => Rules { validate: v::config_map, validate_update: v::config_map_update, ..plain },
        "Endpoints" => Rules { default: d::endpoints, validate: v::endpoints, warnings: endpoints_warnings, ..plain },
        "Event" => Rules { selectable: s::event, ..plain },
        "LimitRange" => Rules { default: d::limit_range, validate: v::limit_range, ..plain },
        "Namespace" => Rules {
            name: NameRule::Label,
            default: d::namespace,
            create: p::namespace_create,
            update: p::namespace_update,
            validate: v::namespace,
            validate_status: v::namespace_status,
            selectable: s::namespace,
            ..plain
        },
        "Node" => Rules {
            default: d::node,
            validate: v::node,
            validate_update: v::node_update,
            validate_status: v::node_update,
            born_with_status: true,
            validate_again: false,
            selectable: s::node,
            ..plain
        },
        "PersistentVolume" => Rules { default: d::persistent_volume, create: p::volume_create, ..plain },
        "PersistentVolumeClaim" => Rules {
            default: d::persistent_volume_claim,
            create: p::volume_create,
            validate: v::persistent_volume_claim,
            validate_update: v::persistent_volume_claim_update,
            ..plain
        },
        "Pod" => Rules {
            default: d::pod,
            create: p::pod_create,
            status_update: p::pod_status,
            validate: v::pod,
            validate_update: v::pod_update,
            validate_status: v::pod_status,
            warnings: pod_warnings,
            selectable: s::pod,
            ..plain
        },
        "PodTemplate" => Rules { default: d::pod_template, validate: v::pod_template, ..plain },
        "ReplicationController" => Rules {
            default: d::replication_controller,
            create: p::workload_create,
            validate: v::replication_controller,
            validate_status: v::workload_status,
            selectable: s::replicas,
            ..plain
        },
        "ResourceQuota" => Rules { default: d::resource_list, validate: v::resource_quota, ..plain },
        "Secret" => Rules {
            default: d::secret,
            validate: v::secret,
            validate_update: v::secret_update,
            selectable: s::secret,
            ..plain
        },
        "Service" => Rules {
            name: NameRule::Label,
            default: d::service,
            create: p::service_create,
            update: p::service_update,
            validate: v::service,
            validate_update: v::service_update,
            validate_status: v::service_status,
            validate_again: false,
            warnings: service_warnings,
            selectable: s::service,
            ..plain
        },
        _ => plain,
    }
}

fn apps(kind: &str) -> Rules {
    let workload = Rules { create: p::workload_create, validate_status: v::workload_status, ..Rules::PLAIN };
    match kind {
        "ControllerRevision" => {
            Rules { validate: v::controller_revision, validate_update: v::controller_revision_update, ..Rules::PLAIN }
        }
        "DaemonSet" => {
            Rules { default: d::daemon_set, validate: v::daemon_set, validate_update: v::daemon_set_update, ..workload }
        }
        "Deployment" => {
            Rules { default: d::deployment, validate: v::deployment, validate_update: v::deployment_update, ..workload }
        }
        "ReplicaSet" => Rules {
            default: d::replica_set,
            validate: v::replica_set,
            validate_update: v::replica_set_update,
            selectable: s::replicas,
            ..workload
        },
        "StatefulSet" => Rules {
            default: d::stateful_set,
            validate: v::stateful_set,
            validate_update: v::stateful_set_update,
            ..workload
        },
        _ => Rules::PLAIN,
    }
}

fn batch(kind: &str) -> Rules {
    match kind {
        "Job" => Rules {
            default: d::job,
            create: p::job_create,
            validate: v::job,
            validate_update: v::job_update,
            validate_status: v::workload_status,
            selectable: s::job,
            ..Rules::PLAIN
        },
        _ => Rules { default: d::cron_job, validate: v::cron_job, ..Rules::PLAIN },
    }
}

fn network(kind: &str) -> Rules {
    let plain = Rules::PLAIN;
    match kind {
        "EndpointSlice" => Rules {
            default: d::endpoint_slice,
            validate: v::endpoint_slice,
            validate_update: v::endpoint_slice_update,
            ..plain
        },
        "Ingress" => Rules { validate: v::ingress, ..plain },
        "IngressClass" => Rules {
            default: d::ingress_class,
            validate: v::ingress_class,
            validate_update: v::ingress_class_update,
            ..plain
        },
        "IPAddress" => Rules { name: NameRule::Address, validate: v::ip_address, selectable: s::ip_address, ..plain },
        "NetworkPolicy" => Rules {
            default: d::network_policy,
            validate: v::network_policy,
            validate_update: v::network_policy_update,
            validate_again: false,
            ..plain
        },
        "ServiceCIDR" => Rules { validate: v::service_cidr, validate_update: v::service_cidr_update, ..plain },
        _ => plain,
    }
}

fn rbac(kind: &str) -> Rules {
    let plain = Rules { name: NameRule::PathSegment, ..Rules::PLAIN };
    match kind {
        "Role" | "ClusterRole" => Rules { validate: v::role, ..plain },
        _ => Rules {
            default: d::cluster_role_binding,
            validate: v::role_binding,
            validate_update: v::role_binding_update,
            ..plain
        },
    }
}

fn other(kind: &str) -> Rules {
    let plain = Rules::PLAIN;
    match kind {
        "HorizontalPodAutoscaler" => {
            Rules { default: d::horizontal_pod_autoscaler, validate: v::horizontal_pod_autoscaler, ..plain }
        }
        "PodDisruptionBudget" => Rules { validate: v::pod_disruption_budget, ..plain },
        "Lease" => Rules { validate: v::lease, ..plain },
        "PriorityClass" => Rules {
            default: d::priority_class,
            validate: v::priority_class,
            validate_update: v::priority_class_update,
            ..plain
        },
        "StorageClass" => Rules {
            default: d::storage_class,
            validate: v::storage_class,
            validate_update: v::storage_class_update,
            ..plain
        },
        "CSIDriver" => Rules { default: d::csi_driver, ..plain },
        "MutatingWebhookConfiguration" | "ValidatingWebhookConfiguration" => {
            Rules { default: d::webhook_configuration, ..plain }
        }
        "CustomResourceDefinition" => Rules {
            default: d::custom_resource_definition,
            validate: v::custom_resource_definition,
            validate_update: v::custom_resource_definition_update,
            ..plain
        },
        "CertificateSigningRequest" => Rules { name: NameRule::Any, selectable: s::signing_request, ..plain },
        "Event" => Rules { selectable: s::event, ..plain },
        _ => plain,
    }
}

fn endpoints_warnings(_object: &Value) -> Vec<String> {
    vec!["v1 Endpoints is deprecated in v1.33+; use discovery.k8s.io/v1 EndpointSlice".to_owned()]
}

fn pod_warnings(object: &Value) -> Vec<String> {
    let name = object.at("metadata").text("name");
    let complaints = super::format::dns_label(name);
    if complaints.is_empty() {
        return Vec::new();
    }
    let shown: Vec<String> = complaints;
    vec![format!(
        "metadata.name: this is used in the Pod's hostname, which can result in surprising behavior; a DNS label is recommended: [{}]",
        shown.join(", ")
    )]
}

fn service_warnings(object: &Value) -> Vec<String> {
    let spec = object.at("spec");
    let mut out = Vec::new();
    let headless = spec.text("clusterIP") == "None" || spec.texts("clusterIPs") == ["None"];
    if headless && !spec.text("loadBalancerIP").is_empty() {
        out.push("spec.loadBalancerIP is ignored for headless services".to_owned());
    }
    if headless && !spec.list("externalIPs").is_empty() {
        out.push("spec.externalIPs is ignored for headless services".to_owned());
    }
    if headless && !matches!(spec.text("sessionAffinity"), "" | "None") {
        out.push("spec.SessionAffinity is ignored for headless services".to_owned());
    }
    if spec.text("type") == "ExternalName" && !spec.list("externalIPs").is_empty() {
        out.push("spec.externalIPs is ignored when spec.type is \"ExternalName\"".to_owned());
    }
    if spec.text("type") != "ExternalName" && !spec.text("externalName").is_empty() {
        out.push("spec.externalName is ignored when spec.type is not \"ExternalName\"".to_owned());
    }
    out
}
