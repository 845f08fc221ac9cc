//! Answers requests while and after the data moves: forwarding of published ports; volumes on the target
//! before their data is there, as NBD exports, as a block device or as a mounted directory.
//!
//! Non-goals of this version: HTTP ranges, and UDP (callers report UDP ports as not forwarded).

mod ahead;
mod draft;
mod fill;
mod forward;
mod fuse;
mod mirror;
pub mod nbd;
mod origins;
mod piece;
mod pool;
pub mod presence;
mod proof;
mod reuse;
mod store;
#[cfg(test)]
mod tests;
mod ublk;

/// A way into a served volume; dropped, it ends and what uses it gets errors.
pub trait FrontEnd: Send {
    /// Where it is, as a client or person names it.
    fn at(&self) -> String;
}

pub use draft::Draft;
pub use fill::Filler;
pub use forward::{ForwardError, Forwarder, Traffic};
pub use fuse::{Mount, MountError};
pub use mirror::{Intent, Mirrored};
pub use nbd::{NbdAddress, NbdError, NbdServer};
pub use origins::StoreError;
pub use reuse::{bring_back, exchange, lay_by};
pub use store::{Figures, Store};
pub use ublk::{UblkDevice, UblkError};
