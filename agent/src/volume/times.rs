//! Times of modification that the target's file system cannot keep: learnt there once, applied on the source before
//! anything is sent, so that what is sent, signed by the root and found on the target's disk later is the same.
//!
//! Invariant: what becomes another time is counted, and the first of it named.

use super::apply::fd_path;
use super::confined::open_beneath;
use super::tree::{Exception, shown};
use crate::model::units::{UnixMillis, utc};
use crate::model::volume::TimesKept;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::{FileStat, Mode, fstat, futimens};
use nix::sys::time::TimeSpec;
use nix::unistd::{UnlinkatFlags, unlinkat};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

/// Which times the file system of a directory keeps: tried with a file that is never seen there.
///
/// # Errors
/// No file can be made there, or its time cannot be set and read back.
pub fn kept_in(directory: &Path) -> io::Result<TimesKept> {
    let directory = File::open(directory)?;
    let file = scratch(directory.as_fd())?;
    let set = |seconds, nanoseconds| -> Result<(i64, i64), Errno> {
        let time = TimeSpec::new(seconds, nanoseconds);
        futimens(&file, &TimeSpec::UTIME_OMIT, &time)?;
        let stat = fstat(&file)?;
        Ok((stat.st_mtime, stat.st_mtime_nsec))
    };
    // An odd second, because FAT keeps the even ones, and as much of it as there is.
    const TRIED: (i64, i64) = (1_000_000_001, 999_999_999);
    let (latest, _) = set(i64::MAX, 0)?;
    let (earliest, _) = set(i64::MIN, 0)?;
    let (second, nanosecond) = set(TRIED.0, TRIED.1)?;
    let nanos = |(second, nanosecond): (i64, i64)| {
        i128::from(second) * 1_000_000_000 + i128::from(nanosecond)
    };
    let cut: i128 = nanos(TRIED) - nanos((second, nanosecond));
    match u64::try_from(cut) {
        Ok(cut) if earliest < second && TRIED.0 < latest && cut < 60_000_000_000 => Ok(TimesKept {
            earliest,
            latest,
            step_ns: cut + 1,
        }),
        _ => Err(io::Error::other("it keeps other times than it is given")),
    }
}

fn scratch(directory: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let private = Mode::S_IRUSR | Mode::S_IWUSR;
    let unnamed = OFlag::O_TMPFILE | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
    match nix::fcntl::open(fd_path(directory).as_str(), unnamed, private) {
        // Not every file system has files without a name.
        Err(Errno::EOPNOTSUPP | Errno::EISDIR | Errno::ENOENT | Errno::EINVAL) => {
            let name = ".lifeboat-times";
            let flags = OFlag::O_CREAT | OFlag::O_WRONLY;
            let file = open_beneath(directory, name.as_bytes(), flags, private)?;
            unlinkat(directory, name, UnlinkatFlags::NoRemoveDir)?;
            Ok(file)
        }
        other => other,
    }
}

/// What arrives with another time than it has.
#[derive(Debug, Default)]
pub(super) struct Changed {
    cut: Names,
    early: Names,
    late: Names,
}

/// Names, of which the first are kept.
#[derive(Debug, Default)]
struct Names {
    first: Vec<String>,
    count: u64,
}

impl Changed {
    /// Gives `stat` of what lies at `path` the time that the target keeps.
    pub(super) fn keep(&mut self, times: &TimesKept, path: &[u8], stat: &mut FileStat) {
        let before = (stat.st_mtime, stat.st_mtime_nsec);
        if !set_kept(times, stat) {
            return;
        }
        let names = match before.0 {
            early if early <= times.earliest => &mut self.early,
            late if late >= times.latest => &mut self.late,
            _ => &mut self.cut,
        };
        const FIRST: u64 = 5;
        if names.count < FIRST {
            names.first.push(shown(path).into_owned());
        }
        names.count += 1;
    }

    /// The same for people: a line for each way in which times change.
    pub(super) fn exceptions(self, times: &TimesKept) -> impl Iterator<Item = Exception> {
        let step = std::time::Duration::from_nanos(times.step_ns);
        let bound = |seconds, which| {
            format!(
                "the time of modification becomes {}, the {which} that the target's file system keeps",
                date(seconds)
            )
        };
        let step = format!(
            "the time of modification is cut to whole {step:?}, which is all that the target's file system keeps"
        );
        let ways = [
            (self.cut, step),
            (self.early, bound(times.earliest, "earliest")),
            (self.late, bound(times.latest, "latest")),
        ];
        ways.into_iter()
            .filter(|(names, _)| names.count > 0)
            .map(|(names, reason)| Exception {
                path: names.to_string(),
                reason,
            })
    }
}

impl std::fmt::Display for Names {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.first.join(", "))?;
        match self.count - self.first.len() as u64 {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// Gives `stat` the time that is kept; whether it had another one.
pub(super) fn set_kept(times: &TimesKept, stat: &mut FileStat) -> bool {
    let before = (stat.st_mtime, stat.st_mtime_nsec);
    (stat.st_mtime, stat.st_mtime_nsec) = times.kept(before.0, before.1);
    (stat.st_mtime, stat.st_mtime_nsec) != before
}

fn date(seconds: i64) -> String {
    match u64::try_from(seconds) {
        Ok(seconds) => utc(UnixMillis(seconds.saturating_mul(1000))),
        Err(_) => format!("{} s before 1970", seconds.unsigned_abs()),
    }
}
