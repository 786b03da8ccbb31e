//! `towpath carry --started`, which a start-up probe runs: it is the carry of its own container that counts, and not the one that is
//! to be replaced.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test says what failed by panicking, in its helpers too")]

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A process that ends with the test; its PID namespace with it.
struct Owned(Child);

impl Drop for Owned {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// A program in a PID namespace of its own, as in a container.
fn contained(arguments: &[&str]) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc", env!("CARGO_BIN_EXE_towpath")]).args(arguments);
    command
}

fn carry(config: &Path) -> Owned {
    let mut command = contained(&["carry", "--config", config.to_str().unwrap()]);
    Owned(command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
}

fn eventually(what: &str, check: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !check() {
        assert!(Instant::now() < deadline, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The process in the namespace that `unshare` made.
fn inside(owned: &Owned) -> String {
    let children = format!("/proc/{0}/task/{0}/children", owned.0.id());
    std::fs::read_to_string(children).unwrap().trim().to_owned()
}

#[test]
fn a_carry_has_started_when_it_is_the_one_that_answers() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: PID namespaces and port 53 need root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("carry.yaml");
    let [.., high, low] = std::process::id().to_be_bytes();
    let text = format!(
        "{{runDir: {0}/run, stateDir: {0}/state, dnsAddresses: [127.53.{high}.{low}], upstreams: ['127.0.0.1:1']}}\n",
        dir.path().display()
    );
    std::fs::write(&config, text).unwrap();
    let asked = ["carry", "--config", config.to_str().unwrap(), "--started"];
    let elsewhere = || contained(&asked).output().unwrap();
    let beside = |carry: &Owned| {
        let mut command = Command::new("nsenter");
        command.args(["--target", &inside(carry), "--pid", "--mount", env!("CARGO_BIN_EXE_towpath")]).args(asked);
        command.output().unwrap()
    };
    let none = elsewhere();
    assert!(!none.status.success() && String::from_utf8(none.stderr).unwrap().contains("no carry answers"));

    let first = carry(&config);
    eventually("the first has started", || beside(&first).status.success());
    assert_eq!(elsewhere().status.code(), Some(1), "the first is not of that namespace");
    let second = carry(&config);
    eventually("the second has started", || beside(&second).status.success());
    assert_eq!(beside(&first).status.code(), Some(1), "the first has handed over");
    drop(second);
    eventually("the first has taken everything back", || beside(&first).status.success());
}
