//! A file of a served volume as a block device, by ublk, which needs a module: in guests only.

use lifeboat::model::fleet::Role;
use lifeboat::model::ids::{PlanId, VolumeId};
use lifeboat::serve::{FrontEnd, Store, UblkDevice, UblkError};
use lifeboat::transfer::fetch::{FetchPlan, Grant};
use lifeboat::transfer::{
    DataKey, DataServer, Door, Hop, LinkKey, Options, ProvidePlan, ProvideVolume, Sealing,
    Whereabouts,
};
use lifeboat::volume::FleetKey;
use lifeboat_tests::disk::output;
use lifeboat_tests::guest::{agent, is_guest};
use nix::fcntl::OFlag;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

/// Guests are slow, and their host has other work.
const LONG: Duration = Duration::from_secs(120);

const DIRECTORY: &str = "LIFEBOAT_TEST_DIRECTORY";
const ADDRESS: &str = "LIFEBOAT_TEST_ADDRESS";

/// A volume at its source, and what becomes of it on the target.
struct Bench {
    directory: PathBuf,
    address: SocketAddr,
    server: Option<DataServer>,
}

impl Bench {
    /// None, with the reason printed, where it cannot be tested.
    fn new(name: &str) -> Option<Self> {
        if !is_guest() {
            return None;
        }
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("ublk-{name}"));
        fs::create_dir_all(directory.join("source")).expect("made");
        if let Err(error) = UblkDevice::check(&directory) {
            assert!(matches!(error, UblkError::Missing), "{error}");
            println!("not run: {error}");
            return None;
        }
        let mut bench = Self {
            directory,
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            server: None,
        };
        bench.link(true);
        Some(bench)
    }

    /// A file of the volume.
    fn source(&self, name: &str) -> PathBuf {
        self.directory.join("source").join(name)
    }

    /// Whether the source can be reached.
    fn link(&mut self, is_there: bool) {
        self.server = None;
        if !is_there {
            return;
        }
        let server = DataServer::bind(self.address, Options::default(), None).expect("bound");
        self.address = server.addr();
        server.admit_provide(
            Door::Provide(Role::Target),
            ProvidePlan {
                plan: PlanId::from("plan"),
                link_key: LinkKey([1; 32]),
                sealing: Sealing::Under(DataKey([2; 32])),
                fleet_key: FleetKey([3; 32]),
                volumes: vec![ProvideVolume {
                    id: VolumeId(1),
                    at: Whereabouts::Here {
                        path: self.directory.join("source"),
                        mirror: None,
                        times: Default::default(),
                    },
                }],
            },
        );
        self.server = Some(server);
    }

    fn device(&self, file: &str, patience: Duration) -> Device {
        let store = store(&self.directory, self.address, patience);
        let front = UblkDevice::start(&self.directory, Some(file), &store, false);
        Device {
            front: Some(front.expect("started")),
            store,
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn store(directory: &Path, addr: SocketAddr, patience: Duration) -> Arc<Store> {
    let options = Options {
        patience: Duration::from_secs(2),
        backoff: Duration::from_millis(20),
        ..Options::default()
    };
    let admit = Box::new(move || {
        Ok(Grant {
            hop: Hop {
                addr,
                link_key: LinkKey([1; 32]),
            },
            data_key: Some(DataKey([2; 32])),
        })
    });
    let (plan, fleet_key) = (PlanId::from("plan"), FleetKey([3; 32]));
    let plan = FetchPlan::of_source(plan, VolumeId(1), fleet_key, admit);
    let directory = directory.join("store");
    Store::open(&directory, "data", plan, &options, patience, false, false).expect("opened")
}

/// The device with its store; ended as the agent ends them.
struct Device {
    front: Option<UblkDevice>,
    store: Arc<Store>,
}

impl Device {
    fn path(&self) -> String {
        self.front.as_ref().expect("it is there").at()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.store.detach();
        self.front = None;
    }
}

/// Opens a device past the page cache.
fn direct(path: &str) -> File {
    let mut options = File::options();
    options.read(true).write(true);
    options.custom_flags(OFlag::O_DIRECT.bits());
    options.open(path).expect("opened")
}

fn read(file: &File, offset: usize, length: usize) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, offset as u64)?;
    Ok(bytes)
}

/// Bytes that do not repeat and need no generator of random numbers (xorshift64).
fn random(mut seed: u64, length: usize) -> Vec<u8> {
    let words = std::iter::repeat_with(|| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed.to_ne_bytes()
    });
    words.flatten().take(length).collect()
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < until, "{what}");
        sleep(Duration::from_millis(50));
    }
}

fn is_eio<T>(result: &std::io::Result<T>) -> bool {
    let error = result.as_ref().err().and_then(std::io::Error::raw_os_error);
    error == Some(nix::errno::Errno::EIO as i32)
}

/// Whether the driver knows the device of this path.
fn is_known(path: &str) -> bool {
    let name = path.replace("/dev/ublkb", "ublkc");
    Path::new("/sys/class/ublk-char").join(name).exists()
}

#[test]
fn a_device_is_written_and_read_whole_before_its_data_is_there_and_the_source_keeps_its_own() {
    const LENGTH: usize = 8 << 20;
    const BLOCK: usize = 4096;
    let Some(bench) = Bench::new("whole") else {
        return;
    };
    let plain = random(1, LENGTH);
    fs::write(bench.source("image"), &plain).expect("written");
    fs::write(bench.source("odd"), [7; 1000]).expect("written");
    let device = bench.device("image", LONG);
    for (file, why) in [(None, "2 files"), (Some("odd"), "1000"), (Some("x"), "no")] {
        let refused = UblkDevice::start(&bench.directory, file, &device.store, false);
        let refused = refused.err().expect("refused").to_string();
        assert!(refused.contains(why), "{refused}");
    }
    let (path, mut model) = (device.path(), plain.clone());
    let file = direct(&path);
    // Whole pages, a page in part, and more than a request takes; nothing of it is here.
    for (seed, offset, length) in [
        (2, 1 << 20, 8192),
        (3, 100 * 512, 512),
        (4, 2 << 20, 1 << 20),
    ] {
        let bytes = random(seed, length);
        file.write_all_at(&bytes, offset as u64).expect("written");
        model[offset..offset + length].copy_from_slice(&bytes);
    }
    for (how, offset, length) in [("-v", 4 << 20, 1 << 20), ("-z", (5 << 20) + 4096, 70 << 10)] {
        let (from, count) = (offset.to_string(), length.to_string());
        output("blkdiscard", &[how, "-o", &from, "-l", &count, &path]);
        model[offset..offset + length].fill(0);
    }
    file.sync_all().expect("synced");
    let figures = device.store.figures();
    assert!(figures.absent > (LENGTH / 2) as u64, "{figures:?}");

    // Many at a time, each elsewhere than the one before.
    let next = AtomicUsize::new(0);
    scope(|scope| {
        for _ in 0..32 {
            scope.spawn(|| {
                while let index @ 0..2048 = next.fetch_add(1, Ordering::Relaxed) {
                    let offset = index * 997 % (LENGTH / BLOCK) * BLOCK;
                    let bytes = read(&file, offset, BLOCK).expect("read");
                    assert!(bytes == model[offset..offset + BLOCK], "at {offset}");
                }
            });
        }
    });
    assert!(fs::read(&path).expect("read") == model);
    assert!(fs::read(bench.source("image")).expect("read") == plain);
    drop((file, device));
    assert!(!Path::new(&path).exists() && !is_known(&path), "it is left");
    assert!(fs::read(bench.directory.join("store/data/image")).expect("read") == model);
}

#[test]
fn a_file_system_on_a_device_is_mounted_and_written_and_sound_and_ends_with_the_device() {
    let Some(bench) = Bench::new("mounted") else {
        return;
    };
    let (content, more) = (random(5, 3 << 20), random(6, 2 << 20));
    let files = bench.directory.join("files");
    fs::create_dir(&files).expect("made");
    fs::write(files.join("kept"), &content).expect("written");
    let image = bench.source("disk.img");
    let (files, image) = (files.display().to_string(), image.display().to_string());
    output("mkfs.ext4", &["-q", "-d", &files, &image, "16m"]);

    let device = bench.device("disk.img", LONG);
    let path = device.path();
    let place = "/run/ublk";
    fs::create_dir_all(place).expect("made");
    let mount = || output("mount", &["-t", "ext4", &path, place]);
    mount();
    let (kept, new) = (format!("{place}/kept"), format!("{place}/new"));
    assert!(fs::read(&kept).expect("read") == content);
    fs::write(&new, &more).expect("written");
    output("umount", &[place]);
    output("e2fsck", &["-f", "-n", &path]);
    mount();
    assert!(fs::read(&new).expect("read") == more);
    // The file system is not asked.
    let open = File::open(&kept).expect("opened");
    drop(device);
    assert!(!Path::new(&path).exists(), "it is left");
    assert!(fs::write(&new, b"more").is_err(), "nobody is there");
    drop(open);
    output("umount", &[place]);
    wait("the last user's end", || !is_known(&path));
}

#[test]
fn what_is_read_only_is_not_written() {
    let Some(bench) = Bench::new("read-only") else {
        return;
    };
    let plain = random(7, 1 << 20);
    fs::write(bench.source("image"), &plain).expect("written");
    let store = store(&bench.directory, bench.address, LONG);
    let front = UblkDevice::start(&bench.directory, None, &store, true).expect("the only file");
    let written = File::options().write(true).open(front.at());
    let written = written.and_then(|file| file.write_all_at(&[0; 4096], 0));
    assert!(written.is_err(), "it was written to");
    assert!(fs::read(front.at()).expect("read") == plain);
    store.detach();
}

#[test]
fn without_the_source_reads_of_a_device_wait_side_by_side_then_fail_and_go_on_when_it_is_back() {
    const READS: usize = 32;
    let Some(mut bench) = Bench::new("away") else {
        return;
    };
    let plain = random(8, 8 << 20);
    fs::write(bench.source("image"), &plain).expect("written");
    let patience = Duration::from_secs(5);
    let device = bench.device("image", patience);
    let file = direct(&device.path());
    wait("the first block", || read(&file, 0, 4096).is_ok());
    let agent = agent();
    bench.link(false);
    let began = Instant::now();
    // Far from each other: what follows a read is fetched with it.
    let place = |index: usize| (index + 1) * (200 << 10) / 4096 * 4096 + (1 << 20);
    scope(|scope| {
        for index in 0..READS {
            let file = &file;
            scope.spawn(move || assert!(is_eio(&read(file, place(index), 4096))));
        }
    });
    let took = began.elapsed();
    assert!(took >= patience, "they waited");
    assert!(
        took < patience * READS as u32 / 2,
        "one after another: {took:?}"
    );
    assert!(read(&file, 0, 4096).expect("it is here") == plain[..4096]);
    let bytes = random(9, 4096);
    // The link is no disk of this host: nothing of it may make a policy find the host degraded.
    let name = device.path().replace("/dev/", "");
    let used = bench.directory.join("used");
    let seen = agent.until("the real disk", |seen| {
        // Somebody has to use it: what was written before may all have been before the agent looked.
        let written = File::create(&used).and_then(|file| {
            file.write_all_at(&bytes, 0)?;
            file.sync_all()
        });
        written.expect("written");
        !seen.values("block.iops", "vda").is_empty()
    });
    for metric in [
        "block.iops",
        "block.errors",
        "block.busy",
        "kernel.io_errors",
    ] {
        assert_eq!(seen.values(metric, &name), [0.0; 0], "{metric}");
    }
    file.write_all_at(&bytes, 7 << 20).expect("written");
    bench.link(true);
    wait("the source", || read(&file, place(1), 4096).is_ok());
    let again = read(&file, place(1), 4096).expect("read");
    assert!(again == plain[place(1)..place(1) + 4096]);
    assert!(read(&file, 7 << 20, 4096).expect("read") == bytes);
}

#[test]
fn the_device_of_a_killed_agent_fails_is_deleted_and_what_was_written_is_there_again() {
    let Some(mut bench) = Bench::new("killed") else {
        return;
    };
    let plain = random(10, 4 << 20);
    fs::write(bench.source("image"), &plain).expect("written");
    let (mut helper, path) = helped(&bench);
    let file = direct(&path);
    let bytes = random(11, 8192);
    file.write_all_at(&bytes, 1 << 20).expect("written");
    file.sync_all().expect("synced");
    bench.link(false);
    scope(|scope| {
        let waits = scope.spawn(|| read(&file, 2 << 20, 4096));
        // It is with the helper, which waits for the source.
        sleep(Duration::from_secs(1));
        helper.kill().expect("killed");
        helper.wait().expect("it ends");
        let waited = waits.join().expect("no panic");
        assert!(waited.is_err(), "nobody can have answered");
    });
    assert!(read(&file, 3 << 20, 4096).is_err(), "nobody is there");
    drop(file);
    wait("its deletion", || {
        UblkDevice::check(&bench.directory).expect("there is ublk");
        !is_known(&path) && !Path::new(&path).exists()
    });
    bench.link(true);
    let device = bench.device("image", LONG);
    let file = direct(&device.path());
    let mut model = plain;
    model[1 << 20..(1 << 20) + 8192].copy_from_slice(&bytes);
    assert!(read(&file, 0, model.len()).expect("read") == model);
}

/// An agent's process that serves the volume, and its device.
fn helped(bench: &Bench) -> (Child, String) {
    let mut child = Command::new(std::env::current_exe().expect("this binary"))
        .args(["--exact", "helper", "--nocapture"])
        .env(DIRECTORY, &bench.directory)
        .env(ADDRESS, bench.address.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .expect("this binary runs");
    let said = BufReader::new(child.stdout.take().expect("piped")).lines();
    let path = said
        .map_while(Result::ok)
        .find_map(|line| Some(line.split_once("ready: ")?.1.to_owned()));
    (child, path.expect("the helper says that it is ready"))
}

/// Not a test by itself: what a helper process does.
#[test]
fn helper() {
    let Some(directory) = std::env::var_os(DIRECTORY).map(PathBuf::from) else {
        return;
    };
    let address = std::env::var(ADDRESS).expect("an address");
    let address = address.parse().expect("an address");
    let store = store(&directory, address, LONG);
    let front = UblkDevice::start(&directory, Some("image"), &store, false).expect("started");
    println!("ready: {}", front.at());
    sleep(LONG);
}
