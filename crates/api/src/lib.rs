//! The client of the API server, for processes that run for years: a server that went silent is noticed in bounded time.
//!
//! A server's machine that vanishes takes its connections with it without a word, and so does a load balancer that forgets them: TCP
//! itself would wait for a quarter of an hour where something is under way, and for ever where nothing is. And somebody between may
//! go on acknowledging what nobody reads. [`Patience`] says how long each of these is waited for; whoever asked gets an
//! error, or the end of a watch, and asks again on another connection.
#![forbid(unsafe_code)]

mod deadlines;

use std::time::Duration;

use hyper_timeout::TimeoutConnector;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::retry::RetryPolicy;
use kube::client::{Body, ClientBuilder, ConfigExt};
use kube::{Client, Config, Error};
use tower::retry::RetryLayer;
use tower::{BoxError, ServiceBuilder};

use deadlines::Deadlines;
pub use deadlines::Silent;

/// How long a client waits for whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// For the peer's kernel to acknowledge anything, be it a probe of an idle connection (`TCP_USER_TIMEOUT`); whole seconds, four at least.
    pub peer: Duration,
    /// For the beginning of an answer.
    pub answer: Duration,
    /// Between parts of an answer. A large list over a slow line goes on coming.
    pub part: Duration,
    /// Between parts of a watch; after it the watch ends, and whoever watches begins again where it ended.
    pub watch: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            peer: Duration::from_secs(20),
            // kube-apiserver gives a request up itself by then (`--request-timeout`).
            answer: Duration::from_secs(60),
            part: Duration::from_secs(30),
            // kube-apiserver sends a bookmark about each minute, though not of a kind of which it has seen nothing happen; such a
            // watch is asked for twice as often as the 290 seconds that it would last.
            watch: Duration::from_secs(150),
        }
    }
}

/// A client by this configuration, with the patience of everyday.
///
/// # Errors
/// The configuration's certificates or credentials cannot be used.
pub fn client(config: Config) -> Result<Client, Error> {
    client_with(config, Patience::default())
}

/// The same with another patience.
///
/// # Errors
/// See [`client`].
pub fn client_with(config: Config, patience: Patience) -> Result<Client, Error> {
    let deadlines = Deadlines::new(patience);
    if config.proxy_url.is_some() {
        // Whether there is one that this build speaks, the library says.
        return Ok(ClientBuilder::try_from(config)?.with_layer(&deadlines).build());
    }
    let mut http = HttpConnector::new();
    http.enforce_http(false);
    http.set_keepalive(Some(patience.peer / 2));
    http.set_keepalive_interval(Some(patience.peer / 4));
    http.set_tcp_user_timeout(Some(patience.peer));
    let mut connector = TimeoutConnector::new(config.rustls_https_connector_with_connector(http)?);
    connector.set_connect_timeout(config.connect_timeout);
    connector.set_read_timeout(config.read_timeout);
    connector.set_write_timeout(config.write_timeout);
    let connections = hyper_util::client::legacy::Client::builder(TokioExecutor::new()).build::<_, Body>(connector);
    // As the library stacks them (`kube::client::ClientBuilder`), whose connector cannot be replaced.
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.default_retry.then(|| RetryLayer::new(RetryPolicy::server_retry())))
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .layer(deadlines)
        .map_err(BoxError::from)
        .service(connections);
    Ok(ClientBuilder::new(service, config.default_namespace).build())
}
