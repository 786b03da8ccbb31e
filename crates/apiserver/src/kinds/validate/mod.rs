//! Validation of objects with the field paths and wording of Kubernetes 1.36.
//!
//! Each function adds what it finds to a list of faults. Objects were defaulted and have the right types before they
//! get here. The checks and their order are those of `pkg/apis/*/validation`.

mod cluster;
mod config;
mod container;
mod definition;
mod endpoints;
mod environment;
mod ingress;
mod job;
mod pod;
mod policy;
mod probe;
mod rbac;
mod scheduling;
mod security;
mod service;
mod volume;
mod workload;

use serde_json::Value;

pub(crate) use cluster::{
    namespace, namespace_status, node, node_update, persistent_volume_claim, persistent_volume_claim_update,
};
pub(crate) use config::{
    config_map, config_map_update, lease, limit_range, priority_class, priority_class_update, resource_quota,
};
pub(crate) use config::{secret, secret_update, storage_class, storage_class_update};
pub(crate) use definition::{custom_resource_definition, custom_resource_definition_update};
pub(crate) use endpoints::{endpoint_slice, endpoint_slice_update, endpoints};
pub(crate) use ingress::{ingress, ingress_class, ingress_class_update, ip_address, service_cidr, service_cidr_update};
pub(crate) use job::{cron_job, job, job_update};
pub(crate) use pod::{first_status as first_pod_status, pod, pod_status, pod_template, pod_update};
pub(crate) use policy::{network_policy, network_policy_update, pod_disruption_budget};
pub(crate) use rbac::{role, role_binding, role_binding_update};
pub(crate) use service::{service, service_status, service_update};
pub(crate) use workload::{
    controller_revision, controller_revision_update, daemon_set, daemon_set_update, deployment, deployment_update,
    horizontal_pod_autoscaler, replica_set, replica_set_update, replication_controller, stateful_set,
    stateful_set_update, workload_status,
};

use super::fault::{Faults, Path};
use super::format;
use super::read::Read;

/// `must be greater than or equal to 0` when the number in this field is negative.
fn not_negative(object: &Value, field: &str, path: &Path, faults: &mut Faults) {
    if let Some(number) = object.int(field).filter(|number| *number < 0) {
        faults.invalid(&path.child(field), number, format::NOT_NEGATIVE);
    }
}

/// A port given by number or by name.
fn port_or_name(port: &Value, path: &Path, faults: &mut Faults) {
    match port {
        Value::String(name) => faults.invalid_each(path, name, format::port_name(name)),
        other => container::port_number(other.as_i64().unwrap_or(0), path, faults),
    }
}

/// An address in a field that predates strict checks; what the old object had already is left alone.
fn legacy_ip(text: &str, known: &[&str], path: &Path, faults: &mut Faults) {
    if !known.contains(&text) {
        faults.invalid_each(path, text, format::ip(text));
    }
}

/// A CIDR in a field that predates strict checks; what the old object had already is left alone.
fn legacy_cidr(text: &str, known: &[&str], path: &Path, faults: &mut Faults) {
    if !known.contains(&text) {
        faults.invalid_each(path, text, format::cidr(text));
    }
}

/// Whether these addresses are at most two, of different families.
fn dual_stack(addresses: &[&str]) -> bool {
    let families: Vec<bool> =
        addresses.iter().filter_map(|text| format::sloppy_ip(text)).map(|address| address.is_ipv6()).collect();
    families.contains(&true) && families.contains(&false)
}
