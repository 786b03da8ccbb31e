//! Translations of the veth path (`tp_nat`), and of clients outside whose backend is no pod (`tp_snat_asked`), read and deleted from any
//! thread.

use libbpf_rs::Object;

use super::error::Result;
use super::map::Map;
use super::observe::End;
use super::purge::Called;
use crate::abi::{Nat, SnatWay, Tuple};

/// Whom a flow is translated to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// Whom its client sends to.
    pub service: End,
    /// Who gets it.
    pub backend: End,
}

/// The tables.
#[derive(Debug)]
pub struct Translations {
    map: Map<Tuple, Nat>,
    asked: Map<Tuple, SnatWay>,
    /// Deletes one, and counts it off.
    delete: Called,
}

impl Translations {
    pub(super) fn open(object: &Object) -> Result<Self> {
        Ok(Self {
            map: Map::open(object, "tp_nat")?,
            asked: Map::open(object, "tp_snat_asked")?,
            delete: Called::new(object, "tp_untranslate")?,
        })
    }

    /// Deletes the UDP translations that `keep` does not want: the flow's next packet is translated anew, or refused. How many
    /// there were. Reads the whole tables: milliseconds for 100,000.
    ///
    /// # Errors
    /// The kernel fails.
    pub fn retain_udp(&self, keep: impl Fn(&Translation) -> bool) -> Result<usize> {
        let pods = self.map.entries()?.into_iter().map(|(sent, nat)| (sent, (nat.daddr.ip(), nat.dport.get())));
        let others = self.asked.entries()?.into_iter();
        let others = others.map(|(sent, way)| (sent, (way.backend.ip(), way.backend_port.get())));
        let mut removed = 0;
        for (mut sent, backend) in pods.chain(others).filter(|(sent, _)| i32::from(sent.proto) == libc::IPPROTO_UDP) {
            let translation = Translation { service: (sent.daddr.ip(), sent.dport.get()), backend };
            if !keep(&translation) {
                removed += self.delete.call(&mut sent)? as usize;
            }
        }
        Ok(removed)
    }
}
