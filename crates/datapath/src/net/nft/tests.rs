use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use towpath_model::Family;

use super::*;
use crate::abi::{TP_SNAT_PORT_MAX, TP_SNAT_PORT_MIN};
use crate::testing::alone;

#[test]
fn who_masquerades_and_who_translates_share_no_source_port() {
    let (first, last) = MASQUERADE_PORTS;
    assert!(first < last && u32::from(last) < TP_SNAT_PORT_MIN && TP_SNAT_PORT_MIN < TP_SNAT_PORT_MAX);
    assert_eq!(TP_SNAT_PORT_MAX, u32::from(u16::MAX));
}

fn facts() -> Facts {
    Facts {
        pods: vec!["10.244.1.0/24".parse().unwrap()],
        cluster: vec!["10.244.0.0/16".parse().unwrap()],
        services: vec!["10.96.0.0/12".parse().unwrap()],
        own: vec!["192.0.2.1".parse().unwrap()],
        nodes: vec!["192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap()],
        masqueraded: vec![Family::V4, Family::V6],
        untranslated: Vec::new(),
        dns: vec!["169.254.116.10".parse().unwrap()],
        tunnel_port: 8472,
        udp_port: None,
        borrowed_tunnel: false,
        track_pods: false,
    }
}

/// One that shares nothing with [`facts`] but what a cluster cannot change.
fn others() -> Facts {
    Facts {
        pods: vec!["10.244.1.0/24".parse().unwrap(), "10.244.2.0/23".parse().unwrap(), "fd00:1::/64".parse().unwrap()],
        cluster: vec!["10.244.0.0/15".parse().unwrap(), "fd00::/48".parse().unwrap()],
        services: vec!["10.96.0.0/12".parse().unwrap(), "fd00:96::/112".parse().unwrap()],
        own: vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
        nodes: ["192.0.2.1", "2001:db8::1", "192.0.2.3"].map(|address| address.parse().unwrap()).to_vec(),
        untranslated: vec!["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()],
        dns: vec!["169.254.116.10".parse().unwrap(), "fd00:7470::a".parse().unwrap()],
        udp_port: Some(8285),
        borrowed_tunnel: true,
        track_pods: true,
        ..facts()
    }
}

fn text(facts: &Facts) -> String {
    serde_json::to_string(&rules::rules(facts)).unwrap()
}

#[test]
fn rules_mention_no_family_that_is_not_used() {
    let text = text(&facts());
    assert!(!text.contains("ip6"), "{text}");
    assert!(text.contains("fully-random"));
    assert!(!text.contains("\"set\""), "a set without a name goes with its rule: {text}");
}

#[test]
fn a_borrowed_tunnel_device_is_for_nodes_only() {
    let why = "only nodes send envelopes";
    assert!(!text(&facts()).contains(why));
    assert!(text(&Facts { borrowed_tunnel: true, ..facts() }).contains(why));
}

#[test]
fn pods_of_another_network_are_tracked() {
    let why = "pod to pod needs no tracking";
    assert!(text(&facts()).contains(why));
    assert!(!text(&Facts { track_pods: true, ..facts() }).contains(why));
}

#[test]
fn what_stays_in_a_set_is_not_mentioned() {
    let more = Facts { nodes: [facts().nodes, vec!["192.0.2.9".parse().unwrap()]].concat(), ..facts() };
    let commands = sets::turn(&rules::sets(&facts()), &rules::sets(&more));
    let added = json!({"family": "inet", "table": "towpath", "name": "nodes4", "elem": ["192.0.2.9"]});
    assert_eq!(commands, [json!({"add": {"element": added}})]);
    let back = sets::turn(&rules::sets(&more), &rules::sets(&facts()));
    assert_eq!(back.len(), 1);
    assert!(back[0].get("delete").is_some());
}

/// What the kernel has; sets in the order of their names.
fn there() -> (Option<Sets>, Vec<String>) {
    let listed = list().unwrap().unwrap();
    let objects = listed["nftables"].as_array().unwrap();
    let mut rest: Vec<String> =
        objects.iter().filter(|object| object.get("set").is_none()).map(Value::to_string).collect();
    rest.sort_by_key(|object| object.contains("\"chain\":{"));
    (sets::read(&listed), rest)
}

fn fresh(facts: &Facts) -> (Option<Sets>, Vec<String>) {
    delete().unwrap();
    assert!(Table::default().apply(facts).unwrap());
    there()
}

#[test]
fn whatever_was_there_the_table_is_as_if_written_at_once() {
    alone(|| {
        let all = [facts(), others(), Facts { track_pods: true, ..facts() }, Facts { tunnel_port: 4789, ..others() }];
        let wanted: Vec<_> = all.iter().map(fresh).collect();
        assert_eq!(wanted[1].0.as_ref(), Some(&rules::sets(&others())));
        let mut table = Table::default();
        for (from, facts_before) in all.iter().enumerate() {
            for (to, facts) in all.iter().enumerate() {
                table.apply(facts_before).unwrap();
                assert_eq!(table.apply(facts).unwrap(), from != to);
                assert_eq!(there(), wanted[to], "{from} to {to}");
                assert!(!table.repair(facts).unwrap(), "{from} to {to}");
                // One that has been started again.
                Table::default().apply(facts_before).unwrap();
                assert_eq!(there(), wanted[from], "{to} to {from}, by another");
                assert_eq!(table.repair(facts).unwrap(), from != to);
                assert_eq!(there(), wanted[to]);
            }
        }
    });
}

#[test]
fn what_somebody_edits_is_repaired() {
    alone(|| {
        let wanted = fresh(&others());
        let mut table = Table::default();
        table.apply(&others()).unwrap();
        let edits = [
            "flush chain inet towpath postrouting",
            "flush table inet towpath",
            "delete table inet towpath",
            "delete element inet towpath nodes4 { 192.0.2.3 }",
            "add element inet towpath nodes4 { 192.0.2.77 }",
            "add element inet towpath nodes4 { 192.0.2.128-192.0.2.130 }",
            "flush set inet towpath cluster6",
            "insert rule inet towpath input drop",
            // Of an earlier version: another hook, no set has a name.
            "delete table inet towpath; add table inet towpath; \
             add chain inet towpath input { type filter hook prerouting priority 0; }; \
             add rule inet towpath input ip saddr { 192.0.2.1, 192.0.2.2 } drop",
            "delete table inet towpath; add table inet towpath; add set inet towpath nodes4 { type ether_addr; }",
        ];
        for edit in edits {
            nft(&[edit], None).unwrap();
            assert!(table.repair(&others()).unwrap(), "{edit}");
            assert_eq!(there(), wanted, "{edit}");
            assert!(!table.repair(&others()).unwrap(), "{edit}");
        }
        // What others put there besides does no harm, and is not repaired for ever.
        nft(&["add set inet towpath theirs { type ipv4_addr; }"], None).unwrap();
        table.repair(&others()).unwrap();
        assert!(!table.repair(&others()).unwrap());
    });
}

#[test]
fn what_somebody_took_is_written_with_the_next_change() {
    alone(|| {
        let wanted = fresh(&facts());
        let more = Facts { nodes: [facts().nodes, vec!["192.0.2.9".parse().unwrap()]].concat(), ..facts() };
        for edit in ["delete element inet towpath nodes4 { 192.0.2.9 }", "delete table inet towpath"] {
            let mut table = Table::default();
            table.apply(&more).unwrap();
            nft(&[edit], None).unwrap();
            assert!(table.apply(&facts()).unwrap(), "{edit}");
            assert_eq!(there(), wanted, "{edit}");
        }
    });
}

/// Envelopes between nodes while other nodes come and go, rules change, and the agent starts again.
#[test]
fn no_packet_of_a_node_is_lost_while_the_table_changes() {
    const CHANGES: usize = 150;
    alone(|| {
        bring_loopback_up();
        let own = Facts {
            nodes: vec!["127.0.0.1".parse().unwrap(), "192.0.2.1".parse().unwrap()],
            borrowed_tunnel: true,
            ..facts()
        };
        let variants = [
            own.clone(),
            Facts { nodes: [own.nodes.clone(), vec!["192.0.2.2".parse().unwrap()]].concat(), ..own.clone() },
            Facts { track_pods: true, ..own.clone() },
        ];
        let mut table = Table::default();
        table.apply(&own).unwrap();
        let (a, b) = (UdpSocket::bind("127.0.0.1:8472").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
        a.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let traffic = scope.spawn(|| {
                let mut sent = 0_u64;
                while !over.load(Ordering::Relaxed) {
                    b.send_to(&sent.to_ne_bytes(), "127.0.0.1:8472").unwrap();
                    let mut got = [0; 8];
                    a.recv(&mut got).unwrap_or_else(|error| panic!("packet {sent}: {error}"));
                    assert_eq!(u64::from_ne_bytes(got), sent);
                    sent += 1;
                }
                sent
            });
            for change in 0..CHANGES {
                if traffic.is_finished() {
                    break;
                }
                if change % 3 == 2 {
                    table = Table::default();
                }
                table.apply(&variants[change % variants.len()]).unwrap();
            }
            over.store(true, Ordering::Relaxed);
            let sent = traffic.join().unwrap();
            println!("{sent} packets");
            assert!(sent > 10_000, "{sent} packets only");
        });
        // The rule is there: who is no node is not heard.
        let stranger = UdpSocket::bind("127.0.0.2:0").unwrap();
        stranger.send_to(b"x", "127.0.0.1:8472").unwrap();
        a.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        a.recv(&mut [0; 8]).unwrap_err();
    });
}

fn bring_loopback_up() {
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
    assert!(up.success());
}

#[test]
fn a_program_that_hangs_is_killed_and_one_that_says_much_is_heard_out() {
    let begun = std::time::Instant::now();
    let hangs = output_of(Command::new("sleep").arg("600"), None, Duration::from_millis(100)).unwrap_err();
    assert_eq!(hangs.kind(), io::ErrorKind::TimedOut, "{hangs}");
    assert!(begun.elapsed() < Duration::from_secs(60));
    // More than a pipe holds, both ways.
    let much = json!("x".repeat(1 << 20));
    let said = output_of(&mut Command::new("cat"), Some(&much), PATIENCE).unwrap();
    assert_eq!(said.stdout, much.to_string().into_bytes());
}
