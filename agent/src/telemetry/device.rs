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
        let place = Self {
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

    /// A setting of the disk's queue; empty when it has none of this name.
    #[must_use]
    pub fn queue(&self, name: &str) -> String {
        let disk = if self.is_part { ".." } else { "." };
        let path = self.sysfs.join(disk).join("queue").join(name);
        let text = fs::read_to_string(path).unwrap_or_default();
        text.trim().to_owned()
    }

    /// What is another when another disk has its number, or when it has another size.
    #[must_use]
    pub fn incarnation(&self) -> (u64, String) {
        let disk = if self.is_part { ".." } else { "." };
        let number = fs::read_to_string(self.sysfs.join(disk).join("diskseq"));
        (self.sectors, number.unwrap_or_default())
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
