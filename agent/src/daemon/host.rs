//! What this device tells the fleet of itself: its configuration and its utilisation.

use crate::health::VerdictKind;
use crate::migration::view::HostView;
use crate::model::fleet::{Configuration, DeviceVerdict, Nic, Utilisation};
use crate::model::metric::Per;
use crate::model::units::Bytes;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// What the device is made of; `state` lies on the file system that takes volumes.
#[must_use]
pub fn configuration(root: &Path, state: &Path) -> Configuration {
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
    let memory_kib = read("proc/meminfo")
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemTotal:")?
                .trim()
                .strip_suffix("kB")?
                .trim()
                .parse()
                .ok()
        })
        .unwrap_or(0_u64);
    let storage =
        nix::sys::statvfs::statvfs(state).map_or(0, |stat| stat.blocks() * stat.fragment_size());
    let nics = fs::read_dir(root.join("sys/class/net"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name != "lo")
        .map(|name| {
            let speed = read(&format!("sys/class/net/{name}/speed"));
            Nic {
                speed_mbits: speed.trim().parse().ok(),
                name,
            }
        })
        .collect();
    Configuration {
        cores: std::thread::available_parallelism().map_or(1, |cores| cores.get() as u32),
        memory: Bytes(memory_kib * 1024),
        storage: Bytes(storage),
        nics,
        kernel: read("proc/sys/kernel/osrelease").trim().to_owned(),
        architecture: std::env::consts::ARCH.to_owned(),
    }
}

/// What the device does now, from the latest view; its verdict counts for `stale_after`.
#[must_use]
pub fn utilisation(
    view: &HostView,
    stale_after: Duration,
    state: &Path,
    duties: u32,
) -> Utilisation {
    let metric = |name: &str| {
        let mut samples = view.snapshot.samples.iter();
        let of_device = samples.find(|s| s.metric == name && s.subject.per == Per::Device);
        of_device.map_or(0.0, |sample| sample.value)
    };
    let (free, total) = nix::sys::statvfs::statvfs(state).map_or((0, 0), |stat| {
        (
            stat.blocks_available() * stat.fragment_size(),
            stat.blocks() * stat.fragment_size(),
        )
    });
    let ports: BTreeSet<u16> = view
        .containers
        .iter()
        .flat_map(|container| container.published.iter().map(|port| port.host_port))
        .collect();
    Utilisation {
        cpu_percent: metric("cpu.used"),
        memory_percent: metric("memory.used"),
        memory_free: Bytes(metric("memory.available") as u64),
        disk_percent: 100.0 * (total.saturating_sub(free)) as f64 / total.max(1) as f64,
        storage_free: Bytes(free),
        verdict: match view.verdict_now(stale_after).map(|verdict| verdict.kind) {
            Some(VerdictKind::Healthy) => DeviceVerdict::Healthy,
            Some(VerdictKind::Suspect) => DeviceVerdict::Suspect,
            Some(VerdictKind::Degraded) => DeviceVerdict::Degraded,
            Some(VerdictKind::Unknown) | None => DeviceVerdict::Unknown,
        },
        duties,
        ports_taken: ports,
        ipv4: true,
        ipv6: Path::new("/proc/net/if_inet6").exists(),
    }
}
