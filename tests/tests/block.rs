//! Block I/O on this kernel: real programs, real cgroups, real disks. Needs root.

use lifeboat::model::telemetry::{BlockIo, Snapshot};
use lifeboat::telemetry::{Telemetry, TelemetryConfig};
use lifeboat_tests::disk::{Disk, output};
use lifeboat_tests::scope::{Scope, container, now};
use std::fs;
use std::io::Write;
use std::os::linux::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread::sleep;
use std::time::{Duration, Instant};

const MIB: f64 = 1_048_576.0;

/// A file on a disk, removed when dropped.
struct Scratch(PathBuf);

impl Scratch {
    /// None, with the reason printed, where the directory is on no block device.
    fn new(name: &str, mib: usize) -> Option<Self> {
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let device = fs::metadata(directory).expect("it is there").st_dev();
        if device >> 8 & 0xfff == 0 {
            println!("not run: {} is on no block device", directory.display());
            return None;
        }
        let path = directory.join(format!("block-{name}-{}", std::process::id()));
        let mut file = fs::File::create(&path).expect("a file");
        file.write_all(&vec![7; mib << 20]).expect("written");
        file.sync_all().expect("synced");
        Some(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn run(program: &str, arguments: &[&str]) -> Output {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Runs a shell script in a cgroup, with `$1` the file.
fn run_in(cgroup: &Path, script: &str, file: &Path) {
    let script = format!("echo $$ > \"$0/cgroup.procs\" && {script}");
    let text = |path: &Path| path.to_str().expect("plain names").to_owned();
    run("sh", &["-c", &script, &text(cgroup), &text(file)]);
}

/// Senses, and since when their next sweep counts.
struct Watch(Telemetry, Instant);

impl Watch {
    fn new(scope: &Scope) -> Self {
        let mut senses = scope.senses();
        let start = Instant::now();
        senses.sweep(&[], now());
        Self(senses, start)
    }

    /// The snapshot, and the length of its interval in seconds.
    fn sweep(&mut self, containers: &[&str]) -> (Snapshot, f64) {
        let containers: Vec<_> = containers.iter().map(|name| container(name, 0)).collect();
        let seconds = self.1.elapsed().as_secs_f64();
        (self.0.sweep(&containers, now()), seconds)
    }
}

fn io<'a>(snapshot: &'a Snapshot, name: &str) -> &'a BlockIo {
    let mut containers = snapshot.containers.iter();
    let stats = containers.find(|stats| stats.name.as_str() == name);
    let block = stats.and_then(|stats| stats.block.as_ref());
    block.expect("the block programs run")
}

#[test]
fn what_was_read_while_the_senses_started_is_not_of_their_first_interval() {
    let (Some(scope), Some(read)) = (Scope::new("start"), Scratch::new("start", 1)) else {
        return;
    };
    let reader = scope.cgroup("reader");
    let turns = Scratch(read.0.with_extension("turns"));
    let script = "echo $$ > \"$0/cgroup.procs\" && while dd if=\"$1\" of=/dev/null bs=64k iflag=direct status=none
        do printf x >> \"$2\"; done";
    let arguments = [reader.as_path(), &read.0, &turns.0];
    let mut reads = Command::new("sh")
        .args(["-c", script])
        .args(arguments)
        .spawn()
        .expect("a shell");
    let turned = || fs::metadata(&turns.0).map_or(0.0, |turns| turns.len() as f64);
    let end = Instant::now() + Duration::from_secs(20);
    while turned() < 1.0 {
        assert!(Instant::now() < end, "nothing is read");
        sleep(Duration::from_millis(10));
    }
    let before = turned();
    let mut senses = scope.senses();
    let start = Instant::now();
    let during = turned() - before;
    // Long beside what a sweep takes, and short beside a start.
    sleep(Duration::from_millis(50));
    let seconds = start.elapsed().as_secs_f64();
    let snapshot = senses.sweep(&[container("reader", 0)], now());
    let read = io(&snapshot, "reader").reads.bytes_per_second * seconds / MIB;
    let since = turned() - before - during;
    reads.kill().expect("it runs");
    reads.wait().expect("it ends");
    assert!(
        read <= 2.0 * since + 8.0,
        "{read} MiB of {since} since the start, {during} during it"
    );
}

#[test]
fn write_back_lands_on_the_dirtier_and_direct_reads_on_the_reader() {
    let (Some(scope), Some(dirty), Some(read)) = (
        Scope::new("write-back"),
        Scratch::new("dirty", 1),
        Scratch::new("read", 8),
    ) else {
        return;
    };
    let (dirtier, reader) = (scope.cgroup("dirtier"), scope.cgroup("reader"));
    let mut watch = Watch::new(&scope);
    // Where the kernel charges write-back, a file belongs to whom it was first dirtied by.
    fs::remove_file(&dirty.0).expect("it is there");
    // None of it reaches the disk in the dirtier's own context: kernel threads write it back.
    run_in(
        &dirtier,
        "exec dd if=/dev/zero of=\"$1\" bs=1M count=16",
        &dirty.0,
    );
    run_in(
        &reader,
        "exec dd if=\"$1\" of=/dev/null bs=64k iflag=direct",
        &read.0,
    );
    // The test itself belongs to nobody in scope.
    run("sync", &["-f", dirty.0.to_str().expect("plain")]);
    let (snapshot, seconds) = watch.sweep(&["dirtier", "reader"]);
    let (dirtier, reader) = (io(&snapshot, "dirtier"), io(&snapshot, "reader"));
    let written = dirtier.writes.bytes_per_second * seconds / MIB;
    assert!((15.0..18.0).contains(&written), "{written} MiB of 16");
    let read = reader.reads.bytes_per_second * seconds / MIB;
    assert!((7.5..9.0).contains(&read), "{read} MiB of 8");
    assert_eq!(reader.writes.latency.count(), 0, "{reader:?}");
    assert!(dirtier.writes.latency.count() > 0, "{dirtier:?}");
    assert!(reader.reads.latency.count() >= 128, "{reader:?}");
    assert!(
        reader.sequential_percent() > Some(90.0) && reader.queue_depth > 0.0,
        "{reader:?}"
    );
    let half = reader.reads.latency.percentile(50.0);
    assert!(half.is_some_and(|p50| (1e3..1e10).contains(&p50)));
    let disk = snapshot
        .devices
        .iter()
        .find(|disk| disk.block.reads.bytes_per_second > 0.0);
    assert!(
        disk.is_some_and(|disk| !disk.name.contains(':')),
        "{:?}",
        snapshot.devices
    );
    assert!(
        snapshot.losses.iter().all(|loss| loss.lost == 0),
        "{:?}",
        snapshot.losses
    );
}

#[test]
fn random_reads_are_told_from_sequential_ones_and_sizes_are_counted() {
    let (Some(scope), Some(file)) = (Scope::new("random"), Scratch::new("random", 64)) else {
        return;
    };
    let reader = scope.cgroup("reader");
    let mut watch = Watch::new(&scope);
    run_in(
        &reader,
        // 6,151 and 16,384 have no divisor in common: no place is read twice, and none follows another.
        "for n in $(seq 300); do
           dd if=\"$1\" of=/dev/null bs=4k count=1 skip=$((n * 6151 % 16384)) iflag=direct status=none
         done",
        &file.0,
    );
    let (snapshot, _) = watch.sweep(&["reader"]);
    let reads = &io(&snapshot, "reader").reads;
    // Cold parts of the programs are read too, in larger pieces.
    let half = reads.sizes.percentile(50.0);
    assert!(reads.sizes.count() >= 300, "{reads:?}");
    assert!(
        half.is_some_and(|size| (4096.0..8192.0).contains(&size)),
        "{half:?}"
    );
    let sequential = io(&snapshot, "reader").sequential_percent();
    assert!(sequential < Some(20.0), "{sequential:?}");
}

#[test]
fn a_container_born_and_gone_between_two_sweeps_is_counted() {
    let (Some(scope), Some(file)) = (Scope::new("brief"), Scratch::new("brief", 8)) else {
        return;
    };
    let mut watch = Watch::new(&scope);
    let brief = scope.cgroup("brief");
    run_in(
        &brief,
        "exec dd if=\"$1\" of=/dev/null bs=64k iflag=direct",
        &file.0,
    );
    fs::remove_dir(&brief).expect("nobody is left in it");
    let (snapshot, seconds) = watch.sweep(&[]);
    let host = snapshot.host.block.expect("the programs run");
    let read = host.reads.bytes_per_second * seconds / MIB;
    assert!((7.5..9.0).contains(&read), "{read} MiB of 8");
    let disks: f64 = snapshot
        .devices
        .iter()
        .map(|disk| disk.block.reads.bytes_per_second * seconds / MIB)
        .sum();
    assert!(
        (disks - read).abs() < 0.1,
        "{disks} on disks, {read} in all"
    );
}

#[test]
fn what_a_loop_device_hands_to_the_disk_below_its_file_is_in_the_hosts_sum_once() {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (Some(scope), Some(_on_a_disk)) = (Scope::new("loop"), Scratch::new("loop", 1)) else {
        return;
    };
    let Some(disk) = Disk::new(directory, "sum", 8) else {
        return;
    };
    let mut senses = Telemetry::start(TelemetryConfig {
        root: PathBuf::from("/"),
        cgroup: scope.path().parent().expect("the root").to_owned(),
        edge_age: Duration::from_secs(3600),
        remembered: Vec::new(),
        limits: Default::default(),
    });
    let start = Instant::now();
    senses.sweep(&[], now());
    let of = format!("of={}", disk.device());
    let how = ["if=/dev/urandom", &of, "bs=1M", "count=8", "oflag=direct"];
    output("dd", &how);
    output("sync", &["-f", directory.to_str().expect("plain")]);
    let seconds = start.elapsed().as_secs_f64();
    let snapshot = senses.sweep(&[], now());
    let written = |io: &BlockIo| io.writes.bytes_per_second * seconds / MIB;
    let of_host = written(&snapshot.host.block.expect("the programs run"));
    let of = |is_of: &dyn Fn(&str) -> bool| -> f64 {
        let disks = snapshot.devices.iter().filter(|disk| is_of(&disk.name));
        disks.map(|disk| written(&disk.block)).sum()
    };
    let own = of(&|name| disk.device().ends_with(&format!("/{name}")));
    assert!(own > 7.5, "{own} MiB of 8 on {}", disk.device());
    // Others may have loop devices too.
    let (disks, all) = (of(&|name| !name.starts_with("loop")), of(&|_| true));
    assert!(disks > 7.5, "{disks} MiB of 8 on disks");
    assert!(
        (disks - 0.1..all - own + 0.1).contains(&of_host),
        "{of_host} MiB in all, {disks} on disks, {own} on the loop device, {all} on any"
    );
}
