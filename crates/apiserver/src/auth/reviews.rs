//! The reviews of `authentication.k8s.io` and `authorization.k8s.io`: created, answered, never stored.

use serde_json::{Map, Value, json};

use super::policy::allows;
use super::{Attributes, UserInfo};
use crate::meta;
use crate::rest::Call;
use crate::status::ApiError;

/// Answers a review; none when this kind is not one.
pub(crate) fn review(call: &Call, mut object: Value) -> Result<Option<Value>, ApiError> {
    let status = match call.kind.gvk.kind.as_ref() {
        "SelfSubjectReview" => json!({"userInfo": user_value(&call.user)}),
        "TokenReview" => token_review(call, &object),
        "SelfSubjectAccessReview" => access(call, &call.user, &object),
        "SubjectAccessReview" | "LocalSubjectAccessReview" => {
            let user = UserInfo {
                name: meta::text(&object, "/spec/user").to_owned(),
                uid: meta::text(&object, "/spec/uid").to_owned(),
                groups: meta::strings(object.pointer("/spec/groups")),
                extra: std::collections::BTreeMap::new(),
            };
            access(call, &user, &object)
        }
        "SelfSubjectRulesReview" => {
            let (resources, paths) =
                call.core.rbac.rules(&call.core, &call.user, meta::text(&object, "/spec/namespace"));
            json!({"resourceRules": resources, "nonResourceRules": paths, "incomplete": false})
        }
        _ => return Ok(None),
    };
    meta::set_meta(&mut object, "creationTimestamp", Value::Null);
    meta::as_map(&mut object).insert("status".to_owned(), status);
    Ok(Some(object))
}

fn user_value(user: &UserInfo) -> Value {
    let mut map = Map::new();
    map.insert("username".to_owned(), user.name.as_str().into());
    if !user.uid.is_empty() {
        map.insert("uid".to_owned(), user.uid.as_str().into());
    }
    map.insert("groups".to_owned(), user.groups.clone().into());
    if !user.extra.is_empty() {
        map.insert("extra".to_owned(), json!(user.extra));
    }
    Value::Object(map)
}

fn token_review(call: &Call, object: &Value) -> Value {
    let token = meta::text(object, "/spec/token");
    match call.core.authenticator.token(&call.core, token) {
        Some(user) => json!({"authenticated": true, "user": user_value(&user.authenticated()),
            "audiences": [super::token::ISSUER]}),
        None => json!({"authenticated": false, "error": "the token is not known, not valid or has expired"}),
    }
}

fn access(call: &Call, user: &UserInfo, object: &Value) -> Value {
    let spec = |field: &str| meta::text(object, &format!("/spec/{field}")).to_owned();
    let resource = object.pointer("/spec/resourceAttributes").is_some();
    let at = |field: &str| spec(&format!("resourceAttributes/{field}"));
    let (group, version, plural) = (at("group"), at("version"), at("resource"));
    let (subresource, namespace, name) = (at("subresource"), at("namespace"), at("name"));
    let verb = if resource { at("verb") } else { spec("nonResourceAttributes/verb") };
    let path = spec("nonResourceAttributes/path");
    let attributes = Attributes {
        user,
        verb: &verb,
        group: &group,
        version: &version,
        resource: &plural,
        subresource: &subresource,
        namespace: &namespace,
        name: &name,
        path: &path,
    };
    json!({"allowed": allows(&call.core, &attributes)})
}
