//! Memory errors that the memory controllers report (Linux, Documentation/admin-guide/ras.rst, EDAC).

use super::counters::Counters;
use super::files::{entries, name, number, why};
use super::{HostReading, Look, sum};
use crate::model::metric::Per;

const ERRORS: [(&str, &str); 2] = [
    ("memory.ecc_corrected", "ce_count"),
    ("memory.ecc_uncorrected", "ue_count"),
];

#[derive(Default)]
pub struct Ecc(Counters);

impl Ecc {
    pub fn read(&mut self, look: Look, reading: &mut HostReading) {
        self.0.turn();
        let controllers = look.path("sys/devices/system/edac/mc");
        let mut known = false;
        for directory in entries(&controllers) {
            let controller = name(&directory);
            for (metric, file) in ERRORS {
                let Some(count) = number::<u64>(&directory.join(file)) else {
                    continue;
                };
                known = true;
                if let Some(more) = self.0.more(metric, &controller, count) {
                    reading.of(metric, Per::Controller, &controller, more as f64);
                }
            }
        }
        for (metric, _) in ERRORS {
            reading.device_from_parts(metric, sum);
        }
        if !known {
            let why = why(
                &controllers,
                "memory without ECC, or no EDAC driver for this memory controller",
            );
            reading.absent(&ERRORS.map(|(metric, _)| metric), &why);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{LATER, recorded, value, write};

    #[test]
    fn errors_since_boot_are_not_new_and_those_after_the_start_are() {
        let mc = "sys/devices/system/edac/mc";
        let at = |file: &str| format!("{mc}/{file}");
        let (root, mut host) = recorded(&[
            (&at("mc0/ce_count"), "120\n"),
            (&at("mc0/ue_count"), "0\n"),
            (&at("mc0/ce_noinfo_count"), "0\n"),
            (&at("mc1/ce_count"), "3\n"),
            (&at("mc1/ue_count"), "1\n"),
            (&at("power/control"), "auto\n"),
        ]);
        let first = host.read(&[], LATER);
        assert_eq!(value(&first, "memory.ecc_corrected", ""), None);
        write(
            root.path(),
            &[(&at("mc0/ce_count"), "125\n"), (&at("mc1/ue_count"), "2\n")],
        );
        let second = host.read(&[], LATER);
        assert_eq!(value(&second, "memory.ecc_corrected", "mc0"), Some(5.0));
        assert_eq!(value(&second, "memory.ecc_corrected", "mc1"), Some(0.0));
        assert_eq!(value(&second, "memory.ecc_corrected", ""), Some(5.0));
        assert_eq!(value(&second, "memory.ecc_uncorrected", ""), Some(1.0));
    }
}
