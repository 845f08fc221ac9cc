//! Kinds, device numbers and times between FUSE and the kernel's calls.

use fuser::{FileType, TimeOrNow};
use nix::sys::stat::SFlag;
use nix::sys::time::TimeSpec;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub(super) fn kind(mode: u32) -> FileType {
    match SFlag::from_bits_truncate(mode) & SFlag::S_IFMT {
        SFlag::S_IFDIR => FileType::Directory,
        SFlag::S_IFLNK => FileType::Symlink,
        SFlag::S_IFIFO => FileType::NamedPipe,
        SFlag::S_IFSOCK => FileType::Socket,
        SFlag::S_IFCHR => FileType::CharDevice,
        SFlag::S_IFBLK => FileType::BlockDevice,
        _ => FileType::RegularFile,
    }
}

/// A device number as FUSE has it on the wire (`new_encode_dev` of the kernel's `kdev_t.h`).
pub(super) fn encoded(device: u64) -> u32 {
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    ((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)) as u32
}

/// The device number that [`encoded`] gave.
pub(super) fn decoded(device: u32) -> u64 {
    let minor = (device & 0xff) | ((device >> 12) & 0xf_ff00);
    nix::sys::stat::makedev(u64::from((device & 0xf_ff00) >> 8), u64::from(minor))
}

pub(super) fn system_time(seconds: i64, nanoseconds: i64) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let whole = if seconds < 0 {
        UNIX_EPOCH - whole
    } else {
        UNIX_EPOCH + whole
    };
    whole + Duration::from_nanos(nanoseconds.unsigned_abs())
}

pub(super) fn spec(time: Option<TimeOrNow>) -> TimeSpec {
    match time {
        None => TimeSpec::UTIME_OMIT,
        Some(TimeOrNow::Now) => TimeSpec::UTIME_NOW,
        Some(TimeOrNow::SpecificTime(time)) => match time.duration_since(UNIX_EPOCH) {
            Ok(since) => TimeSpec::from_duration(since),
            // The crate reads seconds before 1970 and their nanoseconds as if both counted downwards.
            Err(before) => {
                let before = before.duration();
                let seconds = i64::try_from(before.as_secs()).unwrap_or(i64::MAX);
                TimeSpec::new(-seconds, i64::from(before.subsec_nanos()))
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_survive_the_wire() {
        for (major, minor) in [(1, 3), (8, 17), (259, 70_000), (4095, 1_048_575)] {
            let device = nix::sys::stat::makedev(major, minor);
            assert_eq!(decoded(encoded(device)), device, "{major}:{minor}");
        }
    }
}
