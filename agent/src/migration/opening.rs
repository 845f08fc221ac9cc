//! The target's side of switching first up to the release: the copy ends, the source's lists are taken ahead and once
//! more when its workload is frozen, and what was laid by for them is put back when the release does not come.
//!
//! Invariant: what is about to be made is in the journal first. Non-goal: what the twins run on (`later`).

use super::access::{admit, stand_in};
use super::events::{Place, TargetEvent};
use super::later::{Live, trees};
use super::places::name_of;
use super::target::{Target, TargetError};
use crate::model::control::{self, Open};
use crate::model::fleet::Role;
use crate::model::ids::{DeviceId, PlanId};
use crate::model::plan::{Content, Plan, VolumeRelease};
use crate::serve::{Draft, Store, bring_back, exchange, lay_by};
use crate::transfer::fetch::FetchPlan;
use crate::volume::FleetKey;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Number of the copy on which twins run, over all lives of the agent; those drawn for others are larger.
const TWINS: u64 = 0;
/// How long a twin waits for what is not here while the source is away, before it gets an I/O error: a server takes
/// minutes to start.
const PATIENCE: Duration = Duration::from_secs(600);

/// Of which lists the stores of a plan are made.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Lists {
    /// Those of which they were made.
    Kept,
    /// Those of now, while the workload runs: they are taken once more.
    Ahead,
    /// Those of now, while it is frozen; what was taken ahead is brought to them.
    Last,
}

fn in_the_way(why: String) -> TargetError {
    TargetError::InTheWay {
        what: "the volumes before their data".into(),
        why,
    }
}

fn beside(place: &Path, name: &str) -> PathBuf {
    place.parent().unwrap_or(place).join(name)
}

/// Why the twins of a plan cannot be started here before its data is; none when they can.
pub(super) fn cannot_serve(plan: &Plan, places: &[Place]) -> Option<String> {
    if let Err(error) = File::options().read(true).write(true).open("/dev/fuse") {
        return Some(format!(
            "the target has no FUSE: /dev/fuse: {error} (`modprobe fuse`)"
        ));
    }
    // Tried with an empty directory: file systems and mounts that cannot do it are many.
    trees(plan, places).find_map(|place| {
        let probe = beside(&place.path, &format!(".lifeboat-probe-{}", plan.id));
        let tried = std::fs::create_dir_all(&probe)
            .and_then(|()| exchange(&probe, &place.path))
            .and_then(|()| exchange(&probe, &place.path));
        // Left behind, it is an empty directory.
        let _ = std::fs::remove_dir(&probe);
        let error = tried.err()?;
        Some(format!(
            "the target cannot exchange {} with a directory beside it: {error}",
            place.path.display()
        ))
    })
}

impl Target {
    /// Ends what is received of the trees of a plan, makes it durable and takes their lists ahead, before their workload
    /// is frozen: the pause is not to wait for any of it.
    ///
    /// # Errors
    /// The plan is unknown or owned, the source cannot be asked, or the trees cannot be made.
    pub async fn end_copy(&self, peer: &DeviceId, id: &PlanId) -> Result<(), TargetError> {
        let _turn = self.turn(peer).await;
        let (plan, places) = self.not_owned(peer, id)?;
        self.begin_stores(peer, &plan, &places).await?;
        self.end_reception(&plan, &places, true).await?;
        self.make_stores(&plan, &places, Lists::Ahead)
            .await
            .map_err(in_the_way)?;
        super::faults::die_at("listed ahead");
        Ok(())
    }

    /// Notes where the stores of a plan's trees will be, before they are made; none of an earlier attempt stays open.
    async fn begin_stores(
        &self,
        peer: &DeviceId,
        plan: &Plan,
        places: &[Place],
    ) -> Result<(), TargetError> {
        let id = &plan.id;
        let lent = self.pairings.authorised(id, peer);
        let source = lent.filter(|lent| lent.role == Role::Target);
        let source = source
            .map(|lent| lent.peer)
            .ok_or_else(|| TargetError::NotOurs {
                plan: id.clone(),
                why: "the duplicator did not lend us to it as target".into(),
            })?;
        self.close_later(id).await;
        let stores = trees(plan, places)
            .map(|place| {
                let name = format!(".lifeboat-{id}-{}", place.volume);
                (place.volume, beside(&place.path, &name))
            })
            .collect();
        self.note_later(id, &TargetEvent::Opening { source, stores })
    }

    async fn end_reception(
        &self,
        plan: &Plan,
        places: &[Place],
        durably: bool,
    ) -> Result<(), TargetError> {
        let (id, data) = (plan.id.clone(), self.parts.data.clone());
        let trees: Vec<Place> = trees(plan, places).cloned().collect();
        let ending = tokio::task::spawn_blocking(move || {
            for place in trees {
                if let Some(data) = &data {
                    data.forget(&id, place.volume);
                }
                if durably {
                    nix::unistd::syncfs(File::open(&place.path)?)?;
                }
            }
            Ok::<_, io::Error>(())
        });
        let ended = ending.await.map_err(io::Error::other).flatten();
        ended.map_err(|error| TargetError::File {
            doing: "end what is received".into(),
            error,
        })
    }

    /// Takes the list of every tree of a plan whose workload is frozen, durably; nothing of their data.
    ///
    /// # Errors
    /// The plan is unknown or owned, the source cannot be asked, or the trees cannot be made.
    pub async fn open(
        self: &Arc<Self>,
        peer: &DeviceId,
        id: &PlanId,
        request: Open,
    ) -> Result<Vec<VolumeRelease>, TargetError> {
        let _turn = self.turn(peer).await;
        let (plan, places) = self.not_owned(peer, id)?;
        // An earlier attempt's list is not that of now: the workload ran in between.
        self.begin_stores(peer, &plan, &places).await?;
        self.end_reception(&plan, &places, false).await?;
        self.make_stores(&plan, &places, Lists::Last)
            .await
            .map_err(in_the_way)?;
        let stores = self.later(id, |later| later.stores.clone());
        let key = self.fleet_key(id)?;
        let mut volumes = Vec::new();
        for (volume, directory) in stores.unwrap_or_default() {
            let root = Store::list_root(&directory, &key).map_err(|error| TargetError::File {
                doing: format!("read the list in {}", directory.display()),
                error,
            })?;
            volumes.push(VolumeRelease {
                volume,
                name: name_of(&plan, volume),
                epoch: request.epochs.get(&volume).copied().unwrap_or_default(),
                content: Content::Later(root),
            });
        }
        let event = TargetEvent::Opened {
            volumes: volumes.clone(),
        };
        self.note_later(id, &event)?;
        super::faults::die_at("opened");
        tracing::info!(plan = %id, volumes = volumes.len(), "has the lists of volumes whose data comes later");
        Ok(volumes)
    }

    fn fleet_key(&self, id: &PlanId) -> Result<FleetKey, TargetError> {
        let fleet = self.parts.fleet.as_ref();
        let fleet = fleet.ok_or_else(|| TargetError::Unknown(id.clone()))?;
        Ok(FleetKey(*fleet.identity.fleet_key()))
    }

    /// Makes the store of each tree that is not open, and opens it unless its list is taken ahead.
    pub(super) async fn make_stores(
        &self,
        plan: &Plan,
        places: &[Place],
        lists: Lists,
    ) -> Result<(), String> {
        let id = &plan.id;
        for place in trees(plan, places) {
            let wanted = self.later(id, |later| {
                let directory = later.stores.get(&place.volume).cloned();
                let open = later.live.contains_key(&place.volume);
                directory
                    .filter(|_| !open)
                    .map(|directory| (directory, later.source.clone()))
            });
            let Some((directory, source)) = wanted.flatten() else {
                continue;
            };
            let key = self.fleet_key(id).map_err(|error| error.to_string())?;
            let admit = admit(&self.parts, &source, id);
            let asked = control::StandIn {
                volume: place.volume,
                // Nothing is asked for before the release, and what is read after it is the same for good.
                copy: TWINS,
                fill: true,
            };
            let fetch = FetchPlan {
                // The list is what both sides sign for.
                stand_in: stand_in(&self.parts, plan, &asked, false),
                ..FetchPlan::of_source(id.clone(), place.volume, key, admit)
            };
            let (name, parts) = (name_of(plan, place.volume), self.parts.clone());
            let below = place.path.clone();
            let made = tokio::task::spawn_blocking(move || {
                let devices = parts.settings.device_nodes;
                let draft = Draft {
                    directory: &directory,
                    volume: &name,
                    devices,
                };
                match (lists, draft.is_there()) {
                    (Lists::Kept, _) => {}
                    // The source asks again when it did not hear the answer.
                    (Lists::Ahead, true) => return Ok(None),
                    (Lists::Last, true) => {
                        let revised = draft.revise(&fetch, &parts.transfer);
                        revised.map_err(|error| error.to_string())?;
                        super::faults::die_at("revised");
                    }
                    (_, false) => {
                        // What was copied, which is not fetched once more where it is still the same.
                        lay_by(&directory, &below)
                            .map_err(|error| format!("lay {} by: {error}", below.display()))?;
                        super::faults::die_at("laid by");
                    }
                }
                if lists == Lists::Ahead {
                    let made = draft.make(&fetch, &parts.transfer);
                    return made.map(|()| None).map_err(|error| error.to_string());
                }
                Store::open(
                    &directory,
                    &name,
                    fetch,
                    &parts.transfer,
                    PATIENCE,
                    devices,
                    true,
                )
                .map(Some)
                .map_err(|error| error.to_string())
            });
            if let Some(store) = made.await.map_err(|error| error.to_string())?? {
                let live = Live {
                    mount: None,
                    filler: None,
                    store,
                };
                self.later(id, |later| later.live.insert(place.volume, live));
            }
        }
        Ok(())
    }

    /// Ends an attempt to switch first that did not come to its release: what it laid by goes back to its place, where
    /// it is found whichever way its source goes now.
    pub(super) async fn put_back(&self, plan: &Plan, places: &[Place]) -> Result<(), TargetError> {
        let Some(stores) = self.later(&plan.id, |later| later.stores.clone()) else {
            return Ok(());
        };
        self.close_later(&plan.id).await;
        for place in trees(plan, places) {
            let Some(store) = stores.get(&place.volume).cloned() else {
                continue;
            };
            let to = place.path.clone();
            let brought = tokio::task::spawn_blocking(move || bring_back(&store, &to));
            let brought = brought.await.map_err(io::Error::other).flatten();
            brought.map_err(|error| TargetError::File {
                doing: format!("bring what was copied back to {}", place.path.display()),
                error,
            })?;
        }
        self.note_later(&plan.id, &TargetEvent::NotOpened)
    }
}
