//! The built-in object: opened, sized, pinned, loaded, and its small programs run.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use libbpf_rs::{MapHandle, Object, ObjectBuilder, OpenMapMut, OpenObject, PrintLevel, ProgramInput, set_print};

use super::config::{BpfConfig, Limits};
use super::error::{Error, Result};
use super::features;
use super::inherit::{self, Inheritance};
use super::layout::Types;
use super::map::as_bytes_mut;
use crate::abi::{Plain, TP_ABI_VERSION};

/// The compiled `bpf/towpath.c`.
static OBJECT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/towpath.o"));

/// Maps that outlive the process. The others are scratch, constants and what only tests use.
const PINNED: [&str; 33] = [
    "tp_node_config",
    "tp_revision",
    "tp_pods",
    "tp_netns_pods",
    "tp_peers",
    "tp_class_pods",
    "tp_class_cidrs",
    "tp_set_class",
    "tp_rules",
    "tp_audited",
    "tp_ct",
    "tp_nat",
    "tp_snat",
    "tp_snat_asked",
    "tp_budget",
    "tp_held",
    "tp_flows",
    "tp_frags",
    "tp_services",
    "tp_slots",
    "tp_backends",
    "tp_loads",
    "tp_loads_kept",
    "tp_service_bits",
    "tp_source_ranges",
    "tp_service_names",
    "tp_node_names",
    "tp_udp_nodes",
    "tp_affinity",
    "tp_sock_load",
    "tp_sock_peer",
    "tp_sock_peers",
    "tp_counters",
];
/// Holds the collector's timer: pinned, because a timer dies with the last reference from user space.
const COLLECTOR: &str = "tp_collector";

/// What the name of a version's directory begins with; the ABI version follows, and where limits were raised since, `-` and how often.
const VERSIONED: &str = "towpath-v";

/// Beside the maps once they hold what another version's did: a symbolic link, since a bpffs has no files.
const FILLED: &str = "filled";

/// Lines of libbpf's log kept for an error.
const LOG_LINES: usize = 30;
/// libbpf has one log callback a process; loading is rare, so one lock for all is enough.
static LOG: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn keep_log(level: PrintLevel, line: String) {
    if level == PrintLevel::Debug {
        return;
    }
    if let Ok(mut log) = LOG.lock() {
        log.extend(line.lines().map(str::to_owned));
        let extra = log.len().saturating_sub(LOG_LINES);
        log.drain(..extra);
    }
}

/// The limit of a map, and what it is called in the agent's configuration (`limits` in agent.yaml).
fn limit_of(limits: &Limits, map: &str) -> Option<(&'static str, u32)> {
    Some(match map {
        "tp_ct" | "tp_nat" => ("connections", limits.connections),
        // A table of their own: what clients outside have with backends that are no pods takes nobody's share.
        "tp_snat" | "tp_snat_asked" => ("connections", limits.connections / 4),
        "tp_services" | "tp_source_ranges" | "tp_service_names" => ("services", limits.services),
        "tp_slots" => ("slots", limits.slots),
        "tp_backends" | "tp_loads" => ("backends", limits.backends),
        "tp_class_pods" | "tp_class_cidrs" => ("classes", limits.classes),
        "tp_set_class" => ("setClasses", limits.set_classes),
        "tp_rules" => ("rules", limits.rules),
        "tp_peers" | "tp_node_names" | "tp_udp_nodes" => ("peers", limits.peers),
        "tp_pods" | "tp_netns_pods" => ("pods", limits.pods),
        // No pod has less than one address; and two holders are no pods.
        "tp_flows" => ("pods", limits.pods.saturating_add(2)),
        _ => return None,
    })
}

/// What the limit of a map is called in the agent's configuration.
pub(super) fn limit_name(map: &str) -> Option<&'static str> {
    limit_of(&Limits::default(), map).map(|(name, _)| name)
}

/// This node's part of a bpffs.
#[derive(Clone, Debug)]
pub(crate) struct PinDir {
    root: PathBuf,
}

impl PinDir {
    /// Creates what is missing, for root's eyes only. Maps that are smaller than `limits` wants are left where they are: ours are made
    /// in another directory, and filled from those as from another version's.
    pub(crate) fn create(pin_dir: &Path, limits: &Limits) -> Result<Self> {
        let dir = Self { root: pin_dir.join(own_name(pin_dir, limits)) };
        for path in [dir.root.clone(), dir.maps(), dir.links()] {
            let failed = |e| Error::kernel("make directory", path.display().to_string(), e);
            match fs::create_dir(&path) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(failed(e)),
                _ => fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).map_err(failed)?,
            }
        }
        Ok(dir)
    }

    /// Directories of links that other versions pinned beside ours, older or newer.
    pub(crate) fn former_links(&self) -> Result<Vec<PathBuf>> {
        let roots = self.former()?.into_iter().map(|root| root.join("links"));
        Ok(roots.filter(|links| links.is_dir()).collect())
    }

    /// Whether another version pinned anything.
    pub(crate) fn has_former(&self) -> bool {
        self.former().is_ok_and(|former| !former.is_empty())
    }

    /// Directories of maps that other versions pinned: that of the version at work first, the newest version's next.
    fn former_maps(&self) -> Result<Vec<PathBuf>> {
        let mut former = self.former()?;
        let is_at_work =
            |root: &PathBuf| fs::read_dir(root.join("links")).is_ok_and(|mut links| links.next().is_some());
        // Stable: within either kind the newest version's stays first.
        former.sort_by_key(|root| !is_at_work(root));
        Ok(former.into_iter().map(|root| root.join("maps")).filter(|maps| maps.is_dir()).collect())
    }

    /// Whether our maps were filled with what another version's hold. Pinned maps alone do not say so: a process may have been
    /// killed in between, and then none of our programs ever ran.
    fn are_filled(&self) -> bool {
        fs::symlink_metadata(self.maps().join(FILLED)).is_ok()
    }

    fn note_filled(&self) -> Result<()> {
        let note = self.maps().join(FILLED);
        match std::os::unix::fs::symlink("maps", &note) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                Err(Error::kernel("make link", note.display().to_string(), e))
            }
            _ => Ok(()),
        }
    }

    /// Other versions' directories, the newest version's first.
    fn former(&self) -> Result<Vec<PathBuf>> {
        let Some(beside) = self.root.parent() else { return Ok(Vec::new()) };
        let failed = |e| Error::kernel("list", beside.display().to_string(), e);
        let mut roots = Vec::new();
        for entry in fs::read_dir(beside).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let version = entry.file_name().to_str().and_then(version_of);
            if let Some(version) = version.filter(|_| entry.path() != self.root) {
                roots.push((version, entry.path()));
            }
        }
        roots.sort_by(|one, other| other.cmp(one));
        Ok(roots.into_iter().map(|(_, root)| root).collect())
    }

    pub(crate) fn maps(&self) -> PathBuf {
        self.root.join("maps")
    }

    pub(crate) fn links(&self) -> PathBuf {
        self.root.join("links")
    }

    /// Removes the pinned maps and the directories; links must be gone.
    pub(crate) fn remove(&self) -> Result<()> {
        self.remove_former()?;
        remove_version(&self.root)
    }

    /// As [`PinDir::remove`], for other versions.
    pub(crate) fn remove_former(&self) -> Result<()> {
        self.former()?.iter().try_for_each(|root| remove_version(root))
    }
}

/// ABI version and number of a directory, by its name.
fn version_of(name: &str) -> Option<(u32, u32)> {
    let text = name.strip_prefix(VERSIONED)?;
    match text.split_once('-') {
        Some((version, number)) => Some((version.parse().ok()?, number.parse().ok()?)),
        None => Some((text.parse().ok()?, 0)),
    }
}

/// The directory of ours that is large enough, else a new one. Of several the latest: what is before it gives way to it.
fn own_name(pin_dir: &Path, limits: &Limits) -> String {
    let entries = fs::read_dir(pin_dir).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| version_of(entry.file_name().to_str()?));
    let latest = names.filter(|(version, _)| *version == TP_ABI_VERSION).map(|(_, number)| number).max();
    let name = |number: u32| match number {
        0 => format!("{VERSIONED}{TP_ABI_VERSION}"),
        _ => format!("{VERSIONED}{TP_ABI_VERSION}-{number}"),
    };
    let Some(latest) = latest else { return name(0) };
    let small = smaller_maps(&pin_dir.join(name(latest)).join("maps"), limits);
    if small.is_empty() {
        return name(latest);
    }
    tracing::info!(maps = small.join(", "), "limits were raised: making larger maps");
    name(latest + 1)
}

/// Pinned maps that are smaller than wanted.
fn smaller_maps(maps: &Path, limits: &Limits) -> Vec<&'static str> {
    use libbpf_rs::MapCore as _;
    let is_small = |name: &&str| {
        let wanted = limit_of(limits, name);
        let pinned = wanted.and_then(|_| MapHandle::from_pinned_path(maps.join(name)).ok());
        pinned.is_some_and(|pinned| wanted.is_some_and(|(_, wanted)| pinned.max_entries() < wanted))
    };
    PINNED.into_iter().filter(is_small).collect()
}

/// Removes the maps that a version pinned and its directories; links must be gone.
fn remove_version(root: &Path) -> Result<()> {
    let failed = |path: &Path, e| Error::kernel("remove", path.display().to_string(), e);
    let (maps, links) = (root.join("maps"), root.join("links"));
    if maps.is_dir() {
        for entry in fs::read_dir(&maps).map_err(|e| failed(&maps, e))? {
            let path = entry.map_err(|e| failed(&maps, e))?.path();
            fs::remove_file(&path).map_err(|e| failed(&path, e))?;
        }
    }
    for path in [&maps, &links, &root.to_owned()] {
        match fs::remove_dir(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(path, e)),
            _ => {}
        }
    }
    Ok(())
}

/// Sets where a map is pinned. One that is pinned already keeps its size.
fn prepare_map(map: &mut OpenMapMut<'_>, name: &str, maps: &Path) -> Result<()> {
    let failed = |e| Error::bpf("prepare map", name, e);
    if name != COLLECTOR && !PINNED.contains(&name) {
        return Ok(());
    }
    let pin = maps.join(name);
    if pin.exists() {
        use libbpf_rs::MapCore as _;
        let pinned = MapHandle::from_pinned_path(&pin).map_err(failed)?;
        if pinned.max_entries() != map.max_entries() {
            // Another directory was chosen if it were smaller.
            tracing::warn!(
                map = name,
                wanted = map.max_entries(),
                kept = pinned.max_entries(),
                "a limit that was lowered keeps its former value until the node restarts"
            );
            map.set_max_entries(pinned.max_entries()).map_err(failed)?;
        }
    }
    map.set_pin_path(&pin).map_err(failed)
}

pub(super) fn set_testing(map: &mut OpenMapMut<'_>) {
    // The object's only constant is tp_testing.
    if let Some(first) = map.initial_value_mut().and_then(|data| data.first_mut()) {
        *first = 1;
    }
}

fn prepare(open: &mut OpenObject, pins: &PinDir, limits: &Limits, testing: bool) -> Result<Inheritance> {
    let (maps, others) = (pins.maps(), pins.former_maps()?);
    let raw = inherit::raw_of_object(open);
    let types = raw.as_deref().and_then(Types::parse);
    let mut inheritance = Inheritance::new(pins.are_filled());
    for mut map in open.maps_mut() {
        let name = map.name().to_string_lossy().into_owned();
        if testing && name.ends_with(".rodata") {
            set_testing(&mut map);
        }
        if let Some((_, limit)) = limit_of(limits, &name) {
            map.set_max_entries(limit.max(1)).map_err(|e| Error::bpf("prepare map", name.as_str(), e))?;
        }
        if let Some(types) = types.as_ref().filter(|_| PINNED.contains(&name.as_str())) {
            inheritance.consider(types, &map, &maps.join(&name), &others)?;
        }
        prepare_map(&mut map, &name, &maps)?;
    }
    Ok(inheritance)
}

fn open() -> Result<OpenObject> {
    ObjectBuilder::default()
        .name("towpath")
        .and_then(|builder| builder.open_memory(OBJECT))
        .map_err(|e| Error::bpf("read", "the built-in BPF object", e))
}

/// How the built-in object describes its types.
#[cfg(test)]
pub(super) fn raw_types() -> Option<Vec<u8>> {
    inherit::raw_of_object(&open().ok()?)
}

/// Opens, sizes, pins and loads the object, and fills its maps with what another version's hold.
pub(crate) fn load(config: &BpfConfig, pins: &PinDir, testing: bool) -> Result<(Object, Inheritance)> {
    set_print(Some((PrintLevel::Info, keep_log)));
    let mut open = open()?;
    let inheritance = prepare(&mut open, pins, &config.limits, testing)?;
    if let Ok(mut log) = LOG.lock() {
        log.clear();
    }
    let object = open.load().map_err(|source| {
        let log = LOG.lock().map(|log| log.join("\n")).unwrap_or_default();
        // Which feature it is that a refusing kernel lacks is asked only now: it costs a program each.
        match features::missing() {
            missing if missing.is_empty() => Error::Verifier { log, source },
            missing => Error::Unsupported { release: features::release(), missing },
        }
    })?;
    inheritance.copy_all(&object)?;
    pins.note_filled()?;
    Ok((object, inheritance))
}

/// The descriptor of a loaded program.
pub(crate) fn program<'a>(object: &'a Object, name: &str) -> Result<libbpf_rs::Program<'a>> {
    object
        .progs()
        .find(|program| program.name() == name)
        .ok_or_else(|| Error::Mismatch { what: format!("program {name}, which is missing") })
}

/// Runs a `SEC("syscall")` program on a context that it may change; its return value.
pub(crate) fn call<C: Plain>(object: &Object, name: &str, context: &mut C) -> Result<u32> {
    let program = object
        .progs_mut()
        .find(|program| program.name() == name)
        .ok_or_else(|| Error::Mismatch { what: format!("program {name}, which is missing") })?;
    let input = ProgramInput { context_in: Some(as_bytes_mut(context)), ..ProgramInput::default() };
    let output = program.test_run(input).map_err(|e| Error::bpf("run", name, e))?;
    Ok(output.return_value)
}

/// Descriptor of a program, for attaching.
pub(crate) fn descriptor<'a>(program: &'a libbpf_rs::Program<'_>) -> BorrowedFd<'a> {
    program.as_fd()
}

#[cfg(test)]
mod tests {
    use libbpf_rs::Btf;
    use libbpf_rs::btf::types::{MemberAttr, Struct};

    /// The compiler's own word for every layout: what clang made of the header, against what rustc made of its Rust side.
    #[test]
    fn the_object_and_the_rust_side_lay_every_struct_out_alike() {
        let btf = Btf::from_path(concat!(env!("OUT_DIR"), "/towpath.o")).unwrap();
        let held = Btf::from_path(concat!(env!("OUT_DIR"), "/held.o")).unwrap();
        let wire = Btf::from_path(concat!(env!("OUT_DIR"), "/wire.o")).unwrap();
        let mut compared = 0;
        for (name, size, fields) in crate::abi::LAYOUTS {
            // A struct that no program uses is not in the object.
            let found = [&btf, &held, &wire].into_iter().find_map(|btf| btf.type_by_name::<Struct<'_>>(name));
            let Some(found) = found else { continue };
            assert_eq!(libbpf_rs::HasSize::size(&found), *size, "{name}");
            for (field, offset) in *fields {
                let member = found.iter().find(|m| m.name.is_some_and(|n| n == *field)).expect(field);
                let MemberAttr::Normal { offset: bits } = member.attr else { panic!("{name}.{field} is a bit field") };
                assert_eq!(bits as usize, offset * 8, "{name}.{field}");
            }
            compared += 1;
        }
        assert_eq!(compared, crate::abi::LAYOUTS.len(), "every struct of the header is used by a program or a map");
    }
}
