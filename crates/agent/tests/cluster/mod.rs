//! An API server in a temporary directory and a client of it.
#![allow(missing_docs, reason = "a test's own module")]

#[allow(dead_code, reason = "not every test binary that shares this module meets faults")]
pub(crate) mod faults;

use std::net::TcpListener;

use kube::config::{KubeConfigOptions, Kubeconfig};
use towpath_apiserver::{ApiServer, Config};

pub(crate) struct Cluster {
    _server: ApiServer,
    _directory: tempfile::TempDir,
    config: kube::Config,
    pub(crate) client: kube::Client,
}

impl Cluster {
    /// A client whose requests meet faults.
    #[allow(dead_code, reason = "not every test binary that shares this module meets faults")]
    pub(crate) fn client_with(&self, faults: &faults::Faults) -> kube::Client {
        kube::client::ClientBuilder::try_from(self.config.clone()).unwrap().with_layer(faults).build()
    }
}

pub(crate) async fn cluster() -> Cluster {
    let directory = tempfile::tempdir().unwrap();
    let server = ApiServer::start(Config::new(directory.path().join("data"))).await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    server.serve(listener).unwrap();
    let admin = server.client_credentials("admin", &["system:masters"]).unwrap();
    let parsed = Kubeconfig::from_yaml(&server.kubeconfig(&url, &admin)).unwrap();
    let config = kube::Config::from_custom_kubeconfig(parsed, &KubeConfigOptions::default()).await.unwrap();
    let client = kube::Client::try_from(config.clone()).unwrap();
    Cluster { _server: server, _directory: directory, config, client }
}
