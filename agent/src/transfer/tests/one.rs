//! Volumes of one piece: files, disk images and block devices.

use super::disks::tool;
use super::pages::Everywhere;
use super::*;
use crate::model::volume::ChangesBy;
use crate::transfer::sender::EpochReport;
use crate::volume::Confined;
use std::os::unix::fs::MetadataExt;

/// A loop device over a file; detached when dropped.
pub(super) struct Loop {
    pub(super) device: PathBuf,
}

impl Loop {
    /// None, and said, where there are no loop devices.
    pub(super) fn over(file: &Path) -> Option<Self> {
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file)
            .output();
        let name = match output {
            Ok(output) if output.status.success() => output.stdout,
            other => {
                println!("not run: loop devices do not work here: {other:?}");
                return None;
            }
        };
        let device = PathBuf::from(String::from_utf8_lossy(&name).trim());
        Some(Self { device })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.device).status();
    }
}

/// A file of `mib` MiB of which the blocks at even MiB are noise and the others a hole.
pub(super) fn image(path: &Path, mib: u64) -> fs::File {
    let file = fs::File::options()
        .create_new(true)
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    file.set_len(mib << 20).unwrap();
    for at in (0..mib).step_by(2) {
        file.write_all_at(&noise(at, 1 << 20), at << 20).unwrap();
    }
    file
}

impl Bench {
    pub(super) fn send_one(
        &self,
        sender: &mut Sender,
        from: &Path,
        epoch: u64,
        previous: Option<&TreeState>,
    ) -> (TreeState, EpochReport) {
        let volume = VolumeSpec {
            source_path: from.to_owned(),
            ..self.volume()
        };
        sender
            .send_epoch(&volume, Epoch(epoch), false, previous, &Arc::default())
            .unwrap()
    }
}

#[test]
fn a_single_file_of_any_size_arrives_with_its_metadata_and_leaves_its_neighbours_alone() {
    for (way, engine) in every() {
        for size in [0, 65_537, (1 << 20) + 1] {
            let bench = Bench::new(engine);
            let (from, to) = (bench.source.join("one.conf"), bench.target.join("one.conf"));
            fs::write(&from, noise(7, size)).unwrap();
            fs::set_permissions(&from, fs::Permissions::from_mode(0o640)).unwrap();
            fs::create_dir(&bench.target).unwrap();
            fs::write(bench.target.join("neighbour"), b"stays").unwrap();
            bench.admit(&to, true);
            let mut sender = bench.sender(bench.path(way));
            let (state, _) = bench.send_one(&mut sender, &from, 1, None);
            assert_eq!(fs::read(&to).unwrap(), noise(7, size), "{way:?}");
            // Shorter, longer, and gone through an agent that knows nothing of it.
            fs::write(&from, noise(8, size / 2 + 3)).unwrap();
            let (state, _) = bench.send_one(&mut sender, &from, 2, Some(&state));
            bench.admit(&to, true);
            let (again, report) = bench.send_one(&mut sender, &from, 3, None);
            assert_eq!((again.root, report.blocks_sent), (state.root, 0), "{way:?}");
            assert_eq!(fs::read(&to).unwrap(), fs::read(&from).unwrap());
            let mode = fs::metadata(&to).unwrap().permissions().mode();
            assert_eq!(mode & 0o7777, 0o640);
            let neighbour = bench.target.join("neighbour");
            assert_eq!(fs::read(neighbour).unwrap(), b"stays");
            assert_eq!(fs::read_dir(&bench.target).unwrap().count(), 2);
        }
    }
}

#[test]
fn a_block_device_arrives_as_an_image_and_then_only_what_changed_travels() {
    for (way, engine) in every() {
        let bench = Bench::new(engine);
        let below = image(&bench.source.join("disk"), 9);
        let Some(disk) = Loop::over(&bench.source.join("disk")) else {
            return;
        };
        let to = bench.target.join("images/disk.img");
        bench.admit(&to, true);
        let mut sender = bench.sender(bench.path(way));
        let (state, report) = bench.send_one(&mut sender, &disk.device, 1, None);
        assert_eq!(report.changeset, Bytes(5 << 20), "holes do not travel");
        assert_eq!(fs::read(&to).unwrap(), noise_of(&below));
        let writes = fs::File::options().write(true).open(&disk.device).unwrap();
        writes.write_all_at(b"news", (2 << 20) + 5).unwrap();
        writes.write_all_at(&[0; 65_536], 4 << 20).unwrap();
        writes.sync_all().unwrap();
        let (state, report) = bench.send_one(&mut sender, &disk.device, 2, Some(&state));
        assert_eq!((report.blocks_sent, report.zero_blocks), (1, 1));
        assert_eq!(fs::read(&to).unwrap(), noise_of(&below));
        // A target that was started anew finds what it has.
        bench.admit(&to, true);
        let (again, report) = bench.send_one(&mut sender, &disk.device, 3, None);
        assert_eq!((again.root, report.blocks_sent), (state.root, 0));
    }
}

fn noise_of(file: &fs::File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn a_block_device_is_written_over_what_its_counterpart_held_and_nothing_past_its_end() {
    for (way, engine) in every() {
        let bench = Bench::new(engine);
        let below = image(&bench.source.join("disk"), 9);
        let there = bench.source.join("there");
        fs::write(&there, noise(99, 11 << 20)).unwrap();
        let (Some(disk), Some(counterpart)) =
            (Loop::over(&bench.source.join("disk")), Loop::over(&there))
        else {
            return;
        };
        bench.admit(&counterpart.device, true);
        let mut sender = bench.sender(bench.path(way));
        bench.send_one(&mut sender, &disk.device, 1, None);
        let arrived = fs::read(&counterpart.device).unwrap();
        assert_eq!(arrived[..9 << 20], noise_of(&below), "{way:?}");
        assert_eq!(arrived[9 << 20..], noise(99, 11 << 20)[9 << 20..]);
        let claimed = fs::File::options().write(true).open(&counterpart.device);
        assert!(claimed.is_ok(), "the device is given back");
    }
}

/// A loop device over a file that was cut off fails past the file's end, like a disk with bad sectors.
#[test]
fn what_a_disk_does_not_give_up_is_read_last_named_to_4_kib_and_read_again_in_the_next_epoch() {
    for (way, engine) in every() {
        let bench = Bench::new(engine);
        let below = image(&bench.source.join("disk"), 9);
        let whole = noise_of(&below);
        let Some(disk) = Loop::over(&bench.source.join("disk")) else {
            return;
        };
        let cut = (6 << 20) + 12_288;
        below.set_len(cut).unwrap();
        let to = bench.target.join("disk.img");
        bench.admit(&to, true);
        let mut sender = bench.sender(bench.path(way));
        let (state, report) = bench.send_one(&mut sender, &disk.device, 1, None);
        let ranges = |all: &[crate::volume::Unreadable]| -> (u64, u64) {
            assert!(all.iter().all(|lost| lost.path == "content"));
            let joined = all.windows(2);
            assert!(
                joined
                    .into_iter()
                    .all(|w| w[0].offset + w[0].length == w[1].offset)
            );
            let last = all.last().unwrap();
            (all[0].offset, last.offset + last.length)
        };
        assert_eq!(ranges(&report.unreadable), (cut, 9 << 20), "{way:?}");
        let mut expected = whole.clone();
        expected[cut as usize..].fill(0);
        assert_eq!(fs::read(&to).unwrap(), expected);
        // The same from what is kept, as a proof reads it.
        let size = state.block_size;
        let (kept, _) = crate::volume::scan(&disk.device, &FleetKey(FLEET), size).unwrap();
        assert_eq!(kept.root, state.root);

        below.write_all_at(&whole[cut as usize..], cut).unwrap();
        below.set_len(9 << 20).unwrap();
        let (state, report) = bench.send_one(&mut sender, &disk.device, 2, Some(&state));
        assert_eq!(report.unreadable, []);
        assert_eq!(fs::read(&to).unwrap(), whole);

        // What is gone now stays on the target as it came, with the rest of its block.
        below.write_all_at(&[1; 4096], 4 << 20).unwrap();
        below.write_all_at(&[1; 4096], 6 << 20).unwrap();
        below.set_len(cut).unwrap();
        let (state, report) = bench.send_one(&mut sender, &disk.device, 3, Some(&state));
        assert_eq!(ranges(&report.unreadable), (cut, 9 << 20), "{way:?}");
        assert!(report.unreadable.iter().all(|lost| lost.kept));
        let mut expected = whole.clone();
        expected[4 << 20..][..4096].fill(1);
        assert!(fs::read(&to).unwrap() == expected, "{way:?}");
        assert_eq!((report.root, state.root), (report.target_root, report.root));
    }
}

/// A file system on a device, or none; mounted as long as it lives.
struct Mounted(Option<PathBuf>);

impl Mounted {
    fn new(disk: &Loop, make: &[&str], at: &Path) -> Self {
        let Some((program, arguments)) = make.split_first() else {
            return Self(None);
        };
        fs::create_dir(at).unwrap();
        let made = Command::new(program)
            .args(arguments)
            .arg(&disk.device)
            .status();
        assert!(made.unwrap().success());
        let mounted = Command::new("mount").arg(&disk.device).arg(at).status();
        assert!(mounted.unwrap().success());
        Self(Some(at.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Some(at) = &self.0 {
            let _ = Command::new("umount").arg(at).status();
        }
    }
}

/// Epoch after epoch during a storm, each reading only what the kernel noted; then the last, when all is calm.
fn follow_a_storm(make: &[&str]) {
    use crate::telemetry::dirty::Watch;
    let bench = Bench::new(EngineChoice::Auto);
    let below = image(&bench.source.join("disk"), 320);
    let Some(disk) = Loop::over(&bench.source.join("disk")) else {
        return;
    };
    let mounted = Mounted::new(&disk, make, &bench.source.join("mounted"));
    let mut watch = match Watch::start(Path::new("/"), &disk.device) {
        Ok(watch) => watch,
        Err(error) => return println!("not run: {error}"),
    };
    let to = bench.target.join("disk.img");
    bench.admit(&to, true);
    let mut sender = bench.sender(bench.path(Way::Direct));
    let (mut state, _) = bench.send_one(&mut sender, &disk.device, 1, None);
    let target = match &mounted.0 {
        Some(at) => vec!["--directory", at.to_str().unwrap(), "--fsync=32"],
        None => vec!["--filename", disk.device.to_str().unwrap(), "--direct=1"],
    };
    let mut storm = Command::new("fio")
        .args([
            "--name=storm",
            "--bsrange=4k-256k",
            "--ioengine=psync",
            "--rw=randwrite",
        ])
        .args([
            "--size=64m",
            "--time_based",
            "--runtime=2",
            "--rate=30m",
            "--minimal",
        ])
        .args(target)
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("fio");
    let (mut epoch, mut least) = (1, u64::MAX);
    let mut send = |state: &mut TreeState| {
        fs::File::open(&disk.device).unwrap().sync_all().unwrap();
        let changes = watch.swap();
        let calm = changes.ranges.is_empty();
        state.changed = Some(changes.ranges);
        epoch += 1;
        let (next, report) = bench.send_one(&mut sender, &disk.device, epoch, Some(state));
        if report.blocks_sent > 0 {
            least = least.min(report.bytes_read.0);
        }
        *state = next;
        calm
    };
    while storm.try_wait().unwrap().is_none() {
        send(&mut state);
    }
    drop(mounted);
    let end = Instant::now() + Duration::from_secs(60);
    while !send(&mut state) {
        assert!(Instant::now() < end, "it never fell calm");
        std::thread::sleep(Duration::from_millis(100));
    }
    // What was used for a while and is free now stays behind, and nothing else.
    let (was, is) = (noise_of(&below), fs::read(&to).unwrap());
    assert_eq!(was.len(), is.len());
    let size = state.block_size.bytes() as usize;
    for (block, (was, is)) in was.chunks(size).zip(is.chunks(size)).enumerate() {
        let free = || {
            let map = state.unused.as_ref();
            map.is_some_and(|map| map.has(block as u64)) && is.iter().all(|byte| *byte == 0)
        };
        assert!(was == is || free(), "a change of block {block} was missed");
    }
    assert!(
        least < 160 << 20,
        "an epoch read {least} bytes at least, the device has 320 MiB"
    );
}

#[test]
fn epochs_by_dirty_extents_miss_nothing_of_a_storm_on_the_raw_device() {
    follow_a_storm(&[]);
}

#[test]
fn epochs_by_dirty_extents_miss_nothing_of_a_storm_on_ext4() {
    follow_a_storm(&["mkfs.ext4", "-q", "-F"]);
}

#[test]
fn epochs_by_dirty_extents_miss_nothing_of_a_storm_on_xfs() {
    follow_a_storm(&["mkfs.xfs", "-q", "-f"]);
}

#[test]
fn an_image_made_anew_and_smaller_is_sent_up_to_its_end() {
    let bench = Bench::new(EngineChoice::Auto);
    let (from, to) = (bench.source.join("disk.img"), bench.target.join("disk.img"));
    fs::create_dir(&bench.target).unwrap();
    let image = fs::File::create_new(&from).unwrap();
    image.set_len(256 << 20).unwrap();
    if !tool("mkfs.ext4", &["-q", "-F"], &[&from]) {
        println!("mkfs.ext4 does not run here: not tested");
        return;
    }
    bench.admit(&to, true);
    let volume = VolumeSpec {
        source_path: from.clone(),
        changes: ChangesBy::WrittenExtents,
        ..bench.volume()
    };
    let mut sender = bench.sender(bench.path(Way::Direct));
    let mut send = |epoch, previous: Option<&TreeState>| {
        let sent = sender.send_epoch(&volume, Epoch(epoch), false, previous, &Arc::default());
        sent.unwrap().0
    };
    let mut state = send(1, None);
    assert!(state.unused.is_some(), "its file system was not understood");
    state.written = Some(Arc::new(Everywhere(fs::metadata(&from).unwrap().dev())));
    image.set_len(0).unwrap();
    image.write_all_at(&noise(1, 5 << 20), 0).unwrap();
    let state = send(2, Some(&state));
    assert!(
        state.unused.is_none(),
        "nobody can tell any more what is unused"
    );
    assert_eq!(fs::read(&from).unwrap(), fs::read(&to).unwrap());
}

#[test]
fn the_counterpart_of_a_device_may_be_larger_than_what_came_to_it() {
    let bench = Bench::new(EngineChoice::Auto);
    let (from, to) = (bench.source.join("disk"), bench.source.join("larger"));
    let larger = image(&from, 8);
    fs::write(&to, noise(7, 9 << 20)).unwrap();
    let (Some(source), Some(target)) = (Loop::over(&from), Loop::over(&to)) else {
        return;
    };
    drop(larger);
    bench.admit(&target.device, true);
    let mut sender = bench.sender(bench.path(Way::Direct));
    let (state, _) = bench.send_one(&mut sender, &source.device, 1, None);
    let root_of = |root: Confined| {
        let scanned = crate::volume::scan_root(&root, &FleetKey(FLEET), state.block_size);
        scanned.unwrap().0.root
    };
    let open = || crate::volume::walk::open_root(&target.device).unwrap();
    assert_ne!(root_of(open()), state.root);
    assert_eq!(root_of(open().holding(8 << 20)), state.root);
}
