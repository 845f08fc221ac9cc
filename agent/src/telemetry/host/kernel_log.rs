//! The kernel's log, read as it is written (Linux, Documentation/ABI/testing/dev-kmsg).
//!
//! Invariants: what was logged before the agent started is not new and is not read; only the kernel's
//! own messages count, not what a process wrote into the log; records that were overwritten before they
//! were read are counted as lost.

use super::{HostReading, Look};
use crate::model::metric::{METRICS, Per};
use crate::model::telemetry::Loss;
use crate::telemetry::disks;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

mod facts;

/// A log storm must not keep the sweep: the rest is read in the next one.
const MOST_RECORDS: usize = 2_000;
/// Longest record (Linux, kernel/printk/internal.h, PRINTK_MESSAGE_MAX), in a regular file several.
const BUFFER: usize = 8 * 1024;

pub struct KernelLog {
    log: Result<File, String>,
    heard: Heard,
}

/// What records of the log told.
#[derive(Default)]
pub struct Heard {
    /// How often, by metric and disk.
    counts: BTreeMap<(&'static str, Option<String>), u64>,
    last_sequence: Option<u64>,
    lost: u64,
}

impl Heard {
    /// Hears records as `/dev/kmsg` gives them; lines that are none tell nothing.
    pub fn hear(&mut self, text: &str) {
        for record in text.lines().filter_map(Record::parse) {
            if let Some(last) = self.last_sequence {
                let missing = record.sequence.saturating_sub(last).saturating_sub(1);
                self.lost = self.lost.saturating_add(missing);
            }
            self.last_sequence = Some(record.sequence);
            if !record.of_kernel {
                continue;
            }
            if let Some((metric, disk)) = facts::of(record.message) {
                let disk = disk.map(str::to_owned);
                *self.counts.entry((metric, disk)).or_default() += 1;
            }
        }
    }

    /// How many facts were heard.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.values().sum()
    }
}

impl KernelLog {
    /// Opens the log at its end.
    pub fn open(root: &Path) -> Self {
        let path = root.join("dev/kmsg");
        let opened = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .and_then(|mut log| log.seek(SeekFrom::End(0)).map(|_| log));
        let log = opened.map_err(|error| match error.kind() {
            ErrorKind::NotFound => format!("no {}: the kernel's log is not there", path.display()),
            ErrorKind::PermissionDenied => format!(
                "no permission to read {}: it needs CAP_SYSLOG",
                path.display()
            ),
            _ => format!("{} cannot be read: {error}", path.display()),
        });
        Self {
            log,
            heard: Heard::default(),
        }
    }

    /// Records that the kernel overwrote before they were read.
    pub fn loss(&self) -> Option<Loss> {
        self.log.is_ok().then(|| Loss {
            map: "kernel log".to_owned(),
            lost: self.heard.lost,
        })
    }

    /// Counts what was logged since the reading before. What a path of a multipath device failed is in no sum: where no
    /// other path did it, the log tells of that device too.
    pub fn read(&mut self, look: Look, reading: &mut HostReading) {
        let metrics = METRICS
            .iter()
            .filter(|metric| metric.name.starts_with("kernel."));
        match self.records() {
            Err(why) => {
                for metric in metrics {
                    reading.absent(&[metric.name], &why);
                }
            }
            Ok(found) => {
                let is_path = |disk: &String| disks::is_path(look.root, disk);
                for metric in metrics {
                    let of = found.iter().filter(|((name, _), _)| *name == metric.name);
                    let summed = of.clone();
                    let summed =
                        summed.filter(|((_, disk), _)| !disk.as_ref().is_some_and(is_path));
                    let count: u64 = summed.map(|(_, count)| count).sum();
                    reading.device(metric.name, count as f64);
                    for ((_, disk), count) in of {
                        if let Some(disk) = disk {
                            reading.of(metric.name, Per::Disk, disk, *count as f64);
                        }
                    }
                }
            }
        }
    }

    #[allow(clippy::type_complexity, reason = "counts by metric and disk")]
    fn records(&mut self) -> Result<BTreeMap<(&'static str, Option<String>), u64>, String> {
        let log = self.log.as_mut().map_err(|why| why.clone())?;
        let mut buffer = [0; BUFFER];
        for _ in 0..MOST_RECORDS {
            let length = match log.read(&mut buffer) {
                Ok(0) => break,
                Ok(length) => length,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // The record that was next has been overwritten; the next reading goes on behind.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => continue,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(format!("the kernel's log cannot be read: {error}")),
            };
            self.heard.hear(&String::from_utf8_lossy(&buffer[..length]));
        }
        Ok(std::mem::take(&mut self.heard.counts))
    }
}

struct Record<'a> {
    of_kernel: bool,
    sequence: u64,
    message: &'a str,
}

impl<'a> Record<'a> {
    /// `priority,sequence,microseconds,flags[,…];message`; lines of properties begin with a space.
    fn parse(line: &'a str) -> Option<Self> {
        let (head, message) = line.split_once(';')?;
        let mut fields = head.split(',');
        let priority: u32 = fields.next()?.parse().ok()?;
        Some(Self {
            // The facility lies above three bits of severity; the kernel's is 0, a process cannot use it.
            of_kernel: priority >> 3 == 0,
            sequence: fields.next()?.parse().ok()?,
            message,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{LATER, recorded, value, write};
    use std::fs::File;
    use std::io::Write;
    use std::time::Duration;

    #[test]
    fn old_messages_are_not_new_and_a_process_cannot_speak_for_the_kernel() {
        let (root, mut host) = recorded(&[(
            "dev/kmsg",
            "3,10,100,-;I/O error, dev sda, sector 8 op 0x0:(READ) flags 0x0 phys_seg 1 prio class 2\n",
        )]);
        let first = host.read(&[], Duration::from_secs(1));
        assert_eq!(value(&first, "kernel.io_errors", ""), Some(0.0));
        let mut log = File::options()
            .append(true)
            .open(root.path().join("dev/kmsg"))
            .expect("the log");
        let lines = "3,12,200,-;I/O error, dev sdb, sector 8 op 0x0:(READ) flags 0x0 phys_seg 1 prio class 2\n \
                     SUBSYSTEM=block\n DEVICE=b8:16\n\
                     11,13,210,-;I/O error, dev sdb, sector 9 op 0x0:(READ) flags 0x0 phys_seg 1 prio class 2\n\
                     6,17,220,-;usb 1-1: new device\n";
        log.write_all(lines.as_bytes()).expect("appended");
        let second = host.read(&[], Duration::from_secs(1));
        assert_eq!(value(&second, "kernel.io_errors", "sdb"), Some(1.0));
        assert_eq!(value(&second, "kernel.io_errors", ""), Some(1.0));
        assert_eq!(second.losses[0].lost, 3, "records 14 to 16");
        let third = host.read(&[], Duration::from_secs(1));
        assert_eq!(value(&third, "kernel.io_errors", ""), Some(0.0));
    }

    #[test]
    fn what_failed_on_one_path_is_no_error_of_the_host_and_what_failed_on_all_is_one() {
        let uuid = "sys/block/sda/holders/dm-0/dm/uuid";
        let (root, mut host) = recorded(&[("dev/kmsg", ""), (uuid, "mpath-3600508b4\n")]);
        let error = |number, disk| {
            format!(
                "3,{number},200,-;I/O error, dev {disk}, sector 8 op 0x0:(READ) flags 0x0 phys_seg 1 prio class 2\n"
            )
        };
        let told = format!("{}{}{}", error(1, "sda"), error(2, "sda"), error(3, "dm-0"));
        write(root.path(), &[("dev/kmsg", &told)]);
        let read = host.read(&[], LATER);
        assert_eq!(value(&read, "kernel.io_errors", "sda"), Some(2.0));
        assert_eq!(value(&read, "kernel.io_errors", "dm-0"), Some(1.0));
        assert_eq!(value(&read, "kernel.io_errors", ""), Some(1.0));
    }
}
