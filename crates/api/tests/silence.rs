//! Servers that go silent, each in its way.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test binary: a panic is how a test fails"
)]

use std::net::{SocketAddr, TcpListener};
use std::process::Command;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, ListParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::{WatchStreamExt, watcher};
use nix::sched::{CloneFlags, unshare};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use towpath_api::{Patience, client_with};
use towpath_apiserver::{ApiServer, Config};

const QUICK: Patience = Patience {
    peer: Duration::from_secs(4),
    answer: Duration::from_secs(2),
    part: Duration::from_secs(2),
    watch: Duration::from_secs(2),
};
/// No deadline of ours but that of the peer's kernel.
const LONG: Duration = Duration::from_secs(600);

struct Cluster {
    _server: ApiServer,
    _directory: tempfile::TempDir,
    address: SocketAddr,
    kubeconfig: String,
}

impl Cluster {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let server = ApiServer::start(Config::new(directory.path().join("data"))).await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        server.serve(listener).unwrap();
        let admin = server.client_credentials("admin", &["system:masters"]).unwrap();
        let kubeconfig = server.kubeconfig(&format!("https://{address}"), &admin);
        Self { _server: server, _directory: directory, address, kubeconfig }
    }

    /// ConfigMaps, as a client has them that reaches the server by this address.
    async fn objects(&self, by: SocketAddr, patience: Patience) -> Api<ConfigMap> {
        let parsed = Kubeconfig::from_yaml(&self.kubeconfig).unwrap();
        let mut config = kube::Config::from_custom_kubeconfig(parsed, &KubeConfigOptions::default()).await.unwrap();
        config.cluster_url = format!("https://{by}").parse().unwrap();
        Api::namespaced(client_with(config, patience).unwrap(), "default")
    }

    async fn create(&self, name: &str) {
        let api = self.objects(self.address, Patience::default()).await;
        api.create(&PostParams::default(), &named(name)).await.unwrap();
    }
}

fn named(name: &str) -> ConfigMap {
    let metadata = kube::api::ObjectMeta { name: Some(name.to_owned()), ..Default::default() };
    ConfigMap { metadata, ..ConfigMap::default() }
}

/// Stands in front of a server. When told so, it goes on taking what connections that are open bring, and passes nothing on.
struct Proxy {
    address: SocketAddr,
    silence: watch::Sender<u32>,
}

impl Proxy {
    async fn before(server: SocketAddr) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (silence, silenced) = watch::channel(0);
        tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let mut silenced = silenced.clone();
                silenced.mark_unchanged();
                tokio::spawn(async move {
                    let mut far = tokio::net::TcpStream::connect(server).await.unwrap();
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                        _ = silenced.changed() => {
                            tokio::io::copy(&mut near, &mut tokio::io::sink()).await.unwrap();
                        }
                    }
                });
            }
        });
        Self { address, silence }
    }

    fn silence_those_that_are_open(&self) {
        self.silence.send_modify(|times| *times += 1);
    }
}

/// Waits until a watch brings an object of that name; how long it took.
async fn comes(objects: &mut (impl StreamExt<Item = watcher::Result<ConfigMap>> + Unpin), name: &str) -> Duration {
    let begun = Instant::now();
    let found = async {
        loop {
            let object = objects.next().await.unwrap();
            if object.is_ok_and(|object| object.metadata.name.as_deref() == Some(name)) {
                return;
            }
        }
    };
    timeout(Duration::from_secs(60), found).await.unwrap_or_else(|_| panic!("{name} never came"));
    begun.elapsed()
}

fn watched(api: Api<ConfigMap>) -> impl StreamExt<Item = watcher::Result<ConfigMap>> + Unpin {
    watcher(api, watcher::Config::default()).default_backoff().applied_objects().boxed()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_somebody_between_has_forgotten_goes_on_by_another_connection() {
    let cluster = Cluster::start().await;
    let proxy = Proxy::before(cluster.address).await;
    let mut objects = watched(cluster.objects(proxy.address, QUICK).await);
    cluster.create("before").await;
    comes(&mut objects, "before").await;
    proxy.silence_those_that_are_open();
    cluster.create("after").await;
    let took = comes(&mut objects, "after").await;
    assert!(took < Duration::from_secs(15), "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_in_which_little_happens_loses_nothing() {
    let cluster = Cluster::start().await;
    let patience = Patience { watch: Duration::from_millis(300), ..QUICK };
    let mut objects = watched(cluster.objects(cluster.address, patience).await);
    for name in ["one", "two", "three"] {
        tokio::time::sleep(patience.watch * 2).await;
        cluster.create(name).await;
        comes(&mut objects, name).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_and_a_write_that_are_never_answered_are_given_up_and_say_so() {
    let cluster = Cluster::start().await;
    // It takes connections, and what they say, and answers nothing.
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let api = cluster.objects(mute.local_addr().unwrap(), QUICK).await;
    let proxy = Proxy::before(cluster.address).await;
    let halfway = cluster.objects(proxy.address, QUICK).await;
    halfway.list(&ListParams::default()).await.unwrap();
    proxy.silence_those_that_are_open();
    for asked in [
        timeout(LONG, api.list(&ListParams::default())).await.unwrap().map(drop),
        timeout(LONG, halfway.list(&ListParams::default())).await.unwrap().map(drop),
        timeout(LONG, api.create(&PostParams::default(), &named("written"))).await.unwrap().map(drop),
    ] {
        let error = format!("{:?}", asked.unwrap_err());
        assert!(error.contains("Silent") && error.contains("/api/v1/namespaces/default/configmaps"), "{error}");
    }
    halfway.list(&ListParams::default()).await.expect("the next goes by another connection");
}

/// In a network of its own, whose only device can be made to lose everything.
#[test]
fn a_peer_that_vanishes_without_a_word_is_noticed_by_its_kernel_saying_nothing() {
    if !nix::unistd::geteuid().is_root() {
        assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "needs root");
        eprintln!("skipped: needs root");
        return;
    }
    let in_a_network_of_its_own = || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let run = |command: &str| assert!(Command::new("sh").args(["-ec", command]).status().unwrap().success());
        run("ip link set lo up");
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let cluster = Cluster::start().await;
            let patience = Patience { answer: LONG, part: LONG, watch: LONG, ..QUICK };
            let api = cluster.objects(cluster.address, patience).await;
            let lines = api.watch(&Default::default(), "0").await.unwrap();
            let mut lines = std::pin::pin!(lines);
            run("nft 'add table ip cut; add chain ip cut in { type filter hook input priority 0; }; add rule ip cut in drop'");
            let begun = Instant::now();
            let ended = async { while let Ok(Some(_)) = lines.try_next().await {} };
            timeout(Duration::from_secs(60), ended).await.expect("it waits for ever");
            assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
        });
        runtime.shutdown_background();
    };
    std::thread::spawn(in_a_network_of_its_own).join().unwrap();
}
