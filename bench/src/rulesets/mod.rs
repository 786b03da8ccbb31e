//! Rules for N Services shaped as kube-proxy's, for nftables and for iptables. No kube-proxy runs; who wrote them is this program.
//!
//! Each Service has two endpoints that nobody is, but the last, which leads to a real server. All sizes grow with N as
//! kube-proxy's do: chains, rules, map elements.

mod iptables;
mod nftables;

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::cluster::{MEASURED, address, filler, nobodys};
use crate::load::PORT;
use crate::netns::Netns;

/// Longest time that a ruleset may take to load.
const LIMIT: Duration = Duration::from_secs(240);
/// Endpoints of each Service.
const ENDPOINTS: usize = 2;
/// Range of the pods of the baseline's node.
const PODS: &str = "10.213.0.0/16";

/// Who keeps the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ruleset {
    /// kube-proxy 1.33 in nftables mode.
    Nftables,
    /// kube-proxy in iptables mode.
    Iptables,
}

/// One Service of a ruleset.
struct Port {
    name: String,
    address: IpAddr,
    endpoints: Vec<IpAddr>,
}

/// `count` Services, of which the last leads to a server.
fn ports(count: usize, server: IpAddr) -> Vec<Port> {
    let port = |name: String, endpoints| Port { address: address(&name).into(), name, endpoints };
    let mut all: Vec<Port> =
        (0..count.saturating_sub(1)).map(|index| port(filler(index), nobodys(index, ENDPOINTS))).collect();
    all.push(port(MEASURED.to_owned(), vec![server]));
    all
}

impl Ruleset {
    /// What it is called in the figures.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Ruleset::Nftables => "nftables-shaped",
            Ruleset::Iptables => "iptables-shaped",
        }
    }

    /// The program that loads it, and of what kind it is, as it says itself.
    pub(crate) fn loader(self) -> String {
        let program = self.command().first().copied().unwrap_or_default();
        let said = std::process::Command::new(program).arg("--version").output();
        said.map_or_else(|_| program.to_owned(), |said| String::from_utf8_lossy(&said.stdout).trim().to_owned())
    }

    fn command(self) -> &'static [&'static str] {
        match self {
            Ruleset::Nftables => &["nft", "-f", "-"],
            Ruleset::Iptables => &["iptables-restore", "-w"],
        }
    }

    /// Whether all of so many Services have the rules that kube-proxy gives them; else only the measured one has, and what is there is
    /// as large where packets look.
    pub(crate) fn is_whole(self, count: usize) -> bool {
        self == Ruleset::Iptables || nftables::is_whole(count)
    }

    /// Its text for `count` Services.
    fn text(self, count: usize, server: IpAddr) -> String {
        match self {
            Ruleset::Nftables => nftables::text(&ports(count, server)),
            Ruleset::Iptables => iptables::text(&ports(count, server)),
        }
    }

    /// Loads it into a namespace; how long that took.
    ///
    /// # Errors
    /// It was refused, or was not in after four minutes.
    pub(crate) fn load(self, netns: &Netns, count: usize, server: IpAddr) -> Result<Duration> {
        let text = self.text(count, server);
        let seconds = LIMIT.as_secs().to_string();
        let argv = [&["timeout", &seconds], self.command()].concat();
        let begun = Instant::now();
        netns.feed(&argv, &text).with_context(|| format!("load {count} Services, {}", self.title()))?;
        Ok(begun.elapsed())
    }
}

/// Letters and digits as kube-proxy takes them from a hash: the same for the same name.
fn hash(of: &str, length: usize) -> String {
    const LETTERS: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let mut state =
        of.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let mut text = String::with_capacity(length);
    for _ in 0..length {
        // Numerical Recipes' linear congruential generator; the high bits are the random ones.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        text.push(LETTERS.get((state >> 59) as usize).map_or('A', |letter| char::from(*letter)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_grow_with_the_services_as_kube_proxys_do() {
        let server = IpAddr::from([10, 213, 0, 3]);
        let lines = |ruleset: Ruleset, count| ruleset.text(count, server).lines().count();
        // Three chains, six rules, two elements; three chains, eight rules.
        assert_eq!(lines(Ruleset::Nftables, 102) - lines(Ruleset::Nftables, 2), 1100);
        assert_eq!(lines(Ruleset::Iptables, 102) - lines(Ruleset::Iptables, 2), 1100);
    }

    #[test]
    fn chains_have_names_of_their_own() {
        let names: std::collections::BTreeSet<String> = (0..20_000).map(|index| hash(&filler(index), 16)).collect();
        assert_eq!(names.len(), 20_000);
        assert!(names.iter().all(|name| name.len() == 16));
    }

    #[test]
    fn the_measured_service_is_in_the_last_rule_of_its_chain() {
        let text = Ruleset::Iptables.text(10, IpAddr::from([10, 213, 0, 3]));
        let services: Vec<&str> = text.lines().filter(|line| line.starts_with("-A KUBE-SERVICES")).collect();
        let measured = format!("-d {}/32", address(MEASURED));
        assert!(services[services.len() - 2].contains(&measured), "{services:?}");
        assert!(services[services.len() - 1].contains("KUBE-NODEPORTS"), "the rule that must be last: {services:?}");
    }
}
