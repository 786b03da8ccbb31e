//! `towpath observe --drops --local`, against an agent that is none: what is printed of what it says.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test says what failed by panicking, in its helpers too"
)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::process::{Child, Command, Stdio};

use towpath_wire::config::AgentConfig;
use towpath_wire::observe::{DropEvent, Told};

/// An agent that says these lines to each who comes, and then nothing more.
fn agent(run_dir: &std::path::Path, said: &[Told]) {
    let config = AgentConfig { run_dir: run_dir.to_owned(), ..AgentConfig::default() };
    let listener = UnixListener::bind(config.observe_socket()).unwrap();
    let lines: String = said.iter().map(|told| serde_json::to_string(told).unwrap() + "\n").collect();
    std::thread::spawn(move || {
        for reader in listener.incoming() {
            let mut reader = reader.unwrap();
            reader.write_all(lines.as_bytes()).unwrap();
            // Until it goes.
            drop(reader.read(&mut [0]));
        }
    });
}

fn dropped(reason: &str) -> Told {
    Told::Drop(Box::new(DropEvent { node: "n1".into(), reason: reason.into(), ..DropEvent::default() }))
}

fn said() -> [Told; 4] {
    [Told::Listening { node: "n1".into() }, dropped("egress_policy"), dropped("no_pod"), dropped("egress_policy")]
}

/// Started with its input open, and nothing to say in it.
fn observe(run_dir: &std::path::Path, args: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_towpath"));
    command.args(["observe", "--drops", "--local", "--run-dir"]).arg(run_dir).args(args);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()
}

#[test]
fn json_of_this_nodes_agent_is_filtered_and_counted_like_text() {
    let dir = tempfile::tempdir().unwrap();
    agent(dir.path(), &said());
    for output in ["json", "text"] {
        let args = ["-o", output, "--reason", "no_pod", "--count", "1", "--duration", "60"];
        let out = observe(dir.path(), &args).wait_with_output().unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        assert!(out.status.success(), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
        match output {
            "json" => assert_eq!(serde_json::from_str::<DropEvent>(&text).unwrap().reason, "no_pod"),
            _ => assert!(text.contains("n1 DROPPED no_pod"), "{text}"),
        }
    }
}

#[test]
fn a_relay_prints_all_as_it_is_said_and_ends_with_its_input() {
    let dir = tempfile::tempdir().unwrap();
    agent(dir.path(), &said());
    let mut relay = observe(dir.path(), &["--relay"]);
    let mut lines = BufReader::new(relay.stdout.take().unwrap()).lines();
    for told in said() {
        assert_eq!(serde_json::from_str::<Told>(&lines.next().unwrap().unwrap()).unwrap(), told);
    }
    drop(relay.stdin.take());
    assert!(relay.wait().unwrap().success());
    assert!(lines.next().is_none());
}

#[test]
fn a_relay_takes_no_filter_that_it_would_not_heed() {
    let dir = tempfile::tempdir().unwrap();
    let refused = observe(dir.path(), &["--relay", "--count", "1"]).wait_with_output().unwrap();
    assert_eq!(refused.status.code(), Some(2));
}
