//! A whole carry over real sockets on loopback addresses: cluster names, forwarding, TCP, restarts, bad input.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test ends at the first surprise; clippy.toml says so for test functions, and this is their harness"
)]

mod harness;

use std::time::Duration;

use domain::base::Rtype;
use domain::base::iana::Rcode;
use futures::future::join_all;
use harness::*;
use towpath_carry::feed;
use towpath_wire::dns::{DnsAnswer, DnsEndpoint, DnsRules, DnsUpstream, DnsZone, FeedMessage};

#[tokio::test]
async fn cluster_names_are_answered_from_the_feed_and_follow_it() {
    let dir = tempfile::tempdir().unwrap();
    let carry = Carry::start(config(dir.path(), vec![])).await;
    assert_eq!(
        udp(carry.dns, "web.default.svc.cluster.local", Rtype::A).await.rcode,
        Rcode::SERVFAIL,
        "nothing fed yet"
    );
    let client = feed(dir.path(), vec![cluster(vec![web([10, 96, 0, 1])])]).await;

    let answer = udp_edns(carry.dns, "Web.Default.svc.Cluster.local", Rtype::A, Some(1232)).await;
    assert_eq!(answer.answers, ["Web.Default.svc.Cluster.local A 10.96.0.1"]);
    assert!(answer.authoritative && answer.edns && !answer.truncated);
    let none = udp(carry.dns, "web.default.svc.cluster.local", Rtype::AAAA).await;
    assert_eq!((none.rcode, none.answers.len(), none.authority, none.edns), (Rcode::NOERROR, 0, 1, false));
    let absent = udp(carry.dns, "no.default.svc.cluster.local", Rtype::A).await;
    assert_eq!((absent.rcode, absent.authority), (Rcode::NXDOMAIN, 1));
    let pointer = udp(carry.dns, "1.0.96.10.in-addr.arpa", Rtype::PTR).await;
    assert_eq!(pointer.answers, ["1.0.96.10.in-addr.arpa PTR web.default.svc.cluster.local."]);
    let srv = udp(carry.dns, "_http._tcp.web.default.svc.cluster.local", Rtype::SRV).await;
    assert_eq!(srv.answers.len(), 1);

    client.send(vec![FeedMessage::Set { service: web([10, 96, 0, 2]) }]);
    eventually("the change is applied", async || client.is_synced()).await;
    let answer = udp(carry.dns, "web.default.svc.cluster.local", Rtype::A).await;
    assert_eq!(answer.answers, ["web.default.svc.cluster.local A 10.96.0.2"]);
    carry.stop().await;
}

#[tokio::test]
async fn other_names_are_forwarded_cached_and_joined() {
    let dir = tempfile::tempdir().unwrap();
    let upstream = Upstream::start(1).await;
    let carry = Carry::start(config(dir.path(), vec![upstream.address])).await;
    let _client = feed(dir.path(), vec![cluster(vec![])]).await;

    let first = udp(carry.dns, "Some.Example", Rtype::A).await;
    assert_eq!((first.answers, first.authoritative), (vec!["Some.Example A 192.0.2.1".to_owned()], false));
    let again = udp(carry.dns, "some.example", Rtype::A).await;
    assert_eq!(again.answers, ["some.example A 192.0.2.1"]);
    assert!(again.ttls[0] <= 60);
    assert_eq!(upstream.asked("udp", "some.example"), 1, "the second came from the cache");

    let many = join_all((0..50).map(|_| udp(carry.dns, "slow.example", Rtype::A))).await;
    assert!(many.iter().all(|said| said.answers.len() == 1));
    assert_eq!(upstream.asked("udp", "slow.example"), 1, "fifty asked as one");

    let counters = feed::counters(&dir.path().join("run/carry.sock")).await.unwrap();
    assert!(counters.cache_hits >= 1 && counters.joined == 49 && counters.forwarded == 2, "{counters:?}");
    assert!(counters.cached == 2 && counters.cached_bytes > 0 && counters.feed_messages == 1, "{counters:?}");
}

#[tokio::test]
async fn upstream_servers_that_misbehave_are_worked_around() {
    let dir = tempfile::tempdir().unwrap();
    let upstream = Upstream::start(1).await;
    let carry = Carry::start(config(dir.path(), vec![upstream.address])).await;
    let _client = feed(dir.path(), vec![cluster(vec![])]).await;

    let forged = udp(carry.dns, "forged.example", Rtype::A).await;
    assert_eq!(forged.answers, ["forged.example A 192.0.2.1"]);
    assert!(forged.ttls[0] <= 60, "not the forgery's");
    assert_eq!(udp(carry.dns, "lower.letters.example", Rtype::A).await.answers.len(), 1);
    assert_eq!(upstream.asked("tcp", "lower.letters.example"), 1, "asked again where nobody can forge");
    assert_eq!(udp(carry.dns, "noedns.example", Rtype::A).await.answers.len(), 1);
    assert_eq!(upstream.asked("udp", "noedns.example"), 2);
    assert_eq!(udp(carry.dns, "fail.example", Rtype::A).await.rcode, Rcode::SERVFAIL);
    assert_eq!(udp(carry.dns, "gone.example", Rtype::A).await.rcode, Rcode::NXDOMAIN);

    let small = udp(carry.dns, "big.example", Rtype::A).await;
    assert!(small.truncated && !small.answers.is_empty() && small.answers.len() < 40);
    assert!(!udp_edns(carry.dns, "big.example", Rtype::A, Some(4096)).await.truncated, "1232 bytes hold it");
    let mut tcp = Tcp::connect(carry.dns).await;
    tcp.send(1, "big.example", Rtype::A).await;
    let (_, whole) = tcp.receive().await.unwrap();
    assert_eq!((whole.truncated, whole.answers.len()), (false, 40));
    assert_eq!(upstream.asked("tcp", "big.example"), 1, "once, then cached");
}

#[tokio::test]
async fn the_next_upstream_answers_for_one_that_is_dead_or_failing() {
    let dir = tempfile::tempdir().unwrap();
    let (silent, good) = (Upstream::start(1).await, Upstream::start(2).await);
    let dead = std::net::SocketAddr::new(address(3), PORT);
    let carry = Carry::start(config(dir.path(), vec![dead, silent.address, good.address])).await;
    let _client = feed(dir.path(), vec![cluster(vec![])]).await;
    assert_eq!(
        udp(carry.dns, "a.example", Rtype::A).await.answers.len(),
        1,
        "refused by the first, answered by the second"
    );
    silent.stop();
    assert_eq!(udp(carry.dns, "b.example", Rtype::A).await.answers.len(), 1);
    assert_eq!(good.asked("udp", "b.example"), 1);
    assert_eq!(udp(carry.dns, "c.example", Rtype::A).await.answers.len(), 1);
    assert_eq!(good.asked("udp", "c.example"), 1);
}

#[tokio::test]
async fn with_every_upstream_dead_old_answers_and_cluster_names_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let upstream = Upstream::start(1).await;
    let carry = Carry::start(config(dir.path(), vec![upstream.address])).await;
    let _client = feed(dir.path(), vec![cluster(vec![web([10, 96, 0, 1])])]).await;
    assert_eq!(udp(carry.dns, "short.example", Rtype::A).await.answers.len(), 1);
    upstream.stop();
    tokio::time::sleep(Duration::from_millis(1100)).await; // Its TTL, the shortest there is.
    let stale = udp(carry.dns, "short.example", Rtype::A).await;
    assert_eq!((stale.rcode, stale.answers.len()), (Rcode::NOERROR, 1));
    assert!(stale.ttls[0] <= 30);
    assert_eq!(udp(carry.dns, "never.example", Rtype::A).await.rcode, Rcode::SERVFAIL);
    assert_eq!(udp(carry.dns, "web.default.svc.cluster.local", Rtype::A).await.answers.len(), 1);
}

#[tokio::test]
async fn an_external_name_is_followed_beyond_the_cluster() {
    let dir = tempfile::tempdir().unwrap();
    let upstream = Upstream::start(1).await;
    let carry = Carry::start(config(dir.path(), vec![upstream.address])).await;
    let out = service("out", DnsAnswer::Alias { target: "www.example".to_owned() });
    let gone = service("gone", DnsAnswer::Alias { target: "gone.example".to_owned() });
    let _client = feed(dir.path(), vec![cluster(vec![out, gone])]).await;
    for _ in 0..2 {
        let said = udp(carry.dns, "out.default.svc.cluster.local", Rtype::A).await;
        assert_eq!(said.answers, ["out.default.svc.cluster.local CNAME www.example.", "www.example A 192.0.2.1"]);
        assert_eq!(said.rcode, Rcode::NOERROR);
    }
    assert_eq!(upstream.asked("udp", "www.example"), 1);
    let alias = udp(carry.dns, "out.default.svc.cluster.local", Rtype::CNAME).await;
    assert_eq!(alias.answers, ["out.default.svc.cluster.local CNAME www.example."]);
    let missing = udp(carry.dns, "gone.default.svc.cluster.local", Rtype::A).await;
    assert_eq!((missing.rcode, missing.answers.len()), (Rcode::NXDOMAIN, 1));
}

#[tokio::test]
async fn many_queries_share_a_tcp_connection_and_the_slow_hold_up_none() {
    let dir = tempfile::tempdir().unwrap();
    let upstream = Upstream::start(1).await;
    let carry = Carry::start(config(dir.path(), vec![upstream.address])).await;
    let endpoints = (0..2000u32)
        .map(|n| DnsEndpoint {
            address: std::net::Ipv4Addr::from(0x0af4_0000 + n).into(),
            hostname: None,
            ports: vec![],
        })
        .collect();
    let all = service("all", DnsAnswer::Endpoints { endpoints });
    let _client = feed(dir.path(), vec![cluster(vec![web([10, 96, 0, 1]), all])]).await;

    let mut tcp = Tcp::connect(carry.dns).await;
    tcp.send(1, "slow.example", Rtype::A).await;
    tcp.send(2, "web.default.svc.cluster.local", Rtype::A).await;
    tcp.send(3, "all.default.svc.cluster.local", Rtype::A).await;
    let mut ids = Vec::new();
    for _ in 0..3 {
        let (id, said) = tcp.receive().await.unwrap();
        assert!(!said.truncated);
        assert_eq!(said.answers.len(), if id == 3 { 2000 } else { 1 });
        ids.push(id);
    }
    assert_eq!(ids, [2, 3, 1]);

    let short = udp_edns(carry.dns, "all.default.svc.cluster.local", Rtype::A, Some(1232)).await;
    assert!(short.truncated && short.answers.len() > 50);

    // Not a query: nothing comes back, and the connection goes on; an end in the middle of a query ends it.
    tcp.send_bytes(&[0, 3, 1, 2, 3]).await;
    tcp.send(4, "web.default.svc.cluster.local", Rtype::A).await;
    assert_eq!(tcp.receive().await.unwrap().0, 4);
}

#[tokio::test]
async fn one_client_cannot_take_all_tcp_connections() {
    let dir = tempfile::tempdir().unwrap();
    let carry = Carry::start(config(dir.path(), vec![])).await;
    let _client = feed(dir.path(), vec![cluster(vec![web([10, 96, 0, 1])])]).await;
    let mut held = Vec::new();
    for _ in 0..80 {
        held.push(Tcp::connect(carry.dns).await);
    }
    let mut served = 0;
    for connection in &mut held {
        // Those over the limit are closed; writing to them may succeed, reading does not.
        connection.send(1, "web.default.svc.cluster.local", Rtype::A).await;
        served += u32::from(connection.receive().await.is_some());
    }
    assert!((32..=64).contains(&served), "{served}");
    drop(held);
    eventually("room again", async || {
        let mut tcp = Tcp::connect(carry.dns).await;
        tcp.send(1, "web.default.svc.cluster.local", Rtype::A).await;
        tcp.receive().await.is_some()
    })
    .await;
}

#[tokio::test]
async fn one_client_that_asks_for_what_nobody_answers_takes_no_answer_from_another() {
    let dir = tempfile::tempdir().unwrap();
    let upstream = Upstream::start(1).await;
    let carry = Carry::start(config(dir.path(), vec![upstream.address])).await;
    let _client = feed(dir.path(), vec![cluster(vec![])]).await;
    let counters = async || feed::counters(&dir.path().join("run/carry.sock")).await.unwrap();

    let _asking = flood(&carry, dir.path(), address(6), 600, "example").await;
    let counted = counters().await;
    assert!((128..256).contains(&counted.forwarded), "a quarter of 512: {counted:?}");
    assert_eq!(counted.clients_over_share, 600 - counted.forwarded, "{counted:?}");
    assert_eq!(udp(carry.dns, "b.example", Rtype::A).await.answers, ["b.example A 192.0.2.1"]);

    // Joining what is on its way costs no share of those, but one of what may wait: a quarter of 2048.
    for round in 1..=6 {
        flood(&carry, dir.path(), address(6), 100, "example").await;
        assert_eq!(counters().await.forwarded, counted.forwarded + 1, "round {round}: nothing is asked twice");
    }
    let counted = counters().await;
    assert!((300..450).contains(&counted.joined) && counted.servers_over_share == 0, "{counted:?}");
    assert_eq!(udp(carry.dns, "c.example", Rtype::A).await.answers, ["c.example A 192.0.2.1"]);
}

#[tokio::test]
async fn a_zone_whose_servers_are_silent_leaves_room_for_the_others_however_many_ask() {
    let dir = tempfile::tempdir().unwrap();
    let (node, stub) = (Upstream::start(1).await, Upstream::start(2).await);
    let carry = Carry::start(config(dir.path(), vec![node.address])).await;
    let dead = DnsZone {
        name: "dead.test".to_owned(),
        upstream: DnsUpstream::Servers { servers: vec![stub.address] },
        hosts_fall_through: true,
        ..DnsZone::default()
    };
    let rules = FeedMessage::Rules { rules: DnsRules { zones: vec![dead] } };
    let _client = feed(dir.path(), vec![cluster(vec![]), rules]).await;
    let mut asking = Vec::new();
    for client in 1..=10 {
        asking.push(flood(&carry, dir.path(), [127, 0, 1, client].into(), 60, "dead.test").await);
    }
    let counted = feed::counters(&dir.path().join("run/carry.sock")).await.unwrap();
    assert!((256..400).contains(&counted.forwarded) && counted.servers_over_share > 200, "half of 512: {counted:?}");
    assert_eq!(udp(carry.dns, "some.example", Rtype::A).await.answers, ["some.example A 192.0.2.1"]);
    assert_eq!(udp(carry.dns, "x.dead.test", Rtype::A).await.rcode, Rcode::SERVFAIL);
    assert_eq!(stub.asked("udp", "x.dead.test"), 0, "at once, not when its servers have been waited for");
}

#[tokio::test]
async fn answers_go_on_when_the_agent_is_dead_and_carry_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let carry = Carry::start(config(dir.path(), vec![])).await;
    let client = feed(dir.path(), vec![cluster(vec![web([10, 96, 0, 1])])]).await;
    drop(client);
    assert_eq!(udp(carry.dns, "web.default.svc.cluster.local", Rtype::A).await.answers.len(), 1);
    carry.stop().await;

    let carry = Carry::start(config(dir.path(), vec![])).await;
    let answer = udp(carry.dns, "web.default.svc.cluster.local", Rtype::A).await;
    assert_eq!(answer.answers, ["web.default.svc.cluster.local A 10.96.0.1"], "from disk");
    carry.stop().await;

    let file = dir.path().join("state/dns-state.json");
    let text = std::fs::read(&file).unwrap();
    std::fs::write(&file, &text[..text.len() / 2]).unwrap();
    let carry = Carry::start(config(dir.path(), vec![])).await;
    let answer = udp(carry.dns, "web.default.svc.cluster.local", Rtype::A).await;
    assert_eq!(answer.rcode, Rcode::SERVFAIL, "half a state is none");
    assert!(!file.exists() && file.with_extension("json.damaged").exists());
}

#[tokio::test]
async fn the_feed_client_brings_a_restarted_carry_up_to_date() {
    let dir = tempfile::tempdir().unwrap();
    let carry = Carry::start(config(dir.path(), vec![])).await;
    let client = feed(dir.path(), vec![cluster(vec![web([10, 96, 0, 1])])]).await;
    carry.stop().await;
    eventually("the loss is noticed", async || !client.is_synced()).await;
    client.send(vec![FeedMessage::Set { service: web([10, 96, 0, 3]) }]);
    assert!(!client.is_synced());
    std::fs::remove_file(dir.path().join("state/dns-state.json")).unwrap();
    let carry = Carry::start(config(dir.path(), vec![])).await;
    eventually("fed again", async || client.is_synced()).await;
    let answer = udp(carry.dns, "web.default.svc.cluster.local", Rtype::A).await;
    assert_eq!(answer.answers, ["web.default.svc.cluster.local A 10.96.0.3"]);
}

#[tokio::test]
async fn the_feed_socket_is_the_owners_and_wants_a_snapshot_first() {
    use std::os::unix::fs::PermissionsExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let dir = tempfile::tempdir().unwrap();
    let carry = Carry::start(config(dir.path(), vec![])).await;
    let socket = dir.path().join("run/carry.sock");
    assert_eq!(std::fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o600);
    let mut stream = tokio::net::UnixStream::connect(&socket).await.unwrap();
    let message = br#"{"request":"apply","message":{"kind":"remove","namespace":"a","name":"b"}}"#;
    stream.write_u32(u32::try_from(message.len()).unwrap()).await.unwrap();
    stream.write_all(message).await.unwrap();
    let mut reply = vec![0; usize::try_from(stream.read_u32().await.unwrap()).unwrap()];
    stream.read_exact(&mut reply).await.unwrap();
    assert!(String::from_utf8(reply).unwrap().contains("must be a snapshot"));
    for nonsense in [&[0xff, 0xff, 0xff, 0xff, 1][..], &[0, 0, 0, 2, b'{', b'x']] {
        let mut stream = tokio::net::UnixStream::connect(&socket).await.unwrap();
        stream.write_all(nonsense).await.unwrap();
        assert_eq!(stream.read(&mut [0; 8]).await.unwrap(), 0, "closed");
    }
    let _client = feed(dir.path(), vec![cluster(vec![web([10, 96, 0, 1])])]).await;
    assert_eq!(udp(carry.dns, "web.default.svc.cluster.local", Rtype::A).await.answers.len(), 1);
}

#[tokio::test]
async fn a_changed_resolv_conf_is_followed() {
    let dir = tempfile::tempdir().unwrap();
    // Upstreams of a resolv.conf are on port 53, which here only this process itself would answer on.
    std::fs::write(dir.path().join("resolv.conf"), format!("nameserver {}\n", address(0))).unwrap();
    let carry = Carry::start(config(dir.path(), vec![])).await;
    let _client = feed(dir.path(), vec![cluster(vec![])]).await;
    assert_eq!(udp(carry.dns, "a.example", Rtype::A).await.rcode, Rcode::SERVFAIL, "asking itself would be a loop");
    let Ok(upstream) = tokio::net::UdpSocket::bind((address(1), 53)).await else {
        eprintln!("skipped the rest: only root may bind port 53");
        return;
    };
    std::fs::write(dir.path().join("resolv.conf"), format!("nameserver {}\n", address(1))).unwrap();
    let asked = tokio::spawn(async move { upstream.recv_from(&mut [0; 512]).await });
    eventually("the new server is asked", async || {
        let _ = raw(carry.dns, &query("b.example", Rtype::A, None), Duration::from_millis(300)).await;
        asked.is_finished()
    })
    .await;
}

#[tokio::test]
async fn bad_messages_get_an_error_or_silence_and_answers_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let carry = Carry::start(config(dir.path(), vec![])).await;
    let _client = feed(dir.path(), vec![cluster(vec![web([10, 96, 0, 1])])]).await;
    let good = query("web.default.svc.cluster.local", Rtype::A, Some(1232));
    let mut response = good.clone();
    response[2] |= 0x80;
    let quickly = Duration::from_millis(200);
    assert_eq!(raw(carry.dns, &response, quickly).await, None, "an answer is never answered");
    assert_eq!(raw(carry.dns, &good[..11], quickly).await, None);
    let cut = raw(carry.dns, &good[..20], quickly).await.unwrap();
    assert_eq!(cut[3] & 0xf, 1, "FORMERR");
    for at in 0..good.len() {
        for value in [0, 0x3f, 0x80, 0xc0, 0xff] {
            let mut bytes = good.clone();
            bytes[at] = value;
            // Sent without waiting: whatever they lead to, the server lives.
            let socket = tokio::net::UdpSocket::bind((address(7), 0)).await.unwrap();
            socket.send_to(&bytes, carry.dns).await.unwrap();
        }
    }
    let answer = udp(carry.dns, "web.default.svc.cluster.local", Rtype::A).await;
    assert_eq!(answer.answers.len(), 1);
}

#[tokio::test]
async fn an_answer_that_policies_ask_for_leaves_when_the_agent_has_learned_it() {
    let dir = tempfile::tempdir().unwrap();
    let upstream = Upstream::start(1).await;
    let carry = Carry::start(config(dir.path(), vec![upstream.address])).await;
    let _client = feed(dir.path(), vec![cluster(vec![])]).await;
    assert_eq!(udp(carry.dns, "before.example.com", Rtype::A).await.answers.len(), 1, "no agent listens yet");

    let socket = dir.path().join("run/carry.sock");
    let mut answers = feed::Answers::follow(&socket, vec!["*.example.com".to_owned()]).await.unwrap();
    let (serial, told) = answers.next().await.unwrap();
    let said: Vec<_> = told.iter().map(|answer| (answer.name.as_str(), answer.addresses.as_slice())).collect();
    let address = std::net::IpAddr::from([192, 0, 2, 1]);
    assert_eq!(said, [("before.example.com", [address].as_slice())], "what clients may still have");
    answers.learned(serial, false).await.unwrap();

    let dns = carry.dns;
    let asked = tokio::spawn(async move { udp(dns, "API.example.com", Rtype::A).await });
    let (serial, told) = answers.next().await.unwrap();
    assert_eq!((told[0].name.as_str(), told[0].addresses.as_slice()), ("api.example.com", [address].as_slice()));
    assert!(told[0].ttl <= 60 && told[0].ttl > 55);
    tokio::time::sleep(Duration::from_millis(60)).await;
    assert!(!asked.is_finished(), "it is not given before it is learned");
    answers.learned(serial, false).await.unwrap();
    assert_eq!(asked.await.unwrap().answers, ["API.example.com A 192.0.2.1"]);

    let begun = tokio::time::Instant::now();
    for _ in 0..20 {
        udp(carry.dns, "api.example.com", Rtype::A).await;
        udp(carry.dns, "example.com", Rtype::A).await;
    }
    let mut tcp = Tcp::connect(carry.dns).await;
    tcp.send(1, "api.example.com", Rtype::A).await;
    assert!(tcp.receive().await.is_some());
    assert!(begun.elapsed() < Duration::from_millis(450), "none of these waits: {:?}", begun.elapsed());

    let begun = tokio::time::Instant::now();
    assert_eq!(udp(carry.dns, "late.example.com", Rtype::A).await.answers.len(), 1);
    assert!(begun.elapsed() >= Duration::from_millis(450), "an agent that says nothing is not waited for any longer");
    drop(answers);
    let counters = async || feed::counters(&socket).await.unwrap();
    eventually("the agent is gone", async || {
        udp(dns, "left.example.com", Rtype::A).await;
        counters().await.names_unheard > 1
    })
    .await;
    let counted = counters().await;
    assert_eq!((counted.names_held, counted.names_late), (2, 1), "{counted:?}");
}
