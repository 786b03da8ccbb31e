//! Validation of probes and lifecycle hooks.

use serde_json::Value;

use super::container::Pod;
use super::{not_negative, port_or_name};
use crate::kinds::fault::{Faults, Path};
use crate::kinds::format;
use crate::kinds::read::Read;

/// Checks probes and lifecycle hooks.
pub(super) fn lively(container: &Value, pod: &Pod<'_>, path: &Path, faults: &mut Faults) {
    let lifecycle = container.at("lifecycle");
    for name in ["postStart", "preStop"] {
        if lifecycle.has(name) {
            handler(lifecycle.at(name), pod.grace, &path.child("lifecycle").child(name), faults);
        }
    }
    if lifecycle.has("stopSignal") && !pod.spec.has("os") {
        let here = path.child("lifecycle").child("stopSignal");
        faults.forbidden(&here, "may not be set for containers with empty `spec.os.name`");
    }
    for name in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if !container.has(name) {
            continue;
        }
        let (probe, here) = (container.at(name), path.child(name));
        self::probe(probe, pod.grace, &here, faults);
        if name == "readinessProbe" {
            if let Some(seconds) = probe.int("terminationGracePeriodSeconds") {
                faults.invalid(
                    &here.child("terminationGracePeriodSeconds"),
                    seconds,
                    "must not be set for readinessProbes",
                );
            }
        } else if let Some(threshold) = probe.int("successThreshold").filter(|threshold| *threshold != 1) {
            faults.invalid(&here.child("successThreshold"), threshold, "must be 1");
        }
    }
}

fn probe(probe: &Value, grace: Option<i64>, path: &Path, faults: &mut Faults) {
    handler(probe, grace, path, faults);
    for field in ["initialDelaySeconds", "timeoutSeconds", "periodSeconds", "successThreshold", "failureThreshold"] {
        not_negative(probe, field, path, faults);
    }
    if let Some(seconds) = probe.int("terminationGracePeriodSeconds").filter(|seconds| *seconds <= 0) {
        faults.invalid(&path.child("terminationGracePeriodSeconds"), seconds, "must be greater than 0");
    }
}

fn handler(handler: &Value, grace: Option<i64>, path: &Path, faults: &mut Faults) {
    let mut found = 0;
    for kind in ["exec", "httpGet", "tcpSocket", "grpc", "sleep"] {
        if !handler.has(kind) {
            continue;
        }
        let (value, here) = (handler.at(kind), path.child(kind));
        found += 1;
        if found > 1 {
            faults.forbidden(&here, "may not specify more than 1 handler type");
            continue;
        }
        match kind {
            "exec" if value.list("command").is_empty() => faults.required(&here.child("command"), ""),
            "httpGet" => http_get(value, &here, faults),
            "tcpSocket" | "grpc" => port_or_name(value.at("port"), &here.child("port"), faults),
            "sleep" => {
                if let (Some(seconds), Some(grace)) = (value.int("seconds"), grace)
                    && !(0..=grace).contains(&seconds)
                {
                    let detail = format!("must be non-negative and less than terminationGracePeriodSeconds ({grace})");
                    faults.invalid(&here, seconds, &detail);
                }
            }
            _ => {}
        }
    }
    if found == 0 {
        faults.required(path, "must specify a handler type");
    }
}

fn http_get(value: &Value, path: &Path, faults: &mut Faults) {
    if value.text("path").is_empty() {
        faults.required(&path.child("path"), "");
    }
    port_or_name(value.at("port"), &path.child("port"), faults);
    if !["HTTP", "HTTPS"].contains(&value.text("scheme")) {
        faults.unsupported(&path.child("scheme"), value.text("scheme"), &["HTTP", "HTTPS"]);
    }
    for header in value.list("httpHeaders") {
        faults.invalid_each(
            &path.child("httpHeaders"),
            header.text("name"),
            format::http_header_name(header.text("name")),
        );
    }
}
