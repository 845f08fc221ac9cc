//! Reading the connection programs' maps.

use super::Kernel;
use super::mapped::{Mapped, Rows};
use aya::maps::{Array, MapData, RingBuf, Stack};
use aya::programs::raw_trace_point::RawTracePoint;
use aya::programs::{RawTracePointRunOptions, TestRun};
use lifeboat_ebpf::{
    ListenKey, Open, PortKey, PortRow, PortStats, REFRESH_BATCH, RELEASED_GROUP, RELEASED_SHIFT,
    open_groups, place, released_at, role,
};
use std::collections::{HashMap, HashSet};
use std::mem::offset_of;
use std::sync::atomic::{AtomicU64, Ordering};

/// The connection maps in memory.
pub struct Connections {
    /// Whose each place of `OPEN` is.
    keys: Mapped,
    kinds: Rows,
    /// Rows that are nobody's, and given back at the next opportunity: a program may be about to count in one.
    freed: Vec<u32>,
}

/// Words of a row of `PORTS`.
const ROW_WORDS: usize = size_of::<PortRow>() / 8;

/// The word of a row with its role, which is not 0 where the row is somebody's.
const ROLE_WORD: usize = offset_of!(PortRow, key.role) / 8;

/// Sizes of the maps for so many open connections and kinds.
#[must_use]
pub fn sizes(open: u32, kinds: u32) -> [(&'static str, u32); 5] {
    let groups = open_groups(open.max(1));
    let kinds = kinds.max(1);
    [
        ("OPEN_KEYS", groups),
        ("OPEN", groups * lifeboat_ebpf::OPEN_GROUP as u32),
        ("PORTS", kinds),
        ("PORT_ROW", kinds),
        ("FREE_PORT_ROWS", kinds),
    ]
}

impl Kernel {
    /// Makes the maps ready for the programs, which take a row for each new kind.
    pub(super) fn prepare_ports(&mut self) -> Result<(), String> {
        if self.connections.is_some() {
            return Ok(());
        }
        let map = |name| self.map(name).ok_or("it is not in the embedded object");
        let connections = Connections {
            keys: Mapped::new(map("OPEN_KEYS")?)?,
            kinds: Rows::new(map("PORTS")?, 1)?,
            freed: Vec::new(),
        };
        let rows = connections.kinds.count();
        self.connections = Some(connections);
        let mut free = self
            .free_port_rows()
            .ok_or("FREE_PORT_ROWS is not in the embedded object")?;
        // The first is taken first.
        for row in (0..rows).rev() {
            free.push(row, 0).map_err(|error| super::chain(&error))?;
        }
        Ok(())
    }

    /// Kinds of connections, since the start, with the bytes of open connections up to now.
    #[must_use]
    pub fn ports(&mut self) -> Vec<(PortKey, PortStats)> {
        self.refresh_open();
        let Some(connections) = &mut self.connections else {
            return Vec::new();
        };
        connections.kinds.reach_used(ROLE_WORD);
        let (rows, _) = connections.kinds.words().as_chunks::<ROW_WORDS>();
        rows.iter()
            .map(row)
            .filter(|row| row.key.role != 0)
            .map(|row| (row.key, row.stats))
            .collect()
    }

    /// Ports listened on since the start.
    #[must_use]
    pub fn listening(&self) -> Vec<(ListenKey, u64)> {
        self.entries("LISTENING")
    }

    /// When a UDP port was let go of last, at the latest: ns of the monotonic clock, 0 for never.
    #[must_use]
    pub fn released(&self, netns: u64, port: u16) -> u64 {
        let Ok(netns) = u32::try_from(netns) else {
            return 0;
        };
        let (group, tag) = released_at(netns, port);
        let map = self.map("RELEASED");
        let groups =
            map.and_then(|map| Array::<&MapData, [u64; RELEASED_GROUP]>::try_from(map).ok());
        let group = groups.and_then(|groups| groups.get(&group, 0).ok());
        group.map_or(0, |group| latest_release(&group, tag))
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
            .open()
            .into_iter()
            .flat_map(|open| [role::CLIENT, role::SERVER].map(|role| open.key(role)))
            .collect();
        let forgotten: HashSet<PortKey> = keys.difference(&open).copied().collect();
        self.clear_ports(|key| forgotten.contains(key));
        forgotten
    }

    pub(super) fn forget_ports_of(&mut self, gone: &HashSet<u64>) {
        self.clear_ports(|key| gone.contains(&key.cgroup));
        self.remove_keys::<ListenKey, u64>("LISTENING", |key| gone.contains(&key.cgroup));
    }

    fn clear_ports(&mut self, gone: impl Fn(&PortKey) -> bool) {
        let rows: HashMap<PortKey, u32> = self.entries("PORT_ROW").into_iter().collect();
        let rows: HashMap<PortKey, u32> = rows.into_iter().filter(|(key, _)| gone(key)).collect();
        self.remove_keys::<PortKey, u32>("PORT_ROW", |key| rows.contains_key(key));
        let Some(connections) = &mut self.connections else {
            return;
        };
        let freed = std::mem::replace(&mut connections.freed, rows.into_values().collect());
        let map = self.ebpf.as_mut().and_then(|ebpf| ebpf.map_mut("PORTS"));
        if let Some(mut kinds) =
            map.and_then(|map| Array::<&mut MapData, PortRow>::try_from(map).ok())
        {
            // A row that is not cleared is not given back: the next kind must count from zero.
            connections
                .freed
                .retain(|&row| kinds.set(row, PortRow::FREE, 0).is_ok());
        }
        if let Some(mut free) = self.free_port_rows() {
            for row in freed {
                // It has room for all rows.
                let _ = free.push(row, 0);
            }
        }
    }

    fn free_port_rows(&mut self) -> Option<Stack<&mut MapData, u32>> {
        self.ebpf
            .as_mut()?
            .map_mut("FREE_PORT_ROWS")?
            .try_into()
            .ok()
    }

    /// Places with a connection.
    fn places(&self) -> impl Iterator<Item = u32> {
        let keys = self.connections.iter().flat_map(|maps| maps.keys.words());
        let taken = |key: &AtomicU64| key.load(Ordering::Relaxed) > place::TAKEN;
        (0..)
            .zip(keys)
            .filter_map(move |(place, key)| taken(key).then_some(place))
    }

    fn open(&self) -> Vec<Open> {
        let map = self.map("OPEN");
        let Some(open) = map.and_then(|map| Array::<&MapData, Open>::try_from(map).ok()) else {
            return Vec::new();
        };
        self.places()
            .filter_map(|place| open.get(&place, 0).ok())
            .collect()
    }

    fn refresh_open(&self) {
        let Some(ebpf) = &self.ebpf else { return };
        let Some(Ok(program)) = ebpf
            .program("ports_refresh")
            .map(<&RawTracePoint>::try_from)
        else {
            return;
        };
        let mut places = self.places().map(u64::from).peekable();
        while places.peek().is_some() {
            let mut options = RawTracePointRunOptions {
                // No place.
                args: [u64::MAX; REFRESH_BATCH],
                ..RawTracePointRunOptions::default()
            };
            for (argument, place) in options.args.iter_mut().zip(&mut places) {
                *argument = place;
            }
            if program.test_run(options).is_err() {
                return;
            }
        }
    }
}

/// A row as its words are now.
fn row(words: &[AtomicU64; ROW_WORDS]) -> PortRow {
    let words = words.each_ref().map(|word| word.load(Ordering::Relaxed));
    // SAFETY: as long as the row, whose fields are integers and arrays of them: any bytes are a value.
    unsafe { std::mem::transmute(words) }
}

/// When what has this tag was let go of last, at the latest, ns: one that made room in a full group was let go of before
/// all that are there.
fn latest_release(group: &[u64; RELEASED_GROUP], tag: u32) -> u64 {
    let time = |word: &u64| word & u64::from(u32::MAX);
    let own = group.iter().filter(|word| (**word >> 32) as u32 == tag);
    let latest = own.map(time).max();
    match latest.or_else(|| group.iter().map(time).min()) {
        None | Some(0) => 0,
        Some(time) => (time + 1) << RELEASED_SHIFT,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lifeboat_ebpf::{OPEN_GROUP, groups_of};
    use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

    /// As the programs take a place.
    fn take(groups: &mut [[bool; OPEN_GROUP]], identity: u64) -> Option<(usize, usize)> {
        let pairs = groups_of(identity, groups.len() as u32);
        let mut places = pairs.into_iter().flat_map(|pair| {
            (0..OPEN_GROUP).flat_map(move |slot| pair.map(|group| (group as usize, slot)))
        });
        let place = places.find(|&(group, slot)| !groups[group][slot])?;
        groups[place.0][place.1] = true;
        Some(place)
    }

    #[test]
    fn as_many_connections_as_the_limit_find_a_place_also_after_many_have_come_and_gone() {
        for limit in [1_000, 24_576] {
            come_and_go(limit);
        }
    }

    #[test]
    fn a_port_that_had_to_make_room_was_let_go_of_no_later_than_the_oldest_that_is_kept() {
        let (_, tag) = released_at(7, 53);
        let others = |times: [u32; RELEASED_GROUP]| {
            times.map(|time| u64::from(!tag) << 32 | u64::from(time))
        };
        let ns = |time: u64| (time + 1) << RELEASED_SHIFT;
        assert_eq!(latest_release(&[0; RELEASED_GROUP], tag), 0);
        assert_eq!(latest_release(&others([9, 9, 9, 9, 9, 9, 9, 0]), tag), 0);
        assert_eq!(
            latest_release(&others([9, 8, 7, 6, 9, 9, 9, 9]), tag),
            ns(6)
        );
        let mut known = others([9, 8, 7, 6, 9, 9, 9, 9]);
        known[3] = u64::from(tag) << 32 | 5;
        assert_eq!(latest_release(&known, tag), ns(5));
        known[6] = u64::from(tag) << 32 | 8;
        assert_eq!(latest_release(&known, tag), ns(8));
        let apart: HashSet<_> = (0..2_000).map(|port| released_at(7, port)).collect();
        assert_eq!(apart.len(), 2_000);
    }

    fn come_and_go(limit: u32) {
        let mut groups = vec![[false; OPEN_GROUP]; open_groups(limit) as usize];
        let mut random = StdRng::seed_from_u64(1);
        let mut open: Vec<(usize, usize)> = Vec::new();
        for come in 0..200_000 {
            if come >= limit {
                let (group, slot) = open.swap_remove(random.random_range(0..open.len()));
                groups[group][slot] = false;
            }
            let place = take(&mut groups, random.random());
            open.push(place.expect("a free place"));
        }
    }
}
