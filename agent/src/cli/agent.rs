//! `lifeboat agent`: the daemon.

use super::Outcome;
use crate::daemon::{agent, config};
use std::path::PathBuf;

/// Runs the agent of this device.
#[derive(clap::Args)]
pub struct Arguments {
    /// Configuration (YAML), see docs/configuration.md.
    #[arg(long, default_value = "/etc/lifeboat/agent.yaml")]
    config: PathBuf,
}

/// Runs until a signal ends it.
pub fn run(arguments: &Arguments) -> Outcome {
    crate::daemon::logging::start();
    let config: config::AgentConfig = config::load(&arguments.config)?;
    let telemetry = agent::sense(&config);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // The host is sick and its CPUs are wanted: two workers carry all control traffic.
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(agent::run(config, telemetry))?;
    // Blocking data threads end with the process; what they had not finished is in no journal.
    runtime.shutdown_background();
    Ok(())
}
