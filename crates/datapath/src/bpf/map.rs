//! Typed maps: keys and values are ABI types, sizes are checked when the map is opened, reads are complete.

use std::ffi::c_void;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr;

use libbpf_rs::{MapCore, Object};

use super::error::{Error, Result};
use crate::abi::Plain;

/// Entries that one batch call reads or writes.
const BATCH: usize = 4096;
/// Bytes that one batch call reads: fewer entries of maps whose entries are large.
const BATCH_BYTES: usize = 2 << 20;

/// One map of the loaded object.
#[derive(Debug)]
pub(crate) struct Map<K, V> {
    fd: OwnedFd,
    name: &'static str,
    limit: u32,
    kinds: PhantomData<fn() -> (K, V)>,
}

/// libbpf answers 0 or a negative errno.
pub(crate) fn check(ret: i32) -> io::Result<()> {
    if ret < 0 { Err(io::Error::from_raw_os_error(-ret)) } else { Ok(()) }
}

fn batch_options() -> libbpf_sys::bpf_map_batch_opts {
    libbpf_sys::bpf_map_batch_opts {
        sz: size_of::<libbpf_sys::bpf_map_batch_opts>() as libbpf_sys::size_t,
        elem_flags: 0,
        flags: 0,
    }
}

impl<K: Plain, V: Plain> Map<K, V> {
    /// The map of that name, which must have keys and values of these sizes.
    pub(crate) fn open(object: &Object, name: &'static str) -> Result<Self> {
        let map = object
            .maps()
            .find(|map| map.name() == name)
            .ok_or_else(|| Error::Mismatch { what: format!("map {name}, which is missing") })?;
        if map.key_size() as usize != size_of::<K>() || map.value_size() as usize != size_of::<V>() {
            return Err(Error::Mismatch { what: format!("the layout of map {name}") });
        }
        let fd = map.as_fd().try_clone_to_owned().map_err(|e| Error::kernel("keep open map", name, e))?;
        Ok(Self { fd, name, limit: map.max_entries(), kinds: PhantomData })
    }

    fn failed(&self, operation: &'static str, source: io::Error) -> Error {
        match source.raw_os_error() {
            Some(libc::E2BIG | libc::ENOSPC) => Error::Full { map: self.name, limit: self.limit },
            _ => Error::kernel(operation, self.name, source),
        }
    }

    /// Its name.
    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// Entries it may hold.
    pub(crate) fn limit(&self) -> u32 {
        self.limit
    }

    /// The value of a key.
    pub(crate) fn get(&self, key: &K) -> Result<Option<V>> {
        let mut value = V::default();
        // SAFETY: key and value are plain and as large as the map's, which `open` checked; this is no per-CPU map.
        let ret = unsafe {
            libbpf_sys::bpf_map_lookup_elem(
                self.fd.as_raw_fd(),
                ptr::from_ref(key).cast(),
                ptr::from_mut(&mut value).cast(),
            )
        };
        match check(ret) {
            Ok(()) => Ok(Some(value)),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(e) => Err(self.failed("read map", e)),
        }
    }

    /// Sets the value of a key.
    pub(crate) fn put(&self, key: &K, value: &V) -> Result<()> {
        // SAFETY: key and value are plain and as large as the map's, which `open` checked.
        let ret = unsafe {
            libbpf_sys::bpf_map_update_elem(
                self.fd.as_raw_fd(),
                ptr::from_ref(key).cast(),
                ptr::from_ref(value).cast(),
                0,
            )
        };
        check(ret).map_err(|e| self.failed("write map", e))
    }

    /// Writes many entries; on failure also how many of them were written.
    pub(crate) fn put_all(&self, keys: &[K], values: &[V]) -> std::result::Result<(), (usize, Error)> {
        let mut done = 0;
        for (keys, values) in keys.chunks(BATCH).zip(values.chunks(BATCH)) {
            let mut count = keys.len().min(values.len()) as u32;
            // SAFETY: both arrays hold `count` plain elements of the map's sizes.
            let ret = unsafe {
                libbpf_sys::bpf_map_update_batch(
                    self.fd.as_raw_fd(),
                    keys.as_ptr().cast(),
                    values.as_ptr().cast(),
                    &mut count,
                    &batch_options(),
                )
            };
            done += count as usize;
            check(ret).map_err(|e| (done, self.failed("write map", e)))?;
        }
        Ok(())
    }

    /// Deletes a key; whether it was there.
    pub(crate) fn delete(&self, key: &K) -> Result<bool> {
        // SAFETY: the key is plain and as large as the map's, which `open` checked.
        let ret = unsafe { libbpf_sys::bpf_map_delete_elem(self.fd.as_raw_fd(), ptr::from_ref(key).cast()) };
        match check(ret) {
            Ok(()) => Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(e) => Err(self.failed("delete from map", e)),
        }
    }

    /// Every entry. A short batch is no sign of the end: a hash map's batches end at buckets, so this goes on until the
    /// kernel says that there is no more. What is added or deleted meanwhile may or may not be among them.
    pub(crate) fn entries(&self) -> Result<Vec<(K, V)>> {
        let mut entries = Vec::new();
        let mut room = (BATCH_BYTES / (size_of::<K>() + size_of::<V>())).clamp(16, BATCH);
        let cursor = size_of::<K>().max(size_of::<u64>());
        let (mut at, mut next) = (vec![0u8; cursor], vec![0u8; cursor]);
        let mut started = false;
        loop {
            let mut keys = vec![K::default(); room];
            let mut values = vec![V::default(); room];
            let mut count = room as u32;
            let from: *mut c_void = if started { at.as_mut_ptr().cast() } else { ptr::null_mut() };
            // SAFETY: both arrays have room for `count` plain elements of the map's sizes; the cursors are at least as large
            // as a key and as the bucket number that hash maps use.
            let ret = unsafe {
                libbpf_sys::bpf_map_lookup_batch(
                    self.fd.as_raw_fd(),
                    from,
                    next.as_mut_ptr().cast(),
                    keys.as_mut_ptr().cast(),
                    values.as_mut_ptr().cast(),
                    &mut count,
                    &batch_options(),
                )
            };
            let end = match check(ret) {
                Ok(()) => false,
                Err(e) if e.raw_os_error() == Some(libc::ENOENT) => true,
                // One bucket holds more than there is room for.
                Err(e) if e.raw_os_error() == Some(libc::ENOSPC) => {
                    room *= 2;
                    continue;
                }
                Err(e) => return Err(self.failed("read map", e)),
            };
            entries.extend(keys.into_iter().zip(values).take(count as usize));
            if end {
                return Ok(entries);
            }
            std::mem::swap(&mut at, &mut next);
            started = true;
        }
    }
}

/// A per-CPU array of one value, summed by the reader.
pub(crate) fn per_cpu<V: Plain>(object: &Object, name: &'static str, index: u32) -> Result<Vec<V>> {
    let map = object
        .maps()
        .find(|map| map.name() == name)
        .ok_or_else(|| Error::Mismatch { what: format!("map {name}, which is missing") })?;
    let values = map
        .lookup_percpu(&index.to_ne_bytes(), libbpf_rs::MapFlags::ANY)
        .map_err(|e| Error::bpf("read map", name, e))?
        .unwrap_or_default();
    Ok(values.iter().filter_map(|bytes| from_bytes(bytes)).collect())
}

/// The sum of what `of` says of every CPU's only entry.
pub(crate) fn sum_per_cpu<V: Plain>(map: &impl MapCore, name: &'static str, of: impl Fn(V) -> u64) -> Result<u64> {
    let values = map
        .lookup_percpu(&0u32.to_ne_bytes(), libbpf_rs::MapFlags::ANY)
        .map_err(|e| Error::bpf("read map", name, e))?
        .unwrap_or_default();
    Ok(values.iter().filter_map(|bytes| from_bytes(bytes)).map(of).fold(0, u64::wrapping_add))
}

/// A plain value from its bytes; none when there are too few.
pub(crate) fn from_bytes<V: Plain>(bytes: &[u8]) -> Option<V> {
    (bytes.len() >= size_of::<V>()).then(|| {
        // SAFETY: there are enough bytes, any bytes are a value of a plain type, and the read needs no alignment.
        unsafe { ptr::read_unaligned(bytes.as_ptr().cast()) }
    })
}

/// A plain value's bytes.
pub(crate) fn as_bytes_mut<V: Plain>(value: &mut V) -> &mut [u8] {
    // SAFETY: a plain value has no padding, so all its bytes are defined, and any bytes written are a value of it.
    unsafe { std::slice::from_raw_parts_mut(ptr::from_mut(value).cast(), size_of::<V>()) }
}
