//! What the programs cost, and what they could not hold.

use super::Kernel;
use crate::model::telemetry::{Loss, ProgramCost};
use crate::model::units::Bytes;
use aya::Ebpf;
use aya::maps::{Array, Map, MapData};
use aya::programs::Program;
use aya::sys::{Stats, enable_stats};
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// Names of the maps of `LOSSES`, in the order of [`lifeboat_ebpf::loss`].
const LOSSES: [&str; lifeboat_ebpf::loss::COUNT as usize] = [
    "run-queue",
    "in-flight",
    "block",
    "open",
    "ports",
    "listening",
    "first-seen",
    "dirtiers",
    "writing",
    "accesses",
    "born",
];

impl Kernel {
    /// What was lost, by map.
    #[must_use]
    pub fn losses(&self) -> Vec<Loss> {
        let Some(array) = self
            .map("LOSSES")
            .and_then(|map| Array::<&MapData, u64>::try_from(map).ok())
        else {
            return Vec::new();
        };
        LOSSES
            .iter()
            .zip(array.iter())
            .filter_map(|(map, lost)| {
                Some(Loss {
                    map: (*map).to_owned(),
                    lost: lost.ok()?,
                })
            })
            .collect()
    }

    /// Kernel memory that all maps take, bytes; none when the kernel does not say.
    #[must_use]
    pub fn map_memory(&self) -> Option<Bytes> {
        let maps = self.ebpf.as_ref()?.maps().map(|(_, map)| match map {
            Map::Array(map)
            | Map::HashMap(map)
            | Map::LruHashMap(map)
            | Map::Stack(map)
            | Map::RingBuf(map) => described(map.fd().as_fd(), "memlock:"),
            _ => None,
        });
        maps.sum::<Option<u64>>().map(Bytes)
    }

    /// Has the kernel measure its programs, or stop it. Measuring itself costs about as much as an
    /// almost empty program.
    ///
    /// # Errors
    /// The kernel refuses before Linux 5.8.
    pub fn measure(&mut self, on: bool) -> Result<(), String> {
        self.measuring = if on {
            let measuring = enable_stats(Stats::RunTime).map_err(|error| {
                format!(
                    "the kernel does not measure its programs: {}",
                    super::chain(&error)
                )
            })?;
            Some(measuring)
        } else {
            None
        };
        Ok(())
    }

    /// What the programs cost while measured.
    #[must_use]
    pub fn costs(&self) -> Vec<ProgramCost> {
        let programs = self.ebpf.iter().flat_map(Ebpf::programs);
        let mut costs: Vec<ProgramCost> = programs
            .filter_map(|(name, program)| {
                let info = program.info().ok()?;
                Some(ProgramCost {
                    name: name.to_owned(),
                    runs: info.run_count(),
                    run_time_ns: u64::try_from(info.run_time().as_nanos()).unwrap_or(u64::MAX),
                    missed: match program {
                        Program::BtfTracePoint(program) => {
                            let fd = program.fd().ok()?;
                            described(fd.as_fd(), "recursion_misses:").unwrap_or(0)
                        }
                        _ => 0,
                    },
                })
            })
            .collect();
        costs.sort_by(|a, b| a.name.cmp(&b.name));
        costs
    }
}

/// A number that the kernel tells of one of this process's programs or maps.
fn described(of: BorrowedFd<'_>, what: &str) -> Option<u64> {
    let path = format!("/proc/self/fdinfo/{}", of.as_raw_fd());
    let text = fs::read_to_string(path).ok()?;
    text.lines()
        .find_map(|line| line.strip_prefix(what)?.trim().parse().ok())
}
