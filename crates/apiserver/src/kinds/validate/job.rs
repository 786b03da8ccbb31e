//! Validation of Jobs and CronJobs.

use serde_json::Value;

use super::{not_negative, pod};
use crate::kinds::fault::{Faults, Path};
use crate::kinds::metadata::{immutable, label_selector, labels, selector_matches};
use crate::kinds::read::Read;

fn job_spec(spec: &Value, path: &Path, faults: &mut Faults) {
    const NUMBERS: &[&str] = &[
        "parallelism",
        "completions",
        "activeDeadlineSeconds",
        "backoffLimit",
        "ttlSecondsAfterFinished",
        "backoffLimitPerIndex",
        "maxFailedIndexes",
    ];
    for field in NUMBERS {
        not_negative(spec, field, path, faults);
    }
    match spec.text("completionMode") {
        "" | "NonIndexed" => {}
        "Indexed" if !spec.has("completions") => {
            faults.required(&path.child("completions"), "when completion mode is Indexed");
        }
        "Indexed" => {}
        other => faults.unsupported(&path.child("completionMode"), other, &["Indexed", "NonIndexed"]),
    }
    pod::template(spec.at("template"), &path.child("template"), faults);
    let here = path.child("template").child("spec").child("restartPolicy");
    match spec.deep(&["template", "spec"]).text("restartPolicy") {
        "OnFailure" | "Never" => {}
        "" | "Always" => faults.required(&here, "valid values: \"OnFailure\", \"Never\""),
        other => faults.unsupported(&here, other, &["OnFailure", "Never"]),
    }
}

/// Checks a `Job`.
pub(crate) fn job(object: &Value, faults: &mut Faults) {
    let (spec, path) = (object.at("spec"), Path::new("spec"));
    job_spec(spec, &path, faults);
    let selector = spec.at("selector");
    if selector.is_null() {
        faults.required(&path.child("selector"), "");
        return;
    }
    label_selector(selector, &path.child("selector"), faults);
    let known = spec.deep(&["template", "metadata", "labels"]);
    if !selector_matches(selector, known) {
        let here = path.child("template").child("metadata").child("labels");
        faults.invalid(&here, known, "`selector` does not match template `labels`");
    }
}

/// What a `Job` runs never changes.
pub(crate) fn job_update(object: &Value, old: &Value, faults: &mut Faults) {
    let (spec, before, path) = (object.at("spec"), old.at("spec"), Path::new("spec"));
    let suspended = before.flag("suspend");
    for field in [
        "completions",
        "selector",
        "template",
        "completionMode",
        "podFailurePolicy",
        "backoffLimitPerIndex",
        "managedBy",
        "successPolicy",
    ] {
        // Elastic indexed jobs change both counts together; a suspended job that never ran may still be steered.
        let elastic = field == "completions"
            && spec.text("completionMode") == "Indexed"
            && spec.at("completions") == spec.at("parallelism");
        if elastic || (field == "template" && suspended) {
            continue;
        }
        immutable(spec.at(field), before.at(field), &path.child(field), faults);
    }
}

/// Checks a `CronJob`.
pub(crate) fn cron_job(object: &Value, faults: &mut Faults) {
    let (spec, path) = (object.at("spec"), Path::new("spec"));
    let name = object.deep(&["metadata", "name"]).as_str().unwrap_or_default();
    if name.len() > 52 {
        faults.invalid(&Path::new("metadata").child("name"), name, "must be no more than 52 characters");
    }
    let schedule = spec.text("schedule");
    if schedule.is_empty() {
        faults.required(&path.child("schedule"), "");
    } else if let Some(complaint) = schedule_complaint(schedule) {
        faults.invalid(&path.child("schedule"), schedule, &complaint);
    }
    not_negative(spec, "startingDeadlineSeconds", &path, faults);
    const POLICIES: &[&str] = &["Allow", "Forbid", "Replace"];
    match spec.text("concurrencyPolicy") {
        "" => faults.required(&path.child("concurrencyPolicy"), ""),
        policy if POLICIES.contains(&policy) => {}
        other => faults.unsupported(&path.child("concurrencyPolicy"), other, POLICIES),
    }
    not_negative(spec, "successfulJobsHistoryLimit", &path, faults);
    not_negative(spec, "failedJobsHistoryLimit", &path, faults);
    let (template, here) = (spec.at("jobTemplate"), path.child("jobTemplate"));
    labels(template.deep(&["metadata", "labels"]), &here.child("labels"), faults);
    job_spec(template.at("spec"), &here.child("spec"), faults);
}

/// What is wrong with a cron schedule: five fields, or a word such as `@hourly`.
fn schedule_complaint(schedule: &str) -> Option<String> {
    if let Some(word) = schedule.strip_prefix('@') {
        let known = ["yearly", "annually", "monthly", "weekly", "daily", "midnight", "hourly"].contains(&word)
            || word.starts_with("every ");
        return (!known).then(|| format!("unrecognized descriptor: {schedule}"));
    }
    let fields: Vec<&str> = schedule.split_whitespace().collect();
    if fields.len() != 5 {
        let shown: Vec<String> = fields.iter().map(|field| (*field).to_owned()).collect();
        return Some(format!("expected exactly 5 fields, found {}: [{}]", fields.len(), shown.join(" ")));
    }
    let limits = [(0, 59), (0, 23), (1, 31), (1, 12), (0, 6)];
    fields
        .iter()
        .zip(limits)
        .find_map(|(field, (low, high))| field.split(',').find_map(|part| range_complaint(part, low, high)))
}

fn range_complaint(part: &str, low: u32, high: u32) -> Option<String> {
    const NAMES: &[&str] = &[
        "jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec", "sun", "mon", "tue", "wed",
        "thu", "fri", "sat",
    ];
    let (range, step) = part.split_once('/').map_or((part, None), |(range, step)| (range, Some(step)));
    if let Some(step) = step {
        match step.parse::<u32>() {
            Ok(0) => return Some(format!("step of range should be a positive number: {part}")),
            Ok(_) => {}
            Err(_) => {
                return Some(format!(
                    "failed to parse int from {step}: strconv.Atoi: parsing \"{step}\": invalid syntax"
                ));
            }
        }
    }
    if matches!(range, "*" | "?") {
        return None;
    }
    for bound in range.split('-') {
        if NAMES.contains(&bound.to_lowercase().as_str()) {
            continue;
        }
        match bound.parse::<u32>() {
            Ok(number) if number < low => {
                return Some(format!("beginning of range ({number}) below minimum ({low}): {part}"));
            }
            Ok(number) if number > high => {
                return Some(format!("end of range ({number}) above maximum ({high}): {part}"));
            }
            Ok(_) => {}
            Err(_) => {
                return Some(format!(
                    "failed to parse int from {bound}: strconv.Atoi: parsing \"{bound}\": invalid syntax"
                ));
            }
        }
    }
    None
}
