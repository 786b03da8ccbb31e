//! Rows of Services, endpoints, policies and ingresses.

use serde_json::{Value, json};

use super::{AGE, ColumnRow, NAME, labels, name, object_age, selector};
use crate::kinds::read::Read;

/// Columns of Services.
pub(crate) const SERVICE: &[ColumnRow] = &[
    NAME,
    ColumnRow("Type", "string", "How the Service is exposed.", 0),
    ColumnRow("Cluster-IP", "string", "The virtual address inside the cluster.", 0),
    ColumnRow("External-IP", "string", "Addresses outside the cluster.", 0),
    ColumnRow("Port(s)", "string", "The ports that the Service listens on.", 0),
    AGE,
    ColumnRow("Selector", "string", "Which pods serve it.", 1),
];

/// The row of a Service.
pub(crate) fn service(object: &Value, now: &str) -> Vec<Value> {
    let spec = object.at("spec");
    let ports: Vec<String> = spec
        .list("ports")
        .iter()
        .map(|port| {
            let (number, protocol) = (port.int("port").unwrap_or(0), port.text("protocol"));
            match port.int("nodePort").unwrap_or(0) {
                0 => format!("{number}/{protocol}"),
                node => format!("{number}:{node}/{protocol}"),
            }
        })
        .collect();
    let address = spec.texts("clusterIPs").first().copied().unwrap_or("<none>");
    vec![
        name(object),
        json!(spec.text("type")),
        json!(address),
        json!(external(object)),
        json!(if ports.is_empty() { "<none>".to_owned() } else { ports.join(",") }),
        object_age(object, now),
        json!(labels(spec.at("selector"))),
    ]
}

/// Addresses of a load balancer, sorted.
fn balancer(object: &Value) -> Vec<&str> {
    let mut out: Vec<&str> = object
        .deep(&["status", "loadBalancer"])
        .list("ingress")
        .iter()
        .map(|ingress| if ingress.text("ip").is_empty() { ingress.text("hostname") } else { ingress.text("ip") })
        .filter(|text| !text.is_empty())
        .collect();
    out.sort_unstable();
    out.dedup();
    out
}

fn external(object: &Value) -> String {
    let spec = object.at("spec");
    let fixed = spec.texts("externalIPs");
    match spec.text("type") {
        "ExternalName" => spec.text("externalName").to_owned(),
        "ClusterIP" | "NodePort" if fixed.is_empty() => "<none>".to_owned(),
        "ClusterIP" | "NodePort" => fixed.join(","),
        "LoadBalancer" => {
            let mut all = balancer(object);
            all.extend(fixed);
            if all.is_empty() { "<pending>".to_owned() } else { all.join(",") }
        }
        _ => "<unknown>".to_owned(),
    }
}

/// The first three joined by commas, and how many more.
fn first_three(list: &[String], empty: &str) -> String {
    let shown = list.get(..3.min(list.len())).unwrap_or_default().join(",");
    match list.len() {
        0 => empty.to_owned(),
        count if count > 3 => format!("{shown} + {} more...", count - 3),
        _ => shown,
    }
}

/// Columns of Endpoints.
pub(crate) const ENDPOINTS: &[ColumnRow] =
    &[NAME, ColumnRow("Endpoints", "string", "The addresses and ports behind a Service.", 0), AGE];

/// The row of an Endpoints.
pub(crate) fn endpoints(object: &Value, now: &str) -> Vec<Value> {
    let mut list = Vec::new();
    for subset in object.list("subsets") {
        let ips = || subset.list("addresses").iter().map(|address| address.text("ip"));
        if subset.list("ports").is_empty() {
            list.extend(ips().map(str::to_owned));
        }
        for port in subset.list("ports") {
            let number = port.int("port").unwrap_or(0);
            list.extend(
                ips().map(|ip| if ip.contains(':') { format!("[{ip}]:{number}") } else { format!("{ip}:{number}") }),
            );
        }
    }
    let empty = if object.list("subsets").is_empty() { "<none>" } else { "" };
    vec![name(object), json!(first_three(&list, empty)), object_age(object, now)]
}

/// Columns of EndpointSlices.
pub(crate) const ENDPOINT_SLICE: &[ColumnRow] = &[
    NAME,
    ColumnRow("AddressType", "string", "The kind of address.", 0),
    ColumnRow("Ports", "string", "The ports of every endpoint.", 0),
    ColumnRow("Endpoints", "string", "The addresses of the endpoints.", 0),
    AGE,
];

/// The row of an EndpointSlice.
pub(crate) fn endpoint_slice(object: &Value, now: &str) -> Vec<Value> {
    let ports: Vec<String> = object
        .list("ports")
        .iter()
        .map(|port| match (port.int("port"), port.at("name").as_str()) {
            (Some(number), _) => number.to_string(),
            (None, Some(name)) => name.to_owned(),
            (None, None) => "*".to_owned(),
        })
        .collect();
    let addresses: Vec<String> =
        object.list("endpoints").iter().flat_map(|endpoint| endpoint.texts("addresses")).map(str::to_owned).collect();
    vec![
        name(object),
        json!(object.text("addressType")),
        json!(first_three(&ports, "<unset>")),
        json!(first_three(&addresses, "<unset>")),
        object_age(object, now),
    ]
}

/// Columns of NetworkPolicies.
pub(crate) const NETWORK_POLICY: &[ColumnRow] =
    &[NAME, ColumnRow("Pod-Selector", "string", "Which pods it isolates.", 0), AGE];

/// The row of a NetworkPolicy.
pub(crate) fn network_policy(object: &Value, now: &str) -> Vec<Value> {
    vec![name(object), json!(selector(object.deep(&["spec", "podSelector"]))), object_age(object, now)]
}

/// Columns of Ingresses.
pub(crate) const INGRESS: &[ColumnRow] = &[
    NAME,
    ColumnRow(
        "Class",
        "string",
        "The name of the IngressClass resource that should be used for additional configuration",
        0,
    ),
    ColumnRow("Hosts", "string", "Hosts that incoming requests are matched against before the ingress rule", 0),
    ColumnRow("Address", "string", "Address is a list containing ingress points for the load-balancer", 0),
    ColumnRow("Ports", "string", "Ports of TLS configurations that open", 0),
    AGE,
];

/// The row of an Ingress.
pub(crate) fn ingress(object: &Value, now: &str) -> Vec<Value> {
    let spec = object.at("spec");
    let class = spec.text("ingressClassName");
    let hosts: Vec<&str> =
        spec.list("rules").iter().map(|rule| rule.text("host")).filter(|host| !host.is_empty()).collect();
    let shown = match hosts.len() {
        0 => "*".to_owned(),
        count if count > 3 => {
            format!("{} + {} more...", hosts.get(..3).unwrap_or_default().join(","), spec.list("rules").len() - 3)
        }
        _ => hosts.join(","),
    };
    vec![
        name(object),
        json!(if class.is_empty() { "<none>" } else { class }),
        json!(shown),
        json!(balancer(object).join(",")),
        json!(if spec.list("tls").is_empty() { "80" } else { "80, 443" }),
        object_age(object, now),
    ]
}

/// Columns of IngressClasses.
pub(crate) const INGRESS_CLASS: &[ColumnRow] = &[
    NAME,
    ColumnRow("Controller", "string", "Controller that is responsible for handling this class", 0),
    ColumnRow("Parameters", "string", "A reference to a resource with additional parameters", 0),
    AGE,
];

/// The row of an IngressClass.
pub(crate) fn ingress_class(object: &Value, now: &str) -> Vec<Value> {
    let spec = object.at("spec");
    let parameters = spec.at("parameters");
    let shown = if parameters.is_null() {
        "<none>".to_owned()
    } else {
        let group = parameters.text("apiGroup");
        let dot = if group.is_empty() { "" } else { "." };
        format!("{}{dot}{group}/{}", parameters.text("kind"), parameters.text("name"))
    };
    vec![name(object), json!(spec.text("controller")), json!(shown), object_age(object, now)]
}

/// Columns of ServiceCIDRs.
pub(crate) const SERVICE_CIDR: &[ColumnRow] =
    &[NAME, ColumnRow("CIDRs", "string", "The ranges of Service addresses.", 0), AGE];

/// The row of a ServiceCIDR.
pub(crate) fn service_cidr(object: &Value, now: &str) -> Vec<Value> {
    vec![name(object), json!(object.at("spec").texts("cidrs").join(",")), object_age(object, now)]
}

/// Columns of IPAddresses.
pub(crate) const IP_ADDRESS: &[ColumnRow] =
    &[NAME, ColumnRow("ParentRef", "string", "What the address belongs to.", 0), AGE];

/// The row of an IPAddress.
pub(crate) fn ip_address(object: &Value, now: &str) -> Vec<Value> {
    let parent = object.deep(&["spec", "parentRef"]);
    let shown = if parent.is_null() {
        "<none>".to_owned()
    } else {
        let part = |lead: &str, field: &str| {
            let text = parent.text(field);
            if text.is_empty() { String::new() } else { format!("{lead}{text}") }
        };
        format!("{}{}{}/{}", parent.text("resource"), part(".", "group"), part("/", "namespace"), parent.text("name"))
    };
    vec![name(object), json!(shown), object_age(object, now)]
}
