//! Validation of a pod's volumes.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::{container, environment};
use crate::kinds::fault::{Faults, Path};
use crate::kinds::format;
use crate::kinds::read::Read;

const FILE_MODE: &str = "must be a number between 0 and 0777 (octal), both inclusive";

/// Checks `volumes` and returns the valid ones by name.
pub(super) fn volumes<'a>(
    spec: &'a Value,
    pod_name: &str,
    path: &Path,
    faults: &mut Faults,
) -> BTreeMap<&'a str, &'a Value> {
    let mut known = BTreeMap::new();
    let made: BTreeSet<String> = spec
        .list("volumes")
        .iter()
        .filter(|volume| !pod_name.is_empty() && volume.has("ephemeral"))
        .map(|volume| format!("{pod_name}-{}", volume.text("name")))
        .collect();
    for (index, volume) in spec.list("volumes").iter().enumerate() {
        let here = path.index(index);
        let before = faults.len();
        source(volume, pod_name, &here, faults);
        let name = volume.text("name");
        if name.is_empty() {
            faults.required(&here.child("name"), "");
        } else {
            faults.invalid_each(&here.child("name"), name, format::dns_label(name));
        }
        if known.contains_key(name) {
            faults.duplicate(&here.child("name"), name);
        }
        if faults.len() == before {
            known.insert(name, volume);
        }
        let claim = volume.at("persistentVolumeClaim").text("claimName");
        if made.contains(claim) {
            let path = here.child("persistentVolumeClaim").child("claimName");
            faults.invalid(&path, claim, "must not reference a PVC that gets created for an ephemeral volume");
        }
    }
    known
}

/// The sources in the order the API server looks at them.
const SOURCES: &[&str] = &[
    "emptyDir",
    "hostPath",
    "gitRepo",
    "gcePersistentDisk",
    "awsElasticBlockStore",
    "secret",
    "nfs",
    "iscsi",
    "glusterfs",
    "flocker",
    "persistentVolumeClaim",
    "rbd",
    "cinder",
    "cephfs",
    "quobyte",
    "downwardAPI",
    "fc",
    "flexVolume",
    "configMap",
    "azureFile",
    "vsphereVolume",
    "photonPersistentDisk",
    "portworxVolume",
    "azureDisk",
    "storageos",
    "projected",
    "scaleIO",
    "csi",
    "ephemeral",
    "image",
];

fn source(volume: &Value, pod_name: &str, path: &Path, faults: &mut Faults) {
    let mut found = 0;
    for kind in SOURCES.iter().filter(|kind| volume.has(kind)) {
        let (here, value) = (path.child(kind), volume.at(kind));
        found += 1;
        if found > 1 {
            faults.forbidden(&here, "may not specify more than 1 volume type");
            continue;
        }
        match *kind {
            "emptyDir" => empty_dir(value, &here, faults),
            "hostPath" => host_path(value, &here, faults),
            "gitRepo" => required(value, &["repository"], &here, faults),
            "gcePersistentDisk" => required(value, &["pdName"], &path.child("persistentDisk"), faults),
            "awsElasticBlockStore" => required(value, &["volumeID"], &here, faults),
            "secret" => keyed(value, "secretName", &here, faults),
            "configMap" => keyed(value, "name", &here, faults),
            "nfs" => nfs(value, &here, faults),
            "iscsi" => required(value, &["targetPortal", "iqn"], &here, faults),
            "persistentVolumeClaim" => required(value, &["claimName"], &here, faults),
            "downwardAPI" => {
                mode(value, "defaultMode", &here, faults);
                downward(value, &here, faults);
            }
            "projected" => projected(value, &here, faults),
            "flexVolume" | "csi" => required(value, &["driver"], &here, faults),
            "ephemeral" => ephemeral(value, volume.text("name"), pod_name, path, faults),
            "image" => image(value, &here, faults),
            _ => {}
        }
    }
    if found == 0 {
        faults.required(path, "must specify a volume type");
    }
}

fn required(value: &Value, fields: &[&str], path: &Path, faults: &mut Faults) {
    for field in fields.iter().filter(|field| value.text(field).is_empty()) {
        faults.required(&path.child(field), "");
    }
}

fn empty_dir(value: &Value, path: &Path, faults: &mut Faults) {
    if container::quantity(value.at("sizeLimit")).is_some_and(|quantity| quantity.is_negative()) {
        faults.forbidden(&path.child("sizeLimit"), "SizeLimit field must be a valid resource quantity");
    }
}

fn host_path(value: &Value, path: &Path, faults: &mut Faults) {
    if value.text("path").is_empty() {
        faults.required(&path.child("path"), "");
        return;
    }
    no_backsteps(value.text("path"), &path.child("path"), faults);
    const TYPES: &[&str] =
        &["", "BlockDevice", "CharDevice", "Directory", "DirectoryOrCreate", "File", "FileOrCreate", "Socket"];
    if value.has("type") && !TYPES.contains(&value.text("type")) {
        faults.unsupported(&path.child("type"), value.text("type"), TYPES);
    }
}

fn nfs(value: &Value, path: &Path, faults: &mut Faults) {
    required(value, &["server", "path"], path, faults);
    if !value.text("path").starts_with('/') {
        faults.invalid(&path.child("path"), value.text("path"), "must be an absolute path");
    }
}

fn mode(value: &Value, field: &str, path: &Path, faults: &mut Faults) {
    if let Some(mode) = value.int(field).filter(|mode| !(0..=0o777).contains(mode)) {
        faults.invalid(&path.child(field), mode, FILE_MODE);
    }
}

fn keyed(value: &Value, name: &str, path: &Path, faults: &mut Faults) {
    required(value, &[name], path, faults);
    mode(value, "defaultMode", path, faults);
    key_items(value, path, faults);
}

fn key_items(value: &Value, path: &Path, faults: &mut Faults) {
    for (index, item) in value.list("items").iter().enumerate() {
        let here = path.child("items").index(index);
        required(item, &["key", "path"], &here, faults);
        unreserved(item.text("path"), &here.child("path"), faults);
        mode(item, "mode", &here, faults);
    }
}

fn downward(value: &Value, path: &Path, faults: &mut Faults) {
    for (index, file) in value.list("items").iter().enumerate() {
        let here = path.child("items").index(index);
        if file.text("path").is_empty() {
            faults.required(&here.child("path"), "");
        }
        unreserved(file.text("path"), &here.child("path"), faults);
        match (file.has("fieldRef"), file.has("resourceFieldRef")) {
            (true, resource) => {
                const FIELDS: &[&str] =
                    &["metadata.annotations", "metadata.labels", "metadata.name", "metadata.namespace", "metadata.uid"];
                environment::field_ref(file.at("fieldRef"), FIELDS, &here.child("fieldRef"), faults);
                if resource {
                    faults.invalid(
                        &here,
                        "resource",
                        "fieldRef and resourceFieldRef can not be specified simultaneously",
                    );
                }
            }
            (false, true) => {
                environment::resource_ref(file.at("resourceFieldRef"), true, &here.child("resourceFieldRef"), faults)
            }
            (false, false) => faults.required(&here, "one of fieldRef and resourceFieldRef is required"),
        }
        mode(file, "mode", &here, faults);
    }
}

fn projected(value: &Value, path: &Path, faults: &mut Faults) {
    mode(value, "defaultMode", path, faults);
    let mut seen: BTreeSet<&str> = BTreeSet::new();
    for (index, source) in value.list("sources").iter().enumerate() {
        let here = path.child("sources").index(index);
        let mut found = 0;
        for kind in
            ["secret", "configMap", "downwardAPI", "serviceAccountToken", "clusterTrustBundle", "podCertificate"]
        {
            if !source.has(kind) {
                continue;
            }
            let (item, item_path) = (source.at(kind), here.child(kind));
            found += 1;
            match kind {
                "secret" | "configMap" => {
                    required(item, &["name"], &item_path, faults);
                    key_items(item, &item_path, faults);
                }
                "downwardAPI" => downward(item, &item_path, faults),
                "serviceAccountToken" => token(item, &item_path, faults),
                _ => {}
            }
            let paths: Vec<&str> = match kind {
                "secret" | "configMap" | "downwardAPI" => {
                    item.list("items").iter().map(|entry| entry.text("path")).collect()
                }
                _ => vec![item.text("path")],
            };
            for entry in paths.into_iter().filter(|entry| !entry.is_empty()) {
                if !seen.insert(entry) {
                    let shown = if matches!(kind, "secret" | "configMap") { item.text("name") } else { entry };
                    faults.invalid(path, shown, "conflicting duplicate paths");
                }
            }
        }
        if found > 1 {
            faults.forbidden(&here, "may not specify more than 1 volume type per source");
        }
    }
}

fn token(item: &Value, path: &Path, faults: &mut Faults) {
    if let Some(seconds) = item.int("expirationSeconds") {
        if seconds < 600 {
            faults.invalid(
                &path.child("expirationSeconds"),
                seconds,
                "may not specify a duration less than 10 minutes",
            );
        } else if seconds > 1 << 32 {
            faults.invalid(
                &path.child("expirationSeconds"),
                seconds,
                "may not specify a duration larger than 2^32 seconds",
            );
        }
    }
    if item.text("path").is_empty() {
        faults.required(&path.child("path"), "");
    } else {
        unreserved(item.text("path"), &path.child("path"), faults);
    }
}

fn ephemeral(value: &Value, name: &str, pod_name: &str, path: &Path, faults: &mut Faults) {
    if !value.has("volumeClaimTemplate") {
        faults.required(&path.child("ephemeral").child("volumeClaimTemplate"), "");
    }
    if !pod_name.is_empty() && !name.is_empty() {
        let claim = format!("{pod_name}-{name}");
        for message in format::dns_subdomain(&claim) {
            faults.invalid(&path.child("name"), name, &format!("PVC name \"{claim}\": {message}"));
        }
    }
}

fn image(value: &Value, path: &Path, faults: &mut Faults) {
    if value.text("reference").is_empty() {
        faults.required(&path.child("reference"), "");
    }
    container::pull_policy(value.text("pullPolicy"), &path.child("pullPolicy"), faults);
}

/// A path below something, that does not climb.
pub(super) fn descending(text: &str, path: &Path, faults: &mut Faults) {
    if text.starts_with('/') {
        faults.invalid(path, text, "must be a relative path");
    }
    no_backsteps(text, path, faults);
}

fn no_backsteps(text: &str, path: &Path, faults: &mut Faults) {
    if text.split('/').any(|part| part == "..") {
        faults.invalid(path, text, "must not contain '..'");
    }
}

fn unreserved(text: &str, path: &Path, faults: &mut Faults) {
    descending(text, path, faults);
    if text.starts_with("..") && !text.starts_with("../") {
        faults.invalid(path, text, "must not start with '..'");
    }
}
