//! Compiles the kernel programs of `bpf/` into one object that the library embeds.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// The oldest clang whose output the programs are tested with.
const CLANG_MIN: u32 = 14;
/// Those that are looked for, in this order; `compiler` in `scripts/prepare` has the same list.
const CLANGS: [&str; 9] =
    ["clang-19", "clang", "clang-21", "clang-20", "clang-18", "clang-17", "clang-16", "clang-15", "clang-14"];

/// Major version of a clang in PATH.
fn version(clang: &str) -> Option<u32> {
    let output = Command::new(clang).arg("--version").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let after = text.split_once("clang version ")?.1;
    after.split('.').next()?.parse().ok()
}

fn find_clang() -> Result<String, String> {
    if let Ok(chosen) = env::var("CLANG") {
        return Ok(chosen);
    }
    CLANGS
        .iter()
        .find(|clang| version(clang).is_some_and(|major| major >= CLANG_MIN))
        .map(|clang| (*clang).to_owned())
        .ok_or_else(|| {
            format!(
                "no clang of version {CLANG_MIN} or newer in PATH: apt-get install clang-19 (or clang), or set CLANG"
            )
        })
}

/// Where Debian and Ubuntu keep `asm/types.h`, which `linux/types.h` includes.
fn arch_headers() -> Option<PathBuf> {
    let arch = env::var("CARGO_CFG_TARGET_ARCH").ok()?;
    let path = PathBuf::from(format!("/usr/include/{arch}-linux-gnu"));
    path.is_dir().then_some(path)
}

fn compile(source: &Path, object: &Path) -> Result<(), String> {
    let clang = find_clang()?;
    let libbpf = env::var("DEP_BPF_INCLUDE")
        .map_err(|_| "libbpf-sys did not say where libbpf's headers are (DEP_BPF_INCLUDE)".to_owned())?;
    let mut command = Command::new(&clang);
    command.args(["-O2", "-g", "-target", "bpf", "-mcpu=v3", "-fno-strict-aliasing"]);
    command.args(["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wno-sign-compare"]);
    // The object must not depend on where the sources lie.
    let root = source.parent().unwrap_or(Path::new("."));
    command.arg(format!("-fdebug-prefix-map={}=bpf", root.display()));
    command.arg("-I").arg(libbpf);
    if let Some(path) = arch_headers() {
        command.arg("-I").arg(path);
    }
    command.arg("-c").arg(source).arg("-o").arg(object);
    let output = command.output().map_err(|e| format!("cannot run {clang}: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    let hint =
        if errors.contains("file not found") { "\n(kernel headers: apt-get install linux-libc-dev)" } else { "" };
    Err(format!("{clang} cannot compile {}:\n{errors}{hint}", source.display()))
}

fn run() -> Result<(), String> {
    let manifest = env::var("CARGO_MANIFEST_DIR").map_err(|e| e.to_string())?;
    let out = env::var("OUT_DIR").map_err(|e| e.to_string())?;
    let bpf = Path::new(&manifest).join("../../bpf");
    println!("cargo::rerun-if-changed={}", bpf.display());
    println!("cargo::rerun-if-env-changed=CLANG");
    compile(&bpf.join("towpath.c"), &Path::new(&out).join("towpath.o"))?;
    compile(&bpf.join("held.c"), &Path::new(&out).join("held.o"))?;
    compile(&bpf.join("wire.c"), &Path::new(&out).join("wire.o"))?;
    compile(&bpf.join("steer.c"), &Path::new(&out).join("steer.o"))?;
    let next = Path::new(&out).join("next");
    other_layouts(&bpf, &next).map_err(|e| format!("cannot write {}: {e}", next.display()))?;
    compile(&next.join("towpath.c"), &Path::new(&out).join("next.o"))
}

/// The same programs with other layouts, as a later version may have them: what tests take over from, and are taken over by.
fn other_layouts(bpf: &Path, next: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(next)?;
    for entry in std::fs::read_dir(bpf)? {
        let path = entry?.path();
        let Some(name) = path.file_name() else { continue };
        let mut text = std::fs::read_to_string(&path)?;
        for (layout, field) in [("tp_ct", "__u64"), ("tp_nat", "__u32"), ("tp_flows", "__u64"), ("tp_backend", "__u32")]
        {
            let begin = format!("struct {layout} {{\n");
            text = text.replace(&begin, &format!("{begin}\t{field} of_the_next_version;\n"));
        }
        std::fs::write(next.join(name), text)?;
    }
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}
