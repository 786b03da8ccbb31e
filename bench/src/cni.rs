//! Runs CNI plugins as a container runtime does, and takes the time: the process of the worker is in the node's namespace.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, unshare};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Where Debian puts the reference plugins.
pub(crate) const REFERENCE: &str = "/usr/lib/cni";

/// A plugin.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Plugin {
    /// Its program.
    program: PathBuf,
    /// Directories of plugins (`CNI_PATH`).
    path: String,
}

/// ADD and DEL again and again for a while, each time for a new container.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    /// The plugin.
    pub(crate) plugin: Plugin,
    /// Its configuration, in the form that a runtime gives to one plugin of a list.
    pub(crate) config: Value,
    /// For how long, in milliseconds.
    pub(crate) length: u64,
    /// Pause between one container's end and the next one, in milliseconds: what is left to do behind the caller's back is done.
    pub(crate) rest: u64,
}

/// What it took, in milliseconds.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Done {
    /// Each ADD.
    pub(crate) adds: Vec<f64>,
    /// Each DEL.
    pub(crate) dels: Vec<f64>,
}

/// Runs a block.
///
/// # Errors
/// A plugin failed; what it said is in the message.
pub(crate) fn block(request: Request) -> Result<Done> {
    let end = Instant::now() + Duration::from_millis(request.length);
    let mut done = Done::default();
    while done.adds.is_empty() || Instant::now() < end {
        let container = Container::new(done.adds.len())?;
        let started = Instant::now();
        let result = request.plugin.call(&container, "ADD", &request.config, "")?;
        done.adds.push(milliseconds(started));
        let result: Value = serde_json::from_slice(&result).context("the result of ADD is no JSON")?;
        let mut config = request.config.clone();
        if let Some(config) = config.as_object_mut() {
            config.insert("prevResult".to_owned(), result);
        }
        let started = Instant::now();
        request.plugin.call(&container, "DEL", &config, "")?;
        done.dels.push(milliseconds(started));
        // As a runtime does: the namespace goes right after DEL.
        drop(container);
        std::thread::sleep(Duration::from_millis(request.rest));
    }
    Ok(done)
}

/// How long ago that was.
pub(crate) fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

/// A container: a new network namespace and a new id.
pub(crate) struct Container {
    id: String,
    netns: File,
}

impl Container {
    /// Makes the `number`th one of this process.
    ///
    /// # Errors
    /// There can be no namespace.
    pub(crate) fn new(number: usize) -> Result<Self> {
        let made = std::thread::spawn(|| -> Result<File> {
            unshare(CloneFlags::CLONE_NEWNET).context("make a network namespace")?;
            File::open("/proc/thread-self/ns/net").context("open a network namespace")
        });
        let Ok(netns) = made.join() else { bail!("the thread that makes a network namespace died") };
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(Self { id: format!("towpath-bench-{}-{}-{number}", std::process::id(), since.as_micros()), netns: netns? })
    }

    /// Its network namespace.
    pub(crate) fn netns(&self) -> &File {
        &self.netns
    }

    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.netns.as_raw_fd())
    }
}

impl Plugin {
    /// A program that may call those beside it, and the reference plugins.
    pub(crate) fn new(program: PathBuf) -> Self {
        let directory = program.parent().unwrap_or(Path::new("/")).display().to_string();
        Self { program, path: format!("{directory}:{REFERENCE}") }
    }

    /// Calls it for a container; what it said.
    ///
    /// # Errors
    /// It failed; what it said is in the message.
    pub(crate) fn call(&self, container: &Container, verb: &str, config: &Value, args: &str) -> Result<Vec<u8>> {
        let mut child = Command::new(&self.program)
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", &container.id)
            .env("CNI_NETNS", container.path())
            .env("CNI_IFNAME", "eth0")
            .env("CNI_ARGS", args)
            .env("CNI_PATH", &self.path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {}", self.program.display()))?;
        if let Some(mut stdin) = child.stdin.take() {
            // One that ends early says why itself.
            let _ = stdin.write_all(config.to_string().as_bytes());
        }
        let output = child.wait_with_output().with_context(|| format!("wait for {}", self.program.display()))?;
        if !output.status.success() {
            bail!("{} {verb}: {}", self.program.display(), String::from_utf8_lossy(&output.stdout).trim());
        }
        Ok(output.stdout)
    }
}

/// The first plugin of a configuration list, as a runtime gives it to the plugin in version 1.0.0 (the newest that Debian 12's
/// plugins speak).
///
/// # Errors
/// It is no such list.
pub(crate) fn first_plugin(list: &Value) -> Result<Value> {
    let mut config = list.pointer("/plugins/0").cloned().context("a CNI configuration without plugins")?;
    let name = list.get("name").cloned().context("a CNI configuration without a name")?;
    let object = config.as_object_mut().context("a plugin's configuration is no object")?;
    object.insert("name".to_owned(), name);
    object.insert("cniVersion".to_owned(), Value::from("1.0.0"));
    Ok(config)
}

/// Time of an ADD without the sleep of the reference `bridge` plugin, which looks for its port to be up at once, then after
/// 50 ms, then after 500 ms more (containernetworking/plugins 1.1.1).
pub(crate) fn without_sleep(milliseconds: f64) -> f64 {
    match milliseconds {
        slept if slept >= 550.0 => slept - 550.0,
        slept if slept >= 50.0 => slept - 50.0,
        awake => awake,
    }
}

/// Directories that this process has made.
static MADE: AtomicUsize = AtomicUsize::new(0);

/// A directory that is removed with its owner.
#[derive(Debug)]
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    /// Makes one below `/run`.
    ///
    /// # Errors
    /// It cannot be made.
    pub(crate) fn new() -> Result<Self> {
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let path = PathBuf::from(format!("/run/towpath-bench-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(Self(path))
    }

    /// Its path.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Its name, which no other directory of this run has.
    pub(crate) fn name(&self) -> String {
        self.0.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_plugin_gets_the_name_and_a_version_both_sides_speak() {
        let list =
            json!({"cniVersion": "1.0.0", "cniVersions": ["1.1.0"], "name": "net", "plugins": [{"type": "a", "x": 1}]});
        let config = first_plugin(&list).unwrap();
        assert_eq!(config, json!({"type": "a", "x": 1, "name": "net", "cniVersion": "1.0.0"}));
        assert!(first_plugin(&json!({"name": "net"})).is_err());
    }

    #[test]
    fn only_the_sleeps_of_the_bridge_plugin_are_taken_off() {
        assert_eq!([without_sleep(49.0), without_sleep(71.0), without_sleep(580.0)], [49.0, 21.0, 30.0]);
    }
}
