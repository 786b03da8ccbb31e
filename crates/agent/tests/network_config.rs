//! How the agent follows the `NetworkConfig`, against an API server over TLS.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test binary: a panic is how a test fails"
)]

mod cluster;

use std::time::Duration;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use tokio::sync::watch as channel;
use tokio::time::timeout;
use towpath_agent::network_config::{changed, read};
use towpath_model::custom::{NetworkConfig, NetworkConfigSpec};
use towpath_plan::config::overlay;
use towpath_wire::config::AgentConfig;

use cluster::cluster;

const PATIENCE: Duration = Duration::from_secs(10);

/// The kind, without what the definition validates.
async fn define(client: &kube::Client) {
    let definition = json!({
        "metadata": {"name": "networkconfigs.towpath.dev"},
        "spec": {
            "group": "towpath.dev", "scope": "Cluster",
            "names": {"plural": "networkconfigs", "singular": "networkconfig", "kind": "NetworkConfig"},
            "versions": [{
                "name": "v1alpha1", "served": true, "storage": true, "subresources": {"status": {}},
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}},
            }],
        },
    });
    let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
    definitions.create(&PostParams::default(), &serde_json::from_value(definition).unwrap()).await.unwrap();
    let configs: Api<NetworkConfig> = Api::all(client.clone());
    timeout(PATIENCE, async { while configs.get_opt("default").await.is_err() {} }).await.unwrap();
}

struct Followed {
    configs: Api<NetworkConfig>,
    directory: tempfile::TempDir,
    told: channel::Receiver<Option<i64>>,
    following: tokio::task::JoinHandle<()>,
    _cluster: cluster::Cluster,
}

impl Followed {
    /// Follows an object with this spec, from its first generation on.
    async fn from(spec: NetworkConfigSpec) -> Self {
        let cluster = cluster().await;
        define(&cluster.client).await;
        let configs: Api<NetworkConfig> = Api::all(cluster.client.clone());
        configs.create(&PostParams::default(), &NetworkConfig::new(spec)).await.unwrap();
        let directory = tempfile::tempdir().unwrap();
        let config = AgentConfig { state_dir: directory.path().to_owned(), ..AgentConfig::default() };
        let usable = |spec: &NetworkConfigSpec| Ok(overlay(AgentConfig::default(), spec).map(drop)?);
        let in_force = read(&cluster.client, &config, usable).await.unwrap();
        assert_eq!(in_force.generation, Some(1));
        let (tell, told) = channel::channel(in_force.generation);
        let following = tokio::spawn(changed(cluster.client.clone(), config, in_force, tell, usable));
        Self { configs, directory, told, following, _cluster: cluster }
    }

    async fn says(&self, spec: Value) -> Option<i64> {
        let patch = json!([{"op": "add", "path": "/spec", "value": spec}]);
        let patch: Patch<()> = Patch::Json(serde_json::from_value(patch).unwrap());
        let object = self.configs.patch("default", &PatchParams::default(), &patch).await.unwrap();
        object.metadata.generation
    }

    /// Waits until this generation is told, and that nothing ended meanwhile.
    async fn tells(&mut self, generation: Option<i64>) {
        let told = timeout(PATIENCE, self.told.wait_for(|told| *told == generation)).await;
        told.unwrap_or_else(|_| panic!("{generation:?} is not told: {:?}", self.following)).expect("it ended");
        assert!(!self.following.is_finished(), "the agent would start again");
    }

    fn kept(&self) -> Value {
        let text = std::fs::read(self.directory.path().join("network-config.json")).unwrap();
        serde_json::from_slice(&text).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_is_taken_back_is_in_force_under_its_new_generation() {
    let spec = NetworkConfigSpec { mtu: Some(1300), ..NetworkConfigSpec::default() };
    let mut followed = Followed::from(spec).await;
    // What cannot be used is refused, and its generation is never told.
    assert_eq!(followed.says(json!({"mtu": 1300, "clusterDNS": ["nowhere"]})).await, Some(2));
    assert_eq!(followed.says(json!({"mtu": 1300})).await, Some(3));
    followed.told.changed().await.unwrap();
    assert_eq!(*followed.told.borrow_and_update(), Some(3));
    followed.tells(Some(3)).await;
    assert_eq!(followed.kept()["generation"], 3, "for a start while the API server is away");
    // Another spec is no matter of telling: the agent starts again with it.
    assert_eq!(followed.says(json!({"mtu": 1400})).await, Some(4));
    timeout(PATIENCE, &mut followed.following).await.expect("a change is followed").unwrap();
    assert_eq!(*followed.told.borrow(), Some(3), "what is not in force yet is not told");
    assert_eq!(
        (followed.kept()["generation"].clone(), followed.kept()["spec"]["mtu"].clone()),
        (4.into(), 1400.into())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_is_deleted_and_made_again_is_told_as_it_is_now() {
    let mut followed = Followed::from(NetworkConfigSpec::default()).await;
    assert_eq!(followed.says(json!({"mtu": null})).await, Some(2), "another text of the same");
    followed.tells(Some(2)).await;
    followed.configs.delete("default", &DeleteParams::default()).await.unwrap();
    followed.tells(None).await;
    let again = NetworkConfig::new(NetworkConfigSpec::default());
    followed.configs.create(&PostParams::default(), &again).await.unwrap();
    followed.tells(Some(1)).await;
}
