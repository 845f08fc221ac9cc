//! Devices on devices: what is dirty, and whose the I/O is, counted once. In guests only.

use lifeboat::model::telemetry::Sizes;
use lifeboat::telemetry::dirty::Watch;
use lifeboat_tests::disk::output;
use lifeboat_tests::guest::{Loop, Mapped, is_guest};
use lifeboat_tests::scope::{Scope, container, now};
use std::cell::RefCell;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const GRANULE: usize = 65_536;

/// Two disks of 32 MiB under one striped device.
fn striped(name: &str) -> ([Loop; 2], Mapped) {
    let disks = ["0", "1"].map(|part| Loop::of(&format!("{name}-{part}"), 32));
    let table = format!(
        "0 {} striped 2 128 {} 0 {} 0",
        64 << 11,
        disks[0].device(),
        disks[1].device()
    );
    let mapped = Mapped::new(name, &table);
    (disks, mapped)
}

/// Reads what a device holds past the page cache, which knows nothing of a file system's own writes.
fn read(device: &Path, at: u64, into: &mut [u8]) {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_DIRECT)
        .open(device)
        .expect("opened");
    let mut room = vec![0; GRANULE + 4096];
    let start = room.as_ptr().align_offset(4096);
    for (index, granule) in into.chunks_mut(GRANULE).enumerate() {
        let aligned = &mut room[start..start + granule.len()];
        let at = at + (index * GRANULE) as u64;
        file.read_exact_at(aligned, at).expect("read");
        granule.copy_from_slice(aligned);
    }
}

/// Writes in random places and of random sizes, for a while.
fn storm(file: &File, mib: u64, lasts: Duration, seed: &mut u64) {
    let end = Instant::now() + lasts;
    let mut bytes = vec![0; 256 << 10];
    while Instant::now() < end {
        *seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let at = ((*seed >> 20) % (mib * MIB - bytes.len() as u64)) & !511;
        let length = ((*seed >> 11) as usize % bytes.len()) & !511;
        bytes.fill((*seed >> 32) as u8 | 1);
        file.write_all_at(&bytes[..length], at).expect("written");
        if *seed >> 60 == 0 {
            file.sync_data().expect("synced");
        }
    }
}

/// Follows a device by its dirty extents while `change` changes it, and holds the copy against the truth.
fn follow(device: &Path, mut change: impl FnMut(), mut settle: impl FnMut()) {
    let mut watch = match Watch::start(Path::new("/"), device) {
        Ok(watch) => watch,
        Err(error) => {
            println!("not run: {error}");
            return;
        }
    };
    let mut copy = vec![0; 64 * MIB as usize];
    read(device, 0, &mut copy);
    let before = copy.clone();
    let mut located = 0;
    let mut catch_up = |copy: &mut Vec<u8>| {
        let changes = watch.swap();
        for range in &changes.ranges {
            let part = range.start as usize..range.end as usize;
            read(device, range.start, &mut copy[part]);
        }
        located += u32::from(!changes.everything && !changes.ranges.is_empty());
        changes.ranges.is_empty()
    };
    for _ in 0..10 {
        change();
        catch_up(&mut copy);
    }
    settle();
    let end = Instant::now() + Duration::from_secs(60);
    let mut quiet = 0;
    while quiet < 5 {
        assert!(Instant::now() < end, "it never fell quiet");
        sleep(Duration::from_millis(100));
        quiet = if catch_up(&mut copy) { quiet + 1 } else { 0 };
    }
    let mut truth = vec![0; copy.len()];
    read(device, 0, &mut truth);
    let differing: Vec<usize> = (0..copy.len() / GRANULE)
        .filter(|granule| {
            let part = granule * GRANULE..(granule + 1) * GRANULE;
            copy[part.clone()] != truth[part]
        })
        .collect();
    assert!(differing.is_empty(), "granules not told of: {differing:?}");
    assert!(before != copy, "the storm changed it");
    // Otherwise the copy was only true because it was made anew each time.
    assert!(located > 0, "no epoch was precise");
}

#[test]
fn a_copy_by_dirty_extents_of_a_striped_device_is_true_after_a_storm() {
    if !is_guest() {
        return;
    }
    let (_disks, mapped) = striped("raw");
    let device = mapped.device();
    let file = OpenOptions::new()
        .write(true)
        .open(&device)
        .expect("opened");
    let mut seed = 7;
    follow(
        &device,
        || storm(&file, 64, Duration::from_millis(200), &mut seed),
        || {
            file.sync_all().expect("synced");
            output(
                "blkdiscard",
                &[
                    "-z",
                    "-o",
                    "4194304",
                    "-l",
                    "1048576",
                    device.to_str().expect("plain"),
                ],
            );
        },
    );
}

#[test]
fn a_copy_by_dirty_extents_of_a_disk_under_a_striped_one_is_true_after_a_storm_on_ext4() {
    if !is_guest() {
        return;
    }
    // A mapped device on a mapped device on a disk; the one in the middle is watched.
    let disk = Loop::of("bottom", 64);
    let middle = Mapped::new(
        "middle",
        &format!("0 {} linear {} 0", 64 << 11, disk.device()),
    );
    let table = format!(
        "0 {} striped 1 128 {} 0",
        64 << 11,
        middle.device().display()
    );
    let top = Mapped::new("top", &table);
    let (device, at) = (top.device(), "/tmp/stacked");
    let device = device.to_str().expect("plain");
    output("mkfs.ext4", &["-q", "-F", device]);
    fs::create_dir_all(at).expect("a directory");
    output("mount", &["-t", "ext4", device, at]);
    let file = File::create(Path::new(at).join("file")).expect("a file");
    file.set_len(24 * MIB).expect("sparse");
    let mut seed = 11;
    let file = RefCell::new(Some(file));
    follow(
        &middle.device(),
        || {
            let file = file.borrow();
            let file = file.as_ref().expect("open");
            storm(file, 24, Duration::from_millis(200), &mut seed);
        },
        || {
            drop(file.borrow_mut().take());
            output("umount", &[at]);
        },
    );
}

#[test]
fn what_is_read_through_stacked_devices_is_counted_once_and_for_the_reader() {
    if !is_guest() {
        return;
    }
    let Some(scope) = Scope::new("stacked") else {
        return;
    };
    let (_disks, mapped) = striped("counted");
    let reader = scope.cgroup("reader");
    let mut senses = scope.senses();
    senses.sweep(&[], now());
    let script = "echo $$ > \"$0/cgroup.procs\" && exec dd if=\"$1\" of=/dev/null bs=64k count=128 iflag=direct";
    let read = Command::new("sh")
        .args(["-c", script])
        .args([&reader, &mapped.device()])
        .output()
        .expect("a shell");
    assert!(read.status.success(), "{read:?}");
    let snapshot = senses.sweep(&[container("reader", 0)], now());
    let block = snapshot.containers[0]
        .block
        .as_ref()
        .expect("the programs run");
    let mut sizes = [0; 17];
    sizes[16] = 128; // of 64 KiB
    assert_eq!(block.reads.sizes, Sizes::from_slots(&sizes), "{block:?}");
    assert!(
        snapshot.losses.iter().all(|loss| loss.lost == 0),
        "{:?}",
        snapshot.losses
    );
}
