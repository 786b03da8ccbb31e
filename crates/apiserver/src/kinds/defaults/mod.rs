//! What the API server fills in when a field is left out.
//!
//! The values are those of Kubernetes' `SetDefaults_*` functions. Defaulting is idempotent and never changes a value
//! that was given.

mod config;
mod network;
mod pod;
mod workload;

pub(crate) use config::{cluster_role_binding, csi_driver, horizontal_pod_autoscaler, limit_range, namespace, node};
pub(crate) use config::{custom_resource_definition, persistent_volume, persistent_volume_claim, priority_class};
pub(crate) use config::{resource_list, secret, storage_class, webhook_configuration};
pub(crate) use network::{endpoint_slice, endpoints, ingress_class, network_policy, service};
pub(crate) use pod::{pod, pod_template};
pub(crate) use workload::{cron_job, daemon_set, deployment, job, replica_set, replication_controller, stateful_set};
