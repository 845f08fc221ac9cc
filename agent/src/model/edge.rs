//! Evidence that one container depends on another.

use super::ids::ContainerName;
use super::units::{Bytes, UnixMillis};
use serde::{Deserialize, Serialize};

/// How an edge was learnt.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Learnt {
    /// The kernel showed the connection being made: the role is certain.
    Observed,
    /// The connection is older than the agent; the role comes from the listen table.
    Inferred,
    /// A person wrote it down.
    #[default]
    Declared,
}

/// Transport of an edge.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP over IPv4 or IPv6.
    #[default]
    Tcp,
    /// UDP over IPv4 or IPv6.
    Udp,
}

/// A child (which sends requests) depends on a parent (which receives them), and why we say so.
///
/// In a hand-written file only the two ends are required; the rest then says "declared".
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Edge {
    /// The container that sends requests.
    pub child: ContainerName,
    /// The container that receives them.
    pub parent: ContainerName,
    /// The parent's service port; 0 when declared without one.
    #[serde(default)]
    pub port: u16,
    /// Transport.
    #[serde(default)]
    pub protocol: Protocol,
    /// How it was learnt.
    #[serde(default)]
    pub learnt: Learnt,
    /// Connections seen since the agent started.
    #[serde(default)]
    pub connections: u64,
    /// Bytes from child to parent.
    #[serde(default)]
    pub bytes_to_parent: Bytes,
    /// Bytes from parent to child.
    #[serde(default)]
    pub bytes_to_child: Bytes,
    /// First time it was seen.
    #[serde(default)]
    pub first_seen: UnixMillis,
    /// Last time it was seen.
    #[serde(default)]
    pub last_seen: UnixMillis,
}

/// Two containers that use the same registration id: HAS-A both ways.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Correlated(pub ContainerName, pub ContainerName);
