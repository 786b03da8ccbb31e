//! An embedded Kubernetes API server that kubectl and kube-rs talk to.
//!
//! # Embedding
//!
//! ```no_run
//! # async fn example() -> Result<(), towpath_apiserver::StartError> {
//! use towpath_apiserver::{ApiServer, Config, UserInfo};
//!
//! let config = Config::new("/var/lib/example/apiserver");
//! let server = ApiServer::start(config).await?;
//! // Any number of listeners that are bound already, for example one in each network namespace.
//! server.serve(std::net::TcpListener::bind("127.0.0.1:0").map_err(towpath_apiserver::StartError::Listen)?)?;
//! // Without TCP and TLS: a `tower::Service` that `kube::Client::new` takes as it is.
//! let service = server.loopback(UserInfo::admin());
//! # drop(service);
//! server.shutdown().await;
//! # Ok(())
//! # }
//! ```
//!
//! - `ApiServer` starts, serves, issues credentials and stops: `start(Config).await`, `serve(std::net::TcpListener)` (call
//!   it for each listener, on a tokio runtime), `loopback(UserInfo) -> Loopback`, `ca_pem() -> &str`,
//!   `client_credentials(user, &[group]) -> ClientCredentials { certificate_pem, key_pem }`,
//!   `kubeconfig(server_url, &ClientCredentials) -> String` (YAML), `token_kubeconfig(server_url, token) -> String`,
//!   `set_stream_handler(Arc<dyn StreamHandler>)`, `shutdown().await`. It is cheap to clone.
//! - [`streaming::StreamHandler`] is what the embedder implements so that `kubectl logs`, `exec`, `attach` and
//!   `port-forward` reach containers; register it with [`ApiServer::set_stream_handler`].
//! - [`Config`] has the ranges that Service addresses and node ports come from.
//!
//! The server knows the built-in kinds through [`kinds`] and makes custom ones from `CustomResourceDefinition` objects.
//! It runs no controller: nothing here makes ReplicaSets of Deployments or deletes what an owner leaves behind.
#![forbid(unsafe_code)]

pub mod auth;
pub mod config;
pub mod kinds;
pub mod openapi;
pub mod resource;
pub mod status;
pub mod streaming;

mod admission;
mod alloc;
mod bootstrap;
mod crd;
mod discovery;
mod meta;
mod patch;
mod registry;
mod request;
mod rest;
mod selector;
mod server;
mod store;
mod tls;

pub use auth::UserInfo;
pub use config::{Config, Durability};
pub use server::{ApiServer, Loopback, ResponseBody, StartError};
pub use status::ApiError;
pub use tls::ClientCredentials;
