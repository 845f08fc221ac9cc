//! The fleet's words as data: devices, what they have and do now, and what a choice rests on.
//!
//! Invariants: plain data; everything here may cross the control channel and may be shown to a person.
//! Non-goals: secrets, which stay in the `fleet` room.

use super::action::Actions;
use super::ids::{DeviceId, PairingId, PlanId};
use super::units::{Bytes, UnixMillis};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;

/// Where a device's control channel listens, and whose certificate must answer there.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PeerAddress {
    /// The device that must answer.
    pub device: DeviceId,
    /// Its control address.
    pub addr: SocketAddr,
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.device, self.addr)
    }
}

/// A network interface of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// Name.
    pub name: String,
    /// Link speed in Mbit/s, where the driver says.
    pub speed_mbits: Option<u32>,
}

/// What a device is made of; changes only with its hardware, kernel or disks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Configuration {
    /// Online CPUs.
    pub cores: u32,
    /// Memory.
    pub memory: Bytes,
    /// Size of the file system that takes volumes.
    pub storage: Bytes,
    /// Network interfaces without loopback.
    pub nics: Vec<Nic>,
    /// Kernel release.
    pub kernel: String,
    /// Machine architecture, as `uname -m` says.
    pub architecture: String,
}

/// The health engine's verdict, as one word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceVerdict {
    /// Nothing crossed.
    Healthy,
    /// Something crossed, the policy does not call it degraded.
    Suspect,
    /// The policy calls it degraded.
    Degraded,
    /// Data is missing or stale.
    #[default]
    Unknown,
}

impl fmt::Display for DeviceVerdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Healthy => "healthy",
            Self::Suspect => "suspect",
            Self::Degraded => "degraded",
            Self::Unknown => "unknown",
        })
    }
}

/// What a device does now.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Utilisation {
    /// Share of CPU time not idle, percent of all cores.
    pub cpu_percent: f64,
    /// Share of memory in use, percent.
    pub memory_percent: f64,
    /// Memory that can be had without swapping.
    pub memory_free: Bytes,
    /// Share of the volumes' file system in use, percent.
    pub disk_percent: f64,
    /// Free bytes of it for an unprivileged writer.
    pub storage_free: Bytes,
    /// Verdict.
    pub verdict: DeviceVerdict,
    /// Migrations it takes part in as source, paired device or target.
    pub duties: u32,
    /// Host ports that are taken, TCP and UDP together.
    pub ports_taken: BTreeSet<u16>,
    /// Whether it has a usable IPv4 address.
    pub ipv4: bool,
    /// Whether it has a usable IPv6 address.
    pub ipv6: bool,
}

/// A device as the registry knows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Device {
    /// Id.
    pub id: DeviceId,
    /// Control address.
    pub address: SocketAddr,
    /// Configuration; none until its first heartbeat.
    pub configuration: Option<Configuration>,
    /// Utilisation; none until its first heartbeat.
    pub utilisation: Option<Utilisation>,
    /// Lifeboat's version on it; empty until its first heartbeat.
    pub version: String,
    /// Seconds since its agent started.
    pub uptime_seconds: u64,
    /// Last heartbeat.
    pub last_seen: Option<UnixMillis>,
    /// Duties done.
    pub completed: u32,
    /// Duties failed.
    pub failed: u32,
    /// Open pairings in which it is lent.
    pub lent: u32,
    /// Trust.
    pub trust: Trust,
}

/// How much a device is trusted, in thousandths; decides between devices that fit equally well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Trust(pub u16);

impl Trust {
    /// Trust from what a device has shown: 700 points for the share of duties it completed (with one
    /// of each assumed, so that a newcomer starts in the middle), 200 for uptime up to a week, 100 for
    /// running the version the duplicator runs.
    #[must_use]
    pub fn of(completed: u32, failed: u32, uptime_seconds: u64, same_version: bool) -> Self {
        const WEEK_SECONDS: u64 = 7 * 24 * 3600;
        let (done, all) = (
            u64::from(completed) + 1,
            u64::from(completed) + u64::from(failed) + 2,
        );
        let points = 700 * done / all
            + 200 * uptime_seconds.min(WEEK_SECONDS) / WEEK_SECONDS
            + if same_version { 100 } else { 0 };
        Self(u16::try_from(points).unwrap_or(1000))
    }

    /// Trust in tenths: smaller differences are noise and must not outvote the load.
    #[must_use]
    pub fn level(self) -> u16 {
        self.0 / 100
    }
}

impl fmt::Display for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "0.{:03}", self.0.min(999))
    }
}

/// What a device is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// To do delegated actions.
    Paired,
    /// To run the twins and own the data.
    Target,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Paired => "paired device",
            Self::Target => "target",
        })
    }
}

/// What the twins need of a target besides room for the volumes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TwinNeeds {
    /// Host ports that the twins publish.
    pub ports: BTreeSet<u16>,
    /// Whether a twin is reached over IPv4.
    pub ipv4: bool,
    /// Whether a twin is reached over IPv6.
    pub ipv6: bool,
    /// Memory the containers use now.
    pub memory: Bytes,
}

/// Why one candidate was, or was not, good enough.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CandidateExplanation {
    /// Candidate.
    pub device: DeviceId,
    /// Whether it fits.
    pub accepted: bool,
    /// What spoke for it (accepted) or against it.
    pub reasons: Vec<String>,
}

impl fmt::Display for CandidateExplanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {} ({})",
            self.device,
            if self.accepted { "fits" } else { "no" },
            self.reasons.join("; ")
        )
    }
}

/// How a pairing ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DutyOutcome {
    /// The device did what it was lent for.
    Done,
    /// It did not; counts against its trust.
    Failed,
    /// The plan was given up for a reason that is not the device's.
    Abandoned,
}

/// A device lent to a source, as the registry keeps it. Without the pairing secret.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PairingRecord {
    /// Pairing.
    pub id: PairingId,
    /// Plan.
    pub plan: PlanId,
    /// Who it is lent to.
    pub source: DeviceId,
    /// Who is lent.
    pub device: DeviceId,
    /// As what.
    pub role: Role,
    /// Delegated actions.
    pub actions: Actions,
    /// Data expected.
    pub quantity: Bytes,
    /// When.
    pub created: UnixMillis,
    /// How it ended; none while it is open.
    pub outcome: Option<DutyOutcome>,
}
