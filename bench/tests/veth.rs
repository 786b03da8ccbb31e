//! One tiny row, end to end: two veth pairs and a bridge carry traffic and nothing of them stays.

use std::process::Command;

use serde_json::Value;

/// Command lines of processes that hold a namespace for this binary: there are none before and after a run.
fn holders() -> Vec<String> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let lines = entries.filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok());
    let lines = lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " "));
    lines.filter(|line| line.contains(env!("CARGO_BIN_EXE_towpath-bench")) && line.contains(" hold tpb-")).collect()
}

#[test]
fn a_row_of_veth_pairs_is_measured_and_leaves_nothing() {
    if !nix::unistd::Uid::effective().is_root() {
        assert!(std::env::var_os("CI").is_none(), "this test makes network namespaces: run it as root");
        eprintln!("skipped: this test makes network namespaces and needs root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name).display().to_string();
    let (json, markdown, svg) = (file("all.json"), file("table.md"), file("plot.svg"));
    assert_eq!(holders(), Vec::<String>::new(), "another run is going on");
    let output = Command::new(env!("CARGO_BIN_EXE_towpath-bench"))
        .args(["--baselines-only", "--only", "same-node", "--measures", "rr", "--rounds", "3", "--block", "0.1"])
        .args(["--max-foreign", "1000", "--max-steal", "1000", "--seed", "1"])
        .args(["--json", &json, "--markdown", &markdown, "--svg", &svg])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let all: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    let series = &all["measured"][0]["series"];
    assert_eq!(series["arms"], serde_json::json!(["veth pair", "another veth pair", "Linux bridge"]));
    let rounds = series["rounds"].as_array().unwrap();
    assert_eq!(rounds.len(), 3);
    for block in rounds.iter().flat_map(|round| round.as_array().unwrap()) {
        // A round trip of one byte takes some microseconds: no machine does ten million a second, all do more than ten.
        let (value, cpu) = (block["value"].as_f64().unwrap(), block["cpu"].as_f64().unwrap());
        assert!((10.0..1e7).contains(&value), "{value} transactions a second");
        assert!((0.1..1e5).contains(&cpu), "{cpu} µs of CPU a transaction");
    }
    assert_eq!(all["rows"][0]["id"], "same-node.rr.bridge-veth");
    assert_eq!(all["rows"][0]["kept"], 3);
    assert!(std::fs::read_to_string(markdown).unwrap().contains("| same node, TCP RR: Linux bridge"));
    assert!(std::fs::read_to_string(svg).unwrap().contains("<circle"));

    assert_eq!(holders(), Vec::<String>::new(), "a namespace stays");
}
