//! The image in a real containerd: made by the recipe (of the development build, which is there already), imported, and run as the
//! DaemonSet's containers run it: read-only and with the runtime's own seccomp profile.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use towpath_walkthrough::cluster::towpath_binary;
use towpath_walkthrough::containerd::{Containerd, can_run};

struct Built {
    archive: PathBuf,
    sbom: Value,
    name: String,
}

fn build(out: &Path) -> Result<Built> {
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/image/build");
    let programs = towpath_binary()?.parent().context("a program in no directory")?.to_owned();
    let mut command = Command::new(&recipe);
    command.args(["--profile", "dev", "--programs"]).arg(&programs).env("OUT", out);
    // What cargo tells this test's build is not for the build in the recipe.
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("CARGO_")) {
        if name != "CARGO_HOME" && name != "CARGO_TARGET_DIR" {
            command.env_remove(name);
        }
    }
    let done = command.output().context("run the recipe")?;
    ensure!(done.status.success(), "{}: {}", recipe.display(), String::from_utf8_lossy(&done.stderr));
    let find = |end: &str| -> Result<PathBuf> {
        let mut entries = fs::read_dir(out)?.filter_map(|entry| Some(entry.ok()?.path()));
        entries.find(|path| path.to_string_lossy().ends_with(end)).with_context(|| format!("no {end} was made"))
    };
    let sbom = serde_json::from_slice(&fs::read(find(".cdx.json")?)?)?;
    let name = format!("ghcr.io/towpath/towpath:{}", env!("CARGO_PKG_VERSION"));
    Ok(Built { archive: find(".oci.tar")?, sbom, name })
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Every path of the image's one layer, which is also unpacked into `rootfs`.
fn paths(archive: &Path, work: &Path) -> Result<Vec<String>> {
    fs::create_dir_all(work)?;
    let run = |command: &mut Command| -> Result<String> {
        let output = command.output()?;
        ensure!(output.status.success(), "{command:?}: {}", said(&output));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    run(Command::new("tar").arg("-C").arg(work).arg("-xf").arg(archive))?;
    let read = |path: PathBuf| -> Result<Value> { Ok(serde_json::from_slice(&fs::read(path)?)?) };
    let blob = |value: &Value, pointer: &str| -> Result<PathBuf> {
        let digest =
            value.pointer(pointer).and_then(Value::as_str).with_context(|| format!("no {pointer}: {value}"))?;
        Ok(work.join("blobs").join(digest.replace(':', "/")))
    };
    let manifest = read(blob(&read(work.join("index.json"))?, "/manifests/0/digest")?)?;
    ensure!(manifest.pointer("/layers/1").is_none(), "more than one layer");
    let layer = blob(&manifest, "/layers/0/digest")?;
    let root = work.join("rootfs");
    fs::create_dir_all(&root)?;
    run(Command::new("tar").arg("-C").arg(&root).arg("-xzf").arg(&layer))?;
    let listed = run(Command::new("tar").arg("-tzf").arg(&layer))?;
    Ok(listed.lines().map(|line| line.trim_start_matches("./").to_owned()).collect())
}

/// Starts the image's own program.
fn run(containerd: &Containerd, image: &str, options: &[&str], arguments: &[&str]) -> Result<String> {
    let whole = [
        &["run", "--rm", "--read-only", "--seccomp"],
        options,
        &[image, "towpath-image", "/usr/bin/towpath"],
        arguments,
    ]
    .concat();
    let output = containerd.ctr(&whole)?;
    ensure!(output.status.success(), "ctr {}: {}", whole.join(" "), said(&output));
    Ok(said(&output))
}

#[test]
fn a_container_of_it_runs_as_the_manifests_have_it() -> Result<()> {
    if !can_run(&["buildah", "containerd", "ctr", "runc", "nft"])? {
        return Ok(());
    }
    if !nix::unistd::Uid::effective().is_root() {
        println!("skipped: containers need root");
        return Ok(());
    }
    let containerd = Containerd::start("e2e-image")?;
    let built = build(&containerd.dir().join("out"))?;

    let purls: Vec<&str> = built
        .sbom
        .pointer("/components")
        .and_then(Value::as_array)
        .context("components")?
        .iter()
        .filter_map(|c| c.get("purl")?.as_str())
        .collect();
    for wanted in [
        "pkg:cargo/tokio@",
        "pkg:cargo/libbpf-sys@",
        "pkg:deb/debian/nftables@",
        "pkg:deb/debian/libc6@",
        "pkg:deb/debian/libelf1",
    ] {
        ensure!(purls.iter().any(|purl| purl.starts_with(wanted)), "the SBOM has no {wanted}");
    }
    ensure!(!purls.iter().any(|purl| purl.contains("proptest")), "the SBOM has what only tests need");

    let paths = paths(&built.archive, &containerd.dir().join("unpacked"))?;
    let shells = ["sh", "bash", "dash", "busybox", "apt", "apt-get", "dpkg"];
    let shell = paths.iter().find(|path| path.rsplit('/').next().is_some_and(|name| shells.contains(&name)));
    ensure!(shell.is_none(), "{shell:?} is in the image");
    for wanted in ["usr/share/doc/libc6/copyright", "usr/share/doc/nftables/copyright", "usr/share/doc/towpath/LICENSE"]
    {
        ensure!(paths.iter().any(|path| path == wanted), "{wanted} is not in the image");
    }
    ensure!(
        paths.iter().any(|path| path.starts_with("usr/share/doc/towpath/third-party/tokio-")),
        "no licence of tokio"
    );

    let archive = built.archive.display().to_string();
    let imported = containerd.ctr(&["images", "import", &archive])?;
    ensure!(imported.status.success(), "import: {}", said(&imported));
    let version = run(&containerd, &built.name, &[], &["--version"])?;
    ensure!(version.contains(concat!("towpath ", env!("CARGO_PKG_VERSION"))), "{version}");
    let printed = run(&containerd, &built.name, &[], &["install"])?;
    ensure!(printed.contains("kind: DaemonSet"), "{printed}");
    host(&containerd, &built.name)
}

/// `node install` on a directory that stands for a node, then `node uninstall` on the same.
fn host(containerd: &Containerd, image: &str) -> Result<()> {
    let root = containerd.dir().join("unpacked/rootfs");
    let node = root.join("host");
    fs::create_dir_all(node.join("net.d"))?;
    fs::write(node.join("agent.yaml"), "{runDir: /host/run, stateDir: /host/state}\n")?;
    let clusters = "clusters: [{name: c, cluster: {server: 'https://192.0.2.1:6443'}}]";
    let contexts = "current-context: a, contexts: [{name: a, context: {cluster: c, user: u}}]";
    fs::write(node.join("kubelet.conf"), format!("{{{contexts}, {clusters}}}"))?;
    // The image's own user: it has no capability, and needs none to put a file into a directory that it may write.
    std::os::unix::fs::chown(&node, Some(65532), Some(65532))?;
    let mount = format!("type=bind,src={},dst=/host,options=rbind:rw", node.display());
    let arguments = "node install --config /host/agent.yaml --bin-dir /host/bin --kubelet-config /host/kubelet.conf";
    let arguments: Vec<&str> = arguments.split(' ').collect();
    let first = run(containerd, image, &["--mount", &mount], &arguments)?;
    ensure!(first.contains("put the plugin at /host/bin/towpath-cni"), "{first}");
    ensure!(fs::read_to_string(node.join("run/api-server"))? == "https://192.0.2.1:6443\n", "no API server was noted");
    // The plugin is the node's from here on, whatever C library that has.
    let mut plugin = Command::new(node.join("bin/towpath-cni"));
    let answer = plugin.env("CNI_COMMAND", "VERSION").stdin(Stdio::null()).output()?;
    ensure!(said(&answer).contains("\"supportedVersions\""), "{}", said(&answer));
    let second = run(containerd, image, &["--mount", &mount], &arguments)?;
    ensure!(second.contains("is this version's already"), "{second}");

    fs::write(node.join("net.d/10-towpath.conflist"), "{}")?;
    fs::write(node.join("net.d/99-other.conf"), "{}")?;
    // As root, in a network namespace of its own and with nothing but the image's files: `nft` with its libraries, and netlink.
    let arguments = "node uninstall --bin-dir /host/bin --conf-dir /host/net.d --bpffs /host/bpf --run-dir /host/run";
    // As every runtime, it gives /proc and /dev/stdin, which `nft` reads its commands from.
    let runtime =
        "mount -t proc proc \"$0/proc\" && ln -s /proc/self/fd/0 \"$0/dev/stdin\" && exec chroot \"$0\" \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--net", "--mount", "--propagation", "private", "sh", "-c", runtime]).arg(&root);
    command.arg("/usr/bin/towpath").args(arguments.split(' '));
    let gone = command.args(["--state-dir", "/host/state"]).env("PATH", "/usr/sbin:/usr/bin").output()?;
    ensure!(gone.status.success() && said(&gone).contains("this node is clean"), "{}", said(&gone));
    let left = |dir: &str| -> Result<Vec<String>> {
        let entries = fs::read_dir(node.join(dir))?;
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    };
    ensure!(left("bin")?.is_empty() && left("net.d")? == ["99-other.conf"], "{:?} {:?}", left("bin"), left("net.d"));
    ensure!(!node.join("run").exists() && !node.join("state").exists(), "directories of ours are left");
    Ok(())
}
