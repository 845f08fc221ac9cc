//! Reading the connection programs' maps.

use super::Kernel;
use aya::maps::RingBuf;
use aya::programs::raw_trace_point::RawTracePoint;
use aya::programs::{RawTracePointRunOptions, TestRun};
use lifeboat_ebpf::{ListenKey, Open, PortKey, PortStats, REFRESH_BATCH, role};
use std::collections::HashSet;

impl Kernel {
    /// Kinds of connections, since the start, with the bytes of open connections up to now.
    #[must_use]
    pub fn ports(&self) -> Vec<(PortKey, PortStats)> {
        self.refresh_open();
        self.entries("PORTS")
    }

    /// Ports listened on since the start.
    #[must_use]
    pub fn listening(&self) -> Vec<(ListenKey, u64)> {
        self.entries("LISTENING")
    }

    /// Kinds of connections seen for the first time since the last call.
    pub fn first_seen(&mut self) -> Vec<PortKey> {
        let Some(map) = self
            .ebpf
            .as_mut()
            .and_then(|ebpf| ebpf.map_mut("FIRST_SEEN"))
        else {
            return Vec::new();
        };
        let Ok(mut ring) = RingBuf::try_from(map) else {
            return Vec::new();
        };
        let mut keys = Vec::new();
        while let Some(item) = ring.next() {
            if item.len() >= size_of::<PortKey>() {
                // SAFETY: the program wrote a whole PortKey, any bytes of which are a value; the ring
                // aligns to 8 but unaligned reading needs no such promise.
                keys.push(unsafe { item.as_ptr().cast::<PortKey>().read_unaligned() });
            }
        }
        keys
    }

    /// Forgets kinds of connections, except those with an open one. Returns what was forgotten.
    pub fn forget_ports(&mut self, keys: &HashSet<PortKey>) -> HashSet<PortKey> {
        let open: HashSet<PortKey> = self
            .entries::<u64, Open>("OPEN")
            .into_iter()
            .flat_map(|(_, open)| [role::CLIENT, role::SERVER].map(|role| open.key(role)))
            .collect();
        let forgotten: HashSet<PortKey> = keys.difference(&open).copied().collect();
        self.remove_keys::<PortKey, PortStats>("PORTS", |key| forgotten.contains(key));
        forgotten
    }

    pub(super) fn forget_ports_of(&mut self, gone: &HashSet<u64>) {
        self.remove_keys::<PortKey, PortStats>("PORTS", |key| gone.contains(&key.cgroup));
        self.remove_keys::<ListenKey, u64>("LISTENING", |key| gone.contains(&key.cgroup));
    }

    fn refresh_open(&self) {
        let Some(ebpf) = &self.ebpf else { return };
        let Some(Ok(program)) = ebpf
            .program("ports_refresh")
            .map(<&RawTracePoint>::try_from)
        else {
            return;
        };
        let sockets: Vec<u64> = self.keys::<u64, Open>("OPEN");
        for batch in sockets.chunks(REFRESH_BATCH) {
            let mut options = RawTracePointRunOptions::default();
            options.args[..batch.len()].copy_from_slice(batch);
            if program.test_run(options).is_err() {
                return;
            }
        }
    }
}
