//! What else the machine did while a block ran: time that the hypervisor took, and CPU time of processes that are not ours.
//!
//! From differences of `/proc/stat` and `/proc/PID/stat` (proc(5)), never from load averages or `ps`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};

/// `PF_KTHREAD` of the kernel's `sched.h`: kernel threads do our packets' work, too, and are not counted as foreign.
const KERNEL_THREAD: u64 = 0x0020_0000;

/// Shares of the machine's CPU time, 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Noise {
    /// Taken by the hypervisor.
    pub(crate) steal: f64,
    /// Used by foreign processes.
    pub(crate) foreign: f64,
}

/// From which shares on a block is too noisy.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Most that may be stolen.
    pub(crate) steal: f64,
    /// Most that foreign processes may use.
    pub(crate) foreign: f64,
}

impl Noise {
    /// Whether a block with this noise counts.
    pub(crate) fn within(self, limits: Limits) -> bool {
        self.steal <= limits.steal && self.foreign <= limits.foreign
    }

    /// The worse of both, each.
    pub(crate) fn worst(self, other: Self) -> Self {
        Self { steal: self.steal.max(other.steal), foreign: self.foreign.max(other.foreign) }
    }
}

/// Whose work is not noise.
#[derive(Clone, Debug, Default)]
pub(crate) struct Own {
    /// Processes by id.
    pub(crate) pids: BTreeSet<u32>,
    /// Every process in a cgroup with this name at its beginning (a lab's), when its own work is what is measured.
    pub(crate) cgroup: Option<String>,
}

/// CPU times of one process, in clock ticks.
#[derive(Clone, Debug, PartialEq)]
struct Usage {
    /// Its own time.
    own: u64,
    /// That of children that ended and were waited for.
    children: u64,
    cgroup: String,
}

/// The machine's CPU times at one moment.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    at: Instant,
    /// All CPUs' time together, and what was stolen of it; ticks.
    total: u64,
    stolen: u64,
    processes: BTreeMap<u32, Usage>,
}

impl Snapshot {
    /// Reads `/proc`.
    ///
    /// # Errors
    /// `/proc/stat` is not there or not understood.
    pub(crate) fn take() -> Result<Self> {
        let text = std::fs::read_to_string("/proc/stat").context("read /proc/stat")?;
        let (total, stolen) = machine(&text).context("the first line of /proc/stat is not as proc(5) says")?;
        let mut processes = BTreeMap::new();
        for entry in std::fs::read_dir("/proc").context("read /proc")?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
            // Processes that end meanwhile are no error.
            if let Some(usage) = usage(&entry.path()) {
                processes.insert(pid, usage);
            }
        }
        Ok(Self { at: Instant::now(), total, stolen, processes })
    }

    /// What happened between this moment and a later one.
    pub(crate) fn until(&self, later: &Self, own: &Own) -> Noise {
        // The tick counters are coarse; the wall clock bounds them from below for very short blocks.
        let wall = later.at.duration_since(self.at).as_secs_f64() * ticks_a_second() * cpus();
        let passed = (later.total.saturating_sub(self.total) as f64).max(wall).max(1.0);
        Noise {
            steal: later.stolen.saturating_sub(self.stolen) as f64 / passed,
            foreign: foreign_ticks(&self.processes, &later.processes, own) as f64 / passed,
        }
    }
}

/// Ticks used by processes that are not ours.
///
/// A process that ended is counted through its parent, whose children's time grows by all that the process ever used: what it
/// had used before the block is taken off again.
fn foreign_ticks(before: &BTreeMap<u32, Usage>, after: &BTreeMap<u32, Usage>, own: &Own) -> u64 {
    let foreign = |pid: &u32, usage: &Usage| {
        !own.pids.contains(pid)
            && !own.cgroup.as_ref().is_some_and(|name| usage.cgroup.trim_start_matches('/').starts_with(name.as_str()))
    };
    let mut used = 0;
    let mut children = 0;
    for (pid, now) in after.iter().filter(|(pid, usage)| foreign(pid, usage)) {
        let (own_before, children_before) = before.get(pid).map_or((0, 0), |was| (was.own, was.children));
        used += now.own.saturating_sub(own_before);
        children += now.children.saturating_sub(children_before);
    }
    let ended: u64 = before
        .iter()
        .filter(|(pid, usage)| foreign(pid, usage) && !after.contains_key(pid))
        .map(|(_, was)| was.own + was.children)
        .sum();
    used + children.saturating_sub(ended)
}

/// Time of all CPUs and its stolen part, of the `cpu` line. Guest time is part of user time already.
fn machine(text: &str) -> Option<(u64, u64)> {
    let line = text.lines().next()?.strip_prefix("cpu ")?;
    let fields: Vec<u64> = line.split_whitespace().map_while(|field| field.parse().ok()).collect();
    Some((fields.iter().take(8).sum(), *fields.get(7)?))
}

fn usage(dir: &Path) -> Option<Usage> {
    let (own, children) = times(&std::fs::read_to_string(dir.join("stat")).ok()?)?;
    let cgroups = std::fs::read_to_string(dir.join("cgroup")).ok()?;
    let cgroup = cgroups.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("").to_owned();
    Some(Usage { own, children, cgroup })
}

/// Own and children's times of `/proc/PID/stat`; none of a kernel thread.
fn times(stat: &str) -> Option<(u64, u64)> {
    // The name, in parentheses, may hold anything; the fields after it begin with the state, field 3 of proc(5).
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let field = |number: usize| fields.get(number.checked_sub(3)?)?.parse::<u64>().ok();
    if field(9)? & KERNEL_THREAD != 0 {
        return None;
    }
    Some((field(14)? + field(15)?, field(16)? + field(17)?))
}

/// Linux counts in hundredths of a second towards programs, whatever its own tick (`USER_HZ`).
fn ticks_a_second() -> f64 {
    100.0
}

/// CPUs of the machine.
pub(crate) fn cpus() -> f64 {
    std::thread::available_parallelism().map_or(1.0, |n| n.get() as f64)
}

/// CPU time that a single-threaded process has used, in nanoseconds (first field of `/proc/PID/schedstat`).
///
/// # Errors
/// The process ended, or the kernel was built without `CONFIG_SCHED_INFO`.
pub(crate) fn cpu_nanoseconds(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/schedstat");
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let first = text.split_whitespace().next().and_then(|field| field.parse().ok());
    first.with_context(|| format!("{path} holds {text:?}, no number"))
}

/// The same of all threads that a process has now. Nothing of a process that has ended.
pub(crate) fn all_threads_nanoseconds(pid: u32) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let ids = tasks.filter_map(|task| task.file_name().to_str()?.parse().ok());
    ids.filter_map(|id: u32| cpu_nanoseconds(id).ok()).sum()
}

/// CPU time that a process with all its threads has used, in seconds.
///
/// # Errors
/// The process ended.
pub(crate) fn process_seconds(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let (own, _) = times(&text).with_context(|| format!("{path} is not as proc(5) says"))?;
    Ok(own as f64 / ticks_a_second())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(own: u64, children: u64, cgroup: &str) -> Usage {
        Usage { own, children, cgroup: cgroup.to_owned() }
    }

    #[test]
    fn a_process_name_cannot_shift_the_fields() {
        let stat = "42 (a) b) 1 2) S 1 42 42 0 -1 4194560 100 0 0 0 11 5 7 2 20 0 1 0 100 0 0";
        assert_eq!(times(stat), Some((16, 9)));
        let kernel = "2 (kthreadd) S 0 0 0 0 -1 2129984 0 0 0 0 11 5 7 2 20 0 1 0 2 0 0";
        assert_eq!(times(kernel), None);
        assert_eq!(times("1 (x"), None);
    }

    #[test]
    fn steal_is_the_eighth_field_and_guest_time_counts_once() {
        assert_eq!(machine("cpu  10 1 5 80 2 0 1 1 7 7\ncpu0 …"), Some((100, 1)));
        assert_eq!(machine("intr 1"), None);
    }

    #[test]
    fn time_of_others_is_foreign_and_ours_is_not() {
        let before =
            BTreeMap::from([(1, process(100, 0, "/")), (2, process(50, 0, "/")), (3, process(5, 0, "/lab-x/n1"))]);
        let after =
            BTreeMap::from([(1, process(103, 0, "/")), (2, process(90, 0, "/")), (3, process(9, 0, "/lab-x/n1"))]);
        let ours = Own { pids: [2].into(), cgroup: None };
        assert_eq!(foreign_ticks(&before, &after, &ours), 7);
        let lab_too = Own { pids: [2].into(), cgroup: Some("lab-x".to_owned()) };
        assert_eq!(foreign_ticks(&before, &after, &lab_too), 3);
    }

    #[test]
    fn a_compiler_that_came_and_went_is_counted_through_its_parent() {
        let before = BTreeMap::from([(1, process(100, 0, "/")), (7, process(30, 0, "/"))]);
        let after = BTreeMap::from([(1, process(100, 42, "/"))]);
        assert_eq!(foreign_ticks(&before, &after, &Own::default()), 12);
        // One that nobody waited for hides nothing of others.
        let unseen = BTreeMap::from([(1, process(104, 0, "/"))]);
        assert_eq!(foreign_ticks(&before, &unseen, &Own::default()), 4);
    }

    #[test]
    fn work_of_another_process_is_seen_on_this_machine() {
        let before = Snapshot::take().unwrap();
        let script = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done";
        std::process::Command::new("sh").args(["-c", script]).status().unwrap();
        let after = Snapshot::take().unwrap();
        let foreign = before.until(&after, &Own::default()).foreign;
        let ours = before.until(&after, &Own { pids: [std::process::id()].into(), cgroup: None }).foreign;
        assert!(foreign > ours, "{foreign} with our child's work, {ours} without");
    }
}
