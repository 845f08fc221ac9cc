//! Reading the scheduler programs' maps.

use super::{Kernel, Mapped};
use aya::maps::{Array, MapData, Queue};
use lifeboat_ebpf::{Latency, RUN_QUEUE_SHARDS, SLOTS, Waiting};
use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;

/// The scheduler's maps in memory.
pub struct RunQueues {
    waiting: Mapped,
    latency: Mapped,
}

impl Kernel {
    /// Makes the maps ready for the programs, which take a row for each new cgroup.
    pub(super) fn prepare_sched(&mut self) -> Result<(), String> {
        let mapped = |name| Mapped::new(self.map(name).ok_or("it is not in the embedded object")?);
        self.run_queues = Some(RunQueues {
            waiting: mapped("WAITING")?,
            latency: mapped("RUN_QUEUE")?,
        });
        let mut free = self
            .free_rows()
            .ok_or("FREE_ROWS is not in the embedded object")?;
        for row in 0..free.capacity() {
            free.push(row, 0).map_err(|error| super::chain(&error))?;
        }
        Ok(())
    }

    /// Run-queue latency by cgroup2 id, since the start.
    #[must_use]
    pub fn run_queue(&self) -> Vec<(u64, Latency)> {
        let Some(maps) = &self.run_queues else {
            return Vec::new();
        };
        let words = maps.latency.words();
        let row_words = SLOTS * RUN_QUEUE_SHARDS as usize;
        let rows = self.entries::<u64, u32>("ROWS").into_iter();
        rows.filter_map(|(cgroup, row)| {
            let shards = words.chunks_exact(row_words).nth(row as usize)?;
            let mut latency = Latency::EMPTY;
            for (place, counted) in shards.iter().enumerate() {
                latency.slots[place % SLOTS] += counted.load(Ordering::Relaxed);
            }
            Some((cgroup, latency))
        })
        .collect()
    }

    /// Tasks that wait for a CPU now, with their cgroup2 id.
    #[must_use]
    pub fn waiting(&self) -> Vec<(u64, Waiting)> {
        let Some(maps) = &self.run_queues else {
            return Vec::new();
        };
        let cgroups: HashMap<u32, u64> = self
            .entries::<u64, u32>("ROWS")
            .into_iter()
            .map(|(cgroup, row)| (row, cgroup))
            .collect();
        let (places, _) = maps.waiting.words().as_chunks::<2>();
        places
            .iter()
            .filter_map(|[task, row]| {
                let task = task.load(Ordering::Relaxed);
                let row = row.load(Ordering::Relaxed) as u32;
                let waiting = Waiting {
                    task,
                    row,
                    padding: 0,
                };
                (task != 0).then_some((*cgroups.get(&row)?, waiting))
            })
            .collect()
    }

    pub(super) fn forget_sched(&mut self, gone: &HashSet<u64>) {
        let rows: Vec<(u64, u32)> = self.entries("ROWS");
        for (cgroup, row) in rows.into_iter().filter(|(id, _)| gone.contains(id)) {
            self.remove_keys::<u64, u32>("ROWS", |id| *id == cgroup);
            self.clear_row(row);
        }
    }

    /// A row that is not cleared is not given back: the next cgroup must count from zero.
    fn clear_row(&mut self, row: u32) {
        let map = self
            .ebpf
            .as_mut()
            .and_then(|ebpf| ebpf.map_mut("RUN_QUEUE"));
        let Some(mut rows) = map.and_then(|map| Array::<&mut MapData, Latency>::try_from(map).ok())
        else {
            return;
        };
        let mut shards = row * RUN_QUEUE_SHARDS..(row + 1) * RUN_QUEUE_SHARDS;
        if shards.all(|shard| rows.set(shard, Latency::EMPTY, 0).is_ok())
            && let Some(mut free) = self.free_rows()
        {
            // It has room for all rows.
            let _ = free.push(row, 0);
        }
    }

    fn free_rows(&mut self) -> Option<Queue<&mut MapData, u32>> {
        self.ebpf.as_mut()?.map_mut("FREE_ROWS")?.try_into().ok()
    }
}
