//! The scheduler programs: attaching the one at switches for a while, reading its maps, and asking who waits.

use super::mapped::{LATENCY_WORDS, Mapped, Rows, halves};
use super::{Family, Kernel, program, refused};
use aya::maps::{Array, MapData, Stack};
use aya::programs::links::LinkError;
use aya::programs::tp_btf::BtfTracePointLinkId;
use aya::programs::{BtfTracePoint, Iter, ProgramError};
use lifeboat_ebpf::{Latency, RUN_QUEUE_SHARDS, SWITCHES_WORDS};
use std::collections::HashSet;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::Ordering;

/// At every switch, while it is attached.
pub(super) const SWITCH: &str = "sched_switch";
/// For every task, when the agent asks who waits.
pub(super) const WAITING: &str = "sched_waiting";

/// `PROC_PID_INIT_INO` of linux/proc_ns.h.
const HOST_PID_NAMESPACE: u64 = 0xefff_fffc;

/// Who waits cannot be asked.
#[derive(Debug, thiserror::Error)]
#[error("it is not known who waits for a CPU: {0}")]
pub struct WalkError(String);

/// The scheduler's maps in memory.
pub struct RunQueues {
    delays: Mapped,
    latency: Rows,
    switches: Mapped,
    link: Option<BtfTracePointLinkId>,
}

impl Kernel {
    /// Makes the maps ready for the programs, which take a row for each new cgroup.
    pub(super) fn prepare_sched(&mut self) -> Result<(), String> {
        // Before Linux 5.13 a kernel could leave them out: then no process has been given a CPU.
        let noted = std::fs::read_to_string("/proc/self/schedstat").unwrap_or_default();
        if noted.split_whitespace().nth(2) == Some("0") {
            let why = "the kernel does not note how long tasks wait; it needs CONFIG_SCHEDSTATS, or CONFIG_TASK_DELAY_ACCT and `delayacct` on its command line";
            return Err(why.to_owned());
        }
        let map = |name| self.map(name).ok_or("it is not in the embedded object");
        self.run_queues = Some(RunQueues {
            delays: Mapped::writable(map("DELAYS")?)?,
            latency: Rows::new(map("RUN_QUEUE")?, RUN_QUEUE_SHARDS)?,
            switches: Mapped::new(map("SWITCHES")?)?,
            link: None,
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

    /// Attaches the program to switches.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn attach_sched(&mut self) -> Result<(), String> {
        let (Some(maps), Some(ebpf)) = (&mut self.run_queues, &mut self.ebpf) else {
            return Ok(());
        };
        let program = program::<BtfTracePoint>(ebpf, SWITCH)?;
        let link = program
            .attach()
            .map_err(|error| refused("attach", &error))?;
        maps.link = Some(link);
        Ok(())
    }

    /// Does without the scheduler's programs from now on.
    pub fn end_sched(&mut self) {
        self.detach_sched();
        self.running.retain(|&family| family != Family::Sched);
    }

    /// Whether it is attached.
    #[must_use]
    pub fn sched_attached(&self) -> bool {
        let maps = self.run_queues.as_ref();
        maps.is_some_and(|maps| maps.link.is_some())
    }

    /// Detaches it.
    pub fn detach_sched(&mut self) {
        let link = self.run_queues.as_mut().and_then(|maps| maps.link.take());
        if let (Some(link), Some(ebpf)) = (link, &mut self.ebpf)
            && let Ok(program) = program::<BtfTracePoint>(ebpf, SWITCH)
        {
            // It was attached by this link, which nobody else takes.
            let _ = program.detach(link);
        }
        // How long tasks had waited when they left a CPU: nobody notes when they do so again.
        let maps = self.run_queues.iter();
        for delay in maps.flat_map(|maps| maps.delays.words()) {
            if delay.load(Ordering::Relaxed) != 0 {
                delay.store(0, Ordering::Relaxed);
            }
        }
    }

    /// Switches of all CPUs while the program was attached, since the start.
    #[must_use]
    pub fn switches(&self) -> u64 {
        let counts = self.run_queues.as_ref().map(|maps| maps.switches.words());
        let counts = counts.unwrap_or_default().chunks_exact(SWITCHES_WORDS);
        counts.map(|count| count[0].load(Ordering::Relaxed)).sum()
    }

    /// Tasks that wait for a CPU now: their cgroup2 ids and for how long, ns.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn waiting(&mut self) -> Result<Vec<(u64, u64)>, WalkError> {
        let (Some(_), Some(ebpf)) = (&self.run_queues, &mut self.ebpf) else {
            return Ok(Vec::new());
        };
        // The kernel walks the tasks of the namespace of whoever asks.
        let namespace = std::fs::metadata("/proc/self/ns/pid").map(|data| data.ino());
        if namespace.is_ok_and(|inode| inode != HOST_PID_NAMESPACE) {
            let why = "the agent does not see the host's processes; run it in the host's PID namespace (`--pid=host`)";
            return Err(WalkError(why.to_owned()));
        }
        let program: &mut Iter = program(ebpf, WAITING).map_err(WalkError)?;
        let walk = program.attach().and_then(|link| program.take_link(link));
        let mut walk = walk
            .map_err(|error: ProgramError| WalkError(super::chain(&error)))?
            .into_file()
            .map_err(|error: LinkError| WalkError(super::chain(&error)))?;
        let mut bytes = Vec::new();
        walk.read_to_end(&mut bytes)
            .map_err(|error| WalkError(error.to_string()))?;
        let (words, _) = bytes.as_chunks::<8>();
        let (tasks, _) = words.as_chunks::<2>();
        let word = |word: [u8; 8]| u64::from_ne_bytes(word);
        // As `lifeboat_ebpf::Waiting` is laid out.
        Ok(tasks
            .iter()
            .map(|&[cgroup, age_ns]| (word(cgroup), word(age_ns)))
            .collect())
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
