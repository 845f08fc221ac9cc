//! Reading the block programs' maps.

use super::Kernel;
use lifeboat_ebpf::{BlockKey, BlockStats, InFlight};
use std::collections::HashSet;

impl Kernel {
    /// Block I/O, since the start.
    #[must_use]
    pub fn block(&self) -> Vec<(BlockKey, BlockStats)> {
        self.entries("BLOCK")
    }

    /// Block requests between issue and completion.
    #[must_use]
    pub fn in_flight(&self) -> Vec<InFlight> {
        let requests = self.entries::<u64, InFlight>("IN_FLIGHT");
        requests.into_iter().map(|(_, request)| request).collect()
    }

    pub(super) fn forget_block(&mut self, gone: &HashSet<u64>) {
        self.remove_keys::<BlockKey, BlockStats>("BLOCK", |key| gone.contains(&key.cgroup));
    }
}
