//! A real containerd for a test alone.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::cluster::wait;

/// Whether these programs are installed. Where they must be (`CI=true`), an error if not; elsewhere a line that says so.
///
/// # Errors
/// One is missing, and `CI` is `true`.
pub fn can_run(programs: &[&str]) -> Result<bool> {
    let missing: Vec<_> =
        programs.iter().filter(|name| Command::new(name).arg("--version").output().is_err()).copied().collect();
    if missing.is_empty() {
        return Ok(true);
    }
    ensure!(!std::env::var("CI").is_ok_and(|v| v == "true"), "not installed (CI=true): {}", missing.join(", "));
    println!("skipped: not installed: {}", missing.join(", "));
    Ok(false)
}

/// A process that ends with the test.
#[derive(Debug)]
pub struct Owned(pub Child);

impl Drop for Owned {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A containerd of its own: root, state and socket in one directory, which goes with it.
#[derive(Debug)]
pub struct Containerd {
    dir: PathBuf,
    name: String,
    process: Option<Owned>,
}

impl Containerd {
    /// Starts one; `name` is also the containerd namespace that containers run in.
    ///
    /// # Errors
    /// It cannot be started, or does not answer in time.
    pub fn start(name: &str) -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("towpath-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir)?;
        let mut own = Self { dir, name: name.to_owned(), process: None };
        let at = |path: &str| own.dir.join(path);
        let config = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\n  address = {:?}\n",
            at("root"),
            at("state"),
            at("containerd.sock")
        );
        fs::write(at("config.toml"), config)?;
        let log = File::create(at("log"))?;
        let mut command = Command::new("containerd");
        command.arg("--config").arg(at("config.toml")).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        own.process = Some(Owned(command.spawn().context("start containerd")?));
        wait("containerd", Duration::from_secs(20), || {
            let out = own.ctr(&["version"])?;
            if out.status.success() { Ok(()) } else { bail!("{}", String::from_utf8_lossy(&out.stderr)) }
        })?;
        Ok(own)
    }

    /// Its directory, for what goes with it.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What tells `ctr` to use it.
    pub fn ctr_options(&self) -> [String; 4] {
        let socket = self.dir.join("containerd.sock").display().to_string();
        ["--address".to_owned(), socket, "--namespace".to_owned(), self.name.clone()]
    }

    /// Runs `ctr` with it.
    ///
    /// # Errors
    /// `ctr` cannot be started.
    pub fn ctr(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = Command::new("ctr");
        Ok(command.args(self.ctr_options()).args(arguments).stdin(Stdio::null()).output()?)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        self.process.take();
        let _ = fs::remove_dir_all(&self.dir);
        // runc names cgroups after containerd's namespace, in every hierarchy.
        let roots = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|entry| entry.path());
        for root in roots.chain([PathBuf::from("/sys/fs/cgroup")]) {
            let _ = fs::remove_dir(root.join(&self.name));
        }
    }
}
