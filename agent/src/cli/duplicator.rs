//! `lifeboat duplicator --config F`: the coordinator of the fleet, as a daemon.

use super::Outcome;
use crate::daemon::duplicator::{DuplicatorConfig, run};
use crate::daemon::logging;
use std::path::PathBuf;

/// Run the duplicator until SIGTERM.
#[derive(clap::Args)]
pub struct Args {
    /// Configuration file (YAML).
    #[arg(long)]
    config: PathBuf,
}

/// Runs it.
///
/// # Errors
/// What kept it from starting.
pub fn execute(args: &Args) -> Outcome {
    let config = DuplicatorConfig::load(&args.config)?;
    logging::start();
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?
        .block_on(run(&config))?;
    Ok(())
}
