//! Real faults of disks and of the kernel, as the built agent tells of them. In guests only.

use lifeboat_tests::disk::output;
use lifeboat_tests::guest::{Caged, Loop, Mapped, agent, is_guest, listed};
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// Sectors of a MiB.
const MIB: u64 = 2048;

/// Reads a block of 4 KiB over and over, past the page cache.
fn reads(device: &str, block: u64) -> String {
    format!(
        "while :; do dd if={device} of=/dev/null bs=4k skip={block} count=1 iflag=direct; sleep 0.1; done"
    )
}

#[test]
fn a_failed_member_of_an_md_array_is_missing_and_the_policy_finds_the_host_degraded() {
    if !is_guest() {
        return;
    }
    let members = ["a", "b"].map(|name| Loop::of(name, 16));
    let [a, b] = [members[0].device(), members[1].device()];
    let how = [
        "--create",
        "/dev/md0",
        "--run",
        "--level=1",
        "--raid-devices=2",
        "--metadata=1.2",
        "--assume-clean",
    ];
    output("mdadm", &[&how[..], &[a, b]].concat());
    let agent = agent();
    agent.until("the whole array", |seen| {
        seen.values("raid.missing_disks", "md0") == [0.0] && seen.verdict() != "degraded"
    });
    output("mdadm", &["/dev/md0", "--fail", b]);
    let degraded = agent.until("a degraded host", |seen| seen.verdict() == "degraded");
    assert_eq!(degraded.values("raid.missing_disks", "md0"), [1.0]);
    // With one member the data are all there.
    assert_eq!(degraded.values("raid.failed", "md0"), [0.0]);
    output("mdadm", &["--stop", "/dev/md0"]);
    agent.until("a host without arrays", |seen| {
        seen.values("raid.missing_disks", "md0").is_empty() && seen.verdict() != "degraded"
    });
}

#[test]
fn a_failed_leg_of_a_raid_volume_of_lvm_is_missing() {
    if !is_guest() {
        return;
    }
    let disks = ["leg-0", "leg-1"].map(|name| Loop::of(name, 16));
    let metadata = ["metadata-0", "metadata-1"].map(|name| Loop::of(name, 4));
    let whole = format!("0 {} linear {} 0", 16 * MIB, disks[1].device());
    let leg = Mapped::new("leg", &whole);
    let table = format!(
        "0 {} raid raid1 4 0 nosync region_size 1024 2 {} {} {} {}",
        16 * MIB,
        metadata[0].device(),
        disks[0].device(),
        metadata[1].device(),
        leg.device().display()
    );
    let volume = Mapped::of_lvm("vg-data", &table);
    let agent = agent();
    agent.until("the whole volume", |seen| {
        seen.values("raid.missing_disks", "vg-data") == [0.0]
    });
    leg.change(&format!("0 {} error", 16 * MIB));
    let device = volume.device();
    let device = device.to_str().expect("plain");
    // It still takes writes, and learns by them that the leg is gone.
    let of = format!("of={device}");
    output(
        "dd",
        &[
            "if=/dev/zero",
            &of,
            "bs=64k",
            "count=16",
            "oflag=direct",
            "conv=fsync",
        ],
    );
    let degraded = agent.until("the missing leg", |seen| {
        seen.values("raid.missing_disks", "vg-data") == [1.0]
    });
    assert_eq!(degraded.values("raid.failed", "vg-data"), [0.0]);
    drop(volume);
    drop(leg);
}

/// The disk of a model.
fn disk_of(model: &str) -> String {
    let disks = fs::read_dir("/sys/block").expect("sysfs");
    disks
        .flatten()
        .find(|disk| {
            fs::read_to_string(disk.path().join("device/model"))
                .is_ok_and(|its| its.trim() == model)
        })
        .map_or_else(
            || panic!("no disk of the model {model}"),
            |disk| disk.file_name().into_string().expect("plain"),
        )
}

#[test]
fn an_ata_and_an_nvme_drive_tell_their_health_by_their_own_commands() {
    if !is_guest() {
        return;
    }
    const HOUR: f64 = 3.6e12;
    let (ata, nvme) = (disk_of("QEMU HARDDISK"), disk_of("QEMU NVMe Ctrl"));
    let agent = agent();
    let seen = agent.until("what both drives tell", |seen| {
        seen.values("disk.smart_failed", &ata) == [0.0]
            && seen.values("disk.smart_failed", &nvme) == [0.0]
    });
    // The attributes that QEMU gives every ATA drive (hw/ide/core.c, `smart_attributes`).
    assert_eq!(seen.values("disk.power_on", &ata), [HOUR]);
    assert_eq!(seen.values("disk.reallocated_sectors", &ata), [0.0]);
    assert_eq!(seen.values("disk.attributes_failing", &ata), [0.0]);
    assert_eq!(seen.values("disk.temperature", &ata), [31.0]);
    // Its health log (hw/nvme/ctrl.c): 323 K.
    assert_eq!(seen.values("disk.temperature", &nvme), [50.0]);
    assert_eq!(seen.values("disk.media_errors", &nvme), [0.0]);
    assert_eq!(seen.values("disk.wear", &nvme), [0.0]);
}

#[test]
fn a_medium_error_belongs_to_the_container_that_read_and_the_kernel_logged_it() {
    if !is_guest() {
        return;
    }
    let disk = disk_of("scsi_debug");
    let device = format!("/dev/{disk}");
    let agent = agent();
    // Sector 4660 and the nine behind it cannot be read (drivers/scsi/scsi_debug.c, SDEBUG_OPT_MEDIUM_ERR).
    fs::write("/sys/bus/pseudo/drivers/scsi_debug/opts", "2").expect("written");
    let reader = Caged::run("reader", &reads(&device, 582));
    // Not its neighbour, which reads where nothing is wrong.
    let neighbour = Caged::run("neighbour", &reads(&device, 0));
    agent.until("the reader's error", |seen| {
        assert!(!seen.above("block.errors", "/neighbour", 0.0), "{seen:?}");
        seen.above("block.media_errors", "/reader", 0.0)
            && seen.above("block.media_errors", &disk, 0.0)
            && seen.above("block.iops", "/neighbour", 0.0)
    });
    agent.until("the kernel's own message", |seen| {
        seen.above("kernel.io_errors", &disk, 0.0)
    });
    drop((reader, neighbour));
    fs::write("/sys/bus/pseudo/drivers/scsi_debug/opts", "0").expect("written");
}

#[test]
fn a_device_that_becomes_slow_is_told_from_another_and_who_reads_it_from_its_neighbour() {
    if !is_guest() {
        return;
    }
    const SECOND: f64 = 1e9;
    let disks = ["below", "fast"].map(|name| Loop::of(name, 16));
    let delayed = |ms: u32| format!("0 {} delay {} 0 {ms}", 16 * MIB, disks[0].device());
    let mapped = Mapped::new("delayed", &delayed(0));
    let slow = Loop::over(&mapped.device());
    let agent = agent();
    let reader = Caged::run("reader", &reads(slow.device(), 0));
    let neighbour = Caged::run("neighbour", &reads(disks[1].device(), 0));
    let p99 = "block.latency_p99";
    agent.until("a fast device", |seen| {
        seen.above(p99, slow.name(), 0.0) && !seen.above(p99, slow.name(), SECOND)
    });
    // Longer than an emulated disk takes on a machine that is busy.
    mapped.change(&delayed(3000));
    agent.until("the slow device", |seen| {
        seen.above(p99, slow.name(), 2.0 * SECOND)
            && seen.above(p99, "/reader", 2.0 * SECOND)
            && seen.above("block.iops", "/neighbour", 0.0)
            && !seen.above(p99, disks[1].name(), SECOND)
            && !seen.above(p99, "/neighbour", SECOND)
    });
    agent.until_metrics("the same in the list", "block.", |metrics| {
        listed(metrics, p99, slow.name()) > Some(2.0 * SECOND)
            && listed(metrics, p99, "/reader") > Some(2.0 * SECOND)
            && listed(metrics, p99, disks[1].name()) < Some(SECOND)
    });
    mapped.change(&delayed(0));
    drop((reader, neighbour));
}

#[test]
fn an_error_of_a_mapped_device_is_told_of_the_disk_and_of_the_container_that_read_there() {
    if !is_guest() {
        return;
    }
    let below = Loop::of("holed", 16);
    let table = format!(
        "0 {MIB} linear {} 0\n{MIB} {} error",
        below.device(),
        15 * MIB
    );
    let mapped = Mapped::new("holed", &table);
    let disk = Loop::over(&mapped.device());
    let agent = agent();
    let reader = Caged::run("reader", &reads(disk.device(), 512));
    let neighbour = Caged::run("neighbour", &reads(disk.device(), 0));
    let seen = agent.until("the reader's error", |seen| {
        assert!(!seen.above("block.errors", "/neighbour", 0.0), "{seen:?}");
        seen.above("block.errors", "/reader", 0.0)
            && seen.above("block.errors", disk.name(), 0.0)
            && seen.above("block.iops", "/neighbour", 0.0)
    });
    // The device mapper only says that it failed.
    for class in ["media", "timeout", "transport", "protection", "target"] {
        let metric = format!("block.{class}_errors");
        assert_eq!(seen.values(&metric, "/reader"), [0.0], "{class}: {seen:?}");
    }
    agent.until("the kernel's own message", |seen| {
        seen.above("kernel.io_errors", disk.name(), 0.0)
    });
    drop((reader, neighbour));
}

#[test]
fn an_ext4_that_goes_read_only_after_an_error_is_told_by_its_mount_and_from_the_log() {
    if !is_guest() {
        return;
    }
    let disk = Loop::of("broken", 32);
    let healthy = format!("0 {} linear {} 0", 32 * MIB, disk.device());
    let mapped = Mapped::new("broken", &healthy);
    let (device, at) = (mapped.device(), "/tmp/broken");
    let device = device.to_str().expect("plain");
    output("mkfs.ext4", &["-q", "-F", device]);
    fs::create_dir_all(at).expect("a directory");
    let how = ["-t", "ext4", "-o", "errors=remount-ro"];
    output("mount", &[&how[..], &[device, at]].concat());
    let agent = agent();
    agent.until("the file system", |seen| {
        seen.values("filesystem.read_only", at) == [0.0]
            && seen.values("filesystem.known_errors", at) == [0.0]
    });
    let seen = agent.until("no error", |seen| !seen.verdict().is_empty());
    assert!(!seen.fails("read-only") && !seen.fails("filesystem-error"));
    // It takes no writes any more, and reads go on.
    mapped.change(&format!(
        "0 {} flakey {} 0 0 3600 1 error_writes",
        32 * MIB,
        disk.device()
    ));
    let file = OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .open(Path::new(at).join("file"));
    let written = file.and_then(|mut file| {
        file.write_all(&[7; 65536])?;
        file.sync_all()
    });
    assert!(written.is_err(), "the disk takes no writes");
    agent.until("a read-only file system", |seen| {
        // ext4 finds out that its journal is gone when it is asked to change something again.
        let _ = fs::write(Path::new(at).join("next"), "next");
        seen.values("filesystem.read_only", at) == [1.0]
            && seen.above("filesystem.known_errors", at, 0.0)
            && seen.fails("read-only")
            && seen.fails("filesystem-error")
    });
    output("umount", &[at]);
}

#[test]
fn a_task_that_hangs_on_its_disk_is_told_of() {
    if !is_guest() {
        return;
    }
    const LIMIT: &str = "/proc/sys/kernel/hung_task_timeout_secs";
    let disk = Loop::of("stuck", 16);
    let mapped = Mapped::new(
        "stuck",
        &format!("0 {} linear {} 0", 16 * MIB, disk.device()),
    );
    let agent = agent();
    let seen = agent.until("a verdict", |seen| !seen.verdict().is_empty());
    assert!(!seen.fails("hung-task"), "{seen:?}");
    let before = fs::read_to_string(LIMIT).expect("the kernel looks for them");
    fs::write(LIMIT, "2").expect("written");
    mapped.suspend();
    // It waits for its pages to be written, which cannot be interrupted.
    let mut writer = Command::new("dd")
        .args(["if=/dev/zero", "bs=4k", "count=1", "conv=fsync"])
        .arg(format!("of={}", mapped.device().display()))
        .stderr(Stdio::null())
        .spawn()
        .expect("a writer");
    agent.until("the hung task", |seen| seen.fails("hung-task"));
    fs::write(LIMIT, before.trim()).expect("written");
    mapped.resume();
    assert!(writer.wait().expect("it ends").success());
}

#[test]
fn a_cpu_that_stood_still_is_told_of_as_a_lockup() {
    if !is_guest() {
        return;
    }
    const LIMIT: &str = "/proc/sys/kernel/watchdog_thresh";
    let agent = agent();
    let before = fs::read_to_string(LIMIT).expect("the kernel looks for them");
    // Twice as many seconds are too long for a CPU.
    fs::write(LIMIT, "2").expect("written");
    // The lab stops the whole machine for a while when it reads that.
    fs::write("/dev/console", "guest: stand still\n").expect("written");
    agent.until("the lockup", |seen| seen.fails("lockup"));
    fs::write(LIMIT, before.trim()).expect("written");
}
