//! Where pods' own addresses are to be seen outside the cluster: what is configured, and what the ConfigMap `kube-system/ip-masq-agent` names
//! besides, as that agent reads it (<https://github.com/kubernetes-sigs/ip-masq-agent>).
//!
//! What the ConfigMap said last is kept on disk: an agent that starts while the API server is away masquerades no more than the one before it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ipnet::IpNet;
use serde::Deserialize;

/// The ConfigMap's key.
const KEY: &str = "config";
/// As ip-masq-agent allows.
const MOST: usize = 64;

/// The file of ip-masq-agent. Other fields are no mistake of anybody's here.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Config {
    #[serde(rename = "nonMasqueradeCIDRs")]
    non_masquerade_cidrs: Vec<String>,
    masq_link_local: bool,
    #[serde(rename = "masqLinkLocalIPv6")]
    masq_link_local_ipv6: bool,
}

/// Destinations that a ConfigMap with this in it names. Nothing: there is none, or it has no such key.
///
/// # Errors
/// It holds something else than such a configuration; the message says what.
pub fn named(data: &BTreeMap<String, String>) -> Result<Vec<IpNet>> {
    let Some(text) = data.get(KEY) else { return Ok(Vec::new()) };
    // An empty file is a configuration that names nothing.
    let config: Option<Config> = serde_saphyr::from_str(text).with_context(|| format!("key {KEY}"))?;
    let config = config.unwrap_or_default();
    if config.non_masquerade_cidrs.len() > MOST {
        bail!("nonMasqueradeCIDRs has {} entries, more than {MOST}", config.non_masquerade_cidrs.len());
    }
    let mut named = Vec::new();
    for text in &config.non_masquerade_cidrs {
        let net: IpNet = text.parse().with_context(|| format!("nonMasqueradeCIDRs: {text:?} is no CIDR"))?;
        if net.trunc() != net {
            bail!("nonMasqueradeCIDRs: {text:?} has bits set beyond its prefix; {} is meant", net.trunc());
        }
        named.push(net);
    }
    for (masqueraded, range) in [(config.masq_link_local, "169.254.0.0/16"), (config.masq_link_local_ipv6, "fe80::/10")]
    {
        if !masqueraded {
            named.push(range.parse()?);
        }
    }
    Ok(named)
}

/// What is in force.
#[derive(Debug)]
pub struct NonMasquerade {
    configured: Vec<IpNet>,
    named: Vec<IpNet>,
    file: PathBuf,
    /// What was said last is not on disk.
    unkept: bool,
}

impl NonMasquerade {
    /// As an earlier run left it in `state_dir`, with what is configured now.
    pub fn at_start(state_dir: &Path, configured: &[IpNet]) -> Self {
        let file = state_dir.join("ip-masq-agent.json");
        // One that is damaged counts as none: the API server knows better, soon.
        let named = std::fs::read(&file).ok().and_then(|text| serde_json::from_slice(&text).ok());
        Self { configured: configured.to_vec(), named: named.unwrap_or_default(), file, unkept: false }
    }

    /// The destinations.
    pub fn in_force(&self) -> Vec<IpNet> {
        let mut all: Vec<IpNet> = self.configured.iter().chain(&self.named).copied().collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Takes what the ConfigMap says now; whether that is something else. What cannot be understood changes nothing.
    ///
    /// # Errors
    /// As [`named`].
    pub fn follow(&mut self, data: &BTreeMap<String, String>) -> Result<bool> {
        let now = named(data)?;
        let other = now != self.named;
        self.named = now;
        self.unkept |= other;
        Ok(other)
    }

    /// Keeps it for the next start, if it is something else than what is kept.
    ///
    /// # Errors
    /// The file cannot be written; the next call tries again.
    pub fn keep(&mut self) -> Result<()> {
        if self.unkept {
            crate::disk::write_atomically(&self.file, &serde_json::to_vec(&self.named)?)
                .with_context(|| format!("could not write {}", self.file.display()))?;
            self.unkept = false;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(config: &str) -> BTreeMap<String, String> {
        BTreeMap::from([(KEY.to_owned(), config.to_owned())])
    }

    fn texts(nets: &[IpNet]) -> Vec<String> {
        nets.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_config_map_names_what_ip_masq_agent_would_leave_alone() {
        assert!(named(&BTreeMap::new()).unwrap().is_empty(), "there is none");
        assert!(named(&BTreeMap::from([("other".to_owned(), "x".to_owned())])).unwrap().is_empty());
        let yaml = "nonMasqueradeCIDRs:\n- 10.0.0.0/8\n- fd00::/8\nmasqLinkLocal: true\nresyncInterval: 60s\n";
        assert_eq!(texts(&named(&data(yaml)).unwrap()), ["10.0.0.0/8", "fd00::/8", "fe80::/10"]);
        let json = r#"{"nonMasqueradeCIDRs": ["192.168.0.0/16"], "masqLinkLocalIPv6": true}"#;
        assert_eq!(texts(&named(&data(json)).unwrap()), ["192.168.0.0/16", "169.254.0.0/16"]);
        for empty in ["", "{}", "# nothing\n"] {
            assert_eq!(texts(&named(&data(empty)).unwrap()), ["169.254.0.0/16", "fe80::/10"], "{empty:?}");
        }
    }

    #[test]
    fn what_it_would_refuse_is_refused_with_the_reason() {
        let many = format!("nonMasqueradeCIDRs: [{}]", vec!["10.0.0.0/8"; MOST + 1].join(", "));
        for (wrong, why) in [
            ("nonMasqueradeCIDRs: [10.0.0.0]", "no CIDR"),
            ("nonMasqueradeCIDRs: [10.0.0.1/8]", "10.0.0.0/8 is meant"),
            ("nonMasqueradeCIDRs: 7", "key config"),
            ("[", "key config"),
            (many.as_str(), "more than 64"),
        ] {
            let error = format!("{:#}", named(&data(wrong)).unwrap_err());
            assert!(error.contains(why), "{wrong}: {error}");
        }
    }

    #[test]
    fn what_was_said_last_holds_over_a_start_and_over_nonsense() {
        let dir = tempfile::tempdir().unwrap();
        let configured = ["203.0.113.0/24".parse().unwrap()];
        let start = || NonMasquerade::at_start(dir.path(), &configured);
        let mut now = start();
        assert_eq!(texts(&now.in_force()), ["203.0.113.0/24"]);
        assert!(
            now.follow(&data("{nonMasqueradeCIDRs: [10.0.0.0/8], masqLinkLocal: true, masqLinkLocalIPv6: true}"))
                .unwrap()
        );
        assert!(now.follow(&data("[")).is_err());
        now.keep().unwrap();
        assert_eq!(texts(&start().in_force()), ["10.0.0.0/8", "203.0.113.0/24"]);
        assert!(now.follow(&BTreeMap::new()).unwrap());
        assert!(!now.follow(&BTreeMap::new()).unwrap());
        now.keep().unwrap();
        assert_eq!(texts(&start().in_force()), ["203.0.113.0/24"]);
        std::fs::write(dir.path().join("ip-masq-agent.json"), "{").unwrap();
        assert_eq!(texts(&start().in_force()), ["203.0.113.0/24"], "damaged");
    }
}
