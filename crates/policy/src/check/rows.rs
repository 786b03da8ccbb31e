//! What an image says of a set and a class, as a set of ports.

use std::collections::HashMap;

use towpath_model::Protocol;
use towpath_model::desired::{LocalClass, PolicyImage, RowKey, RowProtocol, SetId, Verdict};

use crate::image::port_mask;
use crate::verify::ports::Ports;

/// The rows of an image, read by set and class.
pub(super) struct Rows<'i> {
    image: &'i PolicyImage,
    known: HashMap<(SetId, LocalClass), Ports>,
}

impl<'i> Rows<'i> {
    pub(super) fn of(image: &'i PolicyImage) -> Self {
        Self { image, known: HashMap::new() }
    }

    /// The ports that the rows of a set and a class allow: for each port the longest prefix decides, without one it is denied.
    pub(super) fn ports(&mut self, set: SetId, class: LocalClass) -> Ports {
        if set == SetId::default() {
            return Ports::all();
        }
        let image = self.image;
        self.known.entry((set, class)).or_insert_with(|| read(image, set, class)).clone()
    }
}

fn read(image: &PolicyImage, set: SetId, class: LocalClass) -> Ports {
    let mut allowed = Ports::none();
    for protocol in Protocol::ALL.map(RowProtocol::Ports).into_iter().chain([RowProtocol::Other]) {
        let at = |port, port_bits| RowKey { set, class, protocol, port, port_bits };
        let mut rows: Vec<_> = image.rows.range(at(0, 0)..=at(u16::MAX, u8::MAX)).collect();
        rows.sort_by_key(|(key, _)| key.port_bits);
        // Rows of one length are about different ports.
        for level in rows.chunk_by(|(a, _), (b, _)| a.port_bits == b.port_bits) {
            let (mut allow, mut deny) = (Vec::new(), Vec::new());
            for (key, row) in level {
                let mask = port_mask(key.port_bits);
                // The kernel looks for the port's leading bits: what is set behind them is never found.
                if key.port & !mask != 0 || key.port_bits > 16 {
                    continue;
                }
                let ports = match protocol {
                    RowProtocol::Ports(protocol) => Ports::of(protocol, key.port, key.port | !mask),
                    RowProtocol::Other if key.port == 0 => Ports::without_ports(),
                    RowProtocol::Other => continue,
                };
                match row.verdict {
                    Verdict::Allow => allow.push(ports),
                    Verdict::Deny => deny.push(ports),
                }
            }
            allowed = allowed.without(&Ports::any_of(&deny)).or(&Ports::any_of(&allow));
        }
    }
    allowed
}
