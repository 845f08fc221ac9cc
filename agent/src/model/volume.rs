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
    /// The kernel notes which extents of the device are written.
    DirtyExtents,
    /// Every block is read and signed again; why.
    HashScan(String),
}

impl std::fmt::Display for ChangesBy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::ChangeTimes => f.write_str("by change times"),
            Self::DirtyExtents => f.write_str("by dirty extents, as the kernel notes them"),
            Self::HashScan(why) => write!(f, "by reading every block again: {why}"),
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
    /// How its changes are found.
    #[serde(default)]
    pub changes: ChangesBy,
}
