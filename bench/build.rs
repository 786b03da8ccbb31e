//! Compiles the programs that kernel programs are compared with.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// As in the data path's build.
const CLANGS: [&str; 9] =
    ["clang-19", "clang", "clang-21", "clang-20", "clang-18", "clang-17", "clang-16", "clang-15", "clang-14"];

fn clang() -> Result<String, String> {
    if let Ok(chosen) = env::var("CLANG") {
        return Ok(chosen);
    }
    let runs = |clang: &&&str| Command::new(clang).arg("--version").output().is_ok();
    let found = CLANGS.iter().find(runs).map(|clang| (*clang).to_owned());
    found.ok_or_else(|| "no clang in PATH: apt-get install clang-19 (or clang), or set CLANG".to_owned())
}

fn run() -> Result<(), String> {
    println!("cargo::rerun-if-env-changed=CLANG");
    ["unit", "wires"].into_iter().try_for_each(compile)
}

fn compile(name: &str) -> Result<(), String> {
    let var = |name: &str| env::var(name).map_err(|error| format!("{name}: {error}"));
    let source = Path::new(&var("CARGO_MANIFEST_DIR")?).join(format!("bpf/{name}.c"));
    println!("cargo::rerun-if-changed={}", source.display());
    let mut command = Command::new(clang()?);
    command.args(["-O2", "-g", "-target", "bpf", "-mcpu=v3", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]);
    command.arg("-I").arg(var("DEP_BPF_INCLUDE")?);
    let arch = PathBuf::from(format!("/usr/include/{}-linux-gnu", var("CARGO_CFG_TARGET_ARCH")?));
    if arch.is_dir() {
        command.arg("-I").arg(arch);
    }
    let object = Path::new(&var("OUT_DIR")?).join(format!("{name}.o"));
    command.arg("-c").arg(&source).arg("-o").arg(object);
    let output = command.output().map_err(|error| format!("cannot run clang: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("clang cannot compile {}:\n{}", source.display(), String::from_utf8_lossy(&output.stderr)))
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
