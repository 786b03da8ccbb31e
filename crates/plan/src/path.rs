//! How large a packet gets from this node to another: what is to be tried next, and what follows from the answers. Sizes are of whole IP packets, in bytes.

/// As often is one size tried before it counts as lost.
pub const TRIES: u32 = 3;

/// What the path has to carry so that whatever pods may send gets through: as it is, and in an envelope what fits one.
pub fn needed(pod_mtu: u32, uplink: u32, envelope: u32) -> u32 {
    let around = uplink.saturating_sub(envelope);
    pod_mtu.max(pod_mtu.min(envelope).saturating_add(around)).min(uplink)
}

/// What pods may send so that it fits such a path in an envelope, too.
pub fn pod_mtu_for(carries: u32, uplink: u32, envelope: u32) -> u32 {
    carries.saturating_sub(uplink.saturating_sub(envelope))
}

/// What is known of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// It carries what it has to.
    Whole,
    /// It carries this much and no more.
    Only(u32),
    /// Nobody answers, whatever the size: the node is away, or somebody in between lets no echo through.
    Nothing,
}

/// A search for the largest size that is answered.
#[derive(Clone, Copy, Debug)]
pub struct Search {
    needed: u32,
    /// The largest that was answered.
    passes: Option<u32>,
    /// The smallest that was not.
    lost: Option<u32>,
    least: u32,
    tried: u32,
}

impl Search {
    /// `needed`: what is to get through; `least`: what any path carries.
    pub fn new(needed: u32, least: u32) -> Self {
        Self { needed, passes: None, lost: None, least: least.min(needed), tried: 0 }
    }

    /// The size to try next, or what was found.
    pub fn next(&self) -> Result<u32, Found> {
        match (self.passes, self.lost) {
            (_, None) if self.passes != Some(self.needed) => Ok(self.needed),
            (_, None) => Err(Found::Whole),
            (None, Some(lost)) if lost <= self.least => Err(Found::Nothing),
            (None, Some(_)) => Ok(self.least),
            (Some(passes), Some(lost)) if lost <= passes.saturating_add(1) => Err(Found::Only(passes)),
            (Some(passes), Some(lost)) => Ok(passes + (lost - passes) / 2),
        }
    }

    /// Whether the size of [`Search::next`] was answered.
    pub fn heard(&mut self, answered: bool) {
        let Ok(size) = self.next() else { return };
        self.tried += 1;
        if answered {
            self.passes = Some(size);
        } else if self.tried < TRIES {
            return;
        } else {
            self.lost = Some(size);
        }
        self.tried = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is found of a path that carries `carries`, and how often somebody was asked. `drops`: every so manieth echo is lost on top.
    fn search(needed: u32, least: u32, carries: u32, drops: u32) -> (Found, u32) {
        let mut search = Search::new(needed, least);
        for count in 1.. {
            match search.next() {
                Ok(size) => search.heard(size <= carries && (drops == 0 || count % drops != 0)),
                Err(found) => return (found, count - 1),
            }
        }
        unreachable!("it has no end")
    }

    #[test]
    fn what_a_path_carries_is_found_to_the_byte_whatever_it_is() {
        assert_eq!(search(1500, 1280, 1500, 0), (Found::Whole, 1));
        assert_eq!(search(1500, 576, 0, 0), (Found::Nothing, 6));
        for carries in 1280..1500 {
            let (found, asked) = search(1500, 1280, carries, 0);
            assert_eq!(found, Found::Only(carries));
            assert!(asked <= 30, "{carries}: {asked}");
            assert_eq!(search(1500, 1280, carries, 4).0, Found::Only(carries), "with one echo of four lost");
        }
        assert_eq!(search(1280, 1280, 1200, 0).0, Found::Nothing);
    }

    #[test]
    fn what_is_needed_follows_from_what_pods_may_send() {
        assert_eq!(needed(1450, 1500, 1450), 1500, "envelopes");
        assert_eq!(needed(1500, 1500, 1450), 1500, "as it is, and answers to clients outside in envelopes");
        assert_eq!(needed(1250, 1500, 1450), 1300);
        assert_eq!(needed(9000, 1500, 1450), 1500, "the uplink takes no more");
        assert_eq!(pod_mtu_for(1300, 1500, 1450), 1250);
    }
}
