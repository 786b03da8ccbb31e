//! Has the pods ask: one `exec` a pod and portion, all pods at once, an answer a line as it comes.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use kube::api::{Api, AttachParams};
use tokio::io::{AsyncBufReadExt, BufReader};

use super::checks::Check;
use super::judge::{CheckResult, Status};
use super::manifests::PROGRAM;
use super::report::Reporter;
use crate::probe::{Answer, Ask, Outcome};

/// A list goes in the address of a request, which may not be long.
const PORTION: usize = 12;

/// Runs the checks; the results are in the order of the checks.
pub(super) async fn run(client: &Client, namespace: &str, checks: &[Check], reporter: &Reporter) -> Vec<CheckResult> {
    let mut by_pod: BTreeMap<&str, Vec<(usize, &Check)>> = BTreeMap::new();
    for (id, check) in checks.iter().enumerate() {
        by_pod.entry(&check.from.pod).or_default().push((id, check));
    }
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let asking = by_pod.into_iter().map(|(pod, checks)| {
        let api = api.clone();
        async move {
            let mut results: Vec<(usize, CheckResult)> = Vec::new();
            for portion in checks.chunks(PORTION) {
                let in_vain = results.iter().any(|(_, result)| result.status == Status::Failed);
                results.extend(ask_portion(&api, pod, portion, in_vain, reporter).await);
            }
            results
        }
    });
    let mut results: Vec<(usize, CheckResult)> =
        futures::future::join_all(asking).await.into_iter().flatten().collect();
    results.sort_by_key(|(id, _)| *id);
    results.into_iter().map(|(_, result)| result).collect()
}

async fn ask_portion(
    api: &Api<Pod>,
    pod: &str,
    checks: &[(usize, &Check)],
    in_vain: bool,
    reporter: &Reporter,
) -> Vec<(usize, CheckResult)> {
    let asks = checks.iter().map(|(id, check)| check.ask(*id));
    let asks: Vec<Ask> = asks.map(|ask| if in_vain { ask.impatient() } else { ask }).collect();
    let mut results: BTreeMap<usize, CheckResult> = BTreeMap::new();
    let outcome = exec(api, pod, &asks, |answer| {
        if let Some((id, check)) = checks.iter().find(|(id, _)| *id == answer.id) {
            let result = CheckResult::of(check, Ok(&answer));
            reporter.result(&result);
            results.insert(*id, result);
        }
    })
    .await;
    let why = match outcome {
        Ok(()) => format!("pod {pod} gave no answer to it"),
        Err(error) => format!("{error:#}"),
    };
    for (id, check) in checks {
        results.entry(*id).or_insert_with(|| {
            let result = CheckResult::of(check, Err(why.clone()));
            reporter.result(&result);
            result
        });
    }
    results.into_iter().collect()
}

/// One thing, asked by itself.
pub(super) async fn one(client: &Client, namespace: &str, pod: &str, ask: Ask) -> Outcome {
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let mut outcome = None;
    let done = exec(&api, pod, &[ask], |answer| outcome = Some(answer.outcome)).await;
    outcome.unwrap_or_else(|| {
        Outcome::Failed(done.err().map_or_else(|| "no answer".to_owned(), |error| format!("{error:#}")))
    })
}

async fn exec(api: &Api<Pod>, pod: &str, asks: &[Ask], mut answered: impl FnMut(Answer)) -> Result<()> {
    let list = serde_json::to_string(asks)?;
    let command = [PROGRAM, "probe", "ask", &list];
    let params = AttachParams::default().stdin(false).stdout(true).stderr(true);
    let mut session = api.exec(pod, command, &params).await.with_context(|| {
        format!("could not run a command in pod {pod}: can the API server reach its node's kubelet?")
    })?;
    let status = session.take_status();
    let (out, err) = (session.stdout(), session.stderr());
    let answers = async {
        let Some(out) = out else { return Ok::<(), anyhow::Error>(()) };
        let mut lines = BufReader::new(out).lines();
        while let Some(line) = lines.next_line().await? {
            match serde_json::from_str(&line) {
                Ok(answer) => answered(answer),
                Err(error) => anyhow::bail!(
                    "pod {pod} said {line:?}, which is no answer ({error}): is its image of another version?"
                ),
            }
        }
        Ok(())
    };
    let complaints = async {
        let mut text = String::new();
        if let Some(mut err) = err {
            let _ = tokio::io::AsyncReadExt::read_to_string(&mut err, &mut text).await;
        }
        text
    };
    let (answers, complaints) = futures::join!(answers, complaints);
    answers?;
    let status = match status {
        Some(status) => status.await,
        None => None,
    };
    if let Some(status) = status.filter(|status| status.status.as_deref() != Some("Success")) {
        anyhow::bail!("{} in pod {pod}: {} {}", PROGRAM, status.message.unwrap_or_default(), complaints.trim());
    }
    Ok(())
}
