//! Services for people.

use comfy_table::{Table, presets::NOTHING};

use super::nodes::Counted;
use super::view::{BackendView, PortView, ServiceView, UseView};

/// More nodes than these are counted, not named.
const NAMED: usize = 3;

/// One Service.
pub(super) fn one(view: &ServiceView, counted: Option<&Counted>) -> String {
    let mut lines = vec![format!("Service {}/{}: {}", view.namespace, view.name, view.kind)];
    let mut say = |what: &str, text: String| {
        if !text.is_empty() {
            lines.push(format!("  {what:<14} {text}"));
        }
    };
    say("cluster IPs", joined(&view.cluster_ips));
    say("load balancer", joined(&view.load_balancer_ips));
    view.announced.iter().for_each(|one| say("announced", one.in_words()));
    say("external IPs", joined(&view.external_ips));
    if let Some(why) = &view.not_served {
        say("not served", why.clone());
    } else {
        say("policies", format!("inside {}, outside {}", view.internal_traffic_policy, view.external_traffic_policy));
        say("algorithm", view.algorithm.to_owned());
        say("affinity", view.session_affinity_seconds.map(|s| format!("ClientIP, {s} s")).unwrap_or_default());
        let ranges = view.load_balancer_source_ranges.as_ref();
        say(
            "source ranges",
            ranges
                .map(|ranges| if ranges.is_empty() { "nobody".to_owned() } else { ranges.join(", ") })
                .unwrap_or_default(),
        );
    }
    view.others_serve.iter().for_each(|others| say("not by us", others.clone()));
    view.refused.iter().for_each(|refused| say("refused", refused.clone()));
    view.notes.iter().for_each(|note| say("note", note.clone()));
    let mut text = lines.join("\n");
    for port in &view.ports {
        text.push_str("\n\n");
        text.push_str(&of_port(view, port));
    }
    if let Some(counted) = counted {
        text.push_str(&format!("\n\nconnections as counted on {}", of_nodes(counted)));
        counted.incomplete.iter().for_each(|why| text.push_str(&format!("\n  {why}")));
    }
    text
}

fn of_nodes(counted: &Counted) -> String {
    let names: Vec<String> = counted.nodes.iter().cloned().collect();
    nodes(&names)
}

/// Nodes by name, if they are not many.
pub(super) fn nodes(names: &[String]) -> String {
    match names.len() {
        0 => "no node".to_owned(),
        count if count > NAMED => format!("{count} nodes"),
        _ => names.join(", "),
    }
}

fn joined<T: ToString>(all: &[T]) -> String {
    all.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn of_port(view: &ServiceView, port: &PortView) -> String {
    let name = if port.name.is_empty() { String::new() } else { format!("{} ", port.name) };
    let mut text = format!("Port {name}{}/{}", port.port, port.protocol);
    if !port.frontends.is_empty() {
        text.push_str(&format!(": {}", port.frontends.join(", ")));
    }
    port.notes.iter().for_each(|note| text.push_str(&format!("\n  {note}")));
    if port.backends.is_empty() {
        let refused = view.not_served.is_none();
        text.push_str(if refused { "\n  no endpoints: connections are refused" } else { "\n  no endpoints" });
        return text;
    }
    let outside = port.backends.iter().any(|one| one.outside.is_some());
    let connections = port.backends.iter().any(|one| one.connections.is_some());
    let mut table = Table::new();
    table.load_style(NOTHING);
    let mut header = vec!["BACKEND", "NODE", "POD", "STATE", "CLIENTS INSIDE"];
    header.extend(outside.then_some("CLIENTS OUTSIDE"));
    header.extend(connections.then_some("CONNECTIONS"));
    table.set_header(header);
    for one in &port.backends {
        table.add_row(row(one, outside, connections));
    }
    let shown = table.to_string();
    shown.lines().for_each(|line| text.push_str(&format!("\n {}", line.trim_end())));
    text
}

fn row(one: &BackendView, outside: bool, connections: bool) -> Vec<String> {
    let mut row = vec![
        std::net::SocketAddr::new(one.address, one.port).to_string(),
        one.node.clone().unwrap_or_default(),
        one.pod.clone().unwrap_or_default(),
        one.state.clone(),
        users(&one.inside),
    ];
    if outside {
        row.push(one.outside.as_ref().map(users).unwrap_or_default());
    }
    if connections {
        row.push(one.connections.map(|count| count.to_string()).unwrap_or_default());
    }
    row
}

/// Who uses it, and why others do not.
fn users(uses: &UseView) -> String {
    let reasons: Vec<&str> = uses.unused.keys().map(String::as_str).collect();
    if uses.everywhere || uses.used_by.is_empty() {
        return format!("none: {}", if reasons.is_empty() { "no node".to_owned() } else { reasons.join("; ") });
    }
    if reasons.is_empty() {
        return "of all nodes".to_owned();
    }
    let others: usize = uses.unused.values().map(Vec::len).sum();
    let named = match uses.used_by.len() {
        count if count > NAMED => format!("of {count} nodes"),
        _ => format!("of {}", uses.used_by.join(", ")),
    };
    format!("{named} (of {others} not: {})", reasons.join("; "))
}

/// All Services.
/// A view at a time: with every node's use of every endpoint they are large.
pub(super) fn list(all: impl Iterator<Item = ServiceView>, assumed: &[String], counted: Option<&Counted>) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    let mut header = vec!["NAMESPACE", "NAME", "TYPE", "ADDRESSES", "PORTS", "ALGORITHM", "ENDPOINTS"];
    header.extend(counted.is_some().then_some("CONNECTIONS"));
    table.set_header(header);
    let mut notes = Vec::new();
    for view in all {
        let addresses = joined(&view.cluster_ips.iter().chain(&view.load_balancer_ips).collect::<Vec<_>>());
        let (used, listed) = view.endpoints();
        let served = view.not_served.is_none();
        let mut row = vec![
            view.namespace.clone(),
            view.name.clone(),
            view.kind.to_owned(),
            addresses,
            view.ports.iter().map(port_of_list).collect::<Vec<_>>().join(", "),
            if served { view.algorithm.to_owned() } else { String::new() },
            if served { format!("{used}/{listed}") } else { listed.to_string() },
        ];
        if counted.is_some() {
            row.push(view.connections().map(|count| count.to_string()).unwrap_or_default());
        }
        table.add_row(row);
        notes.extend(view.refused.iter().map(|refused| format!("{}/{}: {refused}", view.namespace, view.name)));
    }
    notes.extend_from_slice(assumed);
    notes.extend(counted.into_iter().flat_map(|counted| counted.incomplete.iter().cloned()));
    let mut text = table.to_string().lines().map(str::trim_end).collect::<Vec<_>>().join("\n");
    if table.row_count() == 0 {
        "no Services".clone_into(&mut text);
    }
    if !notes.is_empty() {
        text.push_str("\n\n");
        text.push_str(&notes.join("\n"));
    }
    text
}

fn port_of_list(port: &PortView) -> String {
    let node_port = port.node_port.map(|number| format!(":{number}")).unwrap_or_default();
    format!("{}{node_port}/{}", port.port, port.protocol)
}
