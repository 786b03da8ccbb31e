//! Calls CNI plugins as libcni and containerd do.
//!
//! `lo` first (containerd's own `cni-loopback` list), then the first configuration of the node's directory as `eth0`:
//! each plugin of the list in turn with the result of the one before; DEL in reverse with the cached result.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use super::spawn::{self, Namespaces, ProcessNamespace};

/// Versions of the specification that this runtime speaks, newest first.
const SUPPORTED: [&str; 6] = ["1.1.0", "1.0.0", "0.4.0", "0.3.1", "0.3.0", "0.2.0"];
/// How long one plugin may take, as the kubelet's runtime request time-out allows.
const PLUGIN_TIMEOUT: Duration = Duration::from_secs(110);

/// A network configuration list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct NetworkList {
    name: String,
    version: String,
    plugins: Vec<Map<String, Value>>,
}

/// A published port (`hostPort`), as the `portMappings` capability has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PortMapping {
    /// Port on the node.
    pub(crate) host_port: u16,
    /// Port of the container.
    pub(crate) container_port: u16,
    /// `tcp`, `udp` or `sctp`.
    pub(crate) protocol: String,
    /// Address on the node.
    #[serde(rename = "hostIP", skip_serializing_if = "String::is_empty")]
    pub(crate) host_ip: String,
}

/// One attachment to make or remove.
#[derive(Clone, Debug)]
pub(crate) struct Attachment {
    /// Sandbox id.
    pub(crate) container_id: String,
    /// The pod's network namespace.
    pub(crate) netns: PathBuf,
    /// Pod namespace, name and uid.
    pub(crate) pod: (String, String, String),
    /// hostPorts.
    pub(crate) port_mappings: Vec<PortMapping>,
    /// What its annotations limit, as the `bandwidth` capability has it; none: nothing.
    pub(crate) bandwidth: Option<Value>,
    /// File that keeps the result for DEL.
    pub(crate) cache: PathBuf,
}

/// Where and how plugins run on one node.
#[derive(Clone, Debug)]
pub(crate) struct Cni {
    /// Configuration directory.
    pub(crate) conf_dir: PathBuf,
    /// Plugin directories.
    pub(crate) bin_dirs: Vec<PathBuf>,
    /// The node's network namespace, in which plugins run.
    pub(crate) node_netns: PathBuf,
}

#[derive(Serialize, Deserialize)]
struct Cached {
    list: NetworkList,
    result: Value,
}

/// A plugin's answer to failure.
#[derive(Debug, Deserialize)]
struct PluginError {
    #[serde(default)]
    code: u32,
    #[serde(default)]
    msg: String,
    #[serde(default)]
    details: String,
}

impl NetworkList {
    /// Understands the text of a `.conflist` or, as a list of one, of a `.conf` file.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let object: Map<String, Value> =
            serde_json::from_str(text).context("the CNI configuration is not a JSON object")?;
        let name = object.get("name").and_then(Value::as_str).context("the CNI configuration has no name")?.to_owned();
        let version = pick_version(&object)?;
        let plugins = match object.get("plugins") {
            None => vec![object.clone()],
            Some(Value::Array(list)) => list
                .iter()
                .map(|item| item.as_object().cloned().context("a plugin of the CNI configuration is not an object"))
                .collect::<Result<_>>()?,
            Some(_) => bail!("plugins of the CNI configuration is not a list"),
        };
        if plugins.is_empty() || plugins.iter().any(|p| p.get("type").and_then(Value::as_str).is_none()) {
            bail!("the CNI configuration {name:?} names no plugin, or one without a type");
        }
        Ok(Self { name, version, plugins })
    }

    /// containerd's own list for the loopback device.
    fn loopback() -> Self {
        let plugin = Map::from_iter([("type".to_owned(), json!("loopback"))]);
        Self { name: "cni-loopback".to_owned(), version: "0.3.1".to_owned(), plugins: vec![plugin] }
    }
}

/// The newest version that both sides speak: of `cniVersions` (1.1.0) when given, else `cniVersion`.
fn pick_version(object: &Map<String, Value>) -> Result<String> {
    let single = object.get("cniVersion").and_then(Value::as_str).unwrap_or("0.1.0");
    let offered: Vec<&str> = match object.get("cniVersions").and_then(Value::as_array) {
        Some(list) => list.iter().filter_map(Value::as_str).chain([single]).collect(),
        None => vec![single],
    };
    SUPPORTED.iter().find(|known| offered.contains(*known)).map(|known| (*known).to_owned()).with_context(|| {
        format!("the CNI configuration offers versions {offered:?}; this runtime speaks {SUPPORTED:?}")
    })
}

impl Cni {
    /// The node's configuration: the first file by name that is one; none while there is no such file.
    pub(crate) fn load(&self) -> Result<Option<NetworkList>> {
        let Ok(entries) = std::fs::read_dir(&self.conf_dir) else { return Ok(None) };
        let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        files.retain(|f| f.extension().is_some_and(|e| e == "conflist" || e == "conf" || e == "json"));
        files.sort();
        let mut last = None;
        for file in files {
            let text = std::fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
            match NetworkList::parse(&text) {
                Ok(list) => return Ok(Some(list)),
                Err(error) => last = Some(error.context(format!("in {}", file.display()))),
            }
        }
        last.map_or(Ok(None), Err)
    }

    /// Asks the list's plugins whether they are ready (STATUS, from 1.1.0 on).
    pub(crate) async fn status(&self, list: &NetworkList) -> Result<()> {
        if list.version != "1.1.0" {
            return Ok(());
        }
        for plugin in &list.plugins {
            let config = plugin_config(list, plugin, None, None);
            self.call("STATUS", plugin, &config, None, "").await?;
        }
        Ok(())
    }

    /// Attaches the pod: `lo`, then `eth0`. Returns the pod's addresses.
    pub(crate) async fn add(&self, attachment: &Attachment) -> Result<Vec<IpAddr>> {
        let list = self.load()?.context("cni plugin not initialized: no network configuration on the node yet")?;
        self.add_list(&NetworkList::loopback(), attachment, "lo").await?;
        // Written before the first call: a DEL must find it whatever happens during ADD.
        write_cache(&attachment.cache, &Cached { list: list.clone(), result: Value::Null })?;
        let result = self.add_list(&list, attachment, "eth0").await?;
        let addresses = addresses(&result)?;
        write_cache(&attachment.cache, &Cached { list, result })?;
        Ok(addresses)
    }

    async fn add_list(&self, list: &NetworkList, attachment: &Attachment, ifname: &str) -> Result<Value> {
        let mut result: Option<Value> = None;
        for plugin in &list.plugins {
            let config = plugin_config(list, plugin, result.as_ref(), Some(attachment));
            let answer = self
                .call("ADD", plugin, &config, Some(attachment), ifname)
                .await?
                .with_context(|| format!("plugin {} printed no result", plugin_type(plugin)))?;
            result = Some(answer);
        }
        result.context("the CNI configuration has no plugin")
    }

    /// Detaches the pod. Fine when it was never attached.
    pub(crate) async fn delete(&self, attachment: &Attachment) -> Result<()> {
        if let Ok(text) = std::fs::read(&attachment.cache) {
            let cached: Cached = serde_json::from_slice(&text)
                .with_context(|| format!("understand the CNI cache {}", attachment.cache.display()))?;
            for plugin in cached.list.plugins.iter().rev() {
                let previous = Some(&cached.result).filter(|r| !r.is_null() && cached.list.version != "0.2.0");
                let config = plugin_config(&cached.list, plugin, previous, Some(attachment));
                self.call("DEL", plugin, &config, Some(attachment), "eth0").await?;
            }
        }
        let lo = NetworkList::loopback();
        for plugin in &lo.plugins {
            let config = plugin_config(&lo, plugin, None, Some(attachment));
            self.call("DEL", plugin, &config, Some(attachment), "lo").await?;
        }
        match std::fs::remove_file(&attachment.cache) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("remove {}", attachment.cache.display()))
            }
            _ => Ok(()),
        }
    }

    /// Runs one plugin; its result when it printed one.
    async fn call(
        &self,
        verb: &str,
        plugin: &Map<String, Value>,
        config: &Value,
        attachment: Option<&Attachment>,
        ifname: &str,
    ) -> Result<Option<Value>> {
        let kind = plugin_type(plugin);
        let program = self.find(kind)?;
        let path = self.bin_dirs.iter().map(|d| d.display().to_string()).collect::<Vec<_>>().join(":");
        let mut command = Command::new(program);
        command.env("CNI_COMMAND", verb).env("CNI_PATH", path);
        if let Some(a) = attachment {
            let (namespace, name, uid) = &a.pod;
            let args = format!(
                "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={uid}",
                a.container_id
            );
            command
                .env("CNI_CONTAINERID", &a.container_id)
                .env("CNI_NETNS", &a.netns)
                .env("CNI_IFNAME", ifname)
                .env("CNI_ARGS", args);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let namespaces =
            Namespaces { net: Some(self.node_netns.clone()), uts: None, ipc: None, pid: ProcessNamespace::Own };
        let mut child = spawn::spawn(command, namespaces).await.with_context(|| format!("run CNI plugin {kind}"))?;
        let mut stdin = child.stdin.take().context("no pipe to the CNI plugin")?;
        let input = serde_json::to_vec(config)?;
        let feed = async move {
            let _ = stdin.write_all(&input).await;
            drop(stdin);
        };
        let (_, output) = tokio::time::timeout(PLUGIN_TIMEOUT, async { tokio::join!(feed, child.wait_with_output()) })
            .await
            .map_err(|_| anyhow!("CNI plugin {kind} did not answer {verb} within {PLUGIN_TIMEOUT:?}"))?;
        let output = output.with_context(|| format!("wait for CNI plugin {kind}"))?;
        if !output.status.success() {
            return Err(plugin_failure(kind, verb, &output));
        }
        if output.stdout.trim_ascii().is_empty() {
            return Ok(None);
        }
        serde_json::from_slice(&output.stdout)
            .map(Some)
            .with_context(|| format!("CNI plugin {kind} answered {verb} with something that is not JSON"))
    }

    fn find(&self, kind: &str) -> Result<PathBuf> {
        if kind.contains('/') {
            bail!("invalid CNI plugin name {kind:?}");
        }
        self.bin_dirs.iter().map(|dir| dir.join(kind)).find(|p| p.is_file()).with_context(|| {
            let dirs: Vec<String> = self.bin_dirs.iter().map(|d| d.display().to_string()).collect();
            format!("failed to find plugin {kind:?} in path [{}]", dirs.join(" "))
        })
    }
}

fn plugin_type(plugin: &Map<String, Value>) -> &str {
    plugin.get("type").and_then(Value::as_str).unwrap_or_default()
}

fn plugin_failure(kind: &str, verb: &str, output: &std::process::Output) -> anyhow::Error {
    let text = String::from_utf8_lossy(&output.stderr);
    match serde_json::from_slice::<PluginError>(&output.stdout) {
        Ok(e) if !e.msg.is_empty() || e.code != 0 => {
            let details = if e.details.is_empty() { String::new() } else { format!("; {}", e.details) };
            anyhow!("plugin type={kind:?} failed ({}): {}{details} (code {})", verb.to_lowercase(), e.msg, e.code)
        }
        _ => anyhow!(
            "plugin type={kind:?} failed ({}): {}, {}",
            verb.to_lowercase(),
            output.status,
            if text.trim().is_empty() { "it said nothing" } else { text.trim() }
        ),
    }
}

/// The configuration of one plugin as libcni builds it: its own object, name, version, the result before, and the runtime
/// arguments for the capabilities that it declares.
fn plugin_config(
    list: &NetworkList,
    plugin: &Map<String, Value>,
    previous: Option<&Value>,
    attachment: Option<&Attachment>,
) -> Value {
    let mut config = plugin.clone();
    config.insert("name".to_owned(), json!(list.name));
    config.insert("cniVersion".to_owned(), json!(list.version));
    if let Some(previous) = previous {
        config.insert("prevResult".to_owned(), previous.clone());
    }
    let declared = config.remove("capabilities");
    if let (Some(Value::Object(declared)), Some(attachment)) = (declared, attachment) {
        let given = runtime_arguments(attachment);
        let wanted: Map<String, Value> = given
            .into_iter()
            .filter(|(name, _)| declared.get(*name).and_then(Value::as_bool) == Some(true))
            .map(|(name, value)| (name.to_owned(), value))
            .collect();
        if !wanted.is_empty() {
            config.insert("runtimeConfig".to_owned(), Value::Object(wanted));
        }
    }
    Value::Object(config)
}

fn runtime_arguments(attachment: &Attachment) -> BTreeMap<&'static str, Value> {
    let (namespace, name, uid) = &attachment.pod;
    let mut given = BTreeMap::from([(
        "io.kubernetes.cri.pod-annotations",
        json!({"K8S_POD_NAMESPACE": namespace, "K8S_POD_NAME": name, "K8S_POD_UID": uid}),
    )]);
    if !attachment.port_mappings.is_empty() {
        given.insert("portMappings", json!(attachment.port_mappings));
    }
    if let Some(bandwidth) = &attachment.bandwidth {
        given.insert("bandwidth", bandwidth.clone());
    }
    given
}

/// The pod's addresses: those of `ips` on the sandbox's interface (or on none in particular).
fn addresses(result: &Value) -> Result<Vec<IpAddr>> {
    let interfaces = result.get("interfaces").and_then(Value::as_array).cloned().unwrap_or_default();
    let in_pod = |ip: &Value| match ip.get("interface").and_then(Value::as_u64) {
        None => true,
        Some(index) => usize::try_from(index)
            .ok()
            .and_then(|index| interfaces.get(index))
            .and_then(|i| i.get("sandbox"))
            .and_then(Value::as_str)
            .is_some_and(|sandbox| !sandbox.is_empty()),
    };
    let listed = result.get("ips").and_then(Value::as_array).cloned().unwrap_or_default();
    let old = ["ip4", "ip6"].iter().filter_map(|family| result.get(family)?.get("ip").cloned());
    let texts: Vec<Value> =
        listed.iter().filter(|ip| in_pod(ip)).filter_map(|ip| ip.get("address").cloned()).chain(old).collect();
    let found: Vec<IpAddr> = texts
        .iter()
        .filter_map(Value::as_str)
        .filter_map(|text| text.split('/').next())
        .map(|text| text.parse().with_context(|| format!("the CNI result has the address {text:?}")))
        .collect::<Result<_>>()?;
    if found.is_empty() {
        bail!("the CNI result has no address for the pod");
    }
    Ok(found)
}

fn write_cache(path: &Path, cached: &Cached) -> Result<()> {
    let temporary = path.with_extension("new");
    std::fs::write(&temporary, serde_json::to_vec(cached)?)
        .and_then(|()| std::fs::rename(&temporary, path))
        .with_context(|| format!("write the CNI cache {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attachment() -> Attachment {
        Attachment {
            container_id: "c".to_owned(),
            netns: "/run/netns/x".into(),
            pod: ("ns".to_owned(), "pod".to_owned(), "uid".to_owned()),
            port_mappings: vec![PortMapping {
                host_port: 8080,
                container_port: 80,
                protocol: "tcp".to_owned(),
                host_ip: String::new(),
            }],
            bandwidth: Some(json!({"ingressRate": 1_000})),
            cache: "/nonexistent".into(),
        }
    }

    #[test]
    fn plugins_get_name_version_previous_result_and_only_declared_capabilities() {
        let list = NetworkList::parse(
            r#"{"cniVersion":"1.0.0","cniVersions":["0.4.0","1.1.0","9.9.9"],"name":"net",
                "plugins":[{"type":"a"},{"type":"b","capabilities":{"portMappings":true,"bandwidth":true}}]}"#,
        )
        .unwrap();
        assert_eq!(list.version, "1.1.0");
        let first = plugin_config(&list, &list.plugins[0], None, Some(&attachment()));
        assert_eq!(first, json!({"type": "a", "name": "net", "cniVersion": "1.1.0"}));
        let second = plugin_config(&list, &list.plugins[1], Some(&json!({"ips": []})), Some(&attachment()));
        let mapping = json!([{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]);
        assert_eq!(second["runtimeConfig"], json!({"portMappings": mapping, "bandwidth": {"ingressRate": 1_000}}));
        assert_eq!(second["prevResult"], json!({"ips": []}));
        assert!(second.get("capabilities").is_none());
    }

    #[test]
    fn only_addresses_of_the_pods_interface_count() {
        let result = json!({
            "interfaces": [{"name": "cni0"}, {"name": "eth0", "sandbox": "/run/netns/x"}],
            "ips": [{"address": "10.0.0.1/24", "interface": 0}, {"address": "10.0.0.5/24", "interface": 1},
                    {"address": "fd00::5/64", "interface": 1}],
        });
        let expected: Vec<IpAddr> = vec!["10.0.0.5".parse().unwrap(), "fd00::5".parse().unwrap()];
        assert_eq!(addresses(&result).unwrap(), expected);
        assert!(addresses(&json!({"ips": []})).is_err());
    }

    #[test]
    fn bad_configurations_say_what_is_wrong() {
        for (text, part) in [
            ("[]", "not a JSON object"),
            (r#"{"name":"x","cniVersion":"7.0.0","plugins":[{"type":"a"}]}"#, "7.0.0"),
            (r#"{"name":"x","cniVersion":"1.0.0","plugins":[]}"#, "names no plugin"),
            (r#"{"cniVersion":"1.0.0","type":"a"}"#, "no name"),
        ] {
            let error = format!("{:#}", NetworkList::parse(text).unwrap_err());
            assert!(error.contains(part), "{error}");
        }
    }
}
