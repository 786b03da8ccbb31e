//! The API server by plain requests, for tests that write hundreds of objects a minute: `kubectl proxy` on a socket of this test alone.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::cluster::{Cluster, wait};
use crate::containerd::Owned;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// A way to a lab's API server. Dropping it ends the proxy.
#[derive(Debug)]
pub struct Api {
    socket: PathBuf,
    _proxy: Owned,
}

impl Api {
    /// Starts a proxy.
    ///
    /// # Errors
    /// There is no `kubectl`, or it does not begin to answer.
    pub fn of(cluster: &Cluster) -> Result<Self> {
        let socket = std::env::temp_dir().join(format!("towpath-{}-{}.sock", cluster.name(), std::process::id()));
        let mut command = Command::new("kubectl");
        command.env("KUBECONFIG", cluster.kubeconfig()).arg("proxy");
        command.arg(format!("--unix-socket={}", socket.display()));
        let proxy = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let api = Self { socket, _proxy: Owned(proxy.context("start kubectl proxy")?) };
        wait("kubectl proxy to answer", Duration::from_secs(10), || api.get("/api/v1/namespaces/default"))?;
        Ok(api)
    }

    /// One request; the object that the server answers with.
    ///
    /// # Errors
    /// The server refuses: its message; or there is no answer that can be understood.
    pub fn ask(&self, method: &str, path: &str, body: Option<(&str, &Value)>) -> Result<Value> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let (kind, text) = body.map_or(("application/json", String::new()), |(kind, value)| (kind, value.to_string()));
        // HTTP/1.0: the answer is as long as the connection lasts.
        let head = format!(
            "{method} {path} HTTP/1.0\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n",
            text.len()
        );
        stream.write_all(head.as_bytes())?;
        stream.write_all(text.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).with_context(|| format!("{method} {path}"))?;
        let (head, body) = answer.split_once("\r\n\r\n").with_context(|| format!("{method} {path}: {answer:?}"))?;
        let code = head.split(' ').nth(1).unwrap_or_default();
        ensure!(code.starts_with('2'), "{method} {path}: {code}: {body}");
        serde_json::from_str(body).with_context(|| format!("{method} {path}: {body:?}"))
    }

    /// An object, or a list.
    ///
    /// # Errors
    /// As [`Api::ask`].
    pub fn get(&self, path: &str) -> Result<Value> {
        self.ask("GET", path, None)
    }

    /// The objects of a list.
    ///
    /// # Errors
    /// As [`Api::ask`].
    pub fn list(&self, path: &str) -> Result<Vec<Value>> {
        match self.get(path)?.get_mut("items").map(Value::take) {
            Some(Value::Array(items)) => Ok(items),
            other => bail!("{path} is no list: {other:?}"),
        }
    }

    /// Makes an object in a collection.
    ///
    /// # Errors
    /// As [`Api::ask`].
    pub fn create(&self, collection: &str, object: &Value) -> Result<Value> {
        self.ask("POST", collection, Some(("application/json", object)))
    }

    /// Puts another `spec` in the place of an object's.
    ///
    /// # Errors
    /// As [`Api::ask`].
    pub fn replace_spec(&self, path: &str, spec: &Value) -> Result<Value> {
        let patch = serde_json::json!([{"op": "replace", "path": "/spec", "value": spec}]);
        self.ask("PATCH", path, Some(("application/json-patch+json", &patch)))
    }

    /// Sets labels; `null` takes one off.
    ///
    /// # Errors
    /// As [`Api::ask`].
    pub fn label(&self, path: &str, labels: &Value) -> Result<Value> {
        let patch = serde_json::json!({"metadata": {"labels": labels}});
        self.ask("PATCH", path, Some(("application/merge-patch+json", &patch)))
    }

    /// Deletes an object at once.
    ///
    /// # Errors
    /// As [`Api::ask`].
    pub fn delete(&self, path: &str) -> Result<Value> {
        self.ask("DELETE", path, None)
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        let _gone = std::fs::remove_file(&self.socket);
    }
}

/// Address of the API server as a node's agent has it.
///
/// # Errors
/// The agent has no connection to it at the moment.
pub fn server_address(cluster: &Cluster, node: &str) -> Result<String> {
    let said = cluster.node(node, "ss -Htn state established '( dport = :6443 )' | head -1")?;
    let peer = said.out.split_whitespace().last();
    let peer = peer.with_context(|| format!("{node} has no connection to the API server: {}", said.all()))?;
    let address = peer.rsplit_once(':').context("no port")?.0;
    Ok(address.trim_matches(['[', ']']).to_owned())
}

/// From now on what the node sends to the API server reaches nobody.
///
/// # Errors
/// `ip` failed.
pub fn cut_off(cluster: &Cluster, node: &str, server: &str) -> Result<()> {
    let cut = format!("ip neigh replace {server} lladdr 02:00:00:00:00:99 dev eth0 nud permanent");
    let said = cluster.node(node, &cut)?;
    ensure!(said.ok, "{cut} on {node}: {}", said.all());
    Ok(())
}

/// It arrives again.
///
/// # Errors
/// `ip` failed.
pub fn join_again(cluster: &Cluster, node: &str, server: &str) -> Result<()> {
    let said = cluster.node(node, &format!("ip neigh del {server} dev eth0"))?;
    ensure!(said.ok, "ip neigh del {server} on {node}: {}", said.all());
    Ok(())
}
