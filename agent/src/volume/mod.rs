//! Volumes: scanning, change detection between epochs, and rebuilding them on the target; the block map
//! of what a device holds. A block device or image is a tree of one file ([`one`]).
//!
//! Invariants: no path leaves the volume's directory (every open is confined beneath it, without
//! following symbolic links); zero blocks and holes are marks, never bytes; the root of a volume is
//! defined once ([`tree::RootHasher`]) and computed by source and target on their own.
//! Non-goals here: the wire, sealing.

pub mod aligned;
pub mod apply;
pub mod block_map;
pub mod change;
pub mod codec;
pub mod confined;
pub mod measure;
pub mod mirror;
pub mod one;
pub mod pages;
pub mod rewritten;
pub mod salvage;
pub mod scan;
pub mod sign;
pub mod state;
pub mod times;
pub mod tree;
pub mod unused;
pub mod users;
pub mod walk;
pub mod warm;
pub mod xattrs;

pub use block_map::BlockMap;
pub use confined::Confined;
pub use measure::{Measure, measure};
pub use rewritten::Written;
pub use salvage::Unreadable;
pub use scan::{ScanError, scan, scan_as_sent, scan_root};
pub use sign::{BlockSize, FleetKey};
pub use state::TreeState;
pub use tree::{Entry, Exception, Kind, Timestamp};
