//! A lab leaves nothing on the machine: after `down`, after a crash in the middle of `up`, after a crash later; and two labs
//! at once do not meet.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use towpath_walkthrough::cluster::{Cluster, Families, host, wait};
use towpath_walkthrough::machine::{self, Footprint, can_run_labs};

/// Processes that were told to end may need a moment; everything else is gone when `down` returns.
fn nothing_left(before: &Footprint, labs: &[&str]) -> Result<()> {
    wait("the machine to be as before", Duration::from_secs(3), || {
        let after = Footprint::take()?;
        let left = after.new_since(before, labs);
        if left.is_empty() { Ok(()) } else { bail!("left behind:\n  {}", left.join("\n  ")) }
    })
}

fn server(cluster: &Cluster, node: &str) -> Result<()> {
    let place = format!(r#"{{"spec":{{"nodeName":"{node}"}}}}"#);
    let overrides = format!("--overrides={place}");
    let out = cluster.try_kubectl(&["run", "web", "--image=nginx", "--port=80", &overrides])?;
    anyhow::ensure!(out.status.success(), "kubectl run: {}", String::from_utf8_lossy(&out.stderr));
    cluster.wait_pod("web").map(|_| ())
}

fn supervisor(lab: &str) -> Result<i32> {
    let found = machine::processes_below(&machine::lab_cgroup(lab)?.join("supervisor")).into_iter();
    let mut serving = found.filter(|pid| machine::command_line(*pid).iter().any(|word| word == "serve"));
    serving.next().with_context(|| format!("lab {lab} has no supervisor"))
}

#[test]
fn up_and_down_leave_nothing() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let name = "e2e-clean";
    let before = Footprint::take()?;
    let cluster = Cluster::up(name, 2, Families::Ipv4)?;
    server(&cluster, "n2")?;
    let during = Footprint::take()?;
    for part in ["network namespace", "mount", "cgroup", "process", "directory"] {
        let seen = during.new_since(&before, &[name]);
        assert!(seen.iter().any(|l| l.starts_with(part)), "the look at the machine misses every {part}: {seen:?}");
    }
    cluster.down()?;
    nothing_left(&before, &[name])
}

#[test]
fn a_supervisor_killed_in_the_middle_of_up_leaves_nothing_after_down() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let name = "e2e-crash-up";
    let before = Footprint::take()?;
    // `Cluster::up` waits until the lab is ready; this one is to be killed before.
    let towpath = towpath_walkthrough::cluster::towpath_binary()?;
    let lab = |args: &[&str]| {
        let mut command = Command::new(&towpath);
        command.arg("lab").args(args).args(["--name", name]).stdin(Stdio::null());
        command
    };
    let node = Path::new("/run/netns").join(format!("tp-{name}-n1"));
    let version = towpath_datapath::abi::TP_ABI_VERSION;
    let programs = Path::new("/run/towpath/lab").join(name).join(format!("nodes/n1/bpf/towpath-v{version}"));
    for moment in [node, programs] {
        let mut up = lab(&["up", "--nodes", "2"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let killed = wait("the moment and a supervisor", Duration::from_secs(20), || {
            if !moment.exists() {
                bail!("{} is not there", moment.display());
            }
            machine::kill(supervisor(name)?)
        });
        let status = up.wait()?;
        let down = lab(&["down"]).output()?;
        killed?;
        assert!(!status.success(), "`lab up` says that all is well although its supervisor was killed");
        assert!(down.status.success(), "lab down: {}", String::from_utf8_lossy(&down.stderr));
        nothing_left(&before, &[name]).with_context(|| format!("killed when {} was there", moment.display()))?;
    }
    Ok(())
}

#[test]
fn a_supervisor_killed_later_leaves_nothing_after_down() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let name = "e2e-crash";
    let before = Footprint::take()?;
    let cluster = Cluster::up(name, 2, Families::Ipv4)?;
    server(&cluster, "n1")?;
    machine::kill(supervisor(name)?)?;
    cluster.down()?;
    nothing_left(&before, &[name])
}

#[test]
fn two_labs_side_by_side_do_not_meet() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let names = ["e2e-left", "e2e-right"];
    let before = Footprint::take()?;
    let (left, right) = std::thread::scope(|scope| {
        let [left, right] = names.map(|name| scope.spawn(move || Cluster::up(name, 2, Families::Ipv4)));
        (left.join(), right.join())
    });
    let left = left.map_err(|_| anyhow::anyhow!("panicked"))??;
    let right = right.map_err(|_| anyhow::anyhow!("panicked"))??;
    for cluster in [&left, &right] {
        server(cluster, "n2")?;
    }
    let fetch = |cluster: &Cluster| -> Result<String> {
        let said = cluster.node("n1", &format!("curl -sS -m 4 http://{}/", host(&cluster.wait_pod("web")?.ip)))?;
        anyhow::ensure!(said.ok, "n1 of lab {} does not reach its pod: {}", cluster.name(), said.all());
        Ok(said.out)
    };
    fetch(&left)?;
    fetch(&right)?;
    left.down()?;
    fetch(&right).context("after the other lab went down")?;
    right.down()?;
    nothing_left(&before, &names)
}
