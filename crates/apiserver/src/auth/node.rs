//! What kubelets may do: the rules of `system:node`, with writes held to the node's own objects as the Node authorizer and
//! the NodeRestriction admission plugin do.

use super::Attributes;

/// Whether a member of `system:nodes` may do this. None: the rules have nothing to say.
pub(crate) fn allows(attributes: &Attributes<'_>) -> bool {
    let Some(node) = attributes.user.name.strip_prefix("system:node:") else { return false };
    if !attributes.user.groups.iter().any(|group| group == "system:nodes") {
        return false;
    }
    let (verb, subresource) = (attributes.verb, attributes.subresource);
    let reads = matches!(verb, "get" | "list" | "watch");
    let own = attributes.name == node;
    match (attributes.group, attributes.resource) {
        ("", "nodes") => match subresource {
            "" => reads || verb == "create" || own && matches!(verb, "update" | "patch" | "delete"),
            "status" => own && matches!(verb, "get" | "update" | "patch"),
            _ => false,
        },
        ("coordination.k8s.io", "leases") => {
            attributes.namespace == "kube-node-lease"
                && (verb == "create" || own && matches!(verb, "get" | "update" | "patch" | "delete"))
        }
        ("", "pods") => match subresource {
            "" => reads || matches!(verb, "create" | "delete"),
            "status" => matches!(verb, "get" | "update" | "patch"),
            "eviction" => verb == "create",
            _ => false,
        },
        ("", "events") | ("events.k8s.io", "events") => matches!(verb, "create" | "update" | "patch"),
        (
            "",
            "services"
            | "configmaps"
            | "secrets"
            | "persistentvolumes"
            | "persistentvolumeclaims"
            | "namespaces"
            | "endpoints",
        ) => reads && subresource.is_empty(),
        ("", "serviceaccounts") => reads && subresource.is_empty() || subresource == "token" && verb == "create",
        ("node.k8s.io", "runtimeclasses") | ("storage.k8s.io", "csidrivers" | "volumeattachments") => reads,
        ("storage.k8s.io", "csinodes") => reads || verb == "create" || own,
        ("certificates.k8s.io", "certificatesigningrequests") => {
            matches!(verb, "create" | "get" | "list" | "watch")
        }
        ("authentication.k8s.io", "tokenreviews")
        | ("authorization.k8s.io", "subjectaccessreviews" | "localsubjectaccessreviews") => verb == "create",
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::UserInfo;

    #[test]
    fn a_node_writes_its_own_node_and_lease_only() {
        let user = UserInfo::new("system:node:n1", &["system:nodes"]);
        let asked = |verb, group, resource, subresource, namespace, name| {
            allows(&Attributes {
                user: &user,
                verb,
                group,
                version: "v1",
                resource,
                subresource,
                namespace,
                name,
                path: "",
            })
        };
        assert!(asked("patch", "", "nodes", "status", "", "n1"));
        assert!(!asked("patch", "", "nodes", "status", "", "n2"));
        assert!(!asked("delete", "", "nodes", "", "", "n2"));
        assert!(asked("update", "coordination.k8s.io", "leases", "", "kube-node-lease", "n1"));
        assert!(!asked("update", "coordination.k8s.io", "leases", "", "kube-node-lease", "n2"));
        assert!(!asked("update", "coordination.k8s.io", "leases", "", "default", "n1"));
        assert!(!asked("create", "rbac.authorization.k8s.io", "clusterrolebindings", "", "", "x"));
    }
}
