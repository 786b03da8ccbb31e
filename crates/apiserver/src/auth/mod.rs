//! Who asks (authentication) and whether they may (authorization).
//!
//! Users come from client certificates (common name → user, organisations → groups), from the embedder's static
//! bearer tokens, and from tokens that `serviceaccounts/NAME/token` issued. The node rules
//! and RBAC objects decide.

mod authenticate;
mod impersonate;
mod node;
mod policy;
mod rbac;
mod reviews;
mod subject;
mod token;

use std::collections::BTreeMap;

pub(crate) use authenticate::Authenticator;
pub(crate) use impersonate::impersonated;
pub(crate) use policy::authorize;
pub(crate) use rbac::RbacCache;
pub(crate) use reviews::review;
pub(crate) use subject::certificate_user;
pub(crate) use token::{TokenIssuer, request_token};

/// An authenticated user.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserInfo {
    /// For example `system:node:n1` or `system:serviceaccount:default:default`.
    pub name: String,
    /// Unique id, empty when there is none.
    pub uid: String,
    /// Groups; `system:authenticated` is added by the server.
    pub groups: Vec<String>,
    /// Further facts, for example `authentication.kubernetes.io/pod-name`.
    pub extra: BTreeMap<String, Vec<String>>,
}

impl UserInfo {
    /// A user with these groups.
    pub fn new(name: impl Into<String>, groups: &[&str]) -> Self {
        Self { name: name.into(), groups: groups.iter().map(|group| (*group).to_owned()).collect(), ..Self::default() }
    }

    /// `kubernetes-admin` in `system:masters`, who may do everything.
    pub fn admin() -> Self {
        Self::new("kubernetes-admin", &["system:masters"])
    }

    /// Nobody in particular.
    pub(crate) fn anonymous() -> Self {
        Self::new("system:anonymous", &["system:unauthenticated"])
    }

    /// The same user, in `system:authenticated` too.
    pub(crate) fn authenticated(mut self) -> Self {
        let group = "system:authenticated";
        if !self.groups.iter().any(|have| have == group) && self.name != "system:anonymous" {
            self.groups.push(group.to_owned());
        }
        self
    }
}

/// What somebody wants to do, as `SubjectAccessReview` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Attributes<'a> {
    /// Who.
    pub(crate) user: &'a UserInfo,
    /// `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`, `deletecollection`.
    pub(crate) verb: &'a str,
    /// API group, empty for core and for paths.
    pub(crate) group: &'a str,
    /// API version.
    pub(crate) version: &'a str,
    /// Plural resource; empty for a path outside the resources.
    pub(crate) resource: &'a str,
    /// Subresource, empty when none.
    pub(crate) subresource: &'a str,
    /// Namespace, empty when cluster-wide.
    pub(crate) namespace: &'a str,
    /// Object name, empty when not known.
    pub(crate) name: &'a str,
    /// URL path, used when `resource` is empty.
    pub(crate) path: &'a str,
}
