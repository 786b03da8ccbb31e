//! Zones, hosts and aliases beside the cluster's names, as the feed says them: asked, answered, capped, followed and kept.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test ends at the first surprise; clippy.toml says so for test functions, and this is their harness"
)]
#![allow(dead_code, reason = "the harness is shared with tests/serve.rs, which uses more of it")]

mod harness;

use domain::base::Rtype;
use domain::base::iana::Rcode;
use harness::*;
use towpath_wire::dns::{DnsAlias, DnsAnswer, DnsHost, DnsRules, DnsUpstream, DnsZone, FeedMessage};

fn zone(name: &str, upstream: DnsUpstream) -> DnsZone {
    DnsZone { name: name.to_owned(), upstream, hosts_fall_through: true, ..DnsZone::default() }
}

fn to(upstream: &Upstream) -> DnsUpstream {
    DnsUpstream::Servers { servers: vec![upstream.address] }
}

fn rules(zones: Vec<DnsZone>) -> FeedMessage {
    FeedMessage::Rules { rules: DnsRules { zones } }
}

#[tokio::test]
async fn a_stub_zone_is_asked_of_its_own_servers_and_follows_the_feed_without_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (node, stub) = (Upstream::start(1).await, Upstream::start(2).await);
    let carry = Carry::start(config(dir.path(), vec![node.address])).await;
    let client = feed(dir.path(), vec![cluster(vec![web([10, 96, 0, 1])])]).await;
    udp(carry.dns, "a.stub.test", Rtype::A).await;
    assert_eq!((node.asked("udp", "a.stub.test"), stub.asked("udp", "a.stub.test")), (1, 0));

    client.send(vec![rules(vec![zone("stub.test", to(&stub)), zone("dead.test", DnsUpstream::Nobody)])]);
    eventually("the rules are applied", async || client.is_synced()).await;
    let said = udp(carry.dns, "a.stub.test", Rtype::A).await;
    assert_eq!(said.answers, ["a.stub.test A 192.0.2.1"]);
    assert_eq!(stub.asked("udp", "a.stub.test"), 1, "what another server said before is forgotten");
    udp(carry.dns, "astub.test", Rtype::A).await;
    assert_eq!((node.asked("udp", "astub.test"), stub.asked("udp", "astub.test")), (1, 0), "labels are whole");
    assert_eq!(udp(carry.dns, "x.dead.test", Rtype::A).await.rcode, Rcode::SERVFAIL);
    assert_eq!(node.asked("udp", "x.dead.test"), 0, "nobody else is asked");
    let own = udp(carry.dns, "web.default.svc.cluster.local", Rtype::A).await;
    assert_eq!(own.answers, ["web.default.svc.cluster.local A 10.96.0.1"]);
    drop(client);
    carry.stop().await;

    // A successor knows them before any agent speaks, and an agent that knows nothing of them yet changes nothing.
    let carry = Carry::start(config(dir.path(), vec![node.address])).await;
    udp(carry.dns, "b.stub.test", Rtype::A).await;
    let _client = feed(dir.path(), vec![cluster(vec![])]).await;
    udp(carry.dns, "c.stub.test", Rtype::A).await;
    assert_eq!((stub.asked("udp", "b.stub.test"), stub.asked("udp", "c.stub.test")), (1, 1));
}

#[tokio::test]
async fn hosts_come_first_aliases_lead_on_and_times_are_capped() {
    let dir = tempfile::tempdir().unwrap();
    let node = Upstream::start(1).await;
    let carry = Carry::start(config(dir.path(), vec![node.address])).await;
    let host = |name: &str, ip: &str| DnsHost { name: name.to_owned(), addresses: vec![ip.parse().unwrap()] };
    let alias = |from: &str, to: &str| DnsAlias { from: from.to_owned(), to: to.to_owned() };
    let root = DnsZone {
        hosts: vec![host("pinned.test", "198.51.100.7")],
        hosts_reverse: true,
        aliases: vec![
            alias("old.test", "web.default.svc.cluster.local"),
            alias("far.test", "some.example"),
            alias("host.test", "pinned.test"),
        ],
        success_ttl: Some(7),
        denial_ttl: Some(3),
        ..zone("", DnsUpstream::Node)
    };
    let closed = DnsZone {
        hosts: vec![host("a.closed.test", "198.51.100.8")],
        hosts_fall_through: false,
        ..zone("closed.test", DnsUpstream::Node)
    };
    let _client = feed(dir.path(), vec![cluster(vec![web([10, 96, 0, 1])]), rules(vec![root, closed])]).await;

    let said = udp(carry.dns, "Pinned.test", Rtype::A).await;
    assert_eq!(said.answers, ["Pinned.test A 198.51.100.7"]);
    assert_eq!(udp(carry.dns, "pinned.test", Rtype::AAAA).await.answers, Vec::<String>::new());
    let pointer = udp(carry.dns, "7.100.51.198.in-addr.arpa", Rtype::PTR).await;
    assert_eq!(pointer.answers, ["7.100.51.198.in-addr.arpa PTR pinned.test."]);
    assert_eq!(
        (udp(carry.dns, "b.closed.test", Rtype::A).await.rcode, node.asked("udp", "b.closed.test")),
        (Rcode::NXDOMAIN, 0)
    );

    let said = udp(carry.dns, "old.test", Rtype::A).await;
    assert_eq!(
        said.answers,
        ["old.test CNAME web.default.svc.cluster.local.", "web.default.svc.cluster.local A 10.96.0.1"]
    );
    let said = udp(carry.dns, "far.test", Rtype::A).await;
    assert_eq!(said.answers, ["far.test CNAME some.example.", "some.example A 192.0.2.1"]);
    let said = udp(carry.dns, "host.test", Rtype::A).await;
    assert_eq!(said.answers, ["host.test CNAME pinned.test.", "pinned.test A 198.51.100.7"]);

    assert_eq!(udp(carry.dns, "any.example", Rtype::A).await.ttls, [7]);
    assert!(udp(carry.dns, "any.example", Rtype::A).await.ttls[0] <= 7);
    assert_eq!(node.asked("udp", "any.example"), 1);
}

#[tokio::test]
async fn a_zone_within_the_clusters_domain_is_asked_elsewhere_and_the_rest_stays_the_clusters() {
    let dir = tempfile::tempdir().unwrap();
    let (node, stub) = (Upstream::start(1).await, Upstream::start(2).await);
    let carry = Carry::start(config(dir.path(), vec![node.address])).await;
    let consul = DnsZone { over_cluster: true, ..zone("consul.cluster.local", to(&stub)) };
    let _client = feed(dir.path(), vec![cluster(vec![web([10, 96, 0, 1])]), rules(vec![consul])]).await;
    assert_eq!(
        udp(carry.dns, "db.consul.cluster.local", Rtype::A).await.answers,
        ["db.consul.cluster.local A 192.0.2.1"]
    );
    assert_eq!(stub.asked("udp", "db.consul.cluster.local"), 1);
    assert_eq!(udp(carry.dns, "other.cluster.local", Rtype::A).await.rcode, Rcode::NXDOMAIN);
}

#[tokio::test]
async fn where_an_external_name_leads_is_looked_up_by_the_same_rules_as_what_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let node = Upstream::start(1).await;
    let carry = Carry::start(config(dir.path(), vec![node.address])).await;
    let alias = |from: &str, to: &str| DnsAlias { from: from.to_owned(), to: to.to_owned() };
    let svc = |name: &str| format!("{name}.default.svc.cluster.local");
    let root = DnsZone {
        hosts: vec![DnsHost { name: "db.corp".to_owned(), addresses: vec!["198.51.100.7".parse().unwrap()] }],
        aliases: vec![
            alias("api.corp", &svc("web")),
            alias("old.corp", "new.example"),
            alias("new.example", "old.corp"),
            alias("again.corp", &svc("to-db")),
            alias("ring.corp", &svc("ring")),
        ],
        ..zone("", DnsUpstream::Node)
    };
    let leads = [
        ("to-db", "db.corp"),
        ("to-api", "api.corp"),
        ("to-old", "old.corp"),
        ("to-again", "again.corp"),
        ("ring", "ring.corp"),
    ];
    let mut services = vec![web([10, 96, 0, 1])];
    services.extend(leads.map(|(name, to)| service(name, DnsAnswer::Alias { target: to.to_owned() })));
    // A way that is longer than any is followed.
    let long = (0..12).map(|n| (format!("long{n}"), format!("long{}.corp", n + 1)));
    services.extend(long.map(|(name, target)| service(&name, DnsAnswer::Alias { target })));
    let longer = (1..12).map(|n| alias(&format!("long{n}.corp"), &svc(&format!("long{n}"))));
    let root = DnsZone { aliases: root.aliases.iter().cloned().chain(longer).collect(), ..root };
    let _client = feed(dir.path(), vec![cluster(services), rules(vec![root])]).await;
    let ask = async |name: &str| udp(carry.dns, &svc(name), Rtype::A).await;

    let said = ask("to-db").await;
    assert_eq!(said.answers, ["db.corp A 198.51.100.7".to_owned(), format!("{} CNAME db.corp.", svc("to-db"))]);
    assert_eq!(udp(carry.dns, &svc("to-db"), Rtype::AAAA).await.answers.len(), 1, "the host has no such address");
    assert_eq!(udp(carry.dns, &svc("to-db"), Rtype::CNAME).await.answers.len(), 1);
    assert_eq!(node.asked("udp", "db.corp"), 0);

    let said = ask("to-api").await;
    assert_eq!(said.answers.len(), 3, "{said:?}");
    assert!(said.answers.contains(&format!("{} A 10.96.0.1", svc("web"))), "{said:?}");

    let said = ask("to-old").await;
    assert!(said.answers.contains(&"new.example A 192.0.2.1".to_owned()), "{said:?}");
    assert_eq!(node.asked("udp", "old.corp"), 0, "a name has another's place once, as for a client");

    let said = ask("to-again").await;
    assert!(said.answers.contains(&"db.corp A 198.51.100.7".to_owned()), "{said:?}");

    let said = ask("ring").await;
    assert_eq!((said.rcode, said.answers.len()), (Rcode::NOERROR, 2), "a circle ends: {said:?}");
    let said = ask("long0").await;
    assert_eq!((said.rcode, said.answers.len()), (Rcode::NOERROR, 15), "and so does what is too long: {said:?}");
}
