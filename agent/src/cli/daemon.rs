//! What the subcommands that ask the agent share: its socket, a runtime, and failures with exit codes.

use super::Failure;
use crate::api::client::{Client, ClientError};
use crate::migration::planner::Request;
use crate::model::action::{Action, Actions};
use crate::model::choice::Way;
use crate::model::ids::ContainerName;
use crate::model::plan::{MigrationEvent, PlanGuards};
use std::path::{Path, PathBuf};

impl Failure {
    /// The failure for an answer of the agent.
    pub fn of(error: ClientError) -> Self {
        match error {
            ClientError::Unreachable { .. }
            | ClientError::Silent { .. }
            | ClientError::Denied { .. }
            | ClientError::Device(_) => Self::Unreachable(error.into()),
            ClientError::Blocked(_) => Self::Blocked(error.into()),
            ClientError::Refused(_) | ClientError::Garbled { .. } => Self::Failed(error.into()),
        }
    }
}

/// Runs `ask` with a client of the agent on `socket`.
pub fn ask<T>(
    socket: &Path,
    ask: impl AsyncFnOnce(&Client) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let client = Client::new(socket)?;
    runtime.block_on(ask(&client))
}

/// Which containers, and who does the work.
#[derive(clap::Args)]
pub struct Selection {
    /// Containers; those related to them go too.
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    containers: Vec<String>,
    /// Every container that a runtime manages.
    #[arg(long)]
    all: bool,
    /// Actions for the paired device: encrypt, transfer, serve.
    #[arg(long, value_delimiter = ',', value_name = "ACTIONS")]
    delegate: Vec<Action>,
    /// Send the data before the twins start, whatever would be chosen.
    #[arg(long)]
    copy_first: bool,
    /// Start the twins before all data is there, whatever would be chosen; where that can be done.
    #[arg(long, conflicts_with = "copy_first")]
    switch_first: bool,
    /// A recorded access trace (`lifeboat record --trace FILE --volume DIRECTORY`): should the twins start before all
    /// data is there, what it found hottest comes first. May be given for each directory.
    #[arg(long, value_name = "FILE")]
    trace: Vec<PathBuf>,
}

impl Selection {
    /// The request to the delegator.
    pub fn request(&self) -> Request {
        Request {
            containers: self
                .containers
                .iter()
                .map(|name| ContainerName(name.clone()))
                .collect(),
            delegate: self.delegate.iter().copied().collect::<Actions>(),
            event: MigrationEvent::Operator,
            guards: PlanGuards {
                way: match (self.copy_first, self.switch_first) {
                    (true, _) => Some(Way::CopyFirst),
                    (_, true) => Some(Way::SwitchFirst),
                    _ => None,
                },
                ..PlanGuards::default()
            },
            // The agent reads them, and has another working directory.
            traces: self
                .trace
                .iter()
                .map(|file| std::path::absolute(file).unwrap_or_else(|_| file.clone()))
                .collect(),
        }
    }
}
