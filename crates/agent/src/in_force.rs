//! The policy socket: [`InForce`] to whoever connects (`towpath policy wait`). Root only.

use std::sync::PoisonError;

use anyhow::Result;
use tokio_util::task::AbortOnDropHandle;
use towpath_model::NodeName;
use towpath_plan::services::Refusal;
use towpath_wire::config::AgentConfig;
use towpath_wire::policy::InForce;

use crate::json_socket;
use crate::reconcile::Report;
use crate::status::SharedSources;

/// Serves the socket until the handle is dropped.
///
/// # Errors
/// The socket cannot be made.
pub(crate) fn serve(config: &AgentConfig, node: &NodeName, sources: SharedSources) -> Result<AbortOnDropHandle<()>> {
    let node = node.to_string();
    json_socket::serve(&config.policy_socket(), move || {
        let (node, sources) = (node.clone(), sources.clone());
        async move { answer(node, &sources) }
    })
}

fn answer(node: String, sources: &SharedSources) -> InForce {
    let Some(sources) = sources.get() else {
        let failing = "the agent has just started, and what it enforces is an earlier one's".to_owned();
        return InForce { node, failing, ..InForce::default() };
    };
    of_report(node, &sources.report.read().unwrap_or_else(PoisonError::into_inner))
}

fn of_report(node: String, report: &Report) -> InForce {
    let failing = match report.failures.get("policy") {
        Some(error) => format!("the policies could not be written to the kernel: {error}"),
        None if report.recalled => {
            "the API server has not listed everything since this agent started: it enforces what an earlier one knew"
                .to_owned()
        }
        None => String::new(),
    };
    let outliving = report.outliving.iter().map(ToString::to_string).collect();
    let aside = report.aside.iter().map(Refusal::object).collect();
    InForce { node, kinds: report.heard.told(), outliving, aside, failing }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_written_or_is_only_recalled_is_said() {
        let mut report = Report::default();
        assert_eq!(of_report("n1".to_owned(), &report).failing, "");
        report.recalled = true;
        assert!(of_report("n1".to_owned(), &report).failing.contains("an earlier one"));
        report.failures.insert("policy", "no room".to_owned());
        assert!(of_report("n1".to_owned(), &report).failing.contains("no room"));
    }
}
