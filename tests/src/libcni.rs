//! What a container runtime does with the plugin, by hand: a network namespace, and calls as libcni makes them.

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::cluster::{Cluster, towpath_binary, wait};
use crate::containerd::Owned;

/// The plugin that the build put beside `towpath`.
///
/// # Errors
/// It is not built.
pub fn plugin() -> Result<PathBuf> {
    let path = towpath_binary()?.with_file_name("towpath-cni");
    ensure!(path.is_file(), "{} is not built", path.display());
    Ok(path)
}

/// The configuration that the agent of a node wrote for the runtime.
///
/// # Errors
/// There is none.
pub fn conflist(cluster: &Cluster, node: &str) -> Result<PathBuf> {
    let dir = Path::new("/run/towpath/lab").join(cluster.name()).join("nodes").join(node).join("cni/net.d");
    let mut entries = fs::read_dir(&dir).with_context(|| dir.display().to_string())?;
    Ok(entries.next().with_context(|| format!("{} is empty", dir.display()))??.path())
}

/// A network namespace as a runtime makes one.
#[derive(Debug)]
pub struct Sandbox {
    process: Owned,
    /// The container id.
    pub id: &'static str,
}

impl Sandbox {
    /// Makes one; it lives as long as the value.
    ///
    /// # Errors
    /// `unshare` failed.
    pub fn make(id: &'static str) -> Result<Self> {
        let mut command = Command::new("unshare");
        let process = command.args(["--net", "sleep", "300"]).stdin(Stdio::null()).spawn().context("unshare")?;
        let own = Self { process: Owned(process), id };
        let outside = fs::read_link("/proc/self/ns/net")?;
        wait("a network namespace", Duration::from_secs(5), || {
            if fs::read_link(own.netns())? == outside { bail!("still ours") } else { Ok(()) }
        })?;
        Ok(own)
    }

    /// The process that keeps it.
    pub fn pid(&self) -> u32 {
        self.process.0.id()
    }

    /// Where the namespace is.
    pub fn netns(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/net", self.pid()))
    }

    /// Whether a command succeeds inside.
    ///
    /// # Errors
    /// It could not be started.
    pub fn inside(&self, args: &[&str]) -> Result<bool> {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.netns().display())).args(args);
        Ok(command.stdin(Stdio::null()).output()?.status.success())
    }
}

/// What libcni does with a configuration list, by hand.
#[derive(Clone, Debug)]
pub struct Libcni {
    plugin: PathBuf,
    list: Value,
    /// `CNI_ARGS`.
    args: String,
    /// A program that runs the plugin, with its arguments.
    under: Vec<String>,
}

impl Libcni {
    /// With the configuration that the agent of a node wrote.
    ///
    /// # Errors
    /// There is none, or the plugin is not built.
    pub fn of_node(cluster: &Cluster, node: &str) -> Result<Self> {
        let list = serde_json::from_slice(&fs::read(conflist(cluster, node)?)?)?;
        Ok(Self { plugin: plugin()?, list, args: String::new(), under: Vec::new() })
    }

    /// The same, for the sandbox of a pod as kubelet names it.
    #[must_use]
    pub fn for_pod(&self, name: &str, uid: &str) -> Self {
        let args = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={name};K8S_POD_UID={uid}");
        Self { args, ..self.clone() }
    }

    /// The same, with the plugin run by another program.
    #[must_use]
    pub fn under(&self, program: &[String]) -> Self {
        Self { under: program.to_vec(), ..self.clone() }
    }

    /// One call: the answer, or the plugin's error object.
    ///
    /// # Errors
    /// The plugin could not be run, or says no JSON.
    pub fn call(
        &self,
        verb: &str,
        sandbox: Option<&Sandbox>,
        version: &str,
        extra: &Value,
    ) -> Result<Result<Value, Value>> {
        self.call_in(verb, sandbox.map(|sandbox| (sandbox.id, sandbox.netns())), version, extra)
    }

    /// The same for a container by its id and the path of its network namespace, whoever made that.
    ///
    /// # Errors
    /// As [`Libcni::call`].
    pub fn call_in(
        &self,
        verb: &str,
        container: Option<(&str, PathBuf)>,
        version: &str,
        extra: &Value,
    ) -> Result<Result<Value, Value>> {
        answer_of(&self.start(verb, container, version, extra)?.wait_with_output()?)
    }

    /// The plugin, started and told what to do. See [`answer_of`].
    ///
    /// # Errors
    /// It could not be started.
    pub fn start(&self, verb: &str, container: Option<(&str, PathBuf)>, version: &str, extra: &Value) -> Result<Child> {
        let mut config = self.list.pointer("/plugins/0").cloned().context("a list without a plugin")?;
        let fields = config.as_object_mut().context("a plugin that is no object")?;
        fields.insert("name".to_owned(), self.list.get("name").cloned().unwrap_or_default());
        fields.insert("cniVersion".to_owned(), json!(version));
        fields.extend(extra.as_object().cloned().unwrap_or_default());
        let mut command = match self.under.split_first() {
            Some((program, arguments)) => {
                let mut command = Command::new(program);
                command.args(arguments).arg(&self.plugin);
                command
            }
            None => Command::new(&self.plugin),
        };
        let bin = self.plugin.parent().context("a plugin without a directory")?;
        command.env_clear().env("CNI_COMMAND", verb).env("CNI_PATH", bin);
        if !self.args.is_empty() {
            command.env("CNI_ARGS", &self.args);
        }
        if let Some((id, netns)) = container {
            command.env("CNI_CONTAINERID", id).env("CNI_IFNAME", "eth0").env("CNI_NETNS", netns);
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        // One that dies early takes nothing.
        let _ = child.stdin.take().context("no stdin")?.write_all(config.to_string().as_bytes());
        Ok(child)
    }

    /// A call that must succeed.
    ///
    /// # Errors
    /// It did not; what the plugin said is in the message.
    pub fn succeed(&self, verb: &str, sandbox: Option<&Sandbox>, version: &str, extra: &Value) -> Result<Value> {
        self.call(verb, sandbox, version, extra)?.map_err(|error| anyhow::anyhow!("{verb} {version}: {error}"))
    }

    /// Asks whether the agent takes requests at this moment.
    ///
    /// STATUS alone would not tell: it succeeds for a while after an agent has gone, by the file that is removed here.
    ///
    /// # Errors
    /// No agent is there, or it is not ready.
    pub fn agent_is_ready(&self) -> Result<()> {
        let socket =
            self.list.pointer("/plugins/0/socket").and_then(Value::as_str).context("the plugin has no socket")?;
        let stamp = Path::new(socket).with_file_name("last-ready");
        match fs::remove_file(&stamp) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error).context(stamp.display().to_string()),
            _ => self.succeed("STATUS", None, "1.1.0", &json!({})).map(drop),
        }
    }
}

/// What a plugin answered: its result, or its error object; null where it said nothing.
///
/// # Errors
/// It says no JSON.
pub fn answer_of(out: &Output) -> Result<Result<Value, Value>> {
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let answer = match text.trim() {
        "" => Value::Null,
        text => serde_json::from_str(text).with_context(|| text.to_owned())?,
    };
    Ok(if out.status.success() { Ok(answer) } else { Err(answer) })
}

/// The first address of an ADD's result.
///
/// # Errors
/// It has none.
pub fn address_of(result: &Value) -> Result<String> {
    let text =
        result.pointer("/ips/0/address").and_then(Value::as_str).with_context(|| format!("no address: {result}"))?;
    Ok(text.split('/').next().unwrap_or_default().to_owned())
}
