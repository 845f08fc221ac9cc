//! The metrics of this host: each has a value or a reason, and faults made on purpose are seen. Needs root.
#![allow(clippy::unwrap_used, reason = "the whole file is a test")]

use lifeboat::model::container::Container;
use lifeboat::model::metric::{METRICS, Per};
use lifeboat::model::telemetry::Snapshot;
use lifeboat::model::units::UnixMillis;
use lifeboat::telemetry::{Telemetry, TelemetryConfig};
use lifeboat_tests::scope::container;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

fn senses(cgroup: &Path) -> Telemetry {
    Telemetry::start(TelemetryConfig {
        root: PathBuf::from("/"),
        cgroup: cgroup.to_owned(),
        edge_age: Duration::from_secs(3600),
        remembered: Vec::new(),
        limits: Default::default(),
    })
}

fn now() -> UnixMillis {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    UnixMillis(since.as_millis() as u64)
}

fn value(snapshot: &Snapshot, metric: &str, per: Per, name: &str) -> Option<f64> {
    let mut samples = snapshot.samples.iter();
    let found =
        samples.find(|s| s.metric == metric && s.subject.per == per && s.subject.name == name);
    found.map(|sample| sample.value)
}

/// Where cgroup2, or a cgroup v1 controller, is mounted.
fn cgroup_mount(kind: &str, option: &str) -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    mounts.lines().find_map(|line| {
        let (mount, rest) = line.split_once(" - ")?;
        let mut rest = rest.split(' ');
        let fits = rest.next()? == kind && rest.nth(1)?.split(',').any(|one| one == option);
        fits.then(|| mount.split(' ').nth(4).map(PathBuf::from))?
    })
}

#[test]
fn every_metric_has_a_value_on_this_host_or_the_reason_why_not() {
    let scope = cgroup_mount("cgroup2", "rw").unwrap_or_else(|| "/no-cgroup".into());
    let mut senses = senses(&scope);
    senses.sweep(&[], now());
    sleep(Duration::from_millis(1100));
    let snapshot = senses.sweep(&[], now());
    for metric in METRICS {
        let samples = snapshot.samples.iter().filter(|s| s.metric == metric.name);
        let why = snapshot.absent.iter().find(|one| one.what == metric.name);
        match why {
            None => assert!(samples.clone().count() > 0, "{} is silent", metric.name),
            Some(why) => {
                assert_eq!(samples.clone().count(), 0, "{}: {}", metric.name, why.why);
                assert!(!why.why.is_empty(), "{}", metric.name);
            }
        }
        for sample in samples {
            assert!(metric.per.contains(&sample.subject.per), "{sample:?}");
            assert!(sample.value.is_finite(), "{sample:?}");
        }
    }
}

/// A small ext4 file system on a loop device, gone when dropped.
struct FileSystem {
    directory: PathBuf,
    mount: PathBuf,
    device: String,
}

impl FileSystem {
    fn new() -> Option<Self> {
        let directory = std::env::temp_dir().join(format!("metrics-ext4-{}", std::process::id()));
        let mount = directory.join("mount");
        let image = directory.join("image");
        fs::create_dir_all(&mount).unwrap();
        let mut made = Self {
            directory,
            device: String::new(),
            mount,
        };
        fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
        let formatted = Command::new("mkfs.ext4").arg("-q").arg(&image).status();
        if !formatted.is_ok_and(|status| status.success()) {
            println!("not run: mkfs.ext4 is not installed");
            return None;
        }
        let mounted = Command::new("mount")
            .args(["-o", "loop,errors=remount-ro"])
            .arg(&image)
            .arg(&made.mount)
            .status();
        if !mounted.is_ok_and(|status| status.success()) {
            println!("not run: loop devices cannot be mounted here");
            return None;
        }
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let point = made.mount.to_str().unwrap();
        let line = mounts.lines().find(|line| line.contains(point)).unwrap();
        let device = line.split(' ').next().unwrap();
        made.device = device.trim_start_matches("/dev/").to_owned();
        Some(made)
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        let mounted = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        if mounted.contains(self.mount.to_str().unwrap_or_default()) {
            let _ = Command::new("umount").arg(&self.mount).status();
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

#[test]
fn an_error_of_a_real_file_system_is_counted_logged_and_seen_to_make_it_read_only() {
    let Some(file_system) = FileSystem::new() else {
        return;
    };
    let trigger = Path::new("/sys/fs/ext4")
        .join(&file_system.device)
        .join("trigger_fs_error");
    if !trigger.exists() {
        println!("not run: this kernel cannot make an ext4 error on purpose");
        return;
    }
    let mount = file_system.mount.to_str().unwrap();
    let device = file_system.device.as_str();
    let mut senses = senses(Path::new("/no-cgroup"));
    let before = senses.sweep(&[], now());
    assert_eq!(
        value(&before, "filesystem.read_only", Per::Mount, mount),
        Some(0.0)
    );
    assert_eq!(
        value(&before, "filesystem.known_errors", Per::Mount, mount),
        Some(0.0)
    );

    // Sources that are read seldom are read at their first two sweeps in any case.
    senses.sweep(&[], now());
    fs::write(&trigger, "made by a test").unwrap();
    let next = senses.sweep(&[], now());
    let of = |metric, per, name| value(&next, metric, per, name).unwrap_or(0.0);
    assert_eq!(of("filesystem.errors", Per::Mount, mount), 1.0);
    assert_eq!(of("kernel.filesystem_errors", Per::Disk, device), 1.0);
    assert_eq!(of("kernel.read_only_remounts", Per::Disk, device), 1.0);
    assert_eq!(of("filesystem.read_only", Per::Mount, mount), 1.0);
}

#[test]
fn what_is_mounted_or_mounted_anew_is_seen_in_the_next_sweep() {
    let mut senses = senses(Path::new("/no-cgroup"));
    for _ in 0..3 {
        senses.sweep(&[], now());
    }
    let Some(file_system) = FileSystem::new() else {
        return;
    };
    let mount = file_system.mount.to_str().unwrap();
    let mut read_only = || {
        let next = senses.sweep(&[], now());
        let mounted = value(&next, "filesystem.mounted", Per::Mount, mount);
        assert_eq!(mounted, Some(1.0));
        value(&next, "filesystem.read_only", Per::Mount, mount)
    };
    assert_eq!(read_only(), Some(0.0));
    let remount = |how: &str| {
        let done = Command::new("mount").args(["-o", how, mount]).status();
        assert!(done.unwrap().success(), "{how}");
    };
    // Whoever mounts it so did not lose it.
    remount("remount,ro");
    assert_eq!(read_only(), None);
    remount("remount,rw");
    assert_eq!(read_only(), Some(0.0));
}

/// A cgroup of cgroup2, and with it the one of a controller where that is of cgroup v1.
struct Cgroups {
    unified: PathBuf,
    /// Where the controller's files are.
    limited: PathBuf,
    is_v1: bool,
}

impl Cgroups {
    /// Makes them; none, with the reason printed, where no such controller is.
    fn new(controller: &str, name: &str) -> Option<Self> {
        let Some(root) = cgroup_mount("cgroup2", "rw") else {
            println!("not run: cgroup2 is not mounted");
            return None;
        };
        let v1 = cgroup_mount("cgroup", controller);
        let controllers = fs::read_to_string(root.join("cgroup.controllers")).unwrap();
        if v1.is_none() && !controllers.split_whitespace().any(|one| one == controller) {
            println!("not run: no hierarchy has the controller {controller}");
            return None;
        }
        if v1.is_none() {
            // As on hosts of containers.
            fs::write(
                root.join("cgroup.subtree_control"),
                format!("+{controller}"),
            )
            .unwrap();
        }
        let unified = root.join(name);
        let limited = v1.as_ref().unwrap_or(&root).join(name);
        for cgroup in [&unified, &limited] {
            fs::create_dir_all(cgroup).unwrap();
        }
        Some(Self {
            unified,
            limited,
            is_v1: v1.is_some(),
        })
    }

    fn limit(&self, v1: &[(&str, &str)], v2: &[(&str, &str)]) {
        for (file, value) in if self.is_v1 { v1 } else { v2 } {
            fs::write(self.limited.join(file), value).unwrap();
        }
    }

    /// What a shell that is to be in them begins with.
    fn enter(&self) -> String {
        let [unified, limited] = [&self.unified, &self.limited].map(|path| path.display());
        format!("echo $$ > {unified}/cgroup.procs; echo $$ > {limited}/cgroup.procs")
    }

    /// How many tasks were killed for memory, as the kernel says.
    fn kills(&self) -> f64 {
        let file = if self.is_v1 {
            "memory.oom_control"
        } else {
            "memory.events"
        };
        let text = fs::read_to_string(self.limited.join(file)).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        line.expect("the kernel counts kills").parse().unwrap()
    }
}

/// A process in cgroups of its own; both end with it.
struct Confined {
    process: Child,
    cgroups: Cgroups,
}

impl Drop for Confined {
    fn drop(&mut self) {
        // The whole cgroup: the shell's children would keep it.
        let unified = &self.cgroups.unified;
        if fs::write(unified.join("cgroup.kill"), "1").is_err() {
            // Before Linux 5.14.
            let inside = fs::read_to_string(unified.join("cgroup.procs")).unwrap_or_default();
            for process in inside.lines().filter_map(|line| line.parse().ok()) {
                let _ = kill(Pid::from_raw(process), Signal::SIGKILL);
            }
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
        sleep(Duration::from_millis(200));
        for cgroup in [unified, &self.cgroups.limited] {
            let _ = fs::remove_dir(cgroup);
        }
    }
}

#[test]
fn a_container_beyond_its_quota_shows_for_how_long_it_was_kept_off_the_cpus() {
    let name = format!("metrics-quota-{}", std::process::id());
    let Some(cgroups) = Cgroups::new("cpu", &name) else {
        return;
    };
    // A fifth of one CPU.
    cgroups.limit(
        &[
            ("cpu.cfs_period_us", "50000"),
            ("cpu.cfs_quota_us", "10000"),
        ],
        &[("cpu.max", "10000 50000")],
    );
    let script = format!("{}; while :; do :; done", cgroups.enter());
    let process = Command::new("sh").args(["-c", &script]).spawn().unwrap();
    let confined = Confined { process, cgroups };
    let containers = [container(&name, confined.process.id() as i32)];
    let mut senses = senses(confined.cgroups.unified.parent().unwrap());
    let started = Instant::now();
    loop {
        let snapshot = senses.sweep(&containers, now());
        let of = |metric| value(&snapshot, metric, Per::Container, &name);
        if let (Some(off), Some(periods)) = (of("cpu.throttled"), of("cpu.quota_throttled"))
            && off > 5.0
        {
            assert!(
                periods > 50.0,
                "it uses up its quota in most periods: {periods}"
            );
            break;
        }
        assert!(
            started.elapsed() < Duration::from_secs(30),
            "it was never kept off"
        );
        sleep(Duration::from_millis(500));
    }
}

#[test]
fn a_task_killed_for_memory_counts_for_its_container() {
    let name = format!("metrics-oom-{}", std::process::id());
    let Some(cgroups) = Cgroups::new("memory", &name) else {
        return;
    };
    cgroups.limit(
        &[("memory.limit_in_bytes", "20000000")],
        &[("memory.max", "20000000")],
    );
    let script = format!(
        "{}; read -r _; head -c 200000000 /dev/zero | tail; sleep 60",
        cgroups.enter()
    );
    let mut process = Command::new("sh")
        .args(["-c", &script])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut begin = process.stdin.take().unwrap();
    let confined = Confined { process, cgroups };
    let greedy = Container {
        cgroup_path: format!("/{name}"),
        ..container("greedy", confined.process.id() as i32)
    };
    let containers = [greedy];
    let started = Instant::now();
    let inside = confined.cgroups.limited.join("cgroup.procs");
    while fs::read_to_string(&inside).unwrap().is_empty() {
        assert!(started.elapsed() < Duration::from_secs(30), "it never came");
        sleep(Duration::from_millis(10));
    }
    let mut senses = senses(confined.cgroups.unified.parent().unwrap());
    // What was counted before the first reading is not new; on a busy host it comes late.
    senses.sweep(&containers, now());
    begin.write_all(b"\n").unwrap();
    let started = Instant::now();
    let kills = || confined.cgroups.kills();
    let (mut on_device, mut in_container) = (0.0, 0.0);
    // One may not be enough: what the killed one held is not free at once.
    loop {
        assert!(
            started.elapsed() < Duration::from_secs(30),
            "of the kernel's {} kills the container counts {in_container}, the device {on_device}",
            kills()
        );
        let snapshot = senses.sweep(&containers, now());
        on_device += value(&snapshot, "memory.oom_kills", Per::Device, "").unwrap_or(0.0);
        in_container +=
            value(&snapshot, "memory.oom_kills", Per::Container, "greedy").unwrap_or(0.0);
        assert!(value(&snapshot, "memory.used", Per::Container, "greedy").is_some());
        let truth = kills();
        assert!(in_container <= truth, "{in_container} kills of {truth}");
        if truth > 0.0 && in_container == truth && on_device >= truth {
            break;
        }
        sleep(Duration::from_millis(500));
    }
}
