//! What a target's file system cannot hold as it is: other times, and more attributes than it keeps.

use super::disks::{Disk, refusal, tool};
use super::*;
use crate::model::volume::TimesKept;
use crate::volume::times::kept_in;
use crate::volume::walk::open_root;
use crate::volume::{BlockSize, Entry, scan, scan_as_sent};
use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

/// A file in the source, modified then.
fn dated(bench: &Bench, name: &str, time: SystemTime) {
    let path = bench.source.join(name);
    fs::write(&path, name).unwrap();
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.set_modified(time).unwrap();
}

/// Files of all times that make a difference: before, at and behind the bounds of file systems, whole and not.
fn all_times(bench: &Bench) {
    let after = |seconds, nanoseconds| UNIX_EPOCH + Duration::new(seconds, nanoseconds);
    let before = |seconds, nanoseconds| UNIX_EPOCH - Duration::new(seconds, nanoseconds);
    let times = [
        ("whole", after(1_500_000_000, 0)),
        ("odd", after(1_500_000_001, 0)),
        ("fine", after(1_500_000_000, 123_456_789)),
        ("year-2040", after(2_208_988_800, 0)),
        ("year-2040-fine", after(2_208_988_800, 1)),
        ("last", after((1 << 31) - 1, 0)),
        ("last-fine", after((1 << 31) - 1, 5)),
        ("year-2500", after(16_725_225_600, 7)),
        ("year-1969", before(1_000_000, 0)),
        ("year-1969-fine", before(1_000_000, 250_000_000)),
        ("first", before(1 << 31, 0)),
        ("first-fine", before((1 << 31) - 1, 999_999_999)),
        ("year-1880", before(2_840_140_800, 0)),
    ];
    for (name, time) in times {
        dated(bench, name, time);
    }
}

fn tree(path: &Path, times: TimesKept) -> (TreeState, Vec<Entry>) {
    let root = open_root(path).unwrap().keeping(times);
    let (state, _) = scan_as_sent(&root, &FleetKey(FLEET), BlockSize::for_volume(0)).unwrap();
    let entries = state.iter().collect();
    (state, entries)
}

#[test]
fn times_that_the_target_cannot_keep_are_named_and_everything_agrees_with_what_its_disk_has() {
    let file_systems: [(&[&str], bool); 5] = [
        (&["mkfs.ext4", "-q", "-I", "128"], true),
        (&["mkfs.ext4", "-q", "-I", "256"], false),
        (&["mkfs.xfs", "-q", "-m", "bigtime=0"], false),
        (&["mkfs.xfs", "-q"], false),
        (&["mkfs.btrfs", "-q"], false),
    ];
    for (mkfs, whole_seconds) in file_systems {
        let bench = Bench::new(EngineChoice::Auto);
        // One that keeps them all.
        if !tool("mount", &["-t", "tmpfs", "tmpfs"], &[&bench.source]) {
            println!("no tmpfs can be mounted here: not tested");
            return;
        }
        let _source = Disk {
            dir: bench.source.clone(),
        };
        all_times(&bench);
        fs::create_dir(bench.source.join("many")).unwrap();
        for n in 0..300 {
            fs::write(bench.source.join(format!("many/{n}")), noise(n, 10)).unwrap();
        }
        std::os::unix::fs::symlink("many", bench.source.join("link")).unwrap();
        fs::write(bench.source.join("large"), noise(1, 3 << 20)).unwrap();
        let Some(disk) = Disk::new(&bench, 400, mkfs) else {
            continue;
        };
        let times = kept_in(&disk.dir).unwrap();
        println!("{mkfs:?} {times:?}");
        let left = fs::read_dir(&disk.dir).unwrap().map(Result::unwrap);
        let left: Vec<_> = left.map(|one| one.file_name()).collect();
        assert!(left.iter().all(|name| name == "lost+found"), "{left:?}");

        let copy = disk.dir.join("copy");
        bench.admit_target(&copy);
        let mut sender = bench
            .sender(bench.path(Way::Direct))
            .keeping(BTreeMap::from([(VolumeId(1), times)]));
        let (state, report) = bench.send(&mut sender, 1, None).unwrap();
        let told: Vec<String> = report.skipped.iter().map(ToString::to_string).collect();
        println!("{told:#?}");
        assert!(told.len() <= 3, "{told:#?}");
        let names = |word: &str| told.iter().find(|line| line.contains(word));
        assert_eq!(names("cut to whole 1s").is_some(), whole_seconds);
        if whole_seconds {
            // Every file that was just made, and a few more.
            assert!(names(" more: ").is_some(), "{told:#?}");
            let late = names("becomes 2038-01-19 03:14:07 UTC, the latest").unwrap();
            for name in ["year-2040", "year-2040-fine", "year-2500"] {
                assert!(late.contains(name), "{late}");
            }
        }
        let keeps_1880 = times.earliest == i64::MIN;
        assert_eq!(
            names("s before 1970, the earliest").is_some_and(|line| line.contains("year-1880")),
            !keeps_1880,
            "{told:#?}"
        );

        // What the disk has is what was said, to whoever reads it anew, there and here.
        let key = FleetKey(FLEET);
        let (there, _) = scan(&copy, &key, BlockSize::for_volume(0)).unwrap();
        let (here, entries) = tree(&bench.source, times);
        for (here, there) in entries.iter().zip(there.iter()) {
            assert!(here.same(&there), "{here:?}\ndiffers from\n{there:?}");
        }
        assert_eq!((there.root, here.root), (state.root, state.root));

        // A second epoch is one of changes alone, and tells the same.
        fs::write(bench.source.join("new"), b"new").unwrap();
        let (state, second) = bench.send(&mut sender, 2, Some(&state)).unwrap();
        assert!(second.changed_entries < 5, "{second:?}");
        assert_eq!(second.skipped.len(), report.skipped.len());

        // So is one of a target that was started anew and only has its disk.
        bench.server.dismiss(&bench.plan);
        bench.admit_target(&copy);
        let (_, third) = bench.send(&mut sender, 3, Some(&state)).unwrap();
        assert_eq!(
            (third.blocks_sent, third.changeset),
            (0, Bytes(0)),
            "{third:?}"
        );
    }
}

/// A bench whose source lies on XFS, which keeps more attributes of a file than others.
fn from_xfs() -> Option<(Disk, Bench)> {
    let bench = Bench::new(EngineChoice::Auto);
    let disk = Disk::new(&bench, 400, &["mkfs.xfs", "-q"])?;
    let source = disk.dir.join("source");
    fs::create_dir(&source).unwrap();
    Some((disk, Bench { source, ..bench }))
}

#[test]
fn more_attributes_than_the_target_keeps_of_a_file_are_named_with_what_helps() {
    let Some((_source, bench)) = from_xfs() else {
        return;
    };
    let file = bench.source.join("file");
    fs::write(&file, b"x").unwrap();
    xattr::set(&file, "user.large", &noise(1, 40_000)).unwrap();
    let file_systems: [&[&str]; 2] = [&["mkfs.ext4", "-q"], &["mkfs.btrfs", "-q"]];
    for mkfs in file_systems {
        let other = Bench::new(EngineChoice::Auto);
        let Some(disk) = Disk::new(&other, 200, mkfs) else {
            continue;
        };
        let error = refusal(&bench, &disk.dir.join("copy"));
        assert!(
            error.contains("set the attribute user.large of `file`")
                && error.contains("for one file")
                && !error.contains("no space left"),
            "{error}"
        );
    }
}

#[test]
fn attributes_that_are_too_many_to_travel_are_a_named_loss_and_the_rest_arrives() {
    let Some((_source, bench)) = from_xfs() else {
        return;
    };
    fs::create_dir(bench.source.join("dir")).unwrap();
    for name in ["dir", "large", "small"] {
        let path = bench.source.join(name);
        if name != "dir" {
            fs::write(&path, noise(3, if name == "large" { 3 << 20 } else { 10 })).unwrap();
        }
        for n in 0..10 {
            let length = if n == 0 { 100 } else { 60_000 };
            xattr::set(&path, format!("user.{n}"), &noise(n, length)).unwrap();
        }
    }
    fs::write(bench.source.join("dir/inner"), b"inner").unwrap();
    let mut sender = bench.sender(bench.path(Way::Direct));
    let (state, report) = bench.send(&mut sender, 1, None).unwrap();
    let lost: Vec<String> = report.unreadable.iter().map(ToString::to_string).collect();
    println!("{lost:#?}");
    assert_eq!(lost.len(), 3, "{lost:#?}");
    for name in ["dir", "large", "small"] {
        let named = |line: &String| line.contains(name) && line.contains("more than 512 KiB");
        assert!(lost.iter().any(named), "{name}: {lost:#?}");
        let copied = bench.target.join(name);
        assert_eq!(xattr::list(&copied).unwrap().count(), 0);
        if name != "dir" {
            assert_eq!(
                fs::read(copied).unwrap(),
                fs::read(bench.source.join(name)).unwrap()
            );
        }
    }
    assert_eq!(fs::read(bench.target.join("dir/inner")).unwrap(), b"inner");
    // As a proof reads it.
    let (kept, _) = tree(&bench.source, TimesKept::default());
    assert_eq!((kept.root, kept.unreadable.len()), (state.root, 3));
    // Once some are gone, they come.
    for n in 1..10 {
        xattr::remove(bench.source.join("small"), format!("user.{n}")).unwrap();
    }
    let (_, report) = bench.send(&mut sender, 2, Some(&state)).unwrap();
    assert_eq!(report.unreadable.len(), 2);
    let there = xattr::get(bench.target.join("small"), "user.0").unwrap();
    assert_eq!(there, Some(noise(0, 100)));
}
