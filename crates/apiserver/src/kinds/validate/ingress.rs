//! Validation of Ingresses, IngressClasses, IPAddresses and ServiceCIDRs.

use serde_json::Value;

use super::container::port_number;
use super::dual_stack;
use crate::kinds::fault::{Faults, Path};
use crate::kinds::format;
use crate::kinds::metadata::immutable;
use crate::kinds::read::Read;

/// Checks an `Ingress`.
pub(crate) fn ingress(object: &Value, faults: &mut Faults) {
    let (spec, path) = (object.at("spec"), Path::new("spec"));
    let rules = spec.list("rules");
    if rules.is_empty() && !spec.has("defaultBackend") {
        faults.invalid(&path, spec.at("rules"), "either `defaultBackend` or `rules` must be specified");
    }
    if spec.has("defaultBackend") {
        backend(spec.at("defaultBackend"), &path.child("defaultBackend"), faults);
    }
    for (index, rule) in rules.iter().enumerate() {
        self::rule(rule, &path.child("rules").index(index), faults);
    }
    for (index, tls) in spec.list("tls").iter().enumerate() {
        let here = path.child("tls").index(index);
        for (place, host) in tls.texts("hosts").iter().enumerate() {
            let complaints =
                if host.contains('*') { format::wildcard_subdomain(host) } else { format::dns_subdomain(host) };
            faults.invalid_each(&here.child("hosts").index(place), host, complaints);
        }
        let secret = tls.text("secretName");
        if !secret.is_empty() {
            faults.invalid_each(&here.child("secretName"), secret, format::dns_subdomain(secret));
        }
    }
    if spec.has("ingressClassName") {
        let class = spec.text("ingressClassName");
        faults.invalid_each(&path.child("ingressClassName"), class, format::dns_subdomain(class));
        let annotation = object.deep(&["metadata", "annotations", "kubernetes.io/ingress.class"]);
        if !object.at("metadata").has("resourceVersion")
            && annotation.as_str().is_some_and(|annotation| annotation != class)
        {
            let here = Path::new("annotations").child("kubernetes.io/ingress.class");
            faults.invalid(&here, annotation, "must match `ingressClassName` when both are specified");
        }
    }
}

fn rule(rule: &Value, path: &Path, faults: &mut Faults) {
    let host = rule.text("host");
    if !host.is_empty() {
        if format::sloppy_ip(host).is_some() {
            faults.invalid(&path.child("host"), host, "must be a DNS name, not an IP address");
        }
        let complaints =
            if host.contains('*') { format::wildcard_subdomain(host) } else { format::dns_subdomain(host) };
        faults.invalid_each(&path.child("host"), host, complaints);
    }
    if !rule.has("http") {
        return;
    }
    let paths = path.child("http").child("paths");
    if rule.at("http").list("paths").is_empty() {
        faults.required(&paths, "");
    }
    for (index, entry) in rule.at("http").list("paths").iter().enumerate() {
        http_path(entry, &paths.index(index), faults);
    }
}

fn http_path(entry: &Value, path: &Path, faults: &mut Faults) {
    let (text, here) = (entry.text("path"), path.child("path"));
    let absolute = text.starts_with('/');
    match entry.text("pathType") {
        "" => {
            faults.required(&path.child("pathType"), "pathType must be specified");
            return;
        }
        "Exact" | "Prefix" => {
            if !absolute {
                faults.invalid(&here, text, "must be an absolute path");
            }
            for part in ["//", "/./", "/../", "%2f", "%2F"].iter().filter(|part| text.contains(**part)) {
                faults.invalid(&here, text, &format!("must not contain '{part}'"));
            }
            for end in ["/..", "/."].iter().filter(|end| text.ends_with(**end)) {
                faults.invalid(&here, text, &format!("cannot end with '{end}'"));
            }
        }
        "ImplementationSpecific" => {
            if !text.is_empty() && !absolute {
                faults.invalid(&here, text, "must be an absolute path");
            }
        }
        other => faults.unsupported(&path.child("pathType"), other, &["Exact", "ImplementationSpecific", "Prefix"]),
    }
    backend(entry.at("backend"), &path.child("backend"), faults);
}

fn backend(backend: &Value, path: &Path, faults: &mut Faults) {
    match (backend.has("resource"), backend.has("service")) {
        (true, true) => faults.invalid(path, "", "cannot set both resource and service backends"),
        (true, false) => reference(backend.at("resource"), &path.child("resource"), faults),
        (false, false) => faults.invalid(path, "", "resource or service backend is required"),
        (false, true) => {
            let (service, here) = (backend.at("service"), path.child("service"));
            let name = service.text("name");
            if name.is_empty() {
                faults.required(&here.child("name"), "");
            } else {
                faults.invalid_each(&here.child("name"), name, format::dns_label(name));
            }
            let port = service.at("port");
            let port_path = here.child("port");
            match (port.text("name"), port.int("number").unwrap_or(0)) {
                ("", 0) => faults.required(path, "port name or number is required"),
                ("", number) => port_number(number, &port_path.child("number"), faults),
                (name, 0) => faults.invalid_each(&port_path.child("name"), name, format::port_name(name)),
                _ => faults.invalid(path, "", "cannot set both port name & port number"),
            }
        }
    }
}

fn reference(reference: &Value, path: &Path, faults: &mut Faults) {
    if reference.has("apiGroup") {
        faults.invalid_each(
            &path.child("apiGroup"),
            reference.text("apiGroup"),
            format::dns_subdomain(reference.text("apiGroup")),
        );
    }
    for field in ["kind", "name"] {
        let text = reference.text(field);
        if text.is_empty() {
            faults.required(&path.child(field), "");
        } else {
            faults.invalid_each(&path.child(field), text, format::path_segment(text));
        }
    }
}

/// Checks an `IngressClass`.
pub(crate) fn ingress_class(object: &Value, faults: &mut Faults) {
    let (spec, path) = (object.at("spec"), Path::new("spec"));
    let (controller, here) = (spec.text("controller"), path.child("controller"));
    if controller.is_empty() {
        faults.required(&here, "");
    } else {
        if controller.len() > 250 {
            faults.too_long(&here, 250);
        }
        match controller.split_once('/') {
            Some((domain, rest)) if !domain.is_empty() && !rest.is_empty() => {
                faults.invalid_each(&here, domain, format::dns_subdomain(domain));
            }
            _ => faults.invalid(&here, controller, "must be a domain-prefixed path (such as \"acme.io/foo\")"),
        }
    }
    if !spec.has("parameters") {
        return;
    }
    let (parameters, here) = (spec.at("parameters"), path.child("parameters"));
    reference(parameters, &here, faults);
    match (parameters.text("scope"), parameters.has("namespace")) {
        ("", _) => faults.required(&here.child("scope"), ""),
        ("Namespace", false) => faults.required(&here.child("namespace"), "`parameters.scope` is set to 'Namespace'"),
        ("Cluster", true) => faults.forbidden(&here.child("namespace"), "`parameters.scope` is set to 'Cluster'"),
        ("Namespace" | "Cluster", _) => {}
        (other, _) => faults.unsupported(&here.child("scope"), other, &["Cluster", "Namespace"]),
    }
}

/// The controller of an `IngressClass` never changes.
pub(crate) fn ingress_class_update(object: &Value, old: &Value, faults: &mut Faults) {
    let field = |object: &Value| object.deep(&["spec", "controller"]).clone();
    immutable(&field(object), &field(old), &Path::new("spec").child("controller"), faults);
}

/// Checks an `IPAddress`.
pub(crate) fn ip_address(object: &Value, faults: &mut Faults) {
    let (parent, path) = (object.deep(&["spec", "parentRef"]), Path::new("spec").child("parentRef"));
    if parent.is_null() {
        faults.required(&path, "");
        return;
    }
    for field in ["resource", "name"] {
        if parent.text(field).is_empty() {
            faults.required(&path.child(field), "");
        } else {
            faults.invalid_each(&path.child(field), parent.text(field), format::path_segment(parent.text(field)));
        }
    }
}

/// Checks a `ServiceCIDR`.
pub(crate) fn service_cidr(object: &Value, faults: &mut Faults) {
    let path = Path::new("spec").child("cidrs");
    let cidrs = object.at("spec").texts("cidrs");
    let shown = object.deep(&["spec", "cidrs"]);
    if cidrs.is_empty() {
        faults.required(&path, "at least one CIDR required");
        return;
    }
    if cidrs.len() > 2 {
        faults.invalid(&path, shown, "may only hold up to 2 values");
    } else if cidrs.len() == 2 {
        let bases: Vec<&str> = cidrs.iter().map(|cidr| cidr.split('/').next().unwrap_or_default()).collect();
        if !dual_stack(&bases) {
            faults.invalid(
                &path,
                shown,
                "may specify no more than one IP for each IP family, i.e 192.168.0.0/24 and 2001:db8::/96",
            );
        }
    }
    for (index, cidr) in cidrs.iter().enumerate() {
        faults.invalid_each(&path.index(index), cidr, format::canonical_cidr(cidr));
    }
}

/// The ranges of a `ServiceCIDR` only grow by a second family.
pub(crate) fn service_cidr_update(object: &Value, old: &Value, faults: &mut Faults) {
    let (now, before) = (object.at("spec").texts("cidrs"), old.at("spec").texts("cidrs"));
    let path = Path::new("spec").child("cidrs");
    if before.len() == 1 && now.len() == 2 && now.first() == before.first() {
        return;
    }
    immutable(object.deep(&["spec", "cidrs"]), old.deep(&["spec", "cidrs"]), &path, faults);
}
