//! `delete` and `deletecollection`: grace periods, finalizers, propagation, preconditions.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::create::refusal;
use super::read::{Selection, collection, parsed};
use super::{Call, Reply, success};
use crate::request::decode_body;
use crate::resource::ResourceKind;
use crate::status::ApiError;
use crate::store::{Expect, Key, WriteRefused, Written};
use crate::{admission, crd, meta};

const FOREGROUND: &str = "foregroundDeletion";
const ORPHAN: &str = "orphan";
const ATTEMPTS: usize = 20;

/// `DeleteOptions`, from body and query.
#[derive(Clone, Debug, Default)]
struct DeleteOptions {
    grace: Option<i64>,
    propagation: Option<Propagation>,
    uid: Option<String>,
    version: Option<String>,
    dry_run: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Propagation {
    Foreground,
    Background,
    Orphan,
}

impl DeleteOptions {
    fn parse(call: &Call, body: &[u8]) -> Result<Self, ApiError> {
        let mut options = if body.iter().all(u8::is_ascii_whitespace) {
            Self::default()
        } else {
            Self::from_body(&decode_body(&call.headers, body)?)?
        };
        if let Some(grace) = call.query.number("gracePeriodSeconds")? {
            options.grace = Some(grace);
        }
        if call.query.has("propagationPolicy") {
            options.propagation = Some(propagation(call.query.get("propagationPolicy"))?);
        }
        if call.query.has("orphanDependents") && options.propagation.is_none() {
            options.propagation = Some(orphan_flag(call.query.flag("orphanDependents")));
        }
        options.dry_run |= call.dry_run;
        Ok(options)
    }

    fn from_body(body: &Value) -> Result<Self, ApiError> {
        let text = |pointer: &str| Some(meta::text(body, pointer).to_owned()).filter(|text| !text.is_empty());
        let given = match meta::text(body, "/propagationPolicy") {
            "" => body.get("orphanDependents").and_then(Value::as_bool).map(orphan_flag),
            policy => Some(propagation(policy)?),
        };
        Ok(Self {
            grace: body.get("gracePeriodSeconds").and_then(Value::as_i64),
            propagation: given,
            uid: text("/preconditions/uid"),
            version: text("/preconditions/resourceVersion"),
            dry_run: !meta::strings(body.get("dryRun")).is_empty(),
        })
    }
}

fn orphan_flag(orphan: bool) -> Propagation {
    if orphan { Propagation::Orphan } else { Propagation::Background }
}

fn propagation(text: &str) -> Result<Propagation, ApiError> {
    match text {
        "Foreground" => Ok(Propagation::Foreground),
        "Background" => Ok(Propagation::Background),
        "Orphan" => Ok(Propagation::Orphan),
        other => Err(ApiError::new(
            422,
            "Invalid",
            format!(
                "DeleteOptions.meta.k8s.io \"\" is invalid: propagationPolicy: Unsupported value: {other:?}: supported values: \"Foreground\", \"Background\", \"Orphan\""
            ),
        )),
    }
}

fn is_pod(kind: &ResourceKind) -> bool {
    kind.gvk.group.is_empty() && kind.plural == "pods"
}

fn is_namespace(kind: &ResourceKind) -> bool {
    kind.gvk.group.is_empty() && kind.plural == "namespaces"
}

/// Whether an object whose deletion has begun has nothing left to wait for.
pub(crate) fn is_finished(kind: &ResourceKind, object: &Value) -> bool {
    let grace = object.pointer("/metadata/deletionGracePeriodSeconds").and_then(Value::as_i64).unwrap_or(0);
    let namespace_held = is_namespace(kind)
        && object.pointer("/spec/finalizers").and_then(Value::as_array).is_some_and(|list| !list.is_empty());
    meta::is_deleting(object) && grace == 0 && meta::finalizers(object).is_empty() && !namespace_held
}

/// What follows the removal of an object: addresses go back, custom resources disappear.
pub(crate) fn after_removal(call: &Call, object: &Value) {
    call.core.services.release(&call.core, &call.kind, object);
    crd::removed(&call.core, &call.kind, object);
}

/// The result of one deletion.
enum Outcome {
    Removed(Written),
    Marked(Written),
    Unchanged(Value),
}

pub(crate) async fn delete(call: &Arc<Call>, body: &[u8]) -> Result<Reply, ApiError> {
    let options = DeleteOptions::parse(call, body)?;
    let name = call.target.name.as_str();
    let outcome = delete_one(call, &call.target.namespace, name, &options)?;
    let (version, object, removed) = match outcome {
        Outcome::Removed(written) => (written.version, written.object, true),
        Outcome::Marked(written) => (written.version, written.object, false),
        Outcome::Unchanged(object) => (0, object, false),
    };
    call.core.store.wait_durable(version).await.map_err(ApiError::internal)?;
    let returns_object = call.kind.gvk.group.is_empty()
        && matches!(
            call.kind.plural.as_ref(),
            "pods"
                | "services"
                | "serviceaccounts"
                | "persistentvolumes"
                | "persistentvolumeclaims"
                | "podtemplates"
                | "resourcequotas"
        );
    if removed && !returns_object {
        return Ok(Reply::Value(200, success(&call.kind, &object)));
    }
    Ok(Reply::Object(200, object))
}

pub(crate) async fn delete_collection(call: &Arc<Call>, body: &[u8]) -> Result<Reply, ApiError> {
    let options = DeleteOptions::parse(call, body)?;
    let selection = Selection::of(call)?;
    let (objects, _) = call.core.store.list(&call.kind.storage_key, collection(call));
    let mut items = Vec::new();
    let mut last = 0;
    for stored in objects.iter().filter(|stored| selection.matches(&call.kind, stored)) {
        let result = delete_one(call, &stored.key.namespace, &stored.key.name, &options);
        match result {
            Ok(Outcome::Removed(written) | Outcome::Marked(written)) => {
                last = last.max(written.version);
                items.push(written.object);
            }
            Ok(Outcome::Unchanged(object)) => items.push(object),
            Err(error) if error.code == 404 => {}
            Err(error) => return Err(error),
        }
    }
    call.core.store.wait_durable(last).await.map_err(ApiError::internal)?;
    let list = json!({"kind": format!("{}List", call.kind.gvk.kind), "apiVersion": call.api_version(),
        "metadata": {"resourceVersion": call.core.store.version().to_string()}, "items": items});
    Ok(Reply::Value(200, list))
}

fn delete_one(call: &Call, namespace: &str, name: &str, options: &DeleteOptions) -> Result<Outcome, ApiError> {
    admission::admit_delete(call, name)?;
    let key = Key::new(namespace, name);
    for _ in 0..ATTEMPTS {
        let stored =
            call.core.store.get(&call.kind.storage_key, &key).ok_or_else(|| ApiError::not_found(&call.kind, name))?;
        let old = parsed(&call.kind, &stored)?;
        check_preconditions(call, name, &old, options)?;
        let new = marked(&call.kind, &old, options);
        if options.dry_run {
            return Ok(Outcome::Unchanged(new));
        }
        let written = if is_finished(&call.kind, &new) {
            let last = call.core.store.remove(&call.kind.storage_key, &key, new, stored.version);
            last.map(|written| {
                after_removal(call, &written.object);
                Outcome::Removed(written)
            })
        } else if new == old {
            return Ok(Outcome::Unchanged(old));
        } else {
            let expect = Expect::Version(stored.version);
            call.core.store.put(&call.kind.storage_key, &key, new, expect).map(Outcome::Marked)
        };
        match written {
            Err(WriteRefused::Changed) => {}
            other => return other.map_err(|refused| refusal(call, name, refused)),
        }
    }
    Err(ApiError::modified(&call.kind, name))
}

fn check_preconditions(call: &Call, name: &str, old: &Value, options: &DeleteOptions) -> Result<(), ApiError> {
    for (what, given, have) in [
        ("UID", &options.uid, meta::meta(old, "uid")),
        ("ResourceVersion", &options.version, meta::meta(old, "resourceVersion")),
    ] {
        if let Some(given) = given
            && given != have
        {
            let why = format!(
                "the {what} in the precondition ({given}) does not match the {what} in record ({have}). The object might have been deleted and then recreated"
            );
            return Err(ApiError::conflict(&call.kind, name, &why));
        }
    }
    Ok(())
}

/// The object with its deletion begun (or as it is, when it began before and nothing changes).
fn marked(kind: &ResourceKind, old: &Value, options: &DeleteOptions) -> Value {
    let mut object = old.clone();
    let finalizers = with_propagation(meta::finalizers(old), options.propagation, meta::is_deleting(old));
    meta::set_finalizers(&mut object, finalizers);
    let grace = grace_period(kind, old, options.grace);
    let running = old.pointer("/metadata/deletionGracePeriodSeconds").and_then(Value::as_i64);
    if meta::is_deleting(old) {
        // A second delete may only shorten the time that is left.
        if running.is_some_and(|running| grace < running) {
            set_deletion(&mut object, grace);
        }
        return object;
    }
    set_deletion(&mut object, grace);
    if let Some(generation) = old.pointer("/metadata/generation").and_then(Value::as_i64) {
        meta::set_meta(&mut object, "generation", generation.saturating_add(1).into());
    }
    if is_namespace(kind) {
        let mut status = object.get("status").cloned().unwrap_or(Value::Object(Map::new()));
        meta::as_map(&mut status).insert("phase".to_owned(), "Terminating".into());
        meta::as_map(&mut object).insert("status".to_owned(), status);
    }
    object
}

fn set_deletion(object: &mut Value, grace: i64) {
    meta::set_meta(object, "deletionTimestamp", meta::now_plus(grace).into());
    meta::set_meta(object, "deletionGracePeriodSeconds", grace.into());
}

fn with_propagation(mut finalizers: Vec<String>, policy: Option<Propagation>, deleting: bool) -> Vec<String> {
    let Some(policy) = policy else { return finalizers };
    if deleting && policy == Propagation::Background {
        return finalizers;
    }
    finalizers.retain(|have| have != FOREGROUND && have != ORPHAN);
    match policy {
        Propagation::Foreground => finalizers.push(FOREGROUND.to_owned()),
        Propagation::Orphan => finalizers.push(ORPHAN.to_owned()),
        Propagation::Background => {}
    }
    finalizers
}

/// Seconds a deletion waits for the kubelet: only pods that run somewhere have any.
fn grace_period(kind: &ResourceKind, object: &Value, asked: Option<i64>) -> i64 {
    if !is_pod(kind) {
        return 0;
    }
    let own = object.pointer("/spec/terminationGracePeriodSeconds").and_then(Value::as_i64);
    let grace = asked.or(own).unwrap_or(30);
    // A negative time means one second, as for kube-apiserver.
    let grace = if grace < 0 { 1 } else { grace };
    let ended = matches!(meta::text(object, "/status/phase"), "Succeeded" | "Failed");
    if meta::text(object, "/spec/nodeName").is_empty() || ended { 0 } else { grace }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_running_pods_get_a_grace_period_and_it_can_only_shrink() {
        let builtin = crate::kinds::builtin();
        let pods = builtin.iter().find(|kind| is_pod(kind)).expect("pods are built in");
        let pod = json!({"metadata": {"name": "x"}, "spec": {"nodeName": "n1", "terminationGracePeriodSeconds": 30}});
        let first = marked(pods, &pod, &DeleteOptions::default());
        assert_eq!(first["metadata"]["deletionGracePeriodSeconds"], 30);
        assert!(!is_finished(pods, &first));
        let longer = marked(pods, &first, &DeleteOptions { grace: Some(60), ..DeleteOptions::default() });
        assert_eq!(longer, first);
        let now = marked(pods, &first, &DeleteOptions { grace: Some(0), ..DeleteOptions::default() });
        assert!(is_finished(pods, &now));
        let unscheduled = json!({"metadata": {"name": "x"}, "spec": {}});
        assert!(is_finished(pods, &marked(pods, &unscheduled, &DeleteOptions::default())));
    }

    #[test]
    fn foreground_deletion_waits_for_the_collector() {
        let finalizers = with_propagation(vec!["a".into()], Some(Propagation::Foreground), false);
        assert_eq!(finalizers, ["a", FOREGROUND]);
        assert_eq!(with_propagation(finalizers, Some(Propagation::Background), false), ["a"]);
    }
}
