//! Ids that an earlier run of the agent left in the maps, in the planners' words.

use std::collections::BTreeSet;
use std::net::IpAddr;

use towpath_model::desired::{BackendAddress, BackendId, ClassId, Frontend, PolicyImage, RuleId, ServiceId, SetId};
use towpath_model::{Family, Protocol, family_of};

use super::Programs;
use super::error::Result;
use crate::abi::{Addr, Backend, ServiceKey};

/// Ids that are in the maps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Adopted {
    /// Policy sets.
    pub sets: BTreeSet<SetId>,
    /// Classes.
    pub classes: BTreeSet<ClassId>,
    /// Rules, those included that only connections still name.
    pub rules: BTreeSet<RuleId>,
    /// The maps of policy themselves. What rules stand for and who isolates is in no map.
    pub policy: PolicyImage,
    /// Backends.
    pub backends: Vec<(BackendId, BackendAddress)>,
    /// Frontends and the Service port they belong to.
    pub frontends: Vec<(Frontend, ServiceId)>,
    /// The same of what is for this node's own clients.
    pub inside: Vec<(Frontend, ServiceId)>,
}

pub(super) fn protocol(number: u8) -> Option<Protocol> {
    Protocol::ALL.into_iter().find(|p| p.number() == number)
}

fn backend(held: &Backend) -> Option<BackendAddress> {
    Some(BackendAddress { address: held.addr.ip(), port: held.port.get(), protocol: protocol(held.proto)? })
}

/// The frontend of a key; none for the mark of a Service's address.
fn frontend(key: &ServiceKey) -> Option<Frontend> {
    let protocol = protocol(key.proto)?;
    let any = [Family::V4, Family::V6].into_iter().find(|family| Addr::any(*family) == key.addr);
    let (address, family): (Option<IpAddr>, Family) = match any {
        Some(family) => (None, family),
        None => (Some(key.addr.ip()), family_of(key.addr.ip())),
    };
    Some(Frontend { address, family, port: key.port.get(), protocol })
}

impl Programs {
    /// Ids that an earlier run of the agent gave out, for planners that go on with them. Reads the connection table.
    ///
    /// # Errors
    /// The table cannot be read.
    pub fn adopted(&self) -> Result<Adopted> {
        let (mut sets, classes, mut rules) = self.policy.used_ids();
        let audited = self.audited()?;
        sets.extend(audited.iter().map(|held| held.set));
        rules.extend(audited.iter().map(|held| held.rule));
        for connection in self.connections()? {
            rules.extend([connection.egress, connection.ingress].into_iter().flatten().map(|judged| judged.rule));
        }
        let backends = self.services.backends().iter();
        let entries = |inside: u8| -> Vec<(Frontend, ServiceId)> {
            let entries = self.services.services().iter().filter(|(key, _)| key.inside == inside);
            entries.filter_map(|(key, held)| Some((frontend(key)?, ServiceId(held.id)))).collect()
        };
        Ok(Adopted {
            sets,
            classes,
            rules,
            policy: self.policy.held(),
            backends: backends.filter_map(|(id, held)| Some((BackendId(*id), backend(held)?))).collect(),
            frontends: entries(0),
            inside: entries(1),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::Be16;

    #[test]
    fn keys_become_frontends_again_and_marks_do_not() {
        let key = |addr, proto| ServiceKey { addr, port: Be16::new(80), proto, inside: 0 };
        let found = frontend(&key(Addr::new("10.96.0.1".parse().unwrap()), 6)).unwrap();
        assert_eq!((found.address, found.family, found.port), (Some("10.96.0.1".parse().unwrap()), Family::V4, 80));
        let node_port = frontend(&key(Addr::any(Family::V6), 17)).unwrap();
        assert_eq!((node_port.address, node_port.family), (None, Family::V6));
        assert_eq!(frontend(&key(Addr::any(Family::V4), 6)).unwrap().family, Family::V4);
        assert_eq!(frontend(&key(Addr::new("10.96.0.1".parse().unwrap()), 0)), None);
    }
}
