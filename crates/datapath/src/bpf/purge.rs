//! Deletion of addresses' connections from any thread: it walks whole tables, which takes tens of milliseconds.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use libbpf_rs::Object;

use super::error::{Error, Result};
use super::map::as_bytes_mut;
use crate::abi::{Addr, Plain, Purge};

/// A handle on a `SEC("syscall")` program, independent of [`super::Programs`].
#[derive(Debug)]
pub(super) struct Called {
    name: &'static str,
    program: OwnedFd,
}

impl Called {
    pub(super) fn new(object: &Object, name: &'static str) -> Result<Self> {
        let missing = || Error::Mismatch { what: format!("program {name}, which is missing") };
        let program = object.progs().find(|p| p.name() == name).ok_or_else(missing)?;
        let copied = program.as_fd().try_clone_to_owned();
        Ok(Self { name, program: copied.map_err(|e| Error::kernel("copy the descriptor of", name, e))? })
    }

    /// Runs it on a context that it may change; its return value.
    pub(super) fn call<C: Plain>(&self, context: &mut C) -> Result<u32> {
        let context = as_bytes_mut(context);
        let mut options = libbpf_sys::bpf_test_run_opts {
            sz: size_of::<libbpf_sys::bpf_test_run_opts>() as libbpf_sys::size_t,
            ctx_in: context.as_mut_ptr().cast(),
            ctx_size_in: context.len() as u32,
            ..Default::default()
        };
        // SAFETY: the descriptor is open and a program's; `options` and the context that it points to, of the length that it
        // says, outlive the call, and the kernel writes the context back only into them.
        let result = unsafe { libbpf_sys::bpf_prog_test_run_opts(self.program.as_raw_fd(), &raw mut options) };
        if result < 0 {
            return Err(Error::kernel("run", self.name, io::Error::from_raw_os_error(-result)));
        }
        Ok(options.retval)
    }
}

/// A handle on the program that deletes addresses' connections and translations, independent of [`super::Programs`].
#[derive(Debug)]
pub struct Purger {
    program: Called,
}

impl Purger {
    pub(super) fn new(object: &Object) -> Result<Self> {
        Ok(Self { program: Called::new(object, "tp_purge")? })
    }

    /// Deletes every connection and translation of these addresses; how many there were. One walk of the tables serves
    /// up to twelve.
    pub fn purge(&self, addresses: &[IpAddr]) -> Result<u32> {
        let mut removed = 0;
        let mut addresses = addresses.iter().map(|a| Addr::new(*a)).peekable();
        while addresses.peek().is_some() {
            let mut purge = Purge::default();
            for (place, address) in purge.addrs.iter_mut().zip(addresses.by_ref()) {
                *place = address;
                purge.count += 1;
            }
            self.program.call(&mut purge)?;
            removed += purge.removed;
        }
        Ok(removed)
    }
}
