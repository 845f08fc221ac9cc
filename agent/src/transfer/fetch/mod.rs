//! On-demand fetch: the target asks the source for the blocks that are wanted now, before they arrive
//! by themselves; or a paired device asks it, and answers the target in its stead.
//!
//! Invariants: many requests are outstanding at a time, so that the round trip does not rule; what is
//! wanted now has a connection of its own and goes before the rest; every block is sealed for this
//! device and checked by its signature; a wanted path stays beneath the volume. Non-goals: where the
//! blocks are kept, and when a reader gives up (the store's).

mod connect;
mod guard;
mod hold;
mod list;
mod mirror;
mod piece;
mod plan;
mod shelf;
mod source;
mod stock;
mod target;
pub mod wire;

pub use mirror::{BATCH as MIRROR_BATCH, MirrorReceiver, MirrorSender, mirror_to};
pub use plan::{
    Admit, Arrivals, Block, Content, FetchError, FetchPlan, Grant, Place, StandIn, Tally,
};
pub use shelf::{list_root, root_of_list};
pub(super) use source::Provision;
pub use source::{ProvidePlan, ProvideVolume, Sealing, Trusts, Whereabouts};
pub use stock::{Stock, Turnover};
pub use target::Fetcher;
pub use wire::{BLOCK, Class, Refusal};
