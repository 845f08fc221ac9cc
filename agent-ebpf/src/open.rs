//! The list of open connections. As for the other families, it is arrays only.

use crate::kernel::{compare_exchange, layout};
use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::macros::map;
use aya_ebpf::maps::Array;
use lifeboat_ebpf::{OPEN_GROUP, OPEN_GROUPS, Open, groups_of, place};

/// Whose each place of [`OPEN`] is: TCP by what both ends have in common, UDP by the address of the socket; or
/// [`place::FREE`], [`place::TAKEN`]. A connection is in one of its two groups. The agent sets the
/// sizes of these maps.
#[map]
static OPEN_KEYS: Array<[u64; OPEN_GROUP]> = Array::with_max_entries(OPEN_GROUPS, BPF_F_MMAPABLE);

/// Open connections.
#[map]
pub static OPEN: Array<Open> = Array::with_max_entries(OPEN_GROUPS * OPEN_GROUP as u32, 0);

/// No place, and no row of a kind.
pub const NOWHERE: u32 = u32::MAX;

/// Where it stands whose a place is.
#[inline(always)]
pub fn key_at(place: u32) -> Option<*mut u64> {
    let group = OPEN_KEYS.get_ptr_mut(place / OPEN_GROUP as u32)?;
    // SAFETY: the slot is less than a group has.
    Some(unsafe { group.cast::<u64>().add(place as usize % OPEN_GROUP) })
}

/// The place of a connection; [`NOWHERE`] when it is not on the list.
#[inline(never)]
pub fn find(identity: u64) -> u32 {
    let [near, others] = groups_of(identity, layout!(open_groups));
    let place = find_in(identity, near);
    if place != NOWHERE {
        return place;
    }
    find_in(identity, others)
}

#[inline(always)]
fn find_in(identity: u64, [one, other]: [u32; 2]) -> u32 {
    let (Some(first), Some(second)) = (OPEN_KEYS.get_ptr(one), OPEN_KEYS.get_ptr(other)) else {
        return NOWHERE;
    };
    for slot in 0..OPEN_GROUP {
        // SAFETY: map values live for the whole program run; each word is aligned.
        unsafe {
            if (*first)[slot] == identity {
                return one * OPEN_GROUP as u32 + slot as u32;
            }
            if (*second)[slot] == identity {
                return other * OPEN_GROUP as u32 + slot as u32;
            }
        }
    }
    NOWHERE
}

/// Takes a place for a connection; [`NOWHERE`] when all of its groups are full.
#[inline(never)]
pub fn take(identity: u64) -> u32 {
    let [near, others] = groups_of(identity, layout!(open_groups));
    let place = take_in(near);
    if place != NOWHERE {
        return place;
    }
    take_in(others)
}

/// Takes the lowest free place of two groups, so that they fill alike.
#[inline(always)]
fn take_in([one, other]: [u32; 2]) -> u32 {
    let (Some(first), Some(second)) = (OPEN_KEYS.get_ptr_mut(one), OPEN_KEYS.get_ptr_mut(other))
    else {
        return NOWHERE;
    };
    for slot in 0..OPEN_GROUP {
        // SAFETY: as for `find_in`.
        unsafe {
            if take_at(&raw mut (*first)[slot]) {
                return one * OPEN_GROUP as u32 + slot as u32;
            }
            if take_at(&raw mut (*second)[slot]) {
                return other * OPEN_GROUP as u32 + slot as u32;
            }
        }
    }
    NOWHERE
}

/// # Safety
/// `key` must point into a map value.
#[inline(always)]
unsafe fn take_at(key: *mut u64) -> bool {
    // SAFETY: the caller's contract.
    unsafe { *key == place::FREE && compare_exchange(key, place::FREE, place::TAKEN) }
}

/// Takes a connection off the list. Another one may have done so before, and its place be a third one's by now.
#[inline(always)]
pub fn leave(place: u32, identity: u64) {
    if let Some(key) = key_at(place) {
        compare_exchange(key, identity, place::FREE);
    }
}
