//! Status of mapped devices: RAID volumes of LVM, and multipath (include/uapi/linux/dm-ioctl.h; Linux,
//! Documentation/admin-guide/device-mapper/dm-raid.rst).

use super::{Array, PATHS, push, tolerates};
use crate::model::metric::Per;
use crate::telemetry::host::files::{entries, text};
use crate::telemetry::host::{HostReading, Look};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// `struct dm_ioctl`: version, sizes, flags, device, name, uuid.
const HEADER: usize = 312;
const DATA_SIZE: usize = 12;
const DATA_START: usize = 16;
const TARGETS: usize = 20;
const FLAGS: usize = 28;
const NAME: usize = 48;
const NAME_LENGTH: usize = 128;
/// `struct dm_target_spec`: start, length, status, offset of the next one, type.
const TARGET: usize = 40;
const ANSWER: usize = 16 * 1024;

const TABLE_STATUS: u32 = 12;
/// Status must not make a mirror or a thin pool write its metadata first.
const NO_FLUSH: u32 = 1 << 11;

/// Reads every mapped device that LVM or multipath made.
pub fn read(look: Look, reading: &mut HostReading) -> Result<(), String> {
    let mut control = None;
    let mut told = Ok(());
    for block in entries(&look.path("sys/block")) {
        let Some(uuid) = text(&block.join("dm/uuid")) else {
            continue;
        };
        let Some(device) = text(&block.join("dm/name")) else {
            continue;
        };
        if !uuid.starts_with("LVM-") && !uuid.starts_with("mpath-") {
            continue;
        }
        let control = match &control {
            Some(control) => control,
            None => {
                let path = look.path("dev/mapper/control");
                let opened = File::open(&path)
                    .map_err(|error| format!("{} cannot be opened: {error}", path.display()))?;
                control.insert(opened)
            }
        };
        match status(control, &device) {
            Ok(answer) => of_targets(reading, &device, &targets(&answer)),
            // It may have gone meanwhile; of the others it is told all the same.
            Err(error) => told = Err(why(&device, &error)),
        }
    }
    told
}

fn why(device: &str, error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => {
            "the device mapper answers only with CAP_SYS_ADMIN".to_owned()
        }
        _ => format!("the device mapper tells nothing of {device}: {error}"),
    }
}

fn of_targets(reading: &mut HostReading, device: &str, targets: &[(String, String)]) {
    for (kind, status) in targets {
        match kind.as_str() {
            "raid" => {
                if let Some(array) = of_raid(status) {
                    push(reading, device, &array);
                }
            }
            "mirror" => {
                if let Some(array) = of_mirror(status) {
                    push(reading, device, &array);
                }
            }
            "multipath" => {
                let (active, failed) = of_multipath(status);
                reading.of(PATHS[0], Per::Disk, device, f64::from(failed));
                reading.of(PATHS[1], Per::Disk, device, f64::from(active));
            }
            _ => {}
        }
    }
}

/// `raid1 2 AA 2097152/2097152 idle 0 0 -`: level, members, their health, sync, action, mismatches.
fn of_raid(status: &str) -> Option<Array> {
    let fields: Vec<&str> = status.split_ascii_whitespace().collect();
    let (level, disks, health) = (
        fields.first()?,
        fields.get(1)?.parse().ok()?,
        fields.get(2)?,
    );
    let missing = health
        .bytes()
        .filter(|&one| one == b'D' || one == b'-')
        .count() as u64;
    let action = fields.get(4).copied().unwrap_or_default();
    Some(Array {
        missing,
        failed: tolerates(level, disks).is_some_and(|most| missing > most),
        rebuilding: matches!(action, "recover" | "resync" | "reshape"),
        mismatches: fields.get(5).and_then(|count| count.parse().ok()),
    })
}

/// `2 253:1 253:2 400/400 1 AA 3 disk 253:0 A`: members, their devices, sync, health
/// (drivers/md/dm-raid1.c).
fn of_mirror(status: &str) -> Option<Array> {
    let fields: Vec<&str> = status.split_ascii_whitespace().collect();
    let disks: usize = fields.first()?.parse().ok()?;
    let (synced, all) = fields.get(1 + disks)?.split_once('/')?;
    let health = fields.get(3 + disks)?;
    let missing = health.bytes().filter(|&one| one != b'A').count() as u64;
    Some(Array {
        missing,
        failed: tolerates("mirror", disks as u64).is_some_and(|most| missing > most),
        rebuilding: synced != all,
        mismatches: None,
    })
}

/// Paths stand as `8:16 A 0` with `A` for active and `F` for failed (drivers/md/dm-mpath.c).
fn of_multipath(status: &str) -> (u32, u32) {
    let fields: Vec<&str> = status.split_ascii_whitespace().collect();
    let mut paths = (0, 0);
    for pair in fields.windows(2) {
        match (pair[0].contains(':'), pair[1]) {
            (true, "A") => paths.0 += 1,
            (true, "F") => paths.1 += 1,
            _ => {}
        }
    }
    paths
}

fn status(control: &File, device: &str) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0; ANSWER];
    let mut put = |at: usize, value: u32| buffer[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    put(0, 4); // version of the interface
    put(DATA_SIZE, ANSWER as u32);
    put(DATA_START, HEADER as u32);
    put(FLAGS, NO_FLUSH);
    let name = device.as_bytes();
    if name.len() >= NAME_LENGTH {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    buffer[NAME..NAME + name.len()].copy_from_slice(name);
    let request = libc::_IOWR::<[u8; HEADER]>(0xfd, TABLE_STATUS);
    // SAFETY: the buffer is as long as its header says, and the kernel writes no more than that.
    let answered = unsafe { libc::ioctl(control.as_raw_fd(), request, buffer.as_mut_ptr()) };
    if answered < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(buffer)
}

/// Type and status of each target in an answer.
fn targets(answer: &[u8]) -> Vec<(String, String)> {
    let word = |at: usize| {
        let bytes = answer.get(at..at + 4)?.try_into().ok()?;
        Some(u32::from_ne_bytes(bytes) as usize)
    };
    let text = |bytes: &[u8]| {
        let end = bytes
            .iter()
            .position(|&byte| byte == 0)
            .unwrap_or(bytes.len());
        String::from_utf8_lossy(&bytes[..end]).into_owned()
    };
    let (Some(start), Some(count)) = (word(DATA_START), word(TARGETS)) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    let mut at = start;
    for _ in 0..count {
        let (Some(kind), Some(status)) =
            (answer.get(at + 24..at + TARGET), answer.get(at + TARGET..))
        else {
            break;
        };
        found.push((text(kind), text(status)));
        // The kernel counts the next target's place from the first one.
        match word(at + 20) {
            Some(next) if next > 0 => at = start + next,
            _ => break,
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An answer as the kernel lays it out.
    fn answer(targets: &[(&str, &str)]) -> Vec<u8> {
        let mut data = Vec::new();
        for (kind, status) in targets {
            let at = data.len();
            data.resize(at + TARGET, 0);
            data[at + 24..at + 24 + kind.len()].copy_from_slice(kind.as_bytes());
            data.extend_from_slice(status.as_bytes());
            data.push(0);
            data.resize(data.len().next_multiple_of(8), 0);
            let next = data.len() as u32;
            data[at + 20..at + 24].copy_from_slice(&next.to_ne_bytes());
        }
        let mut answer = vec![0; HEADER];
        answer[DATA_START..DATA_START + 4].copy_from_slice(&(HEADER as u32).to_ne_bytes());
        answer[TARGETS..TARGETS + 4].copy_from_slice(&(targets.len() as u32).to_ne_bytes());
        answer.extend(data);
        answer
    }

    #[test]
    fn an_answer_of_several_targets_is_taken_apart() {
        let two = [("linear", ""), ("raid", "raid1 2 AD 8/8 idle 0 0 -")];
        let found = targets(&answer(&two));
        let expected = two.map(|(kind, status)| (kind.to_owned(), status.to_owned()));
        assert_eq!(found, expected);
        assert_eq!(targets(&answer(&two)[..HEADER + 10]), []);
        assert_eq!(targets(&[]), []);
    }

    #[test]
    fn raid_volumes_tell_dead_members_and_what_that_means() {
        let array = |missing, failed, rebuilding, mismatches| {
            Some(Array {
                missing,
                failed,
                rebuilding,
                mismatches,
            })
        };
        let healthy = "raid5_ls 3 AAA 1048576/1048576 idle 0 0 -";
        assert_eq!(of_raid(healthy), array(0, false, false, Some(0)));
        let rebuilding = "raid1 2 Aa 12/1048576 recover 0 0 -";
        assert_eq!(of_raid(rebuilding), array(0, false, true, Some(0)));
        let degraded = "raid6_zr 5 ADDAA 1/2 idle 8 0 -";
        assert_eq!(of_raid(degraded), array(2, false, false, Some(8)));
        let gone = "raid5_ls 3 ADD 1/1 frozen 0 0 -";
        assert_eq!(of_raid(gone), array(2, true, false, Some(0)));
        let mirror = "2 253:1 253:2 399/400 1 AD 3 disk 253:0 A";
        assert_eq!(of_mirror(mirror), array(1, false, true, None));
        assert_eq!(of_raid("raid5_ls"), None);
    }

    #[test]
    fn failed_paths_of_every_group_are_counted() {
        let status = "2 0 0 0 2 1 A 0 2 2 8:16 A 0 0 1 8:32 F 4 0 1 E 0 1 2 65:160 A 0 0 1 ";
        assert_eq!(of_multipath(status), (2, 1));
        let mut reading = HostReading::default();
        of_targets(
            &mut reading,
            "mpatha",
            &targets(&answer(&[("multipath", status)])),
        );
        let values: Vec<(&str, f64)> = reading.values.iter().map(|one| (one.0, one.2)).collect();
        assert_eq!(values, [(PATHS[0], 1.0), (PATHS[1], 2.0)]);
    }
}
