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
    /// A container image, exported as one archive file in a directory of its own.
    Image(String),
}

/// One unit of data that moves. Always a directory tree in this version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSpec {
    /// Number within the plan.
    pub id: VolumeId,
    /// Name for people.
    pub name: String,
    /// What it is to the runtime.
    pub kind: VolumeKind,
    /// Directory on the source.
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
}
