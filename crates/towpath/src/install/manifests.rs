//! The objects: files of `deploy/kustomize/`, embedded, and the places in them that an option changes.
//!
//! A place is a piece of text that occurs a fixed number of times in one file. So what is printed keeps the comments that say why
//! something is as it is, and a file in which a place is lost is found by the next test, not by the next person.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Result, ensure};
use serde_json::json;
use towpath_wire::config::Duty;

/// The image when none is named; what the files have.
pub(crate) const IMAGE: &str = concat!("ghcr.io/towpath/towpath:", env!("CARGO_PKG_VERSION"));

/// A file of `deploy/kustomize/`.
#[derive(Clone, Copy, Debug)]
pub(super) struct File {
    /// Its path below `deploy/kustomize/`.
    pub(super) path: &'static str,
    /// Its content.
    pub(super) text: &'static str,
}

macro_rules! file {
    ($path:literal) => {
        File { path: $path, text: include_str!(concat!("../../../../deploy/kustomize/", $path)) }
    };
}

/// In the order in which they are applied: what is referred to comes first.
pub(super) const BASE: [File; 9] = [
    file!("base/crd-addresspool.yaml"),
    file!("base/crd-networkconfig.yaml"),
    file!("base/crd-nodenetwork.yaml"),
    file!("base/admission.yaml"),
    file!("base/rbac.yaml"),
    file!("base/config.yaml"),
    file!("base/controller.yaml"),
    file!("base/daemonset.yaml"),
    file!("base/daemonset-dns.yaml"),
];
/// With `--dns towpath`.
pub(super) const DNS: File = file!("components/dns/service.yaml");
/// Of `towpath uninstall`.
pub(super) const UNINSTALL: File = file!("uninstall/daemonset.yaml");

/// A value that an option sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Value {
    /// The image of all containers.
    Image,
    /// Pod ranges.
    ClusterCidrs,
    /// Service ranges.
    ServiceCidrs,
    /// Who serves Services.
    ServiceProxy,
    /// Who answers cluster DNS.
    Dns,
    /// Addresses that Towpath answers cluster DNS on.
    ClusterDns,
    /// The first of them.
    FirstClusterDns,
    /// Whether there are two.
    DnsFamilies,
    /// Domain of the cluster.
    ClusterDomain,
    /// URL of the API server.
    ApiServer,
    /// MTU of pods' devices.
    Mtu,
    /// Destinations that see pods' own addresses.
    NonMasqueradeCidrs,
    /// UDP port of the tunnel.
    VxlanPort,
    /// Replicas of the controller.
    ControllerReplicas,
    /// Address at which kubelet finds carry.
    CarryProbe,
}

/// Where a value is: `key` is followed by it, `times` times, in the file; `now` is what the file has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    file: &'static str,
    key: &'static str,
    now: &'static str,
    times: usize,
    value: Value,
}

const fn place(file: &'static str, key: &'static str, now: &'static str, times: usize, value: Value) -> Place {
    Place { file, key, now, times, value }
}

const QUOTED_IMAGE: &str = concat!("\"ghcr.io/towpath/towpath:", env!("CARGO_PKG_VERSION"), "\"");

/// Every place of every file.
pub(super) const PLACES: [Place; 19] = [
    place("base/daemonset.yaml", "image: ", QUOTED_IMAGE, 2, Value::Image),
    place("base/daemonset-dns.yaml", "image: ", QUOTED_IMAGE, 1, Value::Image),
    place("base/daemonset-dns.yaml", "tcpSocket: {host: ", "\"169.254.116.10\"", 1, Value::CarryProbe),
    place("base/controller.yaml", "image: ", QUOTED_IMAGE, 1, Value::Image),
    place("base/controller.yaml", "replicas: ", "2", 1, Value::ControllerReplicas),
    place("uninstall/daemonset.yaml", "image: ", QUOTED_IMAGE, 2, Value::Image),
    place("base/config.yaml", "clusterCidrs: ", "[\"10.244.0.0/16\"]", 2, Value::ClusterCidrs),
    place("base/config.yaml", "serviceCidrs: ", "[\"10.96.0.0/12\"]", 1, Value::ServiceCidrs),
    place("base/config.yaml", "serviceProxy: ", "\"auto\"", 1, Value::ServiceProxy),
    place("base/config.yaml", "dns: ", "\"auto\"", 1, Value::Dns),
    place("base/config.yaml", "clusterDns: ", "[]", 1, Value::ClusterDns),
    place("base/config.yaml", "clusterDomain: ", "\"cluster.local\"", 1, Value::ClusterDomain),
    place("base/config.yaml", "apiServer: ", "null", 2, Value::ApiServer),
    place("base/config.yaml", "podMtu: ", "null", 1, Value::Mtu),
    place("base/config.yaml", "nonMasqueradeCidrs: ", "[]", 1, Value::NonMasqueradeCidrs),
    place("base/config.yaml", "vxlanPort: ", "8472", 1, Value::VxlanPort),
    place("components/dns/service.yaml", "clusterIP: ", "\"10.96.0.10\"", 1, Value::FirstClusterDns),
    place("components/dns/service.yaml", "clusterIPs: ", "[\"10.96.0.10\"]", 1, Value::ClusterDns),
    place("components/dns/service.yaml", "ipFamilyPolicy: ", "SingleStack", 1, Value::DnsFamilies),
];

/// What an installation is made with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Values {
    pub(super) image: String,
    pub(super) cluster_cidrs: Vec<String>,
    pub(super) service_cidrs: Vec<String>,
    pub(super) service_proxy: Duty,
    pub(super) dns: Duty,
    pub(super) cluster_dns: Vec<IpAddr>,
    pub(super) cluster_domain: String,
    pub(super) api_server: Option<String>,
    pub(super) mtu: Option<u32>,
    pub(super) non_masquerade_cidrs: Vec<String>,
    pub(super) vxlan_port: u16,
    pub(super) controller_replicas: u8,
    pub(super) carry_probe: &'static str,
}

impl Default for Values {
    fn default() -> Self {
        Self {
            image: IMAGE.to_owned(),
            cluster_cidrs: vec!["10.244.0.0/16".to_owned()],
            service_cidrs: vec!["10.96.0.0/12".to_owned()],
            service_proxy: Duty::Auto,
            dns: Duty::Auto,
            cluster_dns: Vec::new(),
            cluster_domain: "cluster.local".to_owned(),
            api_server: None,
            mtu: None,
            non_masquerade_cidrs: Vec::new(),
            vxlan_port: 8472,
            controller_replicas: 2,
            carry_probe: "169.254.116.10",
        }
    }
}

impl Values {
    /// The value as YAML (in its JSON form, on one line).
    fn text(&self, value: Value) -> String {
        match value {
            Value::Image => json!(self.image),
            Value::ClusterCidrs => json!(self.cluster_cidrs),
            Value::ServiceCidrs => json!(self.service_cidrs),
            Value::ServiceProxy => json!(self.service_proxy),
            Value::Dns => json!(self.dns),
            Value::ClusterDns => json!(self.cluster_dns),
            Value::FirstClusterDns => json!(self.cluster_dns.first()),
            // No JSON, so that it reads as it is written in the file.
            Value::DnsFamilies if self.cluster_dns.len() > 1 => return "RequireDualStack".to_owned(),
            Value::DnsFamilies => return "SingleStack".to_owned(),
            Value::ClusterDomain => json!(self.cluster_domain),
            Value::ApiServer => json!(self.api_server),
            Value::Mtu => json!(self.mtu),
            Value::NonMasqueradeCidrs => json!(self.non_masquerade_cidrs),
            Value::VxlanPort => json!(self.vxlan_port),
            Value::ControllerReplicas => json!(self.controller_replicas),
            Value::CarryProbe => json!(self.carry_probe),
        }
        .to_string()
    }
}

/// A file with its places filled.
///
/// # Errors
/// A place is not in the file as often as it should be: a mistake in this program.
pub(super) fn fill(file: File, text_of: impl Fn(Value) -> String) -> Result<String> {
    let mut text = file.text.to_owned();
    for place in PLACES.iter().filter(|place| place.file == file.path) {
        let found = format!("{}{}", place.key, place.now);
        let times = text.matches(&found).count();
        ensure!(times == place.times, "{}: {found:?} is there {times} times, not {}", file.path, place.times);
        text = text.replace(&found, &format!("{}{}", place.key, text_of(place.value)));
    }
    Ok(text)
}

fn join(files: &[File], values: &Values) -> Result<String> {
    let mut out = String::new();
    for file in files {
        out.push_str("---\n");
        out.push_str(fill(*file, |value| values.text(value))?.trim_end());
        out.push('\n');
    }
    Ok(out)
}

/// The files of an installation.
pub(super) fn files(values: &Values) -> Vec<File> {
    let dns = (!values.cluster_dns.is_empty()).then_some(DNS);
    BASE.into_iter().chain(dns).collect()
}

/// Everything that `kubectl apply -f -` needs.
///
/// # Errors
/// See [`fill`].
pub(super) fn install(values: &Values) -> Result<String> {
    Ok(format!(
        "# Towpath {}: `towpath install` printed this from deploy/kustomize/.\n{}",
        env!("CARGO_PKG_VERSION"),
        join(&files(values), values)?
    ))
}

/// The DaemonSet that cleans every node.
///
/// # Errors
/// See [`fill`].
pub(super) fn uninstall(values: &Values) -> Result<String> {
    Ok(format!(
        "# Towpath {}: `towpath uninstall` printed this from deploy/kustomize/.\n{}",
        env!("CARGO_PKG_VERSION"),
        join(&[UNINSTALL], values)?
    ))
}

/// Configuration files of the processes, by name.
///
/// # Errors
/// The ConfigMap cannot be read: a mistake in this program.
pub(super) fn config_data(values: &Values) -> Result<BTreeMap<String, String>> {
    let file = BASE.into_iter().find(|file| file.path == "base/config.yaml").unwrap_or(UNINSTALL);
    let object: k8s_openapi::api::core::v1::ConfigMap =
        serde_saphyr::from_str(&fill(file, |value| values.text(value))?)?;
    Ok(object.data.unwrap_or_default())
}
