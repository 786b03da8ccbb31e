//! Under which keys of `tp_services` a table's frontends are, and in which order they are written.

use towpath_model::Family;
use towpath_model::desired::{Frontend, FrontendTarget, ServiceChanges, ServiceTable};

use crate::abi::{Addr, Be16, ServiceKey};

pub(super) fn key_of(frontend: &Frontend) -> ServiceKey {
    ServiceKey {
        addr: frontend.address.map(Addr::new).unwrap_or_else(|| Addr::any(frontend.family)),
        port: Be16::new(frontend.port),
        proto: frontend.protocol.number(),
        inside: 0,
    }
}

fn inside_key_of(frontend: &Frontend) -> ServiceKey {
    ServiceKey { inside: 1, ..key_of(frontend) }
}

/// Frontends and what is for this node's clients at them in the order in which it is written: what is found first comes first. A
/// NodePort that comes to be for some nodes' endpoints only is so to nobody for whom there is an entry that leads elsewhere.
fn in_order<'a, T>(
    inside: impl Iterator<Item = (&'a Frontend, T)>,
    frontends: impl Iterator<Item = (&'a Frontend, T)> + Clone,
) -> impl Iterator<Item = (ServiceKey, &'a Frontend, T)> {
    let of_node = |(frontend, _): &(&Frontend, T)| frontend.address.is_none();
    let (first, last) = (frontends.clone().filter(move |entry| !of_node(entry)), frontends.filter(of_node));
    let inside = inside.map(|(frontend, target)| (inside_key_of(frontend), frontend, target));
    inside.chain(first.chain(last).map(|(frontend, target)| (key_of(frontend), frontend, target)))
}

/// Every entry that a table asks for, but for the marks of addresses.
pub(super) fn entries(table: &ServiceTable) -> impl Iterator<Item = (ServiceKey, &Frontend, &FrontendTarget)> {
    in_order(
        table.inside.iter().map(|(frontend, target)| (frontend, &**target)),
        table.frontends.iter().map(|(frontend, target)| (frontend, &**target)),
    )
}

/// As [`entries`], of changes; none: it is gone.
pub(super) fn changed(
    changes: &ServiceChanges,
) -> impl Iterator<Item = (ServiceKey, &Frontend, Option<&FrontendTarget>)> {
    in_order(
        changes.inside.iter().map(|(frontend, target)| (frontend, target.as_deref())),
        changes.frontends.iter().map(|(frontend, target)| (frontend, target.as_deref())),
    )
}

/// The key under which an address is marked as a Service's, of an entry there.
pub(super) fn mark_of(key: &ServiceKey) -> Option<ServiceKey> {
    let any = [Addr::any(Family::V4), Addr::any(Family::V6)].contains(&key.addr);
    (!any && key.inside == 0 && key.port != Be16::default())
        .then(|| ServiceKey { addr: key.addr, ..ServiceKey::default() })
}

pub(super) fn is_mark(key: &ServiceKey) -> bool {
    key.proto == 0 && key.port == Be16::default()
}
