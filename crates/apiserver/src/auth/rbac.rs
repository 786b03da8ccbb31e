//! RBAC: Role, ClusterRole and their bindings, evaluated as the RBAC authorizer does.
//!
//! The objects are compiled once and again when one of the four tables changed.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;

use super::{Attributes, UserInfo};
use crate::meta;
use crate::server::Core;

const GROUP: &str = "rbac.authorization.k8s.io";

#[derive(Debug, Default, PartialEq, Eq)]
struct Rule {
    verbs: Vec<String>,
    groups: Vec<String>,
    resources: Vec<String>,
    names: Vec<String>,
    paths: Vec<String>,
}

#[derive(Debug)]
struct Binding {
    /// Empty for cluster role bindings.
    namespace: String,
    subjects: Vec<Subject>,
    rules: Arc<Vec<Rule>>,
}

#[derive(Debug)]
enum Subject {
    User(String),
    Group(String),
    ServiceAccount(String, String),
}

/// The compiled bindings of one state of the tables.
#[derive(Default)]
struct Compiled {
    versions: [u64; 4],
    bindings: Vec<Binding>,
}

/// Compiled RBAC objects.
#[derive(Default)]
pub(crate) struct RbacCache(Mutex<Option<Arc<Compiled>>>);

impl RbacCache {
    /// Whether a rule of a binding that applies to the user allows this.
    pub(crate) fn allows(&self, core: &Core, attributes: &Attributes<'_>) -> bool {
        self.applying(core, attributes.user, attributes.namespace).iter().any(|rule| rule.covers(attributes))
    }

    /// The rules a user has in a namespace, as `SelfSubjectRulesReview` lists them.
    pub(crate) fn rules(&self, core: &Core, user: &UserInfo, namespace: &str) -> (Vec<Value>, Vec<Value>) {
        let (mut resources, mut paths) = (Vec::new(), Vec::new());
        let applying = self.applying(core, user, namespace);
        for rule in applying.iter() {
            if !rule.resources.is_empty() {
                resources.push(serde_json::json!({"verbs": rule.verbs, "apiGroups": rule.groups,
                    "resources": rule.resources, "resourceNames": rule.names}));
            }
            if !rule.paths.is_empty() {
                paths.push(serde_json::json!({"verbs": rule.verbs, "nonResourceURLs": rule.paths}));
            }
        }
        (resources, paths)
    }

    fn applying(&self, core: &Core, user: &UserInfo, namespace: &str) -> Rules {
        let compiled = self.compiled(core);
        let indices = compiled
            .bindings
            .iter()
            .enumerate()
            .filter(|(_, binding)| binding.namespace.is_empty() || binding.namespace == namespace)
            .filter(|(_, binding)| binding.subjects.iter().any(|subject| subject.is(user)))
            .map(|(index, _)| index)
            .collect();
        Rules { compiled, indices }
    }

    fn compiled(&self, core: &Core) -> Arc<Compiled> {
        let tables = ["clusterroles", "roles", "clusterrolebindings", "rolebindings"]
            .map(|plural| core.storage_key(GROUP, plural));
        let versions = [0, 1, 2, 3].map(|at| tables.get(at).map_or(0, |table| core.store.table_version(table)));
        let mut cached = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(compiled) = cached.as_ref()
            && compiled.versions == versions
        {
            return Arc::clone(compiled);
        }
        let [cluster_roles, roles, cluster_bindings, bindings] = tables;
        let load = |table: &str| -> Vec<Value> {
            core.store.list(table, None).0.iter().filter_map(|stored| stored.value().ok()).collect()
        };
        let all_cluster_roles = load(&cluster_roles);
        let mut rules: HashMap<(String, String), Arc<Vec<Rule>>> = HashMap::new();
        for role in &all_cluster_roles {
            let compiled = aggregated_rules(role, &all_cluster_roles);
            rules.insert((String::new(), meta::name(role).to_owned()), Arc::new(compiled));
        }
        for role in load(&roles) {
            let key = (meta::namespace(&role).to_owned(), meta::name(&role).to_owned());
            rules.insert(key, Arc::new(parse_rules(&role)));
        }
        let all = load(&cluster_bindings).into_iter().chain(load(&bindings));
        let bindings = all.filter_map(|binding| compile_binding(&binding, &rules)).collect();
        let compiled = Arc::new(Compiled { versions, bindings });
        *cached = Some(Arc::clone(&compiled));
        compiled
    }
}

struct Rules {
    compiled: Arc<Compiled>,
    indices: Vec<usize>,
}

impl Rules {
    fn iter(&self) -> impl Iterator<Item = &Rule> {
        self.indices.iter().filter_map(|index| self.compiled.bindings.get(*index)).flat_map(|b| b.rules.iter())
    }
}

fn compile_binding(binding: &Value, rules: &HashMap<(String, String), Arc<Vec<Rule>>>) -> Option<Binding> {
    let namespace = meta::namespace(binding).to_owned();
    let role_namespace = match meta::text(binding, "/roleRef/kind") {
        "Role" => namespace.clone(),
        _ => String::new(),
    };
    let rules = rules.get(&(role_namespace, meta::text(binding, "/roleRef/name").to_owned()))?;
    let subjects = binding.get("subjects").and_then(Value::as_array).into_iter().flatten();
    let subjects = subjects
        .filter_map(|subject| {
            let name = meta::text(subject, "/name").to_owned();
            match meta::text(subject, "/kind") {
                "User" => Some(Subject::User(name)),
                "Group" => Some(Subject::Group(name)),
                "ServiceAccount" => {
                    let own = meta::text(subject, "/namespace");
                    let own = if own.is_empty() { namespace.as_str() } else { own };
                    Some(Subject::ServiceAccount(own.to_owned(), name))
                }
                _ => None,
            }
        })
        .collect();
    Some(Binding { namespace, subjects, rules: Arc::clone(rules) })
}

/// The rules of a cluster role, with those of the roles its `aggregationRule` selects.
fn aggregated_rules(role: &Value, all: &[Value]) -> Vec<Rule> {
    let selectors = role.pointer("/aggregationRule/clusterRoleSelectors").and_then(Value::as_array);
    let Some(selectors) = selectors else { return parse_rules(role) };
    let selected = |candidate: &&Value| {
        selectors.iter().any(|selector| {
            let wanted = selector.get("matchLabels").and_then(Value::as_object);
            wanted.is_some_and(|wanted| {
                !wanted.is_empty()
                    && wanted.iter().all(|(key, value)| {
                        candidate.pointer("/metadata/labels").and_then(|labels| labels.get(key)) == Some(value)
                    })
            })
        })
    };
    all.iter()
        .filter(|candidate| meta::name(candidate) != meta::name(role))
        .filter(selected)
        .flat_map(parse_rules)
        .collect()
}

fn parse_rules(role: &Value) -> Vec<Rule> {
    let rules = role.get("rules").and_then(Value::as_array).into_iter().flatten();
    rules
        .map(|rule| Rule {
            verbs: meta::strings(rule.get("verbs")),
            groups: meta::strings(rule.get("apiGroups")),
            resources: meta::strings(rule.get("resources")),
            names: meta::strings(rule.get("resourceNames")),
            paths: meta::strings(rule.get("nonResourceURLs")),
        })
        .collect()
}

impl Subject {
    fn is(&self, user: &UserInfo) -> bool {
        match self {
            Self::User(name) => *name == user.name,
            Self::Group(group) => user.groups.contains(group),
            Self::ServiceAccount(namespace, name) => {
                user.name.strip_prefix("system:serviceaccount:").and_then(|rest| rest.split_once(':'))
                    == Some((namespace.as_str(), name.as_str()))
            }
        }
    }
}

fn has(list: &[String], wanted: &str) -> bool {
    list.iter().any(|have| have == "*" || have == wanted)
}

impl Rule {
    fn covers(&self, attributes: &Attributes<'_>) -> bool {
        if !has(&self.verbs, attributes.verb) {
            return false;
        }
        if attributes.resource.is_empty() {
            return self.paths.iter().any(|path| match path.strip_suffix('*') {
                Some(prefix) => attributes.path.starts_with(prefix),
                None => path == attributes.path,
            });
        }
        let resource = if attributes.subresource.is_empty() {
            has(&self.resources, attributes.resource)
        } else {
            let whole = format!("{}/{}", attributes.resource, attributes.subresource);
            let any = format!("*/{}", attributes.subresource);
            has(&self.resources, &whole) || self.resources.contains(&any)
        };
        resource
            && has(&self.groups, attributes.group)
            && (self.names.is_empty() || self.names.iter().any(|name| name == attributes.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(verbs: &[&str], groups: &[&str], resources: &[&str], names: &[&str]) -> Rule {
        let list = |items: &[&str]| items.iter().map(|item| (*item).to_owned()).collect();
        Rule {
            verbs: list(verbs),
            groups: list(groups),
            resources: list(resources),
            names: list(names),
            paths: Vec::new(),
        }
    }

    #[test]
    fn rules_cover_what_they_name_and_nothing_else() {
        let user = UserInfo::new("u", &[]);
        let asked = |verb, group, resource, subresource, name| Attributes {
            user: &user,
            verb,
            group,
            version: "v1",
            resource,
            subresource,
            namespace: "a",
            name,
            path: "",
        };
        let get_pods = rule(&["get"], &[""], &["pods"], &[]);
        assert!(get_pods.covers(&asked("get", "", "pods", "", "x")));
        assert!(!get_pods.covers(&asked("list", "", "pods", "", "")));
        assert!(!get_pods.covers(&asked("get", "", "pods", "log", "x")));
        assert!(!get_pods.covers(&asked("get", "apps", "pods", "", "x")));
        assert!(rule(&["*"], &["*"], &["*"], &[]).covers(&asked("get", "", "pods", "log", "x")));
        assert!(rule(&["get"], &[""], &["pods/log"], &[]).covers(&asked("get", "", "pods", "log", "x")));
        assert!(rule(&["get"], &[""], &["*/log"], &[]).covers(&asked("get", "", "pods", "log", "x")));
        let named = rule(&["update"], &[""], &["configmaps"], &["one"]);
        assert!(named.covers(&asked("update", "", "configmaps", "", "one")));
        assert!(!named.covers(&asked("update", "", "configmaps", "", "two")));
        assert!(!named.covers(&asked("update", "", "configmaps", "", "")));
    }
}
