//! Mounted file systems: how full, how soon full, their errors, and whether they gave up writing.

use super::counters::Counters;
use super::files::{entries, field, name, number, text, why};
use super::{HostReading, Look, queues, sum};
use crate::model::metric::Per;
use crate::model::mounts::unescaped;
use nix::sys::statvfs::{Statvfs, statvfs};
use procfs::FromRead;
use procfs::process::{MountInfo, MountInfos};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The slope is that of this long, so that one large file does not make a forecast.
const HISTORY: Duration = Duration::from_secs(3600);
/// One point of it in so long.
const POINT: Duration = Duration::from_secs(60);
/// Fewer points make no slope.
const LEAST_POINTS: usize = 5;
/// A file system that does not fill is said to last this long, so that a threshold can clear.
const FOREVER_S: f64 = 365.0 * 86_400.0;

const METRICS: [&str; 7] = [
    "filesystem.mounted",
    "disk.used",
    "disk.capacity",
    "disk.used_bytes",
    "disk.inodes_used",
    "disk.time_to_full",
    "filesystem.read_only",
];

#[derive(Default)]
pub struct Filesystems {
    clock: Duration,
    mounts: BTreeMap<String, Mount>,
    /// By the device of a file system: which of its mounts were writable when it last was itself.
    writable: BTreeMap<String, BTreeSet<i32>>,
    errors: Counters,
    /// Devices of which the kernel's log told since the last reading that they take no writes any more.
    told: BTreeSet<String>,
}

#[derive(Default)]
struct Mount {
    /// The mount's id when the log told that it went read-only: Linux 6.12, and older kernels that took over
    /// its d3476f3dad4a, show it in no option until 6.14 brought `emergency_ro`.
    told: Option<i32>,
    history: VecDeque<(Duration, u64)>,
}

impl Filesystems {
    /// Takes in that the kernel's log told of a device's file system going read-only.
    pub fn went_read_only(&mut self, device: &str) {
        self.told.insert(device.to_owned());
    }

    pub fn read(&mut self, look: Look, reading: &mut HostReading) {
        self.clock += look.elapsed;
        queues::offline(look, reading);
        let path = look.path("proc/self/mountinfo");
        let Ok(mounts) = MountInfos::from_file(&path) else {
            let why = why(&path, "procfs is not mounted below the root");
            reading.absent(&METRICS, &why);
            let errors = ["filesystem.errors", "filesystem.known_errors"];
            reading.absent(&errors, &why);
            return;
        };
        let mut devices: BTreeMap<&str, Vec<&MountInfo>> = BTreeMap::new();
        for mount in mounts.0.iter().filter(|mount| keeps_data(mount)) {
            devices.entry(&mount.majmin).or_default().push(mount);
        }
        self.writable
            .retain(|device, _| devices.contains_key(device.as_str()));
        let mut present = BTreeSet::new();
        let mut names = BTreeMap::new();
        for (device, of_device) in devices {
            let meant = self.is_meant(look, device, &of_device);
            // How it is for who writes there; a second mount that is only read says nothing of that.
            let writable = of_device.iter().find(|mount| !is_read_only(mount));
            let Some(&mount) = writable.filter(|_| !meant).or(of_device.first()) else {
                continue;
            };
            let point = unescaped(&mount.mount_point.to_string_lossy());
            for name in kernel_names(look, mount) {
                if self.told.remove(&name) {
                    let state = self.mounts.entry(point.clone()).or_default();
                    state.told = Some(mount.mnt_id);
                }
                names.insert(name, point.clone());
            }
            self.mount(look, reading, mount, &point, meant);
            reading.of("filesystem.mounted", Per::Mount, &point, 1.0);
            present.insert(point);
        }
        self.told.clear();
        self.mounts.retain(|point, _| present.contains(point));
        for (metric, worst) in [
            ("disk.used", f64::max as fn(f64, f64) -> f64),
            ("disk.inodes_used", f64::max),
            ("disk.time_to_full", f64::min),
            ("filesystem.read_only", sum),
            ("filesystem.mounted", sum),
        ] {
            reading.device_from_parts(metric, worst);
        }
        self.errors(look, reading, &names);
        let forecast = "a forecast needs five minutes of history";
        reading.absent(&["disk.time_to_full"], forecast);
        let inodes = "no file system here has a fixed number of inodes";
        reading.absent(&["disk.inodes_used"], inodes);
        reading.absent(
            &METRICS,
            "no writable file system on a disk is mounted here",
        );
    }

    /// Whether a file system that takes no writes is so because somebody wants that: who mounts it read-only, or anew so,
    /// says so of a mount too; the kernel, which gives up writing, does not.
    fn is_meant(&mut self, look: Look, device: &str, mounts: &[&MountInfo]) -> bool {
        let (read_only, writable): (Vec<&MountInfo>, Vec<&MountInfo>) = mounts
            .iter()
            .copied()
            .partition(|mount| is_read_only(mount));
        if mounts
            .iter()
            .all(|mount| !mount.super_options.contains_key("ro"))
        {
            let writable = writable.iter().map(|mount| mount.mnt_id).collect();
            self.writable.insert(device.to_owned(), writable);
            return read_only.len() == mounts.len();
        }
        let was_writable = |before: &BTreeSet<i32>| {
            let mut anew = read_only.iter();
            anew.any(|mount| before.contains(&mount.mnt_id))
        };
        // An agent that starts only then goes by the first mount, which some hosts want to be read-only from the
        // beginning; so it says nothing where the file system itself keeps what happened.
        let first = || {
            let first = mounts.first();
            first.is_some_and(|mount| is_read_only(mount) && !found_an_error(look, mount))
        };
        let before = self.writable.get(device);
        writable.is_empty() || before.map_or_else(first, was_writable)
    }

    fn mount(
        &mut self,
        look: Look,
        reading: &mut HostReading,
        mount: &MountInfo,
        point: &str,
        meant: bool,
    ) {
        let state = self.mounts.entry(point.to_owned()).or_default();
        let gave_up = gave_up(mount) || (mount.super_options.contains_key("ro") && !meant);
        let read_only = gave_up || state.told == Some(mount.mnt_id);
        if !read_only && meant {
            return;
        }
        let value = f64::from(u8::from(read_only));
        reading.of("filesystem.read_only", Per::Mount, point, value);
        // The program that serves it may not answer, and asking would wait for that.
        if mount.fs_type.starts_with("fuse") {
            return;
        }
        let below = point.strip_prefix('/').unwrap_or(point);
        let Ok(stat) = statvfs(&look.path(below)) else {
            return;
        };
        let Some(space) = Space::of(&stat) else {
            return;
        };
        for (metric, value) in [
            ("disk.used", space.used_percent()),
            ("disk.capacity", space.capacity as f64),
            ("disk.used_bytes", space.used as f64),
        ] {
            reading.of(metric, Per::Mount, point, value);
        }
        if let Some(used) = space.inodes_percent {
            reading.of("disk.inodes_used", Per::Mount, point, used);
        }
        let due = state.history.back();
        if due.is_none_or(|&(last, _)| self.clock.saturating_sub(last) >= POINT) {
            state.history.push_back((self.clock, space.used));
            while state
                .history
                .front()
                .is_some_and(|&(first, _)| self.clock.saturating_sub(first) > HISTORY)
            {
                state.history.pop_front();
            }
        }
        if let Some(left) = time_to_full(&state.history, space.available) {
            reading.of("disk.time_to_full", Per::Mount, point, left * 1e9);
        }
    }

    /// Errors that file systems count themselves: ext4 (Documentation/ABI/testing/sysfs-fs-ext4) and
    /// btrfs (fs/btrfs/sysfs.c, `error_stats`, since 5.14). XFS only logs them.
    fn errors(&mut self, look: Look, reading: &mut HostReading, names: &BTreeMap<String, String>) {
        self.errors.turn();
        let mut push = |name: &str, count: u64| {
            reading.of("filesystem.known_errors", Per::Mount, name, count as f64);
            if let Some(more) = self.errors.more("errors", name, count) {
                reading.of("filesystem.errors", Per::Mount, name, more as f64);
            }
        };
        for directory in entries(&look.path("sys/fs/ext4")) {
            if let Some(count) = number(&directory.join("errors_count")) {
                let device = name(&directory);
                push(names.get(&device).unwrap_or(&device), count);
            }
        }
        for directory in entries(&look.path("sys/fs/btrfs")) {
            let mut counted = None;
            for member in entries(&directory.join("devinfo")) {
                if let Some(stats) = text(&member.join("error_stats")) {
                    counted = Some(counted.unwrap_or(0) + of_btrfs(&stats));
                }
            }
            let Some(count) = counted else { continue };
            let members = entries(&directory.join("devices"));
            let mounted = members.iter().find_map(|member| names.get(&name(member)));
            push(mounted.unwrap_or(&name(&directory)), count);
        }
        for metric in ["filesystem.errors", "filesystem.known_errors"] {
            reading.device_from_parts(metric, sum);
        }
        let why = "no mounted file system counts its errors (ext4 and btrfs do)";
        if reading
            .values_of("filesystem.known_errors")
            .next()
            .is_none()
        {
            reading.absent(&["filesystem.errors", "filesystem.known_errors"], why);
        }
    }
}

/// What sysfs may call the device of a mount, which is often mounted by another name, as
/// `/dev/mapper/vg-data` for `dm-0`. The number of a btrfs is none of a device.
fn kernel_names(look: Look, mount: &MountInfo) -> impl Iterator<Item = String> {
    let linked = |path: PathBuf| fs::read_link(path).ok().map(|to| name(&to));
    let source = unescaped(mount.mount_source.as_deref().unwrap_or_default());
    let by_number = linked(look.path("sys/dev/block").join(&mount.majmin));
    let by_link = linked(look.path(source.trim_start_matches('/')));
    let itself = Some(name(Path::new(&source)));
    [by_number, by_link, itself].into_iter().flatten()
}

/// Whether ext4 found an error since the host began: it keeps when it did last
/// (Documentation/ABI/testing/sysfs-fs-ext4).
fn found_an_error(look: Look, mount: &MountInfo) -> bool {
    let began = text(&look.path("proc/stat")).and_then(|stat| field(&stat, "btime"));
    let last = |name: String| {
        let at = look.path("sys/fs/ext4").join(name).join("last_error_time");
        number::<u64>(&at)
    };
    began.is_some_and(|began| {
        kernel_names(look, mount)
            .filter_map(last)
            .any(|last| last >= began)
    })
}

fn keeps_data(mount: &MountInfo) -> bool {
    let backed = mount
        .mount_source
        .as_ref()
        .is_some_and(|source| source.starts_with("/dev/"));
    let image = matches!(
        mount.fs_type.as_str(),
        "squashfs" | "iso9660" | "erofs" | "cramfs" | "romfs"
    );
    (backed && !image)
        || mount.fs_type == "zfs"
        || (mount.fs_type == "overlay" && mount.mount_point == Path::new("/"))
}

/// Whether the file system says that it gave up writing: `emergency_ro` and `shutdown` are what ext4 and XFS show since
/// Linux 6.14 and 6.8.
fn gave_up(mount: &MountInfo) -> bool {
    let has = |option| {
        mount.super_options.contains_key(option) || mount.mount_options.contains_key(option)
    };
    has("emergency_ro") || has("shutdown")
}

/// Whether nobody writes through this mount, whatever its file system takes.
fn is_read_only(mount: &MountInfo) -> bool {
    mount.mount_options.contains_key("ro")
}

fn of_btrfs(stats: &str) -> u64 {
    let counts = stats
        .lines()
        .filter_map(|line| line.split_ascii_whitespace().last()?.parse::<u64>().ok());
    counts.sum()
}

struct Space {
    capacity: u64,
    used: u64,
    available: u64,
    inodes_percent: Option<f64>,
}

impl Space {
    fn of(stat: &Statvfs) -> Option<Self> {
        let bytes = |blocks: u64| blocks.saturating_mul(stat.fragment_size());
        let files = stat.files();
        let used = files.saturating_sub(stat.files_free()) as f64;
        (stat.blocks() > 0).then(|| Self {
            capacity: bytes(stat.blocks()),
            used: bytes(stat.blocks().saturating_sub(stat.blocks_free())),
            available: bytes(stat.blocks_available()),
            inodes_percent: (files > 0).then(|| 100.0 * used / files as f64),
        })
    }

    /// As `df` counts it: what is reserved for root is neither used nor free.
    fn used_percent(&self) -> f64 {
        100.0 * self.used as f64 / ((self.used + self.available) as f64).max(1.0)
    }
}

/// Seconds until `available` bytes are gone at the slope of the history (least squares).
fn time_to_full(history: &VecDeque<(Duration, u64)>, available: u64) -> Option<f64> {
    if history.len() < LEAST_POINTS {
        return None;
    }
    let (first_at, first_used) = *history.front()?;
    let points: Vec<(f64, f64)> = history
        .iter()
        .map(|&(at, used)| {
            let seconds = at.saturating_sub(first_at).as_secs_f64();
            (seconds, used as f64 - first_used as f64)
        })
        .collect();
    let count = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (mean_t, mean_used) = (mean(|point| point.0), mean(|point| point.1));
    let covariance: f64 = points
        .iter()
        .map(|(t, used)| (t - mean_t) * (used - mean_used))
        .sum();
    let variance: f64 = points.iter().map(|(t, _)| (t - mean_t).powi(2)).sum();
    let slope = covariance / variance;
    Some(if slope > 0.0 {
        (available as f64 / slope).min(FOREVER_S)
    } else {
        FOREVER_S
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{LATER, recorded, value, write};
    use super::*;

    fn history(used: impl IntoIterator<Item = u64>) -> VecDeque<(Duration, u64)> {
        (0..)
            .map(|minute| Duration::from_secs(60 * minute))
            .zip(used)
            .collect()
    }

    #[test]
    fn a_file_system_that_fills_steadily_is_full_when_arithmetic_says() {
        let steady = history((0..30).map(|minute| 1_000_000_000 + minute * 6_000));
        let left = time_to_full(&steady, 360_000).expect("a slope");
        assert!((left - 3600.0).abs() < 1e-6, "100 bytes a second: {left}");
        assert_eq!(time_to_full(&history([5, 5, 5, 5, 5]), 10), Some(FOREVER_S));
        assert_eq!(time_to_full(&history([9, 8, 7, 6, 5]), 10), Some(FOREVER_S));
        assert_eq!(time_to_full(&history([1, 2, 3, 4]), 10), None);
    }

    const MOUNTS: &str = "22 1 254:1 / / rw,relatime - ext4 /dev/sda1 SUPER
23 1 254:2 / /usr/share/x ro,relatime - squashfs /dev/loop0 ro
24 1 254:3 / /srv rw - btrfs /dev/sdb rw
";

    #[test]
    fn a_file_system_that_stops_taking_writes_is_told_from_one_that_never_did() {
        let mounts = |options| MOUNTS.replace("SUPER", options);
        let (root, mut host) =
            recorded(&[("proc/self/mountinfo", &mounts("rw,errors=remount-ro"))]);
        let first = host.read(&[], LATER);
        assert_eq!(value(&first, "filesystem.read_only", "/"), Some(0.0));
        assert!(value(&first, "disk.capacity", "/").is_some_and(|bytes| bytes > 0.0));
        write(
            root.path(),
            &[("proc/self/mountinfo", &mounts("ro,errors=remount-ro"))],
        );
        let second = host.read(&[], LATER);
        assert_eq!(value(&second, "filesystem.read_only", "/"), Some(1.0));
        assert_eq!(value(&second, "filesystem.read_only", ""), Some(1.0));

        // An agent that starts only then.
        let (_root, mut host) = recorded(&[("proc/self/mountinfo", &mounts("ro"))]);
        let first = host.read(&[], LATER);
        assert_eq!(value(&first, "filesystem.read_only", "/"), Some(1.0));
        assert_eq!(value(&first, "filesystem.mounted", "/"), Some(1.0));
        assert_eq!(value(&first, "filesystem.mounted", ""), Some(2.0));

        let meant = mounts("ro").replace("/ / rw", "/ / ro");
        let (_root, mut host) = recorded(&[("proc/self/mountinfo", &meant)]);
        let first = host.read(&[], LATER);
        assert_eq!(value(&first, "filesystem.read_only", "/"), None);
        assert_eq!(value(&first, "filesystem.mounted", "/"), Some(1.0));
    }

    #[test]
    fn one_that_the_operator_mounts_anew_to_be_read_only_did_not_give_up() {
        let mounts = MOUNTS.replace("SUPER", "rw");
        let (root, mut host) = recorded(&[("proc/self/mountinfo", &mounts)]);
        host.read(&[], LATER);
        // As `mount -o remount,ro` leaves it.
        let anew = mounts
            .replace("/ / rw", "/ / ro")
            .replace("sda1 rw", "sda1 ro");
        write(root.path(), &[("proc/self/mountinfo", &anew)]);
        let reading = host.read(&[], LATER);
        assert_eq!(value(&reading, "filesystem.read_only", "/"), None);
        assert_eq!(value(&reading, "filesystem.read_only", ""), Some(0.0));
        // What it shows of an emergency counts however it is mounted.
        let emergency = anew.replace("sda1 ro", "sda1 ro,emergency_ro");
        write(root.path(), &[("proc/self/mountinfo", &emergency)]);
        let reading = host.read(&[], LATER);
        assert_eq!(value(&reading, "filesystem.read_only", "/"), Some(1.0));
    }

    #[test]
    fn of_several_mounts_of_a_file_system_that_counts_through_which_somebody_writes() {
        let mounts = "22 1 254:1 / / ro - xfs /dev/sda1 rw
23 22 254:1 /var /var rw - xfs /dev/sda1 rw
24 22 254:1 /etc /etc rw - xfs /dev/sda1 rw
";
        let (root, mut host) = recorded(&[("proc/self/mountinfo", mounts)]);
        fs::create_dir_all(root.path().join("var")).expect("made");
        let first = host.read(&[], LATER);
        assert_eq!(value(&first, "filesystem.read_only", "/var"), Some(0.0));
        assert!(value(&first, "disk.capacity", "/var").is_some_and(|bytes| bytes > 0.0));
        assert_eq!(value(&first, "filesystem.mounted", ""), Some(1.0));
        let mut after = |mounts: &str| {
            write(root.path(), &[("proc/self/mountinfo", mounts)]);
            let reading = host.read(&[], LATER);
            value(&reading, "filesystem.read_only", "/var")
        };
        let given_up = mounts.replace("sda1 rw", "sda1 ro");
        assert_eq!(after(&given_up), Some(1.0));
        assert_eq!(after(mounts), Some(0.0));
        // As `mount -o remount,ro /etc` leaves it.
        assert_eq!(after(&given_up.replace("/etc rw", "/etc ro")), None);
        // As `mount -o remount,bind,ro /etc` leaves it: it is written to elsewhere.
        assert_eq!(after(&mounts.replace("/etc rw", "/etc ro")), Some(0.0));
        assert_eq!(after(&given_up.replace("/etc rw", "/etc ro")), Some(1.0));
        // Unmounted, and mounted read-only by somebody.
        let anew = "31 1 254:1 / /var ro - xfs /dev/sda1 ro\n";
        assert_eq!(after(anew), None);
    }

    #[test]
    fn an_agent_that_starts_late_knows_by_ext4_itself_that_it_gave_up_writing() {
        let mounts = "22 1 8:1 / /sysroot ro - ext4 /dev/sda1 ro
23 22 8:1 /var /var rw - ext4 /dev/sda1 ro
";
        let began = "cpu 1 2 3\nbtime 1750000000\n";
        let read_only = |last: &str| {
            let (_root, mut host) = recorded(&[
                ("proc/self/mountinfo", mounts),
                ("proc/stat", began),
                ("sys/fs/ext4/sda1/last_error_time", last),
            ]);
            value(&host.read(&[], LATER), "filesystem.read_only", "/var")
        };
        assert_eq!(read_only("1750000007\n"), Some(1.0));
        // Of an error of before nothing is known: somebody may have mounted it so.
        assert_eq!(read_only("1749999999\n"), None);
        assert_eq!(read_only("0\n"), None);
    }

    #[test]
    fn a_mount_point_with_a_blank_is_measured_and_a_file_system_of_a_program_is_not_asked() {
        let mounts = "22 1 8:1 / /srv/two\\040words rw - ext4 /dev/sda1 rw
23 1 8:2 / /srv/windows rw - fuseblk /dev/sda2 rw
";
        let (root, mut host) = recorded(&[("proc/self/mountinfo", mounts)]);
        for point in ["srv/two words", "srv/windows"] {
            fs::create_dir_all(root.path().join(point)).expect("made");
        }
        let reading = host.read(&[], LATER);
        let capacity = |point| value(&reading, "disk.capacity", point);
        assert!(capacity("/srv/two words").is_some_and(|bytes| bytes > 0.0));
        assert_eq!(capacity("/srv/windows"), None);
        let mounted = value(&reading, "filesystem.mounted", "/srv/windows");
        assert_eq!(mounted, Some(1.0));
    }

    #[test]
    fn a_file_system_that_only_the_log_tells_of_is_read_only_until_it_is_mounted_anew() {
        let mounts = MOUNTS.replace("SUPER", "rw");
        let (root, mut host) = recorded(&[("proc/self/mountinfo", &mounts), ("dev/kmsg", "")]);
        let first = host.read(&[], LATER);
        assert_eq!(value(&first, "filesystem.read_only", "/"), Some(0.0));
        let told = "2,9,200,-;EXT4-fs (sda1): Remounting filesystem read-only\n";
        write(root.path(), &[("dev/kmsg", told)]);
        for _ in 0..2 {
            let read = host.read(&[], LATER);
            assert_eq!(value(&read, "filesystem.read_only", "/"), Some(1.0));
            assert_eq!(value(&read, "filesystem.read_only", "/srv"), Some(0.0));
        }
        let anew = mounts.replace("22 1 254:1", "31 1 254:1");
        write(root.path(), &[("proc/self/mountinfo", &anew)]);
        let last = host.read(&[], LATER);
        assert_eq!(value(&last, "filesystem.read_only", "/"), Some(0.0));
    }

    #[test]
    fn errors_of_a_mapped_device_are_those_of_its_mount() {
        let mounts = "22 1 253:0 / /srv rw,relatime - ext4 /dev/mapper/vg-data rw
23 1 0:45 / /home rw - btrfs /dev/mapper/vg-home rw
";
        let (root, mut host) = recorded(&[
            ("proc/self/mountinfo", mounts),
            ("sys/fs/ext4/dm-0/errors_count", "4\n"),
            ("sys/fs/btrfs/6f7e/devinfo/1/error_stats", "write_errs 2\n"),
            ("sys/fs/btrfs/6f7e/devices/dm-1/dev", "253:1\n"),
        ]);
        for (at, to) in [
            ("sys/dev/block/253:0", "../../devices/virtual/block/dm-0"),
            ("dev/mapper/vg-home", "../dm-1"),
        ] {
            let at = root.path().join(at);
            fs::create_dir_all(at.parent().expect("a directory")).expect("made");
            std::os::unix::fs::symlink(to, at).expect("linked");
        }
        let read = host.read(&[], LATER);
        assert_eq!(value(&read, "filesystem.known_errors", "/srv"), Some(4.0));
        assert_eq!(value(&read, "filesystem.known_errors", "/home"), Some(2.0));
        assert_eq!(value(&read, "filesystem.known_errors", "dm-0"), None);
    }

    #[test]
    fn errors_of_ext4_and_btrfs_are_named_by_mount_and_old_ones_are_not_new() {
        let stats = |written: u32| {
            format!(
                "write_errs {written}\nread_errs 1\nflush_errs 0\ncorruption_errs 2\ngeneration_errs 0\n"
            )
        };
        let btrfs = "sys/fs/btrfs/6f7e27ac-2a31-4ef4-9e4c-bd6cbb6e5dd5";
        let at = |file: &str| format!("{btrfs}/{file}");
        let (root, mut host) = recorded(&[
            ("proc/self/mountinfo", &MOUNTS.replace("SUPER", "rw")),
            ("sys/fs/ext4/sda1/errors_count", "4\n"),
            ("sys/fs/ext4/features/lazy_itable_init", "supported\n"),
            (&at("devinfo/1/error_stats"), &stats(0)),
            (&at("devices/sdb/dev"), "8:16\n"),
            ("sys/fs/btrfs/features/raid56", "0\n"),
        ]);
        let first = host.read(&[], LATER);
        assert_eq!(value(&first, "filesystem.errors", ""), None);
        assert_eq!(value(&first, "filesystem.known_errors", "/"), Some(4.0));
        assert_eq!(value(&first, "filesystem.known_errors", "/srv"), Some(3.0));
        assert_eq!(value(&first, "filesystem.known_errors", ""), Some(7.0));
        write(
            root.path(),
            &[
                ("sys/fs/ext4/sda1/errors_count", "5\n"),
                (&at("devinfo/1/error_stats"), &stats(6)),
            ],
        );
        let second = host.read(&[], LATER);
        assert_eq!(value(&second, "filesystem.errors", "/"), Some(1.0));
        assert_eq!(value(&second, "filesystem.errors", "/srv"), Some(6.0));
    }
}
