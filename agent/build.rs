//! Builds the kernel programs (`agent-ebpf`) for the BPF target and hands the object to the library.
//!
//! The toolchain is chosen here, so that a plain `cargo build` works after set-up: rustup's nightly
//! when it has rust-src, else the distribution's `/usr/bin/rustc` and `/usr/bin/cargo` with its
//! library sources. Both need `bpf-linker`. The object is built in a target directory of its own,
//! because the outer cargo holds the lock of this one.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

/// What cargo sets for build scripts and wrappers; the inner build must see none of it.
const OUTER_VARIABLES: [&str; 16] = [
    "CARGO",
    "CARGO_BUILD_TARGET",
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_MAKEFLAGS",
    "CARGO_TARGET_DIR",
    "LD_LIBRARY_PATH",
    "MAKEFLAGS",
    "MFLAGS",
    "OUT_DIR",
    "RUSTC",
    "RUSTC_LINKER",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTC_WRAPPER",
    "RUSTDOC",
    "RUSTFLAGS",
    "RUSTUP_TOOLCHAIN",
];
const OUTER_PREFIXES: [&str; 5] = [
    "CARGO_CFG_",
    "CARGO_FEATURE_",
    "CARGO_MANIFEST_",
    "CARGO_PKG_",
    "CARGO_PROFILE_",
];

/// Programs of the senses, the same for old kernels, and those that run on demand.
const OBJECTS: [&str; 4] = [
    "lifeboat-ebpf",
    "lifeboat-plain",
    "lifeboat-watch",
    "lifeboat-trace",
];

fn main() {
    let manifest_dir = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let workspace = manifest_dir.parent().expect("agent/ lies in the workspace");
    let programs = workspace.join("agent-ebpf");
    for path in ["src", "Cargo.toml"] {
        println!("cargo:rerun-if-changed={}", programs.join(path).display());
    }
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=PATH");

    // OUT_DIR is TARGET/PROFILE/build/PACKAGE/out.
    let target_dir = out_dir
        .ancestors()
        .nth(4)
        .expect("OUT_DIR lies four levels below the target directory")
        .join("ebpf");
    let objects = build(workspace, &target_dir).unwrap_or_else(|reason| {
        eprintln!("cannot build the kernel programs: {reason}");
        exit(1);
    });
    for name in OBJECTS {
        let object = objects.join(name);
        fs::copy(&object, out_dir.join(format!("{name}.o"))).unwrap_or_else(|error| {
            eprintln!("cannot copy {}: {error}", object.display());
            exit(1);
        });
    }
}

fn build(workspace: &Path, target_dir: &Path) -> Result<PathBuf, String> {
    let Some(linker) = bpf_linker() else {
        return Err("bpf-linker is not on PATH; run `cargo xtask setup`".to_owned());
    };
    let Some(mut cargo) = rustup_nightly().or_else(distribution) else {
        return Err(
            "neither rustup's nightly with rust-src nor the distribution's rustc with its library \
             sources is installed; run `cargo xtask setup`"
                .to_owned(),
        );
    };
    // The BPF linker needs full debug info to emit BTF, which the loader needs for the maps' types.
    let flags = [
        "-Clinker=".to_owned() + &linker.to_string_lossy(),
        "-Clink-arg=--btf".to_owned(),
        "-Cdebuginfo=2".to_owned(),
        "-Ctarget-cpu=v3".to_owned(),
    ];
    cargo
        .current_dir(workspace)
        .args(["build", "--release", "--package", "lifeboat-ebpf"])
        .args(["--bins", "--features", "kernel"])
        .args(["--target", "bpfel-unknown-none", "-Zbuild-std=core"])
        .arg("--target-dir")
        .arg(target_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
        // bpf-linker does the link-time optimisation.
        .env("CARGO_PROFILE_RELEASE_LTO", "off");
    let output = cargo
        .output()
        .map_err(|error| format!("cannot run {cargo:?}: {error}"))?;
    if !output.status.success() {
        return Err(format!(
            "{cargo:?} failed; if the toolchain is incomplete, run `cargo xtask setup`\n{}",
            String::from_utf8_lossy(&output.stderr)
        ));
    }
    Ok(target_dir.join("bpfel-unknown-none/release"))
}

fn clean(program: impl Into<OsString>) -> Command {
    let mut command = Command::new(program.into());
    for name in OUTER_VARIABLES {
        command.env_remove(name);
    }
    for (name, _) in env::vars_os() {
        if OUTER_PREFIXES
            .iter()
            .any(|prefix| name.to_string_lossy().starts_with(prefix))
        {
            command.env_remove(name);
        }
    }
    command
}

fn bpf_linker() -> Option<PathBuf> {
    let home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")));
    env::split_paths(&env::var_os("PATH").unwrap_or_default())
        .chain(home.map(|home| home.join("bin")))
        .map(|directory| directory.join("bpf-linker"))
        .find(|path| path.is_file())
}

fn rustup_nightly() -> Option<Command> {
    let mut rustc = clean("rustup");
    rustc.args(["run", "nightly", "rustc"]);
    if !has_library_sources(rustc) {
        return None;
    }
    let mut cargo = clean("rustup");
    cargo.args(["run", "nightly", "cargo"]);
    Some(cargo)
}

fn distribution() -> Option<Command> {
    if !has_library_sources(clean("/usr/bin/rustc")) || !Path::new("/usr/bin/cargo").is_file() {
        return None;
    }
    let mut cargo = clean("/usr/bin/cargo");
    cargo
        .env("RUSTC", "/usr/bin/rustc")
        // A release compiler refuses `-Zbuild-std` without it.
        .env("RUSTC_BOOTSTRAP", "1");
    Some(cargo)
}

fn has_library_sources(mut rustc: Command) -> bool {
    let Ok(output) = rustc.args(["--print", "sysroot"]).output() else {
        return false;
    };
    output.status.success()
        && Path::new(String::from_utf8_lossy(&output.stdout).trim())
            .join("lib/rustlib/src/rust/library/core/src/lib.rs")
            .is_file()
}
