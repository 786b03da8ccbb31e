//! The CNI configuration that tells the container runtime to call `towpath-cni`: written last, when the node is ready.

use std::io;
use std::path::Path;

use towpath_wire::config::AgentConfig;

/// Name of the network.
pub const NETWORK: &str = "towpath";

/// File name; runtimes take the first of a directory in lexical order.
pub const FILE: &str = "10-towpath.conflist";

/// Text of the configuration. `cniVersion` 1.0.0, because runtimes older than containerd 2 refuse 1.1.0; newer ones choose from
/// `cniVersions`, and GC and STATUS need 1.1.0.
pub fn text(config: &AgentConfig) -> String {
    let value = serde_json::json!({
        "cniVersion": "1.0.0",
        "cniVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"],
        "name": NETWORK,
        "plugins": [{
            "type": "towpath-cni",
            "capabilities": {"bandwidth": true},
            "socket": config.cni_socket(),
            "stateDir": config.state_dir,
        }],
    });
    format!("{value:#}\n")
}

/// Writes it atomically, when it is not there already; kubelet watches the directory and must never see half a file.
///
/// # Errors
/// The directory cannot be made or written.
pub fn install(config: &AgentConfig) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let path = config.cni_conf_dir.join(FILE);
    let text = text(config);
    if std::fs::read_to_string(&path).is_ok_and(|have| have == text) {
        return Ok(());
    }
    std::fs::create_dir_all(&config.cni_conf_dir)?;
    crate::disk::write_atomically(&path, text.as_bytes())?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644))
}

/// Other configurations that a runtime would prefer to ours. One of a meta-plugin (Multus) has to come first: it calls the next
/// one, which is ours.
pub fn preferred_to_ours(directory: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let mut names: Vec<String> = entries
        .filter_map(|e| e.ok()?.file_name().into_string().ok())
        .filter(|name| [".conf", ".conflist", ".json"].iter().any(|end| name.ends_with(end)))
        .filter(|name| name.as_str() < FILE && !is_of_meta_plugin(&directory.join(name)))
        .collect();
    names.sort();
    names
}

fn is_of_meta_plugin(path: &Path) -> bool {
    let Some(config) =
        std::fs::read(path).ok().and_then(|text| serde_json::from_slice::<serde_json::Value>(&text).ok())
    else {
        return false;
    };
    let first = config.pointer("/plugins/0/type").or_else(|| config.get("type"));
    first.and_then(serde_json::Value::as_str).is_some_and(|kind| kind.starts_with("multus"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_sorts_before_ours_is_preferred() {
        let dir = tempfile::tempdir().unwrap();
        for name in
            ["05-cilium.conflist", "10-calico.conflist", "10-flannel.conflist", "99-loopback.conf", "00-readme.txt"]
        {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let multus = r#"{"cniVersion": "0.3.1", "name": "multus-cni-network", "type": "multus-shim"}"#;
        std::fs::write(dir.path().join("00-multus.conf"), multus).unwrap();
        assert_eq!(preferred_to_ours(dir.path()), ["05-cilium.conflist", "10-calico.conflist", "10-flannel.conflist"]);
    }

    #[test]
    fn installing_twice_writes_once() {
        let dir = tempfile::tempdir().unwrap();
        let config = AgentConfig { cni_conf_dir: dir.path().join("net.d"), ..AgentConfig::default() };
        install(&config).unwrap();
        let path = config.cni_conf_dir.join(FILE);
        let first = std::fs::metadata(&path).unwrap().modified().unwrap();
        install(&config).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().modified().unwrap(), first);
        let value: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        assert_eq!(value["plugins"][0]["type"], "towpath-cni");
    }
}
