//! `cargo xtask bench`: figures beside those of a peer, measured in the same run on lab hosts.
//!
//! Invariant: a figure is only ever shown with its peer and their ratio; absolute times on a shared
//! machine move from hour to hour.

mod transfer;

use anyhow::Result;
use clap::Subcommand;

/// What can be measured.
#[derive(Debug, Subcommand)]
pub enum Figure {
    /// A large file and many small ones between two hosts, against rsync over ssh
    Transfer(transfer::Arguments),
}

/// Measures one figure and prints it as a table.
///
/// # Errors
/// The lab or a program of the measurement failed, or a goal was missed.
pub fn run(figure: &Figure) -> Result<()> {
    match figure {
        Figure::Transfer(arguments) => transfer::run(arguments),
    }
}
