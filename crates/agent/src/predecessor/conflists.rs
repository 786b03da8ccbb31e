//! CNI configurations of Flannel and Canal: set aside when ours is there and works, put back when this node goes back.
//!
//! Set aside means renamed so that no container runtime reads it: runtimes take `.conf`, `.conflist` and `.json`. Others' are left
//! alone ([`crate::conflist::preferred_to_ours`] names them). Canal's looks like that of a Calico whose addresses are `host-local`'s too and
//! which is another network, with routes of its own: what tells them apart is whether Flannel is on the node.

use std::cell::LazyCell;
use std::fs;
use std::io;
use std::path::Path;

use serde_json::Value;

/// What is added to the name of a configuration that was set aside.
pub const ASIDE: &str = ".towpath-set-aside";

/// Names of Flannel's and Canal's configurations that the runtime would take, whatever their names. `flannel_here`: whether Flannel is,
/// or was, on this node; only asked where it matters.
///
/// # Errors
/// The directory cannot be read.
pub fn active(directory: &Path, flannel_here: impl FnOnce() -> bool) -> io::Result<Vec<String>> {
    let flannel_here = LazyCell::new(flannel_here);
    let read = |name: &String| [".conf", ".conflist", ".json"].iter().any(|end| name.ends_with(end));
    let theirs = |name: &String| match fs::read(directory.join(name)).ok().and_then(|text| network_of(&text)) {
        Some(Network::Flannel) => true,
        Some(Network::CalicoHostLocal) => *flannel_here,
        None => false,
    };
    Ok(names(directory)?.into_iter().filter(read).filter(theirs).collect())
}

/// Names of those that were set aside, without [`ASIDE`].
///
/// # Errors
/// The directory cannot be read.
pub fn aside(directory: &Path) -> io::Result<Vec<String>> {
    Ok(names(directory)?.into_iter().filter_map(|name| name.strip_suffix(ASIDE).map(str::to_owned)).collect())
}

/// Sets them aside; their names. Only for a node on which our configuration is there and works.
///
/// # Errors
/// One cannot be renamed; the others before it are.
pub fn set_aside(directory: &Path, flannel_here: impl FnOnce() -> bool) -> io::Result<Vec<String>> {
    let names = active(directory, flannel_here)?;
    for name in &names {
        fs::rename(directory.join(name), directory.join(format!("{name}{ASIDE}")))?;
    }
    Ok(names)
}

/// Puts back what was set aside; the names. One that is there again meanwhile stays as it is.
///
/// # Errors
/// One cannot be renamed or removed; the others before it are.
pub fn restore(directory: &Path) -> io::Result<Vec<String>> {
    let names = aside(directory)?;
    for name in &names {
        let (there, was) = (directory.join(name), directory.join(format!("{name}{ASIDE}")));
        if there.exists() { fs::remove_file(was)? } else { fs::rename(was, there)? }
    }
    Ok(names)
}

/// Removes what was set aside, when there is no way back to it any more; the names.
///
/// # Errors
/// One cannot be removed; the others before it are.
pub fn forget(directory: &Path) -> io::Result<Vec<String>> {
    let names = aside(directory)?;
    for name in &names {
        fs::remove_file(directory.join(format!("{name}{ASIDE}")))?;
    }
    Ok(names)
}

fn names(directory: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        entries => {
            for entry in entries? {
                names.extend(entry?.file_name().into_string().ok());
            }
        }
    }
    names.sort();
    Ok(names)
}

/// Whose configuration it may be.
enum Network {
    /// It names the plugin `flannel`.
    Flannel,
    /// It names `calico` with addresses by `host-local`: Canal's beside Flannel. (Calico's own IPAM is another network in any case.)
    CalicoHostLocal,
}

fn network_of(text: &[u8]) -> Option<Network> {
    let value = serde_json::from_slice::<Value>(text).ok()?;
    let plugins = match value.get("plugins").and_then(Value::as_array) {
        Some(plugins) => plugins.clone(),
        None => vec![value],
    };
    plugins.iter().find_map(|plugin| match plugin.get("type").and_then(Value::as_str) {
        Some("flannel") => Some(Network::Flannel),
        Some("calico") if plugin.pointer("/ipam/type").and_then(Value::as_str) == Some("host-local") => {
            Some(Network::CalicoHostLocal)
        }
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLANNEL: &str = r#"{"name":"cbr0","cniVersion":"0.3.1","plugins":[{"type":"flannel","delegate":{"isDefaultGateway":true}},{"type":"portmap"}]}"#;
    const CANAL: &str = r#"{"name":"k8s-pod-network","plugins":[{"type":"calico","ipam":{"type":"host-local","subnet":"usePodCidr"}}]}"#;
    const CALICO: &str = r#"{"name":"k8s-pod-network","plugins":[{"type":"calico","ipam":{"type":"calico-ipam"}}]}"#;

    fn rig() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("10-flannel.conflist", FLANNEL),
            ("10-canal.conflist", CANAL),
            ("10-calico.conflist", CALICO),
            ("10-towpath.conflist", r#"{"plugins":[{"type":"towpath-cni"}]}"#),
            ("99-broken.conf", "{"),
            ("calico-kubeconfig", "x"),
        ] {
            fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    #[test]
    fn flannels_and_canals_go_aside_and_come_back_and_others_stay() {
        let dir = rig();
        let before = names(dir.path()).unwrap();
        assert_eq!(set_aside(dir.path(), || true).unwrap(), ["10-canal.conflist", "10-flannel.conflist"]);
        assert!(active(dir.path(), || true).unwrap().is_empty());
        assert_eq!(crate::conflist::preferred_to_ours(dir.path()), ["10-calico.conflist"]);
        assert_eq!(restore(dir.path()).unwrap().len(), 2);
        assert_eq!(names(dir.path()).unwrap(), before);
        assert_eq!(fs::read_to_string(dir.path().join("10-flannel.conflist")).unwrap(), FLANNEL);
    }

    #[test]
    fn without_flannel_on_the_node_calicos_is_another_networks_and_stays() {
        let dir = rig();
        assert_eq!(set_aside(dir.path(), || false).unwrap(), ["10-flannel.conflist"]);
        let named = crate::conflist::preferred_to_ours(dir.path());
        assert_eq!(named, ["10-calico.conflist", "10-canal.conflist"], "status names them");
        fs::remove_file(dir.path().join("10-canal.conflist")).unwrap();
        active(dir.path(), || panic!("asked where it does not matter")).unwrap();
    }

    #[test]
    fn what_was_written_again_meanwhile_is_newer() {
        let dir = rig();
        set_aside(dir.path(), || true).unwrap();
        fs::write(dir.path().join("10-flannel.conflist"), r#"{"type":"flannel"}"#).unwrap();
        restore(dir.path()).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("10-flannel.conflist")).unwrap(), r#"{"type":"flannel"}"#);
        assert!(aside(dir.path()).unwrap().is_empty());
        // And set aside again, it takes the place of what is there.
        set_aside(dir.path(), || true).unwrap();
        assert_eq!(aside(dir.path()).unwrap(), ["10-canal.conflist", "10-flannel.conflist"]);
    }

    #[test]
    fn without_a_directory_there_is_nothing() {
        assert!(set_aside(Path::new("/nonexistent"), || true).unwrap().is_empty());
        assert!(restore(Path::new("/nonexistent")).unwrap().is_empty());
    }
}
