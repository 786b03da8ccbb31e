//! What another version of the programs left in its maps, or the same one with lower limits.
//!
//! A version with other layouts, or with larger maps, pins its maps in a directory of its own. It starts with what the other one's hold:
//! a map of the same layout, and large enough, is *shared*, so that what either writes is the other's at once; one of another layout is *copied*, field by field by name
//! ([`super::layout`]), when the programs are loaded, and connections once more when the other version's programs have gone. So it starts like another run of the same version,
//! with the ids of rules and backends, the connections and the translations that are in the kernel, whichever of the two is the newer.
//!
//! What cannot be carried (a map whose keys changed; what sockets believe, which cannot be listed, when its layout changes)
//! starts empty, as on a node that has just been started, and is said in the log.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use libbpf_rs::{AsRawLibbpf, MapCore, MapFlags, MapHandle, MapType, OpenMapMut, OpenObject};

use super::error::{Error, Result};
use super::layout::{Conversion, Layout, Types};

/// Maps that programs fill: what is entered while the other version's programs still run is copied, too.
const FILLED_BY_PROGRAMS: [&str; 5] = ["tp_ct", "tp_nat", "tp_snat", "tp_snat_asked", "tp_affinity"];

/// The maps of another version that are not shared.
#[derive(Debug, Default)]
pub(super) struct Inheritance {
    /// Our maps have been filled by an earlier run.
    filled: bool,
    copies: Vec<Copy>,
    /// Addresses whose connections were deleted since: what the other version's maps have of them is not theirs any more.
    gone: Vec<IpAddr>,
}

#[derive(Debug)]
struct Copy {
    name: String,
    from: MapHandle,
    conversion: Conversion,
    /// Our map holds nothing yet, or not all.
    fresh: bool,
}

/// Raw BTF of a map in the kernel.
fn raw_of_kernel(id: u32) -> Option<Vec<u8>> {
    // SAFETY: takes a number; null, or a description that is ours to free.
    let btf = unsafe { libbpf_sys::btf__load_from_kernel_by_id(id) };
    if btf.is_null() {
        return None;
    }
    let copied = copy_raw(btf);
    // SAFETY: it was made above and is used no more.
    unsafe { libbpf_sys::btf__free(btf) };
    copied
}

fn copy_raw(btf: *const libbpf_sys::btf) -> Option<Vec<u8>> {
    let mut size = 0;
    // SAFETY: `btf` is a live description; the answer is null, or `size` bytes that live as long as it does.
    unsafe {
        let data = libbpf_sys::btf__raw_data(btf, &raw mut size);
        (!data.is_null()).then(|| std::slice::from_raw_parts(data.cast::<u8>(), size as usize).to_vec())
    }
}

/// Raw BTF of an object that is open.
pub(super) fn raw_of_object(open: &OpenObject) -> Option<Vec<u8>> {
    // SAFETY: the object is open; its description lives as long as it does.
    let btf = unsafe { libbpf_sys::bpf_object__btf(open.as_libbpf_object().as_ptr()) };
    if btf.is_null() { None } else { copy_raw(btf) }
}

/// Key and value of a map that is to be made.
fn ours(types: &Types<'_>, map: &OpenMapMut<'_>) -> Option<(Layout, Layout)> {
    let map = map.as_libbpf_object().as_ptr();
    // SAFETY: the map belongs to an object that is open.
    let (key, value) =
        unsafe { (libbpf_sys::bpf_map__btf_key_type_id(map), libbpf_sys::bpf_map__btf_value_type_id(map)) };
    Some((types.layout(key)?, types.layout(value)?))
}

/// Key and value of a map in the kernel.
fn theirs(map: &MapHandle) -> Option<(Layout, Layout)> {
    let info = map.info().ok()?.info;
    let raw = raw_of_kernel(info.btf_id)?;
    let types = Types::parse(&raw)?;
    Some((types.layout(info.btf_key_type_id)?, types.layout(info.btf_value_type_id)?))
}

fn can_be_listed(kind: MapType) -> bool {
    matches!(kind, MapType::Hash | MapType::LruHash | MapType::LpmTrie | MapType::Array)
}

impl Inheritance {
    /// `filled`: our maps have been filled by an earlier run.
    pub(super) fn new(filled: bool) -> Self {
        Self { filled, ..Self::default() }
    }

    /// Notes that the connections of these addresses were deleted from our maps.
    pub(super) fn note_gone(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        self.gone.extend(addresses);
    }

    /// All that were noted.
    pub(super) fn gone(&self) -> &[IpAddr] {
        &self.gone
    }

    /// Shares or notes a map that other versions pinned. To be called for each map of ours before it is made; `pin` is where it will be,
    /// `others` are the directories of other
    /// versions' maps, best first.
    pub(super) fn consider(
        &mut self,
        types: &Types<'_>,
        map: &OpenMapMut<'_>,
        pin: &Path,
        others: &[PathBuf],
    ) -> Result<()> {
        let name = map.name().to_string_lossy().into_owned();
        let Some(path) = others.iter().map(|dir| dir.join(&name)).find(|path| path.exists()) else { return Ok(()) };
        let failed = |e| Error::bpf("adopt map", path.display().to_string(), e);
        let mut from = MapHandle::from_pinned_path(&path).map_err(failed)?;
        let fresh = !self.filled || !pin.exists();
        let (Some(to), Some(was)) = (ours(types, map), theirs(&from)) else {
            tracing::warn!(map = name, "another version's map cannot be understood: ours starts empty");
            return Ok(());
        };
        let same_kind = from.map_type() == map.map_type();
        // One that is larger than wanted will do; into a smaller one not all might fit.
        let large = from.max_entries() >= map.max_entries();
        if same_kind && large && was == to && from.info().map_err(failed)?.info.map_flags == map.map_flags() {
            if !pin.exists() {
                from.pin(pin).map_err(|e| Error::bpf("share map", pin.display().to_string(), e))?;
            }
            return Ok(());
        }
        let listed = can_be_listed(from.map_type()) && can_be_listed(map.map_type());
        match Conversion::new((&was.0, &was.1), (&to.0, &to.1)).filter(|_| listed) {
            Some(conversion) => self.copies.push(Copy { name, from, conversion, fresh }),
            None => tracing::warn!(map = name, "what another version's map holds cannot be carried: ours starts empty"),
        }
        Ok(())
    }

    /// Copies what is to be copied into maps that were just made.
    pub(super) fn copy_all(&self, object: &libbpf_rs::Object) -> Result<()> {
        self.copies.iter().filter(|copy| copy.fresh).try_for_each(|copy| copy.run(object, MapFlags::ANY))
    }

    /// Copies what the other version's programs entered since. They must have gone: whether the account of connections may
    /// be wrong now.
    pub(super) fn copy_late(&self, object: &libbpf_rs::Object) -> Result<bool> {
        for copy in self.copies.iter().filter(|copy| FILLED_BY_PROGRAMS.contains(&copy.name.as_str())) {
            copy.run(object, MapFlags::NO_EXIST)?;
        }
        Ok(self.copies.iter().any(|copy| ["tp_ct", "tp_flows", "tp_held"].contains(&copy.name.as_str())))
    }
}

impl Copy {
    fn run(&self, object: &libbpf_rs::Object, flags: MapFlags) -> Result<()> {
        let to = object
            .maps()
            .find(|map| map.name().to_string_lossy() == self.name.as_str())
            .ok_or_else(|| Error::Mismatch { what: format!("map {}, which is missing", self.name) })?;
        let (mut copied, mut left) = (0usize, HashMap::<String, usize>::new());
        // A key that is deleted while it is read sends the walk back to the start: it ends all the same.
        for key in self.from.keys().take(self.from.max_entries() as usize * 2) {
            // Deleted meanwhile.
            let Ok(Some(value)) = self.from.lookup(&key, MapFlags::ANY) else { continue };
            let Some((key, value)) = self.conversion.entry(&key, &value) else {
                *left.entry("they say what this version has no room for".to_owned()).or_default() += 1;
                continue;
            };
            match to.update(&key, &value, flags) {
                Ok(()) => copied += 1,
                Err(error) if error.kind() == libbpf_rs::ErrorKind::AlreadyExists => {}
                Err(error) => *left.entry(error.to_string()).or_default() += 1,
            }
        }
        tracing::info!(map = self.name, copied, "copied from another version's map");
        for (why, count) in left {
            tracing::warn!(map = self.name, count, why, "entries of another version's map are lost");
        }
        Ok(())
    }
}

/// Lays the maps of a version out anew, as the next version would have them; the layouts that differ.
#[cfg(test)]
pub(crate) fn lay_out_as_the_next_version(maps: &Path) -> Vec<String> {
    let next = include_bytes!(concat!(env!("OUT_DIR"), "/next.o"));
    let mut open = libbpf_rs::ObjectBuilder::default().open_memory(next).unwrap();
    open.progs_mut().for_each(|mut program| program.set_autoload(false));
    let raw = raw_of_object(&open).unwrap();
    let types = Types::parse(&raw).unwrap();
    let mut inheritance = Inheritance::default();
    for map in open.maps_mut() {
        let name = map.name().to_string_lossy().into_owned();
        let there = MapHandle::from_pinned_path(maps.join(&name)).ok();
        let same = there.as_ref().and_then(theirs) == ours(&types, &map);
        if there.is_some() && !same {
            inheritance.consider(&types, &map, &maps.join("nothing"), &[maps.to_owned()]).unwrap();
        }
    }
    let mut object = open.load().unwrap();
    inheritance.copy_all(&object).unwrap();
    let names: Vec<String> = inheritance.copies.iter().map(|copy| copy.name.clone()).collect();
    for mut map in object.maps_mut().filter(|map| names.iter().any(|name| map.name() == name.as_str())) {
        let pin = maps.join(map.name());
        std::fs::remove_file(&pin).unwrap();
        map.pin(pin).unwrap();
    }
    names
}
