//! The program of XDP: an object of its own (`bpf/wire.c`), loaded when it is to run somewhere, over the maps of the main one.
//!
//! Promises that a kernel or a driver that refuses it loses nothing else: every packet that it would have forwarded is forwarded by the
//! uplink's hook of tc.

use std::os::fd::AsFd;

use libbpf_rs::{MapCore as _, Object, ObjectBuilder, OpenMapMut};

use super::config::Hook;
use super::error::{Error, Result};
use super::map::Map;
use super::object;
use crate::abi;

/// The compiled `bpf/wire.c`.
static OBJECT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/wire.o"));

/// Maps that are of the same name in both objects and not shared: what one run works on.
const OWN: [&str; 4] = ["tp_scratch", "tp_hops", "tp_hops6", "tp_node_hops6"];

/// The loaded program, and which frames it takes for its device's own.
#[derive(Debug)]
pub(crate) struct Wire {
    object: Object,
    wires: Map<u32, abi::Wire>,
}

fn share(map: &mut OpenMapMut<'_>, main: &Object) -> Result<()> {
    let name = map.name().to_string_lossy().into_owned();
    if OWN.contains(&name.as_str()) || name.contains('.') {
        return Ok(());
    }
    // Not in the main one: this one's own.
    let Some(shared) = main.maps().find(|shared| *shared.name() == *name) else { return Ok(()) };
    map.reuse_fd(shared.as_fd()).map_err(|e| Error::bpf("share map", name, e))
}

impl Wire {
    /// Loads the program over `main`'s maps.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub(crate) fn load(main: &Object, testing: bool) -> Result<Self> {
        let failed = |e| Error::bpf("load", "the program of XDP (bpf/wire.c)", e);
        let mut open =
            ObjectBuilder::default().name("towpath_wire").and_then(|b| b.open_memory(OBJECT)).map_err(failed)?;
        for mut map in open.maps_mut() {
            share(&mut map, main)?;
            if testing && map.name().to_string_lossy().ends_with(".rodata") {
                object::set_testing(&mut map);
            }
        }
        let object = open.load().map_err(failed)?;
        let wires = Map::open(&object, "tp_wires")?;
        Ok(Self { object, wires })
    }

    /// The loaded object.
    pub(crate) fn object(&self) -> &Object {
        &self.object
    }

    /// The program.
    pub(crate) fn program(&self) -> Result<libbpf_rs::Program<'_>> {
        object::program(&self.object, Hook::FromWire.program())
    }

    /// Sets which MAC a device has: frames for another go on to the stack.
    pub(crate) fn set_mac(&self, ifindex: u32, mac: [u8; 6]) -> Result<()> {
        self.wires.put(&ifindex, &abi::Wire { mac, ..abi::Wire::default() })
    }
}
