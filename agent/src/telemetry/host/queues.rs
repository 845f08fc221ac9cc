//! Queues of block devices, and disks that their driver has given up.

use super::counters::Counters;
use super::files::{entries, name, text, why};
use super::{HostReading, Look, sum};
use crate::model::metric::Per;
use std::fs;

#[derive(Default)]
pub struct Queues(Counters);

impl Queues {
    pub fn read(&mut self, look: Look, reading: &mut HostReading) {
        self.0.turn();
        let path = look.path("proc/diskstats");
        let stats = fs::read_to_string(&path).unwrap_or_default();
        if stats.is_empty() {
            let why = why(&path, "procfs is not mounted below the root");
            reading.absent(&["block.queue_depth", "block.busy"], &why);
        }
        let elapsed_ms = look.elapsed.as_millis() as f64;
        for line in stats.lines() {
            let Some(disk) = Disk::parse(line) else {
                continue;
            };
            // A disk that nobody ever used (ram0, loop7) says nothing.
            let is_used = disk.requests != 0 && !crate::telemetry::disks::is_served(disk.name);
            if !is_used || !look.path("sys/block").join(disk.name).exists() {
                continue;
            }
            let busy = self.0.more("busy", disk.name, disk.busy_ms);
            let queued = self.0.more("queued", disk.name, disk.queued_ms);
            if elapsed_ms <= 0.0 {
                continue;
            }
            if let Some(busy) = busy {
                let share = (100.0 * busy as f64 / elapsed_ms).min(100.0);
                reading.of("block.busy", Per::Disk, disk.name, share);
            }
            if let Some(queued) = queued {
                let depth = queued as f64 / elapsed_ms;
                reading.of("block.queue_depth", Per::Disk, disk.name, depth);
            }
        }
        reading.device_from_parts("block.queue_depth", f64::max);
    }
}

/// One line of /proc/diskstats (Linux, Documentation/admin-guide/iostats.rst).
struct Disk<'a> {
    name: &'a str,
    requests: u64,
    busy_ms: u64,
    queued_ms: u64,
}

impl<'a> Disk<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace().skip(2);
        let name = fields.next()?;
        let counts: Vec<u64> = fields.map_while(|field| field.parse().ok()).collect();
        Some(Self {
            name,
            requests: counts.first()? + counts.get(4)?,
            busy_ms: *counts.get(9)?,
            queued_ms: *counts.get(10)?,
        })
    }
}

/// Disks and NVMe controllers that do not work any more, by the state that their driver shows.
pub fn offline(look: Look, reading: &mut HostReading) {
    // SCSI: drivers/scsi/scsi_sysfs.c, sdev_states; NVMe: drivers/nvme/host/sysfs.c, state_name.
    const SCSI_GONE: [&str; 3] = ["offline", "transport-offline", "deleted"];
    const NVME_GONE: [&str; 3] = ["dead", "deleting (no IO)", "connecting"];
    let gone = |state: &str, names: &[&str]| f64::from(u8::from(names.contains(&state)));
    for disk in entries(&look.path("sys/block")) {
        if let Some(state) = text(&disk.join("device/state")).filter(|_| !is_nvme(&name(&disk))) {
            let value = gone(&state, &SCSI_GONE);
            reading.of("disk.offline", Per::Disk, &name(&disk), value);
        }
    }
    for controller in entries(&look.path("sys/class/nvme")) {
        if let Some(state) = text(&controller.join("state")) {
            let value = gone(&state, &NVME_GONE);
            reading.of("disk.offline", Per::Disk, &name(&controller), value);
        }
    }
    reading.device_from_parts("disk.offline", sum);
    let why = why(
        &look.path("sys/block"),
        "no disk here has a driver that shows its state (SCSI, NVMe)",
    );
    reading.absent(&["disk.offline"], &why);
}

fn is_nvme(disk: &str) -> bool {
    disk.starts_with("nvme")
}

#[cfg(test)]
mod tests {
    use super::super::tests::{LATER, recorded, value, write};
    use std::time::Duration;

    const STATS: &str = "   7       0 loop0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0
   8       0 sda 2843917 615455 214676738 5212542 1646636 3051363 525660112 4192686 0 BUSY QUEUED 51 393332176 287369 333187 27820
   8       1 sda1 2843917 615455 214676738 5212542 1646636 3051363 525660112 4192686 0 621860 9720418
";

    #[test]
    fn queue_depth_and_busy_time_are_those_of_the_interval_and_of_whole_disks() {
        let stats =
            |busy: &str, queued: &str| STATS.replace("BUSY", busy).replace("QUEUED", queued);
        let (root, mut host) = recorded(&[
            ("proc/diskstats", &stats("1000", "9000")),
            ("sys/block/sda/size", "1\n"),
            ("sys/block/loop0/size", "0\n"),
        ]);
        host.read(&[], Duration::from_secs(1));
        write(root.path(), &[("proc/diskstats", &stats("1500", "15000"))]);
        let reading = host.read(&[], Duration::from_secs(2));
        assert_eq!(value(&reading, "block.queue_depth", "sda"), Some(3.0));
        assert_eq!(value(&reading, "block.queue_depth", ""), Some(3.0));
        assert_eq!(value(&reading, "block.busy", "sda"), Some(25.0));
        assert_eq!(value(&reading, "block.busy", "sda1"), None);
        assert_eq!(value(&reading, "block.busy", "loop0"), None);
    }

    #[test]
    fn a_disk_that_its_driver_gave_up_is_offline() {
        let (root, mut host) = recorded(&[
            ("sys/block/sda/device/state", "running\n"),
            ("sys/block/sdb/device/state", "transport-offline\n"),
            ("sys/block/vda/size", "8\n"),
            ("sys/class/nvme/nvme0/state", "live\n"),
        ]);
        let reading = host.read(&[], LATER);
        assert_eq!(value(&reading, "disk.offline", "sda"), Some(0.0));
        assert_eq!(value(&reading, "disk.offline", "sdb"), Some(1.0));
        assert_eq!(value(&reading, "disk.offline", "nvme0"), Some(0.0));
        assert_eq!(value(&reading, "disk.offline", "vda"), None);
        assert_eq!(value(&reading, "disk.offline", ""), Some(1.0));
        write(root.path(), &[("sys/class/nvme/nvme0/state", "dead\n")]);
        let reading = host.read(&[], LATER);
        assert_eq!(value(&reading, "disk.offline", ""), Some(2.0));
    }
}
