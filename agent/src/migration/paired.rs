//! The paired device's side of a plan: check the authorisation, open the data plane, end it.

use super::delegator::{Parts, plan_ids};
use super::journal::plan_directory;
use super::keys;
use crate::fleet::agent::PairedState;
use crate::model::action::{Action, Actions};
use crate::model::control::{RelayAccepted, RelayRequest, Secret};
use crate::model::fleet::Role;
use crate::model::ids::{DeviceId, PlanId};
use crate::model::units::Bytes;
use crate::transfer::{DataKey, DataServer, Hop, LinkKey, RelayPlan};
use crate::volume::FleetKey;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

/// Why the paired device refused.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// No token of ours covers it.
    #[error(
        "{source_device} is not authorised here for plan {plan}: return the token of its pairing first"
    )]
    NotAuthorised {
        /// Who asked.
        source_device: DeviceId,
        /// Plan.
        plan: PlanId,
    },
    /// The token covers less.
    #[error("the token for plan {plan} covers {covered}, not {asked}")]
    Uncovered {
        /// Plan.
        plan: PlanId,
        /// What it covers.
        covered: Actions,
        /// What was asked.
        asked: Actions,
    },
    /// An action lacks what it needs.
    #[error("`{0}` was delegated without what it needs ({1})")]
    Incomplete(Action, &'static str),
    /// Too little space for the spool.
    #[error("spool {path} has {free} free, the plan brings up to {needed}; free space there")]
    NoSpace {
        /// Directory.
        path: PathBuf,
        /// Free.
        free: Bytes,
        /// Needed.
        needed: Bytes,
    },
    /// The device takes no data.
    #[error("this device runs no data plane")]
    NoData,
    /// A file operation failed.
    #[error("cannot make the spool {path}: {error}")]
    Spool {
        /// Directory.
        path: PathBuf,
        /// Cause.
        error: std::io::Error,
    },
}

/// What a source was promised, kept on disk until it ends.
#[derive(Serialize, Deserialize)]
struct Relaying {
    source: DeviceId,
    link_key: Secret,
    request: RelayRequest,
}

/// Name of the spool inside a plan's directory.
const SPOOL: &str = "spool";

/// The paired role of an agent.
pub struct Paired {
    parts: Arc<Parts>,
    state: Arc<PairedState>,
    data: SocketAddr,
}

impl Paired {
    /// The role; `data` is the address of the data plane that peers are told.
    #[must_use]
    pub fn new(parts: Arc<Parts>, state: Arc<PairedState>, data: SocketAddr) -> Self {
        Self { parts, state, data }
    }

    /// Opens the data plane to an authorised source. Asked for the same again, it goes on as it was.
    ///
    /// # Errors
    /// No token covers the request, or there is no room for the spool.
    pub fn relay(
        &self,
        peer: &DeviceId,
        request: RelayRequest,
    ) -> Result<RelayAccepted, RelayError> {
        let asked = request.clone();
        let RelayRequest {
            plan,
            actions,
            forward,
            seal_key,
            quantity,
        } = request;
        let lent = self
            .state
            .authorised(&plan, peer)
            .filter(|lent| lent.role == Role::Paired && plan.is_plain());
        let authorisation = lent.ok_or_else(|| RelayError::NotAuthorised {
            source_device: peer.clone(),
            plan: plan.clone(),
        })?;
        if !actions.0.is_subset(&authorisation.actions.0) {
            let covered = authorisation.actions;
            return Err(RelayError::Uncovered {
                plan,
                covered,
                asked: actions,
            });
        }
        if actions.contains(Action::Transfer) && forward.is_none() {
            return Err(RelayError::Incomplete(
                Action::Transfer,
                "the target's data address",
            ));
        }
        if actions.contains(Action::Encrypt) != seal_key.is_some() {
            return Err(RelayError::Incomplete(
                Action::Encrypt,
                "exactly the target's data key",
            ));
        }
        let (data, key) = self.data_plane().ok_or(RelayError::NoData)?;
        let directory = self.directory(&plan);
        if let Some(kept) = keys::kept::<Relaying>(&directory)
            && kept.request == asked
            && data.admits(&plan)
        {
            return Ok(self.accepted(kept.link_key));
        }
        let spool = directory.join(SPOOL);
        std::fs::create_dir_all(&spool).map_err(|error| RelayError::Spool {
            path: spool.clone(),
            error,
        })?;
        if actions.contains(Action::Transfer) && !actions.contains(Action::Encrypt) {
            let free = nix::sys::statvfs::statvfs(&spool)
                .map(|stat| Bytes(stat.blocks_available() * stat.fragment_size()))
                .map_err(|error| RelayError::Spool {
                    path: spool.clone(),
                    error: error.into(),
                })?;
            if free < quantity {
                return Err(RelayError::NoSpace {
                    path: spool,
                    free,
                    needed: quantity,
                });
            }
        }
        let relaying = Relaying {
            source: peer.clone(),
            link_key: Secret(rand::random()),
            request: asked,
        };
        keys::keep(&directory, &relaying)
            .map_err(|error| RelayError::Spool { path: spool, error })?;
        tracing::info!(%plan, source = %peer, %actions, "doing delegated actions");
        let link_key = relaying.link_key.clone();
        self.admit(data, key, relaying);
        Ok(self.accepted(link_key))
    }

    fn accepted(&self, link_key: Secret) -> RelayAccepted {
        RelayAccepted {
            data: self.data,
            link_key,
        }
    }

    /// The data plane and the key of signatures.
    fn data_plane(&self) -> Option<(&DataServer, FleetKey)> {
        let (data, fleet) = (self.parts.data.as_ref()?, self.parts.fleet.as_ref()?);
        Some((data, FleetKey(*fleet.identity.fleet_key())))
    }

    fn admit(&self, data: &DataServer, fleet_key: FleetKey, relaying: Relaying) {
        let RelayRequest {
            plan,
            forward,
            seal_key,
            ..
        } = relaying.request;
        data.admit_relay(RelayPlan {
            spool: self.directory(&plan).join(SPOOL),
            plan,
            link_key: LinkKey(relaying.link_key.0),
            seal_key: seal_key.map(|key| DataKey(key.0)),
            fleet_key,
            forward: forward.map(|(addr, key)| Hop {
                addr,
                link_key: LinkKey(key.0),
            }),
        });
    }

    fn directory(&self, plan: &PlanId) -> PathBuf {
        plan_directory(&self.parts.state, "paired", plan)
    }

    /// Takes up what an earlier life of the agent relayed, as far as its pairing lasts; removes the rest.
    pub fn resume(&self) {
        let Some((data, key)) = self.data_plane() else {
            return;
        };
        for plan in plan_ids(&self.parts.state, "paired") {
            let directory = self.directory(&plan);
            let lasts = keys::kept::<Relaying>(&directory)
                .filter(|kept| self.state.authorised(&plan, &kept.source).is_some());
            match lasts {
                Some(relaying) => self.admit(data, key.clone(), relaying),
                None => {
                    let _ = std::fs::remove_dir_all(directory);
                }
            }
        }
    }

    /// Ends a relay and removes its spool.
    ///
    /// # Errors
    /// The peer was never authorised for the plan.
    pub fn end(&self, peer: &DeviceId, plan: &PlanId) -> Result<(), RelayError> {
        self.state
            .authorised(plan, peer)
            .filter(|_| plan.is_plain())
            .ok_or_else(|| RelayError::NotAuthorised {
                source_device: peer.clone(),
                plan: plan.clone(),
            })?;
        if let Some(data) = &self.parts.data {
            data.dismiss(plan);
        }
        let _ = std::fs::remove_dir_all(self.directory(plan));
        Ok(())
    }
}
