//! `towpath node …`: what the DaemonSets' init containers do on their node.
//!
//! `install` puts the plugin there, whole or not at all, and notes the API server's address; the configuration that makes the
//! container runtime call the plugin is the agent's to write, last, when the node is ready. `uninstall` is in [`super::uninstall`].

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use kube::config::Kubeconfig;
use towpath_wire::config::AgentConfig;

/// The plugin's file name, which the CNI configuration gives as its type.
pub(super) const PLUGIN: &str = "towpath-cni";

/// Commands on a node.
#[derive(clap::Subcommand, Debug)]
pub(crate) enum Command {
    /// Puts the CNI plugin on the node and notes which API server its kubelet talks to.
    Install(Install),
    /// Removes everything that Towpath left on the node.
    Uninstall(super::uninstall::Options),
    /// What Flannel or Canal has left on this node, what comes next, and taking it away.
    Migrate(super::migrate::Options),
    /// Does nothing until SIGTERM: a container that says by being there that those before it are done.
    #[command(hide = true)]
    Idle,
}

/// Options of `towpath node install`.
#[derive(clap::Args, Debug)]
pub(crate) struct Install {
    /// The agent's configuration file.
    #[arg(long)]
    config: Option<PathBuf>,
    /// Where the container runtime looks for plugins.
    #[arg(long, default_value = "/opt/cni/bin")]
    bin_dir: PathBuf,
    /// The plugin to put there [default: the one beside this program].
    #[arg(long)]
    plugin: Option<PathBuf>,
    /// The kubelet's kubeconfig; only the server's address is read.
    #[arg(long, default_value = "/etc/kubernetes/kubelet.conf")]
    kubelet_config: PathBuf,
}

/// Runs a command.
///
/// # Errors
/// What could not be done, to which file.
pub(crate) fn run(command: &Command) -> Result<bool> {
    match command {
        Command::Install(options) => {
            let config: AgentConfig = crate::daemon::load(options.config.as_deref())?;
            install(options, &config).map(|()| true)
        }
        Command::Uninstall(options) => super::uninstall::run(options),
        Command::Migrate(options) => super::migrate::run(options),
        Command::Idle => idle().map(|()| true),
    }
}

fn idle() -> Result<()> {
    crate::client_runtime()?.block_on(async {
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        terminate.recv().await;
        Ok(())
    })
}

fn install(options: &Install, config: &AgentConfig) -> Result<()> {
    let beside = || Ok::<_, io::Error>(std::env::current_exe()?.with_file_name(PLUGIN));
    let source = options.plugin.clone().map_or_else(beside, Ok).context("could not find this program's own file")?;
    let content = fs::read(&source).with_context(|| format!("could not read the plugin {}", source.display()))?;
    fs::create_dir_all(&config.run_dir).with_context(|| format!("could not make {}", config.run_dir.display()))?;
    note_api_server(options, config)?;
    let target = options.bin_dir.join(PLUGIN);
    let put =
        put(&target, &content, 0o755).with_context(|| format!("could not put the plugin at {}", target.display()))?;
    crate::print(&match put {
        true => format!("put the plugin at {}", target.display()),
        false => format!("the plugin at {} is this version's already", target.display()),
    })
}

/// Writes the kubelet's API server down for the agent, which cannot use the Service `kubernetes` before it has made Services work.
fn note_api_server(options: &Install, config: &AgentConfig) -> Result<()> {
    let note = config.api_server_note();
    let found = match (&config.api_server, &config.kubeconfig) {
        (Some(url), _) => return crate::print(&format!("the API server is configured: {url}")),
        (None, Some(path)) => return crate::print(&format!("the API server is that of {}", path.display())),
        (None, None) => kubelet_server(&options.kubelet_config)?,
    };
    let Some(url) = found else {
        if let Err(error) = fs::remove_file(&note)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(error).with_context(|| format!("could not remove {}", note.display()));
        }
        return crate::print(&format!(
            "{} is not there: the API server is the Service `kubernetes`, which kube-proxy must serve; else set apiServer",
            options.kubelet_config.display()
        ));
    };
    put(&note, format!("{url}\n").as_bytes(), 0o644).with_context(|| format!("could not write {}", note.display()))?;
    crate::print(&format!("the API server is the kubelet's: {url}"))
}

/// The server that a kubeconfig's current context leads to; none: there is no such file.
fn kubelet_server(path: &Path) -> Result<Option<String>> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("could not read {}", path.display())),
    };
    let wrong = || format!("{} is no kubeconfig", path.display());
    let config = Kubeconfig::from_yaml(&text).with_context(wrong)?;
    let current = config.current_context.as_deref();
    let context = config.contexts.iter().find(|named| Some(named.name.as_str()) == current);
    let cluster = context.and_then(|named| named.context.as_ref()).map(|context| context.cluster.as_str());
    let named = config.clusters.iter().find(|named| Some(named.name.as_str()) == cluster);
    match named.and_then(|named| named.cluster.as_ref()).and_then(|cluster| cluster.server.clone()) {
        Some(server) => Ok(Some(server)),
        None => bail!("{}: its current context leads to no server", path.display()),
    }
}

/// Puts a file in its place, whole or not at all, also when the machine loses power: a temporary file, fsync, rename, fsync of
/// the directory. Whether it was another before.
///
/// # Errors
/// Any step failed; what was there is there still.
pub(super) fn put(path: &Path, content: &[u8], mode: u32) -> io::Result<bool> {
    let same = fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o7777 == mode)
        && fs::read(path).is_ok_and(|have| have == content);
    if same {
        return Ok(false);
    }
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(directory)?;
    let temporary = unfinished(path);
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&temporary)?;
        file.write_all(content)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(directory)?.sync_all()
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written.map(|()| true)
}

/// What [`put`] writes before it is whole. A dot, so that no runtime takes it for a plugin; one name, so that a cut attempt leaves
/// one file at most.
pub(super) fn unfinished(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.new"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KUBELET: &str = "apiVersion: v1\nkind: Config\ncurrent-context: a\ncontexts: [{name: a, context: {cluster: c, user: u}}]\n\
        clusters: [{name: other, cluster: {server: 'https://192.0.2.9:1'}}, {name: c, cluster: {server: 'https://192.0.2.1:6443'}}]\n\
        users: [{name: u, user: {client-certificate: /var/lib/kubelet/pki/x.pem}}]\n";

    struct Rig {
        dir: tempfile::TempDir,
        config: AgentConfig,
        options: Install,
    }

    fn rig() -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("plugin"), "one").unwrap();
        let config = AgentConfig { run_dir: at("run"), ..AgentConfig::default() };
        let options = Install {
            config: None,
            bin_dir: at("opt/cni/bin"),
            plugin: Some(at("plugin")),
            kubelet_config: at("kubelet.conf"),
        };
        Rig { config, options, dir }
    }

    #[test]
    fn the_plugin_is_replaced_only_when_it_differs_and_nothing_else_stays() {
        let rig = rig();
        let target = rig.options.bin_dir.join(PLUGIN);
        install(&rig.options, &rig.config).unwrap();
        assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o7777, 0o755);
        let inode = |path: &Path| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap());
        let first = inode(&target);
        // A process that runs it now keeps its file.
        let held = File::open(&target).unwrap();
        install(&rig.options, &rig.config).unwrap();
        assert_eq!(inode(&target), first);
        fs::write(rig.dir.path().join("plugin"), "two").unwrap();
        install(&rig.options, &rig.config).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"two");
        assert_eq!(io::read_to_string(held).unwrap(), "one");
        assert_eq!(fs::read_dir(&rig.options.bin_dir).unwrap().count(), 1);
    }

    #[test]
    fn a_plugin_that_cannot_be_put_leaves_the_one_that_is_there() {
        let rig = rig();
        install(&rig.options, &rig.config).unwrap();
        let target = rig.options.bin_dir.join(PLUGIN);
        // The temporary name is taken by a directory: the write fails half-way.
        fs::create_dir(rig.options.bin_dir.join(format!(".{PLUGIN}.new"))).unwrap();
        fs::write(rig.dir.path().join("plugin"), "two").unwrap();
        let error = format!("{:#}", install(&rig.options, &rig.config).unwrap_err());
        assert!(error.contains(&target.display().to_string()), "{error}");
        assert_eq!(fs::read(&target).unwrap(), b"one");
    }

    #[test]
    fn the_kubelets_server_is_noted_and_forgotten() {
        let rig = rig();
        let note = rig.config.api_server_note();
        fs::write(&rig.options.kubelet_config, KUBELET).unwrap();
        install(&rig.options, &rig.config).unwrap();
        assert_eq!(fs::read_to_string(&note).unwrap(), "https://192.0.2.1:6443\n");
        fs::remove_file(&rig.options.kubelet_config).unwrap();
        install(&rig.options, &rig.config).unwrap();
        assert!(!note.exists());
        fs::write(&rig.options.kubelet_config, "apiVersion: v1\nkind: Config\n").unwrap();
        assert!(format!("{:#}", install(&rig.options, &rig.config).unwrap_err()).contains("leads to no server"));
        fs::write(&rig.options.kubelet_config, "[").unwrap();
        assert!(format!("{:#}", install(&rig.options, &rig.config).unwrap_err()).contains("is no kubeconfig"));
    }
}
