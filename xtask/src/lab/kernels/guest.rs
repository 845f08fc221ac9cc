//! One guest: what is packed into its initramfs, and its run from boot to power-off.
//!
//! Emulation (TCG) with one CPU, because that works everywhere and without KVM.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::package::Unpacked;
use crate::process::{output, run};
use crate::workspace;

/// Test programs that run in the guest.
pub const TESTS: [&str; 5] = ["senses", "scheduler", "stacked", "guests", "ublk"];

/// Programs that the tests call.
const PROGRAMS: [&str; 10] = [
    "/usr/bin/busybox",
    "/usr/bin/nice",
    "/usr/sbin/blkdiscard",
    "/usr/sbin/ip",
    "/usr/bin/nsenter",
    "/usr/sbin/losetup",
    "/usr/sbin/dmsetup",
    "/usr/sbin/mdadm",
    "/usr/sbin/mkfs.ext4",
    "/usr/sbin/e2fsck",
];

/// Modules of the guest's disks and links.
const MODULES: [&str; 14] = [
    "ata_piix",
    "virtio_pci",
    "virtio_blk",
    "ext4",
    "veth",
    "loop",
    "raid1",
    "dm-mod",
    "dm-delay",
    "dm-flakey",
    "dm-raid",
    "sd_mod",
    "scsi_debug",
    "ublk_drv",
];

/// A guest that says nothing for so long hangs. On an idle machine it boots in some 5 s, and no test is
/// silent for longer than half a minute; with eight others at work on each CPU, both were seen to take 2 minutes.
const SILENCE: Duration = Duration::from_secs(300);
/// One that talks and does not end. It takes about 3 minutes on an idle machine.
const PATIENCE: Duration = Duration::from_secs(1200);

/// A guest that says so is stopped for a while: to its kernel, as on a host that is too busy, a CPU did not
/// move on.
const STAND_STILL: &str = "guest: stand still";
const STOOD_STILL: Duration = Duration::from_secs(10);

const INIT: &str = include_str!("init.sh");

/// What a guest said.
pub struct Console {
    pub text: String,
    /// False when it died or hung before it powered off.
    pub whole: bool,
}

/// Boots a guest and waits for its end.
///
/// # Errors
/// The machine cannot be made or started.
pub fn boot(dir: &Path, image: &Path, initramfs: &Path) -> Result<Console> {
    let disk = dir.join("disk.img");
    fs::File::create(&disk)?.set_len(128 << 20)?;
    run(Command::new("/usr/sbin/mkfs.ext4")
        .args(["-q", "-F"])
        .arg(&disk))?;
    let drive = format!("file={},if=virtio,format=raw,cache=unsafe", disk.display());
    // Nothing is kept of what is written to these two: each run finds them empty.
    let drives = ["ata", "nvme"].map(|kind| {
        format!(
            "driver=raw,node-name={kind},file.driver=null-co,file.size=16777216,file.read-zeroes=on"
        )
    });
    let log = dir.join("console.log");
    // The guest ends with this task.
    let mut machine = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "qemu-system-x86_64"])
        // Without the instruction of which QEMU 7.2's emulation ends in a double fault.
        .args(["-M", "q35", "-accel", "tcg", "-cpu", "max,cx16=off"])
        .args(["-smp", "1"])
        .args(["-m", "1024", "-nographic", "-no-reboot", "-nic", "none"])
        .args(["-drive", &drive])
        .args(["-blockdev", &drives[0], "-device", "piix3-ide,id=ide"])
        .args(["-device", "ide-hd,bus=ide.0,drive=ata"])
        .args(["-blockdev", &drives[1]])
        .args(["-device", "nvme,serial=lifeboat,drive=nvme"])
        .arg("-kernel")
        .arg(image)
        .arg("-initrd")
        .arg(initramfs)
        // The kernel's own messages would break the lines of the tests.
        .args(["-append", "console=ttyS0 quiet loglevel=0 panic=-1 psi=1"])
        .stdin(Stdio::null())
        .stdout(fs::File::create(&log)?)
        .spawn()
        .context("qemu-system-x86_64 cannot be started")?;
    let start = Instant::now();
    let (mut heard, mut last) = (Vec::new(), start);
    let mut stood_still = false;
    let ended = loop {
        if let Some(ended) = machine.try_wait()? {
            break ended.success();
        }
        if fs::metadata(&log)?.len() != heard.len() as u64 {
            (heard, last) = (fs::read(&log)?, Instant::now());
        }
        if !stood_still && said(&heard, STAND_STILL) {
            let machine = Pid::from_raw(machine.id().try_into()?);
            kill(machine, Signal::SIGSTOP)?;
            sleep(STOOD_STILL);
            kill(machine, Signal::SIGCONT)?;
            stood_still = true;
        }
        if last.elapsed() > SILENCE || start.elapsed() > PATIENCE {
            machine.kill()?;
            machine.wait()?;
            break false;
        }
        sleep(Duration::from_millis(200));
    };
    let heard = fs::read(&log)?;
    Ok(Console {
        whole: ended && said(&heard, "guest: done"),
        text: String::from_utf8_lossy(&heard).into_owned(),
    })
}

fn said(heard: &[u8], what: &str) -> bool {
    heard.windows(what.len()).any(|one| one == what.as_bytes())
}

/// Packs the guest: the agent, the tests and what they call, with their libraries and modules.
///
/// # Errors
/// Something that belongs into it is missing or cannot be copied.
pub fn pack(kernel: &Unpacked, dir: &Path) -> Result<PathBuf> {
    let guest = dir.join("guest");
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
    copy_modules(&kernel.modules, &guest)?;
    let packed = dir.join("initramfs");
    let script = "find . | cpio --create --format=newc --owner=+0:+0 --quiet >\"$0\"";
    run(Command::new("sh")
        .current_dir(&guest)
        .args(["-c", script])
        .arg(&packed))?;
    Ok(packed)
}

fn copy_modules(from: &Path, guest: &Path) -> Result<()> {
    let version = from.file_name().context("a version")?;
    let to = guest.join("lib/modules").join(version);
    // `lib/modules/VERSION` is below it.
    let base = from.ancestors().nth(3).context("a place of modules")?;
    for module in MODULES {
        // Built in, or named otherwise on this kernel: the guest says what it misses.
        let script = "/usr/sbin/depmod -b \"$1\" \"$2\" 2>/dev/null; /usr/sbin/modprobe -d \"$1\" -S \"$2\" --show-depends \"$0\" 2>/dev/null | sed -n 's/^insmod \\([^ ]*\\).*/\\1/p'";
        let paths = output(
            Command::new("sh")
                .args(["-c", script, module])
                .arg(base)
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
    run(Command::new("/usr/sbin/depmod")
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
