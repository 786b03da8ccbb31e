//! What came of a check against what had to: pure, but for asking the API server why a packet may not pass.

use kube::Client;
use serde::Serialize;
use towpath_lab::layout::LabName;

use super::checks::{Cast, Check, Phase, Want};
use crate::configured::Found;
use crate::probe::{Answer, Outcome};

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Status {
    /// As it should.
    Passed,
    /// Otherwise.
    Failed,
    /// It could not be tried here, and that is no fault.
    Skipped,
}

/// A check's result.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct CheckResult {
    /// The check's.
    pub(super) name: String,
    pub(super) phase: Phase,
    /// The pod that tried.
    pub(super) from: String,
    /// Its node.
    pub(super) from_node: String,
    /// Whom, in words.
    pub(super) to: String,
    pub(super) status: Status,
    /// What came of it.
    pub(super) said: String,
    /// Attempts until it came out so.
    pub(super) attempts: u32,
    /// Of the last attempt.
    pub(super) seconds: f64,
    /// For one that failed: what to run.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) next: Vec<String>,
    /// For one that failed: what `towpath explain` says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) explanation: Option<String>,
    #[serde(skip)]
    pub(super) explain: Option<[String; 3]>,
}

impl CheckResult {
    /// The result of a check as it was answered; none: its pod did not answer, for this reason.
    pub(super) fn of(check: &Check, answer: Result<&Answer, String>) -> Self {
        let (status, said, attempts, millis) = match answer {
            Ok(answer) => {
                let (status, said) = match against(&check.want, &answer.outcome) {
                    Ok(said) => (Status::Passed, said),
                    Err(said) => (Status::Failed, said),
                };
                (status, said, answer.attempts, answer.millis)
            }
            Err(why) => (Status::Failed, format!("could not be tried: {why}"), 0, 0),
        };
        Self {
            name: check.name.clone(),
            phase: check.phase,
            from: check.from.pod.clone(),
            from_node: check.from.node.clone(),
            to: check.to.clone(),
            status,
            said,
            attempts,
            seconds: std::time::Duration::from_millis(millis).as_secs_f64(),
            next: Vec::new(),
            explanation: None,
            explain: check.explain.clone(),
        }
    }

    /// The result of counting drops before and after packets were denied.
    pub(super) fn of_drops(check: &Check, before: &Outcome, after: &Outcome, port: u16) -> Self {
        let (status, said) = drops_seen(before, after, port);
        Self { status, said, ..Self::of(check, Err(String::new())) }
    }

    /// A part of the test could not be set up; the rest goes on.
    pub(super) fn not_set_up(name: &str, cast: &Cast, why: &str) -> Self {
        let node = cast.nodes.first().map(|node| node.name.clone()).unwrap_or_default();
        Self {
            name: name.to_owned(),
            phase: Phase::Open,
            from: "towpath".to_owned(),
            from_node: node,
            to: format!("host port {}", cast.host_port),
            status: Status::Failed,
            said: why.to_owned(),
            attempts: 0,
            seconds: 0.0,
            next: vec!["towpath connectivity test --host-port PORT    # one that is free on the nodes".to_owned()],
            explanation: None,
            explain: None,
        }
    }
}

/// Whether an outcome is what is wanted; either way what came, in words.
pub(super) fn against(want: &Want, outcome: &Outcome) -> Result<String, String> {
    match (want, outcome) {
        (Want::Served { by, client }, Outcome::Served(served)) => {
            if !by.contains(&served.pod) {
                return Err(format!("pod {:?} answered instead of {}", served.pod, by.join(" or ")));
            }
            match (client, served.client) {
                (Some(wanted), Some(seen)) if !wanted.contains(&seen) => Err(format!(
                    "pod {} sees the client as {seen}, not by its own address {}: it was translated on the way",
                    served.pod,
                    wanted.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ")
                )),
                _ => Ok(format!("{} answered", served.pod)),
            }
        }
        (Want::Bytes(wanted), Outcome::Bytes(got)) => match wanted {
            Some(wanted) if wanted != got => Err(format!("{got} of {wanted} bytes")),
            _ => Ok(format!("{got} bytes")),
        },
        (Want::Connected, Outcome::Connected) => Ok("connected".to_owned()),
        (Want::Addresses(wanted), Outcome::Addresses(got)) => match wanted {
            Some(wanted) if wanted != got => Err(format!("its addresses are {got:?}, not {wanted:?}")),
            _ => Ok(format!("{got:?}")),
        },
        (Want::Silence, Outcome::Silent) => Ok("dropped".to_owned()),
        (Want::Silence, Outcome::Refused) => {
            Err("refused, where a packet that is denied must be dropped: is something listening there?".to_owned())
        }
        (Want::Silence, other) => Err(format!("the policy does not deny it: {}", in_words(other))),
        (_, other) => Err(in_words(other)),
    }
}

fn in_words(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Served(served) => format!("pod {} answered", served.pod),
        Outcome::Bytes(bytes) => format!("{bytes} bytes came"),
        Outcome::Connected => "connected".to_owned(),
        Outcome::Addresses(addresses) => format!("it has addresses {addresses:?}"),
        Outcome::Text(text) => format!("a text of {} bytes came", text.len()),
        Outcome::Refused => "refused".to_owned(),
        Outcome::Silent => "no answer".to_owned(),
        Outcome::Failed(why) => why.clone(),
    }
}

/// Whether the agent of the guarded pod's node counted drops by policy while packets were denied.
pub(super) fn drops_seen(before: &Outcome, after: &Outcome, port: u16) -> (Status, String) {
    let count = |outcome: &Outcome| match outcome {
        Outcome::Text(text) => Some(policy_drops(text)),
        _ => None,
    };
    match (count(before), count(after)) {
        (Some(before), Some(after)) if after > before => {
            (Status::Passed, format!("{} packets counted as dropped by policy", after - before))
        }
        (Some(_), Some(_)) => (Status::Failed, "the agent counted no packet as dropped by policy".to_owned()),
        _ => {
            let why = in_words(after);
            (Status::Skipped, format!("no metrics at 127.0.0.1:{port} of the node ({why}); see --metrics-port"))
        }
    }
}

/// Packets that policy dropped, of a text in Prometheus's format.
pub(super) fn policy_drops(text: &str) -> u64 {
    let ours = text.lines().filter(|line| line.starts_with("towpath_drop_packets_total{"));
    let by_policy = ours.filter(|line| line.contains("_policy\""));
    by_policy.filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
}

/// Checks of packets as large as they may be.
const LARGE: [&str; 4] = ["full-packet", "fragments", "download", "upload"];

/// Where small packets pass and large ones do not, that is the answer.
fn note_small_mtu(results: &mut [CheckResult]) {
    let pair = |result: &CheckResult| (result.from.clone(), result.to.clone());
    let small: Vec<(String, String)> =
        results.iter().filter(|r| r.status == Status::Passed && r.name.contains("/udp/")).map(pair).collect();
    for result in results.iter_mut().filter(|r| r.status == Status::Failed) {
        if LARGE.iter().any(|large| result.name.contains(large)) && small.contains(&pair(result)) {
            result.next.push(
                "small packets pass and large ones do not: what is between the nodes carries less than pods' MTU; lower it \
                 (spec.mtu of NetworkConfig default, or towpath install --mtu)"
                    .to_owned(),
            );
        }
    }
}

/// The results, with what to do about those that failed, as the cluster is now.
pub(super) async fn explained(
    client: &Client,
    lab: Option<&LabName>,
    namespace: &str,
    mut results: Vec<CheckResult>,
) -> Vec<CheckResult> {
    if results.iter().all(|result| result.status != Status::Failed) {
        return results;
    }
    let (world, found) = (crate::kubernetes::world(client).await, Found::ask(client, lab).await);
    note_small_mtu(&mut results);
    for result in results.iter_mut().filter(|result| result.status == Status::Failed) {
        result.next.push(format!("towpath status    # on node {}", result.from_node));
        let Some([from, to, port]) = &result.explain else { continue };
        let again = format!("towpath connectivity test --keep --only {}", result.name);
        result.next.push(format!("{again} && towpath explain -n {namespace} {from} {to} {port}"));
        result.explanation = match &world {
            Ok(world) => crate::explain::in_words(world, &found, namespace, [from, to, port]).ok(),
            Err(_) => None,
        };
    }
    results
}
