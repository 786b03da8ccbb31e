//! The world of a live cluster, with the workloads that its pods belong to.

use std::path::Path;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1 as core;
use kube::Api;
use kube::api::ListParams;
use towpath_model::NamespacedName;

use super::objects::{Loaded, owner_of};
use crate::kubernetes;

/// Lists everything once.
///
/// # Errors
/// The API server does not answer or refuses.
pub(super) fn load(kubeconfig: Option<&Path>) -> Result<Loaded> {
    crate::client_runtime()?.block_on(async {
        let client = kubernetes::client(kubeconfig).await?;
        let mut loaded = Loaded { world: kubernetes::world(&client).await?, ..Loaded::default() };
        let pods = Api::<core::Pod>::all(client).list_metadata(&ListParams::default()).await;
        for pod in pods.context("could not list pods")?.items {
            let (Some(namespace), Some(name)) = (&pod.metadata.namespace, &pod.metadata.name) else { continue };
            let meta = serde_json::to_value(&pod.metadata).context("metadata of a pod")?;
            if let Some(owner) = owner_of(&meta, namespace) {
                loaded.owners.insert(NamespacedName::new(namespace, name), owner);
            }
        }
        Ok(loaded)
    })
}
