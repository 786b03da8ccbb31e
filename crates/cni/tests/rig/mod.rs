//! What the tests of the plugin stand on: directories, a fake agent, network namespaces, and how to execute a plugin.

use std::collections::HashMap;
use std::fs::File;
use std::io::{IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use towpath_wire::cni::{READY_NAME, Reply, Request, Version};

pub(crate) struct Rig {
    dir: tempfile::TempDir,
}

#[derive(Debug)]
pub(crate) struct Out {
    pub(crate) code: i32,
    pub(crate) text: String,
    pub(crate) json: Value,
}

impl Rig {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("cni.sock")
    }

    /// As an agent does that is ready, so long ago.
    pub(crate) fn was_ready(&self, before: Duration) {
        let stamp = File::create(self.dir.path().join(READY_NAME)).unwrap();
        stamp.set_modified(SystemTime::now() - before).unwrap();
    }

    pub(crate) fn deletes(&self) -> PathBuf {
        self.dir.path().join("state/deletes")
    }

    pub(crate) fn config(&self, version: Version, extra: Value) -> String {
        let mut config = json!({ "cniVersion": version.as_str(), "name": "towpath", "type": "towpath-cni",
            "runDir": self.dir.path(), "stateDir": self.dir.path().join("state") });
        config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        config.to_string()
    }

    /// Executes our plugin; an empty verb leaves CNI_COMMAND out.
    pub(crate) fn run(&self, verb: &str, environment: &[(&str, &str)], input: &str) -> Out {
        execute(Command::new(env!("CARGO_BIN_EXE_towpath-cni")), verb, environment, input)
    }

    /// Executes another plugin, in a network namespace of its own.
    pub(crate) fn run_other(&self, plugin: &str, verb: &str, environment: &[(&str, &str)], input: &str) -> Out {
        let mut command = Command::new("unshare");
        command.args(["--net", plugin]);
        execute(command, verb, environment, input)
    }
}

fn execute(mut command: Command, verb: &str, environment: &[(&str, &str)], input: &str) -> Out {
    let mut variables: HashMap<&str, &str> = HashMap::from([
        ("CNI_CONTAINERID", "c0ffee"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", "/usr/lib/cni"),
        ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;K8S_POD_UID=u-1"),
        ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
    ]);
    if !verb.is_empty() {
        variables.insert("CNI_COMMAND", verb);
    }
    variables.extend(environment.iter().copied());
    let mut child = command
        .env_clear()
        .envs(variables)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    // A plugin that refuses before it has read everything closes its end.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let json = serde_json::from_str(&text).unwrap_or(Value::Null);
    Out { code: output.status.code().unwrap_or(-1), text, json }
}

/// What the fake agent was asked.
pub(crate) struct Seen {
    pub(crate) request: Request,
    /// Inode of the namespace that came along.
    pub(crate) netns: Option<u64>,
}

pub(crate) struct Fake {
    seen: Receiver<Seen>,
}

impl Fake {
    pub(crate) fn start(rig: &Rig, reply: Reply) -> Self {
        Self::start_with(rig, Some(reply))
    }

    /// With no reply it reads the request and hangs up.
    pub(crate) fn start_with(rig: &Rig, reply: Option<Reply>) -> Self {
        let listener = UnixListener::bind(rig.socket()).unwrap();
        let (sender, seen) = channel();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut header = [0u8; 4];
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut ancillary = rustix::net::RecvAncillaryBuffer::new(&mut space);
                let flags = rustix::net::RecvFlags::CMSG_CLOEXEC | rustix::net::RecvFlags::WAITALL;
                rustix::net::recvmsg(&stream, &mut [IoSliceMut::new(&mut header)], &mut ancillary, flags).unwrap();
                let mut fds: Vec<OwnedFd> = Vec::new();
                for message in ancillary.drain() {
                    if let rustix::net::RecvAncillaryMessage::ScmRights(received) = message {
                        fds.extend(received);
                    }
                }
                let mut body = vec![0; u32::from_be_bytes(header) as usize];
                stream.read_exact(&mut body).unwrap();
                let netns = fds.pop().map(|fd| File::from(fd).metadata().unwrap().ino());
                let _ = sender.send(Seen { request: serde_json::from_slice(&body).unwrap(), netns });
                if let Some(reply) = &reply {
                    let body = serde_json::to_vec(reply).unwrap();
                    stream.write_all(&u32::try_from(body.len()).unwrap().to_be_bytes()).unwrap();
                    stream.write_all(&body).unwrap();
                }
            }
        });
        Self { seen }
    }

    /// The next request that came.
    pub(crate) fn seen(&self) -> Seen {
        self.seen.recv_timeout(Duration::from_secs(10)).expect("the agent was asked")
    }
}

/// A new network namespace, alive as long as this is held.
pub(crate) struct Netns {
    _file: File,
    pub(crate) path: String,
    pub(crate) inode: u64,
}

pub(crate) fn netns() -> Netns {
    let file = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        File::open("/proc/thread-self/ns/net").unwrap()
    })
    .join()
    .unwrap();
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    let inode = file.metadata().unwrap().ino();
    Netns { _file: file, path, inode }
}

/// Whether this is root; if not, says that the test is skipped, and fails where nothing may be skipped.
pub(crate) fn root(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "{test} needs root");
        eprintln!("{test}: skipped, needs root");
    }
    root
}

/// Whether a file is there; if not, as for [`root`].
pub(crate) fn have(path: &str) -> bool {
    let there = std::path::Path::new(path).exists();
    if !there {
        assert!(
            std::env::var_os("CI").is_none_or(|ci| ci != "true"),
            "{path} is missing: apt install containernetworking-plugins"
        );
        eprintln!("skipped: {path} is missing; apt install containernetworking-plugins");
    }
    there
}

/// Whether a plugin says that it speaks a version.
pub(crate) fn speaks(plugin: &str, version: Version) -> bool {
    let out = execute(Command::new(plugin), "VERSION", &[], &json!({ "cniVersion": version.as_str() }).to_string());
    out.json["supportedVersions"].as_array().is_some_and(|all| all.iter().any(|v| v == version.as_str()))
}
