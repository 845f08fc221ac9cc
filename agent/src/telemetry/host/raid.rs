//! RAID arrays of md (Linux, Documentation/admin-guide/md.rst), and of LVM and multipath through the
//! device mapper.

mod mapper;

use super::files::{entries, name, number, text};
use super::{HostReading, Look, sum};
use crate::model::metric::Per;
use std::path::Path;

const ARRAY: [&str; 4] = [
    "raid.missing_disks",
    "raid.failed",
    "raid.rebuilding",
    "raid.mismatches",
];
const PATHS: [&str; 2] = ["lun.failed_paths", "lun.active_paths"];

/// State of one array.
#[derive(Debug, PartialEq)]
struct Array {
    missing: u64,
    failed: bool,
    rebuilding: bool,
    mismatches: Option<u64>,
}

/// How many members of an array of this level and size may be missing before data is.
fn tolerates(level: &str, disks: u64) -> Option<u64> {
    Some(match level {
        "raid0" | "linear" => 0,
        "raid1" | "mirror" => disks.saturating_sub(1),
        // It depends on which ones; with more than half gone some pair is.
        level if level.starts_with("raid10") => disks / 2,
        level if level.starts_with("raid4") || level.starts_with("raid5") => 1,
        level if level.starts_with("raid6") => 2,
        _ => return None,
    })
}

pub fn read(look: Look, reading: &mut HostReading) {
    for block in entries(&look.path("sys/block")) {
        if let Some(array) = of_md(&block.join("md")) {
            push(reading, &name(&block), &array);
        }
    }
    let mapped = mapper::read(look, reading);
    for metric in [ARRAY[0], ARRAY[1], ARRAY[2], PATHS[0]] {
        reading.device_from_parts(metric, sum);
    }
    let why = match mapped {
        Ok(()) => String::new(),
        Err(why) => format!("; {why}"),
    };
    let arrays = format!("no md array (/sys/block/md*/md) and none of LVM here{why}");
    reading.absent(&ARRAY, &arrays);
    let paths = format!("no multipath device here{why}");
    reading.absent(&PATHS, &paths);
}

fn push(reading: &mut HostReading, name: &str, array: &Array) {
    for (metric, value) in [
        (ARRAY[0], array.missing as f64),
        (ARRAY[1], f64::from(u8::from(array.failed))),
        (ARRAY[2], f64::from(u8::from(array.rebuilding))),
    ] {
        reading.of(metric, Per::Array, name, value);
    }
    if let Some(mismatches) = array.mismatches {
        reading.of(ARRAY[3], Per::Array, name, mismatches as f64);
    }
}

fn of_md(md: &Path) -> Option<Array> {
    let state = text(&md.join("array_state"))?;
    let level = text(&md.join("level")).unwrap_or_default();
    if state == "clear" || level == "container" {
        return None; // nothing assembled, or only metadata
    }
    // While it is reshaped, how many there were follows: `4 (3)`.
    let disks = text(&md.join("raid_disks")).unwrap_or_default();
    let disks = disks.split(' ').next().and_then(|disks| disks.parse().ok());
    let disks: u64 = disks.unwrap_or(0);
    // Levels without redundancy have no `degraded`: a member that is gone has failed the array.
    let missing = number::<u64>(&md.join("degraded")).unwrap_or(0);
    let beyond = tolerates(&level, disks).is_some_and(|most| missing > most);
    let action = text(&md.join("sync_action")).unwrap_or_default();
    Some(Array {
        missing,
        failed: beyond || matches!(state.as_str(), "broken" | "inactive"),
        rebuilding: matches!(action.as_str(), "recover" | "resync" | "reshape"),
        mismatches: number(&md.join("mismatch_cnt")),
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{LATER, recorded, value, write};

    #[test]
    fn md_arrays_tell_missing_members_rebuilding_and_failure() {
        let md =
            |array: &str, level: &str, state: &str, disks: u32, degraded: u32, action: &str| {
                [
                    ("array_state", state.to_owned()),
                    ("level", level.to_owned()),
                    ("raid_disks", disks.to_string()),
                    ("degraded", degraded.to_string()),
                    ("sync_action", action.to_owned()),
                    ("mismatch_cnt", "128".to_owned()),
                ]
                .map(|(file, text)| (format!("sys/block/{array}/md/{file}"), format!("{text}\n")))
            };
        let files: Vec<(String, String)> = [
            md("md0", "raid1", "clean", 2, 0, "idle"),
            md("md1", "raid6", "active", 6, 1, "recover"),
            md("md2", "raid5", "active", 4, 2, "idle"),
            md("md3", "raid1", "inactive", 2, 0, "idle"),
            md("md4", "raid1", "clean", 3, 1, "reshape"),
        ]
        .into_iter()
        .flatten()
        .collect();
        let files: Vec<(&str, &str)> = files
            .iter()
            .map(|(a, b)| (a.as_str(), b.as_str()))
            .collect();
        let (root, mut host) = recorded(&files);
        write(root.path(), &[("sys/block/md4/md/raid_disks", "3 (2)\n")]);
        let reading = host.read(&[], LATER);
        let of = |array| {
            ["raid.missing_disks", "raid.failed", "raid.rebuilding"]
                .map(|metric| value(&reading, metric, array).expect("a value"))
        };
        assert_eq!(of("md0"), [0.0, 0.0, 0.0]);
        assert_eq!(of("md1"), [1.0, 0.0, 1.0]);
        assert_eq!(of("md2"), [2.0, 1.0, 0.0]);
        assert_eq!(of("md3"), [0.0, 1.0, 0.0]);
        assert_eq!(of("md4"), [1.0, 0.0, 1.0]);
        assert_eq!(of(""), [4.0, 2.0, 2.0]);
        assert_eq!(value(&reading, "raid.mismatches", "md0"), Some(128.0));
        assert!(reading.absent["lun.failed_paths"].contains("multipath"));
    }

    #[test]
    fn a_mapped_device_that_tells_nothing_does_not_keep_the_next_from_being_asked() {
        let (_root, mut host) = recorded(&[
            // No device mapper: it answers no question.
            ("dev/mapper/control", ""),
            ("sys/block/dm-0/dm/uuid", "LVM-one\n"),
            ("sys/block/dm-0/dm/name", "one\n"),
            ("sys/block/dm-1/dm/uuid", "mpath-two\n"),
            ("sys/block/dm-1/dm/name", "two\n"),
        ]);
        let reading = host.read(&[], LATER);
        let why = &reading.absent["lun.failed_paths"];
        assert!(why.contains("tells nothing of two"), "{why}");
    }
}
