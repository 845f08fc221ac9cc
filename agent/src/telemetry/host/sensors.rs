//! Temperatures and the parts' own limits (Linux, Documentation/hwmon/sysfs-interface.rst,
//! Documentation/driver-api/thermal/sysfs-api.rst).

use super::files::{entries, name, number, text, why};
use super::{HostReading, Look};
use crate::model::metric::Per;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

/// Chips inside drives; what they say belongs to the disk.
const DRIVES: [&str; 2] = ["nvme", "drivetemp"];
/// How the names of chips and zones begin that measure the processor, in lower case; so do those with `cpu` anywhere in
/// them. All else goes by its own name: it is hotter by design, as network cards are, or of inputs to which nobody
/// connected a sensor, as on motherboards, and must not fire a threshold that is meant for a processor.
const PROCESSORS: [&str; 13] = [
    "coretemp",
    "k8temp",
    "k10temp",
    "zenpower",
    "x86_pkg_temp",
    "acpitz",
    "b0d4",
    // ARM: soc_thermal, bigcore0-thermal, littlecore-thermal, core-cluster0-thermal, and X-Gene.
    "soc",
    "bigcore",
    "littlecore",
    "core-cluster",
    "apm_xgene",
    // POWER.
    "ibmpowernv",
];
/// Limits beyond this are place-holders (some NVMe drives tell 65261 °C).
const CREDIBLE_C: RangeInclusive<f64> = 1.0..=150.0;
/// What a sensor may read: beyond it, nothing is connected (-128 and 255 °C are usual).
const READABLE_C: RangeInclusive<f64> = -40.0..=150.0;

const CPU: [&str; 3] = [
    "cpu.temperature",
    "cpu.temperature_limit",
    "cpu.temperature_margin",
];
const OTHER: [&str; 2] = ["sensor.temperature", "sensor.temperature_limit"];
pub const DISK: [&str; 3] = [
    "disk.temperature",
    "disk.temperature_limit",
    "disk.temperature_margin",
];

struct Sensor {
    label: String,
    celsius: f64,
    critical: Option<f64>,
    high: Option<f64>,
}

/// Processors and other parts.
pub fn parts(look: Look, reading: &mut HostReading) {
    let class = look.path("sys/class/hwmon");
    let mut parts = BTreeMap::new();
    for chip in entries(&class) {
        let kind = kind(&chip);
        if DRIVES.contains(&kind.as_str()) {
            continue;
        }
        let other = !is_processor(&kind);
        let mut part = part(&chip, kind);
        let alike = parts.entry(part.clone()).or_insert(0_usize);
        *alike += 1;
        if *alike > 1 {
            // Without a device they cannot be told apart but by their order.
            part = format!("{part} {alike}");
        }
        for sensor in sensors(&chip) {
            let subject = format!("{part}/{}", sensor.label);
            // Of a processor, `max` is often where the fan should turn faster; `crit` is its limit.
            let limit = sensor.critical.or(sensor.high);
            push(reading, other, &subject, sensor.celsius, limit);
        }
    }
    let zones = look.path("sys/class/thermal");
    for zone in entries(&zones) {
        let file = name(&zone);
        if !file.starts_with("thermal_zone") {
            continue;
        }
        if let Some(celsius) = readable(&zone.join("temp")) {
            let kind = text(&zone.join("type")).unwrap_or_default();
            let other = !is_processor(&kind);
            let subject = if kind.is_empty() {
                file
            } else {
                format!("{file}/{kind}")
            };
            push(reading, other, &subject, celsius, critical_trip(&zone));
        }
    }
    reading.device_from_parts(CPU[0], f64::max);
    reading.device_from_parts(CPU[1], f64::min);
    reading.device_from_parts(CPU[2], f64::min);
    if reading.values_of(CPU[0]).next().is_some() {
        reading.absent(&CPU[1..], "the sensors here publish no limit of their own");
    } else {
        let why = why(&class, "no sensor; virtual machines have none");
        reading.absent(&CPU, &why);
    }
    reading.absent(
        &OTHER,
        "no part besides processor and drives has a sensor here",
    );
}

fn push(reading: &mut HostReading, other: bool, subject: &str, celsius: f64, limit: Option<f64>) {
    let (metrics, margin) = if other {
        (OTHER, None)
    } else {
        ([CPU[0], CPU[1]], Some(CPU[2]))
    };
    reading.of(metrics[0], Per::Sensor, subject, celsius);
    if let Some(limit) = limit {
        reading.of(metrics[1], Per::Sensor, subject, limit);
        if let Some(margin) = margin {
            reading.of(margin, Per::Sensor, subject, limit - celsius);
        }
    }
}

/// Sensors inside drives.
pub fn drives(look: Look, reading: &mut HostReading) {
    let mut hottest: BTreeMap<String, Sensor> = BTreeMap::new();
    for chip in entries(&look.path("sys/class/hwmon")) {
        if !DRIVES.contains(&kind(&chip).as_str()) {
            continue;
        }
        // The first sensor is the drive's composite temperature, the one that its limits are for.
        if let Some(sensor) = sensors(&chip).into_iter().next() {
            hottest.insert(disk_of(&chip), sensor);
        }
    }
    for (disk, sensor) in hottest {
        // `max` is where the drive itself begins to slow down (NVMe WCTEMP).
        temperature(
            reading,
            &disk,
            sensor.celsius,
            sensor.high.or(sensor.critical),
        );
    }
}

/// A drive's temperature beside its own limit.
pub fn temperature(reading: &mut HostReading, disk: &str, celsius: f64, limit: Option<f64>) {
    if !READABLE_C.contains(&celsius) {
        return;
    }
    reading.of(DISK[0], Per::Disk, disk, celsius);
    if let Some(limit) = limit.filter(|limit| CREDIBLE_C.contains(limit)) {
        reading.of(DISK[1], Per::Disk, disk, limit);
        reading.of(DISK[2], Per::Disk, disk, limit - celsius);
    }
}

fn kind(chip: &Path) -> String {
    text(&chip.join("name")).unwrap_or_else(|| name(chip))
}

/// A chip by its device: the number of its directory changes from one start of the host to the next, and a name that
/// depended on how many chips of its kind there are would change when one comes.
fn part(chip: &Path, kind: String) -> String {
    let Ok(device) = chip.join("device").canonicalize() else {
        return kind;
    };
    let device = name(&device);
    // Numbers that follow the order in which drivers came up tell no part; of one on I2C its address does.
    let of_order = |start: &str| {
        let number = device.strip_prefix(start);
        number.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
    };
    if of_order("thermal_zone") || of_order("phy") {
        return kind;
    }
    let address = device
        .split_once('-')
        .filter(|(bus, _)| bus.bytes().all(|byte| byte.is_ascii_digit()))
        .map(|(_, address)| address);
    if let Some(address) = address {
        format!("{kind}-{address}")
    } else if device.starts_with(&kind) {
        device
    } else {
        format!("{kind}-{device}")
    }
}

fn sensors(chip: &Path) -> Vec<Sensor> {
    let inputs = entries(chip);
    let mut labels = BTreeSet::new();
    let sensor = |input: &PathBuf| {
        let file = name(input);
        let index = file.strip_prefix("temp")?.strip_suffix("_input")?;
        let input_name = format!("temp{index}");
        let mut label =
            text(&chip.join(format!("temp{index}_label"))).unwrap_or(input_name.clone());
        // Also of one that cannot be read now: which of two bears the label alone does not depend on that.
        if !labels.insert(label.clone()) {
            label = format!("{label} ({input_name})");
        }
        let of = |what: &str| chip.join(format!("temp{index}_{what}"));
        let is_faulty = number::<u8>(&of("fault")) == Some(1);
        let limit = |what| millidegrees(&of(what)).filter(|limit| CREDIBLE_C.contains(limit));
        Some(Sensor {
            celsius: readable(input).filter(|_| !is_faulty)?,
            critical: limit("crit"),
            high: limit("max"),
            label,
        })
    };
    inputs.iter().filter_map(sensor).collect()
}

fn critical_trip(zone: &Path) -> Option<f64> {
    let trips = (0..).map_while(|trip| {
        let kind = text(&zone.join(format!("trip_point_{trip}_type")))?;
        Some((kind, zone.join(format!("trip_point_{trip}_temp"))))
    });
    trips
        .filter(|(kind, _)| kind == "critical")
        .find_map(|(_, temp)| millidegrees(&temp))
        .filter(|limit| CREDIBLE_C.contains(limit))
}

/// The block device that a drive's chip belongs to.
fn disk_of(chip: &Path) -> String {
    let device = chip.join("device");
    let block = entries(&device.join("block"));
    let mut namespaces = entries(&device).into_iter().map(|entry| name(&entry));
    block
        .first()
        .map(|disk| name(disk))
        .or_else(|| namespaces.find(|name| name.starts_with("nvme") && name[4..].contains('n')))
        .or_else(|| device.canonicalize().ok().map(|device| name(&device)))
        .unwrap_or_else(|| name(chip))
}

fn is_processor(kind: &str) -> bool {
    let kind = kind.to_ascii_lowercase();
    kind.contains("cpu") || PROCESSORS.iter().any(|known| kind.starts_with(known))
}

fn readable(path: &Path) -> Option<f64> {
    millidegrees(path).filter(|celsius| READABLE_C.contains(celsius))
}

fn millidegrees(path: &Path) -> Option<f64> {
    Some(number::<f64>(path)? / 1000.0)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{LATER, none_twice, recorded, value};
    use super::is_processor;

    #[test]
    fn processors_are_known_by_the_names_that_their_makers_give_them() {
        for kind in [
            "k10temp",
            "via_cputemp",
            "TCPU",
            "B0D4",
            "cpu_thermal",
            "cpuss-0-thermal",
            "CPU-therm",
            "BCPU-therm",
            "MCPU-therm",
            "soc_thermal",
            "core-cluster0-thermal",
            "apm_xgene",
            "ibmpowernv",
        ] {
            assert!(is_processor(kind), "{kind}");
        }
        for kind in [
            "nct6775",
            "GPU-therm",
            "mlx5",
            "iwlwifi_1",
            "pch_skylake",
            "acpi_fan",
        ] {
            assert!(!is_processor(kind), "{kind}");
        }
    }

    #[test]
    fn each_sensor_stands_beside_its_own_limit_and_the_hottest_is_the_devices() {
        let (_root, mut host) = recorded(&[
            ("sys/class/hwmon/hwmon0/name", "coretemp\n"),
            ("sys/class/hwmon/hwmon0/temp1_input", "61000\n"),
            ("sys/class/hwmon/hwmon0/temp1_label", "Package id 0\n"),
            ("sys/class/hwmon/hwmon0/temp1_max", "80000\n"),
            ("sys/class/hwmon/hwmon0/temp1_crit", "100000\n"),
            ("sys/class/hwmon/hwmon1/name", "nvme\n"),
            ("sys/class/hwmon/hwmon1/temp1_input", "44850\n"),
            ("sys/class/hwmon/hwmon1/temp1_label", "Composite\n"),
            ("sys/class/hwmon/hwmon1/temp1_max", "81850\n"),
            ("sys/class/hwmon/hwmon1/temp1_crit", "84850\n"),
            ("sys/class/hwmon/hwmon1/temp3_input", "90850\n"),
            ("sys/class/hwmon/hwmon1/temp3_max", "65261850\n"),
            ("sys/class/hwmon/hwmon1/device/nvme0n1/size", "1\n"),
            ("sys/class/hwmon/hwmon2/name", "drivetemp\n"),
            ("sys/class/hwmon/hwmon2/temp1_input", "38000\n"),
            ("sys/class/hwmon/hwmon2/device/block/sda/size", "1\n"),
            ("sys/class/hwmon/hwmon3/name", "mlx5\n"),
            ("sys/class/hwmon/hwmon3/temp1_input", "97000\n"),
            ("sys/class/hwmon/hwmon3/temp1_crit", "105000\n"),
            // A motherboard: nothing is connected to most of its inputs.
            ("sys/class/hwmon/hwmon4/name", "nct6775\n"),
            ("sys/class/hwmon/hwmon4/temp1_input", "127500\n"),
            ("sys/class/hwmon/hwmon4/temp2_input", "-128000\n"),
            ("sys/class/hwmon/hwmon4/temp3_input", "90000\n"),
            ("sys/class/hwmon/hwmon4/temp3_fault", "1\n"),
            ("sys/class/hwmon/hwmon4/temp4_input", "31000\n"),
            ("sys/class/hwmon/hwmon4/temp4_fault", "0\n"),
            ("sys/class/thermal/thermal_zone1/temp", "160000\n"),
            ("sys/class/thermal/thermal_zone1/type", "cpu-thermal\n"),
            ("sys/class/thermal/thermal_zone0/temp", "55500\n"),
            ("sys/class/thermal/thermal_zone0/type", "acpitz\n"),
            (
                "sys/class/thermal/thermal_zone0/trip_point_0_type",
                "passive\n",
            ),
            (
                "sys/class/thermal/thermal_zone0/trip_point_0_temp",
                "95000\n",
            ),
            (
                "sys/class/thermal/thermal_zone0/trip_point_1_type",
                "critical\n",
            ),
            (
                "sys/class/thermal/thermal_zone0/trip_point_1_temp",
                "119000\n",
            ),
            ("sys/class/thermal/cooling_device0/type", "Processor\n"),
        ]);
        let reading = host.read(&[], LATER);
        let of = |metric, name| value(&reading, metric, name);
        assert_eq!(of("cpu.temperature", "coretemp/Package id 0"), Some(61.0));
        assert_eq!(
            of("cpu.temperature_limit", "coretemp/Package id 0"),
            Some(100.0)
        );
        assert_eq!(
            of("cpu.temperature_margin", "thermal_zone0/acpitz"),
            Some(63.5)
        );
        assert_eq!(of("cpu.temperature", ""), Some(61.0));
        assert_eq!(of("cpu.temperature_limit", ""), Some(100.0));
        assert_eq!(of("cpu.temperature_margin", ""), Some(39.0));
        assert_eq!(of("disk.temperature", "nvme0n1"), Some(44.85));
        assert_eq!(of("disk.temperature_limit", "nvme0n1"), Some(81.85));
        assert_eq!(of("disk.temperature", "sda"), Some(38.0));
        assert_eq!(of("disk.temperature_limit", "sda"), None);
        assert_eq!(of("sensor.temperature", "mlx5/temp1"), Some(97.0));
        assert_eq!(of("sensor.temperature_limit", "mlx5/temp1"), Some(105.0));
        let board = |input| of("sensor.temperature", input);
        assert_eq!(board("nct6775/temp1"), Some(127.5));
        assert_eq!(board("nct6775/temp2"), None);
        assert_eq!(board("nct6775/temp3"), None);
        assert_eq!(board("nct6775/temp4"), Some(31.0));
        assert_eq!(of("cpu.temperature", "thermal_zone1/cpu-thermal"), None);
    }

    #[test]
    fn a_chip_is_named_by_its_device_however_many_of_its_kind_there_are() {
        let (root, mut host) = recorded(&[
            ("sys/class/hwmon/hwmon0/name", "coretemp\n"),
            ("sys/class/hwmon/hwmon0/temp1_input", "61000\n"),
            ("sys/class/hwmon/hwmon0/temp1_label", "Core 0\n"),
            ("sys/class/hwmon/hwmon1/name", "coretemp\n"),
            ("sys/class/hwmon/hwmon1/temp1_input", "97000\n"),
            ("sys/class/hwmon/hwmon1/temp1_label", "Core 0\n"),
            ("sys/class/hwmon/hwmon2/name", "jc42\n"),
            ("sys/class/hwmon/hwmon2/temp1_input", "31000\n"),
            ("sys/class/hwmon/hwmon3/name", "jc42\n"),
            ("sys/class/hwmon/hwmon3/temp1_input", "32000\n"),
            ("sys/class/hwmon/hwmon4/name", "acpi\n"),
            ("sys/class/hwmon/hwmon4/temp1_input", "33000\n"),
            ("sys/class/hwmon/hwmon4/temp1_label", "Board\n"),
            ("sys/class/hwmon/hwmon4/temp2_input", "34000\n"),
            ("sys/class/hwmon/hwmon4/temp2_label", "Board\n"),
            ("sys/class/hwmon/hwmon5/name", "jc42\n"),
            ("sys/class/hwmon/hwmon5/temp1_input", "35000\n"),
            ("sys/class/hwmon/hwmon6/name", "mlx5\n"),
            ("sys/class/hwmon/hwmon6/temp1_input", "36000\n"),
            ("sys/devices/0000:3b:00.0/uevent", ""),
            ("sys/devices/coretemp.0/uevent", ""),
            ("sys/devices/coretemp.1/uevent", ""),
            ("sys/devices/3-0018/uevent", ""),
        ]);
        for (chip, device) in [
            (0, "coretemp.0"),
            (1, "coretemp.1"),
            (2, "3-0018"),
            (6, "0000:3b:00.0"),
        ] {
            let device = root.path().join("sys/devices").join(device);
            let chip = format!("sys/class/hwmon/hwmon{chip}/device");
            std::os::unix::fs::symlink(device, root.path().join(chip)).expect("linked");
        }
        let reading = host.read(&[], LATER);
        none_twice(&reading);
        let of = |name| value(&reading, "cpu.temperature", name);
        let part = |name| value(&reading, "sensor.temperature", name);
        assert_eq!(of("coretemp.0/Core 0"), Some(61.0));
        assert_eq!(of("coretemp.1/Core 0"), Some(97.0));
        assert_eq!(part("jc42-0018/temp1"), Some(31.0));
        assert_eq!(part("jc42/temp1"), Some(32.0), "it has no device");
        assert_eq!(part("jc42 2/temp1"), Some(35.0), "nor has this one");
        assert_eq!(part("mlx5-0000:3b:00.0/temp1"), Some(36.0));
        assert_eq!(part("acpi/Board"), Some(33.0));
        assert_eq!(part("acpi/Board (temp2)"), Some(34.0));
        // One that cannot be read, or is gone, leaves the others their names.
        std::fs::remove_dir_all(root.path().join("sys/class/hwmon/hwmon0")).expect("removed");
        let unreadable = root.path().join("sys/class/hwmon/hwmon4/temp1_input");
        std::fs::write(unreadable, "-128000\n").expect("written");
        let reading = host.read(&[], LATER.saturating_mul(2));
        let of = |metric, name| value(&reading, metric, name);
        assert_eq!(of("cpu.temperature", "coretemp.1/Core 0"), Some(97.0));
        assert_eq!(of("sensor.temperature", "acpi/Board (temp2)"), Some(34.0));
    }
}
