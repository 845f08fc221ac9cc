//! Kinds of connections and what was counted of each. The common path looks up arrays only; the agent sets the
//! sizes of the maps but the last two.

use crate::kernel::{add, lost, now_ns};
use crate::open::NOWHERE;
use crate::scope::place_by_hash;
use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_NOEXIST};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, RingBuf, Stack};
use lifeboat_ebpf::{PORT_ROWS, PortKey, PortRow, PortStats, loss};

/// Kinds of connections by row.
#[map]
static PORTS: Array<PortRow> = Array::with_max_entries(PORT_ROWS, BPF_F_MMAPABLE);

/// Row by kind.
#[map]
static PORT_ROW: HashMap<PortKey, u32> = HashMap::with_max_entries(PORT_ROWS, 0);

/// Rows of no kind: filled by the agent, which also gives back those of kinds that it forgets.
#[map]
static FREE_PORT_ROWS: Stack<u32> = Stack::with_max_entries(PORT_ROWS, 0);

/// The rows looked up last, each in the place of its kind's hash. Which kind a row is of stands in the row itself.
#[map]
static KNOWN_PORT_ROWS: Array<u32> = Array::with_max_entries(1 << KNOWN_BITS, 0);

const KNOWN_BITS: u32 = 12;

/// Kinds of connections seen for the first time.
#[map]
static FIRST_SEEN: RingBuf = RingBuf::with_byte_size(64 * 1024, 0);

/// Counts a connection of this kind.
#[inline(always)]
pub fn count(key: &PortKey, since_ns: u64) {
    match kind(key, since_ns) {
        // SAFETY: map values live for the whole program run.
        Some(stats) => unsafe {
            add(&raw mut (*stats).connections, 1);
            (*stats).last_ns = now_ns();
        },
        None => lost(loss::PORTS),
    }
}

/// Notes that connections of this kind are alive.
#[inline(always)]
pub fn alive(key: &PortKey, now_ns: u64) {
    if let Some(stats) = known(key).or_else(|| stats(row_of(key))) {
        // SAFETY: map values live for the whole program run.
        unsafe { (*stats).last_ns = now_ns };
    }
}

/// The statistics of a kind, made when there are none; none when there is no room.
#[inline(always)]
pub fn kind(key: &PortKey, since_ns: u64) -> Option<*mut PortStats> {
    known(key).or_else(|| {
        // A copy, so that the common path needs none in memory.
        let key = *key;
        let row = look_up(&key, since_ns);
        if let Some(known) = KNOWN_PORT_ROWS.get_ptr_mut(place_of(&key)) {
            // SAFETY: one aligned word of a map.
            unsafe { *known = row };
        }
        stats(row)
    })
}

#[inline(always)]
fn stats(row: u32) -> Option<*mut PortStats> {
    // SAFETY: the pointer is to a map value, of which this is a field.
    PORTS
        .get_ptr_mut(row)
        .map(|row| unsafe { &raw mut (*row).stats })
}

/// Where [`KNOWN_PORT_ROWS`] has a kind.
#[inline(always)]
fn place_of(key: &PortKey) -> u32 {
    let mut mixed = 0u64;
    for (index, word) in key.words().into_iter().enumerate() {
        // An odd multiplier for each word, so that what differs in two words does not cancel out.
        let odd = 0x9e37_79b9_7f4a_7c15u64.rotate_left(9 * index as u32) | 1;
        mixed = mixed.wrapping_add(word.wrapping_mul(odd));
    }
    place_by_hash(mixed ^ mixed >> 32, KNOWN_BITS)
}

/// The statistics of a kind, when its row is known without the hash map.
#[inline(always)]
fn known(key: &PortKey) -> Option<*mut PortStats> {
    // SAFETY: map values live for the whole program run; a known row is one aligned word.
    unsafe {
        let row = *KNOWN_PORT_ROWS.get_ptr(place_of(key))?;
        let known = PORTS.get_ptr_mut(row)?;
        let whose = (&raw const (*known).key).cast::<u64>();
        let mut differ = 0;
        for (index, word) in key.words().into_iter().enumerate() {
            differ |= whose.add(index).read() ^ word;
        }
        (differ == 0).then_some(&raw mut (*known).stats)
    }
}

/// The row of a kind, by the hash map; [`NOWHERE`] when it has none.
#[inline(always)]
fn row_of(key: &PortKey) -> u32 {
    // SAFETY: the value is one word, which is written once.
    unsafe { PORT_ROW.get(key).copied().unwrap_or(NOWHERE) }
}

/// The row of a kind, by the hash map, made when it has none; [`NOWHERE`] when there is no room.
#[inline(never)]
fn look_up(key: &PortKey, since_ns: u64) -> u32 {
    let row = row_of(key);
    if row != NOWHERE {
        return row;
    }
    new_row(key, since_ns)
}

/// Makes a row for a kind that has none; [`NOWHERE`] when there is no room.
#[inline(always)]
fn new_row(key: &PortKey, since_ns: u64) -> u32 {
    let Ok(Some(row)) = FREE_PORT_ROWS.pop() else {
        return NOWHERE;
    };
    let Some(new) = PORTS.get_ptr_mut(row) else {
        return NOWHERE;
    };
    // SAFETY: the pointer is to a map value, which nobody else has: the row was free.
    unsafe {
        (*new).stats.first_ns = since_ns;
        (*new).stats.last_ns = since_ns;
        (*new).key = *key;
    }
    if PORT_ROW.insert(key, &row, u64::from(BPF_NOEXIST)).is_ok() {
        if FIRST_SEEN.output::<PortKey>(key, 0).is_err() {
            lost(loss::FIRST_SEEN);
        }
        return row;
    }
    // Another CPU was faster.
    // SAFETY: as above.
    unsafe { *new = PortRow::FREE };
    let _ = FREE_PORT_ROWS.push(row, 0);
    row_of(key)
}
