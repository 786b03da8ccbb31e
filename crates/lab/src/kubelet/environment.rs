//! A container's environment: Service variables, `envFrom`, `env` with references, `$(NAME)` expansion.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::num::NonZero;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::{ConfigMap, Container, Pod, Secret, Service};
use kube::{Api, Client, ResourceExt};
use towpath_apiserver::kinds::quantity::Quantity;

/// What references may name.
pub(crate) struct Sources<'a> {
    /// For ConfigMaps and Secrets.
    pub(crate) client: &'a Client,
    /// The pod.
    pub(crate) pod: &'a Pod,
    /// The pod's addresses.
    pub(crate) pod_ips: &'a [IpAddr],
    /// The node's addresses.
    pub(crate) host_ips: &'a [IpAddr],
    /// Services for `enableServiceLinks`.
    pub(crate) services: &'a [std::sync::Arc<Service>],
}

/// The container's whole environment, in order, later names winning.
pub(crate) async fn resolve(container: &Container, sources: &Sources<'_>) -> Result<Vec<(String, String)>> {
    let mut env = vec![
        ("PATH".to_owned(), "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()),
        ("HOSTNAME".to_owned(), super::files::kernel_hostname(sources.pod)),
        ("HOME".to_owned(), "/root".to_owned()),
    ];
    env.extend(service_variables(sources));
    let namespace = sources.pod.namespace().unwrap_or_default();
    let maps: Api<ConfigMap> = Api::namespaced(sources.client.clone(), &namespace);
    let secrets: Api<Secret> = Api::namespaced(sources.client.clone(), &namespace);
    for from in container.env_from.iter().flatten() {
        let prefix = from.prefix.clone().unwrap_or_default();
        if let Some(reference) = &from.config_map_ref {
            let data = config_map(&maps, &reference.name, reference.optional == Some(true)).await?;
            env.extend(data.into_iter().map(|(k, v)| (format!("{prefix}{k}"), v)));
        }
        if let Some(reference) = &from.secret_ref {
            let data = secret(&secrets, &reference.name, reference.optional == Some(true)).await?;
            env.extend(data.into_iter().map(|(k, v)| (format!("{prefix}{k}"), v)));
        }
    }
    for variable in container.env.iter().flatten() {
        let value = match (&variable.value, &variable.value_from) {
            (_, Some(from)) => {
                let value = if let Some(field) = &from.field_ref {
                    Some(field_value(sources, &field.field_path)?)
                } else if let Some(resource) = &from.resource_field_ref {
                    let divisor = resource.divisor.as_ref().map_or("", |q| q.0.as_str());
                    Some(resource_value(container, &resource.resource, divisor)?)
                } else if let Some(key) = &from.config_map_key_ref {
                    let optional = key.optional == Some(true);
                    let data = config_map(&maps, &key.name, optional).await?;
                    pick(data, &key.key, "ConfigMap", &key.name, optional)?
                } else if let Some(key) = &from.secret_key_ref {
                    let optional = key.optional == Some(true);
                    let data = secret(&secrets, &key.name, optional).await?;
                    pick(data, &key.key, "Secret", &key.name, optional)?
                } else {
                    bail!("variable {} has a source that this lab does not know", variable.name)
                };
                let Some(value) = value else { continue };
                value
            }
            (Some(text), None) => expand(text, &env),
            (None, None) => String::new(),
        };
        env.retain(|(name, _)| *name != variable.name);
        env.push((variable.name.clone(), value));
    }
    let unique: BTreeMap<usize, (String, String)> = env
        .iter()
        .enumerate()
        .filter(|(index, (name, _))| !env.iter().skip(index + 1).any(|(later, _)| later == name))
        .map(|(index, pair)| (index, pair.clone()))
        .collect();
    Ok(unique.into_values().collect())
}

fn pick(data: BTreeMap<String, String>, key: &str, kind: &str, name: &str, optional: bool) -> Result<Option<String>> {
    match data.get(key) {
        Some(value) => Ok(Some(value.clone())),
        None if optional => Ok(None),
        None => bail!("couldn't find key {key} in {kind} {name}"),
    }
}

async fn config_map(api: &Api<ConfigMap>, name: &str, optional: bool) -> Result<BTreeMap<String, String>> {
    match api.get_opt(name).await.with_context(|| format!("read ConfigMap {name}"))? {
        Some(map) => Ok(map.data.unwrap_or_default()),
        None if optional => Ok(BTreeMap::new()),
        None => bail!("configmap {name:?} not found"),
    }
}

async fn secret(api: &Api<Secret>, name: &str, optional: bool) -> Result<BTreeMap<String, String>> {
    match api.get_opt(name).await.with_context(|| format!("read Secret {name}"))? {
        Some(secret) => Ok(secret
            .data
            .unwrap_or_default()
            .into_iter()
            .map(|(key, value)| (key, String::from_utf8_lossy(&value.0).into_owned()))
            .collect()),
        None if optional => Ok(BTreeMap::new()),
        None => bail!("secret {name:?} not found"),
    }
}

/// Replaces `$(NAME)` by variables that are defined before; `$$` is one dollar; unknown names stay.
pub(crate) fn expand(text: &str, env: &[(String, String)]) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        let (before, from) = rest.split_at(at);
        out.push_str(before);
        if let Some(after) = from.strip_prefix("$$") {
            out.push('$');
            rest = after;
        } else if let Some((name, after)) = from.strip_prefix("$(").and_then(|inner| inner.split_once(')')) {
            match env.iter().rev().find(|(known, _)| known == name) {
                Some((_, value)) => out.push_str(value),
                None => out.push_str(&format!("$({name})")),
            }
            rest = after;
        } else {
            out.push('$');
            rest = from.get(1..).unwrap_or_default();
        }
    }
    out.push_str(rest);
    out
}

fn join(addresses: &[IpAddr]) -> String {
    addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(",")
}

/// A downward API field (`metadata.labels['app']`, `status.podIP` …).
pub(crate) fn field_value(sources: &Sources<'_>, path: &str) -> Result<String> {
    field_of(sources.pod, sources.pod_ips, sources.host_ips, path)
}

/// As [`field_value`], also whole `metadata.labels` and `metadata.annotations` for volumes.
pub(crate) fn field_of(pod: &Pod, pod_ips: &[IpAddr], host_ips: &[IpAddr], path: &str) -> Result<String> {
    let meta = &pod.metadata;
    let spec = pod.spec.as_ref();
    let map = |path: &str, name: &str, map: &Option<BTreeMap<String, String>>| -> Option<String> {
        let key = path.strip_prefix(name)?.strip_prefix("['")?.strip_suffix("']")?;
        Some(map.as_ref().and_then(|m| m.get(key)).cloned().unwrap_or_default())
    };
    let listing = |map: &Option<BTreeMap<String, String>>| {
        map.iter().flatten().map(|(k, v)| format!("{k}={v:?}")).collect::<Vec<_>>().join("\n")
    };
    Ok(match path {
        "metadata.name" => meta.name.clone().unwrap_or_default(),
        "metadata.namespace" => meta.namespace.clone().unwrap_or_default(),
        "metadata.uid" => meta.uid.clone().unwrap_or_default(),
        "metadata.labels" => listing(&meta.labels),
        "metadata.annotations" => listing(&meta.annotations),
        "spec.nodeName" => spec.and_then(|s| s.node_name.clone()).unwrap_or_default(),
        "spec.serviceAccountName" => spec.and_then(|s| s.service_account_name.clone()).unwrap_or_default(),
        "status.podIP" => pod_ips.first().map(IpAddr::to_string).unwrap_or_default(),
        "status.podIPs" => join(pod_ips),
        "status.hostIP" => host_ips.first().map(IpAddr::to_string).unwrap_or_default(),
        "status.hostIPs" => join(host_ips),
        other => map(other, "metadata.labels", &meta.labels)
            .or_else(|| map(other, "metadata.annotations", &meta.annotations))
            .with_context(|| format!("unsupported fieldPath: {other}"))?,
    })
}

fn quantity(text: &str) -> Result<Quantity> {
    Quantity::parse(text).with_context(|| format!("{text:?} is no quantity, as in 500m or 64Mi"))
}

/// A resource field (`limits.cpu` …) divided by `divisor` and rounded up; a limit that is not set is a whole machine's.
pub(crate) fn resource_value(container: &Container, resource: &str, divisor: &str) -> Result<String> {
    let (which, name) = resource.split_once('.').with_context(|| format!("unsupported resource {resource:?}"))?;
    let set = container.resources.as_ref().and_then(|r| {
        let list = if which == "limits" { &r.limits } else { &r.requests };
        list.as_ref()?.get(name).map(|q| q.0.clone())
    });
    let value = match (set, which, name) {
        (Some(text), _, _) => quantity(&text)?,
        (None, "limits", "cpu") => {
            Quantity::whole(std::thread::available_parallelism().map_or(1, NonZero::get).try_into()?)
        }
        (None, "limits", "memory") => Quantity::whole(super::node::memory_bytes()),
        _ => Quantity::whole(0),
    };
    let divisor = if divisor.is_empty() || divisor == "0" { Quantity::whole(1) } else { quantity(divisor)? };
    let often = value.divided_up(divisor).with_context(|| format!("resource {resource:?} divided by zero"))?;
    Ok(often.to_string())
}

/// `NAME_SERVICE_HOST` and its like for the Services of the pod's namespace and for `default/kubernetes`.
fn service_variables(sources: &Sources<'_>) -> Vec<(String, String)> {
    let namespace = sources.pod.namespace().unwrap_or_default();
    let links = sources.pod.spec.as_ref().and_then(|s| s.enable_service_links).unwrap_or(true);
    let mut env = Vec::new();
    for service in sources.services {
        let is_master = service.namespace().as_deref() == Some("default") && service.name_any() == "kubernetes";
        let linked = links && service.namespace().as_deref() == Some(namespace.as_str());
        if linked || is_master {
            env.extend(variables_of(service));
        }
    }
    env
}

fn variables_of(service: &Service) -> Vec<(String, String)> {
    let Some(spec) = &service.spec else { return Vec::new() };
    let host = spec.cluster_ip.clone().unwrap_or_default();
    let ports = spec.ports.clone().unwrap_or_default();
    if host.parse::<IpAddr>().is_err() || ports.is_empty() {
        return Vec::new();
    }
    let name = service.name_any().to_ascii_uppercase().replace('-', "_");
    let shown = if host.contains(':') { format!("[{host}]") } else { host.clone() };
    let mut env = vec![(format!("{name}_SERVICE_HOST"), host.clone())];
    for (index, port) in ports.iter().enumerate() {
        let number = port.port.to_string();
        let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
        let url = format!("{}://{shown}:{number}", protocol.to_ascii_lowercase());
        if index == 0 {
            env.push((format!("{name}_SERVICE_PORT"), number.clone()));
            env.push((format!("{name}_PORT"), url.clone()));
        }
        if let Some(port_name) = &port.name {
            let upper = port_name.to_ascii_uppercase().replace('-', "_");
            env.push((format!("{name}_SERVICE_PORT_{upper}"), number.clone()));
        }
        let prefix = format!("{name}_PORT_{number}_{protocol}");
        env.push((prefix.clone(), url));
        env.push((format!("{prefix}_PROTO"), protocol.to_ascii_lowercase()));
        env.push((format!("{prefix}_PORT"), number.clone()));
        env.push((format!("{prefix}_ADDR"), host.clone()));
    }
    env
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expansion_follows_kubernetes() {
        let env = [("A".to_owned(), "1".to_owned())];
        assert_eq!(expand("$(A)-$(B)-$$(A)-$A-$", &env), "1-$(B)-$(A)-$A-$");
    }

    #[test]
    fn service_variables_have_the_docker_link_names() {
        let service: Service = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "my-svc", "namespace": "default"},
            "spec": {"clusterIP": "10.96.1.2", "ports": [{"name": "http", "port": 80, "protocol": "TCP"}]}
        }))
        .unwrap();
        let env = variables_of(&service);
        for (name, value) in [
            ("MY_SVC_SERVICE_HOST", "10.96.1.2"),
            ("MY_SVC_SERVICE_PORT", "80"),
            ("MY_SVC_SERVICE_PORT_HTTP", "80"),
            ("MY_SVC_PORT", "tcp://10.96.1.2:80"),
            ("MY_SVC_PORT_80_TCP_ADDR", "10.96.1.2"),
        ] {
            assert!(env.contains(&(name.to_owned(), value.to_owned())), "{name} is missing in {env:?}");
        }
    }

    #[test]
    fn resource_fields_are_divided_and_rounded_up() {
        let container: Container = serde_json::from_value(
            serde_json::json!({"name": "c", "resources": {"limits": {"cpu": "1500m", "memory": "64Mi"}}}),
        )
        .unwrap();
        assert_eq!(resource_value(&container, "limits.cpu", "").unwrap(), "2");
        assert_eq!(resource_value(&container, "limits.memory", "1Mi").unwrap(), "64");
        assert_eq!(resource_value(&container, "requests.cpu", "1m").unwrap(), "0");
        assert_eq!(resource_value(&container, "limits.memory", "1e6").unwrap(), "68", "67.1");
        assert!(resource_value(&container, "limits.memory", "1 Mi").is_err());
    }
}
