//! As a table for people.

use std::fmt::Write;

use towpath_wire::names::{LearnedAddress, NodeNames};

use super::nodes::Said;

const HEAD: [&str; 4] = ["NODE", "NAME", "ADDRESS", "FOR"];

/// All nodes.
pub(super) fn table(said: &Said) -> String {
    let mut rows: Vec<[String; 4]> = Vec::new();
    for node in &said.answers {
        for name in &node.names {
            let row = |one: &LearnedAddress| [node.node.clone(), name.name.clone(), one.address.to_string(), left(one)];
            rows.extend(name.addresses.iter().map(row));
        }
    }
    let mut widths = HEAD.map(str::len);
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.len());
        }
    }
    let [node, name, address, _] = widths;
    let mut text = String::new();
    let lines = std::iter::once(HEAD.map(str::to_owned)).filter(|_| !rows.is_empty()).chain(rows.iter().cloned());
    for [a, b, c, d] in lines {
        // Writing to a String does not fail.
        let _ = writeln!(text, "{a:node$}  {b:name$}  {c:address$}  {d}");
    }
    for node in &said.answers {
        said_of(node, &mut text);
    }
    text.trim_end().to_owned()
}

fn left(one: &LearnedAddress) -> String {
    match one.seconds {
        0 => "as long as a pod is connected to it".to_owned(),
        seconds => format!("{seconds} s, and while connected"),
    }
}

fn said_of(node: &NodeNames, text: &mut String) {
    let name = &node.node;
    let _ = match (node.starting, node.asked.as_slice()) {
        (true, _) => writeln!(text, "{name}: its agent has just started"),
        (_, []) => writeln!(text, "{name}: no policy asks for a name"),
        (_, asked) if node.names.is_empty() => {
            writeln!(text, "{name}: policies ask for {}; no answer for one of them was given yet", asked.join(", "))
        }
        _ => Ok(()),
    };
    for refused in &node.refused {
        let times = if refused.times == 1 { String::new() } else { format!(" ({} times)", refused.times) };
        let _ =
            writeln!(text, "{name}: not accepted: {} for {}: {}{times}", refused.address, refused.name, refused.why);
    }
    if node.evicted_total > 0 {
        let _ =
            writeln!(text, "{name}: {} addresses made room for others before their time was over", node.evicted_total);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use towpath_wire::names::{LearnedName, RefusedAddress};

    #[test]
    fn names_refusals_and_silence_are_shown() {
        let at = |address: &str, seconds| LearnedAddress { address: address.parse().unwrap(), seconds };
        let node = NodeNames {
            node: "n1".to_owned(),
            asked: vec!["*.example.com".to_owned()],
            names: vec![LearnedName {
                name: "api.example.com".to_owned(),
                addresses: vec![at("192.0.2.1", 0), at("192.0.2.2", 61)],
            }],
            refused: vec![RefusedAddress {
                name: "evil.example.com".to_owned(),
                address: "127.0.0.1".parse().unwrap(),
                why: "no host outside has such an address".to_owned(),
                times: 2,
            }],
            evicted_total: 3,
            ..NodeNames::default()
        };
        let other = NodeNames { node: "n2".to_owned(), asked: node.asked.clone(), ..NodeNames::default() };
        let shown = table(&Said { answers: vec![node, other], silent: Vec::new() });
        assert_eq!(
            shown,
            "NODE  NAME             ADDRESS    FOR\n\
             n1    api.example.com  192.0.2.1  as long as a pod is connected to it\n\
             n1    api.example.com  192.0.2.2  61 s, and while connected\n\
             n1: not accepted: 127.0.0.1 for evil.example.com: no host outside has such an address (2 times)\n\
             n1: 3 addresses made room for others before their time was over\n\
             n2: policies ask for *.example.com; no answer for one of them was given yet"
        );
    }
}
