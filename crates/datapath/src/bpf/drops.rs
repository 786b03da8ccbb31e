//! Packets that are dropped, and sockets that are refused, as it happens; and connections that pass although a policy that is only audited
//! would deny them.
//!
//! An [`DropsEar`] promises: while it listens the programs tell what they drop, and when it is gone they stop; what passes pays nothing for
//! it. They tell 100 in ten milliseconds on each CPU and no more, so that a flood costs no more than it did; what they do not
//! tell they count ([`DropsEar::untold`]).

use std::cell::RefCell;
use std::time::{Duration, SystemTime};

use libbpf_rs::{MapCore, MapHandle, Object, RingBufferBuilder};
use towpath_model::desired::{RuleId, SetId};

use super::error::{Error, Result};
use super::map::{Map, from_bytes, sum_per_cpu};
use super::observe::{End, Reason, monotonic};
use crate::abi::{
    self, TP_DROP_EGRESS_POLICY, TP_DROP_INGRESS_POLICY, TP_DROPPED_SOCKET, TP_DROPPED_TRANSLATED, TP_DROPPED_TUPLE,
    TP_DROPPED_XDP, Told,
};

const RING: &str = "tp_drops";
const TOLD: &str = "tp_told";

/// How long nothing may be told before it is looked whether anybody still listens.
const PATIENCE: Duration = Duration::from_millis(100);

/// However much is told, it is asked so often whether anybody still listens, in ns.
const EVERY: u64 = 1_000_000_000;

/// Where something was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// At a device, as a packet.
    Device,
    /// At a device, by XDP.
    Wire,
    /// In a socket's system call: nothing was sent.
    Socket,
}

/// A packet that was dropped, or a socket that was refused; or a connection that an audited policy would have denied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// When.
    pub at: SystemTime,
    /// Why.
    pub reason: Reason,
    /// The rule of a policy that denied it, or would have.
    pub rule: Option<RuleId>,
    /// The set of that rule, where the policy is only audited ([`Reason::is_audit`]).
    pub audit_set: Option<SetId>,
    /// Where.
    pub place: Place,
    /// Who sent it, to whom, as the packet said; none: it could not be read. A socket's own port is 0.
    pub ends: Option<(End, End)>,
    /// The endpoint that it was on its way to, by way of the Service that it was sent to.
    pub backend: Option<End>,
    /// IP protocol number (IANA).
    pub protocol: u8,
    /// Flags of a TCP header.
    pub tcp_flags: u8,
    /// Type of an ICMP or ICMPv6 message.
    pub icmp_type: u8,
    /// Index of the device that it came in by; 0: of none.
    pub ifindex: u32,
    /// Bytes, link header included.
    pub bytes: u32,
}

fn end(address: &abi::Addr, port: abi::Be16) -> End {
    (address.ip(), port.get())
}

fn decode(told: &abi::Dropped, since_boot: u64, now: SystemTime) -> Dropped {
    let has = |flag: u32| u32::from(told.flags) & flag != 0;
    let reason = Reason::new(told.reason);
    let denied = [TP_DROP_EGRESS_POLICY, TP_DROP_INGRESS_POLICY].contains(&told.reason) || reason.is_audit();
    Dropped {
        at: now.checked_sub(Duration::from_nanos(since_boot.saturating_sub(told.at))).unwrap_or(now),
        reason,
        rule: denied.then_some(RuleId(told.rule)),
        audit_set: reason.is_audit().then_some(SetId(told.set)),
        place: match () {
            () if has(TP_DROPPED_SOCKET) => Place::Socket,
            () if has(TP_DROPPED_XDP) => Place::Wire,
            () => Place::Device,
        },
        ends: has(TP_DROPPED_TUPLE).then(|| (end(&told.t.saddr, told.t.sport), end(&told.t.daddr, told.t.dport))),
        backend: has(TP_DROPPED_TRANSLATED).then(|| end(&told.backend, told.backend_port)),
        protocol: told.t.proto,
        tcp_flags: told.tcp_flags,
        icmp_type: told.icmp_type,
        ifindex: told.ifindex,
        bytes: told.len,
    }
}

/// Listens to the programs. One at a time: a second one would take events from the first.
#[derive(Debug)]
pub struct DropsEar {
    ring: MapHandle,
    told: MapHandle,
    watched: Map<u32, u32>,
    untold_before: u64,
    /// When it was opened (`CLOCK_MONOTONIC`, ns).
    since: u64,
}

fn handle(object: &Object, name: &'static str) -> Result<MapHandle> {
    let map = object.maps().find(|map| *map.name() == *name);
    let map = map.ok_or_else(|| Error::Mismatch { what: format!("map {name}, which is missing") })?;
    MapHandle::try_from(&map).map_err(|e| Error::bpf("keep open map", name, e))
}

impl DropsEar {
    /// Makes the programs tell.
    pub(super) fn open(object: &Object) -> Result<Self> {
        let watched: Map<u32, u32> = Map::open(object, "tp_watched")?;
        let (ring, told) = (handle(object, RING)?, handle(object, TOLD)?);
        let untold_before = untold(&told)?;
        // What an earlier ear was told and did not come to hear is still in the ring: nobody throws that away but who reads it.
        let since = monotonic();
        watched.put(&0, &1)?;
        Ok(Self { ring, told, watched, untold_before, since })
    }

    /// Tells `hear` of each until it answers `false`, and blocks meanwhile. It is also asked, with nothing, when nothing was dropped
    /// for a tenth of a second, and every second however much is.
    ///
    /// # Errors
    /// The ring cannot be read.
    pub fn listen(&self, mut hear: impl FnMut(Option<Dropped>) -> bool) -> Result<()> {
        let failed = |e| Error::bpf("read ring", RING, e);
        let heard = RefCell::new(Vec::new());
        let mut builder = RingBufferBuilder::new();
        let keep = |bytes: &[u8]| {
            heard.borrow_mut().extend(from_bytes::<abi::Dropped>(bytes));
            0
        };
        builder.add(&self.ring, keep).map_err(failed)?;
        let ring = builder.build().map_err(failed)?;
        let mut asked = monotonic();
        loop {
            match ring.poll(PATIENCE) {
                Err(e) if e.kind() == libbpf_rs::ErrorKind::Interrupted => continue,
                polled => polled.map_err(failed)?,
            }
            let (since_boot, now) = (monotonic(), SystemTime::now());
            let mut batch: Vec<abi::Dropped> = heard.borrow_mut().drain(..).collect();
            batch.retain(|told| told.at >= self.since);
            let is_quiet = batch.is_empty();
            for told in batch {
                if !hear(Some(decode(&told, since_boot, now))) {
                    return Ok(());
                }
            }
            if is_quiet || since_boot.saturating_sub(asked) > EVERY {
                asked = since_boot;
                if !hear(None) {
                    return Ok(());
                }
            }
        }
    }

    /// How much was not told since the ear was opened.
    ///
    /// # Errors
    /// The kernel refuses to say.
    pub fn untold(&self) -> Result<u64> {
        Ok(untold(&self.told)?.saturating_sub(self.untold_before))
    }
}

impl Drop for DropsEar {
    fn drop(&mut self) {
        if let Err(error) = self.watched.put(&0, &0) {
            tracing::warn!(%error, "the kernel programs go on telling what they drop, to nobody: until the agent starts anew");
        }
    }
}

fn untold(map: &MapHandle) -> Result<u64> {
    sum_per_cpu(map, TOLD, |told: Told| told.untold)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_of_the_kernels_clock_is_one_of_the_walls() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
        let told =
            abi::Dropped { at: 5_000_000_000, reason: TP_DROP_EGRESS_POLICY, rule: 7, ..abi::Dropped::default() };
        let dropped = decode(&told, 8_000_000_000, now);
        assert_eq!(dropped.at, SystemTime::UNIX_EPOCH + Duration::from_secs(997));
        assert_eq!((dropped.rule, dropped.ends, dropped.backend), (Some(RuleId(7)), None, None));
        // Told by another CPU a moment after the clock was read.
        assert_eq!(decode(&told, 4_999_999_000, now).at, now);
        let other = abi::Dropped { reason: abi::TP_DROP_MALFORMED, ..told };
        assert_eq!(decode(&other, 0, now).rule, None, "the rule is an earlier packet's");
    }
}
