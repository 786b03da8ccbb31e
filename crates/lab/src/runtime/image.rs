//! What stands in for container images.
//!
//! One tree serves all: the machine's busybox with its applets, and curl and netcat with the libraries they need when the
//! machine has them. Images differ in what they run when no command is given.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// What an image is taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Image {
    /// busybox and its like: a shell when no command is given.
    Tools,
    /// nginx, httpd …: the built-in server when no command is given.
    Web,
    /// The pause image.
    Pause,
    /// Towpath's own: this very program, which the container sees at [`OWN_PROGRAM`].
    Towpath,
}

/// Where Towpath's image has its program, which is what runs when no command is given.
pub(crate) const OWN_PROGRAM: &str = "/usr/bin/towpath";

const TOOLS: [&str; 6] = ["busybox", "alpine", "curl", "netshoot", "toolbox", "dnsutils"];
const WEB: [&str; 9] = ["nginx", "httpd", "echo", "agnhost", "whoami", "web", "hello", "caddy", "netexec"];

impl Image {
    /// Understands an image reference, or says why the image cannot be had.
    pub(crate) fn resolve(reference: &str) -> Result<Self, String> {
        let name = short_name(reference).ok_or_else(|| format!("invalid image reference {reference:?}"))?;
        if name == "pause" {
            return Ok(Self::Pause);
        }
        if name == "towpath" {
            return Ok(Self::Towpath);
        }
        if TOOLS.iter().any(|known| name.contains(known)) {
            return Ok(Self::Tools);
        }
        if WEB.iter().any(|known| name.contains(known)) {
            return Ok(Self::Web);
        }
        Err(format!(
            "image {reference:?} cannot be had: this lab downloads nothing and stands in for images whose name contains \
             {} (a shell with busybox's tools) or {} (a small web server) only",
            TOOLS.join(", "),
            WEB.join(", ")
        ))
    }
}

/// `docker.io/library/busybox:1.36@sha256:…` → `busybox`.
fn short_name(reference: &str) -> Option<&str> {
    let reference = reference.split('@').next()?;
    let last = reference.rsplit('/').next()?;
    let name = last.split(':').next()?;
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '_' | '-');
    (!name.is_empty() && name.chars().all(good)).then_some(name)
}

/// The reference with registry and tag as `status.containerStatuses[].image` has it.
pub(crate) fn canonical(reference: &str) -> String {
    let (path, digest) = match reference.split_once('@') {
        Some((path, digest)) => (path, Some(digest)),
        None => (reference, None),
    };
    let first = path.split('/').next().unwrap_or_default();
    let has_registry = path.contains('/') && (first.contains(['.', ':']) || first == "localhost");
    let mut full = match (has_registry, path.contains('/')) {
        (true, _) => path.to_owned(),
        (false, true) => format!("docker.io/{path}"),
        (false, false) => format!("docker.io/library/{path}"),
    };
    match digest {
        Some(digest) => full = format!("{full}@{digest}"),
        None if !full.rsplit('/').next().is_some_and(|last| last.contains(':')) => full.push_str(":latest"),
        None => {}
    }
    full
}

/// Makes the image tree at `dir`, unless it is there, with the libraries that `own` needs. Blocks.
pub(crate) fn prepare(dir: &Path, own: &Path) -> Result<()> {
    if dir.exists() {
        return install_libraries(dir, own);
    }
    let building = dir.with_extension("building");
    let _ = std::fs::remove_dir_all(&building);
    for sub in
        ["bin", "etc", "root", "var", "home", "usr/bin", "usr/sbin", "usr/lib", "sbin", "opt", "srv", "run", "mnt"]
    {
        std::fs::create_dir_all(building.join(sub))
            .with_context(|| format!("create {}", building.join(sub).display()))?;
    }
    for sub in ["tmp", "var/tmp"] {
        std::fs::create_dir_all(building.join(sub))?;
        std::fs::set_permissions(building.join(sub), std::os::unix::fs::PermissionsExt::from_mode(0o1777))?;
    }
    install_busybox(&building)?;
    if let Some(curl) = find_program("curl") {
        install_program(&building, &curl).context("put curl into the image")?;
    }
    // Debian's busybox has an nc without UDP; the one that tutorials use is netcat-openbsd.
    if let Some(netcat) = find_program("nc.openbsd") {
        install_program(&building, &netcat).context("put nc into the image")?;
        let applet = building.join("bin/nc");
        std::fs::remove_file(&applet).and_then(|()| symlink("/usr/bin/nc.openbsd", &applet)).context("link nc")?;
    }
    install_libraries(&building, own).context("put Towpath's libraries into the image")?;
    let files = [
        ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"),
        ("etc/group", "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"),
        ("etc/nsswitch.conf", "hosts: files dns\n"),
        ("etc/hosts", ""),
        ("etc/hostname", ""),
        ("etc/resolv.conf", ""),
        ("etc/os-release", "ID=towpath-lab\nPRETTY_NAME=\"Towpath lab container\"\n"),
    ];
    for (path, text) in files {
        std::fs::write(building.join(path), text).with_context(|| format!("write {path} of the image"))?;
    }
    std::fs::rename(&building, dir).with_context(|| format!("put the image at {}", dir.display()))
}

fn install_busybox(root: &Path) -> Result<()> {
    let busybox = find_program("busybox")
        .context("busybox is not on this machine, and pods run its tools; on Debian: apt install busybox-static")?;
    install_program(root, &busybox)?;
    std::fs::rename(root.join("usr/bin/busybox"), root.join("bin/busybox")).context("install busybox")?;
    let listed = Command::new(&busybox).arg("--list").output().context("list busybox's applets")?;
    for applet in String::from_utf8_lossy(&listed.stdout).lines().filter(|a| *a != "busybox" && !a.contains('/')) {
        symlink("/bin/busybox", root.join("bin").join(applet)).with_context(|| format!("link applet {applet}"))?;
    }
    symlink("/bin/busybox", root.join("usr/bin/env")).context("link env")
}

/// Puts a program at `usr/bin`, and its libraries.
fn install_program(root: &Path, program: &Path) -> Result<()> {
    let name = program.file_name().context("program without a name")?;
    link_or_copy(&program.canonicalize()?, &root.join("usr/bin").join(name))?;
    install_libraries(root, program)
}

/// Puts the libraries that a program is linked with at the places it looks for them.
fn install_libraries(root: &Path, program: &Path) -> Result<()> {
    let listed = Command::new("ldd").arg(program).output();
    let Ok(listed) = listed else { return Ok(()) };
    for line in String::from_utf8_lossy(&listed.stdout).lines() {
        // `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)` or `/lib64/ld-linux-x86-64.so.2 (0x…)`.
        let path = line.split("=>").last().unwrap_or_default().split('(').next().unwrap_or_default().trim();
        if !path.starts_with('/') {
            continue;
        }
        let target = root.join(path.trim_start_matches('/'));
        if target.exists() {
            continue;
        }
        if let Some(parent) = target.parent() {
            std::fs::create_dir_all(parent)?;
        }
        link_or_copy(&Path::new(path).canonicalize().with_context(|| format!("find library {path}"))?, &target)?;
    }
    Ok(())
}

fn link_or_copy(from: &Path, to: &Path) -> Result<()> {
    if std::fs::hard_link(from, to).is_ok() {
        return Ok(());
    }
    std::fs::copy(from, to).map(drop).with_context(|| format!("copy {} to {}", from.display(), to.display()))
}

fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_else(|_| "/usr/sbin:/usr/bin:/sbin:/bin".to_owned());
    path.split(':').map(|dir| Path::new(dir).join(name)).find(|candidate| candidate.is_file())
}

/// Fails with what to install when the machine lacks what containers need.
pub(crate) fn check_machine() -> Result<()> {
    if find_program("busybox").is_none() {
        bail!("busybox is not on this machine, and pods run its tools; on Debian: apt install busybox-static");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_resolve_by_their_last_name() {
        for tools in
            ["busybox", "busybox:1.36", "docker.io/library/busybox@sha256:00", "registry.local:5000/x/busybox:a"]
        {
            assert_eq!(Image::resolve(tools), Ok(Image::Tools), "{tools}");
        }
        for web in ["nginx", "httpd:latest", "hashicorp/http-echo:1.0", "registry.k8s.io/e2e-test-images/agnhost:2.53"]
        {
            assert_eq!(Image::resolve(web), Ok(Image::Web), "{web}");
        }
        for own in ["towpath", "ghcr.io/towpath/towpath:0.1.0"] {
            assert_eq!(Image::resolve(own), Ok(Image::Towpath), "{own}");
        }
        let refusal = Image::resolve("postgres:16").unwrap_err();
        assert!(refusal.contains("postgres:16") && refusal.contains("busybox"), "{refusal}");
        assert!(Image::resolve("Bad Name").is_err());
    }

    #[test]
    fn canonical_references_name_registry_and_tag() {
        assert_eq!(canonical("busybox"), "docker.io/library/busybox:latest");
        assert_eq!(canonical("a/b:1"), "docker.io/a/b:1");
        assert_eq!(canonical("localhost:5000/b"), "localhost:5000/b:latest");
        assert_eq!(canonical("ghcr.io/a/b@sha256:1"), "ghcr.io/a/b@sha256:1");
    }
}
