//! The Helm chart: the files of `deploy/kustomize/` with a template expression in each place, so that `values.yaml` has what the
//! options of `towpath install` have. Only tests use it: they write the chart and compare what is checked in.

use anyhow::{Context, Result};
use serde_json::Value as Json;

use super::manifests::{BASE, DNS, IMAGE, Value, Values, fill};

/// Around the DNS Service, which is there when there are addresses.
const IF_DNS: (&str, &str) = ("{{- if .Values.clusterDNS }}\n", "{{- end }}\n");
const FAMILIES: &str = "{{ if gt (len .Values.clusterDNS) 1 }}RequireDualStack{{ else }}SingleStack{{ end }}";

/// Name in `values.yaml` of a value that is written as JSON.
fn key(value: Value) -> &'static str {
    match value {
        Value::Image => "image",
        Value::ClusterCidrs => "clusterCIDRs",
        Value::ServiceCidrs => "serviceCIDRs",
        Value::ServiceProxy => "serviceProxy",
        Value::Dns => "dns",
        Value::ClusterDns | Value::FirstClusterDns | Value::DnsFamilies => "clusterDNS",
        Value::ClusterDomain => "clusterDomain",
        Value::ApiServer => "apiServer",
        Value::Mtu => "mtu",
        Value::NonMasqueradeCidrs => "nonMasqueradeCIDRs",
        Value::VxlanPort => "vxlanPort",
        Value::ControllerReplicas => "controllerReplicas",
        Value::CarryProbe => "carryProbe",
    }
}

fn expression(value: Value) -> String {
    match value {
        Value::DnsFamilies => FAMILIES.to_owned(),
        Value::FirstClusterDns => format!("{{{{ first .Values.{} | toJson }}}}", key(value)),
        _ => format!("{{{{ .Values.{} | toJson }}}}", key(value)),
    }
}

/// The files of the chart: path below `deploy/helm/towpath/`, content.
pub(super) fn files() -> Result<Vec<(String, String)>> {
    let version = env!("CARGO_PKG_VERSION");
    let mut files = vec![
        (
            "Chart.yaml".to_owned(),
            format!(
                "apiVersion: v2\nname: towpath\ndescription: The whole network of a Kubernetes cluster in one program\ntype: application\n\
                 version: {version}\nappVersion: \"{version}\"\nkubeVersion: \">=1.30.0-0\"\n"
            ),
        ),
        ("values.yaml".to_owned(), values_file()),
    ];
    for file in BASE.into_iter().chain([DNS]) {
        let mut text = fill(file, expression)?;
        if file.path == DNS.path {
            text = format!("{}{}{}", IF_DNS.0, text, IF_DNS.1);
        }
        let name = match file.path {
            path if path == DNS.path => "kube-dns.yaml",
            path => path.rsplit('/').next().context("a file has a name")?,
        };
        files.push((format!("templates/{name}"), text));
    }
    Ok(files)
}

fn values_file() -> String {
    format!(
        "# The defaults are those of a kubeadm cluster with CoreDNS. Install it into kube-system.\n\n\
         # The image of all containers.\nimage: {IMAGE}\n\
         # Pod ranges of the cluster (kubeadm's --pod-network-cidr), at most one a family.\nclusterCIDRs: [10.244.0.0/16]\n\
         # Service ranges of the cluster (kubeadm's --service-cidr), at most one a family.\nserviceCIDRs: [10.96.0.0/12]\n\
         # Who serves Services to nodes and to the outside: auto (kube-proxy where it runs), towpath, off.\nserviceProxy: auto\n\
         # Who answers cluster DNS: auto (CoreDNS where it runs), towpath, off.\ndns: auto\n\
         # With dns: towpath in a cluster without the Service kube-dns: its addresses, for example [10.96.0.10]; the Service is made.\n\
         clusterDNS: []\n\
         # Domain of the cluster.\nclusterDomain: cluster.local\n\
         # https://HOST:PORT of the API server; null: the one that each node's kubelet talks to, by /etc/kubernetes/kubelet.conf.\n\
         apiServer: null\n\
         # MTU of pods' devices in bytes; null: what the ways between nodes carry.\nmtu: null\n\
         # Destinations outside the cluster that see pods' own addresses.\nnonMasqueradeCIDRs: []\n\
         # UDP port of the tunnel.\nvxlanPort: 8472\n\
         # Replicas of the controller.\ncontrollerReplicas: 2\n\
         # Where kubelet finds carry: fd00:7470::a in a cluster without IPv4.\ncarryProbe: 169.254.116.10\n"
    )
}

/// `values.yaml` as the options have it.
pub(super) fn values_of(values: &Values) -> Json {
    serde_json::json!({
        "image": values.image,
        "clusterCIDRs": values.cluster_cidrs,
        "serviceCIDRs": values.service_cidrs,
        "serviceProxy": values.service_proxy,
        "dns": values.dns,
        "clusterDNS": values.cluster_dns,
        "clusterDomain": values.cluster_domain,
        "apiServer": values.api_server,
        "mtu": values.mtu,
        "nonMasqueradeCIDRs": values.non_masquerade_cidrs,
        "vxlanPort": values.vxlan_port,
        "controllerReplicas": values.controller_replicas,
        "carryProbe": values.carry_probe,
    })
}

/// Renders a template that uses no more of Helm's language than [`expression`] writes; anything else is an error. It stands in
/// for Helm, which the build does not need.
pub(super) fn render(template: &str, values: &Json) -> Result<String> {
    let mut text = template;
    if let Some(inner) = template.strip_prefix(IF_DNS.0) {
        text = inner.strip_suffix(IF_DNS.1).context("an if without its end")?;
        if values.get("clusterDNS").and_then(Json::as_array).is_none_or(Vec::is_empty) {
            return Ok(String::new());
        }
    }
    let several = values.get("clusterDNS").and_then(Json::as_array).is_some_and(|list| list.len() > 1);
    let mut out = text.replace(FAMILIES, if several { "RequireDualStack" } else { "SingleStack" });
    while let Some(start) = out.find("{{") {
        let end =
            out.get(start..).and_then(|rest| rest.find("}}")).context("an expression without its end")? + start + 2;
        let expression = out.get(start..end).unwrap_or_default().to_owned();
        let inner = expression.strip_prefix("{{ ").and_then(|e| e.strip_suffix(" | toJson }}"));
        let inner = inner.with_context(|| format!("{expression} is more than this renderer knows"))?;
        let value = match inner.strip_prefix("first .Values.") {
            Some(name) => values.get(name).and_then(|list| list.get(0)),
            None => inner.strip_prefix(".Values.").and_then(|name| values.get(name)),
        };
        let value = value.with_context(|| format!("{expression}: no such value"))?.to_string();
        out.replace_range(start..end, &value);
    }
    Ok(out)
}
