//! The scheduler programs: attaching them for a while, and reading their maps.

use super::mapped::{LATENCY_WORDS, Mapped, Rows, halves};
use super::{Family, Kernel, program, refused};
use aya::maps::{Array, MapData, Stack};
use aya::programs::BtfTracePoint;
use aya::programs::tp_btf::BtfTracePointLinkId;
use lifeboat_ebpf::{Latency, RUN_QUEUE_SHARDS, SWITCHES_WORDS, Waiting};
use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;

/// In the order in which they are attached. What is noted as waiting must be taken out again when it runs, so
/// the program that does so is attached first and detached last.
pub(super) const PROGRAMS: [&str; 3] = ["sched_switch", "sched_wakeup", "sched_wakeup_new"];

/// The scheduler's maps in memory.
pub struct RunQueues {
    waiting: Mapped,
    latency: Rows,
    switches: Mapped,
    links: Vec<(&'static str, BtfTracePointLinkId)>,
    /// While nothing is attached: who waited when that began.
    left: Option<Vec<(u64, u64)>>,
}

impl Kernel {
    /// Makes the maps ready for the programs, which take a row for each new cgroup.
    pub(super) fn prepare_sched(&mut self) -> Result<(), String> {
        let map = |name| self.map(name).ok_or("it is not in the embedded object");
        self.run_queues = Some(RunQueues {
            waiting: Mapped::writable(map("WAITING")?)?,
            latency: Rows::new(map("RUN_QUEUE")?, RUN_QUEUE_SHARDS)?,
            switches: Mapped::new(map("SWITCHES")?)?,
            links: Vec::new(),
            left: None,
        });
        let mut free = self
            .free_rows()
            .ok_or("FREE_ROWS is not in the embedded object")?;
        // The first is taken first.
        for row in (0..free.capacity()).rev() {
            free.push(row, 0).map_err(|error| super::chain(&error))?;
        }
        Ok(())
    }

    /// Run-queue latency by cgroup2 id, since the start.
    #[must_use]
    pub fn run_queue(&mut self) -> Vec<(u64, Latency)> {
        let rows: Vec<(u64, u32)> = self.entries("ROWS");
        let Some(maps) = &mut self.run_queues else {
            return Vec::new();
        };
        let last = rows.iter().map(|(_, row)| *row).max().unwrap_or(0);
        maps.latency.reach(last as usize);
        let words = maps.latency.words();
        let row_words = LATENCY_WORDS * RUN_QUEUE_SHARDS as usize;
        rows.into_iter()
            .filter_map(|(cgroup, row)| {
                let shards = words.chunks_exact(row_words).nth(row as usize)?;
                let mut latency = Latency::EMPTY;
                for shard in shards.chunks_exact(LATENCY_WORDS) {
                    for (slot, counted) in latency.slots.iter_mut().zip(halves(shard)) {
                        *slot = slot.wrapping_add(counted);
                    }
                }
                Some((cgroup, latency))
            })
            .collect()
    }

    /// Attaches the programs, which then know of nobody who waits.
    ///
    /// # Errors
    /// What the kernel refuses; then none of them is attached.
    pub fn attach_sched(&mut self) -> Result<(), String> {
        let (Some(maps), Some(ebpf)) = (&mut self.run_queues, &mut self.ebpf) else {
            return Ok(());
        };
        // Noted when they were attached before: who of them waits still, and since when, is not known.
        let (places, _) = maps.waiting.words().as_chunks::<2>();
        for [task, _] in places {
            if task.load(Ordering::Relaxed) != 0 {
                task.store(0, Ordering::Relaxed);
            }
        }
        maps.left = None;
        for name in PROGRAMS {
            let attached = program::<BtfTracePoint>(ebpf, name)
                .and_then(|program| program.attach().map_err(|error| refused("attach", &error)));
            match attached {
                Ok(link) => maps.links.push((name, link)),
                Err(why) => {
                    self.detach_sched(0);
                    self.running.retain(|&family| family != Family::Sched);
                    return Err(why);
                }
            }
        }
        Ok(())
    }

    /// Whether the programs are attached.
    #[must_use]
    pub fn sched_attached(&self) -> bool {
        let maps = self.run_queues.as_ref();
        maps.is_some_and(|maps| !maps.links.is_empty())
    }

    /// Detaches the programs. Who waits at that moment is kept with his time so far at `now_ns` of the
    /// monotonic clock.
    pub fn detach_sched(&mut self, now_ns: u64) {
        loop {
            let Some(maps) = &mut self.run_queues else {
                return;
            };
            let Some((name, link)) = maps.links.pop() else {
                return;
            };
            if maps.links.is_empty() {
                let left = self.waiting(now_ns);
                if let Some(maps) = &mut self.run_queues {
                    maps.left = Some(left);
                }
            }
            if let Some(ebpf) = &mut self.ebpf
                && let Ok(program) = program::<BtfTracePoint>(ebpf, name)
            {
                // It was attached by this link, which nobody else takes.
                let _ = program.detach(link);
            }
        }
    }

    /// Switches of all CPUs while the programs were attached, since the start.
    #[must_use]
    pub fn switches(&self) -> u64 {
        let counts = self.run_queues.as_ref().map(|maps| maps.switches.words());
        let counts = counts.unwrap_or_default().chunks_exact(SWITCHES_WORDS);
        counts.map(|count| count[0].load(Ordering::Relaxed)).sum()
    }

    /// Tasks that wait for a CPU at `now_ns` of the monotonic clock, or waited when the programs were detached:
    /// their cgroup2 ids and for how long, ns.
    #[must_use]
    pub fn waiting(&self, now_ns: u64) -> Vec<(u64, u64)> {
        let Some(maps) = &self.run_queues else {
            return Vec::new();
        };
        if let Some(left) = &maps.left {
            return left.clone();
        }
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
                (task != 0).then_some((*cgroups.get(&row)?, Waiting::age(task, now_ns)))
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

    fn free_rows(&mut self) -> Option<Stack<&mut MapData, u32>> {
        self.ebpf.as_mut()?.map_mut("FREE_ROWS")?.try_into().ok()
    }
}
