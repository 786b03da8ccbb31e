//! The ranges of Service addresses that are in force: those of `ServiceCIDR` objects, or the configured ones where the API has no such kind.
//!
//! What the objects said last is kept on disk: an agent that starts refuses on its node what the one before it refused, also while the API
//! server is away, and no connection meets the configured ranges in between.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use ipnet::IpNet;
use towpath_model::ServiceCidr;
use towpath_plan::service_ranges::{Own, ServiceRanges, plan};

use crate::index::ServiceCidrs;

/// What is in force.
#[derive(Debug)]
pub struct Ranges {
    configured: Vec<IpNet>,
    objects: Option<BTreeMap<String, ServiceCidr>>,
    in_force: Vec<IpNet>,
    file: PathBuf,
    /// What the API said last is not on disk.
    unkept: bool,
}

impl Ranges {
    /// As an earlier run left them in `state_dir`, as far as they still fit; else `configured`.
    pub fn at_start(state_dir: &Path, configured: &[IpNet], own: &Own<'_>) -> Self {
        let file = state_dir.join("service-cidrs.json");
        // One that is damaged counts as none: the API server knows better, soon.
        let objects: Option<BTreeMap<String, ServiceCidr>> =
            std::fs::read(&file).ok().and_then(|text| serde_json::from_slice(&text).ok());
        let in_force = plan(objects.as_ref(), configured, own).ranges;
        Self { configured: configured.to_vec(), objects, in_force, file, unkept: false }
    }

    /// The ranges that hold.
    pub fn in_force(&self) -> &[IpNet] {
        &self.in_force
    }

    /// Takes what the API says now.
    pub fn decide(&mut self, said: &ServiceCidrs, own: &Own<'_>) -> ServiceRanges {
        let objects = match said {
            ServiceCidrs::Unknown => self.objects.clone(),
            ServiceCidrs::NotServed => None,
            ServiceCidrs::Listed(all) => Some(all.clone()),
        };
        self.unkept |= objects != self.objects;
        self.objects = objects;
        let planned = plan(self.objects.as_ref(), &self.configured, own);
        self.in_force.clone_from(&planned.ranges);
        planned
    }

    /// Keeps what the API said for the next start, if that is something else than what is kept.
    ///
    /// # Errors
    /// The file cannot be written or removed; the next call tries again.
    pub fn keep(&mut self) -> Result<()> {
        if self.unkept {
            self.write()?;
            self.unkept = false;
        }
        Ok(())
    }

    fn write(&self) -> Result<()> {
        let Some(objects) = &self.objects else {
            return match std::fs::remove_file(&self.file) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    Err(error).with_context(|| format!("could not remove {}", self.file.display()))
                }
                _ => Ok(()),
            };
        };
        crate::disk::write_atomically(&self.file, &serde_json::to_vec_pretty(objects)?)
            .with_context(|| format!("could not write {}", self.file.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use towpath_model::World;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn listed(ranges: &[&str]) -> ServiceCidrs {
        ServiceCidrs::Listed(BTreeMap::from([("kubernetes".to_owned(), ServiceCidr { ranges: nets(ranges) })]))
    }

    #[test]
    fn what_was_said_last_holds_over_a_start_until_the_api_says_otherwise() {
        let (dir, world) = (tempfile::tempdir().unwrap(), World::default());
        let own = Own { world: &world, cluster: &[], dns: &[] };
        let configured = nets(&["10.96.0.0/12"]);
        let start = || Ranges::at_start(dir.path(), &configured, &own);
        let mut ranges = start();
        assert_eq!(ranges.decide(&ServiceCidrs::Unknown, &own), plan(None, &configured, &own));
        ranges.keep().unwrap();
        assert!(!dir.path().join("service-cidrs.json").exists(), "nothing was said");
        ranges.decide(&listed(&["10.43.0.0/16"]), &own);
        ranges.keep().unwrap();

        let mut again = start();
        assert_eq!(again.in_force(), nets(&["10.43.0.0/16"]));
        assert_eq!(again.decide(&ServiceCidrs::Unknown, &own).ranges, nets(&["10.43.0.0/16"]));
        again.decide(&ServiceCidrs::NotServed, &own);
        assert_eq!(again.in_force(), configured);
        again.keep().unwrap();
        again.keep().unwrap();
        assert_eq!(start().in_force(), configured);

        std::fs::write(dir.path().join("service-cidrs.json"), "{").unwrap();
        assert_eq!(start().in_force(), configured, "damaged");
    }

    #[test]
    fn what_could_not_be_kept_is_kept_later_though_nothing_new_is_said() {
        let (dir, world) = (tempfile::tempdir().unwrap(), World::default());
        let own = Own { world: &world, cluster: &[], dns: &[] };
        let place = dir.path().join("state");
        let mut ranges = Ranges::at_start(&place, &[], &own);
        // The disk has no room, say: here it has no directory.
        std::fs::write(&place, "").unwrap();
        ranges.decide(&listed(&["10.43.0.0/16"]), &own);
        ranges.keep().unwrap_err();
        std::fs::remove_file(&place).unwrap();
        std::fs::create_dir(&place).unwrap();
        ranges.decide(&listed(&["10.43.0.0/16"]), &own);
        ranges.keep().unwrap();
        assert_eq!(Ranges::at_start(&place, &[], &own).in_force(), nets(&["10.43.0.0/16"]));
    }

    #[test]
    fn what_is_kept_gives_way_to_a_pod_range_that_came_since() {
        let (dir, world) = (tempfile::tempdir().unwrap(), World::default());
        let own = Own { world: &world, cluster: &[], dns: &[] };
        let mut ranges = Ranges::at_start(dir.path(), &[], &own);
        ranges.decide(&listed(&["10.43.0.0/16"]), &own);
        ranges.keep().unwrap();
        let pods = nets(&["10.43.9.0/24"]);
        let now = Ranges::at_start(dir.path(), &nets(&["10.96.0.0/12"]), &Own { cluster: &pods, ..own });
        assert_eq!(now.in_force(), nets(&["10.96.0.0/12"]));
    }
}
