//! `up`, `start`, `stop` and `down`, and `node`.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{LabStatus, Step, require_root, spec, status, teardown};
use crate::kernel::{cgroup, ns};
use crate::layout::{LabName, Layout, RUN_DIR};
use crate::options::{ClusterSpec, NodeSpec, UpOptions};
use crate::runtime::image;
use crate::supervisor::control::{self, Ask};

/// How long the supervisor may take to end in good order.
const STOP_LIMIT: Duration = Duration::from_secs(15);

/// Makes a new lab and waits until it is ready. `progress` is told what goes on.
///
/// # Errors
///
/// Not root, the name is taken, ranges do not fit, something the lab needs is missing, or the cluster did not become ready
/// (the lab is left as it is then, for a look at its logs).
pub fn up(options: &UpOptions, progress: &mut dyn FnMut(&str)) -> Result<LabStatus> {
    require_root()?;
    image::check_machine()?;
    let layout = Layout::new(&options.name)?;
    let _lock = lock(&layout)?;
    let name = &options.name;
    if cgroup::is_populated(&layout.supervisor_cgroup()) {
        bail!("lab {name} is up already; `towpath lab down` removes it, another name makes a second one");
    }
    if layout.cluster_file().exists() {
        bail!("lab {name} exists and is stopped; `towpath lab start` brings it back, `towpath lab down` removes it");
    }
    let spec = ClusterSpec::plan(options, free_port()?)?;
    {
        let _shared = teardown::lock_shared()?;
        make_private_dir(layout.state())?;
    }
    let text = serde_json::to_vec_pretty(&spec)?;
    std::fs::write(layout.cluster_file(), text)
        .with_context(|| format!("write {}", layout.cluster_file().display()))?;
    launch(&layout, &spec, progress)?;
    status(name)
}

/// Brings a stopped lab back, with its objects and node disks.
///
/// # Errors
///
/// No such lab, it runs already, or it did not become ready.
pub fn start(name: &LabName, progress: &mut dyn FnMut(&str)) -> Result<LabStatus> {
    require_root()?;
    let layout = Layout::new(name)?;
    let _lock = lock(&layout)?;
    let spec = spec(name)?;
    ensure!(!cgroup::is_populated(&layout.supervisor_cgroup()), "lab {name} runs already");
    launch(&layout, &spec, progress)?;
    status(name)
}

/// Ends all processes and namespaces of a lab and keeps its state.
///
/// # Errors
///
/// No such lab, or something could not be removed.
pub fn stop(name: &LabName) -> Result<()> {
    require_root()?;
    let layout = Layout::new(name)?;
    let _lock = lock(&layout)?;
    spec(name)?;
    end_supervisor(&layout);
    finish(name, teardown::runtime(&layout))
}

/// Removes everything of a lab, whatever state it is in. A name without a lab is fine.
///
/// # Errors
///
/// What could not be removed; everything else is.
pub fn down(name: &LabName) -> Result<()> {
    require_root()?;
    let layout = Layout::new(name)?;
    let lock = lock(&layout)?;
    let mut errors = teardown::runtime(&layout);
    errors.extend(teardown::state(&layout));
    errors.extend(teardown::remove_lock(&layout, lock).err());
    finish(name, errors)
}

/// Makes one more node of a running lab, and waits until it is ready. It gets the first number that no node has.
///
/// # Errors
///
/// The lab does not run, a range has nothing left for the node, or it did not become ready (it is left as it is then, for a look at its logs).
pub fn add_node(name: &LabName) -> Result<NodeSpec> {
    change_nodes(name, &Ask::AddNode)
}

/// Switches a node of a running lab off, at once, and takes it and the pods that were on it out of the cluster, with all that was on its disk.
///
/// # Errors
///
/// The lab does not run, it has no such node or no other, or something of the node could not be removed.
pub fn delete_node(name: &LabName, node: &str) -> Result<NodeSpec> {
    change_nodes(name, &Ask::DeleteNode(node.to_owned()))
}

fn change_nodes(name: &LabName, change: &Ask) -> Result<NodeSpec> {
    require_root()?;
    let layout = Layout::new(name)?;
    let _lock = lock(&layout)?;
    spec(name)?;
    control::ask(&layout, change)
}

fn finish(name: &LabName, errors: Vec<anyhow::Error>) -> Result<()> {
    if errors.is_empty() {
        return Ok(());
    }
    let list: Vec<String> = errors.iter().map(|error| format!("  {error:#}")).collect();
    bail!("not all of lab {name} could be removed; run `towpath lab down` again:\n{}", list.join("\n"))
}

/// A port of 127.0.0.1 that is free now.
fn free_port() -> Result<u16> {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).context("find a free port on 127.0.0.1")?;
    Ok(listener.local_addr()?.port())
}

fn make_private_dir(path: &Path) -> Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("create {}", path.display()))
}

/// Waits for other commands on the same lab.
fn lock(layout: &Layout) -> Result<Flock<File>> {
    let path = layout.lock();
    loop {
        let file = {
            let _shared = teardown::lock_shared()?;
            make_private_dir(Path::new(RUN_DIR))?;
            File::options().create(true).truncate(false).write(true).open(&path)
        };
        let file = file.with_context(|| format!("open {}", path.display()))?;
        let locked = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, error)| error)
            .with_context(|| format!("lock {}", path.display()))?;
        // `down` removes the file: a lock on the removed one is worth nothing.
        let same =
            std::fs::metadata(&path).is_ok_and(|there| locked.metadata().is_ok_and(|own| own.ino() == there.ino()));
        if same {
            return Ok(locked);
        }
    }
}

fn launch(layout: &Layout, spec: &ClusterSpec, progress: &mut dyn FnMut(&str)) -> Result<()> {
    // What a supervisor that was killed left behind.
    let leftovers = teardown::runtime(layout);
    if let Some(error) = leftovers.into_iter().next() {
        return Err(error.context("remove what an earlier run left behind"));
    }
    make_private_dir(layout.run())?;
    {
        let _shared = teardown::lock_shared()?;
        if ns::prepare_netns_dir()? {
            let mark = teardown::NETNS_DIR_MARK;
            std::fs::write(mark, "").with_context(|| format!("write {mark}"))?;
        }
    }
    let log = File::options().create(true).append(true).open(layout.supervisor_log());
    let log = log.with_context(|| format!("open {}", layout.supervisor_log().display()))?;
    let mut supervisor = Command::new(&spec.program)
        .args(&spec.program_args)
        .args(["lab", "serve", spec.name.as_str()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .current_dir("/")
        .spawn()
        .with_context(|| format!("start {}", spec.program.display()))?;
    let output = supervisor.stdout.take().context("no pipe from the supervisor")?;
    for line in BufReader::new(output).lines() {
        let line = line.context("read what the supervisor says")?;
        match serde_json::from_str(&line) {
            Ok(Step::Doing(text)) => progress(&text),
            Ok(Step::Ready) => return Ok(()),
            Ok(Step::Failed(why)) => bail!(
                "lab {} did not come up: {why}\n(log: {}; `towpath lab down` removes the lab)",
                spec.name,
                layout.supervisor_log().display()
            ),
            Err(_) => tracing::debug!(line, "the supervisor says"),
        }
    }
    let ended = supervisor.wait().context("wait for the supervisor")?;
    let log = std::fs::read_to_string(layout.supervisor_log()).unwrap_or_default();
    let lines: Vec<&str> = log.lines().collect();
    let tail = lines.get(lines.len().saturating_sub(8)..).unwrap_or_default().join("\n");
    bail!("the supervisor of lab {} ended ({ended}):\n{tail}", spec.name)
}

/// Asks the supervisor to end in good order, so that everything is on disk.
fn end_supervisor(layout: &Layout) {
    let cgroup = layout.supervisor_cgroup();
    // The supervisor is the oldest; CNI plugins and the like may be with it.
    if let Some(pid) = cgroup::processes(&cgroup).into_iter().min() {
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
    let deadline = Instant::now() + STOP_LIMIT;
    while cgroup::is_populated(&cgroup) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
}
