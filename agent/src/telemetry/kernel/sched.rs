//! Reading the scheduler programs' maps.

use super::Kernel;
use lifeboat_ebpf::{Latency, Waiting};
use std::collections::HashSet;

impl Kernel {
    /// Run-queue latency by cgroup2 id, since the start.
    #[must_use]
    pub fn run_queue(&self) -> Vec<(u64, Latency)> {
        self.entries("RUN_QUEUE")
    }

    /// Tasks that wait for a CPU now.
    #[must_use]
    pub fn waiting(&self) -> Vec<(u32, Waiting)> {
        self.entries("WAITING")
    }

    pub(super) fn forget_sched(&mut self, gone: &HashSet<u64>) {
        self.remove_keys::<u64, Latency>("RUN_QUEUE", |key| gone.contains(key));
    }
}
