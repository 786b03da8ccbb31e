//! How large packets of this node's pods may be while the ways to other nodes change: lowered before anything goes by a narrower way, raised when
//! everything has gone by wider ones for a while.
//!
//! What counts is what this node sends by. What it receives it takes whatever its pods' own MTU is, so no node waits for another.

use std::time::Duration;

use towpath_model::desired::Reach;

/// Everything has to fit for so long before pods may send more: nodes that join, and changes that are taken back, do not make devices go up and down.
pub const QUIET: Duration = Duration::from_secs(10);

/// What the ways to other nodes carry, in bytes of a pod's packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Carried {
    /// As it is: the uplink's own MTU.
    pub plain: u32,
    /// In an envelope.
    pub envelope: u32,
    /// What the configuration says that pods have, whatever the ways carry.
    pub fixed: Option<u32>,
}

impl Carried {
    /// By one way. What goes in an IP header is as large as what goes in an envelope, though there is room for more: fragments and ICMP errors
    /// among it do go in envelopes, and nobody cuts an IPv6 packet on its way.
    pub fn by(&self, reach: Reach) -> u32 {
        if reach.is_plain() { self.plain } else { self.envelope }
    }

    /// By all of these, and by the one that is wanted: what goes by a wider one for another reason (a network that is being replaced) will not for long.
    pub fn by_all(&self, ways: impl IntoIterator<Item = Reach>, wanted: Reach) -> u32 {
        self.fixed.unwrap_or_else(|| ways.into_iter().map(|way| self.by(way)).fold(self.by(wanted), u32::min))
    }
}

/// What is to be done about the devices of pods that are there; new ones get the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Those that have more get this; others stay as they are.
    AtMost(u32),
    /// All of them get this.
    Exactly(u32),
}

/// What this node's pods have, and since when they could have more. Time is an argument.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodMtu {
    /// None: what a former agent left, which nobody has looked at.
    now: Option<u32>,
    more_since: Option<Duration>,
}

impl PodMtu {
    /// What has to come before the ways become such that this much fits.
    pub fn before(&mut self, fits: u32) -> Option<Change> {
        match &mut self.now {
            Some(now) if *now <= fits => None,
            Some(now) => {
                *now = fits;
                self.more_since = None;
                Some(Change::AtMost(fits))
            }
            None => Some(Change::AtMost(fits)),
        }
    }

    /// What is to be done when this much fits by the ways as they are. `widest`: the most that a pod of this node has; none: there is no pod, or
    /// it was looked at before. `fixed`: somebody said so, and nothing is waited for.
    pub fn after(&mut self, fits: u32, fixed: bool, widest: Option<u32>, now: Duration) -> Option<Change> {
        let Some(had) = self.now else {
            // What a former agent raised is not waited for again.
            return match widest {
                Some(widest) if widest < fits && !fixed => {
                    (self.now, self.more_since) = (Some(widest), Some(now));
                    None
                }
                _ => self.exactly(fits),
            };
        };
        if had == fits {
            self.more_since = None;
            return None;
        }
        if had < fits && !fixed && now.saturating_sub(*self.more_since.get_or_insert(now)) < QUIET {
            return None;
        }
        self.exactly(fits)
    }

    /// Whether nobody has looked yet at what a former agent left.
    pub fn is_unknown(&self) -> bool {
        self.now.is_none()
    }

    /// When it is to be looked at again although nothing happens.
    pub fn next(&self) -> Option<Duration> {
        self.more_since.map(|since| since.saturating_add(QUIET))
    }

    fn exactly(&mut self, mtu: u32) -> Option<Change> {
        (self.now, self.more_since) = (Some(mtu), None);
        Some(Change::Exactly(mtu))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CARRIED: Carried = Carried { plain: 1500, envelope: 1450, fixed: None };

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn the_narrowest_way_counts_and_what_is_said_wins() {
        assert_eq!(CARRIED.by_all([Reach::Route, Reach::Route], Reach::Route), 1500);
        assert_eq!(CARRIED.by_all([Reach::Link, Reach::Route], Reach::Link), 1500);
        for narrow in [Reach::Tunnel, Reach::TunnelTo([0; 6]), Reach::Ipip] {
            assert_eq!(CARRIED.by_all([Reach::Route, narrow], Reach::Route), 1450, "{narrow:?}");
            assert_eq!(CARRIED.by_all([Reach::Route], narrow), 1450, "{narrow:?} is wanted");
        }
        assert_eq!((CARRIED.by_all([], Reach::Route), CARRIED.by_all([], Reach::Tunnel)), (1500, 1450));
        assert_eq!(Carried { fixed: Some(1300), ..CARRIED }.by_all([Reach::Route], Reach::Tunnel), 1300);
    }

    #[test]
    fn it_is_lowered_before_anything_goes_by_a_narrower_way_and_raised_after_a_while() {
        let mut mtu = PodMtu::default();
        assert_eq!(mtu.before(1450), Some(Change::AtMost(1450)), "a former agent may have left anything");
        assert_eq!(mtu.after(1450, false, None, at(0)), Some(Change::Exactly(1450)));
        assert_eq!((mtu.before(1500), mtu.after(1500, false, None, at(1))), (None, None));
        assert_eq!(mtu.next(), Some(at(11)));
        assert_eq!(mtu.after(1500, false, None, at(10)), None);
        assert_eq!(mtu.after(1500, false, None, at(11)), Some(Change::Exactly(1500)));
        assert_eq!((mtu.next(), mtu.before(1500)), (None, None));
        assert_eq!(mtu.before(1450), Some(Change::AtMost(1450)));
        assert_eq!(mtu.after(1450, false, None, at(12)), None, "it is so already");
    }

    #[test]
    fn what_does_not_fit_all_the_while_is_not_raised() {
        let mut mtu = PodMtu::default();
        mtu.after(1450, false, None, at(0));
        mtu.after(1500, false, None, at(1));
        mtu.after(1450, false, None, at(8));
        assert_eq!(mtu.after(1500, false, None, at(12)), None, "a node that joined in between counts");
        assert_eq!(mtu.after(1500, false, None, at(22)), Some(Change::Exactly(1500)));
        assert_eq!(mtu.after(1450, false, None, at(23)), Some(Change::Exactly(1450)), "found out late: at once");
    }

    #[test]
    fn what_a_former_agent_left_is_kept_if_it_still_fits() {
        let after = |widest, fits| PodMtu::default().after(fits, false, widest, at(0));
        assert_eq!(after(Some(1500), 1500), Some(Change::Exactly(1500)));
        assert_eq!(after(Some(1450), 1500), None, "it waits");
        assert_eq!(after(Some(1500), 1450), Some(Change::Exactly(1450)));
        assert_eq!(after(None, 1500), Some(Change::Exactly(1500)), "nobody is there to wait for");
        assert_eq!(PodMtu::default().after(1300, true, Some(1200), at(0)), Some(Change::Exactly(1300)));
        let mut killed = PodMtu::default();
        killed.after(1500, false, Some(1450), at(0));
        assert_eq!(killed.after(1500, false, None, at(10)), Some(Change::Exactly(1500)));
    }
}
