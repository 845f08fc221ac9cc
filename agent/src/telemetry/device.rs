//! Where a block device lies, as sysfs tells it.

use std::ffi::CString;
use std::fs;
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// A disk, or a partition of one.
pub struct Place {
    /// Its directory in sysfs.
    sysfs: PathBuf,
    is_part: bool,
    /// The name of its disk.
    pub disk_name: String,
    /// Its disk, as the kernel's dev_t: major << 20 | minor.
    pub disk: u32,
    /// First sector on the disk.
    pub first_sector: u64,
    /// Sectors; not 0.
    pub sectors: u64,
    /// Whether the disk takes requests, of which the kernel traces the end, and not bios themselves.
    pub takes_requests: bool,
}

/// The mount on which a path lies; unique where the kernel has such numbers (Linux 6.8).
#[must_use]
pub fn mount_id(path: &Path) -> Option<u64> {
    /// Of linux/stat.h.
    const STATX_MNT_ID_UNIQUE: libc::c_uint = 0x4000;
    let wanted = libc::STATX_MNT_ID | STATX_MNT_ID_UNIQUE;
    let path = CString::new(path.as_os_str().as_bytes()).ok()?;
    let mut told = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path ends with NUL, and the kernel writes one `struct statx`, all of which may be zeros.
    let told = unsafe {
        let flags = libc::AT_STATX_DONT_SYNC;
        if libc::statx(
            libc::AT_FDCWD,
            path.as_ptr(),
            flags,
            wanted,
            told.as_mut_ptr(),
        ) != 0
        {
            return None;
        }
        told.assume_init()
    };
    (told.stx_mask & wanted != 0).then_some(told.stx_mnt_id)
}

/// The number of a device file.
///
/// # Errors
/// Why it is none; the text names no device.
pub fn number(device: &Path) -> Result<u64, String> {
    let metadata = fs::metadata(device).map_err(|error| error.to_string())?;
    if !metadata.file_type().is_block_device() {
        return Err("it is no block device".to_owned());
    }
    Ok(metadata.rdev())
}

impl Place {
    /// Finds a device by its number (as stat(2) has it); `root` is the root of sysfs.
    ///
    /// # Errors
    /// What sysfs lacks.
    pub fn find(root: &Path, number: u64) -> Result<Self, String> {
        let (major, minor) = (nix::sys::stat::major(number), nix::sys::stat::minor(number));
        let sysfs = root.join(format!("sys/dev/block/{major}:{minor}"));
        let read = |path: &str| {
            let path = sysfs.join(path);
            fs::read_to_string(&path)
                .map(|text| text.trim().to_owned())
                .map_err(|error| format!("{}: {error}", path.display()))
        };
        let is_part = sysfs.join("partition").exists();
        let disk = read(if is_part { "../dev" } else { "dev" })?;
        let (major, minor) = disk
            .split_once(':')
            .and_then(|(major, minor)| {
                Some((major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?))
            })
            .ok_or_else(|| format!("its disk is {disk}"))?;
        let sectors = |path: &str| {
            let text = read(path)?;
            text.parse::<u64>()
                .map_err(|_| format!("its {path} is {text}"))
        };
        // A link such as `../../devices/virtual/block/md0/md0p1`.
        let link = fs::read_link(&sysfs).unwrap_or_default();
        let directory = link.ancestors().nth(usize::from(is_part));
        let disk_name = directory.and_then(Path::file_name).unwrap_or_default();
        let place = Self {
            disk_name: disk_name.to_string_lossy().into_owned(),
            disk: major << 20 | minor,
            first_sector: if is_part { sectors("start")? } else { 0 },
            sectors: sectors("size")?,
            takes_requests: sysfs.join(if is_part { "../mq" } else { "mq" }).exists(),
            is_part,
            sysfs,
        };
        if place.sectors == 0 {
            return Err("it is empty".to_owned());
        }
        Ok(place)
    }

    /// A file of the disk in sysfs, as `queue/zoned`; empty when it has none of this name.
    #[must_use]
    pub fn of_disk(&self, name: &str) -> String {
        let disk = if self.is_part { ".." } else { "." };
        let text = fs::read_to_string(self.sysfs.join(disk).join(name)).unwrap_or_default();
        text.trim().to_owned()
    }

    /// Whether the end of each of its writes is traced as one of its own: it takes requests, or makes bios of its own
    /// for what is below. Where the very same bio is handed down, its end is only that of a request there.
    #[must_use]
    pub fn ends_its_writes(&self) -> bool {
        // The device mapper and DRBD clone; memory has nothing below; a zvol writes its own.
        const OWN: [&str; 6] = ["dm-", "drbd", "zram", "ram", "pmem", "zd"];
        let name = self.disk_name.as_str();
        let is_array = name.starts_with("md");
        // raid0 and linear hand bios down: always before Linux 5.14, then where `iostats` is off.
        let clones = is_array
            && ["raid1", "raid4", "raid5", "raid6", "raid10"]
                .contains(&self.of_disk("md/level").as_str());
        self.takes_requests || clones || OWN.iter().any(|own| name.starts_with(own))
    }

    /// What is another when another disk has its number, or when it has another size.
    #[must_use]
    pub fn incarnation(&self) -> (u64, String) {
        (self.sectors, self.of_disk("diskseq"))
    }

    /// Whether a write is between its beginning and its end.
    #[must_use]
    pub fn writes_under_way(&self) -> bool {
        let text = fs::read_to_string(self.sysfs.join("inflight")).unwrap_or_default();
        text.split_whitespace()
            .nth(1)
            .is_some_and(|writes| writes != "0")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether the writes of a device are ended as its own, whose disk has this name and these files.
    fn ends(disk: &str, part: &str, files: &[(&str, &str)]) -> bool {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("sys/devices/virtual/block").join(disk);
        let own = [("dev", "9:0\n"), ("size", "16\n")];
        let mut all = [&own, files].concat();
        let of_part = ["partition", "start", "size"].map(|file| format!("{part}/{file}"));
        if !part.is_empty() {
            all.extend(of_part.iter().map(|file| (file.as_str(), "8\n")));
        }
        for (file, text) in all {
            let file = directory.join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        }
        let numbers = root.path().join("sys/dev/block");
        fs::create_dir_all(&numbers).unwrap();
        let to = Path::new("../../devices/virtual/block").join(disk);
        std::os::unix::fs::symlink(to.join(part), numbers.join("9:1")).unwrap();
        let place = Place::find(root.path(), nix::sys::stat::makedev(9, 1)).unwrap();
        assert_eq!(place.disk_name, disk);
        place.ends_its_writes()
    }

    #[test]
    fn a_device_that_may_hand_its_bios_down_as_they_are_does_not_end_its_writes() {
        let requests = [("mq/0/nr_tags", "1")];
        assert!(ends("nvme0n1", "", &requests));
        assert!(ends("sda", "sda1", &requests));
        assert!(!ends("nvme0n1", "", &[]), "several paths");
        assert!(!ends("nvme0n1", "nvme0n1p1", &[]));
        assert!(ends("dm-0", "", &[]));
        assert!(ends("md0", "", &[("md/level", "raid1\n")]));
        assert!(ends("md0", "md0p1", &[("md/level", "raid5\n")]));
        for level in ["raid0\n", "linear\n", "\n"] {
            assert!(!ends("md0", "", &[("md/level", level)]), "{level}");
        }
        assert!(!ends("bcache0", "", &[]));
    }
}
