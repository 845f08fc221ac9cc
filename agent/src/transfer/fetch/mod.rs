//! On-demand fetch: the target asks the source for the blocks that are wanted now, before they arrive
//! by themselves.
//!
//! Invariants: many requests are outstanding at a time, so that the round trip does not rule; what is
//! wanted now has a connection of its own and goes before the rest; every block is sealed for this
//! device and checked by its signature; a wanted path stays beneath the volume. Non-goals: where the
//! blocks are kept, and when a reader gives up (the store's).

mod mirror;
mod piece;
mod source;
mod target;
pub mod wire;

pub use mirror::{BATCH as MIRROR_BATCH, MirrorReceiver, MirrorSender, mirror_to};
pub(super) use source::Provision;
pub use source::{ProvidePlan, ProvideVolume, list_root, root_of_list};
pub use target::{Arrivals, Block, Content, FetchError, FetchPlan, Fetcher, Grant, Place};
pub use wire::{BLOCK, Class, Refusal};
