//! Validation of security contexts.

use serde_json::Value;

use super::volume::descending;
use crate::kinds::fault::{Faults, Path};
use crate::kinds::format;
use crate::kinds::read::Read;

const LARGEST_ID: i64 = i32::MAX as i64;

fn id(context: &Value, field: &str, path: &Path, faults: &mut Faults) {
    if let Some(number) = context.int(field).filter(|number| !(0..=LARGEST_ID).contains(number)) {
        faults.invalid(&path.child(field), number, &format::range_message(0, LARGEST_ID));
    }
}

/// Checks the security context of a container.
pub(super) fn container(context: &Value, spec: &Value, path: &Path, faults: &mut Faults) {
    if context.is_null() {
        return;
    }
    id(context, "runAsUser", path, faults);
    id(context, "runAsGroup", path, faults);
    if context.has("procMount") {
        let here = path.child("procMount");
        match context.text("procMount") {
            "Default" => {}
            "Unmasked" if spec.at("hostUsers") != &Value::Bool(false) => {
                faults.invalid(&here, "Unmasked", "`hostUsers` must be false to use `Unmasked`");
            }
            "Unmasked" => {}
            other => faults.unsupported(&here, other, &["Default", "Unmasked"]),
        }
    }
    seccomp(context.at("seccompProfile"), &path.child("seccompProfile"), faults);
    if context.at("allowPrivilegeEscalation") == &Value::Bool(false) {
        if context.flag("privileged") {
            faults.invalid(path, context, "cannot set `allowPrivilegeEscalation` to false and `privileged` to true");
        }
        if context.at("capabilities").texts("add").contains(&"CAP_SYS_ADMIN") {
            faults.invalid(
                path,
                context,
                "cannot set `allowPrivilegeEscalation` to false and `capabilities.Add` CAP_SYS_ADMIN",
            );
        }
    }
    app_armor(context.at("appArmorProfile"), &path.child("appArmorProfile"), faults);
}

/// Checks the security context of a pod and the host flags beside it.
pub(super) fn pod(spec: &Value, spec_path: &Path, path: &Path, faults: &mut Faults) {
    let context = spec.at("securityContext");
    for field in ["fsGroup", "runAsUser", "runAsGroup"] {
        id(context, field, path, faults);
    }
    for (index, group) in context.list("supplementalGroups").iter().enumerate() {
        if let Some(number) = group.as_i64().filter(|number| !(0..=LARGEST_ID).contains(number)) {
            faults.invalid(
                &path.child("supplementalGroups").index(index),
                number,
                &format::range_message(0, LARGEST_ID),
            );
        }
    }
    if spec.flag("shareProcessNamespace") && spec.flag("hostPID") {
        let here = path.child("shareProcessNamespace");
        faults.invalid(&here, true, "ShareProcessNamespace and HostPID cannot both be enabled");
    }
    sysctls(context, spec, &path.child("sysctls"), faults);
    for (field, values) in [
        ("fsGroupChangePolicy", &["Always", "OnRootMismatch"]),
        ("supplementalGroupsPolicy", &["Merge", "Strict"]),
        ("seLinuxChangePolicy", &["MountOption", "Recursive"]),
    ] {
        if context.has(field) && !values.contains(&context.text(field)) {
            faults.unsupported(&path.child(field), context.text(field), values);
        }
    }
    seccomp(context.at("seccompProfile"), &path.child("seccompProfile"), faults);
    app_armor(context.at("appArmorProfile"), &path.child("appArmorProfile"), faults);
    if spec.at("hostUsers") == &Value::Bool(false) {
        for (field, name) in [("hostNetwork", "hostNetwork"), ("hostPID", "HostPID"), ("hostIPC", "HostIPC")] {
            if spec.flag(field) {
                faults.forbidden(&spec_path.child(name), "when `hostUsers` is false");
            }
        }
    }
}

fn sysctls(context: &Value, spec: &Value, path: &Path, faults: &mut Faults) {
    let mut seen = Vec::new();
    for (index, sysctl) in context.list("sysctls").iter().enumerate() {
        let here = path.index(index).child("name");
        let name = sysctl.text("name");
        let segment = |part: &str| {
            let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
            edge(part.chars().next())
                && edge(part.chars().last())
                && part.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_')
        };
        if name.is_empty() {
            faults.required(&here, "");
        } else if name.len() > 253 || !name.split(['.', '/']).all(segment) {
            let part = "[a-z0-9]([-_a-z0-9]*[a-z0-9])?";
            let detail = format!("must have at most 253 characters and match regex ^({part}[\\./])*{part}$");
            faults.invalid(&here, name, &detail);
        } else if seen.contains(&name) {
            faults.duplicate(&here, name);
        }
        let dotted = name.replace('/', ".");
        if spec.flag("hostNetwork") && dotted.starts_with("net.") {
            faults.invalid(&here, name, "may not be specified when 'hostNetwork' is true");
        }
        let ipc = dotted.starts_with("kernel.shm")
            || dotted.starts_with("kernel.msg")
            || dotted == "kernel.sem"
            || dotted.starts_with("fs.mqueue.");
        if spec.flag("hostIPC") && ipc {
            faults.invalid(&here, name, "may not be specified when 'hostIPC' is true");
        }
        seen.push(name);
    }
}

fn seccomp(profile: &Value, path: &Path, faults: &mut Faults) {
    if profile.is_null() {
        return;
    }
    const TYPES: &[&str] = &["Localhost", "RuntimeDefault", "Unconfined"];
    let kind = profile.text("type");
    if kind.is_empty() {
        faults.required(&path.child("type"), "type is required when seccompProfile is set");
    } else if !TYPES.contains(&kind) {
        faults.unsupported(&path.child("type"), kind, TYPES);
    }
    let here = path.child("localhostProfile");
    match (kind == "Localhost", profile.has("localhostProfile")) {
        (true, false) => faults.required(&here, "must be set when seccomp type is Localhost"),
        (true, true) => descending(profile.text("localhostProfile"), &here, faults),
        (false, true) => faults.invalid(&here, profile, "can only be set when seccomp type is Localhost"),
        (false, false) => {}
    }
}

fn app_armor(profile: &Value, path: &Path, faults: &mut Faults) {
    if profile.is_null() {
        return;
    }
    let here = path.child("localhostProfile");
    let local = profile.text("localhostProfile");
    match profile.text("type") {
        "Localhost" if local.trim().is_empty() && local.is_empty() => {
            faults.required(&here, "must be set when AppArmor type is Localhost")
        }
        "Localhost" if local.trim() != local => faults.invalid(&here, local, "must not be padded with whitespace"),
        "Localhost" => {}
        "RuntimeDefault" | "Unconfined" => {
            if profile.has("localhostProfile") {
                faults.invalid(&here, local, "can only be set when AppArmor type is Localhost");
            }
        }
        "" => faults.required(&path.child("type"), "type is required when appArmorProfile is set"),
        other => faults.unsupported(&path.child("type"), other, &["Localhost", "RuntimeDefault", "Unconfined"]),
    }
}
