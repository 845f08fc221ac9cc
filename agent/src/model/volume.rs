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
        Bytes(self.size.0.saturating_sub(self.unused.bytes().0))
    }
}
