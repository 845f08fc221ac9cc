//! What procfs and sysfs say of the disks whose requests the kernel programs count.

use super::block::UnderWay;
use super::host::{entries, text};
use crate::model::mounts::{self, Mount};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Component, Path, PathBuf};

/// File systems that pass on to the disk who is charged with what they write back.
const CHARGING: [&str; 4] = ["ext4", "xfs", "btrfs", "f2fs"];

/// Since when loop devices charge what they do to their file to whom they do it for, also through the page cache.
const LOOPS_CHARGE: (u32, u32) = (5, 14);

/// Since when requests that wait to be tried again are counted among those under way.
const COUNTS_WAITING: (u32, u32) = (6, 10);

/// Whether what a disk does is counted a second time, at another disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Again {
    /// It is not.
    No,
    /// At the multipath device of which it is a path: what fails here is tried on another path there.
    AsPath,
    /// At the disk on which the file behind this loop device lies, by a thread of the kernel.
    ByItsFile {
        /// For the same cgroup, where the kernel [charges](is_charged) it.
        charged: bool,
    },
}

/// A disk's name in sysfs; `major:minor` where neither sysfs nor the disks' statistics know it (any more).
fn name(root: &Path, device: u32) -> String {
    let number = format!("{}:{}", device >> 20, device & 0xf_ffff);
    let link = fs::read_link(root.join("sys/dev/block").join(&number)).ok();
    link.and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()))
        // The paths of a multipathed NVMe namespace have no number in sysfs.
        .or_else(|| {
            let stats = fs::read_to_string(root.join("proc/diskstats")).ok()?;
            let mut lines = stats.lines().filter_map(Line::parse);
            let found = lines.find(|line| line.device == device)?;
            Some(found.name.to_owned())
        })
        .unwrap_or(number)
}

/// Whether a disk of this name is a program's (ublk): its latency and errors are of that program and its network, and
/// say nothing of this host.
pub fn is_served(disk: &str) -> bool {
    disk.starts_with("ublkb")
}

/// The name of a disk that no program serves; `served` is which are known to be, for one that is gone says no more.
pub fn own(root: &Path, device: u32, served: &mut BTreeSet<u32>) -> Option<String> {
    let name = name(root, device);
    if is_served(&name) {
        served.insert(device);
    } else if !name.contains(':') {
        served.remove(&device);
    }
    (!served.contains(&device)).then_some(name)
}

/// Whether a disk is a path of a multipath device, which tries on another one what fails here and tells itself of what
/// fails on all.
pub fn is_path(root: &Path, disk: &str) -> bool {
    let holders = entries(&root.join("sys/block").join(disk).join("holders"));
    holders.iter().any(|holder| is_multipath(holder))
}

fn is_multipath(device: &Path) -> bool {
    let uuid = text(&device.join("dm/uuid"));
    uuid.is_some_and(|uuid| uuid.starts_with("mpath-"))
}

/// Whether what a disk of this name does is counted at another one too.
pub fn counted_again<'m>(
    root: &Path,
    mounts: impl FnOnce() -> &'m [Mount<'m>],
    disk: &str,
) -> Again {
    let block = root.join("sys/block");
    // One that takes bios has no requests that could be counted.
    let counts = |holder: &PathBuf| holder.join("mq").exists() && is_multipath(holder);
    if entries(&block.join(disk).join("holders"))
        .iter()
        .any(counts)
    {
        return Again::AsPath;
    }
    let of_loop = block.join(disk).join("loop");
    let Some(file) = text(&of_loop.join("backing_file")) else {
        return Again::No;
    };
    let Some(mount) = mount_of(mounts(), Path::new(&file)) else {
        return Again::No;
    };
    let Some(charges) = disk_of(root, mount).and_then(|disk| passes_on(&disk)) else {
        return Again::No;
    };
    let direct = || text(&of_loop.join("dio")).is_some_and(|dio| dio == "1");
    let charged = charges
        && CHARGING.contains(&mount.file_system)
        && (direct() || kernel(root).is_some_and(|version| version >= LOOPS_CHARGE));
    Again::ByItsFile { charged }
}

/// Where a file lies. A device file lies nowhere: what is below may be none that has requests.
fn mount_of<'m>(mounts: &'m [Mount<'m>], file: &Path) -> Option<&'m Mount<'m>> {
    if file.starts_with("/dev") {
        return None;
    }
    // One that is mounted in another's place counts, the last of them.
    let above = mounts.iter().filter(|mount| file.starts_with(&mount.point));
    above.max_by_key(|mount| mount.point.components().count())
}

/// The disk, or its partition, on which a file system of this host lies, in sysfs.
fn disk_of(root: &Path, mount: &Mount) -> Option<PathBuf> {
    // Those that may have several disks, as btrfs has, have a number that is none's.
    let directory = if mount.device.starts_with("0:") {
        let device = root.join(mount.source.strip_prefix("/").ok()?);
        let device = device.canonicalize().ok()?;
        root.join("sys/class/block").join(device.file_name()?)
    } else {
        root.join("sys/dev/block").join(mount.device)
    };
    directory.canonicalize().ok()
}

/// Whether a disk leaves to those below it who is charged; none where what it does is not counted below, for all that
/// is there must have requests.
fn passes_on(disk: &Path) -> Option<bool> {
    let whole = if disk.join("partition").exists() {
        disk.parent()?
    } else {
        disk
    };
    // The namespace of several paths has no requests, but these have.
    let is_multipath = |part: Component| {
        part.as_os_str()
            .to_string_lossy()
            .starts_with("nvme-subsys")
    };
    if whole.join("mq").exists() || whole.components().any(is_multipath) {
        return Some(true);
    }
    let below = entries(&whole.join("slaves"));
    if below.is_empty() {
        return None;
    }
    // What has a parity is written by the array's own thread.
    let level = text(&whole.join("md/level")).unwrap_or_default();
    let own = !["raid4", "raid5", "raid6"].contains(&level.as_str());
    below.iter().try_fold(own, |all, disk| {
        let one = passes_on(&disk.canonicalize().ok()?)?;
        Some(all && one)
    })
}

/// Version of the kernel.
fn kernel(root: &Path) -> Option<(u32, u32)> {
    let release = text(&root.join("proc/sys/kernel/osrelease"))?;
    let mut numbers = release.split(|other: char| !other.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// The mounts that this process sees, from the table's text.
pub fn mounts(table: &str) -> Vec<Mount<'_>> {
    table.lines().filter_map(mounts::parse).collect()
}

/// Whether what the kernel's threads write and read for tasks of a cgroup2 directory is counted for it: it is the root,
/// or the kernel charges both to it, where whatever is between `passes_on` the charge.
pub fn is_charged(cgroup: &Path, passes_on: bool) -> bool {
    let has = |file: &str| cgroup.join(file).exists();
    // The root has no type; one that is gone has nothing at all.
    let is_root = has("cgroup.procs") && !has("cgroup.type");
    is_root || (passes_on && has("io.stat") && has("memory.stat"))
}

/// Requests that a disk has under way by the kernel's own count, as often as its partitions count them too (until
/// Linux 5.11 these alone did).
pub fn under_way(root: &Path, device: u32) -> UnderWay {
    let stats = fs::read_to_string(root.join("proc/diskstats")).unwrap_or_default();
    let lines: Vec<Line> = stats.lines().filter_map(Line::parse).collect();
    let Some(disk) = lines.iter().find(|line| line.device == device) else {
        // It is gone; or one without a number, as paths of NVMe namespaces are in older kernels.
        let known = !lines.is_empty() && lines.iter().all(|line| line.device != 0);
        return if known {
            UnderWay::Gone
        } else {
            UnderWay::Unknown
        };
    };
    let directory = root.join("sys/block").join(disk.name);
    if text(&directory.join("queue/iostats")).is_none_or(|counts| counts == "0") {
        return UnderWay::Unknown;
    }
    let is_of = |line: &&Line| line.device == device || directory.join(line.name).is_dir();
    let of_disk = lines.iter().filter(is_of).map(|line| line.under_way);
    let count = of_disk.sum();
    if kernel(root).is_some_and(|version| version >= COUNTS_WAITING) {
        UnderWay::All(count)
    } else {
        UnderWay::Count(count)
    }
}

/// A line of /proc/diskstats (Linux, Documentation/admin-guide/iostats.rst).
struct Line<'a> {
    device: u32,
    name: &'a str,
    under_way: u64,
}

impl<'a> Line<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace();
        let (major, minor): (u32, u32) =
            (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        Some(Self {
            device: major << 20 | minor,
            name: fields.next()?,
            under_way: fields.nth(8)?.parse().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, content) in files {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        root
    }

    #[test]
    fn a_disk_that_a_program_serves_is_none_of_this_host_also_when_it_is_gone() {
        let root = root(&[("sys/dev/block/.made", "")]);
        let number = root.path().join("sys/dev/block/259:3");
        let name = |name: &str| symlink(format!("../../devices/virtual/block/{name}"), &number);
        let mut served = BTreeSet::new();
        let mut own = || own(root.path(), 259 << 20 | 3, &mut served);
        assert_eq!(own().as_deref(), Some("259:3"));
        name("ublkb0").unwrap();
        assert_eq!(own(), None);
        fs::remove_file(&number).unwrap();
        assert_eq!(own(), None);
        name("nvme0n1p3").unwrap();
        assert_eq!(own().as_deref(), Some("nvme0n1p3"));
    }

    const STATS: &str = " 8 0 sda 1 0 8 1 1 0 8 1 2 1 1 0 0 0 0 0 0
 8 1 sda1 1 0 8 1 1 0 8 1 1 1 1 0 0 0 0 0 0
 8 16 sdb 1 0 8 1 1 0 8 1 0 1 1 0 0 0 0 0 0
 8 32 sdc 1 0 8 1 1 0 8 1 0 1 1 0 0 0 0 0 0
 259 3 nvme0c0n1 1 0 8 1 1 0 8 1 1 1 1 0 0 0 0 0 0
";

    #[test]
    fn what_a_disk_has_under_way_is_known_where_the_kernel_counts_it() {
        let root = root(&[
            ("proc/diskstats", STATS),
            ("sys/block/sda/queue/iostats", "1\n"),
            ("sys/block/sda/sda1/partition", "1\n"),
            ("sys/block/sdb/queue/iostats", "1\n"),
            ("sys/block/sdc/queue/iostats", "0\n"),
        ]);
        let of = |device| under_way(root.path(), device);
        assert_eq!(of(8 << 20), UnderWay::Count(3));
        let release = root.path().join("proc/sys/kernel/osrelease");
        fs::create_dir_all(release.parent().unwrap()).unwrap();
        for (version, counted) in [
            ("6.9.12-100.fc38\n", UnderWay::Count(3)),
            ("6.12.7-amd64\n", UnderWay::All(3)),
        ] {
            fs::write(&release, version).unwrap();
            assert_eq!(of(8 << 20), counted, "{version}");
        }
        fs::remove_file(&release).unwrap();
        assert_eq!(of(8 << 20 | 16), UnderWay::Count(0));
        assert_eq!(of(8 << 20 | 32), UnderWay::Unknown, "it does not count");
        assert_eq!(of(8 << 20 | 48), UnderWay::Gone);
        let hidden = STATS.replace("259 3", "0 0");
        fs::write(root.path().join("proc/diskstats"), hidden).unwrap();
        assert_eq!(of(259 << 20 | 3), UnderWay::Unknown, "it has no number");
        fs::remove_file(root.path().join("proc/diskstats")).unwrap();
        assert_eq!(of(8 << 20), UnderWay::Unknown);
    }

    #[test]
    fn a_path_without_a_number_in_sysfs_has_the_name_that_the_statistics_give_it() {
        let root = root(&[("proc/diskstats", STATS)]);
        assert_eq!(name(root.path(), 259 << 20 | 3), "nvme0c0n1");
        assert_eq!(name(root.path(), 259 << 20 | 4), "259:4");
    }

    /// Links below a root, each with what it leads to.
    fn link(root: &Path, links: &[(&str, &str)]) {
        for (at, to) in links {
            let at = root.join(at);
            fs::create_dir_all(at.parent().unwrap()).unwrap();
            symlink(root.join(to), at).unwrap();
        }
    }

    fn again(root: &Path, table: &str, disk: &str) -> Again {
        let mounts = mounts(table);
        counted_again(root, || &mounts, disk)
    }

    #[test]
    fn paths_of_a_multipath_device_that_has_requests_are_counted_there_too() {
        let root = root(&[
            ("sys/block/dm-0/dm/uuid", "mpath-3600508b4\n"),
            ("sys/block/dm-0/mq/0/nr_tags", "64\n"),
            ("sys/block/dm-1/dm/uuid", "mpath-3600508b5\n"),
            ("sys/block/dm-2/dm/uuid", "LVM-abc\n"),
        ]);
        for (disk, holder) in [("sda", "dm-0"), ("sdb", "dm-1"), ("sdc", "dm-2")] {
            let at = format!("sys/block/{disk}/holders/{holder}");
            link(root.path(), &[(&at, &format!("sys/block/{holder}"))]);
        }
        let of = |disk| again(root.path(), "", disk);
        assert_eq!(of("sda"), Again::AsPath);
        assert_eq!(of("sdb"), Again::No, "the multipath device takes bios");
        let paths = ["sda", "sdb", "sdc", "dm-0"].map(|disk| is_path(root.path(), disk));
        assert_eq!(paths, [true, true, false, false]);
        for disk in ["sdc", "vda", "259:7"] {
            assert_eq!(of(disk), Again::No, "{disk}");
        }
    }

    /// A file on each of the mounts, and a loop device over each file by its number in the table.
    const MOUNTS: &str = "\
20 1 8:1 / / rw - ext4 /dev/sda1 rw
21 20 0:25 / /tmp rw - tmpfs tmpfs rw
22 20 0:26 / /far\\040away rw - nfs4 far:/ rw
23 20 0:27 / /layered rw - overlay overlay rw
24 20 253:0 / /memory rw - ext4 /dev/zram0 rw
25 20 0:28 / /btrfs rw - btrfs /dev/mapper/group-one rw
26 20 254:2 / /mixed rw - xfs /dev/mapper/two rw
27 20 9:5 / /parity rw - xfs /dev/md5 rw
28 20 259:4 / /paths rw - xfs /dev/nvme0n1p1 rw
29 20 8:2 / /old rw - vfat /dev/sda2 rw
";

    fn loops() -> tempfile::TempDir {
        let root = root(&[
            ("proc/sys/kernel/osrelease", "5.14.0-427.el9.x86_64\n"),
            ("sys/devices/sda/mq/0/nr_tags", "64\n"),
            ("sys/devices/sda/sda1/partition", "1\n"),
            ("sys/devices/sda/sda2/partition", "2\n"),
            ("sys/devices/zram0/slaves/.made", ""),
            ("sys/devices/dm-1/dm/uuid", "LVM-abc\n"),
            ("sys/devices/md5/md/level", "raid5\n"),
            (
                "sys/devices/nvme-subsys0/nvme0n1/nvme0n1p1/partition",
                "1\n",
            ),
            ("dev/dm-1", ""),
        ]);
        link(
            root.path(),
            &[
                ("sys/dev/block/8:1", "sys/devices/sda/sda1"),
                ("sys/dev/block/8:2", "sys/devices/sda/sda2"),
                ("sys/dev/block/253:0", "sys/devices/zram0"),
                ("sys/dev/block/254:2", "sys/devices/dm-2"),
                ("sys/dev/block/9:5", "sys/devices/md5"),
                (
                    "sys/dev/block/259:4",
                    "sys/devices/nvme-subsys0/nvme0n1/nvme0n1p1",
                ),
                ("sys/class/block/dm-1", "sys/devices/dm-1"),
                ("sys/devices/dm-1/slaves/sda1", "sys/devices/sda/sda1"),
                ("sys/devices/dm-2/slaves/sda1", "sys/devices/sda/sda1"),
                ("sys/devices/dm-2/slaves/zram0", "sys/devices/zram0"),
                ("sys/devices/md5/slaves/sda1", "sys/devices/sda/sda1"),
                ("dev/mapper/group-one", "dev/dm-1"),
            ],
        );
        for (disk, file) in [
            ("root", "/srv/image"),
            ("tmp", "/tmp/image (deleted)"),
            ("far", "/far away/image"),
            ("layered", "/layered/image"),
            ("memory", "/memory/image"),
            ("btrfs", "/btrfs/image"),
            ("mixed", "/mixed/image"),
            ("parity", "/parity/image"),
            ("paths", "/paths/image"),
            ("old", "/old/image"),
            ("device", "/dev/dm-2"),
        ] {
            let at = root.path().join(format!("sys/block/{disk}/loop"));
            fs::create_dir_all(&at).unwrap();
            fs::write(at.join("backing_file"), format!("{file}\n")).unwrap();
        }
        root
    }

    #[test]
    fn a_loop_device_is_counted_at_the_disk_of_its_file_where_that_has_requests() {
        let root = loops();
        let of = |disk| again(root.path(), MOUNTS, disk);
        for disk in ["root", "btrfs", "paths"] {
            assert_eq!(of(disk), Again::ByItsFile { charged: true }, "{disk}");
        }
        for disk in ["tmp", "far", "layered", "memory", "mixed", "device"] {
            assert_eq!(of(disk), Again::No, "{disk}");
        }
    }

    #[test]
    fn what_a_loop_device_does_to_its_file_is_charged_only_where_kernel_file_system_and_array_do_so()
     {
        let root = loops();
        let of = |disk| again(root.path(), MOUNTS, disk);
        for disk in ["parity", "old"] {
            assert_eq!(of(disk), Again::ByItsFile { charged: false }, "{disk}");
        }
        let release = root.path().join("proc/sys/kernel/osrelease");
        fs::write(&release, "5.10.0-28-amd64\n").unwrap();
        assert_eq!(of("root"), Again::ByItsFile { charged: false });
        fs::write(root.path().join("sys/block/root/loop/dio"), "1\n").unwrap();
        assert_eq!(of("root"), Again::ByItsFile { charged: true });
        fs::remove_file(root.path().join("sys/block/root/loop/dio")).unwrap();
        fs::remove_file(&release).unwrap();
        assert_eq!(of("root"), Again::ByItsFile { charged: false });
    }

    #[test]
    fn what_threads_of_the_kernel_do_is_charged_to_the_root_and_where_both_controllers_are() {
        let root = root(&[
            ("cgroup.procs", ""),
            ("both/cgroup.type", "domain\n"),
            ("both/io.stat", ""),
            ("both/memory.stat", ""),
            ("one/cgroup.type", "domain\n"),
            ("one/memory.stat", ""),
        ]);
        assert!(is_charged(root.path(), true) && is_charged(root.path(), false));
        let of = |name, passes_on| is_charged(&root.path().join(name), passes_on);
        assert!(of("both", true) && !of("both", false));
        assert!(!of("one", true));
        assert!(!of("gone", true));
    }
}
