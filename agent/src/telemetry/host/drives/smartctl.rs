//! smartctl's JSON (smartctl(8), `--json`).

use super::{Answer, Health};
use serde::Deserialize;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A drive that retries inside answers late; one that takes longer is not going to.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why smartctl told nothing.
#[derive(Debug, thiserror::Error)]
pub enum NotAsked {
    /// It is not installed.
    #[error("smartctl is not installed; install smartmontools to see the health of this drive")]
    Absent,
    /// It cannot be run.
    #[error("smartctl cannot be run: {0}")]
    Run(std::io::Error),
    /// No answer in time.
    #[error("smartctl had no answer within {PATIENCE:?}")]
    Late,
    /// Its answer is not what we know.
    #[error("smartctl's answer is not understood: {0}")]
    Answer(#[from] serde_json::Error),
    /// It says why it could not ask.
    #[error("smartctl: {0}")]
    Told(String),
}

/// Asks one drive, unless it sleeps.
pub fn ask(device: &Path) -> Result<Answer, NotAsked> {
    let spawned = Command::new("smartctl")
        .args(["--json", "-a", "-n", "standby"])
        .arg(device)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let mut child = spawned.map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => NotAsked::Absent,
        _ => NotAsked::Run(error),
    })?;
    let mut output = child.stdout.take();
    // Read aside: an answer larger than the pipe must not stop smartctl.
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        if let Some(output) = &mut output {
            let _ = output.read_to_string(&mut text);
        }
        text
    });
    let started = Instant::now();
    loop {
        match child.try_wait().map_err(NotAsked::Run)? {
            Some(_) => break,
            None if started.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(50)),
            None => {
                // Neither is waited for: a process inside a dead drive's driver cannot be killed.
                let _ = child.kill();
                return Err(NotAsked::Late);
            }
        }
    }
    decode(&reader.join().unwrap_or_default())
}

#[derive(Deserialize)]
struct Output {
    smartctl: Run,
    #[serde(default)]
    logical_block_size: Option<u64>,
    #[serde(default)]
    smart_status: Option<Status>,
    #[serde(default)]
    temperature: Option<Temperature>,
    #[serde(default)]
    power_on_time: Option<PowerOn>,
    #[serde(default)]
    endurance_used: Option<Endurance>,
    #[serde(default)]
    ata_smart_attributes: Option<Attributes>,
    #[serde(default)]
    nvme_smart_health_information_log: Option<Nvme>,
    #[serde(default)]
    nvme_composite_temperature_threshold: Option<Composite>,
    #[serde(default)]
    scsi_grown_defect_list: Option<u64>,
    #[serde(default)]
    scsi_error_counter_log: Option<ScsiErrors>,
}

#[derive(Deserialize)]
struct Run {
    exit_status: u32,
    #[serde(default)]
    messages: Vec<Message>,
}

#[derive(Deserialize)]
struct Message {
    string: String,
}

#[derive(Deserialize)]
struct Status {
    passed: bool,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Temperature {
    current: Option<f64>,
    op_limit_max: Option<f64>,
    drive_trip: Option<f64>,
}

#[derive(Deserialize)]
struct PowerOn {
    hours: f64,
}

#[derive(Deserialize)]
struct Endurance {
    current_percent: f64,
}

#[derive(Deserialize)]
struct Composite {
    #[serde(default)]
    warning: Option<f64>,
}

#[derive(Deserialize)]
struct Attributes {
    table: Vec<Attribute>,
}

#[derive(Deserialize)]
struct Attribute {
    id: u8,
    name: String,
    when_failed: String,
    raw: Raw,
}

#[derive(Deserialize)]
struct Raw {
    value: u64,
}

#[derive(Deserialize)]
struct Nvme {
    available_spare: f64,
    available_spare_threshold: f64,
    percentage_used: f64,
    data_units_written: f64,
    media_errors: u64,
}

#[derive(Deserialize)]
struct ScsiErrors {
    #[serde(default)]
    read: Option<ScsiCounter>,
    #[serde(default)]
    write: Option<ScsiCounter>,
    #[serde(default)]
    verify: Option<ScsiCounter>,
}

#[derive(Deserialize)]
struct ScsiCounter {
    #[serde(default)]
    gigabytes_processed: String,
    total_uncorrected_errors: u64,
}

/// What smartctl printed about one drive.
pub fn decode(text: &str) -> Result<Answer, NotAsked> {
    let output: Output = serde_json::from_str(text)?;
    // Bits 0 and 1 say that the drive was not asked at all (smartctl(8), EXIT STATUS).
    if output.smartctl.exit_status & 0b11 != 0 && output.smart_status.is_none() {
        let told: Vec<&str> = output
            .smartctl
            .messages
            .iter()
            .map(|message| message.string.as_str())
            .collect();
        let told = told.join("; ");
        let sleeps = ["STANDBY", "SLEEP"].iter().any(|mode| told.contains(mode));
        return if sleeps {
            Ok(Answer::Sleeps)
        } else {
            Err(NotAsked::Told(told))
        };
    }
    Ok(Answer::Told(Box::new(output.health())))
}

impl Output {
    fn health(&self) -> Health {
        let temperature = self.temperature.as_ref();
        let composite = self.nvme_composite_temperature_threshold.as_ref();
        let mut health = Health {
            failed: self.smart_status.as_ref().map(|status| !status.passed),
            wear_percent: self
                .endurance_used
                .as_ref()
                .map(|used| used.current_percent),
            power_on_hours: self.power_on_time.as_ref().map(|time| time.hours),
            celsius: temperature.and_then(|one| one.current),
            limit_celsius: temperature
                .and_then(|one| one.op_limit_max.or(one.drive_trip))
                .or_else(|| composite?.warning),
            ..Health::default()
        };
        if let Some(attributes) = &self.ata_smart_attributes {
            self.of_ata(&mut health, &attributes.table);
        }
        if let Some(log) = &self.nvme_smart_health_information_log {
            health.wear_percent = Some(log.percentage_used);
            health.spare_margin_percent = Some(log.available_spare - log.available_spare_threshold);
            health.media_errors = Some(log.media_errors);
            health.bytes_written = Some(log.data_units_written * super::nvme::DATA_UNIT);
        }
        if let Some(defects) = self.scsi_grown_defect_list {
            health.reallocated = Some(defects);
        }
        if let Some(log) = &self.scsi_error_counter_log {
            let counters = [&log.read, &log.write, &log.verify];
            let errors = counters.into_iter().flatten();
            health.media_errors = Some(errors.map(|one| one.total_uncorrected_errors).sum());
            let written = log.write.as_ref();
            // smartctl counts 10^9 bytes here.
            health.bytes_written = written
                .and_then(|one| one.gigabytes_processed.parse().ok())
                .map(|gigabytes: f64| gigabytes * 1e9);
        }
        health
    }

    fn of_ata(&self, health: &mut Health, table: &[Attribute]) {
        let of = |id: u8| table.iter().find(|attribute| attribute.id == id);
        // The low 48 bits are the attribute's; some makers keep other counts in the upper half of them.
        let raw = |id| of(id).map(|attribute| attribute.raw.value & 0xffff_ffff);
        let failing = table.iter().filter(|one| one.when_failed == "now");
        health.attributes_failing = Some(failing.count() as u64);
        health.reallocated = raw(5);
        health.pending = raw(197);
        // Reported_Uncorrect where the drive has it, else Offline_Uncorrectable.
        health.media_errors = raw(187).or_else(|| raw(198));
        let written = of(241).filter(|attribute| attribute.name.starts_with("Total_LBAs_Written"));
        let sector = self.logical_block_size.unwrap_or(512);
        health.bytes_written = written.map(|one| one.raw.value as f64 * sector as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(text: &str) -> Health {
        match decode(text) {
            Ok(Answer::Told(health)) => *health,
            Ok(Answer::Sleeps) => panic!("it sleeps"),
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn a_failing_ata_disk_tells_by_its_own_thresholds() {
        let health = told(include_str!("../fixtures/ata-failing.json"));
        let expected = Health {
            failed: Some(true),
            attributes_failing: Some(1), // one that failed in the past does not count
            media_errors: Some(2),
            reallocated: Some(1975),
            pending: Some(8),
            bytes_written: Some(1_024_000_000.0),
            power_on_hours: Some(65_592.0),
            celsius: Some(25.0),
            limit_celsius: Some(60.0),
            ..Health::default()
        };
        assert_eq!(health, expected);
    }

    #[test]
    fn an_nvme_drive_tells_wear_and_spare_beside_its_threshold() {
        let health = told(include_str!("../fixtures/nvme.json"));
        let expected = Health {
            failed: Some(false),
            wear_percent: Some(4.0),
            spare_margin_percent: Some(87.0),
            media_errors: Some(0),
            bytes_written: Some(7_773_431.0 * 512_000.0),
            power_on_hours: Some(2401.0),
            celsius: Some(36.0),
            limit_celsius: Some(77.0),
            ..Health::default()
        };
        assert_eq!(health, expected);
    }

    #[test]
    fn a_sas_disk_tells_defects_and_uncorrected_errors() {
        let health = told(include_str!("../fixtures/sas.json"));
        let expected = Health {
            failed: Some(false),
            media_errors: Some(4),
            reallocated: Some(56),
            bytes_written: Some(86_472.611 * 1e9),
            power_on_hours: Some(43_549.0),
            celsius: Some(34.0),
            limit_celsius: Some(68.0),
            ..Health::default()
        };
        assert_eq!(health, expected);
    }

    #[test]
    fn a_disk_that_sleeps_is_no_error_and_one_that_cannot_be_opened_is() {
        let standby = decode(include_str!("../fixtures/standby.json"));
        assert!(matches!(standby, Ok(Answer::Sleeps)));
        let refused = r#"{"smartctl": {"messages": [{"string": "Smartctl open device: /dev/sdz failed: No such device", "severity": "error"}], "exit_status": 2}}"#;
        let error = decode(refused).map(|_| ()).expect_err("not asked");
        assert!(error.to_string().contains("/dev/sdz failed"), "{error}");
        assert!(decode("").is_err());
    }
}
