//! What `kubectl expose`, `run`, `create namespace` and `create service loadbalancer` make, as manifests: for machines without a kubectl.

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use crate::cluster::Cluster;

/// The object that a generating kubectl command makes; none: the command is no such one and is passed on as it is.
pub(crate) fn manifest(cluster: &Cluster, args: &[&str]) -> Result<Option<Value>> {
    let (before, command) = match args.iter().position(|a| *a == "--") {
        Some(at) => (args.get(..at).unwrap_or_default(), args.get(at + 1..).unwrap_or_default()),
        None => (args, &[][..]),
    };
    let option = |name: &str| before.iter().find_map(|a| a.strip_prefix(name)?.strip_prefix('='));
    let namespace =
        before.iter().position(|a| *a == "-n").and_then(|at| before.get(at + 1)).copied().unwrap_or("default");
    Ok(match before {
        ["create", "namespace", name] => {
            Some(json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}))
        }
        ["create", "service", "loadbalancer", name, ..] => {
            let (port, target) =
                option("--tcp").and_then(|ports| ports.split_once(':')).context("--tcp=PORT:TARGET")?;
            let number = |text: &str| text.parse::<u16>().context("--tcp");
            let port =
                json!({"name": format!("{port}-{target}"), "port": number(port)?, "targetPort": number(target)?});
            Some(json!({
                "apiVersion": "v1", "kind": "Service",
                "metadata": {"name": name, "namespace": namespace, "labels": {"app": name}},
                "spec": {"type": "LoadBalancer", "selector": {"app": name}, "ports": [port]},
            }))
        }
        ["expose", "pod", name, ..] => {
            let labels = cluster.get("pod", name)?.pointer("/metadata/labels").cloned().unwrap_or_default();
            let port: u16 = option("--port").unwrap_or("80").parse().context("--port")?;
            Some(json!({
                "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace},
                "spec": {"type": option("--type").unwrap_or("ClusterIP"), "selector": labels,
                         "ports": [{"port": port, "targetPort": port}]},
            }))
        }
        ["run", name, ..] => Some(pod(name, namespace, command, &option)?),
        _ => None,
    })
}

fn pod<'a>(name: &str, namespace: &str, command: &[&str], option: &dyn Fn(&str) -> Option<&'a str>) -> Result<Value> {
    let labels: Map<String, Value> = match option("--labels") {
        Some(list) => {
            list.split(',').filter_map(|l| l.split_once('=')).map(|(k, v)| (k.to_owned(), v.into())).collect()
        }
        None => Map::from_iter([("run".to_owned(), name.into())]),
    };
    let mut container = json!({"name": name, "image": option("--image").unwrap_or("busybox")});
    if !command.is_empty() {
        insert(&mut container, "args", json!(command));
    }
    if let Some(port) = option("--port") {
        insert(&mut container, "ports", json!([{"containerPort": port.parse::<u16>().context("--port")?}]));
    }
    let mut spec = json!({"containers": [container], "restartPolicy": option("--restart").unwrap_or("Always")});
    if let Some(overrides) = option("--overrides") {
        let overrides: Value = serde_json::from_str(overrides).context("--overrides")?;
        if let Some(node) = overrides.pointer("/spec/nodeName") {
            insert(&mut spec, "nodeName", node.clone());
        }
    }
    Ok(json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace, "labels": labels}, "spec": spec,
    }))
}

fn insert(object: &mut Value, key: &str, value: Value) {
    if let Some(fields) = object.as_object_mut() {
        fields.insert(key.to_owned(), value);
    }
}
