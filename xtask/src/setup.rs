//! `cargo xtask setup`: installs what building, the lab, the demo, the tests and the figures need.
//!
//! A program that is there is not asked for again, so a second run only looks. Services of the packages
//! are neither started nor enabled. Non-goal: other package managers than apt; there it says what is missing.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::process::{is_root, output, run};

/// Version of bpf-linker from crates.io; it links with the LLVM of the distribution's compiler.
const BPF_LINKER: &str = "0.13.0";

/// A package, one file that shows that it is there, and why it is needed.
struct Need {
    package: &'static str,
    shown_by: &'static str,
    why: &'static str,
}

const fn need(package: &'static str, shown_by: &'static str, why: &'static str) -> Need {
    Need {
        package,
        shown_by,
        why,
    }
}

/// Names without a slash are programs, looked for on PATH and where root's programs are.
const NEEDS: [Need; 38] = [
    need("gcc", "gcc", "C parts of crates (SQLite, AWS-LC)"),
    need("libc6-dev", "/usr/include/stdlib.h", "C parts of crates"),
    need("podman", "podman", "containers of lab hosts"),
    need("runc", "runc", "containers of lab hosts"),
    need("conmon", "conmon", "containers of lab hosts"),
    need(
        "netavark",
        "/usr/lib/podman/netavark",
        "container networks of lab hosts",
    ),
    need(
        "aardvark-dns",
        "/usr/lib/podman/aardvark-dns",
        "container names of lab hosts",
    ),
    need("catatonit", "catatonit", "pods of lab hosts"),
    need("uidmap", "newuidmap", "containers of ordinary users"),
    need("slirp4netns", "slirp4netns", "networks of ordinary users"),
    need("docker.io", "dockerd", "the tests with Docker"),
    need("containerd", "containerd", "the tests with containerd"),
    need(
        "containernetworking-plugins",
        "/usr/lib/cni/bridge",
        "networks of containerd's containers in the tests",
    ),
    need("iproute2", "ip", "network between lab hosts"),
    need("iptables", "iptables", "published ports of containers"),
    need("nftables", "nft", "loss and partition in the lab"),
    need("util-linux", "nsenter", "namespaces of lab hosts"),
    need("procps", "ps", "the lab's own tests"),
    need("libnbd-bin", "nbdinfo", "NBD clients of the tests"),
    need("qemu-utils", "qemu-io", "NBD clients of the tests"),
    need("fio", "fio", "disk fault of the lab"),
    need("e2fsprogs", "mkfs.ext4", "disks of the tests"),
    need("xfsprogs", "mkfs.xfs", "disks of the tests"),
    need("btrfs-progs", "mkfs.btrfs", "quotas of the tests' disks"),
    need("attr", "setfattr", "attributes of the tests' files"),
    need("acl", "setfacl", "ACLs of the tests' files"),
    need("libcap2-bin", "setcap", "capabilities of the tests' files"),
    need("sqlite3", "sqlite3", "database on a mounted volume"),
    need("curl", "curl", "health of the demo application"),
    need("busybox-static", "busybox", "shell of the demo's images"),
    need("nginx", "nginx", "image of the demo's front"),
    need("redis-server", "redis-server", "image of the demo's cache"),
    need("redis-tools", "redis-cli", "image of the demo's cache"),
    need(
        "tzdata",
        "/usr/share/zoneinfo/UTC",
        "image of the demo's database",
    ),
    need("rsync", "rsync", "peer of the figures"),
    need("openssh-client", "ssh", "peer of the figures"),
    need("openssh-server", "sshd", "peer of the figures"),
    need(
        "iperf3",
        "iperf3",
        "the lab's link speed beside the figures",
    ),
];

/// Packages that start a service when they are installed, with the unit's name.
const SERVICES: [(&str, &str); 6] = [
    ("docker.io", "docker"),
    ("containerd", "containerd"),
    ("nginx", "nginx"),
    ("redis-server", "redis-server"),
    ("postgresql", "postgresql"),
    ("openssh-server", "ssh"),
];

/// What is still to be done for the kernel programs' toolchain.
enum Toolchain {
    Ready(&'static str),
    /// The distribution's compiler with its library sources.
    Distribution,
    /// rustup's nightly, and the linker's published binary.
    Rustup,
}

fn program(name: &str) -> Option<PathBuf> {
    if name.starts_with('/') {
        return Path::new(name).exists().then(|| name.into());
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let cargo = cargo_bin();
    env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .chain(cargo)
        .map(|dir| dir.join(name))
        .find(|file| file.exists())
}

fn cargo_bin() -> Option<PathBuf> {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    home.or_else(|| Some(Path::new(&env::var_os("HOME")?).join(".cargo")))
        .map(|home| home.join("bin"))
}

/// True when the compiler that `rustc` starts has the sources of the standard library beside it.
fn has_library_sources(rustc: &mut Command) -> bool {
    output(rustc.args(["--print", "sysroot"])).is_ok_and(|root| {
        Path::new(&root)
            .join("lib/rustlib/src/rust/library/core/src/lib.rs")
            .exists()
    })
}

/// The same rule as in the agent's build script: rustup's nightly first.
fn toolchain(apt: bool) -> Toolchain {
    let linker = program("bpf-linker").is_some();
    let nightly = has_library_sources(Command::new("rustup").args(["run", "nightly", "rustc"]));
    if nightly && linker {
        return Toolchain::Ready("rustup's nightly with rust-src, and the bpf-linker on PATH");
    }
    let distribution = Path::new("/usr/bin/cargo").exists()
        && has_library_sources(&mut Command::new("/usr/bin/rustc"));
    if distribution && linker && !nightly {
        return Toolchain::Ready("the distribution's compiler in /usr/bin, and bpf-linker");
    }
    let offered = apt
        && output(Command::new("apt-cache").args(["show", "rustc-web"]))
            .is_ok_and(|text| text.contains("Package:"));
    if !nightly && (distribution || offered) {
        Toolchain::Distribution
    } else {
        Toolchain::Rustup
    }
}

/// The directory of the newest LLVM that the distribution's compiler can be linked with.
fn llvm_of_distribution() -> Result<String> {
    let text = output(Command::new("/usr/bin/rustc").arg("-vV"))?;
    text.lines()
        .find_map(|line| line.strip_prefix("LLVM version: "))
        .and_then(|version| version.split('.').next())
        .map(str::to_owned)
        .context("/usr/bin/rustc does not say its LLVM version")
}

/// Installs what is missing.
///
/// # Errors
/// Something cannot be installed here; the message lists what, and how to get it.
pub fn setup() -> Result<()> {
    let apt = program("apt-get").is_some();
    let mut missing: Vec<(&str, &str)> = NEEDS
        .iter()
        .filter(|need| program(need.shown_by).is_none())
        .map(|need| (need.package, need.why))
        .collect();
    if crate::images::postgres_version().is_err() {
        // The metapackage: the server's own package is named by its version.
        missing.push(("postgresql", "image of the demo's database"));
    }
    let mut toolchain = toolchain(apt);
    if !missing.is_empty() || !matches!(toolchain, Toolchain::Ready(_)) {
        if !apt {
            return Err(not_here(&missing, &toolchain));
        }
        say(&missing);
        apt_get(&["update", "-qq"])?;
        // Only now the package lists say what this distribution offers.
        toolchain = self::toolchain(apt);
        install(&missing)?;
    }
    match toolchain {
        Toolchain::Ready(which) => println!("setup: kernel programs are built with {which}"),
        Toolchain::Distribution => distribution_toolchain()?,
        Toolchain::Rustup => rustup_toolchain()?,
    }
    for (component, tool) in [("rustfmt", "fmt"), ("clippy", "clippy")] {
        if output(Command::new("cargo").args([tool, "--version"])).is_err() {
            println!("setup: rustup component {component}: `cargo xtask test` checks with it");
            run(Command::new("rustup").args(["component", "add", component]))?;
        }
    }
    Ok(())
}

/// Installs one program that only a single task needs.
///
/// # Errors
/// It is not there and cannot be installed.
pub fn provide(program: &str, package: &str, why: &str) -> Result<()> {
    if self::program(program).is_some() {
        return Ok(());
    }
    fetch(&[(package, why)])
}

/// Installs packages that only a single task needs, each with why.
///
/// # Errors
/// apt failed.
pub(crate) fn fetch(packages: &[(&str, &str)]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    say(packages);
    ensure!(
        program("apt-get").is_some(),
        "this machine has no apt-get: install these yourself"
    );
    apt_get(&["update", "-qq"])?;
    install(packages)
}

fn say(packages: &[(&str, &str)]) {
    for (package, why) in packages {
        println!("setup: installing {package}: {why}");
    }
}

fn not_here(missing: &[(&str, &str)], toolchain: &Toolchain) -> anyhow::Error {
    let mut text = String::from(
        "this machine has no apt-get, so set-up cannot install what is missing. Install these (names as in \
         Debian) and run it again:",
    );
    for (package, why) in missing {
        text.push_str(&format!("\n  {package}: {why}"));
    }
    if !matches!(toolchain, Toolchain::Ready(_)) {
        text.push_str(
            "\n  rustup toolchain install nightly --component rust-src: compiles the kernel programs\
             \n  bpf-linker on PATH (https://github.com/aya-rs/bpf-linker): links the kernel programs",
        );
    }
    anyhow::anyhow!(text)
}

fn apt_get(arguments: &[&str]) -> Result<()> {
    let mut command = as_root("env");
    command.args(["DEBIAN_FRONTEND=noninteractive", "apt-get"]);
    // What is installed and why was said before; dpkg's own lines would hide it.
    run(command.args(arguments).stdout(Stdio::null()))
}

fn as_root(program: &str) -> Command {
    if is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.arg(program);
    command
}

/// Installs packages, each with why, and starts none of their services.
///
/// # Errors
/// apt failed.
fn install(packages: &[(&str, &str)]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    // Packages ask this file whether they may start their services.
    let policy = Path::new("/usr/sbin/policy-rc.d");
    let ours = !policy.exists();
    if ours {
        let script = "printf '#!/bin/sh\\nexit 101\\n' >/usr/sbin/policy-rc.d && chmod 755 /usr/sbin/policy-rc.d";
        run(as_root("sh").args(["-c", script]))?;
    }
    let names: Vec<&str> = packages.iter().map(|(package, _)| *package).collect();
    let installed = apt_get(
        &[
            &["install", "-qq", "-y", "--no-install-recommends"],
            &names[..],
        ]
        .concat(),
    );
    if ours {
        run(as_root("rm").arg(policy))?;
    }
    installed.with_context(|| format!("apt could not install {}", names.join(" ")))?;
    for (package, unit) in SERVICES {
        if names.contains(&package) && program("systemctl").is_some() {
            // Otherwise it would start with the machine. Fails where the unit has another name.
            let _ = output(as_root("systemctl").args(["disable", "--quiet", unit]));
        }
    }
    Ok(())
}

fn distribution_toolchain() -> Result<()> {
    println!(
        "setup: kernel programs will be built with the distribution's compiler, because rustup's nightly with \
         rust-src and a bpf-linker are not here"
    );
    if !has_library_sources(&mut Command::new("/usr/bin/rustc")) {
        let packages = ["rustc-web", "cargo-web", "rust-web-src"].map(|package| {
            (
                package,
                "compiler with the library sources for the BPF target",
            )
        });
        say(&packages);
        install(&packages)?;
    }
    if program("bpf-linker").is_some() {
        return Ok(());
    }
    let version = llvm_of_distribution()?;
    let (llvm, polly) = (
        format!("llvm-{version}-dev"),
        format!("libpolly-{version}-dev"),
    );
    let packages = [&llvm, &polly, "zlib1g-dev", "libzstd-dev", "g++"]
        .map(|package| (package, "bpf-linker is built with the compiler's LLVM"));
    say(&packages);
    install(&packages)?;
    let prefix = format!("/usr/lib/llvm-{version}");
    let numbered = output(Command::new(format!("{prefix}/bin/llvm-config")).arg("--version"))?;
    let minor = numbered.split('.').nth(1).unwrap_or("1");
    println!("setup: installing bpf-linker {BPF_LINKER} from crates.io: links the kernel programs");
    run(Command::new("cargo")
        .args(["install", "--quiet", "bpf-linker", "--version", BPF_LINKER])
        .args([
            "--no-default-features",
            "--features",
            &format!("llvm-{version}"),
        ])
        .env("LLVM_PREFIX", &prefix)
        .env(format!("LLVM_SYS_{version}{minor}_PREFIX"), &prefix))
}

fn rustup_toolchain() -> Result<()> {
    ensure!(
        program("rustup").is_some(),
        "the kernel programs need rustup's nightly with rust-src, or a distribution that offers rustc-web: \
         install rustup (https://rustup.rs) and run this again"
    );
    if !has_library_sources(Command::new("rustup").args(["run", "nightly", "rustc"])) {
        println!("setup: installing rustup's nightly with rust-src: compiles the kernel programs");
        run(Command::new("rustup")
            .args(["toolchain", "install", "nightly", "--profile", "minimal"])
            .args(["--component", "rust-src"]))?;
    }
    if program("bpf-linker").is_some() {
        return Ok(());
    }
    let Some(bin) = cargo_bin() else {
        bail!("neither CARGO_HOME nor HOME is set: put bpf-linker on PATH by hand");
    };
    let archive = format!(
        "https://github.com/aya-rs/bpf-linker/releases/download/v{BPF_LINKER}/bpf-linker-{}-unknown-linux-musl.tar.zst",
        env::consts::ARCH
    );
    let packages = [("zstd", "unpacks bpf-linker")];
    if program("zstd").is_none() {
        say(&packages);
        install(&packages)?;
    }
    println!("setup: installing {archive}: links the kernel programs");
    run(Command::new("sh")
        .args([
            "-c",
            r#"curl --fail --silent --show-error --location "$0" | tar --zstd -x -C "$1""#,
        ])
        .arg(&archive)
        .arg(&bin))
    .with_context(|| {
        format!(
            "bpf-linker is not in {}: put it there by hand",
            bin.display()
        )
    })?;
    ensure!(
        program("bpf-linker").is_some(),
        "{archive} holds no bpf-linker: put it on PATH by hand"
    );
    Ok(())
}
