//! The status of the `NetworkConfig`: which generation every node has in force, and who is in charge of Services and DNS where, with
//! the way to hand over. Watches what the nodes say of themselves (`NodeNetwork`), and writes when it adds up to something new.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::watched::{Watched, until};
use futures::StreamExt;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use kube::runtime::watcher;
use kube::runtime::{WatchStreamExt, watcher::watcher as watch};
use serde_json::json;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use towpath_model::custom::{API_VERSION, NETWORK_CONFIG_NAME, NetworkConfig, NetworkConfigStatus, NodeNetwork};

/// Field manager of what is written.
const MANAGER: &str = "towpath-controller";
/// Nodes change together: what they say within this time is one write.
const WINDOW: Duration = Duration::from_millis(500);
/// What could not be written is tried again after this time.
const RETRY: Duration = Duration::from_secs(5);
/// So many nodes are named in a message.
const NAMED: usize = 5;

/// What a node says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Said {
    generation: Option<i64>,
    proxy: Option<String>,
    dns: Option<String>,
}

impl Said {
    fn of(node: &NodeNetwork) -> Self {
        let status = node.status.clone().unwrap_or_default();
        Self { generation: status.network_config_generation, proxy: status.service_proxy, dns: status.dns }
    }
}

/// Works until told to stop.
pub(crate) async fn work(client: Client, stop: CancellationToken) {
    let configs: Api<NetworkConfig> = Api::all(client.clone());
    let only = watcher::Config::default().fields(&format!("metadata.name={NETWORK_CONFIG_NAME}"));
    let mut config_events = watch(configs.clone(), only).default_backoff().boxed();
    let nodes: Api<NodeNetwork> = Api::all(client);
    let mut node_events = watch(nodes, watcher::Config::default()).default_backoff().boxed();
    let (mut config, mut nodes) = (Watched::<NetworkConfig>::default(), Watched::<Said>::default());
    let mut write_at: Option<Instant> = None;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            event = config_events.next() => match event {
                None => return,
                // Also while the definitions are not installed.
                Some(Err(error)) => tracing::debug!(%error, "NetworkConfig cannot be watched"),
                Some(Ok(event)) => {
                    config.take(event, |config| config.metadata.name.clone(), Clone::clone);
                    write_at = write_at.or_else(|| Some(Instant::now() + WINDOW));
                }
            },
            event = node_events.next() => match event {
                None => return,
                Some(Err(error)) => tracing::debug!(%error, "NodeNetworks cannot be watched"),
                Some(Ok(event)) => {
                    if nodes.take(event, |node| node.metadata.name.clone(), Said::of) {
                        write_at = write_at.or_else(|| Some(Instant::now() + WINDOW));
                    }
                }
            },
            () = until(write_at) => {
                write_at = match (config.all.get(NETWORK_CONFIG_NAME), config.complete && nodes.complete) {
                    (Some(config), true) => match bring_up_to_date(&configs, config, &nodes.all).await {
                        Ok(()) => None,
                        Err(error) => {
                            tracing::warn!(%error, "could not write the status of NetworkConfig {NETWORK_CONFIG_NAME}; trying again");
                            Some(Instant::now() + RETRY)
                        }
                    },
                    _ => None,
                };
            }
        }
    }
}

async fn bring_up_to_date(
    api: &Api<NetworkConfig>,
    config: &NetworkConfig,
    nodes: &BTreeMap<String, Said>,
) -> Result<(), kube::Error> {
    let before = config.status.clone().unwrap_or_default();
    let now = status(config.metadata.generation, &before, nodes, Timestamp::now());
    if now == before {
        return Ok(());
    }
    let patch = json!({
        "apiVersion": API_VERSION, "kind": "NetworkConfig", "metadata": {"name": NETWORK_CONFIG_NAME}, "status": now,
    });
    match api.patch_status(NETWORK_CONFIG_NAME, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&patch)).await {
        // Deleted meanwhile: the watch says so.
        Err(kube::Error::Api(gone)) if gone.code == 404 => Ok(()),
        written => written.map(drop),
    }
}

/// The status that follows; a condition's time is that of its last change of `status`.
fn status(
    generation: Option<i64>,
    before: &NetworkConfigStatus,
    nodes: &BTreeMap<String, Said>,
    now: Timestamp,
) -> NetworkConfigStatus {
    let conditions = [applied(generation, nodes), services(nodes), dns(nodes)];
    let conditions = conditions.into_iter().map(|(type_, holds, reason, message)| {
        let status = if holds { "True" } else { "False" };
        let same = before.conditions.iter().find(|old| old.type_ == type_ && old.status == status);
        Condition {
            type_: type_.to_owned(),
            status: status.to_owned(),
            reason: reason.to_owned(),
            message,
            last_transition_time: same.map_or(Time(now), |old| old.last_transition_time.clone()),
            observed_generation: generation,
        }
    });
    NetworkConfigStatus { observed_generation: generation, conditions: conditions.collect() }
}

type Finding = (&'static str, bool, &'static str, String);

fn applied(generation: Option<i64>, nodes: &BTreeMap<String, Said>) -> Finding {
    let behind: Vec<&str> =
        nodes.iter().filter(|(_, said)| said.generation != generation).map(|(name, _)| name.as_str()).collect();
    if nodes.is_empty() {
        return ("Applied", false, "NoNodes", "no agent has said anything yet".to_owned());
    }
    let message = match behind.as_slice() {
        [] => format!("in force on all {} nodes whose agents have spoken", nodes.len()),
        _ => format!(
            "not in force on {} of {} nodes yet: {}; their agents' logs and `towpath status` there say why",
            behind.len(),
            nodes.len(),
            names(&behind)
        ),
    };
    ("Applied", behind.is_empty(), if behind.is_empty() { "AllNodes" } else { "NodesBehind" }, message)
}

/// Nodes by what they say, in words that go before their names.
fn by<'n>(
    nodes: &'n BTreeMap<String, Said>,
    of: impl Fn(&'n Said) -> Option<&'n str>,
) -> BTreeMap<&'n str, Vec<&'n str>> {
    let mut groups: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (name, said) in nodes {
        groups.entry(of(said).unwrap_or("undecided")).or_default().push(name);
    }
    groups
}

fn show(groups: &BTreeMap<&str, Vec<&str>>) -> String {
    let group = |(who, nodes): (&&str, &Vec<&str>)| format!("{who} on {} nodes ({})", nodes.len(), names(nodes));
    groups.iter().map(group).collect::<Vec<_>>().join("; ")
}

fn reason(groups: &BTreeMap<&str, Vec<&str>>) -> &'static str {
    let mut who = groups.keys();
    match (who.next().copied(), who.next()) {
        (None, _) => "NoNodes",
        (Some(_), Some(_)) => "Mixed",
        (Some("towpath"), None) => "Towpath",
        (Some("kube-proxy"), None) => "KubeProxy",
        (Some("coredns"), None) => "CoreDNS",
        (Some("stand-in"), None) => "StandIn",
        (Some("others"), None) => "Off",
        (Some(_), None) => "Undecided",
    }
}

fn services(nodes: &BTreeMap<String, Said>) -> Finding {
    let groups = by(nodes, |said| said.proxy.as_deref());
    let mut message = show(&groups);
    if groups.contains_key("kube-proxy") {
        message.push_str(
            "; pods are served by towpath everywhere. To hand over: spec.serviceProxy: towpath, then kubectl -n kube-system delete \
             daemonset kube-proxy",
        );
    }
    ("ServicesByTowpath", reason(&groups) == "Towpath", reason(&groups), message)
}

fn dns(nodes: &BTreeMap<String, Said>) -> Finding {
    let groups = by(nodes, |said| said.dns.as_deref());
    let mut message = show(&groups);
    if groups.contains_key("coredns") {
        message.push_str(
            ". To hand over: spec.dns: towpath, then kubectl -n kube-system scale deployment coredns --replicas=0",
        );
    }
    ("DNSByTowpath", reason(&groups) == "Towpath", reason(&groups), message)
}

fn names(nodes: &[&str]) -> String {
    let mut text = nodes.iter().take(NAMED).copied().collect::<Vec<_>>().join(", ");
    if nodes.len() > NAMED {
        text.push_str(&format!(" and {} more", nodes.len() - NAMED));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(said: &[(&str, i64, &str, &str)]) -> BTreeMap<String, Said> {
        let said = said.iter().map(|(name, generation, proxy, dns)| {
            let said =
                Said { generation: Some(*generation), proxy: Some((*proxy).to_owned()), dns: Some((*dns).to_owned()) };
            ((*name).to_owned(), said)
        });
        said.collect()
    }

    fn condition<'s>(status: &'s NetworkConfigStatus, type_: &str) -> &'s Condition {
        status.conditions.iter().find(|condition| condition.type_ == type_).unwrap()
    }

    #[test]
    fn it_says_who_is_behind_and_who_is_in_charge_where() {
        let all = nodes(&[("n1", 2, "kube-proxy", "coredns"), ("n2", 1, "towpath", "coredns")]);
        let status = status(Some(2), &NetworkConfigStatus::default(), &all, Timestamp::UNIX_EPOCH);
        assert_eq!(status.observed_generation, Some(2));
        let applied = condition(&status, "Applied");
        assert_eq!((applied.status.as_str(), applied.reason.as_str()), ("False", "NodesBehind"));
        assert!(applied.message.contains("1 of 2") && applied.message.contains("n2"), "{}", applied.message);
        let services = condition(&status, "ServicesByTowpath");
        assert_eq!((services.status.as_str(), services.reason.as_str()), ("False", "Mixed"));
        assert!(
            services.message.starts_with("kube-proxy on 1 nodes (n1); towpath on 1 nodes (n2)"),
            "{}",
            services.message
        );
        assert!(services.message.contains("delete daemonset kube-proxy"), "{}", services.message);
        let dns = condition(&status, "DNSByTowpath");
        assert_eq!((dns.status.as_str(), dns.reason.as_str()), ("False", "CoreDNS"));
    }

    #[test]
    fn a_condition_keeps_its_time_while_it_holds() {
        let then = Timestamp::UNIX_EPOCH;
        let now = Timestamp::from_second(1000).unwrap();
        let before = status(Some(1), &NetworkConfigStatus::default(), &nodes(&[("n1", 1, "towpath", "coredns")]), then);
        let same = status(Some(1), &before, &nodes(&[("n1", 1, "towpath", "coredns")]), now);
        assert_eq!(same, before, "nothing is written");
        let after = status(Some(1), &before, &nodes(&[("n1", 1, "towpath", "towpath")]), now);
        assert_eq!(condition(&after, "ServicesByTowpath").last_transition_time, Time(then));
        assert_eq!(condition(&after, "DNSByTowpath").last_transition_time, Time(now));
    }

    #[test]
    fn many_nodes_are_counted_and_a_few_named() {
        let many: Vec<String> = (0..100).map(|n| format!("n{n:02}")).collect();
        let many: Vec<(&str, i64, &str, &str)> = many.iter().map(|n| (n.as_str(), 1, "towpath", "stand-in")).collect();
        let status = status(Some(1), &NetworkConfigStatus::default(), &nodes(&many), Timestamp::UNIX_EPOCH);
        assert_eq!(condition(&status, "Applied").message, "in force on all 100 nodes whose agents have spoken");
        assert_eq!(
            condition(&status, "DNSByTowpath").message,
            "stand-in on 100 nodes (n00, n01, n02, n03, n04 and 95 more)"
        );
    }
}
