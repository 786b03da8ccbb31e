//! Which addresses may be Services' (`tp_service_bits`): an address has its bit before anything is entered for it, and a bit once set stays
//! until the maps go. So a program that finds no bit is right to look for nothing; one that finds one may look in vain.

use std::collections::HashMap;

use libbpf_rs::Object;

use crate::abi::{Addr, Nat, TP_SERVICE_BITS_SHIFT, Tuple};
use crate::bpf::error::Result;
use crate::bpf::map::Map;

/// The map, and a copy of the words of it that are not zero.
#[derive(Debug)]
pub(super) struct Bits {
    map: Map<u32, u64>,
    words: HashMap<u32, u64>,
}

const WORDS: u32 = (1 << TP_SERVICE_BITS_SHIFT) / u64::BITS;

impl Bits {
    /// Opens the map, which then has the bits of `addresses` and of all to which there are translations: both may have been adopted from
    /// a version without this map.
    pub(super) fn open(object: &Object, addresses: impl Iterator<Item = Addr>) -> Result<Self> {
        let map: Map<u32, u64> = Map::open(object, "tp_service_bits")?;
        let mut words = HashMap::new();
        for index in 0..WORDS {
            if let Some(word) = map.get(&index)?.filter(|word| *word != 0) {
                words.insert(index, word);
            }
        }
        let translations: Map<Tuple, Nat> = Map::open(object, "tp_nat")?;
        let translated = translations.entries()?.into_iter().map(|(sent, _)| sent.daddr);
        let mut bits = Self { map, words };
        addresses.chain(translated).try_for_each(|address| bits.set(address))?;
        Ok(bits)
    }

    /// Sets the bit of an address.
    pub(super) fn set(&mut self, address: Addr) -> Result<()> {
        let bit = address.service_bit();
        let (index, mask) = (bit / u64::BITS, 1 << (bit % u64::BITS));
        let word = self.words.get(&index).copied().unwrap_or(0);
        if word & mask == 0 {
            self.map.put(&index, &(word | mask))?;
            self.words.insert(index, word | mask);
        }
        Ok(())
    }
}
