//! Validation of pods and pod templates.

use serde_json::{Value, json};

use super::container::{self, Pod};
use super::{dual_stack, legacy_ip, scheduling, security, volume};
use crate::kinds::fault::{Faults, Path};
use crate::kinds::format;
use crate::kinds::metadata::{annotations, labels, same};
use crate::kinds::read::{Read, drop_field, put};

/// Checks a `Pod`.
pub(crate) fn pod(object: &Value, faults: &mut Faults) {
    let path = Path::new("spec");
    let spec = object.at("spec");
    pod_annotations(object.at("metadata"), spec, &Path::new("metadata").child("annotations"), faults);
    pod_spec(spec, object.at("metadata").text("name"), true, &path, faults);
    if spec.text("serviceAccountName").is_empty() {
        for (index, volume) in spec.list("volumes").iter().enumerate() {
            for (place, source) in volume.at("projected").list("sources").iter().enumerate() {
                if source.has("serviceAccountToken") {
                    let here = path.child("volumes").index(index).child("projected").child("sources").index(place);
                    faults.forbidden(
                        &here.child("serviceAccountToken"),
                        "must not be specified when serviceAccountName is not set",
                    );
                }
            }
        }
    }
    for list in ["containers", "initContainers"] {
        for (index, container) in spec.list(list).iter().enumerate() {
            container::image_spaces(container, &path.child(list).index(index), faults);
        }
    }
    if !object.at("metadata").has("resourceVersion") {
        if !spec.list("ephemeralContainers").is_empty() {
            faults.forbidden(&path.child("ephemeralContainers"), "cannot be set on create");
        }
        if !spec.text("nodeName").is_empty() && !spec.list("schedulingGates").is_empty() {
            faults.forbidden(&path.child("nodeName"), "cannot be set until all schedulingGates have been cleared");
        }
    }
}

/// Checks a `PodTemplate` (the kind).
pub(crate) fn pod_template(object: &Value, faults: &mut Faults) {
    template(object.at("template"), &Path::new("template"), faults);
}

fn pod_annotations(metadata: &Value, spec: &Value, path: &Path, faults: &mut Faults) {
    const MIRROR: &str = "kubernetes.io/config.mirror";
    const COST: &str = "controller.kubernetes.io/pod-deletion-cost";
    let known = metadata.at("annotations");
    if known.has(MIRROR) && spec.text("nodeName").is_empty() {
        faults.invalid(&path.key(MIRROR), known.text(MIRROR), "must set spec.nodeName if mirror pod annotation is set");
    }
    let cost = known.text(COST);
    let plain = !cost.starts_with('+') && (cost == "0" || !cost.trim_start_matches('-').starts_with('0'));
    if known.has(COST) && !(plain && cost.parse::<i32>().is_ok()) {
        faults.invalid(&path.key(COST), cost, "must be a 32bit integer");
    }
}

/// Checks a `PodTemplateSpec`.
pub(super) fn template(template: &Value, path: &Path, faults: &mut Faults) {
    let metadata = template.at("metadata");
    labels(metadata.at("labels"), &path.child("labels"), faults);
    annotations(metadata, &path.child("annotations"), faults);
    pod_annotations(metadata, template.at("spec"), &path.child("annotations"), faults);
    pod_spec(template.at("spec"), "", false, &path.child("spec"), faults);
    if !template.at("spec").list("ephemeralContainers").is_empty() {
        faults.forbidden(
            &path.child("spec").child("ephemeralContainers"),
            "ephemeral containers not allowed in pod template",
        );
    }
}

fn one_of(spec: &Value, field: &str, values: &[&str], path: &Path, faults: &mut Faults) {
    let value = spec.text(field);
    if value.is_empty() {
        faults.required(&path.child(field), "");
    } else if !values.contains(&value) {
        faults.unsupported(&path.child(field), value, values);
    }
}

fn pod_spec(spec: &Value, name: &str, is_pod: bool, path: &Path, faults: &mut Faults) {
    let grace = spec.int("terminationGracePeriodSeconds");
    if grace.is_none() {
        faults.required(&path.child("terminationGracePeriodSeconds"), "");
    }
    let volumes = volume::volumes(spec, name, &path.child("volumes"), faults);
    let pod = Pod { spec, volumes, grace };
    container::containers(&pod, &path.child("containers"), faults);
    container::init_containers(&pod, &path.child("initContainers"), faults);
    container::ephemeral_containers(&pod, &path.child("ephemeralContainers"), faults);
    if spec.has("resources") {
        container::resources(spec.at("resources"), &path.child("resources"), faults);
    }
    host_network_ports(spec, is_pod, path, faults);
    one_of(spec, "restartPolicy", &["Always", "OnFailure", "Never"], path, faults);
    one_of(spec, "dnsPolicy", &["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"], path, faults);
    labels(spec.at("nodeSelector"), &path.child("nodeSelector"), faults);
    security::pod(spec, path, &path.child("securityContext"), faults);
    scheduling::affinity(spec.at("affinity"), &path.child("affinity"), faults);
    dns_config(spec, &path.child("dnsConfig"), faults);
    gates(spec, path, faults);
    scheduling::topology_spread(
        spec.list("topologySpreadConstraints"),
        &path.child("topologySpreadConstraints"),
        faults,
    );
    names(spec, path, faults);
    if let Some(seconds) =
        spec.int("activeDeadlineSeconds").filter(|seconds| !(1..=i64::from(i32::MAX)).contains(seconds))
    {
        faults.invalid(&path.child("activeDeadlineSeconds"), seconds, &format::range_message(1, i64::from(i32::MAX)));
    }
    scheduling::tolerations(spec.list("tolerations"), &path.child("tolerations"), faults);
    for (index, alias) in spec.list("hostAliases").iter().enumerate() {
        let here = path.child("hostAliases").index(index);
        legacy_ip(alias.text("ip"), &[], &here.child("ip"), faults);
        for (place, hostname) in alias.texts("hostnames").iter().enumerate() {
            faults.invalid_each(&here.child("hostnames").index(place), hostname, format::dns_subdomain(hostname));
        }
    }
    if spec.has("preemptionPolicy") {
        one_of(spec, "preemptionPolicy", &["PreemptLowerPriority", "Never"], path, faults);
    }
    for (name, value) in spec.entries("overhead") {
        container::resource_value(name, value, &path.child("overhead").child("limits").key(name), faults);
    }
    if spec.has("os") {
        one_of(spec.at("os"), "name", &["linux", "windows"], &path.child("os"), faults);
    }
}

fn names(spec: &Value, path: &Path, faults: &mut Faults) {
    if spec.has("hostnameOverride") {
        let here = path.child("hostnameOverride");
        let name = spec.text("hostnameOverride");
        if spec.flag("setHostnameAsFQDN") {
            faults.forbidden(&here, "may not be specified when setHostnameAsFQDN is true");
        }
        if spec.flag("hostNetwork") {
            faults.forbidden(&here, "may not be specified when hostNetwork is true");
        }
        if name.len() > 64 {
            faults.too_long(&here, 64);
        }
        faults.invalid_each(&here, name, format::dns_subdomain(name));
    }
    for field in ["serviceAccountName", "nodeName"] {
        let name = spec.text(field);
        if !name.is_empty() {
            faults.invalid_each(&path.child(field), name, format::dns_subdomain(name));
        }
    }
    for field in ["hostname", "subdomain"] {
        let name = spec.text(field);
        if !name.is_empty() {
            faults.invalid_each(&path.child(field), name, format::dns_label(name));
        }
    }
    for field in ["priorityClassName", "runtimeClassName"] {
        let name = spec.text(field);
        if !name.is_empty() || (field == "runtimeClassName" && spec.has(field)) {
            faults.invalid_each(&path.child(field), name, format::dns_subdomain(name));
        }
    }
}

fn host_network_ports(spec: &Value, is_pod: bool, path: &Path, faults: &mut Faults) {
    if !spec.flag("hostNetwork") {
        return;
    }
    for (index, container) in spec.list("containers").iter().enumerate() {
        for (place, port) in container.list("ports").iter().enumerate() {
            let (host, own) = (port.int("hostPort").unwrap_or(0), port.int("containerPort").unwrap_or(0));
            if (is_pod || host != 0) && host != own {
                let here = path.child("containers").index(index).child("ports").index(place).child("hostPort");
                faults.invalid(&here, host, "must match `containerPort` when `hostNetwork` is true");
            }
        }
    }
}

fn dns_config(spec: &Value, path: &Path, faults: &mut Faults) {
    let config = spec.at("dnsConfig");
    let nameservers = config.texts("nameservers");
    if spec.text("dnsPolicy") == "None" {
        if config.is_null() {
            faults.required(path, "must provide `dnsConfig` when `dnsPolicy` is None");
            return;
        }
        if nameservers.is_empty() {
            faults.required(
                &path.child("nameservers"),
                "must provide at least one DNS nameserver when `dnsPolicy` is None",
            );
            return;
        }
    }
    if nameservers.len() > 3 {
        faults.invalid(&path.child("nameservers"), config.at("nameservers"), "must not have more than 3 nameservers");
    }
    for (index, address) in nameservers.iter().enumerate() {
        legacy_ip(address, &[], &path.child("nameservers").index(index), faults);
    }
    let searches = config.texts("searches");
    if searches.len() > 32 {
        faults.invalid(&path.child("searches"), config.at("searches"), "must not have more than 32 search paths");
    }
    if searches.join(" ").len() > 2048 {
        let detail = "must not have more than 2048 characters (including spaces) in the search list";
        faults.invalid(&path.child("searches"), config.at("searches"), detail);
    }
    for (index, search) in searches.iter().enumerate().filter(|(_, search)| **search != ".") {
        let domain = search.strip_suffix('.').unwrap_or(search);
        faults.invalid_each(&path.child("searches").index(index), domain, format::search_domain(domain));
    }
    for (index, option) in config.list("options").iter().enumerate() {
        if option.text("name").is_empty() {
            faults.required(&path.child("options").index(index), "must not be empty");
        }
    }
}

fn gates(spec: &Value, path: &Path, faults: &mut Faults) {
    for (index, gate) in spec.list("readinessGates").iter().enumerate() {
        let kind = gate.text("conditionType");
        faults.invalid_each(
            &path.child("readinessGates").index(index).child("conditionType"),
            kind,
            format::label_key(kind),
        );
    }
    let mut seen = Vec::new();
    for (index, gate) in spec.list("schedulingGates").iter().enumerate() {
        let (name, here) = (gate.text("name"), path.child("schedulingGates").index(index));
        faults.invalid_each(&here, name, format::label_key(name));
        if seen.contains(&name) {
            faults.duplicate(&here, name);
        }
        seen.push(name);
    }
}

const UPDATABLE: &str = "pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)";

/// Checks that an update changes only what may change in a pod.
pub(crate) fn pod_update(object: &Value, old: &Value, faults: &mut Faults) {
    let path = Path::new("spec");
    let (spec, before) = (object.at("spec"), old.at("spec"));
    for list in ["containers", "initContainers"] {
        if spec.list(list).len() != before.list(list).len() {
            faults.forbidden(&path.child(list), "pod updates may not add or remove containers");
            return;
        }
    }
    let deadline_path = path.child("activeDeadlineSeconds");
    match (spec.int("activeDeadlineSeconds"), before.int("activeDeadlineSeconds")) {
        (Some(new), Some(old)) if old < new => {
            faults.invalid(&deadline_path, new, "must be less than or equal to previous value");
            return;
        }
        (None, Some(_)) => {
            faults.invalid(&deadline_path, &Value::Null, "must not update from a positive integer to nil value")
        }
        _ => {}
    }
    added_tolerations(spec, before, &path.child("tolerations"), faults);
    let gates: Vec<&str> = before.list("schedulingGates").iter().map(|gate| gate.text("name")).collect();
    for (index, gate) in spec.list("schedulingGates").iter().enumerate() {
        let name = gate.text("name");
        if !gates.contains(&name) {
            let detail = format!("only deletion is allowed, but found new scheduling gate '{name}'");
            faults.forbidden(&path.child("schedulingGates").index(index).child("name"), &detail);
        }
    }
    let munged = as_if_unchanged(spec, before);
    if !same(&munged, before) {
        let mut changes = Vec::new();
        differences(before, &munged, "spec", &mut changes);
        faults.forbidden(&path, &format!("{UPDATABLE}\n{}", changes.join("\n")));
    }
}

/// The new spec with everything that may change set back to what it was.
fn as_if_unchanged(spec: &Value, before: &Value) -> Value {
    let mut munged = spec.clone();
    for list in ["containers", "initContainers"] {
        let images: Vec<Value> = before.list(list).iter().map(|container| container.at("image").clone()).collect();
        for (container, image) in crate::kinds::read::items_mut(&mut munged, list).zip(images) {
            put(container, "image", image);
        }
    }
    let mut fields = vec!["activeDeadlineSeconds", "tolerations", "schedulingGates"];
    if before.int("terminationGracePeriodSeconds").is_some_and(|seconds| seconds < 0)
        && spec.int("terminationGracePeriodSeconds") == Some(1)
    {
        fields.push("terminationGracePeriodSeconds");
    }
    // A pod that waits for its gates has not been scheduled: its node selector may still be narrowed.
    if !before.list("schedulingGates").is_empty()
        && before.entries("nodeSelector").all(|(key, value)| spec.at("nodeSelector").at(key) == value)
    {
        fields.push("nodeSelector");
    }
    for field in fields {
        crate::kinds::read::keep_from(&mut munged, before, field);
    }
    munged
}

fn differences(old: &Value, new: &Value, path: &str, out: &mut Vec<String>) {
    match (old, new) {
        (Value::Object(left), Value::Object(right)) => {
            for (key, value) in left {
                differences(value, right.get(key).unwrap_or(&Value::Null), &format!("{path}.{key}"), out);
            }
            for (key, value) in right.iter().filter(|(key, _)| !left.contains_key(*key)) {
                differences(&Value::Null, value, &format!("{path}.{key}"), out);
            }
        }
        (Value::Array(left), Value::Array(right)) if left.len() == right.len() => {
            for (index, (old, new)) in left.iter().zip(right).enumerate() {
                differences(old, new, &format!("{path}[{index}]"), out);
            }
        }
        _ if same(old, new) => {}
        _ => out.push(format!("- {path}: {old}\n+ {path}: {new}")),
    }
}

fn added_tolerations(spec: &Value, before: &Value, path: &Path, faults: &mut Faults) {
    let bare = |toleration: &Value| {
        let mut bare = toleration.clone();
        drop_field(&mut bare, "tolerationSeconds");
        bare
    };
    let now: Vec<Value> = spec.list("tolerations").iter().map(bare).collect();
    if before.list("tolerations").iter().any(|old| !now.iter().any(|new| same(new, &bare(old)))) {
        faults.forbidden(path, "existing toleration can not be modified except its tolerationSeconds");
    }
}

/// Checks an update of a pod's status.
pub(crate) fn pod_status(object: &Value, old: &Value, faults: &mut Faults) {
    let path = Path::new("status");
    let (status, before) = (object.at("status"), old.at("status"));
    for (index, condition) in status.list("conditions").iter().enumerate() {
        let kind = condition.text("type");
        if !["PodScheduled", "Ready", "Initialized"].contains(&kind) {
            faults.invalid_each(&path.child("conditions").index(index).child("Type"), kind, format::label_key(kind));
        }
    }
    if before.has("qosClass") && status.at("qosClass") != before.at("qosClass") {
        faults.invalid(&path.child("qosClass"), status.text("qosClass"), format::IMMUTABLE);
    }
    for (field, first) in [("podIPs", "podIP"), ("hostIPs", "hostIP")] {
        let here = path.child(field);
        let ips = |status: &'_ Value| -> Vec<String> {
            status.list(field).iter().map(|entry| entry.text("ip").to_owned()).collect()
        };
        let (now, known) = (ips(status), ips(before));
        let known: Vec<&str> = known.iter().map(String::as_str).collect();
        let now: Vec<&str> = now.iter().map(String::as_str).collect();
        if field == "hostIPs" && now.first().is_some_and(|ip| *ip != status.text(first)) {
            faults.invalid(
                &here.index(0).child("ip"),
                now.first().copied().unwrap_or_default(),
                "must be equal to `hostIP`",
            );
        }
        for (index, ip) in now.iter().enumerate() {
            legacy_ip(ip, &known, &here.index(index), faults);
        }
        if now.len() > 2 || (now.len() == 2 && !dual_stack(&now)) {
            faults.invalid(&here, status.at(field), "may specify no more than one IP for each IP family");
        }
    }
}

/// The `status` every new pod starts with.
pub(crate) fn first_status(spec: &Value) -> Value {
    json!({"phase": "Pending", "qosClass": qos_class(spec)})
}

/// Guaranteed, Burstable or BestEffort, from the containers' requests and limits of cpu and memory.
fn qos_class(spec: &Value) -> &'static str {
    let containers: Vec<&Value> = ["containers", "initContainers"].iter().flat_map(|list| spec.list(list)).collect();
    let amount = |container: &Value, kind: &str, name: &str| {
        container::quantity(container.deep(&["resources", kind, name])).filter(|quantity| !quantity.is_zero())
    };
    let mut any = false;
    let mut guaranteed = true;
    for container in containers {
        for name in ["cpu", "memory"] {
            let (request, limit) = (amount(container, "requests", name), amount(container, "limits", name));
            any |= request.is_some() || limit.is_some();
            guaranteed &= limit.is_some() && request == limit;
        }
    }
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}
