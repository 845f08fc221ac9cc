//! Real file systems that cannot take everything: each refusal names the path and what helps.

use super::*;
use crate::model::units::UnixMillis;
use crate::volume::Unreadable;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::time::{SystemTime, UNIX_EPOCH};

/// A file system of its own on a loop device, if root may make one.
pub(super) struct Disk {
    pub(super) dir: PathBuf,
}

impl Disk {
    /// `None`, and said, where `mkfs` or its kind of file system is not to be had.
    pub(super) fn new(bench: &Bench, mib: u64, mkfs: &[&str]) -> Option<Self> {
        let base = bench.source.parent().unwrap();
        let image = base.join("disk.img");
        let dir = base.join("disk");
        fs::File::create(&image)
            .unwrap()
            .set_len(mib << 20)
            .unwrap();
        fs::create_dir(&dir).unwrap();
        let made = Command::new(mkfs[0]).args(&mkfs[1..]).arg(&image).output();
        let mounted = made.is_ok_and(|made| made.status.success())
            && tool("mount", &["-o", "loop"], &[&image, &dir]);
        if !mounted {
            println!("{mkfs:?} cannot be made or mounted here: not tested");
            return None;
        }
        Some(Self { dir })
    }

    /// Unmounts at once, so that the image can be changed.
    pub(super) fn unmount(self) {
        assert!(tool("umount", &[], &[&self.dir]));
    }

    pub(super) fn remount(&self, option: &str) {
        let option = format!("remount,{option}");
        assert!(tool("mount", &["-o", &option], &[&self.dir]));
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Also when the test failed with a file system that takes nothing any more.
        let _ = nix::mount::umount2(&self.dir, nix::mount::MntFlags::MNT_DETACH);
    }
}

pub(super) fn tool(program: &str, words: &[&str], paths: &[&Path]) -> bool {
    let done = Command::new(program).args(words).args(paths).status();
    done.is_ok_and(|status| status.success())
}

/// The error of sending everything to `destination`.
pub(super) fn refusal(bench: &Bench, destination: &Path) -> String {
    bench.admit_target(destination);
    let mut sender = bench.sender(bench.path(Way::Direct));
    let error = bench.send(&mut sender, 1, None).unwrap_err().to_string();
    assert!(error.contains("volume data"), "{error}");
    println!("{error}");
    error
}

#[test]
fn a_disk_without_inodes_or_space_says_which_of_them_is_missing() {
    let bench = Bench::new(EngineChoice::Auto);
    let Some(disk) = Disk::new(&bench, 32, &["mkfs.ext4", "-q", "-N", "32"]) else {
        return;
    };
    for n in 0..100 {
        fs::write(bench.source.join(format!("f{n}")), noise(n, 100)).unwrap();
    }
    let error = refusal(&bench, &disk.dir.join("a"));
    assert!(error.contains("no inodes left on the target"), "{error}");
    fs::remove_dir_all(disk.dir.join("a")).unwrap();
    for n in 0..100 {
        fs::remove_file(bench.source.join(format!("f{n}"))).unwrap();
    }
    fs::write(bench.source.join("big"), noise(1, 48 << 20)).unwrap();
    let error = refusal(&bench, &disk.dir.join("b"));
    assert!(
        error.contains("`big`") && error.contains("no space left on the target (48.0 MiB needed"),
        "{error}"
    );
}

#[test]
fn a_quota_that_is_used_up_is_named_and_the_plan_goes_on_when_it_is_raised() {
    let bench = Bench::new(EngineChoice::Auto);
    let Some(disk) = Disk::new(&bench, 200, &["mkfs.btrfs", "-q"]) else {
        return;
    };
    let btrfs = |words: &[&str]| assert!(tool("btrfs", words, &[&disk.dir]), "{words:?}");
    btrfs(&["quota", "enable"]);
    btrfs(&["qgroup", "limit", "8M"]);
    fs::create_dir(bench.source.join("dir")).unwrap();
    for n in 0..24 {
        fs::write(
            bench.source.join(format!("dir/f{n}")),
            noise(n, (n as usize % 2 * 4 + 1) << 18),
        )
        .unwrap();
    }
    let copy = disk.dir.join("copy");
    let error = refusal(&bench, &copy);
    assert!(
        error.contains("`dir/f") && error.contains("disk quota is used up"),
        "{error}"
    );
    btrfs(&["qgroup", "limit", "none"]);
    let mut sender = bench.sender(bench.path(Way::Direct));
    bench.send(&mut sender, 1, None).unwrap();
    assert_same_tree(&bench.source, &copy);
}

#[test]
fn a_source_whose_file_system_reads_through_its_cache_alone_is_read_all_the_same() {
    let bench = Bench::new(EngineChoice::Auto);
    if !tool("mount", &["-t", "tmpfs", "tmpfs"], &[&bench.source]) {
        println!("no tmpfs can be mounted here: not tested");
        return;
    }
    let _mounted = Disk {
        dir: bench.source.clone(),
    };
    fs::write(bench.source.join("large"), noise(1, 24 << 20)).unwrap();
    fs::write(bench.source.join("small"), noise(2, 70_000)).unwrap();
    bench.admit_target(&bench.target);
    let mut sender = bench.sender(bench.path(Way::Direct));
    bench.send(&mut sender, 1, None).unwrap();
    assert_same_tree(&bench.source, &bench.target);
}

#[test]
fn a_file_that_not_even_root_may_read_is_named_and_not_left_out() {
    let bench = Bench::new(EngineChoice::Auto);
    fs::create_dir(bench.source.join("dir")).unwrap();
    let secret = bench.source.join("dir/secret");
    fs::write(&secret, b"x").unwrap();
    // Only to be written, says the kernel, whoever asks.
    let bound = tool(
        "mount",
        &["--bind", "/sys/bus/cpu/drivers_probe"],
        &[&secret],
    );
    if !bound || fs::File::open(&secret).is_ok() {
        println!("no file can be kept from root here: not tested");
        return;
    }
    let mounted = Disk { dir: secret };
    let error = refusal(&bench, &bench.target);
    assert!(
        error.contains("`dir/secret`") && error.contains("take it out of the volume"),
        "{error}"
    );
    drop(mounted);
    let mut sender = bench.sender(bench.path(Way::Direct));
    bench.send(&mut sender, 1, None).unwrap();
    assert_same_tree(&bench.source, &bench.target);
}

#[test]
fn a_store_through_a_mapping_is_seen_also_where_another_file_system_is_mounted_in_the_tree() {
    for disk in ["ext4", "tmpfs"] {
        let bench = Bench::new(EngineChoice::Threads);
        let nested = bench.source.join("nested");
        fs::create_dir(&nested).unwrap();
        let _disk = match disk {
            "tmpfs" => None,
            _ => match Disk::new(&bench, 64, &["mkfs.ext4", "-q"]) {
                Some(disk) => Some(disk),
                None => continue,
            },
        };
        let mounted = match &_disk {
            Some(disk) => tool("mount", &["--bind"], &[&disk.dir, &nested]),
            None => tool("mount", &["-t", "tmpfs", "tmpfs"], &[&nested]),
        };
        if !mounted {
            println!("{disk} cannot be mounted here: not tested");
            continue;
        }
        let _mounted = Disk { dir: nested };
        paths::stores_through_a_mapping_are_seen(&bench, "nested/mapped");
    }
}

#[test]
fn a_tree_leaves_a_file_system_that_went_read_only_after_an_error() {
    let mut bench = Bench::new(EngineChoice::Auto);
    let Some(disk) = Disk::new(&bench, 64, &["mkfs.ext4", "-q", "-e", "remount-ro"]) else {
        return;
    };
    bench.source = disk.dir.join("tree");
    fs::create_dir(&bench.source).unwrap();
    fs::write(bench.source.join("small"), noise(1, 30_000)).unwrap();
    fs::write(bench.source.join("large"), noise(2, 3 << 20)).unwrap();
    let mut sender = bench.sender(bench.path(Way::Direct));
    let (first, _) = bench.send(&mut sender, 1, None).unwrap();
    fs::write(bench.source.join("durable"), noise(3, 30_000)).unwrap();
    nix::unistd::syncfs(fs::File::open(&disk.dir).unwrap()).unwrap();
    // These never reach the disk: they are in the page cache alone.
    fs::write(bench.source.join("small-in-memory"), noise(4, 30_000)).unwrap();
    fs::write(bench.source.join("large-in-memory"), noise(5, 3 << 20)).unwrap();
    let device = std::os::unix::fs::MetadataExt::dev(&fs::metadata(&disk.dir).unwrap());
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    let block = fs::read_link(format!("/sys/dev/block/{major}:{minor}")).unwrap();
    let trigger = Path::new("/sys/fs/ext4")
        .join(block.file_name().unwrap())
        .join("trigger_fs_error");
    fs::write(trigger, "a test").unwrap();
    assert!(fs::write(bench.source.join("late"), b"x").is_err());
    paths::settle();
    let (second, report) = bench.send(&mut sender, 2, Some(&first)).unwrap();
    assert_eq!(report.root, report.target_root);
    bench.assert_equal();
    let (_, report) = bench.send(&mut sender, 3, Some(&second)).unwrap();
    assert_eq!(
        report.bytes_read,
        Bytes(0),
        "nothing changes there any more"
    );
}

/// Where the data of a file begins in its file system's device, in bytes.
pub(super) fn place(file: &Path) -> u64 {
    let listed = Command::new("filefrag")
        .args(["-v", "-b4096"])
        .arg(file)
        .output();
    let listed = String::from_utf8(listed.unwrap().stdout).unwrap();
    let first = listed
        .lines()
        .find(|line| line.trim().starts_with("0:"))
        .expect(&listed);
    let physical = first.split(':').nth(2).unwrap().split("..").next().unwrap();
    physical.trim().parse::<u64>().unwrap() * 4096
}

#[test]
fn what_the_disk_gave_up_once_stays_on_the_target_when_it_is_gone_later() {
    let mut bench = Bench::new(EngineChoice::Auto);
    let mkfs = ["mkfs.ext4", "-q", "-b", "4096", "-O", "^has_journal"];
    let Some(disk) = Disk::new(&bench, 64, &mkfs) else {
        return;
    };
    bench.source = disk.dir.join("tree");
    fs::create_dir(&bench.source).unwrap();
    let files = [("small", 200_000), ("large", 3 << 20)].map(|(name, size)| {
        let path = bench.source.join(name);
        fs::write(&path, noise(size, size as usize)).unwrap();
        (name, path, fs::read(bench.source.join(name)).unwrap())
    });
    bench.admit_target(&bench.target);
    let mut sender = bench.sender(bench.path(Way::Direct));
    let (mut state, _) = bench.send(&mut sender, 1, None).unwrap();
    for (_, path, _) in &files {
        let file = fs::File::options().write(true).open(path).unwrap();
        file.write_all_at(b"new", 0).unwrap();
        file.sync_all().unwrap();
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
    }
    let image = disk.dir.with_file_name("disk.img");
    let [small, large] = files.each_ref().map(|(_, path, _)| place(path));
    // Behind the first block of whichever lies first.
    let cut = small.min(large) + 70_000_u64.next_multiple_of(4096);
    fs::File::options()
        .write(true)
        .open(image)
        .unwrap()
        .set_len(cut)
        .unwrap();
    for epoch in 2..4 {
        let (next, report) = bench.send(&mut sender, epoch, Some(&state)).unwrap();
        state = next;
        assert_eq!(report.root, report.target_root);
        for (name, _, old) in &files {
            let lost = report.unreadable.iter().filter(|lost| lost.path == *name);
            assert!(lost.clone().all(|lost| lost.kept), "{lost:?}");
            let mut expected = old.clone();
            expected[..3].copy_from_slice(b"new");
            for lost in lost.clone() {
                let start = (lost.offset / 65_536 * 65_536) as usize;
                let end = old
                    .len()
                    .min((lost.offset + lost.length).next_multiple_of(65_536) as usize);
                expected[start..end].copy_from_slice(&old[start..end]);
            }
            assert!(lost.count() > 0, "{name} can be read");
            assert!(
                fs::read(bench.target.join(name)).unwrap() == expected,
                "{name}"
            );
        }
    }
}

/// A plan that was made a moment ago: files that are there now are older.
fn made_now() -> UnixMillis {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    UnixMillis(now.as_millis() as u64 + 1)
}

#[test]
fn what_came_before_stays_also_when_an_end_begins_anew_and_what_is_zeros_or_younger_does_not() {
    let mut bench = Bench::new(EngineChoice::Auto);
    let mkfs = ["mkfs.ext4", "-q", "-b", "4096", "-O", "^has_journal"];
    let Some(disk) = Disk::new(&bench, 64, &mkfs) else {
        return;
    };
    bench.source = disk.dir.join("tree");
    fs::create_dir(&bench.source).unwrap();
    let make = |name: &str, size| {
        let path = bench.source.join(name);
        fs::write(&path, noise(size, size as usize)).unwrap();
        fs::File::open(&path).unwrap().sync_all().unwrap();
        path
    };
    let old = [("small", 200_000), ("large", 3 << 20)].map(|(name, size)| (name, make(name, size)));
    let (over, other) = (make("over", 200_001), make("other", 200_001));
    fs::write(&over, noise(8, 200_001)).unwrap();
    let made = made_now();
    // The clock by which files are born moves on in steps.
    while SystemTime::now() < UNIX_EPOCH + Duration::from_millis(made.0 + 20) {
        std::thread::yield_now();
    }
    let young = ("young", make("young", 200_000));
    bench.admit_target(&bench.target);
    let sender = || bench.sender(bench.path(Way::Direct));
    let (state, _) = bench.send(&mut sender(), 1, None).unwrap();
    // As old as the plan, and in the place of what came under this name.
    fs::rename(other, &over).unwrap();
    nix::unistd::syncfs(fs::File::open(&bench.source).unwrap()).unwrap();

    let places = [&old[0].1, &old[1].1, &young.1, &over].map(|path| place(path));
    let image = disk.dir.with_file_name("disk.img");
    let image = fs::File::options().write(true).open(image).unwrap();
    let cut = places.into_iter().min().unwrap() + 70_000_u64.next_multiple_of(4096);
    let over = ("over", over);
    let before: Vec<(&str, Vec<u8>)> = [&old[0], &old[1], &young, &over]
        .map(|(name, path)| {
            let bytes = fs::read(path).unwrap();
            let file = fs::File::open(path).unwrap();
            posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
            (*name, bytes)
        })
        .into();
    image.set_len(cut).unwrap();
    // What is lost of a file, and whether all of that is said to be kept.
    let lost = |report: &EpochReport, name: &str| {
        assert_eq!(report.root, report.target_root);
        let mut lost = report.unreadable.iter().filter(|lost| lost.path == name);
        let first = lost.next().expect(name).kept;
        assert!(lost.all(|lost| lost.kept == first), "{name}");
        first
    };
    let is_there = |name: &str, bytes: &[u8]| fs::read(bench.target.join(name)).unwrap() == bytes;
    let [small, large, (_, born_later), (_, renamed)] = &before[..] else {
        unreachable!()
    };

    // The target begins anew, then the source, then both.
    let nothing = || BTreeMap::from([(VolumeId(1), Vec::new())]);
    let mut after = sender().after(made, nothing());
    for (epoch, previous) in [(2, Some(&state)), (3, None), (4, None)] {
        if epoch != 3 {
            bench.admit_target(&bench.target);
        }
        let (_, report) = bench.send(&mut after, epoch, previous).unwrap();
        for (name, bytes) in [small, large] {
            assert!(lost(&report, name), "{name} in epoch {epoch}");
            assert!(is_there(name, bytes), "{name} in epoch {epoch}");
        }
        // While the source lives it knows which inode came.
        if epoch == 2 {
            assert!(!lost(&report, "over"), "what another file left is kept");
            let there = fs::read(bench.target.join("over")).unwrap();
            let zero_or_own = |(at, byte): (usize, &u8)| *byte == 0 || *byte == renamed[at];
            assert!(there.iter().enumerate().all(zero_or_own));
        }
        assert_eq!(lost(&report, "young"), epoch == 2, "epoch {epoch}");
    }
    let zeroed = fs::read(bench.target.join("young")).unwrap();
    assert!(zeroed != *born_later && zeroed.ends_with(&[0; 4096]));

    // By now it is older than another plan, but zeros for want of better: the journal says so, or their signature.
    for told in [true, false] {
        let lost_before = Unreadable {
            path: "young".to_owned(),
            offset: 0,
            length: 200_000,
            entry: None,
            kept: false,
        };
        let known = if told { vec![lost_before] } else { Vec::new() };
        let mut later = sender().after(made_now(), BTreeMap::from([(VolumeId(1), known)]));
        let (_, report) = bench.send(&mut later, 5, None).unwrap();
        assert!(!lost(&report, "young") && is_there("young", &zeroed));
        assert!(lost(&report, "large") && is_there("large", &large.1));
    }

    // Who has not yet brought all of the volume once keeps nothing: what lies there may be anybody's.
    let mut first = sender().after(made_now(), BTreeMap::new());
    let (_, report) = bench.send(&mut first, 6, None).unwrap();
    assert!(!lost(&report, "large") && !is_there("large", &large.1));
}

#[test]
fn a_disk_that_became_read_only_says_so_and_goes_on_when_it_is_writable() {
    for mkfs in [&["mkfs.ext4", "-q"][..], &["mkfs.xfs", "-q"]] {
        let bench = Bench::new(EngineChoice::Auto);
        let Some(disk) = Disk::new(&bench, 320, mkfs) else {
            continue;
        };
        // No ACLs: xfs lists them once more, under a name of its own.
        fs::create_dir(bench.source.join("dir")).unwrap();
        std::os::unix::fs::symlink("dir", bench.source.join("link")).unwrap();
        fs::write(bench.source.join("dir/large"), noise(1, 3 << 20)).unwrap();
        let copy = disk.dir.join("copy");
        fs::create_dir(&copy).unwrap();
        disk.remount("ro");
        let error = refusal(&bench, &copy);
        assert!(error.contains("read-only"), "{error}");
        disk.remount("rw");
        let mut sender = bench.sender(bench.path(Way::Direct));
        bench.send(&mut sender, 1, None).unwrap();
        assert_same_tree(&bench.source, &copy);
    }
}

#[test]
fn a_file_that_may_not_be_changed_is_named() {
    let bench = Bench::new(EngineChoice::Auto);
    let Some(disk) = Disk::new(&bench, 32, &["mkfs.ext4", "-q"]) else {
        return;
    };
    fs::create_dir(bench.source.join("dir")).unwrap();
    fs::write(bench.source.join("dir/fixed"), b"new").unwrap();
    let copy = disk.dir.join("copy");
    fs::create_dir_all(copy.join("dir")).unwrap();
    fs::write(copy.join("dir/fixed"), b"old").unwrap();
    if !tool("chattr", &["+i"], &[&copy.join("dir/fixed")]) {
        println!("chattr does not run here: not tested");
        return;
    }
    let error = refusal(&bench, &copy);
    assert!(
        error.contains("`dir/fixed`") && error.contains("chattr -i") && !error.contains("as root"),
        "{error}"
    );
    assert_eq!(fs::read(copy.join("dir/fixed")).unwrap(), b"old");
    assert!(tool("chattr", &["-i"], &[&copy.join("dir/fixed")]));
    let mut sender = bench.sender(bench.path(Way::Direct));
    bench.send(&mut sender, 1, None).unwrap();
    assert_same_tree(&bench.source, &copy);
}

#[test]
fn what_the_file_system_of_the_target_cannot_hold_is_named() {
    let bench = Bench::new(EngineChoice::Auto);
    // ext4 has no room for attributes of 8 KiB beside the inode, xfs has.
    let (Some(source), attribute) = (Disk::new(&bench, 320, &["mkfs.xfs", "-q"]), vec![7; 8192])
    else {
        return;
    };
    let rich = source.dir.join("rich");
    fs::create_dir(&rich).unwrap();
    fs::write(rich.join("file"), b"x").unwrap();
    xattr::set(rich.join("file"), "user.large", &attribute).unwrap();
    let poor = bench.source.parent().unwrap().join("poor.img");
    fs::File::create(&poor).unwrap().set_len(32 << 20).unwrap();
    let dir = bench.source.parent().unwrap().join("poor");
    fs::create_dir(&dir).unwrap();
    if !tool("mkfs.ext4", &["-q"], &[&poor]) || !tool("mount", &["-o", "loop"], &[&poor, &dir]) {
        println!("no ext4 on a loop device here: not tested");
        return;
    }
    let poor = Disk { dir };
    bench.admit_target(&poor.dir.join("copy"));
    let mut sender = bench.sender(bench.path(Way::Direct));
    let mut volume = bench.volume();
    volume.source_path = rich;
    let sent = sender.send_epoch(&volume, Epoch(1), false, None, &Arc::default());
    let error = sent.unwrap_err().to_string();
    assert!(
        error.contains("user.large") && error.contains("`file`"),
        "{error}"
    );
}

#[test]
fn how_xfs_keeps_acls_is_no_attribute_of_a_tree() {
    use crate::volume::{BlockSize, scan};
    let bench = Bench::new(EngineChoice::Auto);
    let Some(disk) = Disk::new(&bench, 320, &["mkfs.xfs", "-q"]) else {
        return;
    };
    fs::write(bench.source.join("file"), b"x").unwrap();
    fs::create_dir(bench.source.join("dir")).unwrap();
    run("setfacl", &["-m", "u:65534:r", "file"], &bench.source);
    run("setfacl", &["-d", "-m", "u:65534:rx", "dir"], &bench.source);
    let root = |path: &Path| {
        let (state, _) = scan(path, &FleetKey(FLEET), BlockSize::for_volume(0)).unwrap();
        state.root
    };
    let (copy, back) = (disk.dir.join("copy"), bench.target.join("back"));
    let mut volume = bench.volume();
    for (epoch, to) in [(1, &copy), (2, &back)] {
        bench.admit_target(to);
        let mut sender = bench.sender(bench.path(Way::Direct));
        let sent = sender.send_epoch(&volume, Epoch(epoch), false, None, &Arc::default());
        let (_, report) = sent.unwrap();
        // A target that was started anew knows what arrived by such a scan alone.
        assert_eq!(root(to), report.root);
        volume.source_path = to.clone();
    }
    assert_same_tree(&bench.source, &back);
}

#[test]
fn a_name_too_long_for_the_target_is_named_and_nothing_is_left_out_in_silence() {
    let bench = Bench::new(EngineChoice::Auto);
    let long = "n".repeat(255);
    fs::write(bench.source.join(&long), b"x").unwrap();
    // A path of its own is longer there by the depth of the volume, which must not count.
    let mut deep = bench.source.parent().unwrap().to_owned();
    for _ in 0..8 {
        deep.push("d".repeat(200));
    }
    bench.admit_target(&deep);
    let mut sender = bench.sender(bench.path(Way::Direct));
    let (_, report) = bench.send(&mut sender, 1, None).unwrap();
    assert!(report.skipped.is_empty());
    assert_eq!(fs::read(deep.join(&long)).unwrap(), b"x");

    let error = crate::volume::apply::Destination::open("data", &bench.target, false)
        .unwrap()
        .failed("open", long.as_bytes(), 0, nix::errno::Errno::ENAMETOOLONG)
        .to_string();
    assert!(
        error.contains(&long) && error.contains("does not take a name or path this long"),
        "{error}"
    );
    // Longer than a record can name: a listed exception.
    let mut dir = nix::fcntl::open(
        &bench.source,
        nix::fcntl::OFlag::O_DIRECTORY,
        nix::sys::stat::Mode::empty(),
    )
    .unwrap();
    for _ in 0..20 {
        let name = "p".repeat(250);
        let mode = nix::sys::stat::Mode::S_IRWXU;
        nix::sys::stat::mkdirat(&dir, name.as_str(), mode).unwrap();
        let flags = nix::fcntl::OFlag::O_DIRECTORY;
        dir =
            nix::fcntl::openat(&dir, name.as_str(), flags, nix::sys::stat::Mode::empty()).unwrap();
    }
    let (_, report) = bench.send(&mut sender, 2, None).unwrap();
    assert_eq!(report.skipped.len(), 1, "{:?}", report.skipped);
    assert!(report.skipped[0].reason.contains("longer than"));
}

#[test]
fn device_nodes_are_made_only_where_the_operator_allowed_them() {
    use crate::volume::apply::{Destination, Parent};
    use nix::sys::stat::{Mode, SFlag, makedev, mknod};
    let bench = Bench::new(EngineChoice::Auto);
    let made = |name: &str, device| {
        mknod(
            &bench.source.join(name),
            SFlag::S_IFCHR,
            Mode::S_IRUSR,
            device,
        )
    };
    if made("zero", makedev(1, 5)).is_err() {
        eprintln!("skipped: device nodes cannot be made here");
        return;
    }
    made("whiteout", 0).unwrap();
    assert_eq!(
        crate::volume::measure(&bench.source).unwrap().device_nodes,
        1
    );
    let key = FleetKey(FLEET);
    let (state, _) =
        crate::volume::scan(&bench.source, &key, crate::volume::BlockSize::for_volume(0)).unwrap();
    let entry = |name: &[u8]| state.get(name).unwrap();
    let open = || Destination::open("data", &bench.target, false).unwrap();
    open()
        .special(&mut Parent::default(), &entry(b"whiteout"))
        .unwrap();
    let error = open()
        .special(&mut Parent::default(), &entry(b"zero"))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("`zero`") && error.contains("device_nodes: true"),
        "{error}"
    );
    assert!(!bench.target.join("zero").exists());
    open()
        .taking_devices(true)
        .special(&mut Parent::default(), &entry(b"zero"))
        .unwrap();
    assert!(bench.target.join("zero").exists());
}

#[test]
fn a_file_of_more_holes_than_can_be_counted_is_an_error_that_names_it() {
    let bench = Bench::new(EngineChoice::Auto);
    if !tool("mount", &["-t", "tmpfs", "tmpfs"], &[&bench.source]) {
        println!("no tmpfs can be mounted here: not tested");
        return;
    }
    let _disk = Disk {
        dir: bench.source.clone(),
    };
    let endless = fs::File::create(bench.source.join("endless")).unwrap();
    endless.set_len(7 << 60).unwrap();
    let said = refusal(&bench, &bench.target);
    assert!(
        said.contains("endless") && said.contains("64 TiB"),
        "{said}"
    );
}
