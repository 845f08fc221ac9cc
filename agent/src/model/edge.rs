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
    /// The connection was found open: it is older than the agent, or of a kind whose making the kernel
    /// does not show. The role comes from the socket tables.
    Inferred,
    /// A person wrote it down.
    #[default]
    Declared,
}

/// What an edge was learnt from, the surest first.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum How {
    /// Both ends of a connection were seen and matched; addresses play no part.
    BothEnds,
    /// As that, at a proxy that holds the parent's published port: its hop is left out.
    Proxy,
    /// One end was seen; the other was found by its address and port.
    OneEnd,
    /// The socket tables of a network namespace.
    SocketTable,
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
    /// Unix domain socket.
    Unix,
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
    /// The parent's service port; 0 for a unix socket, and when declared without one.
    #[serde(default)]
    pub port: u16,
    /// Transport.
    #[serde(default)]
    pub protocol: Protocol,
    /// How it was learnt.
    #[serde(default)]
    pub learnt: Learnt,
    /// What it was learnt from.
    #[serde(default)]
    pub how: How,
    /// Whether nothing of it was open or new for a while: it is history, and still counts.
    #[serde(default)]
    pub stale: bool,
    /// Connections seen; for UDP, pairs of a socket and a peer.
    #[serde(default)]
    pub connections: u64,
    /// Bytes from child to parent; none where they are not counted.
    #[serde(default)]
    pub bytes_to_parent: Option<Bytes>,
    /// Bytes from parent to child; none where they are not counted.
    #[serde(default)]
    pub bytes_to_child: Option<Bytes>,
    /// Segments sent again, either way; none where they are not counted.
    #[serde(default)]
    pub retransmits: Option<u64>,
    /// Smoothed round-trip time, µs, as the child's last connection had it, else the parent's.
    #[serde(default)]
    pub srtt_us: Option<u32>,
    /// First time it was seen.
    #[serde(default)]
    pub first_seen: UnixMillis,
    /// Last time it was seen.
    #[serde(default)]
    pub last_seen: UnixMillis,
}

impl Edge {
    /// The parent's service as people write it behind its name: `:5432`, `:53/udp`, ` (unix socket)`.
    #[must_use]
    pub fn service(&self) -> String {
        match (self.protocol, self.port) {
            (Protocol::Unix, _) => " (unix socket)".to_owned(),
            (_, 0) => String::new(),
            (Protocol::Tcp, port) => format!(":{port}"),
            (Protocol::Udp, port) => format!(":{port}/udp"),
        }
    }
}

/// Two containers that use the same registration id: HAS-A both ways.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Correlated(pub ContainerName, pub ContainerName);
