//! Bytes between caches and memory: by resctrl where it is mounted (Linux,
//! Documentation/filesystems/resctrl.rst), else by the counters of Intel's memory controllers.

use super::counters::Counters;
use super::files::{entries, name, number, text, why};
use super::perf_event::{self, Event, count, open};
use super::{HostReading, Look};
use std::fs::File;
use std::io;
use std::path::Path;

const METRIC: &str = "memory.bandwidth";

/// Events of a memory controller: of servers per channel, of clients for all.
const EVENTS: [&str; 4] = [
    "cas_count_read",
    "cas_count_write",
    "data_reads",
    "data_writes",
];

/// An open counter and what one event of it is.
struct Channel {
    counter: File,
    bytes: f64,
}

pub struct Bandwidth {
    resctrl: Counters,
    channels: Result<Vec<Channel>, String>,
    before: Option<f64>,
}

impl Bandwidth {
    pub fn open(root: &Path) -> Self {
        Self {
            resctrl: Counters::default(),
            channels: open_all(root),
            before: None,
        }
    }

    pub fn read(&mut self, look: Look, reading: &mut HostReading) {
        self.resctrl.turn();
        let monitored = look.path("sys/fs/resctrl/mon_data");
        let mut bytes: Option<u64> = None;
        for cache in entries(&monitored) {
            let counted = number::<u64>(&cache.join("mbm_total_bytes"));
            let more = counted.and_then(|now| self.resctrl.more("bytes", &name(&cache), now));
            bytes = more.map(|more| bytes.unwrap_or(0) + more).or(bytes);
        }
        let counted = bytes.and_then(|bytes| look.a_second(bytes));
        if let Some(rate) = counted.or_else(|| self.of_controllers(look)) {
            reading.device(METRIC, rate);
        } else {
            let resctrl = why(
                &monitored,
                "resctrl is not mounted, or the processor does not count memory bandwidth",
            );
            let uncore = self.channels.as_ref().err().map_or("", String::as_str);
            reading.absent(&[METRIC], &format!("{resctrl}; {uncore}"));
        }
    }

    fn of_controllers(&mut self, look: Look) -> Option<f64> {
        let channels = self.channels.as_mut().ok()?;
        let counted = channels
            .iter_mut()
            .filter_map(|channel| Some(count(&mut channel.counter)? * channel.bytes));
        let now: f64 = counted.sum();
        let before = self.before.replace(now)?;
        (!look.elapsed.is_zero()).then(|| (now - before).max(0.0) / look.elapsed.as_secs_f64())
    }
}

/// One event of one memory controller as sysfs describes it.
#[derive(Debug, PartialEq)]
struct Described {
    event: Event,
    /// CPU that is asked, one of each package.
    cpu: usize,
    /// Bytes that one event stands for.
    bytes: f64,
}

fn open_all(root: &Path) -> Result<Vec<Channel>, String> {
    let described = described(root);
    if described.is_empty() {
        return Err(
            "no memory controller counts here (uncore_imc of Intel's processors)".to_owned(),
        );
    }
    described
        .into_iter()
        .map(|one| {
            Ok(Channel {
                counter: open(one.event, one.cpu, None)?,
                bytes: one.bytes,
            })
        })
        .collect::<io::Result<_>>()
        .map_err(|error| format!("memory controllers: {}", perf_event::why(&error)))
}

/// The events of all memory controllers (Linux, Documentation/ABI/testing/sysfs-bus-event_source-devices-events
/// and -format).
fn described(root: &Path) -> Vec<Described> {
    let mut found = Vec::new();
    for pmu in entries(&root.join("sys/bus/event_source/devices")) {
        if !name(&pmu).starts_with("uncore_imc") {
            continue;
        }
        let cpus = text(&pmu.join("cpumask")).unwrap_or_default();
        for event in EVENTS {
            let at = |suffix: &str| text(&pmu.join("events").join(format!("{event}{suffix}")));
            let described = || {
                let kind = number(&pmu.join("type"))?;
                let config = config(&pmu, &at("")?)?;
                let unit = match at(".unit")?.as_str() {
                    "MiB" => 1_048_576.0,
                    "Bytes" => 1.0,
                    _ => return None,
                };
                let bytes = at(".scale")?.parse::<f64>().ok()? * unit;
                Some((Event { kind, config }, bytes))
            };
            if let Some((event, bytes)) = described() {
                let cpus = cpus.split(',').filter_map(|cpu| cpu.parse().ok());
                found.extend(cpus.map(|cpu| Described { event, cpu, bytes }));
            }
        }
    }
    found
}

/// `event=0x04,umask=0x03` with the bits that `format/event` and `format/umask` give each of them; none for
/// words beyond the first, which these controllers do not have.
fn config(pmu: &Path, terms: &str) -> Option<u64> {
    terms.split(',').try_fold(0, |config, term| {
        let (field, value) = term.split_once('=')?;
        let value = u64::from_str_radix(value.trim_start_matches("0x"), 16).ok()?;
        let format = text(&pmu.join("format").join(field))?;
        let bits = format.strip_prefix("config:")?;
        let first: u32 = bits.split('-').next()?.parse().ok()?;
        Some(config | value.checked_shl(first)?)
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{LATER, recorded, value, write};
    use super::*;

    #[test]
    fn memory_bandwidth_is_the_sum_over_caches() {
        let counted =
            |cache: u32| format!("sys/fs/resctrl/mon_data/mon_L3_0{cache}/mbm_total_bytes");
        let (root, mut host) = recorded(&[(&counted(0), "1000"), (&counted(1), "500")]);
        host.read(&[], LATER);
        write(
            root.path(),
            &[(&counted(0), "201000"), (&counted(1), "100500")],
        );
        let reading = host.read(&[], LATER);
        assert_eq!(value(&reading, METRIC, ""), Some(3000.0));
    }

    #[test]
    fn the_channels_of_memory_controllers_are_found_with_what_their_events_stand_for() {
        let root = tempfile::tempdir().expect("a directory");
        let pmu = "sys/bus/event_source/devices/uncore_imc_0";
        let at = |file: &str| format!("{pmu}/{file}");
        write(
            root.path(),
            &[
                (&at("type"), "21\n"),
                (&at("cpumask"), "0,18\n"),
                (&at("format/event"), "config:0-7\n"),
                (&at("format/umask"), "config:8-15\n"),
                (&at("events/cas_count_read"), "event=0x04,umask=0x03\n"),
                (&at("events/cas_count_read.scale"), "6.103515625e-5\n"),
                (&at("events/cas_count_read.unit"), "MiB\n"),
                (&at("events/clockticks"), "event=0xff,umask=0x00\n"),
                ("sys/bus/event_source/devices/cpu/type", "4\n"),
            ],
        );
        let event = Event {
            kind: 21,
            config: 0x0304,
        };
        let of = |cpu| Described {
            event,
            cpu,
            bytes: 64.0,
        };
        assert_eq!(described(root.path()), [of(0), of(18)]);
    }

    #[test]
    fn a_host_without_such_counters_says_so() {
        let (_root, mut host) = recorded(&[]);
        let reading = host.read(&[], LATER);
        let why = &reading.absent[METRIC];
        assert!(
            why.contains("resctrl") && why.contains("uncore_imc"),
            "{why}"
        );
    }
}
