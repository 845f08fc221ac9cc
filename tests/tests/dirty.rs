//! Dirty extents of block devices on this kernel: whoever copies a device once, and then only what each
//! epoch says, has its true copy. Needs root.

use lifeboat::telemetry::dirty::{Changes, Watch};
use lifeboat_tests::disk::{Disk, output};
use std::fs;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

fn disk(name: &str, mib: u64) -> Option<Disk> {
    Disk::new(Path::new(env!("CARGO_TARGET_TMPDIR")), name, mib)
}

fn storm(target: &[&str]) -> Child {
    Command::new("fio")
        .args([
            "--name=storm",
            "--bsrange=4k-2m",
            "--ioengine=psync",
            "--numjobs=2",
        ])
        .args(["--size=128m", "--time_based", "--runtime=3", "--rate=150m"])
        .args(target)
        .stdout(Stdio::null())
        .spawn()
        .expect("fio")
}

/// A copy of a device that follows it by its dirty extents.
struct Copy {
    bytes: Vec<u8>,
    /// Epochs of which the changes could be located.
    located: u32,
}

impl Copy {
    fn of(disk: &Disk) -> Self {
        let below = disk.below();
        let length = below.metadata().expect("a file").len();
        let mut copy = Self {
            bytes: vec![0; length as usize],
            located: 0,
        };
        copy.read(&below, 0..length);
        copy
    }

    fn read(&mut self, below: &File, range: Range<u64>) {
        let into = &mut self.bytes[range.start as usize..range.end as usize];
        below.read_exact_at(into, range.start).expect("read");
    }

    fn follow(&mut self, disk: &Disk, changes: &Changes) {
        let below = disk.below();
        for range in &changes.ranges {
            self.read(&below, range.clone());
        }
        self.located += u32::from(!changes.everything && !changes.ranges.is_empty());
    }

    /// Granules that differ from the device.
    fn differing(&self, disk: &Disk) -> Vec<usize> {
        let truth = fs::read(disk.directory.join("disk")).expect("read");
        let granules = self.bytes.chunks(65_536).zip(truth.chunks(65_536));
        granules
            .enumerate()
            .filter(|(_, (mine, theirs))| mine != theirs)
            .map(|(granule, _)| granule)
            .collect()
    }
}

/// Follows a device through a storm, and holds the copy against the truth.
fn follow(disk: &Disk, watch: &mut Watch, mut storm: Child, settle: impl FnOnce()) {
    let mut copy = Copy::of(disk);
    let before = blake3_of(&copy.bytes);
    while storm.try_wait().expect("fio").is_none() {
        sleep(Duration::from_millis(100));
        copy.follow(disk, &watch.swap());
    }
    settle();
    // On a busy machine no epoch of the storm may be precise: one of a single write is.
    let end = Instant::now() + Duration::from_secs(20);
    while copy.located == 0 {
        assert!(Instant::now() < end, "no epoch was precise");
        write_one(disk);
        copy.follow(disk, &watch.swap());
    }
    // A file system may discard what a removed file had even after it was unmounted here.
    let end = Instant::now() + Duration::from_secs(20);
    let mut quiet = 0;
    while quiet < 5 {
        assert!(Instant::now() < end, "it never fell quiet");
        sleep(Duration::from_millis(100));
        let changes = watch.swap();
        quiet = if changes.ranges.is_empty() {
            quiet + 1
        } else {
            0
        };
        copy.follow(disk, &changes);
    }
    let differing = copy.differing(disk);
    assert!(differing.is_empty(), "granules not told of: {differing:?}");
    assert_ne!(before, blake3_of(&copy.bytes), "the storm changed it");
}

/// Writes 4 KiB into the device's second granule.
fn write_one(disk: &Disk) {
    let of = format!("of={}", disk.device());
    let to = ["bs=4k", "count=1", "seek=16", "oflag=direct"];
    output("dd", &[&["if=/dev/urandom", &of], &to[..]].concat());
}

fn blake3_of(bytes: &[u8]) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

#[test]
fn a_copy_by_dirty_extents_is_true_after_a_storm_on_the_raw_device() {
    let Some(disk) = disk("raw", 256) else {
        return;
    };
    let mut watch = Watch::start(Path::new("/"), &disk.device).expect("watched");
    let storm = storm(&["--rw=randwrite", "--direct=1", "--filename", disk.device()]);
    follow(&disk, &mut watch, storm, || {
        output("blkdiscard", &["-o", "200M", "-l", "3M", disk.device()]);
        output(
            "blkdiscard",
            &["-z", "-o", "210M", "-l", "1M", disk.device()],
        );
    });
    drop(watch);

    // One small write makes one granule dirty, and no more.
    let mut watch = Watch::start(Path::new("/"), &disk.device).expect("watched again");
    write_one(&disk);
    let changes = watch.swap();
    let first = std::slice::from_ref(&(65_536..131_072));
    assert_eq!(changes.ranges, first, "{changes:?}");
    assert!(!changes.everything);
}

fn on_a_file_system(name: &str, make: &[&str]) {
    let Some(disk) = disk(name, 400) else {
        return;
    };
    output(make[0], &[&make[1..], &[disk.device()]].concat());
    let at = disk.mount();
    let mut watch = Watch::start(Path::new("/"), &disk.device).expect("watched");
    let storm = storm(&["--rw=randwrite", "--fsync=64", "--directory", &at]);
    follow(&disk, &mut watch, storm, || {
        // Files that go, and what the file system then discards.
        let first = fs::read_dir(&at)
            .expect("files")
            .flatten()
            .find(|entry| entry.path().is_file());
        fs::remove_file(first.expect("fio left one").path()).expect("removed");
        output("sync", &["--file-system", &at]);
        disk.unmount();
    });
}

#[test]
fn a_copy_by_dirty_extents_is_true_after_a_storm_on_ext4() {
    on_a_file_system("ext4", &["mkfs.ext4", "-q"]);
}

#[test]
fn a_copy_by_dirty_extents_is_true_after_a_storm_on_xfs() {
    on_a_file_system("xfs", &["mkfs.xfs", "-q"]);
}

#[test]
fn what_is_no_block_device_is_refused_by_name() {
    let Err(error) = Watch::start(Path::new("/"), Path::new("/dev/null")) else {
        panic!("/dev/null is no block device");
    };
    assert!(error.to_string().contains("/dev/null"), "{error}");
}
