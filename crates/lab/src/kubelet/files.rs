//! The files that the kubelet writes for every pod: `/etc/hosts`, `/etc/hostname` and `/etc/resolv.conf`. Pure.

use std::fmt::Write;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::Pod;

use crate::options::CLUSTER_DOMAIN;

/// Most names a search list may have, as Kubernetes limits it.
const MAX_SEARCHES: usize = 32;

/// The pod's host name: `spec.hostname`, or its name; at most 63 characters.
pub(crate) fn hostname(pod: &Pod) -> String {
    let spec = pod.spec.as_ref();
    let name = spec.and_then(|s| s.hostname.clone()).or_else(|| pod.metadata.name.clone()).unwrap_or_default();
    name.chars().take(63).collect::<String>().trim_end_matches(['-', '.']).to_owned()
}

/// The pod's fully qualified name when it has a `subdomain`.
fn fqdn(pod: &Pod) -> Option<String> {
    let subdomain = pod.spec.as_ref()?.subdomain.as_deref().filter(|s| !s.is_empty())?;
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    Some(format!("{}.{subdomain}.{namespace}.svc.{CLUSTER_DOMAIN}", hostname(pod)))
}

/// What `hostname` says inside: with `setHostnameAsFQDN` the full name.
pub(crate) fn kernel_hostname(pod: &Pod) -> String {
    let wanted = pod.spec.as_ref().and_then(|s| s.set_hostname_as_fqdn).unwrap_or(false);
    fqdn(pod).filter(|name| wanted && name.len() <= 64).unwrap_or_else(|| hostname(pod))
}

/// `/etc/hosts` as the kubelet writes it.
pub(crate) fn hosts(pod: &Pod, addresses: &[IpAddr]) -> String {
    let mut text = String::from(
        "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n",
    );
    for address in addresses {
        let names = fqdn(pod).map_or_else(|| hostname(pod), |full| format!("{full}\t{}", hostname(pod)));
        let _ = writeln!(text, "{address}\t{names}");
    }
    let aliases = pod.spec.as_ref().and_then(|s| s.host_aliases.clone()).unwrap_or_default();
    if !aliases.is_empty() {
        text.push_str("\n# Entries added by HostAliases.\n");
    }
    for alias in aliases {
        let _ = writeln!(text, "{}\t{}", alias.ip, alias.hostnames.unwrap_or_default().join("\t"));
    }
    text
}

/// `/etc/resolv.conf` by `dnsPolicy` and `dnsConfig`. `node` is the node's own file.
pub(crate) fn resolv_conf(pod: &Pod, cluster_dns: &[IpAddr], node: &str) -> String {
    let spec = pod.spec.clone().unwrap_or_default();
    let policy = match spec.dns_policy.as_deref() {
        Some("ClusterFirst") | None if spec.host_network == Some(true) => "Default",
        Some(policy) => policy,
        None => "ClusterFirst",
    };
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    let lines = |keyword: &str| -> Vec<String> {
        let found = node.lines().filter_map(|line| line.trim().strip_prefix(keyword));
        found.filter(|rest| rest.starts_with([' ', '\t'])).map(|rest| rest.trim().to_owned()).collect()
    };
    let words = |keyword: &str| -> Vec<String> {
        lines(keyword).last().map(|line| line.split_whitespace().map(str::to_owned).collect()).unwrap_or_default()
    };
    let (mut servers, mut searches, mut options) = match policy {
        "None" => (Vec::new(), Vec::new(), Vec::new()),
        "Default" => (lines("nameserver"), words("search"), words("options")),
        _ => {
            let mut searches: Vec<String> = [
                format!("{namespace}.svc.{CLUSTER_DOMAIN}"),
                format!("svc.{CLUSTER_DOMAIN}"),
                CLUSTER_DOMAIN.to_owned(),
            ]
            .into();
            searches.extend(words("search"));
            (cluster_dns.iter().map(IpAddr::to_string).collect(), searches, vec!["ndots:5".to_owned()])
        }
    };
    if let Some(config) = spec.dns_config {
        merge(&mut servers, config.nameservers.unwrap_or_default());
        merge(&mut searches, config.searches.unwrap_or_default());
        for option in config.options.unwrap_or_default() {
            let name = option.name.unwrap_or_default();
            options.retain(|have| have.split(':').next() != Some(&name));
            options.push(option.value.map_or(name.clone(), |value| format!("{name}:{value}")));
        }
    }
    searches.truncate(MAX_SEARCHES);
    servers.truncate(3);
    let mut text = String::new();
    if !searches.is_empty() {
        let _ = writeln!(text, "search {}", searches.join(" "));
    }
    for server in servers {
        let _ = writeln!(text, "nameserver {server}");
    }
    if !options.is_empty() {
        let _ = writeln!(text, "options {}", options.join(" "));
    }
    text
}

fn merge(have: &mut Vec<String>, more: Vec<String>) {
    for item in more {
        if !have.contains(&item) {
            have.push(item);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(spec: serde_json::Value) -> Pod {
        serde_json::from_value(serde_json::json!({"metadata": {"name": "web-0", "namespace": "shop"}, "spec": spec}))
            .unwrap()
    }

    #[test]
    fn cluster_first_asks_the_cluster_and_searches_the_namespace() {
        let text =
            resolv_conf(&pod(serde_json::json!({"containers": []})), &["10.96.0.10".parse().unwrap()], "search lan\n");
        assert_eq!(
            text,
            "search shop.svc.cluster.local svc.cluster.local cluster.local lan\nnameserver 10.96.0.10\noptions ndots:5\n"
        );
    }

    #[test]
    fn dns_policies_and_config_are_honoured() {
        let spec = serde_json::json!({"containers": [], "dnsPolicy": "None", "dnsConfig": {
            "nameservers": ["192.0.2.1"], "searches": ["a.b"], "options": [{"name": "ndots", "value": "2"}, {"name": "edns0"}]}});
        assert_eq!(
            resolv_conf(&pod(spec), &[], "nameserver 1.1.1.1\n"),
            "search a.b\nnameserver 192.0.2.1\noptions ndots:2 edns0\n"
        );
        let spec = serde_json::json!({"containers": [], "hostNetwork": true});
        assert_eq!(resolv_conf(&pod(spec), &[], "nameserver 1.1.1.1\n"), "nameserver 1.1.1.1\n");
    }

    #[test]
    fn hosts_names_the_pod_by_its_subdomain() {
        let pod = pod(
            serde_json::json!({"containers": [], "subdomain": "db", "hostAliases": [{"ip": "1.2.3.4", "hostnames": ["x"]}]}),
        );
        let text = hosts(&pod, &["10.244.0.5".parse().unwrap()]);
        assert!(text.contains("10.244.0.5\tweb-0.db.shop.svc.cluster.local\tweb-0\n"), "{text}");
        assert!(text.ends_with("1.2.3.4\tx\n"), "{text}");
    }
}
