//! Memory: what is left, faults, swap, kills.

use super::counters::Counters;
use super::files::{field, why};
use super::{HostReading, Look};
use crate::model::units::Bytes;
use procfs::{FromRead, Meminfo};
use std::fs;

const PROCFS: &str = "procfs is not mounted below the root";

#[derive(Default)]
pub struct Memory(Counters);

impl Memory {
    pub fn read(&mut self, look: Look, reading: &mut HostReading) {
        meminfo(look, reading);
        self.0.turn();
        let path = look.path("proc/vmstat");
        let Ok(text) = fs::read_to_string(&path) else {
            let why = why(&path, PROCFS);
            let metrics = [
                "memory.major_faults",
                "memory.minor_faults",
                "memory.swap_in",
                "memory.swap_out",
                "memory.oom_kills",
            ];
            reading.absent(&metrics, &why);
            return;
        };
        let mut more = |key: &'static str| self.0.more(key, "", field(&text, key)?);
        if let (Some(all), Some(major)) = (more("pgfault"), more("pgmajfault")) {
            let minor = all.saturating_sub(major);
            for (metric, count) in [
                ("memory.major_faults", major),
                ("memory.minor_faults", minor),
            ] {
                if let Some(rate) = look.a_second(count) {
                    reading.device(metric, rate);
                }
            }
        }
        let page = procfs::page_size();
        for (metric, key) in [("memory.swap_in", "pswpin"), ("memory.swap_out", "pswpout")] {
            if let Some(rate) = more(key).and_then(|pages| look.a_second(pages * page)) {
                reading.device(metric, rate);
            }
        }
        if field(&text, "pswpin").is_none() {
            let why = "this kernel has no swap (CONFIG_SWAP)";
            reading.absent(&["memory.swap_in", "memory.swap_out"], why);
        }
        if let Some(kills) = more("oom_kill") {
            reading.device("memory.oom_kills", kills as f64);
        } else if field(&text, "oom_kill").is_none() {
            let why = "/proc/vmstat of this kernel has no oom_kill (before 4.13)";
            reading.absent(&["memory.oom_kills"], why);
        }
    }
}

fn meminfo(look: Look, reading: &mut HostReading) {
    let path = look.path("proc/meminfo");
    let Ok(memory) = Meminfo::from_file(&path) else {
        let metrics = [
            "memory.used",
            "memory.used_bytes",
            "memory.available",
            "memory.swap_used",
        ];
        reading.absent(&metrics, &why(&path, PROCFS));
        return;
    };
    reading.memory_total = Some(Bytes(memory.mem_total));
    reading.memory_available = memory.mem_available.map(Bytes);
    if let Some(available) = memory.mem_available.filter(|_| memory.mem_total > 0) {
        let used = memory.mem_total.saturating_sub(available) as f64;
        reading.device("memory.available", available as f64);
        reading.device("memory.used_bytes", used);
        reading.device("memory.used", 100.0 * used / memory.mem_total as f64);
    }
    if memory.swap_total > 0 {
        let used = memory.swap_total.saturating_sub(memory.swap_free) as f64;
        reading.device("memory.swap_used", 100.0 * used / memory.swap_total as f64);
    } else {
        reading.absent(&["memory.swap_used"], "this host has no swap");
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{recorded, value, write};
    use std::time::Duration;

    #[test]
    fn faults_swap_and_kills_are_those_of_the_interval() {
        let vmstat = |major: u32, faults: u32, swap_in: u32, kills: u32| {
            format!(
                "nr_free_pages 9\npswpin {swap_in}\npswpout 8\npgfault {faults}\npgmajfault {major}\noom_kill {kills}\n"
            )
        };
        let (root, mut host) = recorded(&[("proc/vmstat", &vmstat(10, 1000, 0, 3))]);
        let first = host.read(&[], Duration::from_secs(1));
        assert_eq!(value(&first, "memory.oom_kills", ""), None);
        write(root.path(), &[("proc/vmstat", &vmstat(30, 1120, 2, 4))]);
        let second = host.read(&[], Duration::from_secs(2));
        assert_eq!(value(&second, "memory.major_faults", ""), Some(10.0));
        assert_eq!(value(&second, "memory.minor_faults", ""), Some(50.0));
        let page = procfs::page_size() as f64;
        assert_eq!(value(&second, "memory.swap_in", ""), Some(page));
        assert_eq!(value(&second, "memory.swap_out", ""), Some(0.0));
        assert_eq!(value(&second, "memory.oom_kills", ""), Some(1.0));
    }

    #[test]
    fn a_host_without_swap_says_so() {
        let (_root, mut host) = recorded(&[(
            "proc/meminfo",
            "MemTotal: 1000 kB\nMemFree: 200 kB\nMemAvailable: 400 kB\nBuffers: 1 kB\nCached: 1 kB\n\
             SwapCached: 0 kB\nActive: 1 kB\nInactive: 1 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\nDirty: 0 kB\n\
             Writeback: 0 kB\nMapped: 0 kB\nSlab: 0 kB\nCommitted_AS: 0 kB\nVmallocTotal: 1 kB\n\
             VmallocUsed: 0 kB\nVmallocChunk: 0 kB\n",
        )]);
        let reading = host.read(&[], Duration::from_secs(1));
        assert_eq!(value(&reading, "memory.used", ""), Some(60.0));
        assert_eq!(
            value(&reading, "memory.used_bytes", ""),
            Some(600.0 * 1024.0)
        );
        assert_eq!(reading.absent["memory.swap_used"], "this host has no swap");
    }
}
