//! Subresources: status, scale, finalize, binding, eviction, token, and the streaming ones.

use std::sync::Arc;

use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Bytes, Frame};
use hyper::upgrade::OnUpgrade;
use serde_json::{Map, Value, json};
use tokio_util::io::ReaderStream;

use super::patching::{Patch, patch};
use super::update::{Changed, Tracking, UpdateOptions, replace, update_object};
use super::{Call, Reply, delete, read};
use crate::request::decode_body;
use crate::resource::{FieldError, ScalePaths};
use crate::status::ApiError;
use crate::streaming::{self, CommandOptions, LogOptions};
use crate::{auth, meta};

pub(crate) async fn dispatch(
    call: &Arc<Call>,
    verb: &str,
    body: &[u8],
    upgrade: Option<OnUpgrade>,
) -> Result<Reply, ApiError> {
    let kind = &call.kind;
    let subresource = call.target.subresource.as_str();
    let core = kind.gvk.group.is_empty();
    match (subresource, verb) {
        ("status", "get") if kind.status => read::get(call),
        ("status", "update") if kind.status => replace(call, body, "status").await,
        ("status", "patch") if kind.status => patch(call, body, "status").await,
        ("approval", "get") if kind.plural == "certificatesigningrequests" => read::get(call),
        ("approval", "update") if kind.plural == "certificatesigningrequests" => replace(call, body, "status").await,
        ("approval", "patch") if kind.plural == "certificatesigningrequests" => patch(call, body, "status").await,
        ("scale", "get" | "update" | "patch") => match &kind.scale {
            Some(paths) => scale(call, paths, verb, body).await,
            None => Err(ApiError::no_such_resource()),
        },
        ("finalize", "update") if core && kind.plural == "namespaces" => finalize(call, body).await,
        ("binding", "create") if core && kind.plural == "pods" => {
            let binding = decode_body(&call.headers, body)?;
            bind(call, &binding, &call.target.name).await
        }
        ("eviction", "create") if core && kind.plural == "pods" => evict(call, body).await,
        ("token", "create") if core && kind.plural == "serviceaccounts" => {
            let account = read::parsed(kind, read::stored(call)?.as_ref())?;
            let token = auth::request_token(call, &account, decode_body(&call.headers, body)?)?;
            Ok(Reply::Value(201, token))
        }
        ("ephemeralcontainers", "get") if core && kind.plural == "pods" => read::get(call),
        ("ephemeralcontainers", "update" | "patch") if core && kind.plural == "pods" => {
            ephemeral_containers(call, verb, body).await
        }
        ("log", "get") if core && kind.plural == "pods" => log(call).await,
        ("exec" | "attach", "get" | "create") if core && kind.plural == "pods" => command(call, upgrade),
        ("portforward", "get" | "create") if core && kind.plural == "pods" => {
            let pod = Arc::new(read::parsed(kind, read::stored(call)?.as_ref())?);
            streaming::port_forward(call, pod, handler(call)?, upgrade).map(Reply::Response)
        }
        ("status", _) if kind.status => Err(ApiError::method_not_allowed(kind, verb)),
        _ => Err(ApiError::no_such_resource()),
    }
}

/// Sets the value at a JSON pointer, making the maps on the way.
fn set_pointer(object: &mut Value, pointer: &str, value: Value) {
    let mut at = object;
    let mut names = pointer.split('/').skip(1).peekable();
    while let Some(name) = names.next() {
        let map = meta::as_map(at);
        if names.peek().is_none() {
            map.insert(name.to_owned(), value);
            return;
        }
        at = map.entry(name).or_insert_with(|| Value::Object(Map::new()));
    }
}

/// The `autoscaling/v1` `Scale` of an object.
fn scale_of(object: &Value, paths: &ScalePaths) -> Value {
    let number = |pointer: &str| object.pointer(pointer).and_then(Value::as_i64).unwrap_or(0);
    let mut metadata = Map::new();
    for field in ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"] {
        let value = meta::meta(object, field);
        if !value.is_empty() {
            metadata.insert(field.to_owned(), value.into());
        }
    }
    let mut status = Map::new();
    status.insert("replicas".to_owned(), number(&paths.status_replicas).into());
    let selector = paths.selector.as_ref().and_then(|pointer| object.pointer(pointer)).map(selector_text);
    if let Some(selector) = selector.filter(|text| !text.is_empty()) {
        status.insert("selector".to_owned(), selector.into());
    }
    json!({"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": metadata,
        "spec": {"replicas": number(&paths.spec_replicas)}, "status": status})
}

/// A selector (text, map or LabelSelector) in its query-string form.
fn selector_text(selector: &Value) -> String {
    if let Some(text) = selector.as_str() {
        return text.to_owned();
    }
    let Some(map) = selector.as_object() else { return String::new() };
    let is_label_selector = map.contains_key("matchLabels") || map.contains_key("matchExpressions");
    let labels = if is_label_selector { map.get("matchLabels").and_then(Value::as_object) } else { Some(map) };
    let mut terms: Vec<String> = labels
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
        .collect();
    terms.sort();
    for expression in map.get("matchExpressions").and_then(Value::as_array).into_iter().flatten() {
        let key = meta::text(expression, "/key");
        let values = meta::strings(expression.get("values")).join(",");
        terms.push(match meta::text(expression, "/operator") {
            "In" => format!("{key} in ({values})"),
            "NotIn" => format!("{key} notin ({values})"),
            "Exists" => key.to_owned(),
            _ => format!("!{key}"),
        });
    }
    terms.join(",")
}

async fn scale(call: &Arc<Call>, paths: &ScalePaths, verb: &str, body: &[u8]) -> Result<Reply, ApiError> {
    if verb == "get" {
        let object = read::parsed(&call.kind, read::stored(call)?.as_ref())?;
        return Ok(Reply::Value(200, scale_of(&object, paths)));
    }
    let patch = if verb == "patch" { Some(Patch::parse(call, body)?) } else { None };
    let given = if patch.is_none() { decode_body(&call.headers, body)? } else { Value::Null };
    let tracking = Tracking::Update { manager: call.manager(), subresource: "scale".to_owned() };
    let options = UpdateOptions { subresource: "", tracking };
    let change = |old: &Value| {
        let current = scale_of(old, paths);
        let wanted = match &patch {
            // A scale has no lists: applying or merging strategically is a merge.
            Some(Patch::Strategic(patch) | Patch::Apply(patch)) => {
                Patch::Merge(patch.clone()).patched(call, &current)?
            }
            Some(patch) => patch.patched(call, &current)?,
            None => given.clone(),
        };
        let replicas = wanted.pointer("/spec/replicas").and_then(Value::as_i64).unwrap_or(0);
        if replicas < 0 {
            let error = FieldError {
                reason: "FieldValueInvalid",
                field: "spec.replicas".to_owned(),
                message: format!("Invalid value: {replicas}: must be greater than or equal to 0"),
            };
            return Err(ApiError::invalid("autoscaling", "Scale", &call.target.name, &[error]));
        }
        let mut object = old.clone();
        set_pointer(&mut object, &paths.spec_replicas, replicas.into());
        meta::copy_meta(&mut object, &wanted, "resourceVersion");
        Ok(Changed { object, check_fields: false })
    };
    let object = update_object(call, &call.target.name, &options, change).await?;
    Ok(Reply::Value(200, scale_of(&object, paths)))
}

/// `namespaces/NAME/finalize`: only `spec.finalizers` changes; the last one gone, the namespace goes.
async fn finalize(call: &Arc<Call>, body: &[u8]) -> Result<Reply, ApiError> {
    let given = decode_body(&call.headers, body)?;
    let finalizers = given.pointer("/spec/finalizers").cloned().unwrap_or(Value::Null);
    let tracking = Tracking::Update { manager: call.manager(), subresource: "finalize".to_owned() };
    let options = UpdateOptions { subresource: "finalize", tracking };
    let change = |old: &Value| {
        let mut object = old.clone();
        let spec = meta::object_at(&mut object, "spec");
        match finalizers.as_array().is_none_or(Vec::is_empty) {
            true => spec.shift_remove("finalizers"),
            false => spec.insert("finalizers".to_owned(), finalizers.clone()),
        };
        meta::copy_meta(&mut object, &given, "resourceVersion");
        Ok(Changed { object, check_fields: false })
    };
    Ok(Reply::Object(200, update_object(call, &call.target.name, &options, change).await?))
}

/// Assigns a pod to a node.
pub(crate) async fn bind(call: &Arc<Call>, binding: &Value, pod: &str) -> Result<Reply, ApiError> {
    let node = meta::text(binding, "/target/name");
    if node.is_empty() {
        let error = FieldError {
            reason: "FieldValueRequired",
            field: "target.name".to_owned(),
            message: "Required value".to_owned(),
        };
        return Err(ApiError::invalid("", "Binding", pod, &[error]));
    }
    let pods = call.core.registry.served().any_version("", "pods").ok_or_else(ApiError::no_such_resource)?;
    let mut inner = Call::internal(&call.core, pods, &call.target.namespace);
    inner.dry_run = call.dry_run;
    let options = UpdateOptions {
        subresource: "binding",
        tracking: Tracking::Update { manager: call.manager(), subresource: "binding".to_owned() },
    };
    let change = |old: &Value| {
        let conflict = |why: String| {
            let mut error = ApiError::conflict(&inner.kind, pod, &why);
            error.message = error.message.replacen("on pods ", "on pods/binding ", 1);
            Err(error)
        };
        let uid = meta::meta(binding, "uid");
        if !uid.is_empty() && uid != meta::meta(old, "uid") {
            return conflict(format!(
                "Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
                meta::meta(old, "uid")
            ));
        }
        if meta::is_deleting(old) {
            return conflict(format!("pod {pod} is being deleted, cannot be assigned to a host"));
        }
        let assigned = meta::text(old, "/spec/nodeName");
        if !assigned.is_empty() {
            return conflict(format!("pod {pod} is already assigned to node {assigned:?}"));
        }
        Ok(Changed { object: bound(old, node), check_fields: false })
    };
    update_object(&inner, pod, &options, change).await?;
    Ok(Reply::Value(
        201,
        json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}),
    ))
}

fn bound(old: &Value, node: &str) -> Value {
    let mut pod = old.clone();
    meta::object_at(&mut pod, "spec").insert("nodeName".to_owned(), node.into());
    let status = meta::object_at(&mut pod, "status");
    let conditions = status.entry("conditions").or_insert_with(|| json!([]));
    if let Value::Array(conditions) = conditions {
        conditions.retain(|condition| meta::text(condition, "/type") != "PodScheduled");
        conditions.push(json!({"type": "PodScheduled", "status": "True", "lastProbeTime": null,
            "lastTransitionTime": meta::now()}));
    }
    pod
}

/// Deletes a pod unless a disruption budget forbids it.
async fn evict(call: &Arc<Call>, body: &[u8]) -> Result<Reply, ApiError> {
    let eviction = decode_body(&call.headers, body)?;
    let pod = read::parsed(&call.kind, read::stored(call)?.as_ref())?;
    let ended = matches!(meta::text(&pod, "/status/phase"), "Succeeded" | "Failed" | "Pending");
    if !ended && !meta::is_deleting(&pod) && !call.dry_run {
        spend_budget(call, &pod).await?;
    }
    let options = eviction.get("deleteOptions").map(Value::to_string).unwrap_or_default();
    delete::delete(call, options.as_bytes()).await?;
    Ok(Reply::Value(
        201,
        json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}),
    ))
}

async fn spend_budget(call: &Arc<Call>, pod: &Value) -> Result<(), ApiError> {
    let served = call.core.registry.served();
    let Some(kind) = served.any_version("policy", "poddisruptionbudgets") else { return Ok(()) };
    let namespace = &call.target.namespace;
    let pod_labels = read::stored(call)?;
    let (budgets, _) = call.core.store.list(&kind.storage_key, Some(namespace));
    for stored in budgets {
        let budget = read::parsed(&kind, &stored)?;
        let selector = budget.pointer("/spec/selector").map(selector_text).unwrap_or_default();
        if selector.is_empty() || !crate::selector::LabelSelector::parse(&selector)?.matches(&pod_labels.labels) {
            continue;
        }
        let allowed = budget.pointer("/status/disruptionsAllowed").and_then(Value::as_i64).unwrap_or(0);
        if allowed <= 0 {
            let mut error = ApiError::new(
                429,
                "TooManyRequests",
                "Cannot evict pod as it would violate the pod's disruption budget.",
            );
            let name = meta::name(&budget);
            error.set_details(json!({"causes": [{"reason": "DisruptionBudget", "message": format!(
                "The disruption budget {name} does not allow evicting pods currently: disruptionsAllowed is {allowed}"
            )}]}));
            error.retry_after = Some(10);
            return Err(error);
        }
        let inner = Call::internal(&call.core, Arc::clone(&kind), namespace);
        let options = UpdateOptions { subresource: "status", tracking: Tracking::Untracked };
        let change = |old: &Value| {
            let mut object = old.clone();
            let left = old.pointer("/status/disruptionsAllowed").and_then(Value::as_i64).unwrap_or(0) - 1;
            set_pointer(&mut object, "/status/disruptionsAllowed", left.max(0).into());
            let disrupted = format!("/status/disruptedPods/{}", meta::name(pod));
            set_pointer(&mut object, &disrupted, meta::now().into());
            Ok(Changed { object, check_fields: false })
        };
        update_object(&inner, meta::name(&budget), &options, change).await?;
    }
    Ok(())
}

/// `pods/NAME/ephemeralcontainers`: only that list may change, and only grow.
async fn ephemeral_containers(call: &Arc<Call>, verb: &str, body: &[u8]) -> Result<Reply, ApiError> {
    let patch = if verb == "patch" { Some(Patch::parse(call, body)?) } else { None };
    let given = if patch.is_none() { decode_body(&call.headers, body)? } else { Value::Null };
    let tracking = Tracking::Update { manager: call.manager(), subresource: "ephemeralcontainers".to_owned() };
    let options = UpdateOptions { subresource: "ephemeralcontainers", tracking };
    let change = |old: &Value| {
        let wanted = match &patch {
            Some(patch) => patch.patched(call, old)?,
            None => given.clone(),
        };
        let list = |pod: &Value| pod.pointer("/spec/ephemeralContainers").and_then(Value::as_array).cloned();
        let (new, had) = (list(&wanted).unwrap_or_default(), list(old).unwrap_or_default());
        let kept = |was: &Value| new.iter().any(|is| meta::text(is, "/name") == meta::text(was, "/name"));
        if !had.iter().all(kept) {
            let error = FieldError {
                reason: "FieldValueForbidden",
                field: "spec.ephemeralContainers".to_owned(),
                message: "Forbidden: existing ephemeral containers may not be removed".to_owned(),
            };
            return Err(ApiError::invalid_object(&call.kind, &call.target.name, &[error]));
        }
        let mut object = old.clone();
        set_pointer(&mut object, "/spec/ephemeralContainers", new.into());
        call.kind.strategy.default_object(&mut object);
        meta::copy_meta(&mut object, &wanted, "resourceVersion");
        Ok(Changed { object, check_fields: true })
    };
    Ok(Reply::Object(200, update_object(call, &call.target.name, &options, change).await?))
}

fn handler(call: &Call) -> Result<Arc<dyn streaming::StreamHandler>, ApiError> {
    call.core.streams().ok_or_else(|| {
        let message = "nothing runs containers here yet: no stream handler is registered with this API server";
        ApiError::new(503, "ServiceUnavailable", message)
    })
}

/// The container meant by a request: the one named, or the only one.
fn container(call: &Call, pod: &Value) -> Result<String, ApiError> {
    let names = |list: &str| -> Vec<String> {
        let items = pod.pointer(&format!("/spec/{list}")).and_then(Value::as_array).into_iter().flatten();
        items.map(|item| meta::text(item, "/name").to_owned()).collect()
    };
    let (main, init, ephemeral) = (names("containers"), names("initContainers"), names("ephemeralContainers"));
    let pod_name = &call.target.name;
    let wanted = call.query.get("container");
    if wanted.is_empty() {
        return match main.as_slice() {
            [one] => Ok(one.clone()),
            many => {
                let mut message = format!(
                    "a container name must be specified for pod {pod_name}, choose one of: [{}]",
                    many.join(" ")
                );
                for (what, list) in [("init", &init), ("ephemeral", &ephemeral)] {
                    if !list.is_empty() {
                        message.push_str(&format!(" or one of the {what} containers: [{}]", list.join(" ")));
                    }
                }
                Err(ApiError::bad_request(message))
            }
        };
    }
    if main.iter().chain(&init).chain(&ephemeral).any(|name| name == wanted) {
        return Ok(wanted.to_owned());
    }
    Err(ApiError::bad_request(format!("container {wanted} is not valid for pod {pod_name}")))
}

async fn log(call: &Arc<Call>) -> Result<Reply, ApiError> {
    let pod = read::parsed(&call.kind, read::stored(call)?.as_ref())?;
    let query = &call.query;
    let text = |key: &str| Some(query.get(key).to_owned()).filter(|text| !text.is_empty());
    let options = LogOptions {
        container: container(call, &pod)?,
        follow: query.flag("follow"),
        previous: query.flag("previous"),
        timestamps: query.flag("timestamps"),
        tail_lines: query.number("tailLines")?,
        since_seconds: query.number("sinceSeconds")?,
        since_time: text("sinceTime"),
        limit_bytes: query.number("limitBytes")?,
        stream: text("stream").filter(|stream| stream != "All"),
    };
    if meta::text(&pod, "/spec/nodeName").is_empty() {
        return Ok(Reply::Response(super::whole(200, "text/plain", Bytes::new())));
    }
    let reader = handler(call)?.logs(Arc::new(pod), options).await?;
    let closing = call.core.closing.clone();
    let stream = futures::StreamExt::take_until(ReaderStream::new(reader), async move { closing.cancelled().await });
    let frames = futures::StreamExt::map(stream, |chunk| chunk.map(Frame::data));
    let mut response = super::whole(200, "text/plain", Bytes::new());
    *response.body_mut() = StreamBody::new(frames).boxed_unsync();
    Ok(Reply::Response(response))
}

fn command(call: &Arc<Call>, upgrade: Option<OnUpgrade>) -> Result<Reply, ApiError> {
    let pod = read::parsed(&call.kind, read::stored(call)?.as_ref())?;
    let query = &call.query;
    let tty = query.flag("tty");
    let attach = call.target.subresource == "attach";
    let options = CommandOptions {
        container: container(call, &pod)?,
        command: query.all("command"),
        stdin: query.flag("stdin"),
        stdout: query.flag("stdout"),
        stderr: query.flag("stderr") && !tty,
        tty,
    };
    if !attach && options.command.is_empty() {
        return Err(ApiError::bad_request("you must specify at least one command for the container"));
    }
    if !(options.stdin || options.stdout || options.stderr) {
        return Err(ApiError::bad_request("you must specify at least one of stdin, stdout, stderr"));
    }
    if meta::text(&pod, "/spec/nodeName").is_empty() {
        return Err(ApiError::bad_request(format!("pod {} does not have a host assigned", call.target.name)));
    }
    streaming::remote_command(call, Arc::new(pod), options, attach, handler(call)?, upgrade).map(Reply::Response)
}
