//! Validation of Namespaces, Nodes and PersistentVolumeClaims.

use serde_json::Value;

use super::container::{quantity, resource_value};
use super::{dual_stack, legacy_cidr, scheduling};
use crate::kinds::fault::{Faults, Path};
use crate::kinds::format;
use crate::kinds::metadata::{label_selector, same};
use crate::kinds::read::{Read, drop_field, present};

/// Checks a `Namespace`.
pub(crate) fn namespace(object: &Value, faults: &mut Faults) {
    let path = Path::new("spec").child("finalizers");
    for name in object.at("spec").texts("finalizers") {
        faults.invalid_each(&path, name, format::label_key(name));
        if !name.contains('/') && !["kubernetes", "orphan", "foregroundDeletion"].contains(&name) {
            faults.invalid(&path, name, "name is neither a standard finalizer name nor is it fully qualified");
        }
    }
}

/// The phase of a `Namespace` follows its deletion.
pub(crate) fn namespace_status(object: &Value, _old: &Value, faults: &mut Faults) {
    let path = Path::new("status").child("Phase");
    let phase = object.at("status").text("phase");
    let deleted = object.at("metadata").has("deletionTimestamp");
    if !deleted && phase != "Active" {
        faults.invalid(&path, phase, "may only be 'Active' if `deletionTimestamp` is empty");
    }
    if deleted && phase != "Terminating" {
        faults.invalid(&path, phase, "may only be 'Terminating' if `deletionTimestamp` is not empty");
    }
}

fn node_resources(object: &Value, faults: &mut Faults) {
    for list in ["capacity", "allocatable"] {
        for (name, value) in object.at("status").entries(list) {
            resource_value(name, value, &Path::new("status").child(list).child(name), faults);
        }
    }
}

/// Checks a `Node`.
pub(crate) fn node(object: &Value, faults: &mut Faults) {
    scheduling::taints(object.at("spec").list("taints"), &Path::new("metadata").child("taints"), faults);
    node_resources(object, faults);
    let path = Path::new("spec").child("podCIDRs");
    let cidrs = object.at("spec").texts("podCIDRs");
    for (index, cidr) in cidrs.iter().enumerate() {
        legacy_cidr(cidr, &[], &path.index(index), faults);
    }
    let bases: Vec<&str> = cidrs.iter().map(|cidr| cidr.split('/').next().unwrap_or_default()).collect();
    if cidrs.len() > 2 || (cidrs.len() == 2 && !dual_stack(&bases)) {
        let shown = object.deep(&["spec", "podCIDRs"]);
        faults.invalid(&path, shown, "may specify no more than one CIDR for each IP family");
    }
}

/// Checks an update of a `Node`.
pub(crate) fn node_update(object: &Value, old: &Value, faults: &mut Faults) {
    scheduling::taints(object.at("spec").list("taints"), &Path::new("metadata").child("taints"), faults);
    node_resources(object, faults);
    let addresses = object.at("status").list("addresses");
    for (index, address) in addresses.iter().enumerate() {
        if addresses.iter().take(index).any(|earlier| earlier == address) {
            faults.duplicate(&Path::new("status").child("addresses").index(index), address);
        }
    }
    let (spec, before, path) = (object.at("spec"), old.at("spec"), Path::new("spec"));
    if before.has("podCIDRs") && !same(spec.at("podCIDRs"), before.at("podCIDRs")) {
        faults.forbidden(&path.child("podCIDRs"), "node updates may not change podCIDR except from \"\" to valid");
    }
    if !before.text("providerID").is_empty() && spec.at("providerID") != before.at("providerID") {
        faults.forbidden(&path.child("providerID"), "node updates may not change providerID except from \"\" to valid");
    }
}

/// Checks a `PersistentVolumeClaim`.
pub(crate) fn persistent_volume_claim(object: &Value, faults: &mut Faults) {
    let (spec, path) = (object.at("spec"), Path::new("spec"));
    let modes = spec.texts("accessModes");
    if modes.is_empty() {
        faults.required(&path.child("accessModes"), "at least 1 access mode is required");
    }
    label_selector(spec.at("selector"), &path.child("selector"), faults);
    const MODES: &[&str] = &["ReadOnlyMany", "ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"];
    for mode in modes.iter().filter(|mode| !MODES.contains(mode)) {
        faults.unsupported(&path.child("accessModes"), *mode, MODES);
    }
    if modes.contains(&"ReadWriteOncePod") && modes.len() > 1 {
        faults.forbidden(&path.child("accessModes"), "may not use ReadWriteOncePod with other access modes");
    }
    let (storage, here) = (spec.deep(&["resources", "requests", "storage"]), path.child("resources").key("storage"));
    match quantity(storage) {
        None => faults.required(&here, ""),
        Some(amount) if amount.is_negative() || amount.is_zero() => {
            faults.invalid(
                &path.child("resources").child("requests").key("storage"),
                storage,
                "must be greater than zero",
            );
        }
        Some(_) => {}
    }
    if spec.has("storageClassName") && !spec.text("storageClassName").is_empty() {
        let class = spec.text("storageClassName");
        faults.invalid_each(&path.child("storageClassName"), class, format::dns_subdomain(class));
    }
    if spec.has("volumeMode") && !["Block", "Filesystem"].contains(&spec.text("volumeMode")) {
        faults.unsupported(&path.child("volumeMode"), spec.text("volumeMode"), &["Block", "Filesystem"]);
    }
}

/// A claim's spec may only grow, or be bound to a volume.
pub(crate) fn persistent_volume_claim_update(object: &Value, old: &Value, faults: &mut Faults) {
    let strip = |object: &Value| {
        let mut spec = object.at("spec").clone();
        if let Some(resources) = present(&mut spec, "resources") {
            drop_field(resources, "requests");
        }
        drop_field(&mut spec, "volumeAttributesClassName");
        if old.at("spec").text("volumeName").is_empty() {
            drop_field(&mut spec, "volumeName");
        }
        spec
    };
    if !same(&strip(object), &strip(old)) {
        let detail =
            "spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims";
        faults.forbidden(&Path::new("spec"), detail);
    }
    let size = |object: &Value| quantity(object.deep(&["spec", "resources", "requests", "storage"]));
    if let (Some(now), Some(before)) = (size(object), size(old))
        && now < before
    {
        let here = Path::new("spec").child("resources").child("requests").child("storage");
        faults.forbidden(&here, "field can not be less than status.capacity");
    }
}
