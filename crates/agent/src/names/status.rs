//! The names socket: [`NodeNames`] to whoever connects (`towpath dns names`, `towpath explain`). Root only.

use std::collections::BTreeMap;
use std::sync::PoisonError;

use anyhow::Result;
use tokio_util::task::AbortOnDropHandle;
use towpath_model::NodeName;
use towpath_wire::config::AgentConfig;
use towpath_wire::names::{LearnedAddress, LearnedName, NodeNames, RefusedAddress};

use super::book::Book;
use crate::json_socket;
use crate::status::SharedSources;

/// Serves the socket until the handle is dropped.
///
/// # Errors
/// The socket cannot be made.
pub(crate) fn serve(config: &AgentConfig, node: &NodeName, sources: SharedSources) -> Result<AbortOnDropHandle<()>> {
    let node = node.to_string();
    json_socket::serve(&config.names_socket(), move || {
        let (node, sources) = (node.clone(), sources.clone());
        async move {
            let Some(sources) = sources.get() else {
                return NodeNames { node, starting: true, ..NodeNames::default() };
            };
            answer(node, &sources.book.read().unwrap_or_else(PoisonError::into_inner))
        }
    })
}

fn answer(node: String, book: &Book) -> NodeNames {
    let now = book.now();
    let mut names: BTreeMap<&str, Vec<LearnedAddress>> = BTreeMap::new();
    for pair in book.learned().iter() {
        // What is overdue is there because somebody is connected to it, or will be seen to be gone within seconds.
        let seconds = pair.until.checked_sub(now).map_or(0, |left| left.as_secs());
        names.entry(pair.name).or_default().push(LearnedAddress { address: pair.address, seconds });
    }
    let counts = book.counts();
    NodeNames {
        node,
        starting: false,
        asked: book.patterns().iter().map(ToString::to_string).collect(),
        names: names.into_iter().map(|(name, addresses)| LearnedName { name: name.to_owned(), addresses }).collect(),
        refused: book
            .refusals()
            .map(|refusal| RefusedAddress {
                name: refusal.name.clone(),
                address: refusal.address,
                why: refusal.why.to_string(),
                times: refusal.times,
            })
            .collect(),
        learned_total: counts.learned,
        refused_total: counts.refused,
        evicted_total: counts.evicted,
        forgotten_total: counts.forgotten,
    }
}
