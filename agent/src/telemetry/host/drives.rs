//! Health that drives tell of themselves: SMART of ATA and SAS, the health log of NVMe.
//!
//! Invariants: a drive is asked in a thread of its own, because one that is dying may never answer; one
//! that sleeps is not woken; what a drive said counts until it should have been asked again, and is
//! absent afterwards. Non-goals: self-tests, and drives behind RAID controllers.

mod ata;
mod nvme;
mod smartctl;

use super::files::{entries, name, number, text};
use super::{HostReading, Look, sensors, sum};
use crate::model::metric::Per;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// SMART moves slowly, and asking disturbs the drive.
const EVERY: Duration = Duration::from_secs(600);
/// An answer counts for this long: two turns and time for slow ones.
const COUNTS: Duration = Duration::from_secs(1500);
const HOUR_NS: f64 = 3.6e12;

const METRICS: [&str; 10] = [
    "disk.smart_failed",
    "disk.attributes_failing",
    "disk.wear",
    "disk.spare_margin",
    "disk.media_errors",
    "disk.reallocated_sectors",
    "disk.pending_sectors",
    "disk.bytes_written",
    "disk.power_on",
    "disk.time_between_failures",
];

/// Whether these bytes are an answer that is understood: smartctl's, an NVMe health log, or a drive's SMART data and
/// thresholds.
#[must_use]
pub fn understands(answer: &[u8]) -> bool {
    let is_told = std::str::from_utf8(answer).is_ok_and(|text| smartctl::decode(text).is_ok());
    let is_log = answer
        .first_chunk()
        .is_some_and(|log| nvme::decode(log) != Health::default());
    let is_smart = answer.split_first_chunk().is_some_and(|(data, rest)| {
        rest.first_chunk()
            .is_some_and(|thresholds| ata::decode(data, thresholds).is_ok())
    });
    is_told || is_log || is_smart
}

/// What one drive says of itself; what it does not say is none.
#[derive(Clone, Debug, Default, PartialEq)]
struct Health {
    failed: Option<bool>,
    attributes_failing: Option<u64>,
    wear_percent: Option<f64>,
    /// Spare blocks less the drive's own threshold, percent.
    spare_margin_percent: Option<f64>,
    media_errors: Option<u64>,
    reallocated: Option<u64>,
    pending: Option<u64>,
    bytes_written: Option<f64>,
    power_on_hours: Option<f64>,
    celsius: Option<f64>,
    limit_celsius: Option<f64>,
}

/// What is known of the drives; filled by the thread.
#[derive(Default)]
struct Known {
    drives: BTreeMap<String, (Instant, Result<Health, String>)>,
    asked: bool,
}

/// The drives of the host.
#[derive(Default)]
pub struct Drives {
    /// Where they are to be asked; none when they are not, or are already.
    root: Option<PathBuf>,
    /// None until the thread was started.
    known: Option<Arc<Mutex<Known>>>,
}

impl Drives {
    /// Lets the drives below `root` be asked from the first reading on.
    pub fn watch(&mut self, root: &Path) {
        self.root = Some(root.to_owned());
    }

    /// Starts asking. The thread ends when this value is dropped.
    fn start(&mut self, root: PathBuf) {
        let known = Arc::new(Mutex::new(Known::default()));
        let weak = Arc::downgrade(&known);
        let ask = move || {
            while let Some(known) = weak.upgrade() {
                ask_all(&root, &known);
                drop(known);
                std::thread::sleep(EVERY);
            }
        };
        let started = std::thread::Builder::new().name("drives".into()).spawn(ask);
        self.known = started.is_ok().then_some(known);
    }

    pub fn read(&mut self, look: Look, reading: &mut HostReading) {
        // Not sooner: the agent drops capabilities before its first reading, and only of the one thread it has.
        if let Some(root) = self.root.take() {
            self.start(root);
        }
        sensors::drives(look, reading);
        emmc(look, reading);
        let why = match &self.known {
            None => "drives are not asked here, or their thread could not be started".to_owned(),
            Some(known) => {
                let known = known.lock().unwrap_or_else(PoisonError::into_inner);
                known.push(reading)
            }
        };
        for metric in ["disk.smart_failed", "disk.media_errors"] {
            let mut drives: BTreeMap<String, f64> = BTreeMap::new();
            for (name, subject, value) in &reading.values {
                if *name == metric {
                    let known = drives
                        .entry(identity(look, &subject.name))
                        .or_insert(*value);
                    *known = known.max(*value);
                }
            }
            if let Some(of_all) = drives.into_values().reduce(sum) {
                reading.device(metric, of_all);
            }
        }
        reading.device_from_parts("disk.wear", f64::max);
        reading.device_from_parts(sensors::DISK[0], f64::max);
        reading.device_from_parts(sensors::DISK[2], f64::min);
        let why_no_temperature =
            "no drive here has a sensor that hwmon shows (nvme, drivetemp), and SMART tells none";
        reading.absent(&sensors::DISK, why_no_temperature);
        reading.device_from_parts("disk.spare_margin", f64::min);
        let some_told = reading.values_of("disk.power_on").next().is_some();
        let failures = "no drive here has logged an uncorrected error";
        if some_told {
            reading.absent(&["disk.time_between_failures"], failures);
            reading.absent(&METRICS, "no drive here tells it");
        }
        reading.absent(&METRICS, &why);
    }
}

impl Known {
    fn push(&self, reading: &mut HostReading) -> String {
        let mut why = match (self.asked, self.drives.is_empty()) {
            (false, _) => "the drives have not answered yet".to_owned(),
            (true, true) => "no disk here is a drive that could be asked (sd*, nvme*)".to_owned(),
            (true, false) => String::new(),
        };
        for (disk, (told_at, health)) in &self.drives {
            match health {
                Ok(health) if told_at.elapsed() < COUNTS => health.push(reading, disk),
                Ok(_) => why = format!("{disk} has not answered for {COUNTS:?}"),
                Err(error) => why = format!("{disk}: {error}"),
            }
        }
        why
    }
}

impl Health {
    fn push(&self, reading: &mut HostReading, disk: &str) {
        let count = |count: Option<u64>| count.map(|count| count as f64);
        let hours = self.power_on_hours;
        let between = hours
            .zip(self.media_errors.filter(|&errors| errors > 0))
            .map(|(hours, errors)| hours / errors as f64);
        let values = [
            self.failed.map(|failed| f64::from(u8::from(failed))),
            count(self.attributes_failing),
            self.wear_percent,
            self.spare_margin_percent,
            count(self.media_errors),
            count(self.reallocated),
            count(self.pending),
            self.bytes_written,
            hours.map(|hours| hours * HOUR_NS),
            between.map(|hours| hours * HOUR_NS),
        ];
        for (metric, value) in METRICS.into_iter().zip(values) {
            if let Some(value) = value {
                reading.of(metric, Per::Disk, disk, value);
            }
        }
        let known = reading
            .values
            .iter()
            .any(|(metric, subject, _)| *metric == sensors::DISK[0] && subject.name == disk);
        if let Some(celsius) = self.celsius.filter(|_| !known) {
            sensors::temperature(reading, disk, celsius, self.limit_celsius);
        }
    }
}

/// What a drive is known by that is several disks: by the paths to it, or by the namespaces of one controller.
fn identity(look: Look, disk: &str) -> String {
    let device = look.path("sys/block").join(disk).join("device");
    let told = ["serial", "wwid"]
        .iter()
        .filter_map(|file| text(&device.join(file)));
    let mut told = told.filter(|told| !told.is_empty());
    told.next().unwrap_or_else(|| disk.to_owned())
}

/// Wear of eMMC, in steps of 10 % (Linux, Documentation/driver-api/mmc/mmc-dev-attrs.rst, `life_time`).
fn emmc(look: Look, reading: &mut HostReading) {
    for block in entries(&look.path("sys/block")) {
        let disk = name(&block);
        let Some(life) =
            text(&block.join("device/life_time")).filter(|_| disk.starts_with("mmcblk"))
        else {
            continue;
        };
        let steps = life
            .split_ascii_whitespace()
            .filter_map(|step| u32::from_str_radix(step.strip_prefix("0x")?, 16).ok())
            .filter(|step| (1..=11).contains(step)); // 0 is not defined
        if let Some(worst) = steps.max() {
            reading.of("disk.wear", Per::Disk, &disk, f64::from(worst) * 10.0);
        }
    }
}

fn ask_all(root: &Path, known: &Mutex<Known>) {
    let disks = drives(root);
    let lock = || known.lock().unwrap_or_else(PoisonError::into_inner);
    lock().drives.retain(|disk, _| disks.contains_key(disk));
    for (disk, path) in &disks {
        let answer = ask(disk, path);
        let mut known = lock();
        match answer {
            Ok(Answer::Sleeps) => {} // what it said before it fell asleep counts for its time
            Ok(Answer::Told(health)) => {
                known
                    .drives
                    .insert(disk.clone(), (Instant::now(), Ok(*health)));
            }
            Err(why) => {
                known
                    .drives
                    .insert(disk.clone(), (Instant::now(), Err(why)));
            }
        }
    }
    lock().asked = true;
}

enum Answer {
    Told(Box<Health>),
    Sleeps,
}

/// Through smartctl where it is installed, else directly.
fn ask(disk: &str, path: &Path) -> Result<Answer, String> {
    match smartctl::ask(path) {
        Err(smartctl::NotAsked::Absent) if disk.starts_with("nvme") => {
            let log = nvme::health_log(path)?;
            let health = nvme::decode(&log);
            Ok(Answer::Told(Box::new(health)))
        }
        Err(smartctl::NotAsked::Absent) => ata::ask(path),
        Err(error) => Err(error.to_string()),
        Ok(answer) => Ok(answer),
    }
}

/// Whole disks that may be drives, and their device files.
fn drives(root: &Path) -> BTreeMap<String, PathBuf> {
    entries(&root.join("sys/block"))
        .into_iter()
        .filter_map(|block| {
            let disk = name(&block);
            let is_drive = disk.starts_with("sd") || disk.starts_with("nvme");
            let empty = number::<u64>(&block.join("size")).is_none_or(|size| size == 0);
            (is_drive && !empty).then(|| (disk.clone(), root.join("dev").join(disk)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::value;
    use super::*;

    fn reading_of(health: Health, told_at: Instant) -> HostReading {
        let drives = BTreeMap::from([("sda".to_owned(), (told_at, Ok(health)))]);
        let known = Known {
            drives,
            asked: true,
        };
        let mut drives = Drives {
            root: None,
            known: Some(Arc::new(Mutex::new(known))),
        };
        let root = tempfile::tempdir().expect("a directory");
        let mut reading = HostReading::default();
        let look = Look {
            root: root.path(),
            elapsed: Duration::ZERO,
        };
        drives.read(look, &mut reading);
        reading
    }

    #[test]
    fn time_between_failures_exists_only_for_a_drive_that_failed() {
        let healthy = Health {
            failed: Some(false),
            media_errors: Some(0),
            power_on_hours: Some(1000.0),
            ..Health::default()
        };
        let reading = reading_of(healthy.clone(), Instant::now());
        assert_eq!(value(&reading, "disk.smart_failed", ""), Some(0.0));
        assert_eq!(value(&reading, "disk.time_between_failures", "sda"), None);
        assert!(reading.absent["disk.time_between_failures"].contains("uncorrected"));
        assert_eq!(reading.absent["disk.wear"], "no drive here tells it");
        let failing = Health {
            media_errors: Some(4),
            ..healthy
        };
        let reading = reading_of(failing, Instant::now());
        let between = value(&reading, "disk.time_between_failures", "sda");
        assert_eq!(between, Some(250.0 * HOUR_NS));
        assert_eq!(value(&reading, "disk.media_errors", ""), Some(4.0));
    }

    #[test]
    fn a_drive_with_several_paths_fails_once() {
        let root = tempfile::tempdir().expect("a directory");
        let mut known = Known {
            asked: true,
            ..Known::default()
        };
        for (disk, file, told) in [
            ("sda", "wwid", "naa.5000c500"),
            ("sdb", "wwid", "naa.5000c500"),
            ("sdc", "wwid", "naa.5000c501"),
            ("nvme0n1", "serial", "S1"),
            ("nvme0n2", "serial", "S1"),
            ("sdd", "model", "that tells neither"),
        ] {
            let device = root.path().join("sys/block").join(disk).join("device");
            std::fs::create_dir_all(&device).expect("made");
            std::fs::write(device.join(file), told).expect("written");
            let health = Health {
                media_errors: Some(2),
                ..Health::default()
            };
            let told = (Instant::now(), Ok(health));
            known.drives.insert(disk.to_owned(), told);
        }
        let mut drives = Drives {
            root: None,
            known: Some(Arc::new(Mutex::new(known))),
        };
        let look = Look {
            root: root.path(),
            elapsed: Duration::ZERO,
        };
        let mut reading = HostReading::default();
        drives.read(look, &mut reading);
        assert_eq!(value(&reading, "disk.media_errors", "sdb"), Some(2.0));
        assert_eq!(value(&reading, "disk.media_errors", ""), Some(8.0));
    }

    #[test]
    fn what_a_drive_said_long_ago_is_absent_rather_than_true_for_ever() {
        let Some(long_ago) = Instant::now().checked_sub(COUNTS) else {
            return; // the machine has not run for so long
        };
        let health = Health {
            failed: Some(false),
            ..Health::default()
        };
        let reading = reading_of(health, long_ago);
        assert_eq!(value(&reading, "disk.smart_failed", "sda"), None);
        assert!(reading.absent["disk.smart_failed"].contains("has not answered"));
    }

    #[test]
    fn only_disks_with_a_size_that_may_be_drives_are_asked() {
        let root = tempfile::tempdir().expect("a directory");
        for (disk, size) in [
            ("sda", "100"),
            ("sdb", "0"),
            ("nvme0n1", "8"),
            ("vda", "9"),
            ("dm-0", "9"),
        ] {
            let directory = root.path().join("sys/block").join(disk);
            std::fs::create_dir_all(&directory).expect("made");
            std::fs::write(directory.join("size"), size).expect("written");
        }
        let names: Vec<String> = drives(root.path()).into_keys().collect();
        assert_eq!(names, ["nvme0n1", "sda"]);
    }

    #[test]
    fn the_wear_of_flash_cards_is_in_steps_of_ten() {
        let root = tempfile::tempdir().expect("a directory");
        let directory = root.path().join("sys/block/mmcblk0/device");
        std::fs::create_dir_all(&directory).expect("made");
        std::fs::write(directory.join("life_time"), "0x01 0x03\n").expect("written");
        let mut reading = HostReading::default();
        let look = Look {
            root: root.path(),
            elapsed: Duration::ZERO,
        };
        Drives::default().read(look, &mut reading);
        assert_eq!(value(&reading, "disk.wear", "mmcblk0"), Some(30.0));
        assert_eq!(value(&reading, "disk.wear", ""), Some(30.0));
    }
}
