use proptest::prelude::*;
use towpath_wire::dns::{DnsUpstream, DnsZone};

use super::rules::{Cluster, Compiled, Sources, compile, is_in};

fn compiled(corefile: &str) -> Compiled {
    with_kube_dns(corefile, &[])
}

fn with_kube_dns(corefile: &str, kube_dns: &[(&str, &str)]) -> Compiled {
    let sources = Sources {
        coredns: [("Corefile".to_owned(), corefile.to_owned())].into(),
        kube_dns: kube_dns.iter().map(|(key, text)| ((*key).to_owned(), (*text).to_owned())).collect(),
    };
    compile(&sources, &Cluster { domain: "cluster.local", own: &["10.96.0.10".parse().unwrap()] })
}

fn zone<'c>(compiled: &'c Compiled, name: &str) -> &'c DnsZone {
    compiled.rules.zones.iter().find(|zone| zone.name == name).unwrap_or_else(|| panic!("no zone {name}: {compiled:?}"))
}

fn servers(list: &[&str]) -> DnsUpstream {
    DnsUpstream::Servers { servers: list.iter().map(|s| s.parse().unwrap()).collect() }
}

/// As `kubeadm` 1.33 makes it.
const OF_KUBEADM: &str = "
.:53 {
    errors
    health {
       lameduck 5s
    }
    ready
    kubernetes cluster.local in-addr.arpa ip6.arpa {
       pods insecure
       fallthrough in-addr.arpa ip6.arpa
       ttl 30
    }
    prometheus :9153
    forward . /etc/resolv.conf {
       max_concurrent 1000
    }
    cache 30 {
       disable success cluster.local
       disable denial cluster.local
    }
    loop
    reload
    loadbalance
}
";

#[test]
fn what_kubeadm_writes_is_understood_whole() {
    let compiled = compiled(OF_KUBEADM);
    assert_eq!(compiled.left_out, Vec::<String>::new());
    let root = zone(&compiled, "");
    assert_eq!((&root.upstream, root.success_ttl, root.denial_ttl), (&DnsUpstream::Node, Some(30), Some(30)));
}

#[test]
fn stub_zones_have_servers_of_their_own_by_every_spelling() {
    let compiled = compiled(
        "example.com:53 {\n errors\n cache 10\n forward . 10.0.0.1 10.0.0.2:5353\n}\n\
         a.test, b.test {\n forward . [fd00::1]:54 fd00::2 10.0.0.1 10.0.0.1\n}\n\
         . {\n forward deep.test 10.9.9.9\n forward . dns://8.8.8.8\n}\n",
    );
    assert_eq!(compiled.left_out, Vec::<String>::new());
    assert_eq!(zone(&compiled, "example.com").upstream, servers(&["10.0.0.1:53", "10.0.0.2:5353"]));
    let both = servers(&["[fd00::1]:54", "[fd00::2]:53", "10.0.0.1:53"]);
    assert_eq!((&zone(&compiled, "a.test").upstream, &zone(&compiled, "b.test").upstream), (&both, &both));
    assert_eq!(zone(&compiled, "deep.test").upstream, servers(&["10.9.9.9:53"]));
    assert_eq!(zone(&compiled, "").upstream, servers(&["8.8.8.8:53"]));
}

#[test]
fn hosts_and_exact_rewrites_are_taken() {
    let compiled = compiled(
        ".:53 {\n hosts {\n  192.0.2.1 One.Test two.test\n  fd00::1 one.test\n  ttl 60\n  fallthrough\n }\n\
          rewrite name old.test web.default.svc.cluster.local\n rewrite stop name exact other.test. web2.test\n forward . 1.1.1.1\n}\n",
    );
    assert_eq!(compiled.left_out, Vec::<String>::new());
    let root = zone(&compiled, "");
    let hosts: Vec<String> = root.hosts.iter().map(|host| format!("{} {:?}", host.name, host.addresses)).collect();
    assert_eq!(hosts, ["one.test [192.0.2.1, fd00::1]", "two.test [192.0.2.1]"]);
    assert!(root.hosts_fall_through);
    let aliases: Vec<(&str, &str)> =
        root.aliases.iter().map(|alias| (alias.from.as_str(), alias.to.as_str())).collect();
    assert_eq!(aliases, [("old.test", "web.default.svc.cluster.local"), ("other.test", "web2.test")]);
    let closed = super::rules::compile(
        &Sources {
            coredns: [("Corefile".to_owned(), "x.test {\n hosts {\n 1.2.3.4 a.x.test\n }\n}".to_owned())].into(),
            ..Sources::default()
        },
        &Cluster::default(),
    );
    assert!(!zone(&closed, "x.test").hosts_fall_through);
}

#[test]
fn whatever_is_not_done_is_named_with_its_line() {
    let cases = [
        (".:53 {\n forward . tls://9.9.9.9\n}", "line 2: forward . tls://9.9.9.9"),
        (".:53 {\n forward . 1.1.1.1 {\n  except a.test\n }\n}", "line 3: except a.test"),
        (".:53 {\n forward . 10.96.0.10\n}", "this cluster's DNS itself"),
        (".:53 {\n template IN A {\n  answer x\n }\n}", "line 2: template IN A: not understood"),
        (".:53 {\n import custom/*.override\n}", "line 2: import custom/*.override"),
        (".:53 {\n hosts /etc/coredns/NodeHosts {\n  fallthrough\n }\n}", "cannot be read"),
        (".:53 {\n rewrite name suffix a.test b.test\n}", "line 2: rewrite name suffix"),
        (".:53 {\n rewrite name regex (.*) b.test\n}", "line 2: rewrite name regex"),
        (".:53 {\n kubernetes other.local\n}", "other.local is not the cluster's domain cluster.local"),
        (".:53 {\n cache 30 {\n  disable success example.com\n }\n}", "line 3: disable success example.com"),
        ("tls://.:853 {\n forward . 1.1.1.1\n}", "only plain DNS"),
        (".:1053 {\n forward . 1.1.1.1\n}", "only port 53"),
        ("(part) {\n errors\n}", "snippets"),
        ("errors", "not in a server block"),
        (".:53 {\n errors", "never closed"),
        (".:53 {\n}\n. {\n}", "came before"),
    ];
    for (text, expected) in cases {
        let left_out = compiled(text).left_out.join("\n");
        assert!(left_out.contains(expected), "{text}\n{left_out}");
        assert!(left_out.starts_with("Corefile line "), "{left_out}");
    }
}

#[test]
fn a_zone_without_a_server_that_can_be_asked_fails_and_is_not_forwarded_elsewhere() {
    let compiled = compiled("x.test {\n forward . tls://9.9.9.9\n}\n.:53 {\n forward . 1.1.1.1\n}");
    assert_eq!(zone(&compiled, "x.test").upstream, DnsUpstream::Nobody);
}

#[test]
fn a_zone_within_the_clusters_comes_before_its_names_unless_it_has_the_cluster_in_it() {
    let stub = "forward . 10.0.0.1";
    let compiled = compiled(&format!(
        "consul.cluster.local {{\n {stub}\n}}\n10.in-addr.arpa {{\n {stub}\n}}\n96.10.in-addr.arpa {{\n kubernetes\n {stub}\n}}\n\
         cluster.local {{\n {stub}\n}}\nlocal {{\n {stub}\n}}\n. {{\n {stub}\n}}\n"
    ));
    let over: Vec<&str> = compiled.rules.zones.iter().filter(|z| z.over_cluster).map(|z| z.name.as_str()).collect();
    assert_eq!(over, ["10.in-addr.arpa", "consul.cluster.local"]);
}

#[test]
fn kube_dns_stub_domains_are_taken_where_the_corefile_says_nothing() {
    let kube_dns = [
        ("stubDomains", r#"{"acme.local": ["1.2.3.4"], "example.com": ["5.6.7.8:5353"]}"#),
        ("upstreamNameservers", r#"["8.8.8.8", "8.8.4.4"]"#),
        ("federations", "{}"),
    ];
    let compiled = with_kube_dns("example.com {\n forward . 10.0.0.1\n}", &kube_dns);
    assert_eq!(zone(&compiled, "acme.local").upstream, servers(&["1.2.3.4:53"]));
    assert_eq!(zone(&compiled, "example.com").upstream, servers(&["10.0.0.1:53"]));
    assert_eq!(zone(&compiled, "").upstream, servers(&["8.8.8.8:53", "8.8.4.4:53"]));
    assert_eq!(compiled.left_out, ["ConfigMap kube-dns, federations: not understood"]);
    let broken = with_kube_dns("", &[("stubDomains", "{"), ("upstreamNameservers", "[\"nobody\"]")]);
    assert_eq!(broken.left_out.len(), 2, "{:?}", broken.left_out);
}

#[test]
fn a_name_is_in_its_zone_by_whole_labels() {
    assert!(is_in("a.test", "test") && is_in("test", "test") && is_in("any", ""));
    assert!(!is_in("atest", "test") && !is_in("test", "a.test"));
}

proptest! {
    #[test]
    fn any_text_compiles_and_says_what_is_left_out(text in "[ a-z.:#/\"{}0-9\n]{0,200}") {
        let compiled = compiled(&text);
        for zone in &compiled.rules.zones {
            prop_assert!(zone.hosts.iter().all(|host| is_in(&host.name, &zone.name)));
        }
        // Of a directive that nobody knows there is always a word.
        let unknown = format!(".:53 {{\n zzz\n}}\n{text}");
        prop_assert!(self::compiled(&unknown).left_out.iter().any(|line| line.contains("zzz")));
    }

    #[test]
    fn every_stub_zone_is_forwarded_to_its_servers(zones in prop::collection::btree_map("[a-z]{1,8}\\.[a-z]{2,5}", 1u8..255, 1..8)) {
        let text: String = zones.iter().map(|(zone, host)| format!("{zone}:53 {{\n forward . 192.0.2.{host}\n cache\n}}\n")).collect();
        let compiled = compiled(&text);
        prop_assert_eq!(&compiled.left_out, &Vec::<String>::new());
        for (name, host) in &zones {
            prop_assert_eq!(&zone(&compiled, name).upstream, &servers(&[&format!("192.0.2.{host}:53")]));
        }
    }
}
