use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use proptest::prelude::*;
use towpath_wire::dns::{DnsAnswer, DnsEndpoint, DnsPod, DnsPort, DnsService, FeedMessage, Shared};

use super::zone::TTL;
use super::{Answer, Data, Outcome, QueryType, Rcode, Zone};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn port(name: &str, protocol: &str, port: u16) -> DnsPort {
    DnsPort { name: name.to_owned(), protocol: protocol.to_owned(), port }
}

fn service(namespace: &str, name: &str, answer: DnsAnswer) -> Shared<DnsService> {
    DnsService { namespace: namespace.to_owned(), name: name.to_owned(), answer }.into()
}

fn endpoint(address: &str, hostname: Option<&str>) -> DnsEndpoint {
    DnsEndpoint {
        address: ip(address),
        hostname: hostname.map(str::to_owned),
        ports: vec![port("peer", "tcp", 7000), port("", "tcp", 1)],
    }
}

fn alias(target: &str) -> DnsAnswer {
    DnsAnswer::Alias { target: target.to_owned() }
}

fn cluster_ips(addresses: &[&str], ports: Vec<DnsPort>) -> DnsAnswer {
    DnsAnswer::ClusterIps { addresses: addresses.iter().map(|a| ip(a)).collect(), ports, endpoints: vec![] }
}

fn zone() -> Zone {
    let mut zone = Zone::new(vec![ip("169.254.116.10"), ip("fd00:7470::a")]);
    zone.apply(FeedMessage::Snapshot {
        domain: "cluster.local".to_owned(),
        services: vec![
            service(
                "default",
                "web",
                DnsAnswer::ClusterIps {
                    addresses: vec![ip("10.96.0.1"), ip("fd00:96::1")],
                    ports: vec![port("http", "tcp", 80), port("dns", "udp", 53)],
                    endpoints: vec![],
                },
            ),
            service("default", "plain", cluster_ips(&["10.96.0.2"], vec![port("", "tcp", 80)])),
            service(
                "default",
                "set",
                DnsAnswer::ClusterIps {
                    addresses: vec![ip("10.96.0.3")],
                    ports: vec![port("peer", "tcp", 70)],
                    endpoints: vec![
                        endpoint("10.244.2.1", Some("set-0")),
                        endpoint("fd00:244:2::1", Some("set-0")),
                        DnsEndpoint { ports: vec![], ..endpoint("10.244.2.2", Some("set-1")) },
                    ],
                },
            ),
            service(
                "default",
                "db",
                DnsAnswer::Endpoints {
                    endpoints: vec![
                        endpoint("10.244.1.2", Some("db-0")),
                        endpoint("fd00:244::2", Some("db-0")),
                        endpoint("10.244.1.3", None),
                    ],
                },
            ),
            service("default", "empty", DnsAnswer::Endpoints { endpoints: vec![] }),
            service("default", "out", alias("example.com")),
            service("default", "in", alias("web.default.svc.cluster.local")),
            service("default", "lost", alias("nothing.default.svc.cluster.local")),
            service("default", "far", alias("out.default.svc.cluster.local")),
            service("default", "ring", alias("ring2.default.svc.cluster.local")),
            service("default", "ring2", alias("ring.default.svc.cluster.local")),
        ],
        namespaces: vec!["default".to_owned(), "bare".to_owned()],
        pods: vec![
            DnsPod { namespace: "default".to_owned(), address: ip("10.244.1.2") },
            DnsPod { namespace: "default".to_owned(), address: ip("fd00:244::2") },
        ],
        rules: None,
    });
    zone
}

/// One line a record, so that tables stay readable: `owner TYPE data`.
fn lines(records: &[super::Record]) -> Vec<String> {
    let mut lines: Vec<String> = records
        .iter()
        .map(|r| {
            assert_eq!(r.ttl, TTL);
            let data = match &r.data {
                Data::A(a) => format!("A {a}"),
                Data::Aaaa(a) => format!("AAAA {a}"),
                Data::Cname(n) => format!("CNAME {n}"),
                Data::Srv { priority, weight, port, target } => format!("SRV {priority} {weight} {port} {target}"),
                Data::Ptr(n) => format!("PTR {n}"),
                Data::Txt(t) => format!("TXT {t}"),
                Data::Ns(n) => format!("NS {n}"),
                Data::Soa { mname, rname, .. } => format!("SOA {mname} {rname}"),
            };
            format!("{} {data}", r.owner.replace(".cluster.local", "").replace(".svc", ""))
        })
        .collect();
    lines.sort();
    lines
}

fn ask(name: &str, query: QueryType) -> Answer {
    match zone().answer(name, query, 0) {
        Outcome::Answer(answer) => answer,
        other => panic!("{name} {query:?}: {other:?}"),
    }
}

/// Names in the tables are below `svc.cluster.local` unless they end in a dot.
fn full(name: &str) -> String {
    match name.strip_suffix('.') {
        Some(name) => name.to_owned(),
        None => format!("{name}.svc.cluster.local"),
    }
}

#[test]
fn names_that_have_data() {
    use QueryType::{A, Aaaa, Any, Cname, Ns, Ptr, Soa, Srv, Txt};
    let svc = "default.svc.cluster.local";
    let table: &[(&str, QueryType, &[&str])] = &[
        ("web.default", A, &["web.default A 10.96.0.1"]),
        ("web.default", Aaaa, &["web.default AAAA fd00:96::1"]),
        ("web.default", Any, &["web.default A 10.96.0.1", "web.default AAAA fd00:96::1"]),
        ("_http._tcp.web.default", Srv, &[&format!("_http._tcp.web.default SRV 0 100 80 web.{svc}")]),
        ("_dns._udp.web.default", Srv, &[&format!("_dns._udp.web.default SRV 0 100 53 web.{svc}")]),
        ("db.default", A, &["db.default A 10.244.1.2", "db.default A 10.244.1.3"]),
        ("db.default", Aaaa, &["db.default AAAA fd00:244::2"]),
        ("db-0.db.default", A, &["db-0.db.default A 10.244.1.2"]),
        ("db-0.db.default", Aaaa, &["db-0.db.default AAAA fd00:244::2"]),
        ("10-244-1-3.db.default", A, &["10-244-1-3.db.default A 10.244.1.3"]),
        (
            "_peer._tcp.db.default",
            Srv,
            &[
                &format!("_peer._tcp.db.default SRV 0 50 7000 10-244-1-3.db.{svc}"),
                &format!("_peer._tcp.db.default SRV 0 50 7000 db-0.db.{svc}"),
            ],
        ),
        (
            "db-0.db.default",
            Srv,
            &[
                &format!("db-0.db.default SRV 0 50 1 db-0.db.{svc}"),
                &format!("db-0.db.default SRV 0 50 7000 db-0.db.{svc}"),
            ],
        ),
        ("set.default", A, &["set.default A 10.96.0.3"]),
        ("set-0.set.default", A, &["set-0.set.default A 10.244.2.1"]),
        ("set-0.set.default", Aaaa, &["set-0.set.default AAAA fd00:244:2::1"]),
        ("set-1.set.default", A, &["set-1.set.default A 10.244.2.2"]),
        (
            "set-0.set.default",
            Srv,
            &[
                &format!("set-0.set.default SRV 0 50 1 set-0.set.{svc}"),
                &format!("set-0.set.default SRV 0 50 7000 set-0.set.{svc}"),
            ],
        ),
        ("_peer._tcp.set.default", Srv, &[&format!("_peer._tcp.set.default SRV 0 100 70 set.{svc}")]),
        ("3.0.96.10.in-addr.arpa.", Ptr, &[&format!("3.0.96.10.in-addr.arpa PTR set.{svc}")]),
        ("1.2.244.10.in-addr.arpa.", Ptr, &[&format!("1.2.244.10.in-addr.arpa PTR set-0.set.{svc}")]),
        ("1.0.96.10.in-addr.arpa.", Ptr, &[&format!("1.0.96.10.in-addr.arpa PTR web.{svc}")]),
        ("2.1.244.10.in-addr.arpa.", Ptr, &[&format!("2.1.244.10.in-addr.arpa PTR db-0.db.{svc}")]),
        ("3.1.244.10.in-addr.arpa.", Ptr, &[&format!("3.1.244.10.in-addr.arpa PTR 10-244-1-3.db.{svc}")]),
        (
            "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.6.9.0.0.0.0.d.f.ip6.arpa.",
            Ptr,
            &[&format!("1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.6.9.0.0.0.0.d.f.ip6.arpa PTR web.{svc}")],
        ),
        ("10-244-1-2.default.pod.cluster.local.", A, &["10-244-1-2.default.pod A 10.244.1.2"]),
        ("fd00-244--2.default.pod.cluster.local.", Aaaa, &["fd00-244--2.default.pod AAAA fd00:244::2"]),
        ("dns-version.cluster.local.", Txt, &["dns-version TXT 1.1.0"]),
        ("cluster.local.", Ns, &["cluster.local NS ns.dns.cluster.local"]),
        ("cluster.local.", Soa, &["cluster.local SOA ns.dns.cluster.local hostmaster.cluster.local"]),
        ("ns.dns.cluster.local.", A, &["ns.dns A 169.254.116.10"]),
        ("out.default", Cname, &["out.default CNAME example.com"]),
        ("in.default", A, &[&format!("in.default CNAME web.{svc}"), "web.default A 10.96.0.1"]),
    ];
    for (name, query, expected) in table {
        let answer = ask(&full(name), *query);
        assert_eq!(lines(&answer.answers), *expected, "{name} {query:?}");
        assert_eq!(answer.rcode, Rcode::NoError, "{name}");
        assert!(answer.authority.is_empty() && answer.chase.is_none(), "{name}");
    }
}

#[test]
fn names_that_exist_without_data_of_the_type_are_nodata_with_the_soa() {
    use QueryType::{A, Aaaa, Cname, Other, Srv, Txt};
    for (name, query) in [
        ("web.default", Srv),
        ("web.default", Txt),
        ("web.default", Cname),
        ("web.default", Other(65)),
        ("plain.default", Aaaa),
        ("_tcp.web.default", A),
        ("_tcp.db.default", A),
        ("_http._tcp.web.default", A),
        ("10-244-1-3.db.default", Aaaa),
        ("set-1.set.default", Aaaa),
        ("set-1.set.default", Srv),
        ("default", A),
        ("bare", A),
        ("bare.pod.cluster.local.", A),
        ("svc.cluster.local.", A),
        ("pod.cluster.local.", A),
        ("dns.cluster.local.", A),
        ("cluster.local.", A),
        ("dns-version.cluster.local.", A),
        ("10-244-1-2.default.pod.cluster.local.", Aaaa),
        ("1.0.96.10.in-addr.arpa.", A),
    ] {
        let answer = ask(&full(name), query);
        assert_eq!((answer.rcode, answer.answers.len()), (Rcode::NoError, 0), "{name} {query:?}");
        assert_eq!(lines(&answer.authority), ["cluster.local SOA ns.dns.cluster.local hostmaster.cluster.local"]);
    }
}

#[test]
fn names_that_do_not_exist_are_nxdomain_with_the_soa() {
    use QueryType::{A, Any, Srv};
    for (name, query) in [
        ("nothing.default", A),
        ("*.default", A),
        ("web.bare", A),
        ("nowhere", A),
        ("web.nowhere", A),
        ("empty.default", A),
        ("x.web.default", A),
        ("x.out.default", A),
        ("set-2.set.default", A),
        ("10-244-2-1.set.default", A),
        ("_peer._tcp.set-0.set.default", Srv),
        ("10-244-1-2.db.default", A),
        ("_tcp.plain.default", A),
        ("_udp.db.default", A),
        ("__tcp.plain.default", Srv),
        ("_._tcp.plain.default", Srv),
        ("_http._udp.web.default", Srv),
        ("http.tcp.web.default", Srv),
        ("_http._tcp.nothing.default", Srv),
        ("a.b.c.web.default", A),
        ("web.cluster.local.", A),
        ("10-244-1-3.default.pod.cluster.local.", A),
        ("10-244-1.default.pod.cluster.local.", A),
        ("10-244-1-2.bare.pod.cluster.local.", A),
        ("www.example.com.default", A),
        ("", Any),
    ] {
        let name = if name.is_empty() { ".svc.cluster.local".to_owned() } else { full(name) };
        let answer = ask(&name, query);
        assert_eq!((answer.rcode, answer.answers.len()), (Rcode::NxDomain, 0), "{name} {query:?}");
        assert_eq!(answer.authority.len(), 1, "{name}");
    }
}

#[test]
fn names_of_others_are_forwarded() {
    for name in [
        "example.com",
        "",
        "local",
        "xcluster.local",
        "cluster.local.example.com",
        "9.9.9.9.in-addr.arpa",
        "96.10.in-addr.arpa",
        "1.0.96.10.1.in-addr.arpa",
        "ip6.arpa",
        "0.0.ip6.arpa",
        "01.0.96.10.in-addr.arpa",
    ] {
        assert_eq!(zone().answer(name, QueryType::A, 0), Outcome::Forward, "{name}");
        assert_eq!(zone().answer(name, QueryType::Ptr, 0), Outcome::Forward, "{name}");
    }
}

#[test]
fn aliases_are_followed_within_the_cluster_and_named_beyond_it() {
    let answer = ask(&full("out.default"), QueryType::A);
    assert_eq!(answer.chase.as_deref(), Some("example.com"));
    assert_eq!(lines(&answer.answers), ["out.default CNAME example.com"]);

    let answer = ask(&full("far.default"), QueryType::Aaaa);
    assert_eq!((answer.chase.as_deref(), answer.answers.len()), (Some("example.com"), 2));

    let answer = ask(&full("lost.default"), QueryType::A);
    assert_eq!((answer.rcode, answer.answers.len(), answer.authority.len()), (Rcode::NxDomain, 1, 1));

    let answer = ask(&full("ring.default"), QueryType::A);
    assert_eq!((answer.rcode, answer.answers.len()), (Rcode::NoError, 2), "a circle ends");
}

#[test]
fn srv_answers_carry_the_addresses_of_their_targets() {
    let answer = ask(&full("_peer._tcp.db.default"), QueryType::Srv);
    assert_eq!(
        lines(&answer.additional),
        ["10-244-1-3.db.default A 10.244.1.3", "db-0.db.default A 10.244.1.2", "db-0.db.default AAAA fd00:244::2",]
    );
    let answer = ask(&full("set-0.set.default"), QueryType::Srv);
    assert_eq!(
        lines(&answer.additional),
        ["set-0.set.default A 10.244.2.1", "set-0.set.default AAAA fd00:244:2::1"],
        "once, though two ports lead to them"
    );
}

#[test]
fn nothing_is_answered_before_the_first_snapshot() {
    let zone = Zone::new(vec![]);
    assert_eq!(zone.answer("web.default.svc.cluster.local", QueryType::A, 0), Outcome::NotReady);
    assert_eq!(zone.answer("example.com", QueryType::A, 0), Outcome::NotReady);
}

#[test]
fn changes_are_answered_from_then_on_reverse_names_too() {
    let mut zone = zone();
    let serial = zone.serial();
    let pointer = |zone: &Zone, name: &str| matches!(zone.answer(name, QueryType::Ptr, 0), Outcome::Answer(_));
    assert!(pointer(&zone, "1.0.96.10.in-addr.arpa"));
    zone.apply(FeedMessage::Set { service: service("default", "web", cluster_ips(&["10.96.0.7"], vec![])) });
    assert!(!pointer(&zone, "1.0.96.10.in-addr.arpa"));
    assert!(pointer(&zone, "7.0.96.10.in-addr.arpa"));
    zone.apply(FeedMessage::Remove { namespace: "default".to_owned(), name: "web".to_owned() });
    assert!(!pointer(&zone, "7.0.96.10.in-addr.arpa"));
    let Outcome::Answer(answer) = zone.answer("web.default.svc.cluster.local", QueryType::A, 0) else { panic!() };
    assert_eq!(answer.rcode, Rcode::NxDomain);
    zone.apply(FeedMessage::Namespaces { namespaces: vec!["new".to_owned()] });
    let Outcome::Answer(answer) = zone.answer("new.svc.cluster.local", QueryType::A, 0) else { panic!() };
    assert_eq!(answer.rcode, Rcode::NoError);
    assert!(zone.serial() > serial);
}

#[test]
fn other_cluster_domains_work() {
    let mut zone = Zone::new(vec![]);
    zone.apply(FeedMessage::Snapshot {
        domain: "K8s.Example.".to_owned(),
        services: vec![service("default", "web", cluster_ips(&["10.0.0.1"], vec![]))],
        namespaces: vec![],
        pods: vec![],
        rules: None,
    });
    assert!(
        matches!(zone.answer("web.default.svc.k8s.example", QueryType::A, 0), Outcome::Answer(a) if a.answers.len() == 1)
    );
    assert_eq!(zone.answer("web.default.svc.cluster.local", QueryType::A, 0), Outcome::Forward);
}

/// A headless Service `all` of pods of two families; every other one has a host name.
fn headless_of(pods: u32) -> Zone {
    let endpoints = (0..pods).flat_map(|pod| {
        let hostname = (pod % 2 == 0).then(|| format!("all-{pod}"));
        let v4 = IpAddr::from((0x0af4_0000 + pod).to_be_bytes());
        let v6 = IpAddr::from((0xfd00_0244u128 << 96 | u128::from(pod)).to_be_bytes());
        [v4, v6].map(|a| DnsEndpoint { address: a, ..endpoint("10.0.0.1", hostname.as_deref()) })
    });
    let mut endpoints: Vec<DnsEndpoint> = endpoints.collect();
    endpoints.sort_by_key(|endpoint| endpoint.address);
    let mut zone = zone();
    zone.apply(FeedMessage::Set { service: service("default", "all", DnsAnswer::Endpoints { endpoints }) });
    zone
}

/// An answer of it, and this thread's own time for it: a busy machine changes nothing about that.
fn timed(zone: &Zone, name: &str, query: QueryType, turn: u16) -> (Answer, Duration) {
    let now = || Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap());
    let begun = now();
    let Outcome::Answer(answer) = zone.answer(&full(name), query, turn) else { panic!("{name} is forwarded") };
    (answer, now() - begun)
}

#[test]
fn what_srv_of_many_endpoints_costs_grows_with_their_number_and_not_with_its_square() {
    let cost = |pods: u32| {
        let zone = headless_of(pods);
        let times = (0..5).map(|_| {
            let (answer, took) = timed(&zone, "_peer._tcp.all.default", QueryType::Srv, 0);
            assert_eq!(
                answer.answers.len(),
                usize::try_from(pods / 2 * 3).unwrap(),
                "one of a host name, one of each address"
            );
            took
        });
        times.min().unwrap()
    };
    let (few, many) = (cost(640), cost(2560));
    let ratio = many.as_secs_f64() / few.as_secs_f64();
    println!("{few:?}, four times as many {many:?}: {ratio:.1} times");
    assert!(ratio < 8.0, "{few:?}, four times as many {many:?}: {ratio:.1} times");
}

#[test]
fn twenty_thousand_endpoints_are_answered_at_once_with_as_many_as_a_message_has_room_for() {
    let zone = headless_of(10_000);
    let ask = |name, query, turn| {
        let (answer, took) = timed(&zone, name, query, turn);
        println!("{name} {query:?}: {took:?}");
        // A bound for code that is not optimised.
        assert!(took < Duration::from_millis(120), "{name} {query:?}: {took:?}");
        answer
    };
    assert_eq!(ask("_peer._tcp.all.default", QueryType::Srv, 0).answers.len(), 4096);
    assert_eq!(ask("all-9998.all.default", QueryType::Srv, 0).additional.len(), 2, "both families, once");
    assert_eq!(ask("10-244-39-15.all.default", QueryType::A, 0).answers.len(), 1);
    let mut given = BTreeSet::new();
    for turn in [0, 4000, 8000] {
        let answer = ask("all.default", QueryType::A, turn);
        assert_eq!(answer.answers.len(), 4096);
        given.extend(answer.answers.into_iter().map(|record| record.data));
    }
    assert_eq!(given.len(), 10_000, "another turn, other endpoints: everyone's comes");
}

proptest! {
    #[test]
    fn any_name_is_answered_without_a_panic_and_negative_answers_have_the_soa(
        name in "([a-z0-9_*.\\\\-]{0,40})(\\.default)?(\\.svc|\\.pod)?(\\.cluster\\.local|\\.in-addr\\.arpa|\\.ip6\\.arpa)?",
        query in any::<u16>(),
    ) {
        if let Outcome::Answer(answer) = zone().answer(&name, QueryType::from(query), 0) {
            prop_assert!(!answer.answers.is_empty() || answer.authority.len() == 1, "{answer:?}");
        }
    }

    #[test]
    fn the_index_is_the_same_by_changes_as_by_snapshot(
        changes in prop::collection::vec((0u8..3, prop::collection::vec(0u8..4, 0..3), any::<bool>()), 0..12)
    ) {
        let mut zone = Zone::new(vec![]);
        zone.apply(FeedMessage::Snapshot { domain: "c".to_owned(), services: vec![], namespaces: vec![], pods: vec![], rules: None });
        for (name, hosts, gone) in changes {
            let name = format!("s{name}");
            zone.apply(if gone {
                FeedMessage::Remove { namespace: "d".to_owned(), name }
            } else {
                let (addresses, named) = hosts.split_at(hosts.len() / 2);
                let addresses = addresses.iter().map(|h| IpAddr::from([10, 0, 0, *h])).collect();
                let endpoints = named.iter().map(|h| endpoint(&format!("10.0.0.{h}"), Some("h"))).collect();
                FeedMessage::Set {
                    service: service("d", &name, DnsAnswer::ClusterIps { addresses, ports: vec![], endpoints }),
                }
            });
        }
        let mut fresh = Zone::new(vec![]);
        fresh.apply(zone.records().snapshot());
        for host in 0..4 {
            let name = format!("{host}.0.0.10.in-addr.arpa");
            prop_assert_eq!(zone.answer(&name, QueryType::Ptr, 0), fresh.answer(&name, QueryType::Ptr, 0));
        }
    }
}
