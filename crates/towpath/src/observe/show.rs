//! An event as one line.

use std::net::SocketAddr;

use towpath_wire::observe::{DropEvent, Fate, FlowEnd, Place};

/// `TIME NODE DROPPED reason PROTOCOL from -> to: why`.
pub(super) fn line(event: &DropEvent) -> String {
    let fate = match event.verdict {
        Fate::Dropped => "DROPPED",
        Fate::Refused => "REFUSED",
        Fate::Audited => "AUDITED",
    };
    let mut line = format!("{} {} {fate} {}", event.time, event.node, event.reason);
    for word in [Some(event.protocol.as_str()), event.detail.as_deref()].into_iter().flatten() {
        if !word.is_empty() {
            line.push(' ');
            line.push_str(word);
        }
    }
    if let (Some(from), Some(to)) = (&event.source, &event.destination) {
        line.push_str(&format!(" {} -> {}", end(from), end(to)));
    }
    if let Some(backend) = &event.backend {
        line.push_str(&format!(" => {}", end(backend)));
    }
    if let Some(denial) = &event.policy {
        line.push_str(&format!(": {}: {}", denial.direction, denial.rule));
        if !denial.policies.is_empty() {
            line.push_str(&format!(" ({})", denial.policies.join(", ")));
        }
    }
    match (event.place, &event.device) {
        (Place::Socket, _) => line.push_str(" [socket]"),
        (Place::Driver, Some(device)) => line.push_str(&format!(" [{device}, xdp]")),
        (_, Some(device)) => line.push_str(&format!(" [{device}]")),
        (_, None) => {}
    }
    line
}

fn end(end: &FlowEnd) -> String {
    let at = match end.port {
        0 => end.address.to_string(),
        port => SocketAddr::new(end.address, port).to_string(),
    };
    match &end.is {
        Some(is) if is.kind == "Pod" => format!("{}/{} ({at})", is.namespace, is.name),
        Some(is) if is.namespace.is_empty() => format!("{} {} ({at})", is.kind, is.name),
        Some(is) => format!("{} {}/{} ({at})", is.kind, is.namespace, is.name),
        None => at,
    }
}

#[cfg(test)]
mod tests {
    use towpath_wire::observe::{Denial, Holder};

    use super::*;

    fn at(address: &str, port: u16, kind: &str, namespace: &str, name: &str) -> Option<FlowEnd> {
        let is = Holder { kind: kind.into(), namespace: namespace.into(), name: name.into() };
        let is = Some(is).filter(|is| !is.kind.is_empty());
        Some(FlowEnd { address: address.parse().unwrap(), port, is, labels: [].into() })
    }

    #[test]
    fn a_line_says_who_to_whom_and_why() {
        let event = DropEvent {
            time: "2026-11-22T16:00:00.000001Z".into(),
            node: "n1".into(),
            reason: "egress_policy".into(),
            protocol: "TCP".into(),
            detail: Some("SYN".into()),
            source: at("10.244.0.5", 40000, "Pod", "shop", "web"),
            destination: at("10.96.0.9", 80, "Service", "pay", "db"),
            backend: at("10.244.1.7", 5432, "Pod", "pay", "db-0"),
            policy: Some(Denial {
                direction: "Egress".into(),
                rule: "no rule allows it".into(),
                policies: vec!["shop/deny".into()],
            }),
            device: Some("tpabc".into()),
            bytes: 74,
            ..DropEvent::default()
        };
        assert_eq!(
            line(&event),
            "2026-11-22T16:00:00.000001Z n1 DROPPED egress_policy TCP SYN shop/web (10.244.0.5:40000) -> \
             Service pay/db (10.96.0.9:80) => pay/db-0 (10.244.1.7:5432): Egress: no rule allows it (shop/deny) [tpabc]"
        );
        let bare = DropEvent {
            reason: "source_address".into(),
            source: at("fd00::5", 1, "", "", ""),
            destination: at("192.0.2.1", 0, "Node", "", "n2"),
            policy: None,
            backend: None,
            detail: None,
            place: Place::Socket,
            verdict: Fate::Refused,
            ..event
        };
        assert!(line(&bare).ends_with(" n1 REFUSED source_address TCP [fd00::5]:1 -> Node n2 (192.0.2.1) [socket]"));
    }
}
