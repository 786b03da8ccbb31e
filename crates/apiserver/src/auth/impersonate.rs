//! `Impersonate-User`, `Impersonate-Group` and `Impersonate-Uid`: acting as somebody else, for those who may.

use http::HeaderMap;

use super::{Attributes, UserInfo, authorize};
use crate::server::Core;
use crate::status::ApiError;

const ACCOUNT: &str = "system:serviceaccount:";

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok()).filter(|text| !text.is_empty())
}

/// The user a request acts as: its sender, or the one it names when the sender may `impersonate` that one.
pub(crate) fn impersonated(core: &Core, sender: UserInfo, headers: &HeaderMap) -> Result<UserInfo, ApiError> {
    let Some(name) = header(headers, "impersonate-user") else { return Ok(sender) };
    let groups: Vec<&str> =
        headers.get_all("impersonate-group").iter().filter_map(|value| value.to_str().ok()).collect();
    let account = name.strip_prefix(ACCOUNT).and_then(|rest| rest.split_once(':'));
    match account {
        Some((namespace, account)) => check(core, &sender, "serviceaccounts", namespace, account)?,
        None => check(core, &sender, "users", "", name)?,
    }
    for group in &groups {
        check(core, &sender, "groups", "", group)?;
    }
    let mut user = UserInfo::new(name, &groups);
    if let Some(uid) = header(headers, "impersonate-uid") {
        check(core, &sender, "uids", "", uid)?;
        uid.clone_into(&mut user.uid);
    }
    if let (Some((namespace, _)), true) = (account, groups.is_empty()) {
        user.groups = vec!["system:serviceaccounts".to_owned(), format!("system:serviceaccounts:{namespace}")];
    }
    Ok(user.authenticated())
}

fn check(core: &Core, sender: &UserInfo, resource: &str, namespace: &str, name: &str) -> Result<(), ApiError> {
    let group = if resource == "uids" { "authentication.k8s.io" } else { "" };
    let attributes = Attributes {
        user: sender,
        verb: "impersonate",
        group,
        version: "v1",
        resource,
        subresource: "",
        namespace,
        name,
        path: "",
    };
    authorize(core, &attributes)
}
