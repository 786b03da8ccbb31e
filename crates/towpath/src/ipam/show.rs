//! As text for people.

use std::fmt::Write;

use towpath_wire::ipam::{Finding, NodeAddresses};

/// All nodes: a line of counts each, then what was repaired, then what does not fit together.
pub(super) fn table(nodes: &[NodeAddresses]) -> String {
    let mut text = String::new();
    for node in nodes {
        let name = &node.node;
        let ranges: Vec<String> = node.ranges.iter().map(ToString::to_string).collect();
        let outcome = match node.findings.len() {
            0 => "all fits together".to_owned(),
            1 => "1 finding".to_owned(),
            n => format!("{n} findings"),
        };
        // Writing to a String does not fail.
        let _ = writeln!(text, "{name}: {} leases; {}; {outcome}", node.leases, ranges.join(", "));
        if node.without_pods {
            let _ = writeln!(text, "{name}: pods were not compared: the agent has not heard of all of them yet");
        }
        for repaired in &node.repaired {
            let _ = writeln!(text, "{name}: repaired: {repaired}");
        }
        for finding in &node.findings {
            let _ = writeln!(text, "{name}: {}", line(finding));
        }
    }
    if nodes.iter().any(|node| node.findings.iter().any(|finding| finding.repairable)) {
        text.push_str("What is marked with * is repaired by --repair, and mostly by the agent itself within a minute.");
    }
    text.trim_end().to_owned()
}

fn line(finding: &Finding) -> String {
    let mark = if finding.repairable { "*" } else { "" };
    let mut line = format!("{}{mark} {}", finding.kind.name(), finding.object);
    // What the object says already is not said again.
    if let Some(pod) = finding.pod.as_ref().filter(|pod| **pod != finding.object) {
        let _ = write!(line, ", pod {pod}");
    }
    let addresses: Vec<String> =
        finding.addresses.iter().map(ToString::to_string).filter(|address| *address != finding.object).collect();
    if !addresses.is_empty() {
        let _ = write!(line, ", {}", addresses.join(", "));
    }
    let _ = write!(line, ": {}", finding.what);
    line
}

#[cfg(test)]
mod tests {
    use towpath_wire::ipam::{Kind, RangeUse};

    use super::*;

    #[test]
    fn a_node_is_a_line_and_each_finding_another() {
        let range = |range: &str, taken| RangeUse { range: range.to_owned(), taken, size: 253, closed: taken > 200 };
        let finding = Finding {
            kind: Kind::LeaseWithoutDevice,
            object: "eth0 of container a".to_owned(),
            pod: Some("default/web".to_owned()),
            addresses: vec!["10.244.1.2".parse().unwrap()],
            what: "gone".to_owned(),
            repairable: true,
        };
        let twice = Finding {
            kind: Kind::Duplicate,
            object: "10.244.1.3".to_owned(),
            pod: None,
            addresses: vec!["10.244.1.3".parse().unwrap()],
            what: "claimed by two".to_owned(),
            repairable: false,
        };
        let bad = NodeAddresses {
            node: "n1".to_owned(),
            ranges: vec![range("10.244.1.0/24", 3)],
            leases: 3,
            findings: vec![finding, twice],
            repaired: vec!["released one".to_owned()],
            without_pods: true,
        };
        let good = NodeAddresses {
            node: "n2".to_owned(),
            ranges: vec![range("10.244.2.0/24", 0), range("10.245.2.0/24", 201)],
            ..Default::default()
        };
        assert_eq!(
            table(&[bad, good]),
            "n1: 3 leases; 10.244.1.0/24: 3 of 253; 2 findings\n\
             n1: pods were not compared: the agent has not heard of all of them yet\n\
             n1: repaired: released one\n\
             n1: leaseWithoutDevice* eth0 of container a, pod default/web, 10.244.1.2: gone\n\
             n1: duplicate 10.244.1.3: claimed by two\n\
             n2: 0 leases; 10.244.2.0/24: 0 of 253, 10.245.2.0/24: 201 of 253, gives no more; all fits together\n\
             What is marked with * is repaired by --repair, and mostly by the agent itself within a minute."
        );
    }
}
