//! Large files of which only what was written is read again, on real file systems.

use super::one::{Loop, image};
use super::*;
use crate::model::volume::ChangesBy;
use crate::transfer::below::{Below, is_written_in_place};
use crate::volume::aligned::Aligned;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::sync::atomic::{AtomicBool, Ordering};

/// A file system on a loop device, mounted as long as it lives.
struct Mounted {
    at: PathBuf,
    _disk: Loop,
}

impl Mounted {
    fn new(bench: &Bench, mkfs: &[&str]) -> Option<Self> {
        let base = bench.source.parent().unwrap();
        let below = base.join("disk.img");
        image(&below, 2).set_len(512 << 20).unwrap();
        let disk = Loop::over(&below)?;
        let at = base.join("mounted");
        fs::create_dir(&at).unwrap();
        let device = disk.device.to_str().unwrap();
        do_(mkfs[0], &[&mkfs[1..], &[device]].concat());
        do_("mount", &[device, at.to_str().unwrap()]);
        Some(Self { at, _disk: disk })
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.at).status();
    }
}

/// Tells a thread that it is over, also when the test fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs a program, which must succeed.
fn do_(program: &str, words: &[&str]) {
    let done = Command::new(program).args(words).output().expect(program);
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{program} {words:?}: {said}");
}

/// Something that happens to one of the files.
fn happen(chance: &mut StdRng, files: &[PathBuf], spare: &Path, is_xfs: bool) {
    let name = &files[chance.random_range(0..files.len())];
    let path = name.to_str().unwrap();
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(name)
        .unwrap();
    let size = file.metadata().unwrap().len();
    let at = chance.random_range(0..size);
    let length = chance.random_range(1..200_000);
    let page = at / 4096 * 4096;
    let fallocate = |how: &str, at: u64, length: u64| {
        let words = [how, "-o", &at.to_string(), "-l", &length.to_string(), path];
        // Some lie beyond the end, or where this file system cannot do that.
        let _ = Command::new("fallocate").args(words).output();
    };
    match chance.random_range(0..16) {
        0..4 => file
            .write_all_at(&noise(chance.random(), length), at)
            .unwrap(),
        4 => {
            let direct = fs::File::options()
                .write(true)
                .custom_flags(libc::O_DIRECT)
                .open(name)
                .unwrap();
            let mut memory = Aligned::default();
            let bytes = memory.space(length.next_multiple_of(4096));
            bytes.copy_from_slice(&noise(chance.random(), bytes.len()));
            direct.write_all_at(bytes, page).unwrap();
        }
        5 => {
            let words = [
                "-c",
                &format!("mmap -rw {page} 65536"),
                "-c",
                &format!("mwrite -S {} {page} 9000", at % 256),
            ];
            if page + 65_536 <= size {
                do_("xfs_io", &[&words[..], &[path]].concat());
            }
        }
        6 => file.set_len(chance.random_range(1 << 20..8 << 20)).unwrap(),
        7 => fallocate("-p", page, length as u64),
        8 => fallocate("-z", page, length as u64),
        9 => fallocate("-c", page, 8192),
        10 => fallocate("-i", page, 8192),
        11 => fallocate("-n", size, length as u64),
        12 => {
            fs::write(spare, noise(chance.random(), 3 << 20)).unwrap();
            fs::rename(spare, name).unwrap();
        }
        13 if is_xfs => {
            let from = files[chance.random_range(0..files.len())].to_str().unwrap();
            let clone = format!("reflink {from} {page} {page} 65536");
            // Not past the end of either.
            let _ = Command::new("xfs_io").args(["-c", &clone, path]).output();
            let _ = Command::new("xfs_fsr").arg(path).output();
        }
        13 => drop(Command::new("e4defrag").arg(path).output()),
        14 => fs::rename(&files[0], spare)
            .and_then(|()| fs::rename(&files[1], &files[0]))
            .and_then(|()| fs::rename(spare, &files[1]))
            .unwrap(),
        _ => do_("chmod", &["u+x", path]),
    }
    match chance.random_range(0..4) {
        0 => file.sync_all().unwrap(),
        1 => posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap(),
        _ => {}
    }
}

fn follow(mkfs: &[&str]) {
    let mut bench = Bench::new(EngineChoice::Auto);
    let Some(mounted) = Mounted::new(&bench, mkfs) else {
        return;
    };
    let is_xfs = mkfs[0] == "mkfs.xfs";
    bench.source = mounted.at.join("tree");
    fs::create_dir(&bench.source).unwrap();
    let files: Vec<PathBuf> = (0..5).map(|n| bench.source.join(format!("f{n}"))).collect();
    for (file, n) in files.iter().zip(1..) {
        fs::write(file, noise(n, 4 << 20)).unwrap();
    }
    let device = fs::metadata(&bench.source).unwrap().dev();
    assert!(is_written_in_place(device));
    let mut below = match Below::watch(device) {
        Ok(below) => below,
        Err(error) => return println!("not run: {error}"),
    };
    bench.admit_target(&bench.target);
    let mut sender = bench.sender(bench.path(Way::Direct));
    let mut volume = bench.volume();
    volume.changes = ChangesBy::WrittenExtents;
    let seed = rand::random();
    println!("seed {seed}");
    let mut chance = StdRng::seed_from_u64(seed);
    let mut previous: Option<TreeState> = None;
    let mut epoch = Epoch(0);
    let mut send = |frozen: bool| {
        let written = below.take(volume.id, &bench.source);
        assert_eq!(written.is_some(), previous.is_some());
        if let Some(previous) = &mut previous {
            previous.written = written;
        }
        epoch = epoch.next();
        let progress = Arc::default();
        let sent = sender.send_epoch(&volume, epoch, frozen, previous.as_ref(), &progress);
        let (state, report) = sent.unwrap();
        assert_eq!(report.root, report.target_root);
        previous = Some(state);
        report
    };
    let compare = |when: u32| {
        for file in &files {
            let copy = bench.target.join(file.file_name().unwrap());
            let (is, was) = (fs::read(copy).unwrap(), fs::read(file).unwrap());
            assert!(
                is == was,
                "{} in round {when} of seed {seed}",
                file.display()
            );
        }
    };
    let mut fewest = u64::MAX;
    for round in 0..50 {
        let report = send(round % 3 == 2);
        if report.blocks_sent > 0 {
            fewest = fewest.min(report.bytes_read.0);
        }
        compare(round);
        for _ in 0..chance.random_range(1..6) {
            happen(&mut chance, &files, &mounted.at.join("spare"), is_xfs);
        }
    }
    assert!(fewest < 2 << 20, "every epoch read {fewest} bytes or more");
    // While all of it is being written to, in files and through mappings.
    for (round, engine) in ["psync", "mmap"].iter().enumerate() {
        for file in &files {
            let open = fs::File::options().write(true).open(file).unwrap();
            open.set_len(8 << 20).unwrap();
        }
        let mut storm = Command::new("fio")
            .args([
                "--name=storm",
                "--rw=randwrite",
                "--bsrange=4k-64k",
                "--fsync=64",
            ])
            .args([
                "--size=8m",
                "--time_based",
                "--runtime=2",
                "--rate=20m",
                "--minimal",
            ])
            .arg(format!("--ioengine={engine}"))
            .arg(format!(
                "--filename={}:{}",
                files[0].display(),
                files[1].display()
            ))
            .stdout(std::process::Stdio::null())
            .spawn()
            .expect("fio");
        while storm.try_wait().unwrap().is_none() {
            send(false);
        }
        send(true);
        compare(100 + round as u32);
    }
    // And while files are cut, punched, shifted and exchanged.
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                happen(&mut chance, &files, &mounted.at.join("spare"), is_xfs);
            }
        });
        let _ends = Ends(&over);
        for _ in 0..25 {
            send(false);
        }
    });
    send(true);
    compare(200);
}

#[test]
fn of_large_files_on_ext4_only_what_was_written_is_read_and_nothing_is_missed() {
    follow(&["mkfs.ext4", "-q", "-F"]);
}

#[test]
fn of_large_files_on_xfs_only_what_was_written_is_read_and_nothing_is_missed() {
    follow(&["mkfs.xfs", "-q", "-f"]);
}
