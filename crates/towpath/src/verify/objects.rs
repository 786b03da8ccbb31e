//! Objects of manifests as the world that policy looks at.
//!
//! A workload stands for its pods: two of them where it may have several, so that what they may do to each other is asked too.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::networking::v1 as networking;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use towpath_model::cluster_policy::object::ClusterNetworkPolicy as ClusterPolicyObject;
use towpath_model::{ClusterNetworkPolicy, Invalid, Namespace, NamespacedName, NetworkPolicy, Node, Pod, World};
use towpath_policy::verify::{Owners, Workload};

use super::load::{FileDocument, Position};
use super::yaml::Located;

const NAME_LABEL: &str = "kubernetes.io/metadata.name";

/// An object, or a field of it, that the API server would refuse.
#[derive(Clone, Debug)]
pub(super) struct Problem {
    pub(super) at: Option<Position>,
    pub(super) invalid: Invalid,
}

/// Everything that manifests (and a live cluster under them) say.
#[derive(Clone, Debug, Default)]
pub(super) struct Loaded {
    pub(super) world: World,
    pub(super) owners: Owners,
    /// By object as errors name it: `NetworkPolicy shop/db`.
    pub(super) places: BTreeMap<String, Place>,
    pub(super) problems: Vec<Problem>,
    /// Objects that came twice: the first place.
    pub(super) twice: Vec<(String, Position, Position)>,
    /// What is left out and could matter.
    pub(super) notes: BTreeSet<String>,
    /// Rules that are there and not in force: `policyTypes` does not name their direction.
    pub(super) idle: Vec<(String, &'static str, Position)>,
}

/// Where an object is, with the lines of its fields.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) at: Position,
    before: u64,
    root: Located,
}

impl Place {
    /// The position of a field.
    pub(super) fn field(&self, path: &str) -> Position {
        Position { line: (self.before + self.root.line_of(path)).max(1), ..self.at.clone() }
    }
}

impl Loaded {
    /// Where a field of an object was written.
    pub(super) fn position(&self, object: &str, field: &str) -> Option<Position> {
        self.places.get(object).map(|place| place.field(field))
    }

    /// Adds the objects of documents; what has a name that is taken already is replaced.
    pub(super) fn add(&mut self, documents: &[FileDocument], namespace: &str) {
        for document in documents {
            let place = Place { at: document.at.clone(), before: document.before, root: document.root.clone() };
            self.object(place, namespace, None);
        }
    }

    fn object(&mut self, place: Place, namespace: &str, of_list: Option<&str>) {
        let text = |key: &str| place.root.get(key).map(Located::value).and_then(|v| v.as_str().map(str::to_owned));
        let kind = text("kind").or_else(|| of_list.map(str::to_owned));
        let Some(kind) = kind else {
            let invalid = Invalid::new(
                format!("document {}", place.at.document),
                "kind",
                "missing: this is no Kubernetes object",
            );
            self.problems.push(Problem { at: Some(place.at.clone()), invalid });
            return;
        };
        if kind.ends_with("List") && place.root.get("items").is_some() {
            let items = place.root.get("items").and_then(Located::elements).unwrap_or_default().to_vec();
            let of = kind.strip_suffix("List").filter(|kind| !kind.is_empty());
            for item in items {
                let line = place.before + item.line().max(1);
                let at = Position { line, ..place.at.clone() };
                self.object(Place { at, before: place.before, root: item }, namespace, of);
            }
            return;
        }
        let version = text("apiVersion").unwrap_or_default();
        self.typed(&kind, &version, of_list.is_some(), place, namespace);
    }

    fn typed(&mut self, kind: &str, version: &str, of_list: bool, place: Place, namespace: &str) {
        let is = |wanted: &str| version == wanted || (of_list && version.is_empty());
        match kind {
            "NetworkPolicy" if is("networking.k8s.io/v1") => self.policy(place, namespace),
            "ClusterNetworkPolicy" if is("policy.networking.k8s.io/v1alpha2") => self.cluster_policy(place),
            "NetworkPolicy"
            | "ClusterNetworkPolicy"
            | "GlobalNetworkPolicy"
            | "AdminNetworkPolicy"
            | "BaselineAdminNetworkPolicy"
            | "CiliumNetworkPolicy"
            | "CiliumClusterwideNetworkPolicy" => {
                self.notes.insert(format!(
                    "{kind} of {version:?} at {} is not of a kind that Towpath enforces: it is left out",
                    place.at
                ));
            }
            "Namespace" => self.namespace(place),
            "Node" => self.plain::<core::Node, Node>(place, "Node", namespace, |loaded, node| {
                loaded.world.nodes.insert(node.name.clone(), node);
            }),
            "Pod" => self.pod(place, namespace),
            "Deployment" | "StatefulSet" | "DaemonSet" | "ReplicaSet" | "ReplicationController" => {
                self.workload(place, namespace, kind, &["spec", "template"], 2);
            }
            "Job" => self.workload(place, namespace, kind, &["spec", "template"], 2),
            "CronJob" => self.workload(place, namespace, kind, &["spec", "jobTemplate", "spec", "template"], 2),
            _ => {}
        }
    }

    /// Takes note of an object's place under the name that errors have for it.
    fn known(&mut self, object: &str, place: &Place) {
        if let Some(earlier) = self.places.insert(object.to_owned(), place.clone()) {
            self.twice.push((object.to_owned(), earlier.at, place.at.clone()));
        }
    }

    fn refuse(&mut self, place: &Place, object: &str, invalid: Invalid) {
        let field = &invalid.field;
        let at = place.field(field);
        self.problems.push(Problem { at: Some(at), invalid: Invalid { object: object.to_owned(), ..invalid } });
    }

    /// The object as its type; else it is a problem.
    fn read<K: DeserializeOwned>(&mut self, place: &Place, object: &str, value: Value) -> Option<K> {
        match serde_json::from_value(value) {
            Ok(read) => Some(read),
            Err(error) => {
                self.refuse(place, object, Invalid::new(object, "", format!("does not fit its type: {error}")));
                None
            }
        }
    }

    fn plain<K, N>(&mut self, place: Place, kind: &str, namespace: &str, insert: impl FnOnce(&mut Self, N))
    where
        K: DeserializeOwned,
        N: for<'a> TryFrom<&'a K, Error = Invalid>,
    {
        let (value, object) = named(place.root.value(), kind, Some(namespace).filter(|_| kind == "Pod"));
        self.known(&object, &place);
        let Some(read) = self.read::<K>(&place, &object, value) else { return };
        match N::try_from(&read) {
            Ok(noun) => insert(self, noun),
            Err(invalid) => self.refuse(&place, &object, invalid),
        }
    }

    fn namespace(&mut self, place: Place) {
        self.plain::<core::Namespace, Namespace>(place, "Namespace", "", |loaded, mut namespace| {
            // As the API server does.
            namespace.labels.insert(NAME_LABEL.to_owned(), namespace.name.clone());
            loaded.world.namespaces.insert(namespace.name.clone(), namespace);
        });
    }

    fn policy(&mut self, place: Place, namespace: &str) {
        let (value, object) = named(place.root.value(), "NetworkPolicy", Some(namespace));
        self.known(&object, &place);
        let said = value.clone();
        let Some(read) = self.read::<networking::NetworkPolicy>(&place, &object, value) else { return };
        let earlier = self.problems.len();
        match NetworkPolicy::fail_closed(&read) {
            Ok((policy, problems)) => {
                problems.into_iter().for_each(|invalid| self.refuse(&place, &object, invalid));
                let has = |empty: Option<bool>| empty == Some(false);
                let spec = read.spec.as_ref();
                if policy.ingress.is_none() && has(spec.and_then(|spec| spec.ingress.as_ref()).map(Vec::is_empty)) {
                    self.idle.push((object.clone(), "ingress", place.field("spec.ingress")));
                }
                if policy.egress.is_none() && has(spec.and_then(|spec| spec.egress.as_ref()).map(Vec::is_empty)) {
                    self.idle.push((object.clone(), "egress", place.field("spec.egress")));
                }
                self.world.policies.insert(policy.name.clone(), policy);
            }
            Err(invalid) => self.refuse(&place, &object, invalid),
        }
        self.unknown(&place, &object, &said, &read, earlier);
    }

    fn cluster_policy(&mut self, place: Place) {
        let (value, object) = named(place.root.value(), "ClusterNetworkPolicy", None);
        self.known(&object, &place);
        let said = value.clone();
        let Some(read) = self.read::<ClusterPolicyObject>(&place, &object, value) else { return };
        let earlier = self.problems.len();
        match ClusterNetworkPolicy::fail_closed(&read) {
            Ok((policy, problems)) => {
                problems.into_iter().for_each(|invalid| self.refuse(&place, &object, invalid));
                self.world.cluster_policies.insert(policy.name.clone(), policy);
            }
            Err(invalid) => self.refuse(&place, &object, invalid),
        }
        self.unknown(&place, &object, &said, &read, earlier);
    }

    /// Fields of a policy that its type does not have: whoever reads it passes them over, and a rule whose `from` is misspelt lets everybody in.
    /// What is below a rule that was refused since `earlier` is said there.
    fn unknown(&mut self, place: &Place, object: &str, said: &Value, read: &impl Serialize, earlier: usize) {
        let Ok(back) = serde_json::to_value(read) else { return };
        let mut fields = Vec::new();
        lost("", said, &back, &mut fields);
        let rule = |field: &str| field.split('.').take(2).collect::<Vec<_>>().join(".");
        let refused: BTreeSet<String> =
            self.problems.iter().skip(earlier).map(|problem| rule(&problem.invalid.field)).collect();
        // An object of a cluster has a status, which says nothing of what is wanted.
        let counts = |field: &String| !refused.contains(&rule(field)) && field.split('.').next() != Some("status");
        for field in fields.into_iter().filter(counts) {
            let reason = "no such field is known here: it would be passed over";
            self.refuse(place, object, Invalid::new(object, field, reason));
        }
    }

    fn pod(&mut self, place: Place, namespace: &str) {
        let meta = place.root.get("metadata").map(Located::value).unwrap_or_default();
        self.plain::<core::Pod, Pod>(place, "Pod", namespace, |loaded, pod| {
            if let Some(owner) = owner_of(&meta, &pod.name.namespace) {
                loaded.owners.insert(pod.name.clone(), owner);
            }
            loaded.world.pods.insert(pod.name.clone(), pod);
        });
    }

    fn workload(&mut self, place: Place, namespace: &str, kind: &str, template: &[&str], pods: usize) {
        let (value, object) = named(place.root.value(), kind, Some(namespace));
        self.known(&object, &place);
        let text = |pointer: &str| value.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
        let workload = Workload {
            namespace: text("/metadata/namespace"),
            name: text("/metadata/name"),
            kind: kind.to_ascii_lowercase(),
        };
        if workload.name.is_empty() {
            self.refuse(&place, &object, Invalid::new(&object, "metadata.name", "missing"));
            return;
        }
        let mut at = &value;
        for step in template {
            let Some(next) = at.get(step) else {
                self.refuse(&place, &object, Invalid::new(&object, template.join("."), "missing"));
                return;
            };
            at = next;
        }
        // A workload of files takes the place of the same one of a live cluster.
        let Loaded { world, owners, .. } = self;
        world.pods.retain(|name, _| owners.get(name) != Some(&workload));
        for index in 0..pods {
            let name = self.free_name(&workload, index);
            let mut meta = at.get("metadata").cloned().filter(Value::is_object).unwrap_or_else(|| json!({}));
            if let Some(meta) = meta.as_object_mut() {
                meta.insert("name".to_owned(), json!(name));
                meta.insert("namespace".to_owned(), json!(workload.namespace));
                set_labels(meta, kind, &name, index);
            }
            let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": at.get("spec")});
            let Some(read) = self.read::<core::Pod>(&place, &object, pod) else { return };
            match Pod::try_from(&read) {
                Ok(pod) => {
                    self.owners.insert(pod.name.clone(), workload.clone());
                    self.world.pods.insert(pod.name.clone(), pod);
                }
                Err(invalid) => {
                    self.refuse(&place, &object, invalid);
                    return;
                }
            }
        }
    }

    /// A pod's name that no other pod has: `web-0`.
    fn free_name(&self, workload: &Workload, index: usize) -> String {
        let plain = format!("{}-{index}", workload.name);
        let taken = |name: &str| self.world.pods.contains_key(&NamespacedName::new(&workload.namespace, name));
        if !taken(&plain) {
            return plain;
        }
        let kind = format!("{}-{}-{index}", workload.name, workload.kind);
        if taken(&kind) { format!("{kind}-{}", self.world.pods.len()) } else { kind }
    }
}

/// The labels that the controller gives to pods by their number.
fn set_labels(meta: &mut Map<String, Value>, kind: &str, name: &str, index: usize) {
    if kind != "StatefulSet" {
        return;
    }
    let labels = meta.entry("labels").or_insert_with(|| json!({}));
    if let Some(labels) = labels.as_object_mut() {
        labels.insert("statefulset.kubernetes.io/pod-name".to_owned(), json!(name));
        labels.insert("apps.kubernetes.io/pod-index".to_owned(), json!(index.to_string()));
    }
}

/// The fields of `said` that are not in `back`, by their paths. One that says nothing (null) is none.
fn lost(path: &str, said: &Value, back: &Value, out: &mut Vec<String>) {
    match (said, back) {
        (Value::Object(said), Value::Object(back)) => {
            for (key, value) in said.iter().filter(|(_, value)| !value.is_null()) {
                let field = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                match back.get(key) {
                    Some(there) => lost(&field, value, there, out),
                    None => out.push(field),
                }
            }
        }
        (Value::Array(said), Value::Array(back)) => {
            for (index, (value, there)) in said.iter().zip(back).enumerate() {
                lost(&format!("{path}[{index}]"), value, there, out);
            }
        }
        _ => {}
    }
}

/// The object with its namespace filled in, and how errors name it.
fn named(mut value: Value, kind: &str, namespace: Option<&str>) -> (Value, String) {
    if let Some(root) = value.as_object_mut() {
        let meta = root.entry("metadata").or_insert_with(|| json!({}));
        if let (Some(meta), Some(namespace)) = (meta.as_object_mut(), namespace) {
            let given = meta.get("namespace").and_then(Value::as_str).is_some_and(|name| !name.is_empty());
            if !given {
                meta.insert("namespace".to_owned(), json!(namespace));
            }
        }
    }
    let text = |pointer: &str| value.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    let name = text("/metadata/name");
    let object = match namespace {
        Some(_) => format!("{kind} {}/{name}", text("/metadata/namespace")),
        None => format!("{kind} {name}"),
    };
    (value, object)
}

/// The workload that controls a pod. A ReplicaSet with a template's hash is its Deployment.
pub(super) fn owner_of(meta: &Value, namespace: &str) -> Option<Workload> {
    let owners = meta.get("ownerReferences")?.as_array()?;
    let owner = owners.iter().find(|owner| owner.get("controller").and_then(Value::as_bool) == Some(true))?;
    let (kind, name) = (owner.get("kind")?.as_str()?, owner.get("name")?.as_str()?);
    if kind == "Node" {
        return None;
    }
    let hash = meta.pointer("/labels/pod-template-hash").and_then(Value::as_str);
    let deployment = hash.and_then(|hash| name.strip_suffix(hash)).and_then(|name| name.strip_suffix('-'));
    let (kind, name) = match deployment {
        Some(deployment) if kind == "ReplicaSet" => ("Deployment", deployment),
        _ => (kind, name),
    };
    Some(Workload { namespace: namespace.to_owned(), name: name.to_owned(), kind: kind.to_ascii_lowercase() })
}
