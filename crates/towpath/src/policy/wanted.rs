//! What must be in force: objects with their versions, as the API server has them at one moment.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::networking::v1 as networking;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, ListParams};
use kube::core::{ObjectList, PartialObjectMeta};
use towpath_model::NamespacedName;
use towpath_model::cluster_policy::object::ClusterNetworkPolicy;

use crate::kubernetes;

/// A kind that decides over packets, as the agents call it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Namespace,
    NetworkPolicy,
    ClusterNetworkPolicy,
    Pod,
}

impl Kind {
    /// The name under which agents tell of it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::NetworkPolicy => "NetworkPolicy",
            Self::ClusterNetworkPolicy => "ClusterNetworkPolicy",
            Self::Pod => "Pod",
        }
    }

    /// Of what a person types: singular, plural or short name.
    fn typed(text: &str) -> Result<Self> {
        Ok(match text.to_ascii_lowercase().as_str() {
            "namespace" | "namespaces" | "ns" => Self::Namespace,
            "networkpolicy" | "networkpolicies" | "netpol" => Self::NetworkPolicy,
            "clusternetworkpolicy" | "clusternetworkpolicies" | "cnp" => Self::ClusterNetworkPolicy,
            "pod" | "pods" | "po" => Self::Pod,
            other => bail!("{other:?} is none of networkpolicy, clusternetworkpolicy, namespace, pod"),
        })
    }

    fn has_namespace(self) -> bool {
        matches!(self, Self::NetworkPolicy | Self::Pod)
    }
}

/// An object: its kind, and its name as the agents have it (`name`, or `namespace/name`).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Object {
    pub(super) kind: Kind,
    pub(super) name: String,
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.kind.name().to_lowercase(), self.name)
    }
}

/// Objects and the versions that must be in force.
#[derive(Clone, Debug, Default)]
pub(super) struct Wanted {
    pub(super) objects: BTreeMap<Object, u64>,
    /// Kinds of which these are all objects that there were at a version: others up to it must not be in force.
    pub(super) complete: BTreeMap<Kind, u64>,
}

fn version(meta: &ObjectMeta) -> Result<u64> {
    let text = meta.resource_version.as_deref().unwrap_or_default();
    text.parse().with_context(|| {
        format!(
            "{} has resourceVersion {text:?}, which is no number: it cannot be compared",
            meta.name.as_deref().unwrap_or("an object")
        )
    })
}

impl Wanted {
    /// As the API server has them now.
    ///
    /// # Errors
    /// It does not answer or refuses, or there is no such object.
    pub(super) async fn now(client: &kube::Client, typed: &[String], namespace: Option<&str>) -> Result<Self> {
        if typed.is_empty() {
            return Self::everything(client).await;
        }
        let default = kubernetes::default_namespace(client);
        let mut wanted = Self::default();
        for text in typed {
            let object = object(text, namespace.unwrap_or(&default))?;
            let version = of_one(client, &object).await.with_context(|| format!("could not get {object}"))?;
            wanted.objects.insert(object, version);
        }
        Ok(wanted)
    }

    async fn everything(client: &kube::Client) -> Result<Self> {
        let mut wanted = Self::default();
        let params = ListParams::default();
        let namespaces = Api::<core::Namespace>::all(client.clone()).list_metadata(&params).await;
        wanted.take(Kind::Namespace, namespaces.context("could not list namespaces")?)?;
        let policies = Api::<networking::NetworkPolicy>::all(client.clone()).list_metadata(&params).await;
        wanted.take(Kind::NetworkPolicy, policies.context("could not list networkpolicies")?)?;
        match Api::<ClusterNetworkPolicy>::all(client.clone()).list_metadata(&params).await {
            Ok(list) => wanted.take(Kind::ClusterNetworkPolicy, list)?,
            // The kind is not installed.
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => return Err(error).context("could not list clusternetworkpolicies"),
        }
        Ok(wanted)
    }

    fn take<K: Clone>(&mut self, kind: Kind, list: ObjectList<PartialObjectMeta<K>>) -> Result<()> {
        let at = list.metadata.resource_version.unwrap_or_default();
        let at = at
            .parse()
            .with_context(|| format!("the list of {kind:?} has resourceVersion {at:?}, which is no number"))?;
        self.complete.insert(kind, at);
        for item in list.items {
            let meta = item.metadata;
            let name = meta.name.clone().unwrap_or_default();
            let name = match &meta.namespace {
                Some(namespace) => NamespacedName::new(namespace, &name).to_string(),
                None => name,
            };
            self.objects.insert(Object { kind, name }, version(&meta)?);
        }
        Ok(())
    }
}

fn object(text: &str, namespace: &str) -> Result<Object> {
    let (kind, name) = text.split_once('/').with_context(|| format!("{text:?} is not KIND/NAME"))?;
    let kind = Kind::typed(kind)?;
    let name = if kind.has_namespace() { NamespacedName::new(namespace, name).to_string() } else { name.to_owned() };
    Ok(Object { kind, name })
}

async fn of_one(client: &kube::Client, object: &Object) -> Result<u64> {
    let (namespace, name) = object.name.split_once('/').unwrap_or(("", &object.name));
    let meta = match object.kind {
        Kind::Namespace => Api::<core::Namespace>::all(client.clone()).get_metadata(name).await?.metadata,
        Kind::ClusterNetworkPolicy => {
            Api::<ClusterNetworkPolicy>::all(client.clone()).get_metadata(name).await?.metadata
        }
        Kind::NetworkPolicy => {
            Api::<networking::NetworkPolicy>::namespaced(client.clone(), namespace).get_metadata(name).await?.metadata
        }
        Kind::Pod => Api::<core::Pod>::namespaced(client.clone(), namespace).get_metadata(name).await?.metadata,
    };
    version(&meta)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_is_what_a_person_types_by_any_of_its_names() {
        let of = |text: &str| object(text, "red").map(|object| object.to_string()).map_err(|error| error.to_string());
        for text in ["netpol/a", "NetworkPolicy/a", "networkpolicies/a"] {
            assert_eq!(of(text).as_deref(), Ok("networkpolicy/red/a"), "{text}");
        }
        assert_eq!(of("ns/a").as_deref(), Ok("namespace/a"));
        assert_eq!(of("cnp/a").as_deref(), Ok("clusternetworkpolicy/a"));
        assert_eq!(of("po/a").as_deref(), Ok("pod/red/a"));
        assert!(of("service/a").unwrap_err().contains("none of"));
        assert!(of("a").unwrap_err().contains("KIND/NAME"));
    }
}
