//! What procfs and sysfs say of the disks whose requests the kernel programs count.

use super::block::UnderWay;
use super::host::{entries, text};
use crate::model::mounts;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// File systems whose files lie on no disk of this host.
const ON_NO_DISK: [&str; 13] = [
    "tmpfs",
    "ramfs",
    "rootfs",
    "hugetlbfs",
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "9p",
    "virtiofs",
    "ceph",
    "fuse",
    "afs",
];

/// Whether what a disk does is counted a second time, at another disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Again {
    /// It is not.
    No,
    /// At the multipath device of which it is a path: what fails here is tried on another path there.
    AsPath,
    /// At the disk on which the file behind this loop device lies, by a thread of the kernel.
    ByItsFile,
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

/// Whether what a disk of this name does is counted at another one too.
pub fn counted_again(root: &Path, disk: &str) -> Again {
    let block = root.join("sys/block");
    let is_multipath = |holder: &PathBuf| {
        // One that takes bios has no requests that could be counted.
        let uuid = text(&holder.join("dm/uuid"));
        holder.join("mq").exists() && uuid.is_some_and(|uuid| uuid.starts_with("mpath-"))
    };
    if entries(&block.join(disk).join("holders"))
        .iter()
        .any(is_multipath)
    {
        return Again::AsPath;
    }
    match text(&block.join(disk).join("loop/backing_file")) {
        Some(file) if lies_on_a_disk(root, Path::new(&file)) => Again::ByItsFile,
        _ => Again::No,
    }
}

/// Whether a file lies on a disk of this host. A device file does not: what is below may be none that has requests.
fn lies_on_a_disk(root: &Path, file: &Path) -> bool {
    if file.starts_with("/dev") {
        return false;
    }
    let table = fs::read_to_string(root.join("proc/self/mountinfo")).unwrap_or_default();
    let above = table.lines().filter_map(mounts::parse).filter(|mount| {
        // One that is mounted in another's place counts, the last of them.
        file.starts_with(&mount.point)
    });
    let mount = above.max_by_key(|mount| mount.point.components().count());
    mount.is_some_and(|mount| {
        let kind = mount.file_system;
        !ON_NO_DISK.contains(&kind) && !kind.starts_with("fuse.")
    })
}

/// Whether what the kernel's threads write and read for tasks of a cgroup2 directory is counted for it: it is the root,
/// or the kernel charges both to it.
pub fn is_charged(cgroup: &Path) -> bool {
    let has = |file: &str| cgroup.join(file).exists();
    // The root has no type.
    !has("cgroup.type") || (has("io.stat") && has("memory.stat"))
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
    UnderWay::Count(of_disk.sum())
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

    #[test]
    fn paths_of_a_multipath_device_and_loops_over_files_on_disks_are_counted_elsewhere_too() {
        let table = "22 1 8:1 / / rw - ext4 /dev/sda1 rw
23 22 0:25 / /tmp rw - tmpfs tmpfs rw
24 22 0:26 / /srv/far\\040away rw - nfs4 far:/ rw
";
        let root = root(&[
            ("proc/self/mountinfo", table),
            ("sys/block/dm-0/dm/uuid", "mpath-3600508b4\n"),
            ("sys/block/dm-0/mq/0/nr_tags", "64\n"),
            ("sys/block/dm-1/dm/uuid", "mpath-3600508b5\n"),
            ("sys/block/dm-2/dm/uuid", "LVM-abc\n"),
            ("sys/block/sda/holders/.made", ""),
            ("sys/block/sdb/holders/.made", ""),
            ("sys/block/sdc/holders/.made", ""),
            ("sys/block/loop0/loop/backing_file", "/srv/image\n"),
            (
                "sys/block/loop1/loop/backing_file",
                "/tmp/image (deleted)\n",
            ),
            ("sys/block/loop2/loop/backing_file", "/srv/far away/image\n"),
            ("sys/block/loop3/loop/backing_file", "/dev/dm-2\n"),
        ]);
        for (disk, holder) in [("sda", "dm-0"), ("sdb", "dm-1"), ("sdc", "dm-2")] {
            let at = root
                .path()
                .join(format!("sys/block/{disk}/holders/{holder}"));
            symlink(format!("../../{holder}"), at).unwrap();
        }
        let of = |disk| counted_again(root.path(), disk);
        assert_eq!(of("sda"), Again::AsPath);
        assert_eq!(of("sdb"), Again::No, "the multipath device takes bios");
        assert_eq!(of("sdc"), Again::No);
        assert_eq!(of("loop0"), Again::ByItsFile);
        for disk in ["loop1", "loop2", "loop3", "vda", "259:7"] {
            assert_eq!(of(disk), Again::No, "{disk}");
        }
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
        assert!(is_charged(root.path()));
        assert!(is_charged(&root.path().join("both")));
        assert!(!is_charged(&root.path().join("one")));
    }
}
