//! `towpath status --watch`: how far the nodes are with a change of backend, as their `NodeNetwork`s say, until it is done.
//!
//! ```text
//! NetworkConfig: which backend is wanted, its generation ─┐
//! Nodes, NodeNetworks: what is in force on each, who is ──┴─► View, a line each ─► a terminal (in place), lines, or JSON
//! behind and why
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1 as core;
use kube::ResourceExt;
use kube::api::{Api, ListParams};
use serde::Serialize;
use towpath_model::custom::{NETWORK_CONFIG_NAME, NetworkConfig, NodeNetwork, NodeNetworkStatus};

use crate::place::Where;

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(500);

/// What the cluster's configuration asks for.
#[derive(Clone, Debug, Default)]
struct Wanted {
    /// None: what the agents' own configuration says.
    backend: Option<&'static str>,
    generation: Option<i64>,
}

/// How far a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum State {
    /// Nothing more is to come.
    Done,
    /// It is, but for nodes that it cannot reach so, which are named.
    DoneButFor,
    /// It is on its way.
    Changing,
    /// Nothing is known of it.
    Silent,
}

/// A node, as it is shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct View {
    node: String,
    state: State,
    /// Backend that it sends by.
    backend: String,
    /// Backends that it takes.
    receives: Vec<String>,
    #[serde(rename = "podMTU", skip_serializing_if = "Option::is_none")]
    pod_mtu: Option<u32>,
    /// What it says of it.
    message: String,
}

impl View {
    fn of(node: &str, status: Option<&NodeNetworkStatus>, wanted: &Wanted) -> Self {
        let silent = |message: &str| Self {
            node: node.to_owned(),
            state: State::Silent,
            backend: String::new(),
            receives: Vec::new(),
            pod_mtu: None,
            message: message.to_owned(),
        };
        let Some(status) = status else {
            return silent(
                "its agent has said nothing yet: is one running there (kubectl -n kube-system get pods -o wide)?",
            );
        };
        let settled = status.conditions.iter().find(|condition| condition.type_ == "Settled");
        let backend = status.backend.map_or("", |backend| backend.as_str());
        let (state, message) = if status.network_config_generation != wanted.generation {
            let says = |generation: Option<i64>| generation.map_or_else(|| "none".to_owned(), |n| n.to_string());
            let (has, wants) = (says(status.network_config_generation), says(wanted.generation));
            (
                State::Changing,
                format!("has generation {has} of the NetworkConfig in force, not {wants}; is its agent running?"),
            )
        } else if wanted.backend.is_some_and(|wanted| wanted != backend) {
            (State::Changing, "its agent is starting with the new backend".to_owned())
        } else {
            match settled {
                None => return silent("its agent does not say how far it is: is it of this version?"),
                Some(condition) => (
                    match (condition.status.as_str(), condition.reason.as_str()) {
                        ("True", "AllNodes") => State::Done,
                        ("True", _) => State::DoneButFor,
                        _ => State::Changing,
                    },
                    condition.message.clone(),
                ),
            }
        };
        Self {
            node: node.to_owned(),
            state,
            backend: backend.to_owned(),
            receives: status.receive_ready.iter().map(|backend| backend.as_str().to_owned()).collect(),
            pod_mtu: status.pod_mtu,
            message,
        }
    }

    fn is_done(&self) -> bool {
        matches!(self.state, State::Done | State::DoneButFor)
    }

    fn line(&self) -> String {
        let state = match self.state {
            State::Done => "done",
            State::DoneButFor => "done, but for some",
            State::Changing => "changing",
            State::Silent => "silent",
        };
        let backend = if self.backend.is_empty() { "-" } else { &self.backend };
        let mtu = self.pod_mtu.map_or_else(|| "-".to_owned(), |mtu| mtu.to_string());
        format!(
            "{}: {state}; sends by {backend}, takes {}, MTU {mtu}; {}",
            self.node,
            self.receives.join(", "),
            self.message
        )
    }
}

async fn look(client: &kube::Client) -> Result<Vec<View>> {
    let config = Api::<NetworkConfig>::all(client.clone()).get_opt(NETWORK_CONFIG_NAME).await;
    let wanted = config.context("could not read NetworkConfig default")?.map_or_else(Wanted::default, |config| {
        Wanted { backend: config.spec.backend.map(|backend| backend.as_str()), generation: config.metadata.generation }
    });
    let all = ListParams::default();
    let said = Api::<NodeNetwork>::all(client.clone()).list(&all).await.context("could not list NodeNetworks")?;
    let said: BTreeMap<String, NodeNetwork> =
        said.items.into_iter().map(|object| (object.name_any(), object)).collect();
    let nodes = Api::<core::Node>::all(client.clone()).list_metadata(&all).await.context("could not list nodes")?;
    let names: BTreeSet<String> = nodes.items.iter().map(ResourceExt::name_any).collect();
    // An object outlives its node by a moment.
    let view = |name: &String| View::of(name, said.get(name).and_then(|object| object.status.as_ref()), &wanted);
    Ok(names.iter().map(view).collect())
}

/// Where the lines go.
enum Screen {
    /// In place: how many lines are there.
    Terminal(usize),
    /// A line whenever one is another.
    Lines(BTreeMap<String, String>),
    /// All nodes, as one line of JSON, whenever one is another.
    Json(Vec<View>),
}

impl Screen {
    fn show(&mut self, views: &[View]) -> Result<()> {
        match self {
            Self::Terminal(there) => {
                let mut text = String::new();
                if *there > 0 {
                    text.push_str(&format!("\x1b[{there}A"));
                }
                let room = terminal_width();
                for view in views {
                    // Longer than the terminal is wide it would be two lines, and the next look would be at the wrong place.
                    let line: String = view.line().chars().take(room).collect();
                    text.push_str(&format!("\x1b[2K{line}\n"));
                }
                // Nodes that went.
                text.push_str("\x1b[J");
                *there = views.len();
                let mut out = std::io::stdout();
                out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("standard output")
            }
            Self::Lines(shown) => {
                for view in views {
                    let line = view.line();
                    if shown.get(&view.node) != Some(&line) {
                        crate::print(&line)?;
                        shown.insert(view.node.clone(), line);
                    }
                }
                Ok(())
            }
            Self::Json(shown) => {
                if shown != views {
                    crate::print(&serde_json::to_string(views)?)?;
                    *shown = views.to_vec();
                }
                Ok(())
            }
        }
    }
}

fn terminal_width() -> usize {
    rustix::termios::tcgetwinsize(std::io::stdout())
        .ok()
        .map(|size| usize::from(size.ws_col))
        .filter(|columns| *columns > 0)
        .unwrap_or(usize::MAX)
}

/// Shows it until it is done, which is a success, or the time is over.
///
/// # Errors
/// There is no cluster to ask, or it refuses. An API server that does not answer for a while is waited for.
pub(crate) async fn watch(place: &Where, timeout: Duration) -> Result<bool> {
    let cluster = place.cluster().await?;
    let until = Instant::now() + timeout;
    let mut screen = match place.output {
        crate::Output::Json => Screen::Json(Vec::new()),
        crate::Output::Text if std::io::stdout().is_terminal() => Screen::Terminal(0),
        crate::Output::Text => Screen::Lines(BTreeMap::new()),
    };
    let mut seen = false;
    loop {
        let error = match look(&cluster.client).await {
            Ok(views) => {
                seen = true;
                screen.show(&views)?;
                if !views.is_empty() && views.iter().all(View::is_done) {
                    return Ok(true);
                }
                None
            }
            Err(error) if !seen => return Err(error),
            Err(error) => Some(error),
        };
        if Instant::now() >= until {
            return error.map_or(Ok(false), Err);
        }
        tokio::time::sleep(PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const WANTED: Wanted = Wanted { backend: Some("host-gw"), generation: Some(3) };

    fn view(status: serde_json::Value) -> View {
        View::of("n1", Some(&serde_json::from_value(status).unwrap()), &WANTED)
    }

    fn status(generation: i64, backend: &str, settled: &str, reason: &str) -> serde_json::Value {
        json!({
            "backend": backend, "receiveReady": ["vxlan", "host-gw"], "networkConfigGeneration": generation, "podMTU": 1500,
            "conditions": [{
                "type": "Settled", "status": settled, "reason": reason, "message": "what it says",
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            }],
        })
    }

    #[test]
    fn a_node_is_done_when_it_says_so_of_this_very_change() {
        assert_eq!(view(status(3, "host-gw", "True", "AllNodes")).state, State::Done);
        assert_eq!(view(status(3, "host-gw", "True", "NotAllNodes")).state, State::DoneButFor);
        assert_eq!(view(status(3, "host-gw", "False", "Changing")).state, State::Changing);
        let before = view(status(2, "host-gw", "True", "AllNodes"));
        assert_eq!(before.state, State::Changing, "what it says is of the configuration before");
        assert!(before.line().contains("has generation 2") && before.line().contains("not 3"), "{}", before.line());
        assert_eq!(view(status(3, "vxlan", "True", "AllNodes")).state, State::Changing, "of the run before");
        assert_eq!(View::of("n1", None, &WANTED).state, State::Silent);
        let mut older = status(3, "host-gw", "True", "AllNodes");
        older["conditions"] = json!([]);
        assert_eq!(view(older).state, State::Silent, "an agent of another version says nothing of it");
    }

    #[test]
    fn a_line_has_what_a_person_asks_for() {
        let line = view(status(3, "host-gw", "True", "NotAllNodes")).line();
        assert_eq!(line, "n1: done, but for some; sends by host-gw, takes vxlan, host-gw, MTU 1500; what it says");
    }
}
