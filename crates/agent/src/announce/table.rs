//! What this node answers for, and what it says by itself: decided from what is heard and from the time. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use tokio::time::Instant;
use tracing::warn;

use super::frames::{self, Mac};

/// When everybody is told, after an announcement began: a frame may be lost, and a switch may just be learning.
const TOLD_AT: [Duration; 6] = [
    Duration::ZERO,
    Duration::from_millis(100),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(5),
];
/// Another that claims an address of ours is answered so often at most, with one announcement (RFC 5227 §1.1, §2.4: DEFEND_INTERVAL).
const DEFEND_INTERVAL: Duration = Duration::from_secs(10);
/// The same one is named so often at most.
const NAME_EVERY: Duration = Duration::from_secs(600);

/// Whether an address is answered for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    Silent,
    Until(Instant),
    Always,
}

impl Standing {
    pub(super) fn answers(self, now: Instant) -> bool {
        match self {
            Self::Silent => false,
            Self::Until(end) => now < end,
            Self::Always => true,
        }
    }
}

/// One address.
#[derive(Debug)]
pub(super) struct Entry {
    standing: Standing,
    /// When the announcement began, and how often it was told; none: nothing is left to tell.
    telling: Option<(Instant, usize)>,
    /// Who else was last heard to have it.
    rival: Option<(Mac, Instant)>,
    defended: Option<Instant>,
    /// To be said once more, to who else claims it.
    defend: bool,
    named: Option<(Mac, Instant)>,
    probe: bool,
}

impl Entry {
    const NEW: Self = Self {
        standing: Standing::Silent,
        telling: None,
        rival: None,
        defended: None,
        defend: false,
        named: None,
        probe: false,
    };

    /// It is answered for; who begins to tells everybody.
    pub(super) fn announce(&mut self, standing: Standing, now: Instant) {
        if !self.standing.answers(now) {
            self.telling = Some((now, 0));
        }
        self.standing = standing;
    }

    pub(super) fn withdraw(&mut self) {
        self.standing = Standing::Silent;
        self.telling = None;
        self.defend = false;
    }

    pub(super) fn probe(&mut self) {
        self.probe = true;
    }

    pub(super) fn is_contested_since(&self, since: Instant) -> bool {
        self.rival.is_some_and(|(_, heard)| heard >= since)
    }

    /// When something is to be sent.
    fn due(&self) -> Option<Instant> {
        let (began, told) = self.telling?;
        Some(began + *TOLD_AT.get(told)?)
    }

    /// Another says that it has the address; whether there is something to send.
    fn hear_rival(&mut self, address: IpAddr, mac: Mac, device: &str, now: Instant) -> bool {
        self.rival = Some((mac, now));
        if self.standing == Standing::Always {
            // No Lease says that it is ours, and another node says that it is its.
            self.withdraw();
            return false;
        }
        let is_due = self.defended.is_none_or(|last| now.saturating_duration_since(last) >= DEFEND_INTERVAL);
        if !self.standing.answers(now) || !is_due {
            return false;
        }
        self.defended = Some(now);
        self.defend = true;
        let is_known =
            self.named.is_some_and(|(known, at)| known == mac && now.saturating_duration_since(at) < NAME_EVERY);
        if !is_known {
            self.named = Some((mac, now));
            let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
            warn!(%address, mac, device, "another device claims this load balancer's address: is it in use elsewhere?");
        }
        true
    }
}

/// What is to be sent now, and when there is something again.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Due {
    pub(super) told: Vec<IpAddr>,
    pub(super) probes: Vec<IpAddr>,
    pub(super) next: Option<Instant>,
}

/// A device as far as answers are concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Speaker {
    pub(super) name: String,
    pub(super) mac: Mac,
    /// Where our messages of IPv6 come from.
    pub(super) own: Option<Ipv6Addr>,
}

/// All addresses, and the devices that are ours.
#[derive(Debug, Default)]
pub(super) struct Table {
    entries: BTreeMap<IpAddr, Entry>,
    pub(super) own_macs: BTreeSet<Mac>,
}

impl Table {
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(super) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.entries.keys().copied()
    }

    /// Those that are answered for.
    pub(super) fn answered(&self, now: Instant) -> BTreeSet<IpAddr> {
        self.entries.iter().filter(|(_, entry)| entry.standing.answers(now)).map(|(address, _)| *address).collect()
    }

    pub(super) fn get(&self, address: IpAddr) -> Option<&Entry> {
        self.entries.get(&address)
    }

    pub(super) fn entry(&mut self, address: IpAddr) -> &mut Entry {
        self.entries.entry(address).or_insert(Entry::NEW)
    }

    pub(super) fn forget(&mut self, address: IpAddr) {
        self.entries.remove(&address);
    }

    /// Everybody is told again what is answered for: there is a device that did not say it yet, or says it from another address.
    pub(super) fn tell_again(&mut self, now: Instant) {
        for entry in self.entries.values_mut().filter(|entry| entry.standing.answers(now)) {
            entry.telling = Some((now, 0));
        }
    }

    /// What is due; it counts as sent.
    pub(super) fn take_due(&mut self, now: Instant) -> Due {
        let mut due = Due::default();
        for (address, entry) in &mut self.entries {
            if std::mem::take(&mut entry.probe) {
                due.probes.push(*address);
            }
            let mut says = std::mem::take(&mut entry.defend);
            if let Some((began, times)) = entry.telling
                && entry.due().is_some_and(|due| due <= now)
            {
                says = true;
                entry.telling = Some((began, times + 1));
            }
            if says && entry.standing.answers(now) {
                due.told.push(*address);
            }
            due.next = entry.due().into_iter().chain(due.next).min();
        }
        due
    }

    /// What is to be answered to what was heard at a device; and whether something is due besides.
    pub(super) fn answer(&mut self, heard: &frames::Heard, at: &Speaker, now: Instant) -> (Option<Vec<u8>>, bool) {
        let mut is_due = false;
        if let Some((address, mac)) = heard.claims
            && !self.own_macs.contains(&mac)
            && let Some(entry) = self.entries.get_mut(&address)
        {
            is_due = entry.hear_rival(address, mac, &at.name, now);
        }
        let answer = heard.asks.and_then(|question| {
            let entry = self.entries.get(&question.target)?;
            entry.standing.answers(now).then(|| frames::answer(&question, at.mac, at.own))
        });
        (answer, is_due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::announce::frames::{Heard, Question};

    const THEIRS: Mac = [2, 0, 0, 0, 0, 9];

    fn device() -> Speaker {
        Speaker { name: "eth0".to_owned(), mac: [2, 0, 0, 0, 0, 1], own: None }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn table(standing: Standing) -> Table {
        let mut table = Table::default();
        table.entry(ip("192.0.2.1")).standing = standing;
        table.own_macs.insert(device().mac);
        table
    }

    fn asks(target: &str) -> Heard {
        Heard { asks: Some(Question { target: ip(target), mac: THEIRS, from: Some(ip("192.0.2.9")) }), claims: None }
    }

    fn claims(mac: Mac) -> Heard {
        Heard { asks: None, claims: Some((ip("192.0.2.1"), mac)) }
    }

    fn answers(table: &mut Table, heard: &Heard, now: Instant) -> bool {
        table.answer(heard, &device(), now).0.is_some()
    }

    #[test]
    fn an_address_is_answered_for_while_its_lease_holds_and_no_other_is() {
        let now = Instant::now();
        let mut table = table(Standing::Until(now + Duration::from_secs(1)));
        assert!(answers(&mut table, &asks("192.0.2.1"), now));
        assert!(!answers(&mut table, &asks("192.0.2.2"), now));
        let later = now + Duration::from_secs(1);
        assert!(!answers(&mut table, &asks("192.0.2.1"), later), "whoever else thinks it still holds");
    }

    #[test]
    fn who_goes_on_without_a_lease_is_silent_as_soon_as_another_is_heard() {
        let mut table = table(Standing::Always);
        let now = Instant::now();
        answers(&mut table, &claims(device().mac), now);
        assert!(answers(&mut table, &asks("192.0.2.1"), now), "it heard itself");
        answers(&mut table, &claims(THEIRS), now);
        assert!(!answers(&mut table, &asks("192.0.2.1"), now));
        assert!(table.get(ip("192.0.2.1")).unwrap().is_contested_since(now));
    }

    #[test]
    fn two_that_have_a_lease_each_defend_the_address_and_do_not_go_on_for_ever() {
        let begin = Instant::now();
        let until = Standing::Until(begin + Duration::from_secs(3600));
        let mut tables = [table(until), table(until)];
        let macs = [device().mac, THEIRS];
        tables[1].own_macs = [THEIRS].into();
        let mut told = 0;
        // A minute in steps of 10 ms; what the one says the other hears at once.
        for step in 0..6000_u64 {
            let now = begin + Duration::from_millis(10 * step);
            for of in [0, 1] {
                let says = tables[of].take_due(now).told.len();
                told += says;
                let first = usize::from(step == 0 && of == 0);
                for _ in 0..says + first {
                    let heard = claims(macs[of]);
                    tables[1 - of].answer(&heard, &device(), now);
                }
            }
        }
        assert!((1..=12).contains(&told), "{told} announcements in a minute");
        for table in &mut tables {
            assert!(answers(table, &asks("192.0.2.1"), begin + Duration::from_secs(60)));
        }
    }

    #[test]
    fn whoever_claims_the_address_all_the_time_is_answered_once_in_ten_seconds() {
        let begin = Instant::now();
        let mut table = table(Standing::Until(begin + Duration::from_secs(3600)));
        let mut told = 0;
        for step in 0..600 {
            let now = begin + Duration::from_millis(100 * step);
            table.answer(&claims(THEIRS), &device(), now);
            told += table.take_due(now).told.len();
        }
        assert_eq!(told, 6, "in a minute");
    }

    #[test]
    fn a_defence_is_one_announcement_and_ends_no_telling() {
        let now = Instant::now();
        let mut table = table(Standing::Silent);
        table.entry(ip("192.0.2.1")).announce(Standing::Until(now + Duration::from_secs(60)), now);
        assert_eq!(table.take_due(now).told.len(), 1);
        assert!(table.answer(&claims(THEIRS), &device(), now).1);
        let due = table.take_due(now);
        assert_eq!((due.told.len(), due.next), (1, Some(now + Duration::from_millis(100))), "and the next as planned");
        let told: usize = (1..600).map(|step| table.take_due(now + Duration::from_millis(10 * step)).told.len()).sum();
        assert_eq!(told, 5);
    }

    #[test]
    fn a_device_that_comes_later_is_told_from_too_and_only_of_what_is_answered_for() {
        let now = Instant::now();
        let mut table = table(Standing::Until(now + Duration::from_secs(60)));
        table.entry(ip("192.0.2.2")).probe();
        assert_eq!(table.take_due(now), Due { told: vec![], probes: vec![ip("192.0.2.2")], next: None });
        table.tell_again(now);
        assert_eq!(table.take_due(now).told, [ip("192.0.2.1")]);
    }
}
