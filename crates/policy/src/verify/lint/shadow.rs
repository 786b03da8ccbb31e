//! Rules that can never decide: another one that is asked first, or says as much, is about every flow that they are about.

use super::{Code, Finding};
use crate::verify::addresses::Addresses;
use crate::verify::clauses::{Action, Clause, Namespaces, PeerSet, PodSet, PortSet, Tiers};
use crate::verify::ports::Ports;
use towpath_model::{DomainName, Family, Protocol, Selector};

/// How many pairs of rules are compared at most.
const MOST: usize = 3_000_000;

struct Seen<'t, 'a> {
    subject: PodSet<'a>,
    clause: &'t Clause<'a>,
}

/// Finds them, in one direction.
pub(super) fn find(tiers: &Tiers<'_>, found: &mut Vec<Finding>) {
    let mut left = MOST;
    let mut whole = true;
    let admin: Vec<Seen<'_, '_>> = tiers.admin.iter().map(|r| Seen { subject: r.subject, clause: &r.clause }).collect();
    let baseline: Vec<Seen<'_, '_>> =
        tiers.baseline.iter().map(|r| Seen { subject: r.subject, clause: &r.clause }).collect();
    for list in [&admin, &baseline] {
        for (index, later) in list.iter().enumerate() {
            let earlier = list.get(..index).unwrap_or_default();
            whole &= compare(later, earlier, &mut left, found, |_| true);
        }
    }
    // What a rule of the admin tier passes on comes to NetworkPolicy past all that are after it.
    let passes = tiers.admin.iter().position(|ranked| ranked.clause.action == Action::Pass).unwrap_or(admin.len());
    let deciding = admin.get(..passes).unwrap_or_default();
    for (namespace, policies) in &tiers.isolation {
        let own: Vec<Seen<'_, '_>> = policies
            .iter()
            .flat_map(|isolation| {
                let subject = PodSet { namespaces: Namespaces::Named(namespace), pods: isolation.selector };
                isolation.clauses.iter().map(move |clause| Seen { subject, clause })
            })
            .collect();
        for (index, one) in own.iter().enumerate() {
            let before = found.len();
            whole &= compare(one, deciding, &mut left, found, |_| true);
            if found.len() > before {
                continue;
            }
            // Of two that say the same, the first stays.
            let earlier = own.get(..index).unwrap_or_default();
            let after = own.get(index + 1..).unwrap_or_default();
            whole &= compare(one, earlier, &mut left, found, |_| true);
            if found.len() == before {
                let wider = |clause: &Clause<'_>| !covers_clause(one.clause, clause);
                whole &= compare(one, after, &mut left, found, wider);
            }
        }
    }
    if !whole {
        found.push(Finding::new(Code::Unchecked, "all policies", "", format!("TP004 ended after {MOST} comparisons")));
    }
}

/// Whether one of the others is about all that it is about; says so. False if there was no time to look.
fn compare(
    one: &Seen<'_, '_>,
    others: &[Seen<'_, '_>],
    left: &mut usize,
    found: &mut Vec<Finding>,
    counts: impl Fn(&Clause<'_>) -> bool,
) -> bool {
    if is_nothing(one.clause) {
        return true;
    }
    for other in others {
        let Some(rest) = left.checked_sub(1) else { return false };
        *left = rest;
        if covers_clause(other.clause, one.clause) && covers_pods(other.subject, one.subject) && counts(other.clause) {
            let by = &other.clause.source;
            let who = if by.policy == one.clause.source.policy { String::new() } else { format!("{}: ", by.policy) };
            let message = format!("{who}{} is about all of it already", by.path);
            let source = &one.clause.source;
            found.push(Finding::new(Code::Shadowed, &source.policy, &source.path, message));
            return true;
        }
    }
    true
}

/// A rule that is about nothing is not said to be covered.
fn is_nothing(clause: &Clause<'_>) -> bool {
    let nobody = matches!(&clause.peer, PeerSet::Addresses(block) if block.is_empty());
    let unlucky = matches!(&clause.peer, PeerSet::Pods(set) if super::is_impossible(set.pods));
    nobody || unlucky || (clause.ports.fixed.is_empty() && clause.ports.named.is_empty())
}

/// Whether a name stands for all that another stands for.
fn stands_for(wide: &DomainName, narrow: &DomainName) -> bool {
    wide == narrow || (wide.below && wide.matches(&narrow.name))
}

fn covers_clause(wide: &Clause<'_>, narrow: &Clause<'_>) -> bool {
    let peers = match (&wide.peer, &narrow.peer) {
        (PeerSet::Anyone, _) => true,
        (PeerSet::Pods(a), PeerSet::Pods(b)) => covers_pods(*a, *b),
        (PeerSet::Nodes(a), PeerSet::Nodes(b)) => covers_labels(a, b),
        (PeerSet::Addresses(a), PeerSet::Addresses(b)) => b.0.is_within(&a.0),
        (PeerSet::Names(a), PeerSet::Names(b)) => b.iter().all(|name| a.iter().any(|wide| stands_for(wide, name))),
        // Whatever they stand for.
        (PeerSet::Addresses(a), PeerSet::Names(_)) => {
            [Family::V4, Family::V6].iter().all(|family| Addresses::of_family(*family).0.is_within(&a.0))
        }
        _ => false,
    };
    peers && covers_ports(&wide.ports, &narrow.ports)
}

fn covers_ports(wide: &PortSet<'_>, narrow: &PortSet<'_>) -> bool {
    let all_of = |protocol: Protocol| Ports::of_protocol(protocol).0.is_within(&wide.fixed.0);
    narrow.fixed.0.is_within(&wide.fixed.0)
        && narrow.named.iter().all(|named| wide.named.contains(named) || all_of(named.1))
}

fn covers_pods(wide: PodSet<'_>, narrow: PodSet<'_>) -> bool {
    let namespaces = match (wide.namespaces, narrow.namespaces) {
        (Namespaces::Named(a), Namespaces::Named(b)) => a == b,
        (Namespaces::Matching(a), Namespaces::Matching(b)) => covers_labels(a, b),
        (Namespaces::Matching(a), Namespaces::Named(_)) => a.is_everything(),
        (Namespaces::Named(_), Namespaces::Matching(_)) => false,
    };
    namespaces && covers_labels(wide.pods, narrow.pods)
}

/// Whether every requirement of the wide one is one of the narrow one: enough, and what people write.
fn covers_labels(wide: &Selector, narrow: &Selector) -> bool {
    wide.requirements().all(|wanted| narrow.requirements().any(|have| have == wanted))
}
