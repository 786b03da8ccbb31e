//! The server: starting, listening, the in-process entry, credentials and stopping.

use std::convert::Infallible;
use std::net::{IpAddr, TcpListener};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, PoisonError, RwLock};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::{Body, Bytes};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::alloc::ServiceAddresses;
use crate::auth::{Authenticator, RbacCache, TokenIssuer, UserInfo, certificate_user};
use crate::config::Config;
use crate::registry::Registry;
use crate::rest::{self, Who};
use crate::store::{Store, StoreError};
use crate::streaming::StreamHandler;
use crate::tls::{Authority, ClientCredentials};

/// The body of an answer; watches and logs are streams.
pub type ResponseBody = UnsyncBoxBody<Bytes, std::io::Error>;

/// How long open connections get to finish at shutdown.
const DRAIN: Duration = Duration::from_secs(2);
/// How long a client may take for its TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Why the server cannot start or listen.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A file of the data directory.
    #[error("{path}: {source}; check that the data directory is writable")]
    File {
        /// Which file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// Certificates or TLS.
    #[error("cannot {what}: {why}; removing ca.crt and ca.key from the data directory makes new ones")]
    Certificate {
        /// What was tried.
        what: &'static str,
        /// The library's words.
        why: String,
    },
    /// The object database.
    #[error(transparent)]
    Store(Box<dyn std::error::Error + Send + Sync>),
    /// A listener.
    #[error("cannot listen: {0}")]
    Listen(std::io::Error),
    /// The configuration contradicts itself.
    #[error("configuration: {0}")]
    Config(String),
    /// The first objects cannot be written.
    #[error("cannot create the initial objects: {0}")]
    Bootstrap(String),
}

impl From<StoreError> for StartError {
    fn from(error: StoreError) -> Self {
        Self::Store(Box::new(error))
    }
}

/// What all requests share.
pub(crate) struct Core {
    pub(crate) config: Config,
    pub(crate) store: Store,
    pub(crate) registry: Registry,
    pub(crate) rbac: RbacCache,
    pub(crate) authenticator: Authenticator,
    pub(crate) tokens: TokenIssuer,
    pub(crate) services: ServiceAddresses,
    pub(crate) closing: CancellationToken,
    pub(crate) openapi: crate::discovery::OpenApiCache,
    streams: RwLock<Option<Arc<dyn StreamHandler>>>,
    authority: Authority,
    tasks: TaskTracker,
}

impl Core {
    pub(crate) fn streams(&self) -> Option<Arc<dyn StreamHandler>> {
        self.streams.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The storage key of a resource, whatever its version.
    pub(crate) fn storage_key(&self, group: &str, plural: &str) -> String {
        match self.registry.served().any_version(group, plural) {
            Some(kind) => kind.storage_key.to_string(),
            None => format!("{group}/{plural}"),
        }
    }

    /// A task that ends with the server.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let closing = self.closing.clone();
        self.tasks.spawn(async move { closing.run_until_cancelled(task).await });
    }
}

/// A running API server. Clones are the same server; it runs until [`ApiServer::shutdown`].
#[derive(Clone)]
pub struct ApiServer {
    core: Arc<Core>,
    tls: Arc<rustls::ServerConfig>,
}

impl ApiServer {
    /// Opens the data directory and makes what every cluster has: namespaces, roles, the Service `default/kubernetes`.
    /// Needs a tokio runtime.
    pub async fn start(config: Config) -> Result<Self, StartError> {
        use std::os::unix::fs::DirBuilderExt;
        let directory = config.data_dir.clone();
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .map_err(|source| StartError::File { path: directory.clone(), source })?;
        let authority = Authority::open(&directory)?;
        let services = ServiceAddresses::new(&config)?;
        let tls = authority.server_config(&serving_names(&config, &services))?;
        let core = Arc::new(Core {
            store: Store::open(&directory.join("objects.redb"), config.durability)?,
            registry: Registry::new(crate::kinds::builtin()),
            rbac: RbacCache::default(),
            authenticator: Authenticator::new(&config.tokens, config.anonymous),
            tokens: TokenIssuer::open(&directory)?,
            services,
            closing: CancellationToken::new(),
            openapi: crate::discovery::OpenApiCache::default(),
            streams: RwLock::new(None),
            authority,
            tasks: TaskTracker::new(),
            config,
        });
        crate::crd::load(&core);
        core.services.load(&core);
        crate::bootstrap::run(&core).await?;
        Ok(Self { core, tls })
    }

    /// Serves on a bound listener until shutdown. May be called for several listeners, also ones of other network
    /// namespaces. Needs a tokio runtime.
    pub fn serve(&self, listener: TcpListener) -> Result<(), StartError> {
        listener.set_nonblocking(true).map_err(StartError::Listen)?;
        let listener = tokio::net::TcpListener::from_std(listener).map_err(StartError::Listen)?;
        let core = Arc::clone(&self.core);
        let acceptor = TlsAcceptor::from(Arc::clone(&self.tls));
        self.core.spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((stream, _)) => {
                        let connection = serve_connection(Arc::clone(&core), acceptor.clone(), stream);
                        core.tasks.spawn(connection);
                    }
                    Err(error) => {
                        // Out of file descriptors and the like: the listener stays usable.
                        tracing::warn!(%error, "a connection could not be accepted");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
            }
        });
        Ok(())
    }

    /// An in-process client entry: a `tower::Service` for `kube::Client::new`, acting as this user. It cannot upgrade
    /// connections, so exec, attach and port-forward need a listener.
    pub fn loopback(&self, user: UserInfo) -> Loopback {
        Loopback { core: Arc::clone(&self.core), user: user.authenticated() }
    }

    /// The CA certificate, PEM: what `kube-root-ca.crt` holds.
    pub fn ca_pem(&self) -> &str {
        self.core.authority.pem()
    }

    /// A new client certificate for a user in these groups (at most two).
    pub fn client_credentials(&self, user: &str, groups: &[&str]) -> Result<ClientCredentials, StartError> {
        self.core.authority.client(user, groups)
    }

    /// A kubeconfig (YAML, to be stored with mode 0600) that logs in with a client certificate.
    pub fn kubeconfig(&self, server_url: &str, credentials: &ClientCredentials) -> String {
        let user = format!(
            "client-certificate-data: {}\n    client-key-data: {}",
            base64_text(credentials.certificate_pem.as_bytes()),
            base64_text(credentials.key_pem.as_bytes())
        );
        self.kubeconfig_with(server_url, &user)
    }

    /// A kubeconfig (YAML, to be stored with mode 0600) that logs in with a bearer token.
    pub fn token_kubeconfig(&self, server_url: &str, token: &str) -> String {
        self.kubeconfig_with(server_url, &format!("token: {token:?}"))
    }

    fn kubeconfig_with(&self, server_url: &str, user: &str) -> String {
        let authority = base64_text(self.ca_pem().as_bytes());
        format!(
            "apiVersion: v1\nkind: Config\nclusters:\n- name: towpath\n  cluster:\n    server: {server_url}\n    \
             certificate-authority-data: {authority}\nusers:\n- name: towpath\n  user:\n    {user}\ncontexts:\n- name: \
             towpath\n  context:\n    cluster: towpath\n    user: towpath\ncurrent-context: towpath\n"
        )
    }

    /// Replaces the bearer tokens of [`Config::tokens`]. Requests that are under way, watches too, go on.
    pub fn set_tokens(&self, tokens: &[(String, UserInfo)]) {
        self.core.authenticator.set_tokens(tokens);
    }

    /// Registers who answers `log`, `exec`, `attach` and `portforward`.
    pub fn set_stream_handler(&self, handler: Arc<dyn StreamHandler>) {
        *self.core.streams.write().unwrap_or_else(PoisonError::into_inner) = Some(handler);
    }

    /// Ends watches and connections, writes everything to disk and closes the database.
    pub async fn shutdown(&self) {
        self.core.closing.cancel();
        self.core.tasks.close();
        if tokio::time::timeout(DRAIN * 2, self.core.tasks.wait()).await.is_err() {
            tracing::warn!("some connections of the API server did not end in time");
        }
        let core = Arc::clone(&self.core);
        if tokio::task::spawn_blocking(move || core.store.close()).await.is_err() {
            tracing::error!("closing the object database failed");
        }
    }
}

fn base64_text(bytes: &[u8]) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

fn serving_names(config: &Config, services: &ServiceAddresses) -> Vec<String> {
    let mut names: Vec<String> = [
        "localhost",
        "127.0.0.1",
        "::1",
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
    ]
    .map(str::to_owned)
    .to_vec();
    names.extend(services.first_addresses().iter().map(IpAddr::to_string));
    names.extend(config.advertise.iter().map(|(address, _)| address.to_string()));
    names.extend(config.certificate_names.iter().cloned());
    names.sort();
    names.dedup();
    names
}

async fn serve_connection(core: Arc<Core>, acceptor: TlsAcceptor, stream: TcpStream) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY was refused");
    }
    let stream = match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            tracing::debug!(%error, "a TLS handshake failed");
            return;
        }
        Err(_) => return,
    };
    let certificate = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(<[_]>::first)
        .and_then(|certificate| certificate_user(certificate));
    let certificate = Arc::new(certificate);
    let closing = core.closing.clone();
    let service = hyper::service::service_fn(move |request| {
        let who = Who::Presented(Arc::clone(&certificate));
        let core = Arc::clone(&core);
        async move { Ok::<_, Infallible>(rest::answer(core, who, request).await) }
    });
    let mut builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new());
    builder.http2().timer(TokioTimer::new()).max_concurrent_streams(1000);
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        () = closing.cancelled() => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            match tokio::time::timeout(DRAIN, connection).await {
                Ok(ended) => ended,
                Err(_) => return,
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended with an error");
    }
}

/// The in-process client entry. See [`ApiServer::loopback`].
#[derive(Clone)]
pub struct Loopback {
    core: Arc<Core>,
    user: UserInfo,
}

impl<B> tower::Service<Request<B>> for Loopback
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: std::fmt::Display,
{
    type Response = Response<ResponseBody>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let core = Arc::clone(&self.core);
        let who = Who::Known(self.user.clone());
        let answer: Pin<Box<dyn Future<Output = _> + Send>> =
            Box::pin(async move { Ok(rest::answer(core, who, request).await) });
        answer
    }
}
