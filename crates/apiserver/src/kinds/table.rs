//! The built-in resources: names, scope, subresources and schema.

use k8s_openapi::api::{
    admissionregistration::v1 as admission, apps::v1 as apps, authentication::v1 as authentication,
    authorization::v1 as authorization, autoscaling::v2 as autoscaling, batch::v1 as batch,
    certificates::v1 as certificates, coordination::v1 as coordination, core::v1 as core, discovery::v1 as discovery,
    events::v1 as events, flowcontrol::v1 as flowcontrol, networking::v1 as networking, node::v1 as node,
    policy::v1 as policy, rbac::v1 as rbac, scheduling::v1 as scheduling, storage::v1 as storage,
};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1 as apiextensions;
use schemars::SchemaGenerator;

/// Adds the schema of one kind, and of all it refers to, to a generator.
pub(crate) type Root = fn(&mut SchemaGenerator);

/// Scope and subresources of a resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Served {
    /// Stored, no status subresource.
    Plain,
    /// Stored, with a status subresource.
    Status,
    /// Stored, with status and scale subresources.
    Scale,
    /// Create only, never stored.
    Review,
}

/// One built-in resource.
pub(crate) struct Row {
    pub(crate) group: &'static str,
    pub(crate) version: &'static str,
    pub(crate) kind: &'static str,
    pub(crate) plural: &'static str,
    pub(crate) short: &'static [&'static str],
    pub(crate) categories: &'static [&'static str],
    pub(crate) namespaced: bool,
    pub(crate) served: Served,
    /// Full name of the kind's schema.
    pub(crate) schema: &'static str,
    pub(crate) root: Root,
}

const ALL: &[&str] = &["all"];
const API: &[&str] = &["api-extensions"];
const NONE: &[&str] = &[];

macro_rules! rows {
    ($($group:literal $version:literal $package:literal { $($module:ident::$kind:ident $plural:literal $short:expr, $categories:expr, $namespaced:literal, $served:ident;)* })*) => {
        &[$($(Row {
            group: $group,
            version: $version,
            kind: stringify!($kind),
            plural: $plural,
            short: $short,
            categories: $categories,
            namespaced: $namespaced,
            served: Served::$served,
            schema: concat!($package, ".", stringify!($kind)),
            root: |generator| {
                generator.subschema_for::<$module::$kind>();
            },
        },)*)*]
    };
}

/// Every built-in resource, in the order discovery lists them.
pub(crate) static ROWS: &[Row] = rows! {
    "" "v1" "io.k8s.api.core.v1" {
        core::Binding "bindings" NONE, NONE, true, Review;
        core::ConfigMap "configmaps" &["cm"], NONE, true, Plain;
        core::Endpoints "endpoints" &["ep"], NONE, true, Plain;
        core::Event "events" &["ev"], NONE, true, Plain;
        core::LimitRange "limitranges" &["limits"], NONE, true, Plain;
        core::Namespace "namespaces" &["ns"], NONE, false, Status;
        core::Node "nodes" &["no"], NONE, false, Status;
        core::PersistentVolumeClaim "persistentvolumeclaims" &["pvc"], NONE, true, Status;
        core::PersistentVolume "persistentvolumes" &["pv"], NONE, false, Status;
        core::Pod "pods" &["po"], ALL, true, Status;
        core::PodTemplate "podtemplates" NONE, NONE, true, Plain;
        core::ReplicationController "replicationcontrollers" &["rc"], ALL, true, Scale;
        core::ResourceQuota "resourcequotas" &["quota"], NONE, true, Status;
        core::Secret "secrets" NONE, NONE, true, Plain;
        core::ServiceAccount "serviceaccounts" &["sa"], NONE, true, Plain;
        core::Service "services" &["svc"], ALL, true, Status;
    }
    "apps" "v1" "io.k8s.api.apps.v1" {
        apps::ControllerRevision "controllerrevisions" NONE, NONE, true, Plain;
        apps::DaemonSet "daemonsets" &["ds"], ALL, true, Status;
        apps::Deployment "deployments" &["deploy"], ALL, true, Scale;
        apps::ReplicaSet "replicasets" &["rs"], ALL, true, Scale;
        apps::StatefulSet "statefulsets" &["sts"], ALL, true, Scale;
    }
    "authentication.k8s.io" "v1" "io.k8s.api.authentication.v1" {
        authentication::SelfSubjectReview "selfsubjectreviews" NONE, NONE, false, Review;
        authentication::TokenReview "tokenreviews" NONE, NONE, false, Review;
    }
    "authorization.k8s.io" "v1" "io.k8s.api.authorization.v1" {
        authorization::LocalSubjectAccessReview "localsubjectaccessreviews" NONE, NONE, true, Review;
        authorization::SelfSubjectAccessReview "selfsubjectaccessreviews" NONE, NONE, false, Review;
        authorization::SelfSubjectRulesReview "selfsubjectrulesreviews" NONE, NONE, false, Review;
        authorization::SubjectAccessReview "subjectaccessreviews" NONE, NONE, false, Review;
    }
    "autoscaling" "v2" "io.k8s.api.autoscaling.v2" {
        autoscaling::HorizontalPodAutoscaler "horizontalpodautoscalers" &["hpa"], ALL, true, Status;
    }
    "batch" "v1" "io.k8s.api.batch.v1" {
        batch::CronJob "cronjobs" &["cj"], ALL, true, Status;
        batch::Job "jobs" NONE, ALL, true, Status;
    }
    "certificates.k8s.io" "v1" "io.k8s.api.certificates.v1" {
        certificates::CertificateSigningRequest "certificatesigningrequests" &["csr"], NONE, false, Status;
    }
    "networking.k8s.io" "v1" "io.k8s.api.networking.v1" {
        networking::IngressClass "ingressclasses" NONE, NONE, false, Plain;
        networking::Ingress "ingresses" &["ing"], NONE, true, Status;
        networking::IPAddress "ipaddresses" &["ip"], NONE, false, Plain;
        networking::NetworkPolicy "networkpolicies" &["netpol"], NONE, true, Plain;
        networking::ServiceCIDR "servicecidrs" NONE, NONE, false, Status;
    }
    "policy" "v1" "io.k8s.api.policy.v1" {
        policy::PodDisruptionBudget "poddisruptionbudgets" &["pdb"], NONE, true, Status;
    }
    "rbac.authorization.k8s.io" "v1" "io.k8s.api.rbac.v1" {
        rbac::ClusterRoleBinding "clusterrolebindings" NONE, NONE, false, Plain;
        rbac::ClusterRole "clusterroles" NONE, NONE, false, Plain;
        rbac::RoleBinding "rolebindings" NONE, NONE, true, Plain;
        rbac::Role "roles" NONE, NONE, true, Plain;
    }
    "storage.k8s.io" "v1" "io.k8s.api.storage.v1" {
        storage::CSIDriver "csidrivers" NONE, NONE, false, Plain;
        storage::CSINode "csinodes" NONE, NONE, false, Plain;
        storage::CSIStorageCapacity "csistoragecapacities" NONE, NONE, true, Plain;
        storage::StorageClass "storageclasses" &["sc"], NONE, false, Plain;
        storage::VolumeAttachment "volumeattachments" NONE, NONE, false, Status;
        storage::VolumeAttributesClass "volumeattributesclasses" &["vac"], NONE, false, Plain;
    }
    "admissionregistration.k8s.io" "v1" "io.k8s.api.admissionregistration.v1" {
        admission::MutatingAdmissionPolicy "mutatingadmissionpolicies" NONE, API, false, Plain;
        admission::MutatingAdmissionPolicyBinding "mutatingadmissionpolicybindings" NONE, API, false, Plain;
        admission::MutatingWebhookConfiguration "mutatingwebhookconfigurations" NONE, API, false, Plain;
        admission::ValidatingAdmissionPolicy "validatingadmissionpolicies" NONE, API, false, Status;
        admission::ValidatingAdmissionPolicyBinding "validatingadmissionpolicybindings" NONE, API, false, Plain;
        admission::ValidatingWebhookConfiguration "validatingwebhookconfigurations" NONE, API, false, Plain;
    }
    "apiextensions.k8s.io" "v1" "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1" {
        apiextensions::CustomResourceDefinition "customresourcedefinitions" &["crd", "crds"], API, false, Status;
    }
    "scheduling.k8s.io" "v1" "io.k8s.api.scheduling.v1" {
        scheduling::PriorityClass "priorityclasses" &["pc"], NONE, false, Plain;
    }
    "coordination.k8s.io" "v1" "io.k8s.api.coordination.v1" {
        coordination::Lease "leases" NONE, NONE, true, Plain;
    }
    "node.k8s.io" "v1" "io.k8s.api.node.v1" {
        node::RuntimeClass "runtimeclasses" NONE, NONE, false, Plain;
    }
    "discovery.k8s.io" "v1" "io.k8s.api.discovery.v1" {
        discovery::EndpointSlice "endpointslices" NONE, NONE, true, Plain;
    }
    "flowcontrol.apiserver.k8s.io" "v1" "io.k8s.api.flowcontrol.v1" {
        flowcontrol::FlowSchema "flowschemas" NONE, NONE, false, Status;
        flowcontrol::PriorityLevelConfiguration "prioritylevelconfigurations" NONE, NONE, false, Status;
    }
    "events.k8s.io" "v1" "io.k8s.api.events.v1" {
        events::Event "events" &["ev"], NONE, true, Plain;
    }
};

impl Row {
    /// Whether the kind keeps a `metadata.generation` that rises with its spec.
    pub(crate) fn has_generation(&self) -> bool {
        matches!(
            (self.group, self.kind),
            ("", "Pod" | "ReplicationController")
                | ("apps", "DaemonSet" | "Deployment" | "ReplicaSet" | "StatefulSet")
                | ("batch" | "policy" | "flowcontrol.apiserver.k8s.io", _)
                | ("networking.k8s.io", "NetworkPolicy" | "Ingress" | "IngressClass")
                | (
                    "discovery.k8s.io" | "admissionregistration.k8s.io" | "apiextensions.k8s.io" | "scheduling.k8s.io",
                    _
                )
        )
    }
}
