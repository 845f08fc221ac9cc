//! Library of the development tasks, so that the end-to-end tests drive the same lab as the commands.
//!
//! It does not depend on the product's crates: set-up must build before the eBPF toolchain exists.

pub mod bench;
pub mod crew;
pub mod demo;
pub mod demo_app;
pub mod fuzz;
pub mod images;
pub mod lab;
pub mod ledger;
pub mod load;
pub mod process;
pub mod setup;
pub mod soak;
pub mod test;
pub mod topology;
pub mod workspace;
