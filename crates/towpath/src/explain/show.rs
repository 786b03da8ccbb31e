//! An explanation in words.

use std::fmt;
use std::net::IpAddr;

use towpath_model::desired::{Algorithm, Verdict};

use super::{Explanation, IfEnforced, Outcome};

/// An address and port as people write it.
pub(super) fn address_port(address: IpAddr, port: u16) -> String {
    match address {
        IpAddr::V4(v4) => format!("{v4}:{port}"),
        IpAddr::V6(v6) => format!("[{v6}]:{port}"),
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} ({}) → {} ({}), {}",
            self.from.what, self.from.address, self.to.what, self.to.address, self.protocol
        )?;
        if let Some(service) = &self.service {
            let what = match &service.binding {
                Some(binding) => format!("{binding}, of pod {}:", service.service),
                None => format!("Service {} at {}:", service.service, service.frontend),
            };
            writeln!(f, "  {what} translated {}", service.place)?;
            match service.backends.len() {
                1 if service.binding.is_some() => writeln!(f, "    to {}", service.backends.join(""))?,
                0 => writeln!(f, "    no ready endpoint")?,
                1 => writeln!(f, "    its only endpoint: {}", service.backends.join(""))?,
                n => {
                    let how = service.algorithm.map_or("", |algorithm| match algorithm {
                        Algorithm::Random => ", at random",
                        Algorithm::RoundRobin => ", in turns",
                        Algorithm::LeastConnections => ", the one with the fewest open connections by this node",
                        Algorithm::SourceHash => ", by the client's address",
                        Algorithm::Maglev => ", by addresses and ports",
                    });
                    writeln!(f, "    to one of {n} endpoints{how}: {}", service.backends.join(", "))?;
                }
            }
            if let Some(ranges) = &service.sources {
                let ranges = if ranges.is_empty() { "nobody".to_owned() } else { ranges.join(", ") };
                writeln!(f, "    for clients in loadBalancerSourceRanges: {ranges}")?;
            }
        }
        if let Some(names) = &self.names {
            writeln!(f, "  {names}")?;
        }
        for note in &self.notes {
            writeln!(f, "  {note}")?;
        }
        for way in &self.ways {
            writeln!(f, "  {}", way.path.join("\n    → "))?;
            for line in way.decision.to_string().lines() {
                writeln!(f, "    {line}")?;
            }
            if let Some(IfEnforced { decision, policies }) = &way.if_enforced {
                let (verb, what) = (if policies.len() == 1 { "is" } else { "are" }, policies.join(" and "));
                let then = match decision.verdict {
                    Verdict::Allow => "allowed",
                    Verdict::Deny => "denied",
                };
                writeln!(f, "    {then} if {what}, which {verb} only audited, were enforced:")?;
                for line in decision.to_string().lines() {
                    writeln!(f, "      {line}")?;
                }
            }
        }
        let answer = match self.outcome {
            Outcome::Allow => "allowed",
            Outcome::Deny => "denied: the packets are dropped",
            Outcome::Depends => "depends on the endpoint",
            Outcome::Refused => "refused at once: the Service has no endpoint for this port",
            Outcome::NotForClient => "denied: the Service is not for this client (spec.loadBalancerSourceRanges)",
            Outcome::NoReply => "no reply: a Service address answers only its ports",
        };
        write!(f, "  {answer}")
    }
}
