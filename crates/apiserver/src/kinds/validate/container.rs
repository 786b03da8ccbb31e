//! Validation of containers: names, images, ports, mounts, resources.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::environment::{env, env_from};
use super::probe::lively;
use super::volume::descending;
use crate::kinds::fault::{Faults, Path};
use crate::kinds::format;
use crate::kinds::quantity::Quantity;
use crate::kinds::read::Read;

/// What containers of one pod are checked against.
pub(super) struct Pod<'a> {
    /// The pod's spec.
    pub(super) spec: &'a Value,
    /// Valid volumes by name.
    pub(super) volumes: BTreeMap<&'a str, &'a Value>,
    /// `terminationGracePeriodSeconds`.
    pub(super) grace: Option<i64>,
}

const PROTOCOLS: &[&str] = &["SCTP", "TCP", "UDP"];

/// The quantity in `value`, none when absent or malformed.
pub(super) fn quantity(value: &Value) -> Option<Quantity> {
    match value {
        Value::String(text) => Quantity::parse(text),
        Value::Number(number) => Quantity::parse(&number.to_string()),
        _ => None,
    }
}

/// Checks `containers`.
pub(super) fn containers(pod: &Pod<'_>, path: &Path, faults: &mut Faults) {
    let list = pod.spec.list("containers");
    if list.is_empty() {
        faults.required(path, "");
        return;
    }
    let mut names = BTreeSet::new();
    for (index, container) in list.iter().enumerate() {
        let here = path.index(index);
        common(container, pod, &here, faults);
        if !names.insert(container.text("name")) {
            faults.duplicate(&here.child("name"), container.text("name"));
        }
        lively(container, pod, &here, faults);
        if container.has("restartPolicy") || !container.list("restartPolicyRules").is_empty() {
            restart_policy(container, &here, faults);
        }
    }
    host_port_conflicts(list, path, faults);
}

/// Checks `initContainers`.
pub(super) fn init_containers(pod: &Pod<'_>, path: &Path, faults: &mut Faults) {
    let mut names: BTreeSet<&str> =
        pod.spec.list("containers").iter().map(|container| container.text("name")).collect();
    for (index, container) in pod.spec.list("initContainers").iter().enumerate() {
        let here = path.index(index);
        common(container, pod, &here, faults);
        let sidecar = container.text("restartPolicy") == "Always";
        if sidecar && !container.list("restartPolicyRules").is_empty() {
            let detail = "restartPolicyRules are not allowed for init containers with restart policy Always";
            faults.forbidden(&here.child("restartPolicyRules"), detail);
        } else if container.has("restartPolicy") && !sidecar {
            restart_policy(container, &here, faults);
        }
        let name = container.text("name");
        if !name.is_empty() && !names.insert(name) {
            faults.duplicate(&here.child("name"), name);
        }
        host_port_conflicts(std::slice::from_ref(container), path, faults);
        if sidecar {
            lively(container, pod, &here, faults);
            continue;
        }
        for field in ["lifecycle", "livenessProbe", "readinessProbe", "startupProbe"] {
            if container.has(field) {
                faults.forbidden(&here.child(field), "may not be set for init containers without restartPolicy=Always");
            }
        }
    }
}

/// Checks `ephemeralContainers`.
pub(super) fn ephemeral_containers(pod: &Pod<'_>, path: &Path, faults: &mut Faults) {
    let others: Vec<&str> = ["containers", "initContainers"]
        .iter()
        .flat_map(|list| pod.spec.list(list))
        .map(|container| container.text("name"))
        .collect();
    let mut names: BTreeSet<&str> = others.iter().copied().collect();
    for (index, container) in pod.spec.list("ephemeralContainers").iter().enumerate() {
        let here = path.index(index);
        common(container, pod, &here, faults);
        image_spaces(container, &here, faults);
        if !names.insert(container.text("name")) {
            faults.duplicate(&here.child("name"), container.text("name"));
        }
        let target = container.text("targetContainerName");
        if !target.is_empty() && !others.contains(&target) {
            faults.not_found(&here.child("targetContainerName"), target);
        }
        for field in
            ["ports", "lifecycle", "livenessProbe", "readinessProbe", "startupProbe", "resizePolicy", "restartPolicy"]
        {
            if container.has(field) {
                faults.forbidden(&here.child(field), "cannot be set for an Ephemeral Container");
            }
        }
        if !container.at("resources").is_blank() {
            faults.forbidden(&here.child("resources"), "cannot be set for an Ephemeral Container");
        }
        for (place, mount) in container.list("volumeMounts").iter().enumerate() {
            for field in ["subPath", "subPathExpr"] {
                if !mount.text(field).is_empty() {
                    let path = here.child("volumeMounts").index(place).child(field);
                    faults.forbidden(&path, "cannot be set for an Ephemeral Container");
                }
            }
        }
    }
}

/// An image name of a pod (not of a template) has no spaces around it.
pub(super) fn image_spaces(container: &Value, path: &Path, faults: &mut Faults) {
    let image = container.text("image");
    if image.trim() != image {
        faults.invalid(&path.child("image"), image, "must not have leading or trailing whitespace");
    }
}

fn restart_policy(container: &Value, path: &Path, faults: &mut Faults) {
    const POLICIES: &[&str] = &["Always", "Never", "OnFailure"];
    let policy = container.text("restartPolicy");
    if !container.has("restartPolicy") {
        faults.required(&path.child("restartPolicy"), "must specify restartPolicy when restart rules are used");
    } else if !POLICIES.contains(&policy) {
        faults.unsupported(&path.child("restartPolicy"), policy, POLICIES);
    }
}

fn common(container: &Value, pod: &Pod<'_>, path: &Path, faults: &mut Faults) {
    let name = container.text("name");
    if name.is_empty() {
        faults.required(&path.child("name"), "");
    } else {
        faults.invalid_each(&path.child("name"), name, format::dns_label(name));
    }
    if container.text("image").is_empty() {
        faults.required(&path.child("image"), "");
    }
    match container.text("terminationMessagePolicy") {
        "File" | "FallbackToLogsOnError" => {}
        "" => faults.required(&path.child("terminationMessagePolicy"), ""),
        other => faults.unsupported(&path.child("terminationMessagePolicy"), other, &["File", "FallbackToLogsOnError"]),
    }
    ports(container, &path.child("ports"), faults);
    env(container, &path.child("env"), faults);
    env_from(container, &path.child("envFrom"), faults);
    mounts(container, pod, &path.child("volumeMounts"), faults);
    devices(container, pod, &path.child("volumeDevices"), faults);
    pull_policy(container.text("imagePullPolicy"), &path.child("imagePullPolicy"), faults);
    resources(container.at("resources"), &path.child("resources"), faults);
    super::security::container(container.at("securityContext"), pod.spec, &path.child("securityContext"), faults);
}

/// Checks an `imagePullPolicy`.
pub(super) fn pull_policy(policy: &str, path: &Path, faults: &mut Faults) {
    match policy {
        "Always" | "IfNotPresent" | "Never" => {}
        "" => faults.required(path, ""),
        other => faults.unsupported(path, other, &["Always", "IfNotPresent", "Never"]),
    }
}

fn ports(container: &Value, path: &Path, faults: &mut Faults) {
    let mut names = BTreeSet::new();
    for (index, port) in container.list("ports").iter().enumerate() {
        let here = path.index(index);
        let name = port.text("name");
        if !name.is_empty() {
            let complaints = format::port_name(name);
            if complaints.is_empty() {
                if !names.insert(name) {
                    faults.duplicate(&here.child("name"), name);
                }
            } else {
                faults.invalid_each(&here.child("name"), name, complaints);
            }
        }
        match port.int("containerPort").unwrap_or(0) {
            0 => faults.required(&here.child("containerPort"), ""),
            number => port_number(number, &here.child("containerPort"), faults),
        }
        if let Some(number) = port.int("hostPort").filter(|number| *number != 0) {
            port_number(number, &here.child("hostPort"), faults);
        }
        protocol(port.text("protocol"), &here.child("protocol"), faults);
    }
}

/// Checks a port number.
pub(super) fn port_number(number: i64, path: &Path, faults: &mut Faults) {
    for message in format::port_number(number) {
        faults.invalid(path, number, &message);
    }
}

/// Checks a transport protocol.
pub(super) fn protocol(protocol: &str, path: &Path, faults: &mut Faults) {
    if protocol.is_empty() {
        faults.required(path, "");
    } else if !PROTOCOLS.contains(&protocol) {
        faults.unsupported(path, protocol, PROTOCOLS);
    }
}

fn host_port_conflicts(containers: &[Value], path: &Path, faults: &mut Faults) {
    let mut seen = BTreeSet::new();
    for (index, container) in containers.iter().enumerate() {
        for (place, port) in container.list("ports").iter().enumerate() {
            let Some(number) = port.int("hostPort").filter(|number| *number != 0) else { continue };
            let key = format!("{}/{}/{number}", port.text("protocol"), port.text("hostIP"));
            if !seen.insert(key.clone()) {
                faults.duplicate(&path.index(index).child("ports").index(place).child("hostPort"), key.as_str());
            }
        }
    }
}

fn mounts(container: &Value, pod: &Pod<'_>, path: &Path, faults: &mut Faults) {
    let devices = container.list("volumeDevices");
    let mut points = BTreeSet::new();
    for (index, mount) in container.list("volumeMounts").iter().enumerate() {
        let here = path.index(index);
        let (name, point) = (mount.text("name"), mount.text("mountPath"));
        if name.is_empty() {
            faults.required(&here.child("name"), "");
        }
        if !pod.volumes.contains_key(name) {
            faults.not_found(&here.child("name"), name);
        }
        if point.is_empty() {
            faults.required(&here.child("mountPath"), "");
        }
        if !points.insert(point) {
            faults.invalid(&here.child("mountPath"), point, "must be unique");
        }
        if devices.iter().any(|device| device.text("name") == name) {
            faults.invalid(&here.child("name"), name, "must not already exist in volumeDevices");
        }
        if devices.iter().any(|device| device.text("devicePath") == point) {
            faults.invalid(&here.child("mountPath"), point, "must not already exist as a path in volumeDevices");
        }
        let (sub, expression) = (mount.text("subPath"), mount.text("subPathExpr"));
        if !sub.is_empty() {
            descending(sub, &path.child("subPath"), faults);
        }
        if !expression.is_empty() {
            if !sub.is_empty() {
                faults.invalid(
                    &here.child("subPathExpr"),
                    expression,
                    "subPathExpr and subPath are mutually exclusive",
                );
            }
            descending(expression, &path.child("subPathExpr"), faults);
        }
        propagation(mount, container, path, faults);
    }
}

fn propagation(mount: &Value, container: &Value, path: &Path, faults: &mut Faults) {
    const MODES: &[&str] = &["Bidirectional", "HostToContainer", "None"];
    let mode = mount.text("mountPropagation");
    let here = path.child("mountPropagation");
    if mount.has("mountPropagation") && !MODES.contains(&mode) {
        faults.unsupported(&here, mode, MODES);
    }
    if mode == "Bidirectional" && !container.at("securityContext").flag("privileged") {
        faults.forbidden(&here, "Bidirectional mount propagation is available only to privileged containers");
    }
    let here = path.child("recursiveReadOnly");
    match mount.text("recursiveReadOnly") {
        "" | "Disabled" => {}
        "Enabled" | "IfPossible" => {
            if !mount.flag("readOnly") {
                faults.forbidden(&here, "may only be specified when readOnly is true");
            }
            if !matches!(mode, "" | "None") {
                faults.forbidden(&here, "may only be specified when mountPropagation is None or not specified");
            }
        }
        other => faults.unsupported(&here, other, &["Disabled", "Enabled", "IfPossible"]),
    }
}

fn devices(container: &Value, pod: &Pod<'_>, path: &Path, faults: &mut Faults) {
    let mut paths = BTreeSet::new();
    for (index, device) in container.list("volumeDevices").iter().enumerate() {
        let here = path.index(index);
        let (name, point) = (device.text("name"), device.text("devicePath"));
        if name.is_empty() {
            faults.required(&here.child("name"), "");
        }
        match pod.volumes.get(name) {
            None => faults.not_found(&here.child("name"), name),
            Some(volume) if !volume.has("persistentVolumeClaim") && !volume.has("ephemeral") => {
                let detail = "can only use volume source type of PersistentVolumeClaim or Ephemeral for block mode";
                faults.invalid(&here.child("name"), name, detail);
            }
            Some(_) => {}
        }
        if point.is_empty() {
            faults.required(&here.child("devicePath"), "");
        }
        if !paths.insert(point) {
            faults.invalid(&here.child("devicePath"), point, "must be unique");
        }
    }
}

/// Resources that need no prefix in a container.
const CONTAINER_RESOURCES: &[&str] = &["cpu", "memory", "ephemeral-storage"];
/// All resources that need no prefix anywhere.
const STANDARD_RESOURCES: &[&str] = &[
    "cpu",
    "memory",
    "ephemeral-storage",
    "requests.cpu",
    "requests.memory",
    "requests.ephemeral-storage",
    "limits.cpu",
    "limits.memory",
    "limits.ephemeral-storage",
    "pods",
    "resourcequotas",
    "services",
    "replicationcontrollers",
    "secrets",
    "configmaps",
    "persistentvolumeclaims",
    "storage",
    "requests.storage",
    "services.nodeports",
    "services.loadbalancers",
];

fn resource_name(name: &str, path: &Path, faults: &mut Faults) {
    let complaints = format::label_key(name);
    let plain = !name.contains('/');
    let huge = name.starts_with("hugepages-");
    if !complaints.is_empty() {
        faults.invalid_each(path, name, complaints);
    } else if plain && !huge && !STANDARD_RESOURCES.contains(&name) {
        faults.invalid(path, name, "must be a standard resource type or fully qualified");
    }
    if plain && !huge && !CONTAINER_RESOURCES.contains(&name) {
        faults.invalid(path, name, "must be a standard resource for containers");
    } else if !plain && !name.contains("kubernetes.io/") && name.starts_with("requests.") {
        faults.invalid(path, name, "doesn't follow extended resource name standard");
    }
}

/// Checks one quantity of a resource.
pub(super) fn resource_value(name: &str, value: &Value, path: &Path, faults: &mut Faults) {
    let Some(quantity) = quantity(value) else { return };
    let shown = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    if quantity.is_negative() {
        faults.invalid(path, shown.as_str(), format::NOT_NEGATIVE);
    }
    let whole = name.contains('/') && !name.contains("kubernetes.io/")
        || matches!(name, "pods" | "services" | "secrets" | "configmaps");
    if whole && !quantity.is_whole() {
        faults.invalid(path, shown.as_str(), "must be an integer");
    }
}

/// Checks `limits` and `requests`.
pub(super) fn resources(value: &Value, path: &Path, faults: &mut Faults) {
    let (limit_path, request_path) = (path.child("limits"), path.child("requests"));
    for (name, limit) in value.entries("limits") {
        resource_name(name, &limit_path.key(name), faults);
        resource_value(name, limit, &limit_path.key(name), faults);
    }
    for (name, request) in value.entries("requests") {
        resource_name(name, &request_path.key(name), faults);
        resource_value(name, request, &request_path.key(name), faults);
        let overcommit = !name.contains("hugepages-") && (!name.contains('/') || name.contains("kubernetes.io/"));
        let limit = value.at("limits").at(name);
        let (Some(asked), Some(allowed)) = (quantity(request), quantity(limit)) else {
            if !overcommit {
                faults.required(&limit_path, "Limit must be set for non overcommitable resources");
            }
            continue;
        };
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        if asked != allowed && !overcommit {
            faults.invalid(
                &request_path,
                text(request).as_str(),
                &format!("must be equal to {name} limit of {}", text(limit)),
            );
        } else if asked > allowed {
            faults.invalid(
                &request_path,
                text(request).as_str(),
                &format!("must be less than or equal to {name} limit of {}", text(limit)),
            );
        }
    }
}
