//! What moves: volumes, and where each lies on source and target.

use super::ids::{ContainerName, VolumeId};
use super::units::Bytes;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// What a volume is to the runtime.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VolumeKind {
    /// A runtime volume with this name.
    Named(String),
    /// A host directory, at the same path on the target.
    Bind,
    /// A single host file, as a disk image, at the same path on the target.
    File,
    /// A block device of the host: its bytes.
    Device,
    /// A container image, exported as one archive file in a directory of its own.
    Image(String),
}

impl VolumeKind {
    /// Whether it is one file or block device and not a directory tree.
    #[must_use]
    pub fn is_one(&self) -> bool {
        matches!(self, Self::File | Self::Device)
    }
}

/// How the source finds what changed since the epoch before.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ChangesBy {
    /// Change times and sizes of files.
    #[default]
    ChangeTimes,
    /// The same, and within large files the kernel notes which extents of their device are written.
    WrittenExtents,
    /// The kernel notes which extents of the device are written.
    DirtyExtents,
    /// Every block is read and signed again; why.
    HashScan(String),
}

impl std::fmt::Display for ChangesBy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::ChangeTimes => f.write_str("by change times"),
            Self::WrittenExtents => f.write_str(
                "by change times, and within large files by the extents that the kernel notes as written",
            ),
            Self::DirtyExtents => f.write_str("by dirty extents, as the kernel notes them"),
            Self::HashScan(why) => write!(f, "by reading every block again: {why}"),
        }
    }
}

/// What of a volume of one piece need not move, because the file system on it does not use it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unused {
    /// There is no file system of which it is known.
    #[default]
    Unknown,
    /// It arrives as zeros or holes.
    LeftOut {
        /// The file system.
        file_system: String,
        /// How much that is, as long as nothing is written to it.
        bytes: Bytes,
    },
    /// It is sent all the same.
    Sent {
        /// The file system.
        file_system: String,
        /// Why.
        why: String,
    },
}

impl Unused {
    /// How much is left out.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        match self {
            Self::LeftOut { bytes, .. } => *bytes,
            Self::Unknown | Self::Sent { .. } => Bytes(0),
        }
    }
}

/// Which times of modification a file system keeps: whole steps between two bounds. What lies between two steps becomes
/// the earlier one, what lies outside the bound (`timestamp_truncate` of Linux, fs/inode.c).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimesKept {
    /// First second since the Unix epoch.
    pub earliest: i64,
    /// Last second.
    pub latest: i64,
    /// Nanoseconds from one to the next.
    pub step_ns: u64,
}

impl Default for TimesKept {
    /// All that can be written down.
    fn default() -> Self {
        Self {
            earliest: i64::MIN,
            latest: i64::MAX,
            step_ns: 1,
        }
    }
}

impl TimesKept {
    /// What becomes of a time, in seconds since the Unix epoch and nanoseconds.
    #[must_use]
    pub fn kept(&self, seconds: i64, nanoseconds: i64) -> (i64, i64) {
        const SECOND: i128 = 1_000_000_000;
        let bounded = seconds.max(self.earliest).min(self.latest);
        if bounded == self.earliest || bounded == self.latest {
            return (bounded, 0);
        }
        let time = i128::from(bounded) * SECOND + i128::from(nanoseconds);
        let step = time - time.rem_euclid(i128::from(self.step_ns.max(1)));
        match i64::try_from(step.div_euclid(SECOND)) {
            Ok(second) => (second, step.rem_euclid(SECOND) as i64),
            // Before the first second that can be written down.
            Err(_) => (bounded, 0),
        }
    }
}

/// One unit of data that moves: a directory tree, or a single file or block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSpec {
    /// Number within the plan.
    pub id: VolumeId,
    /// Name for people.
    pub name: String,
    /// What it is to the runtime.
    pub kind: VolumeKind,
    /// Directory, file or device on the source.
    pub source_path: PathBuf,
    /// Containers that mount it.
    pub containers: Vec<ContainerName>,
    /// Apparent size when the plan was made.
    pub size: Bytes,
    /// What of that is holes of files, which are told and do not move.
    #[serde(default)]
    pub holes: Bytes,
    /// Entries (files, directories, links, …) when the plan was made.
    pub entries: u64,
    /// Device nodes among them.
    #[serde(default)]
    pub device_nodes: u64,
    /// Entries and directories that the disk did not give up when the plan was made, and which are not counted.
    #[serde(default)]
    pub unreadable: u64,
    /// How its changes are found.
    #[serde(default)]
    pub changes: ChangesBy,
    /// What of it need not move.
    #[serde(default)]
    pub unused: Unused,
}

impl VolumeSpec {
    /// What is left of its size when what need not move is taken away.
    #[must_use]
    pub fn to_move(&self) -> Bytes {
        // What a file system does not use may well be holes of its image.
        let stays = self.holes.max(self.unused.bytes());
        Bytes(self.size.0.saturating_sub(stays.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_time_that_was_kept_is_kept_as_it_is_and_never_becomes_a_later_one_within_the_bounds(
            bounds in any::<(i64, i64)>(),
            step_ns in prop_oneof![Just(1), Just(100), Just(1_000_000_000), Just(2_000_000_000), any::<u64>()],
            seconds in prop_oneof![any::<i64>(), -5_000_000_000..5_000_000_000_i64],
            nanoseconds in 0..1_000_000_000_i64,
        ) {
            let bounds = (bounds.0.min(bounds.1), bounds.0.max(bounds.1));
            for (earliest, latest) in [bounds, (i64::MIN, i64::MAX), (-(1 << 31), (1 << 31) - 1)] {
                let times = TimesKept { earliest, latest, step_ns };
                let kept = times.kept(seconds, nanoseconds);
                prop_assert!((0..1_000_000_000).contains(&kept.1));
                prop_assert!(kept <= (seconds, nanoseconds) || kept == (earliest, 0));
                if step_ns <= 2_000_000_000 && kept.0 > earliest {
                    prop_assert_eq!(times.kept(kept.0, kept.1), kept);
                }
            }
        }
    }
}
