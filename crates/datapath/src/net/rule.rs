//! Policy routing rules of ours: packets from our pods look into [`super::NODE_TABLE`] first.

use ipnet::IpNet;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::route::RouteProtocol;
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage as Message};

use super::error::Error;
use super::netlink::{Netlink, Request};
use super::{NODE_TABLE, PROTOCOL};

/// Makes our rules exactly "from each of `sources`, look into the node table"; what was changed, in words.
pub fn ensure(netlink: &mut Netlink, sources: &[IpNet]) -> Result<Vec<String>, Error> {
    let (mut requests, mut kept) = (Vec::new(), Vec::new());
    for present in list(netlink)? {
        match source_of(&present) {
            Some(source) if sources.contains(&source) && !kept.contains(&source) && same(&present) => kept.push(source),
            source => {
                let what = source.map_or_else(|| "of an unknown form".to_owned(), |s| format!("from {s}"));
                requests.push(Request::new(format!("delete routing rule {what}"), Message::DelRule(present), 0));
            }
        }
    }
    for source in sources.iter().filter(|s| !kept.contains(s)) {
        let operation = format!("add routing rule from {source} to table {NODE_TABLE}");
        requests.push(Request::new(operation, Message::NewRule(message(*source)), NLM_F_CREATE | NLM_F_EXCL));
    }
    let done = requests.iter().map(|r| r.operation.clone()).collect();
    netlink.batch(requests).into_iter().collect::<Result<(), Error>>()?;
    Ok(done)
}

/// Whether the node routes by its main table alone as far as its own packets go: besides ours there are only the three rules
/// that the kernel comes with. A rule of an administrator, of a VRF or of another program says otherwise.
pub fn is_plain(netlink: &mut Netlink) -> Result<bool, Error> {
    Ok(all(netlink)?.iter().all(|rule| is_ours(rule) || is_the_kernels(rule)))
}

fn is_ours(rule: &RuleMessage) -> bool {
    rule.attributes.contains(&RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL)))
}

/// Tables local, main and default, under the protocol that nobody but the kernel gives its rules.
fn is_the_kernels(rule: &RuleMessage) -> bool {
    let known = [libc::RT_TABLE_LOCAL, libc::RT_TABLE_MAIN, libc::RT_TABLE_DEFAULT];
    known.contains(&rule.header.table) && rule.attributes.contains(&RuleAttribute::Protocol(RouteProtocol::Kernel))
}

fn list(netlink: &mut Netlink) -> Result<Vec<RuleMessage>, Error> {
    Ok(all(netlink)?.into_iter().filter(is_ours).collect())
}

fn all(netlink: &mut Netlink) -> Result<Vec<RuleMessage>, Error> {
    let mut rules = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut filter = RuleMessage::default();
        filter.header.family = family;
        for answer in netlink.dump("list routing rules", Message::GetRule(filter))? {
            if let Message::NewRule(rule) = answer {
                rules.push(rule);
            }
        }
    }
    Ok(rules)
}

fn message(source: IpNet) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.family = if source.addr().is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    rule.header.src_len = source.prefix_len();
    rule.header.action = RuleAction::ToTable;
    rule.attributes = vec![
        RuleAttribute::Source(source.network()),
        RuleAttribute::Priority(NODE_TABLE),
        RuleAttribute::Table(NODE_TABLE),
        RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL)),
    ];
    rule
}

fn source_of(rule: &RuleMessage) -> Option<IpNet> {
    let address =
        rule.attributes.iter().find_map(|a| if let RuleAttribute::Source(ip) = a { Some(*ip) } else { None })?;
    IpNet::new(address, rule.header.src_len).ok()
}

fn same(rule: &RuleMessage) -> bool {
    rule.header.action == RuleAction::ToTable
        && rule.attributes.contains(&RuleAttribute::Priority(NODE_TABLE))
        && rule.attributes.contains(&RuleAttribute::Table(NODE_TABLE))
}
