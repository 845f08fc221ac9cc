//! `cargo xtask lab kernels`: the agent and the tests of its senses on other kernels, in QEMU guests.
//!
//! A guest boots a stock Debian kernel with everything in its initramfs and says over the serial console
//! how each test ended and what the agent reports, with and without BTF. Emulation (TCG) with one CPU,
//! because that works everywhere and without KVM; a guest that dies in it is started once more. Non-goal:
//! speed; figures from guests mean nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::process::{output, run};
use crate::{setup, workspace};

/// A kernel of Debian's cloud flavour: its version, the suite that has it, and what cannot be tested on it,
/// by the reason that the test then prints.
struct Kernel {
    version: &'static str,
    suite: &'static str,
    lacks: &'static [&'static str],
}

/// The newest suite is a backport and moves on; its version is only a name here.
const KERNELS: [Kernel; 4] = [
    Kernel {
        version: "5.10",
        suite: "bullseye",
        lacks: &["dirty extents cannot be had here"],
    },
    Kernel {
        version: "6.1",
        suite: "bookworm",
        lacks: &[],
    },
    Kernel {
        version: "6.12",
        suite: "trixie",
        lacks: &[],
    },
    Kernel {
        version: "newest",
        suite: "trixie-backports",
        lacks: &[],
    },
];

/// Test programs that run in the guest.
const TESTS: [&str; 4] = ["senses", "scheduler", "stacked", "guests"];

/// Programs that the tests call.
const PROGRAMS: [&str; 9] = [
    "/usr/bin/busybox",
    "/usr/bin/nice",
    "/usr/sbin/blkdiscard",
    "/usr/sbin/ip",
    "/usr/bin/nsenter",
    "/usr/sbin/losetup",
    "/usr/sbin/dmsetup",
    "/usr/sbin/mdadm",
    "/usr/sbin/mkfs.ext4",
];

/// Modules of the guest's disks and links.
const MODULES: [&str; 9] = [
    "virtio_pci",
    "virtio_blk",
    "ext4",
    "veth",
    "loop",
    "raid1",
    "dm-mod",
    "sd_mod",
    "scsi_debug",
];

/// A guest that takes longer hangs; it takes about a minute on an idle machine.
const PATIENCE_SECONDS: &str = "480";

/// Where a guest's console is kept.
const CONSOLE: &str = "console.log";

const INIT: &str = include_str!("kernels.init.sh");

/// What it takes, by a file that shows that it is there.
const NEEDS: [(&str, &str, &str); 8] = [
    ("qemu-system-x86", "/usr/bin/qemu-system-x86_64", "guests"),
    ("seabios", "/usr/share/seabios/bios-256k.bin", "guests"),
    ("cpio", "/usr/bin/cpio", "their initramfs"),
    ("kmod", "/usr/sbin/depmod", "their modules"),
    ("xz-utils", "/usr/bin/xz", "their modules"),
    ("dmsetup", "/usr/sbin/dmsetup", "their mapped devices"),
    ("mdadm", "/usr/sbin/mdadm", "their arrays"),
    ("e2fsprogs", "/usr/sbin/mkfs.ext4", "their disks"),
];

/// Runs the tests on the kernels of these versions; on all when none is named.
///
/// # Errors
/// A version is unknown, a guest cannot be made, or what it says is not what is expected; the message holds
/// the reason and the log names the rest.
pub fn kernels(versions: &[String]) -> Result<()> {
    for version in versions {
        ensure!(
            KERNELS.iter().any(|kernel| kernel.version == version),
            "no kernel {version:?}: use {}",
            KERNELS.map(|kernel| kernel.version).join(", ")
        );
    }
    crate::test::build()?;
    let missing: Vec<(&str, &str)> = NEEDS
        .iter()
        .filter(|(_, shown_by, _)| !Path::new(shown_by).exists())
        .map(|(package, _, why)| (*package, *why))
        .collect();
    setup::fetch(&missing)?;
    let mut failed = Vec::new();
    let mut reports = Vec::new();
    for kernel in &KERNELS {
        if !versions.is_empty() && !versions.iter().any(|version| version == kernel.version) {
            continue;
        }
        match check(kernel) {
            Ok(report) => {
                println!(
                    "kernel {} ({}): ok, {} tests",
                    kernel.version,
                    report.release,
                    report.tests.len()
                );
                reports.push(report);
            }
            Err(error) => {
                println!("kernel {}: FAILED: {error:#}", kernel.version);
                failed.push(kernel.version);
            }
        }
    }
    ensure!(failed.is_empty(), "failed on {}", failed.join(", "));
    if versions.is_empty() {
        fs::write(workspace::root().join("docs/kernels.md"), table(&reports))?;
        println!("docs/kernels.md is written");
    }
    Ok(())
}

/// What a guest said of its kernel.
struct Report {
    release: String,
    /// How each test ended.
    tests: BTreeMap<String, &'static str>,
    /// What the agent lost with BTF hidden.
    without_btf: String,
}

fn table(reports: &[Report]) -> String {
    let mut text = String::from(
        "# Kernels\n\nWritten by `cargo xtask lab kernels`, which boots Debian's kernels in guests and runs these \
         tests of the\nsenses there. “not run” is what the kernel lacks: the agent names it and goes on with \
         less.\n\n| test |",
    );
    let row = |cells: Vec<String>| format!(" {} |", cells.join(" | "));
    text.push_str(&row(reports
        .iter()
        .map(|report| report.release.clone())
        .collect()));
    text.push_str("\n|---|");
    text.push_str(&"---|".repeat(reports.len()));
    let names: BTreeSet<&String> = reports
        .iter()
        .flat_map(|report| report.tests.keys())
        .collect();
    for name in names {
        text.push_str(&format!("\n| {} |", name.replace('_', " ")));
        let ended = |report: &Report| (*report.tests.get(name).unwrap_or(&"–")).to_owned();
        text.push_str(&row(reports.iter().map(ended).collect()));
    }
    text.push_str("\n| disabled when BTF is hidden; the rest works |");
    text.push_str(&row(reports
        .iter()
        .map(|report| report.without_btf.clone())
        .collect()));
    text.push('\n');
    text
}

fn check(kernel: &Kernel) -> Result<Report> {
    let dir = workspace::target().join("kernels").join(kernel.version);
    let image = unpack(kernel, &dir)?;
    let initramfs = initramfs(&dir)?;
    // Emulation breaks a guest now and then, which is nobody's failure.
    let console = match boot(&dir, &image, &initramfs)? {
        Some(console) => console,
        None => {
            println!(
                "kernel {}: the guest died or hung; once more",
                kernel.version
            );
            let again = boot(&dir, &image, &initramfs)?;
            again.with_context(|| {
                format!(
                    "the guest died or hung twice: {}",
                    dir.join(CONSOLE).display()
                )
            })?
        }
    };
    judge(kernel, &console)
        .with_context(|| format!("the guest's console is in {}", dir.join(CONSOLE).display()))
}

/// Runs a guest to its end and returns what it said; none when it did not get there.
fn boot(dir: &Path, image: &Path, initramfs: &Path) -> Result<Option<String>> {
    let disk = dir.join("disk.img");
    fs::File::create(&disk)?.set_len(128 << 20)?;
    run(Command::new("mke2fs")
        .args(["-q", "-F", "-t", "ext4"])
        .arg(&disk))?;
    let drive = format!("file={},if=virtio,format=raw,cache=unsafe", disk.display());
    let log = dir.join(CONSOLE);
    let ended = Command::new("timeout")
        .args([PATIENCE_SECONDS, "qemu-system-x86_64"])
        // Without the instruction of which QEMU 7.2's emulation ends in a double fault.
        .args(["-M", "q35", "-accel", "tcg", "-cpu", "max,cx16=off"])
        .args(["-smp", "1"])
        .args(["-m", "1024", "-nographic", "-no-reboot", "-nic", "none"])
        .args(["-drive", &drive, "-kernel"])
        .arg(image)
        .arg("-initrd")
        .arg(initramfs)
        // The kernel's own messages would break the lines of the tests.
        .args(["-append", "console=ttyS0 quiet loglevel=1 panic=-1 psi=1"])
        .stdin(Stdio::null())
        .stdout(fs::File::create(&log)?)
        .status()
        .context("qemu-system-x86_64 cannot be started")?;
    let console = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
    let whole = ended.success() && console.contains("guest: done");
    Ok(whole.then_some(console))
}

/// Compares what the guest said with what is expected of this kernel.
fn judge(kernel: &Kernel, console: &str) -> Result<Report> {
    let said = |what: &str| {
        let start = format!("guest: {what} ");
        let mut lines = console.lines().map(str::trim_end);
        lines.find_map(|line| line.split_once(&start).map(|(_, rest)| rest))
    };
    let snapshot = |what: &str| -> Result<Value> {
        let text = said(what).with_context(|| format!("the guest did not get to {what:?}"))?;
        let status: Value = serde_json::from_str(text).context("no status")?;
        Ok(status["view"]["snapshot"].clone())
    };
    let whole = snapshot("whole")?;
    ensure!(lost(&whole).is_empty(), "the agent lost {:?}", lost(&whole));
    ensure!(has(&whole, "memory.used") && has(&whole, "sched.run_queue_latency_p99"));
    ensure!(
        sane(&whole),
        "a run-queue latency is longer than the guest has run: {whole}"
    );
    let hidden = snapshot("without-btf")?;
    ensure!(
        lost(&hidden) == ["kernel programs"],
        "without BTF: {hidden}"
    );
    ensure!(has(&hidden, "memory.used") && !has(&hidden, "sched.run_queue_latency_p99"));
    for test in TESTS {
        let ended = said(&format!("{test} ended with"));
        ensure!(ended == Some("0"), "{test} ended with {ended:?}");
    }
    Ok(Report {
        release: said("kernel").context("no release")?.to_owned(),
        tests: tests(kernel, console)?,
        without_btf: lost(&hidden).join(", "),
    })
}

/// How each test ended; what one printed that was not run stands below its name.
fn tests(kernel: &Kernel, console: &str) -> Result<BTreeMap<String, &'static str>> {
    let mut tests = BTreeMap::new();
    let mut of = None;
    let mut lacking = BTreeSet::new();
    for line in console.lines().map(str::trim) {
        if let Some(name) = line
            .strip_prefix("test ")
            .and_then(|line| line.strip_suffix(" ... ok"))
        {
            if name != "helper" {
                tests.insert(name.to_owned(), "ok");
            }
        } else if let Some(name) = line
            .strip_prefix("---- ")
            .and_then(|line| line.strip_suffix(" stdout ----"))
        {
            of = Some(name.to_owned());
        } else if let (Some(why), Some(name)) = (line.strip_prefix("not run: "), &of) {
            let lacks = kernel.lacks.iter().find(|lacks| why.contains(**lacks));
            lacking.insert(*lacks.with_context(|| format!("{name} was not run: {why}"))?);
            tests.insert(name.clone(), "not run");
        }
    }
    ensure!(
        lacking.len() == kernel.lacks.len(),
        "not {:?} but {lacking:?} is lacking",
        kernel.lacks
    );
    Ok(tests)
}

fn lost(snapshot: &Value) -> Vec<&str> {
    let disabled = snapshot["disabled"].as_array().into_iter().flatten();
    disabled.filter_map(|one| one["what"].as_str()).collect()
}

fn samples<'s>(snapshot: &'s Value, metric: &'s str) -> impl Iterator<Item = &'s Value> {
    let all = snapshot["samples"].as_array().into_iter().flatten();
    all.filter(move |sample| sample["metric"] == metric)
}

fn has(snapshot: &Value, metric: &str) -> bool {
    samples(snapshot, metric).next().is_some()
}

/// No guest lives for ten minutes.
fn sane(snapshot: &Value) -> bool {
    samples(snapshot, "sched.run_queue_latency_p99")
        .all(|sample| sample["value"].as_f64().is_some_and(|ns| ns < 600e9))
}

/// Fetches the kernel and returns its image.
fn unpack(kernel: &Kernel, dir: &Path) -> Result<PathBuf> {
    let root = dir.join("root");
    if let Some(image) = image(&root) {
        return Ok(image);
    }
    fs::create_dir_all(&root)?;
    let lists = dir.join("lists");
    fs::create_dir_all(lists.join("partial"))?;
    let source = dir.join("sources.list");
    let keyring = "/usr/share/keyrings/debian-archive-keyring.gpg";
    let line = format!(
        "deb [signed-by={keyring}] http://deb.debian.org/debian {} main\n",
        kernel.suite
    );
    fs::write(&source, line)?;
    let apt = |program: &str, arguments: &[&str]| {
        let mut command = Command::new(program);
        command.current_dir(dir);
        for option in [
            format!("Dir::Etc::sourcelist={}", source.display()),
            "Dir::Etc::sourceparts=-".into(),
            format!("Dir::State::lists={}", lists.display()),
            "Dir::Cache::pkgcache=".into(),
            "Dir::Cache::srcpkgcache=".into(),
            "APT::Sandbox::User=root".into(),
            "Acquire::Check-Valid-Until=false".into(),
            "Acquire::Languages=none".into(),
        ] {
            command.args(["-o", &option]);
        }
        output(command.args(arguments))
    };
    apt("apt-get", &["update", "-qq"])?;
    // The newest ones are split: an image package that depends on the binary and on the modules.
    let mut wanted = vec!["linux-image-cloud-amd64".to_owned()];
    let mut next = 0;
    while let Some(package) = wanted.get(next).cloned() {
        next += 1;
        for line in apt("apt-cache", &["depends", &package])?.lines() {
            let Some(name) = line.trim().strip_prefix("Depends: linux-") else {
                continue;
            };
            let name = format!("linux-{name}");
            if !name.starts_with("linux-base") && !wanted.contains(&name) {
                wanted.push(name);
            }
        }
    }
    for package in &wanted[1..] {
        apt("apt-get", &["download", package])?;
    }
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            run(Command::new("dpkg-deb").arg("-x").arg(path).arg(&root))?;
        }
    }
    image(&root).with_context(|| format!("no kernel image came with {wanted:?}"))
}

fn modules(root: &Path) -> Option<PathBuf> {
    let places = ["lib/modules", "usr/lib/modules"];
    let mut places = places.iter().map(|place| root.join(place));
    let dir = places.find(|place| place.is_dir())?;
    Some(fs::read_dir(dir).ok()?.next()?.ok()?.path())
}

fn image(root: &Path) -> Option<PathBuf> {
    let version = modules(root)?;
    let name = version.file_name()?.to_str()?.to_owned();
    [
        root.join(format!("boot/vmlinuz-{name}")),
        version.join("vmlinuz"),
    ]
    .into_iter()
    .find(|image| image.exists())
}

/// Packs the guest: the agent, the tests and what they call, with their libraries and modules.
fn initramfs(dir: &Path) -> Result<PathBuf> {
    let (root, guest) = (dir.join("root"), dir.join("guest"));
    let _ = fs::remove_dir_all(&guest);
    // Where the tests were told to keep their files.
    let work = workspace::target().join("tmp");
    for place in [
        "bin",
        "proc",
        "sys",
        "dev",
        "tmp",
        "run",
        "root",
        "etc/ssl/certs",
    ] {
        fs::create_dir_all(guest.join(place))?;
    }
    fs::create_dir_all(guest.join(work.strip_prefix("/")?))?;
    let mut programs = vec![("lifeboat", workspace::binary("lifeboat"))];
    for test in TESTS {
        programs.push((test, newest(test)?));
    }
    for program in PROGRAMS.map(Path::new) {
        let name = program.file_name().and_then(|name| name.to_str());
        programs.push((name.context("a program's name")?, program.to_owned()));
    }
    for (name, path) in programs {
        let to = guest.join("bin").join(name);
        fs::copy(&path, &to).with_context(|| format!("cannot copy {}", path.display()))?;
        run(Command::new("strip").arg("--strip-debug").arg(&to))?;
        // A static program has none, and ldd then fails.
        let libraries = output(Command::new("ldd").arg(&to)).unwrap_or_default();
        for library in libraries
            .split_whitespace()
            .filter(|word| word.starts_with('/'))
        {
            let to = guest.join(&library[1..]);
            fs::create_dir_all(to.parent().context("a library in /")?)?;
            fs::copy(library, to)?;
        }
    }
    let certificates = "etc/ssl/certs/ca-certificates.crt";
    fs::copy(Path::new("/").join(certificates), guest.join(certificates))?;
    let init = guest.join("init");
    let text = INIT
        .replace("@WORK@", &work.display().to_string())
        .replace("@TESTS@", &TESTS.join(" "))
        .replace("@MODULES@", &MODULES.join(" "));
    fs::write(&init, text)?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    copy_modules(&root, &guest)?;
    let packed = dir.join("initramfs");
    let script = "find . | cpio --create --format=newc --quiet >\"$0\"";
    run(Command::new("sh")
        .current_dir(&guest)
        .args(["-c", script])
        .arg(&packed))?;
    Ok(packed)
}

fn copy_modules(root: &Path, guest: &Path) -> Result<()> {
    let from = modules(root).context("no modules came with the kernel")?;
    let version = from.file_name().context("a version")?;
    let to = guest.join("lib/modules").join(version);
    for module in MODULES {
        // Built in, or named otherwise on this kernel: the guest says what it misses.
        let script = "depmod -b \"$1\" \"$2\" 2>/dev/null; modprobe -d \"$1\" -S \"$2\" --show-depends \"$0\" 2>/dev/null | sed -n 's/^insmod \\([^ ]*\\).*/\\1/p'";
        let base = match from.strip_prefix(root.join("usr")) {
            Ok(_) => root.join("usr"),
            Err(_) => root.to_owned(),
        };
        let paths = output(
            Command::new("sh")
                .args(["-c", script, module])
                .arg(&base)
                .arg(version),
        )?;
        for path in paths.split_whitespace() {
            let name = Path::new(path).file_name().context("a module's file")?;
            let target = to.join(name);
            fs::create_dir_all(&to)?;
            fs::copy(path, &target)?;
            if target
                .extension()
                .is_some_and(|extension| extension == "xz")
            {
                run(Command::new("xz")
                    .args(["--decompress", "--force"])
                    .arg(&target))?;
            }
        }
    }
    run(Command::new("depmod")
        .arg("-b")
        .arg(guest)
        .arg(version)
        .stderr(Stdio::null()))
}

/// The test program that was built last.
fn newest(test: &str) -> Result<PathBuf> {
    let mut found: Option<(std::time::SystemTime, PathBuf)> = None;
    for entry in fs::read_dir(workspace::target().join("debug/deps"))? {
        let path = entry?.path();
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        if name.starts_with(&format!("{test}-")) && path.extension().is_none() {
            let at = path.metadata()?.modified()?;
            if found.as_ref().is_none_or(|(newest, _)| at > *newest) {
                found = Some((at, path));
            }
        }
    }
    match found {
        Some((_, path)) => Ok(path),
        None => bail!("the test {test} is not built"),
    }
}
