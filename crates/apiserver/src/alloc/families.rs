//! `ipFamilies` and `ipFamilyPolicy` of Services.

use std::net::IpAddr;

use serde_json::{Value, json};

use crate::meta;
use crate::resource::FieldError;
use crate::rest::Call;
use crate::status::ApiError;

/// An address family under its Kubernetes name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }

    fn other(self) -> Self {
        match self {
            Self::V4 => Self::V6,
            Self::V6 => Self::V4,
        }
    }

    fn of(text: &str) -> Option<Self> {
        match text.parse::<IpAddr>().ok()? {
            IpAddr::V4(_) => Some(Self::V4),
            IpAddr::V6(_) => Some(Self::V6),
        }
    }

    fn named(name: &str) -> Option<Self> {
        [Self::V4, Self::V6].into_iter().find(|family| family.name() == name)
    }
}

/// Fills in policy and families from what is given, the addresses asked for and what the cluster has.
pub(super) fn fill(call: &Call, service: &mut Value, available: &[Family]) -> Result<(), ApiError> {
    let primary = available.first().copied().unwrap_or(Family::V4);
    let mut addresses = meta::strings(service.pointer("/spec/clusterIPs"));
    let single = meta::text(service, "/spec/clusterIP").to_owned();
    if addresses.is_empty() && !single.is_empty() {
        addresses.push(single.clone());
        meta::object_at(service, "spec").insert("clusterIPs".to_owned(), json!([single]));
    } else if single.is_empty()
        && let Some(first) = addresses.first()
    {
        let first = first.clone();
        meta::object_at(service, "spec").insert("clusterIP".to_owned(), first.into());
    }
    let headless = addresses.first().is_some_and(|address| address == "None");
    let selector = service.pointer("/spec/selector").and_then(Value::as_object).is_some_and(|map| !map.is_empty());
    let policy = meta::text(service, "/spec/ipFamilyPolicy").to_owned();
    let given = meta::strings(service.pointer("/spec/ipFamilies"));
    let mut families: Vec<Family> = given.iter().filter_map(|name| Family::named(name)).collect();
    for (index, address) in addresses.iter().enumerate() {
        if let Some(family) = Family::of(address)
            && families.len() == index
        {
            families.push(family);
        }
    }
    let any_family = headless && !selector;
    let policy = match policy.as_str() {
        "" if any_family && given.is_empty() => "RequireDualStack",
        "" if families.len() == 2 => "RequireDualStack",
        "" => "SingleStack",
        given => given,
    }
    .to_owned();
    if !any_family {
        check(call, service, &policy, &families, available)?;
    }
    let first = families.first().copied().unwrap_or(primary);
    let both = match policy.as_str() {
        "RequireDualStack" => true,
        "PreferDualStack" => available.len() == 2,
        _ => false,
    };
    let wanted = if both {
        vec![first, first.other()]
    } else if families.is_empty() || policy == "SingleStack" && families.len() < 2 {
        vec![first]
    } else {
        families
    };
    let names: Vec<&str> = wanted.iter().map(|family| family.name()).collect();
    let spec = meta::object_at(service, "spec");
    spec.insert("ipFamilyPolicy".to_owned(), policy.into());
    spec.insert("ipFamilies".to_owned(), json!(names));
    if spec.get("clusterIPs").and_then(Value::as_array).is_some_and(|list| list.len() > names.len())
        && let Some(Value::Array(list)) = spec.get_mut("clusterIPs")
    {
        // A change to one family gives up the second address.
        list.truncate(names.len());
    }
    Ok(())
}

fn check(
    call: &Call,
    service: &Value,
    policy: &str,
    families: &[Family],
    available: &[Family],
) -> Result<(), ApiError> {
    let mut errors = Vec::new();
    let mut refuse = |field: String, message: String| {
        errors.push(FieldError { reason: "FieldValueInvalid", field, message });
    };
    if policy == "RequireDualStack" && available.len() < 2 {
        refuse(
            "spec.ipFamilyPolicy".to_owned(),
            format!("Invalid value: {policy:?}: this cluster is not configured for dual-stack services"),
        );
    }
    for (index, family) in families.iter().enumerate() {
        if !available.contains(family) {
            refuse(
                format!("spec.ipFamilies[{index}]"),
                format!("Invalid value: {:?}: not configured on this cluster", family.name()),
            );
        }
    }
    if errors.is_empty() { Ok(()) } else { Err(ApiError::invalid_object(&call.kind, meta::name(service), &errors)) }
}
