//! Real packets through real namespaces: the network beneath the programs, and with them.

mod bandwidth;
mod beneath;
mod clsact;
mod door;
mod hooks;
mod inherit;
mod lab;
mod mtu;
mod release;
mod remembered;
mod scenarios;
mod several_cards;
mod shortcut;
mod speed;
mod wires;
