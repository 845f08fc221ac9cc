//! The paired device's side of a plan: check the authorisation, open the data plane, end it.
//!
//! Invariant: nothing of a plan stays here when its source says that it is over, or does not lend it this device any more.

use super::delegator::{Parts, plan_ids};
use super::journal::plan_directory;
use super::keys;
use super::standing::Stands;
use crate::fleet::agent::{Authorisation, PairedState};
use crate::fleet::pairing::LetIn;
use crate::fleet::server::PeerIdentity;
use crate::model::action::{Action, Actions};
use crate::model::control::{Provided, RelayAccepted, RelayRequest, Secret, StandIn, StoodIn};
use crate::model::fleet::{PeerAddress, Role};
use crate::model::ids::{DeviceId, PlanId};
use crate::model::units::Bytes;
use crate::transfer::{DataKey, DataServer, Door, Hop, LinkKey, RelayPlan};
use crate::volume::FleetKey;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

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
    /// Nobody whom it was told to answer.
    #[error(
        "this device does not answer {peer} in the stead of the source of plan {plan}: no source lent it for that"
    )]
    NotServed {
        /// Who asked.
        peer: DeviceId,
        /// Plan.
        plan: PlanId,
    },
    /// The duplicator does not hear that certificate any more.
    #[error(
        "{0} was enrolled anew and this certificate replaced; stop the agent that still has it"
    )]
    Replaced(DeviceId),
    /// A task of this process died.
    #[error("internal task failed: {0}; see the agent's log there")]
    Task(#[from] tokio::task::JoinError),
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
    stands: Stands,
    let_in: LetIn,
}

/// How often the source is asked.
const ASK: Duration = Duration::from_secs(30);
/// How often it is looked whether a plan's source still lends it this device.
const LOOK: Duration = Duration::from_secs(1);

impl Paired {
    /// The role; `data` is the address of the data plane that peers are told.
    #[must_use]
    pub fn new(parts: Arc<Parts>, state: Arc<PairedState>, data: SocketAddr) -> Self {
        Self {
            parts,
            state,
            data,
            stands: Stands::default(),
            let_in: LetIn::default(),
        }
    }

    /// Opens the data plane to an authorised source. Asked for the same again, it goes on as it was.
    ///
    /// # Errors
    /// No token covers the request, or there is no room for the spool.
    pub fn relay(
        self: &Arc<Self>,
        peer: &DeviceId,
        request: RelayRequest,
    ) -> Result<RelayAccepted, RelayError> {
        let asked = request.clone();
        let RelayRequest {
            plan,
            actions,
            forward,
            seal_key,
            serve,
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
        if actions.contains(Action::Serve) != serve.is_some() {
            return Err(RelayError::Incomplete(
                Action::Serve,
                "exactly whom it answers",
            ));
        }
        let (data, key) = self.data_plane().ok_or(RelayError::NoData)?;
        let directory = self.directory(&plan);
        if let Some(kept) = keys::kept::<Relaying>(&directory)
            && kept.request == asked
            && (data.admits(&plan, Door::Relay) || !carries(&asked))
        {
            return Ok(self.accepted(kept.link_key));
        }
        if !carries(&asked) {
            data.close(&plan, Door::Relay);
            let _ = std::fs::remove_dir_all(directory.join(SPOOL));
        }
        let is_new = !directory.exists();
        let spool = if carries(&asked) {
            directory.join(SPOOL)
        } else {
            directory.clone()
        };
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
        if is_new {
            tokio::spawn(self.clone().until_over(plan, peer.clone(), ASK));
        }
        self.admit(data, key, relaying);
        Ok(self.accepted(link_key))
    }

    /// Lets the target of a plan ask here instead of at the source.
    ///
    /// # Errors
    /// The plan's source did not delegate that, or the peer is not its target.
    pub async fn stand_in(
        self: &Arc<Self>,
        peer: &PeerIdentity,
        plan: &PlanId,
        asked: StandIn,
    ) -> Result<Provided, RelayError> {
        let fleet = self.parts.fleet.as_ref().ok_or(RelayError::NoData)?;
        self.answers(&peer.device, plan, &asked)?;
        let (client, duplicator) = (&fleet.client, fleet.identity.duplicator());
        if self.let_in.refuses(client, duplicator, plan, peer).await {
            return Err(RelayError::Replaced(peer.device.clone()));
        }
        let (paired, peer, plan) = (self.clone(), peer.device.clone(), plan.clone());
        let opened = tokio::task::spawn_blocking(move || {
            // It may have ended meanwhile.
            let lent = paired
                .answers(&peer, &plan, &asked)
                .inspect_err(|_| paired.let_in.forget(&plan))?;
            let directory = paired.directory(&plan);
            let (parts, asking) = (&paired.parts, (paired.data, &asked));
            let provided = paired.stands.open(parts, &lent, &directory, asking)?;
            // It may have ended just then, and would never end again.
            paired.answers(&peer, &plan, &asked).inspect_err(|_| {
                paired.remove(&plan);
            })?;
            Ok(provided)
        });
        opened.await?
    }

    /// What the source of a plan lends this device for, when it is to answer `peer`.
    fn answers(
        &self,
        peer: &DeviceId,
        plan: &PlanId,
        asked: &StandIn,
    ) -> Result<Authorisation, RelayError> {
        let kept = plan
            .is_plain()
            .then(|| keys::kept::<Relaying>(&self.directory(plan)))
            .flatten();
        let kept = kept.filter(|kept| {
            let serve = kept.request.serve.as_ref();
            serve
                .is_some_and(|serve| serve.target == *peer && serve.volumes.contains(&asked.volume))
        });
        let lent = kept.and_then(|kept| self.state.authorised(plan, &kept.source));
        let lent = lent.filter(|lent| lent.actions.contains(Action::Serve));
        lent.ok_or_else(|| RelayError::NotServed {
            peer: peer.clone(),
            plan: plan.clone(),
        })
    }

    /// Ends what a plan left here when its source lends this device no more and its word that it is over did not come:
    /// this device may have been away. The source is asked after so long.
    async fn until_over(self: Arc<Self>, plan: PlanId, source: DeviceId, mut ask: Duration) {
        let (directory, mut asked) = (self.directory(&plan), Instant::now());
        while directory.exists() {
            let mut lent = self.state.authorised(&plan, &source);
            if let Some(known) = &lent
                && asked.elapsed() >= ask
            {
                if self.is_over(&plan, &known.peer).await {
                    lent = None;
                }
                (asked, ask) = (Instant::now(), ASK);
            }
            if lent.is_none() {
                tracing::info!(%plan, %source, "the source lends this device no more; what is here of the plan is removed");
                self.remove(&plan);
                return;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Whether the source says that it has no use for this device any more. One that does not answer may come back.
    async fn is_over(&self, plan: &PlanId, source: &PeerAddress) -> bool {
        let Some(fleet) = &self.parts.fleet else {
            return false;
        };
        let path = format!("/v1/plans/{plan}/paired");
        matches!(fleet.client.get(source, &path).await, Ok(false))
    }

    /// Ends what is done for a plan and removes it; what the target was answered of it.
    fn remove(&self, plan: &PlanId) -> Option<StoodIn> {
        if let Some(data) = &self.parts.data {
            data.dismiss(plan);
        }
        self.let_in.forget(plan);
        let answered = self.stands.end(plan);
        let _ = std::fs::remove_dir_all(self.directory(plan));
        answered
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
        if !carries(&relaying.request) {
            return;
        }
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
    pub fn resume(self: &Arc<Self>) {
        let Some((data, key)) = self.data_plane() else {
            return;
        };
        for plan in plan_ids(&self.parts.state, "paired") {
            let directory = self.directory(&plan);
            let lasts = keys::kept::<Relaying>(&directory)
                .filter(|kept| self.state.authorised(&plan, &kept.source).is_some());
            match lasts {
                Some(relaying) => {
                    let source = relaying.source.clone();
                    tokio::spawn(self.clone().until_over(plan, source, Duration::ZERO));
                    self.admit(data, key.clone(), relaying);
                }
                None => {
                    let _ = std::fs::remove_dir_all(directory);
                }
            }
        }
    }

    /// Ends what is done for a plan and removes what is here of it; what the target was answered in the source's stead.
    ///
    /// # Errors
    /// The peer was never authorised for the plan.
    pub fn end(&self, peer: &DeviceId, plan: &PlanId) -> Result<Option<StoodIn>, RelayError> {
        self.state
            .authorised(plan, peer)
            .filter(|_| plan.is_plain())
            .ok_or_else(|| RelayError::NotAuthorised {
                source_device: peer.clone(),
                plan: plan.clone(),
            })?;
        Ok(self.remove(plan))
    }
}

/// Whether blocks on their way to the target pass the device that is asked.
fn carries(request: &RelayRequest) -> bool {
    request.actions.contains(Action::Transfer) || request.actions.contains(Action::Encrypt)
}
