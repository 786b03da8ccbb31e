//! Ranges of Service addresses as `ServiceCIDR` objects say them (networking.k8s.io/v1, KEP-1880).

use ipnet::IpNet;
use k8s_openapi::api::networking::v1 as networking;
use serde::{Deserialize, Serialize};

use crate::{Invalid, family_of};

/// One object: the ranges that it adds. While it is there its ranges count, also when it is being deleted: it stays for as long as
/// Services have addresses in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceCidr {
    /// `spec.cidrs`, at most one a family.
    pub ranges: Vec<IpNet>,
}

impl TryFrom<&networking::ServiceCIDR> for ServiceCidr {
    type Error = Invalid;

    fn try_from(object: &networking::ServiceCIDR) -> Result<Self, Invalid> {
        let who = format!("ServiceCIDR {}", object.metadata.name.as_deref().unwrap_or_default());
        let texts = object.spec.as_ref().and_then(|spec| spec.cidrs.as_ref()).into_iter().flatten();
        let mut ranges: Vec<IpNet> = Vec::new();
        for (index, text) in texts.enumerate() {
            let field = format!("spec.cidrs[{index}]");
            let range: IpNet = text.parse().map_err(|e| Invalid::new(&who, &field, format!("{text:?}: {e}")))?;
            if ranges.iter().any(|other| family_of(other.addr()) == family_of(range.addr())) {
                return Err(Invalid::new(&who, field, format!("{text:?}: a second range of its family")));
            }
            ranges.push(range.trunc());
        }
        if ranges.is_empty() {
            return Err(Invalid::new(&who, "spec.cidrs", "none"));
        }
        Ok(Self { ranges })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(cidrs: &str) -> Result<ServiceCidr, Invalid> {
        let text = format!(r#"{{"metadata": {{"name": "more"}}, "spec": {{"cidrs": {cidrs}}}}}"#);
        ServiceCidr::try_from(&serde_json::from_str::<networking::ServiceCIDR>(&text).unwrap())
    }

    #[test]
    fn one_range_a_family_is_taken_and_nonsense_is_named() {
        let both = parse(r#"["10.97.0.0/24", "fd00:97::/112"]"#).unwrap();
        assert_eq!(both.ranges.iter().map(ToString::to_string).collect::<Vec<_>>(), ["10.97.0.0/24", "fd00:97::/112"]);
        for odd in ["[]", "null", r#"["10.97.0.0"]"#, r#"["10.97.0.0/24", "10.98.0.0/24"]"#] {
            let said = parse(odd).unwrap_err().to_string();
            assert!(said.contains("ServiceCIDR more") && said.contains("spec.cidrs"), "{said}");
        }
    }
}
