//! Built-in admission: what kube-apiserver's default plugins do that matters here.
//!
//! NamespaceLifecycle, ServiceAccount, DefaultTolerationSeconds, Priority, and the namespace's own name label.

use serde_json::{Map, Value, json};

use crate::meta;
use crate::resource::ResourceKind;
use crate::rest::Call;
use crate::server::Core;
use crate::status::ApiError;
use crate::store::Key;

/// Namespaces that cannot be deleted.
const LASTING_NAMESPACES: [&str; 3] = ["default", "kube-system", "kube-public"];
const TOKEN_MOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

fn is(kind: &ResourceKind, group: &str, plural: &str) -> bool {
    kind.gvk.group == group && kind.plural == plural
}

fn find(core: &Core, group: &str, plural: &str, namespace: &str, name: &str) -> Option<Value> {
    let table = core.storage_key(group, plural);
    core.store.get(&table, &Key::new(namespace, name))?.value().ok()
}

/// Before defaults and validation of a new object.
pub(crate) fn admit_create(call: &Call, object: &mut Value) -> Result<(), ApiError> {
    let kind = &call.kind;
    if kind.namespaced {
        namespace_exists(call, object)?;
    }
    if is(kind, "", "namespaces") {
        label_namespace(object);
    }
    if is(kind, "", "pods") {
        service_account(call, object)?;
        tolerations(object);
        priority(call, object)?;
    }
    Ok(())
}

/// Before defaults and validation of a changed object.
pub(crate) fn admit_update(call: &Call, object: &mut Value) {
    if is(&call.kind, "", "namespaces") {
        label_namespace(object);
    }
}

/// Before a deletion.
pub(crate) fn admit_delete(call: &Call, name: &str) -> Result<(), ApiError> {
    if is(&call.kind, "", "namespaces") && LASTING_NAMESPACES.contains(&name) {
        return Err(ApiError::forbidden(&call.kind, name, "this namespace may not be deleted"));
    }
    Ok(())
}

fn namespace_exists(call: &Call, object: &Value) -> Result<(), ApiError> {
    let namespace = &call.target.namespace;
    let served = call.core.registry.served();
    let Some(kind) = served.any_version("", "namespaces") else { return Ok(()) };
    let stored = call.core.store.get(&kind.storage_key, &Key::new("", namespace));
    let Some(found) = stored.and_then(|stored| stored.value().ok()) else {
        return Err(ApiError::not_found(&kind, namespace));
    };
    if meta::is_deleting(&found) || meta::text(&found, "/status/phase") == "Terminating" {
        let why = format!("unable to create new content in namespace {namespace} because it is being terminated");
        let mut error = ApiError::forbidden(&call.kind, meta::name(object), &why);
        if let Some(details) = error.details.as_mut() {
            let cause = json!([{"reason": "NamespaceTerminating",
                "message": format!("namespace {namespace} is being terminated"), "field": "metadata.namespace"}]);
            meta::as_map(details).insert("causes".to_owned(), cause);
        }
        return Err(error);
    }
    Ok(())
}

fn label_namespace(object: &mut Value) {
    let name = meta::name(object).to_owned();
    let metadata = meta::metadata(object);
    let labels = meta::as_map(metadata.entry("labels").or_insert_with(|| Value::Object(Map::new())));
    labels.insert("kubernetes.io/metadata.name".to_owned(), name.into());
}

/// The pod's account, by default `default`, and its token volume.
fn service_account(call: &Call, pod: &mut Value) -> Result<(), ApiError> {
    let mirror = pod.pointer("/metadata/annotations/kubernetes.io~1config.mirror").is_some();
    let spec = meta::object_at(pod, "spec");
    if mirror {
        return Ok(());
    }
    let given = ["serviceAccountName", "serviceAccount"]
        .iter()
        .find_map(|field| spec.get(*field).and_then(Value::as_str).filter(|name| !name.is_empty()));
    let name = given.unwrap_or("default").to_owned();
    spec.insert("serviceAccountName".to_owned(), name.as_str().into());
    spec.insert("serviceAccount".to_owned(), name.as_str().into());
    let namespace = call.target.namespace.as_str();
    let account = find(&call.core, "", "serviceaccounts", namespace, &name);
    if account.is_none() && name != "default" {
        let why = format!("error looking up service account {namespace}/{name}: serviceaccount {name:?} not found");
        return Err(ApiError::forbidden(&call.kind, meta::name(pod), &why));
    }
    let automount = |value: Option<&Value>| value.and_then(Value::as_bool);
    let wanted = automount(pod.pointer("/spec/automountServiceAccountToken"))
        .or_else(|| automount(account.as_ref().and_then(|a| a.get("automountServiceAccountToken"))))
        .unwrap_or(true);
    if wanted && call.core.config.mount_service_account_tokens {
        mount_token(meta::object_at(pod, "spec"));
    }
    Ok(())
}

fn mount_token(spec: &mut Map<String, Value>) {
    let volume = format!("kube-api-access-{}", meta::random_suffix(5));
    let mut used = false;
    for list in ["initContainers", "containers"] {
        for container in spec.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
            let mounts = container.as_object_mut().map(|map| map.entry("volumeMounts").or_insert_with(|| json!([])));
            let Some(Value::Array(mounts)) = mounts else { continue };
            if mounts.iter().any(|mount| meta::text(mount, "/mountPath") == TOKEN_MOUNT) {
                continue;
            }
            mounts.push(json!({"name": volume, "readOnly": true, "mountPath": TOKEN_MOUNT}));
            used = true;
        }
    }
    if !used {
        return;
    }
    let sources = json!([
        {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        {"downwardAPI": {"items": [{"path": "namespace",
            "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}]}},
    ]);
    if let Value::Array(volumes) = spec.entry("volumes").or_insert_with(|| json!([])) {
        volumes.push(json!({"name": volume, "projected": {"sources": sources, "defaultMode": 420}}));
    }
}

/// Pods stay 300 s on a node that is not ready or not reachable, unless they say otherwise.
fn tolerations(pod: &mut Value) {
    let spec = meta::object_at(pod, "spec");
    let Value::Array(list) = spec.entry("tolerations").or_insert_with(|| json!([])) else { return };
    for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
        let covered = list.iter().any(|toleration| {
            let own = meta::text(toleration, "/key");
            let effect = meta::text(toleration, "/effect");
            (own == key || own.is_empty()) && (effect == "NoExecute" || effect.is_empty())
        });
        if !covered {
            list.push(json!({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}));
        }
    }
}

fn priority(call: &Call, pod: &mut Value) -> Result<(), ApiError> {
    let class = meta::text(pod, "/spec/priorityClassName").to_owned();
    let (value, policy) = match class.as_str() {
        "" => (0, "PreemptLowerPriority".to_owned()),
        "system-cluster-critical" => (2_000_000_000, "PreemptLowerPriority".to_owned()),
        "system-node-critical" => (2_000_001_000, "PreemptLowerPriority".to_owned()),
        name => {
            let Some(found) = find(&call.core, "scheduling.k8s.io", "priorityclasses", "", name) else {
                let why = format!("no PriorityClass with name {name} was found");
                return Err(ApiError::forbidden(&call.kind, meta::name(pod), &why));
            };
            let policy = match meta::text(&found, "/preemptionPolicy") {
                "" => "PreemptLowerPriority",
                given => given,
            };
            (found.get("value").and_then(Value::as_i64).unwrap_or(0), policy.to_owned())
        }
    };
    let spec = meta::object_at(pod, "spec");
    spec.insert("priority".to_owned(), value.into());
    spec.entry("preemptionPolicy").or_insert_with(|| policy.into());
    Ok(())
}
