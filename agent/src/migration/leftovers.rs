//! What a dismissal could not remove: tried again until it is gone, and never taken from whoever has it since.
//!
//! Invariants: what is tried again is in the plan's journal as it was after the last try, and is removed only while it is
//! still just that: the container of that id as it had ended, files of which no inode was written, made or replaced since.
//! So neither a restart, nor another plan, nor a person who uses the place by now loses anything by it. What somebody uses
//! already, and what cannot be told from somebody else's (a device that was here before), is told of and stays.

use super::devices;
use super::events::{ContainerFence, Place, TargetEvent};
use super::journal::{Entry, Journal};
use super::places::{empty, is_one, name_in_runtime};
use super::target::{Target, TargetError};
use crate::containers::{Runtime, RuntimeError};
use crate::model::container::{Container, State};
use crate::model::ids::{ContainerName, DeviceId, PlanId, Signature};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

/// Before what is left is tried for the second time; each later pause is twice as long.
const AGAIN: Duration = Duration::from_secs(20);
/// The longest pause.
const AGAIN_MAX: Duration = Duration::from_hours(1);

/// One thing that a plan made here.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "thing")]
pub enum Thing {
    /// A twin that does not run, with what keeps it from being started.
    Twin {
        /// Name.
        name: ContainerName,
        /// Id; none when only what keeps it from being started is left.
        id: Option<String>,
        /// Its runtime's whole word for its state.
        state: Value,
        /// What keeps it from being started.
        fences: Vec<ContainerFence>,
    },
    /// A volume of the runtime.
    Volume {
        /// Name.
        name: String,
        /// Where its files are.
        path: PathBuf,
        /// They, after the last try.
        seen: Option<Signature>,
    },
    /// Files, or a device.
    Files {
        /// Where, and whether the place itself was made.
        place: Place,
        /// Whether it is one file or device.
        one: bool,
        /// They, after the last try.
        seen: Option<Signature>,
    },
    /// A network.
    Network {
        /// Name.
        name: String,
        /// Id.
        id: String,
    },
}

/// What is left of a plan that is over.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Left {
    /// Source of the plan.
    source: DeviceId,
    /// Socket of the runtime that has its things.
    runtime: String,
    /// What is tried again, and why it is still there.
    again: Vec<(Thing, String)>,
    /// What stays, and why.
    stays: Vec<String>,
}

/// What a plan made here.
pub(super) struct Made {
    things: Vec<Thing>,
    /// Of what the runtime knows and does not describe: why.
    hidden: Vec<String>,
}

impl Made {
    /// What the runtime says of one thing; none where it is not there, or is not described while the runtime answers.
    fn described(
        &mut self,
        said: Result<Value, RuntimeError>,
    ) -> Result<Option<Value>, RuntimeError> {
        match said {
            Ok(found) => Ok(Some(found)),
            Err(error) if error.not_found() => Ok(None),
            Err(error @ (RuntimeError::Refused { .. } | RuntimeError::Answer { .. })) => {
                self.hidden.push(error.to_string());
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

/// Why a thing is still there.
struct Failed {
    why: String,
    /// Somebody uses it.
    used: bool,
}

impl Failed {
    fn new(error: &impl ToString) -> Self {
        let (why, used) = (error.to_string(), false);
        Self { why, used }
    }
}

impl From<RuntimeError> for Failed {
    fn from(error: RuntimeError) -> Self {
        let used = match &error {
            // Podman refuses a network that is in use with 500 and these words.
            RuntimeError::Refused {
                status, message, ..
            } => matches!(status, 403 | 409) || message.contains("being used"),
            _ => false,
        };
        let why = error.to_string();
        Self { why, used }
    }
}

impl Left {
    /// In words; none when nothing is left.
    pub(super) fn words(&self) -> Option<String> {
        let again = self.again.iter();
        let again = again.map(|(_, why)| format!("{why}; it is tried again"));
        let stays = self.stays.iter();
        let stays = stays.map(|why| format!("{why}; it stays there, see to it"));
        let words: Vec<String> = again.chain(stays).collect();
        (!words.is_empty()).then(|| words.join("; "))
    }

    /// Removes what a plan made; what is left of it.
    pub(super) async fn after(source: &DeviceId, made: Made, runtime: &Runtime) -> Self {
        let mut left = Self {
            source: source.clone(),
            runtime: runtime.socket().display().to_string(),
            again: Vec::new(),
            stays: made.hidden,
        };
        for thing in made.things {
            left.remove(thing, runtime).await;
        }
        left
    }

    async fn remove(&mut self, mut thing: Thing, runtime: &Runtime) {
        let Err(Failed { why, used }) = thing.remove(runtime).await else {
            return;
        };
        // Its own twin, which is still there, may be who uses it.
        let is_twin = |thing: &Thing| matches!(thing, Thing::Twin { .. });
        let ours = is_twin(&thing) || self.again.iter().any(|(other, _)| is_twin(other));
        if thing.look(runtime).await && (ours || !used) {
            self.again.push((thing, why));
        } else {
            self.stays.push(why);
        }
    }
}

impl Thing {
    async fn remove(&self, runtime: &Runtime) -> Result<(), Failed> {
        match self {
            Self::Twin { id, fences, .. } => {
                // Where that fails its fence stays: nothing else keeps the runtime from starting it beside the source's.
                if let Some(id) = id {
                    runtime.remove(id).await?;
                }
                for fence in fences {
                    let lifted = runtime.lift_fence(&fence.fence).await;
                    lifted.map_err(|error| Failed::new(&error))?;
                }
                Ok(())
            }
            Self::Volume { name, .. } => Ok(runtime.remove_volume(name).await?),
            Self::Network { id, .. } => Ok(runtime.remove_network(id).await?),
            Self::Files { place, one, .. } => {
                let (gone, one) = (place.clone(), *one);
                // A large tree on a slow disk keeps nobody else waiting.
                let removed = tokio::task::spawn_blocking(move || match (one, gone.made) {
                    (true, _) => devices::remove(&gone),
                    (false, true) => std::fs::remove_dir_all(&gone.path),
                    (false, false) => empty(&gone.path),
                });
                match removed.await.unwrap_or_else(|died| Err(died.into())) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        let (why, used) = (format!("{}: {error}", place.path.display()), false);
                        Err(Failed { why, used })
                    }
                    _ => Ok(()),
                }
            }
        }
    }

    /// Takes note of how it is after a try; whether that tells it from what somebody else has in its place.
    async fn look(&mut self, runtime: &Runtime) -> bool {
        let (path, seen) = match self {
            Self::Volume { path, seen, .. } => (path.clone(), seen),
            Self::Files { place, seen, .. } => (place.path.clone(), seen),
            // A try that failed may have changed what its runtime calls it.
            Self::Twin {
                id: Some(id),
                state,
                ..
            } => {
                if let Ok(found) = runtime.inspect(id).await {
                    *state = found["State"].clone();
                }
                return state["Running"].as_bool() != Some(true);
            }
            Self::Twin { id: None, .. } | Self::Network { .. } => return true,
        };
        *seen = signature(path).await.ok().flatten();
        seen.is_some()
    }

    /// Whether it is still as it was after the last try, or the part of it that is left.
    async fn is_same(&self, runtime: &Runtime) -> Result<bool, Failed> {
        let (path, seen) = match self {
            Self::Twin { id: None, .. } => return Ok(true),
            Self::Twin {
                id: Some(id),
                state,
                ..
            } => {
                return match runtime.inspect(id).await {
                    Err(error) if error.not_found() => Ok(true),
                    found => Ok(found?["State"] == *state),
                };
            }
            Self::Network { id, .. } => {
                return match runtime.network(id).await {
                    Err(error) if error.not_found() => Ok(false),
                    // A name may be an id, too.
                    found => Ok(found?["Id"].as_str() == Some(id.as_str())),
                };
            }
            Self::Volume { name, path, seen } => {
                let there = match runtime.volume(name).await {
                    Err(error) if error.not_found() => return Ok(false),
                    found => mountpoint(&found?),
                };
                if there != *path {
                    return Ok(false);
                }
                (path, seen)
            }
            Self::Files { place, seen, .. } => (&place.path, seen),
        };
        match signature(path.clone()).await {
            Ok(now) => Ok(seen.is_some() && *seen == now),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            // What cannot be read now may be what it was.
            Err(error) => Err(Failed::new(&error)),
        }
    }
}

/// What the plan of this journal left here, which is over.
pub(super) fn left_of(entries: &[Entry<TargetEvent>]) -> Option<Left> {
    match &entries.last()?.event {
        TargetEvent::Dismissed { left, .. } => left.as_deref().cloned(),
        _ => None,
    }
}

fn mountpoint(volume: &Value) -> PathBuf {
    volume["Mountpoint"].as_str().unwrap_or_default().into()
}

/// A regular file, or a directory with all in it, by its inodes and when they changed, whatever the order they are found
/// in; none of a device, which does not show it.
async fn signature(path: PathBuf) -> io::Result<Option<Signature>> {
    tokio::task::spawn_blocking(move || inodes(&path))
        .await
        .unwrap_or_else(|died| Err(died.into()))
}

fn inodes(root: &Path) -> io::Result<Option<Signature>> {
    let kind = root.symlink_metadata()?.file_type();
    if !kind.is_dir() && !kind.is_file() {
        return Ok(None);
    }
    let (mut all, mut paths) = ([0; 32], vec![root.to_owned()]);
    while let Some(path) = paths.pop() {
        let found = path.symlink_metadata()?;
        let mut one = blake3::Hasher::new();
        one.update(path.as_os_str().as_bytes());
        for value in [found.ino(), found.size()] {
            one.update(&value.to_le_bytes());
        }
        for value in [found.ctime(), found.ctime_nsec()] {
            one.update(&value.to_le_bytes());
        }
        let one = one.finalize();
        all.iter_mut()
            .zip(one.as_bytes())
            .for_each(|(all, one)| *all ^= one);
        if found.is_dir() {
            for entry in path.read_dir()? {
                paths.push(entry?.path());
            }
        }
    }
    Ok(Some(Signature(all)))
}

impl Target {
    pub(super) fn left(&self) -> std::sync::MutexGuard<'_, BTreeMap<PlanId, Left>> {
        // Whole after every statement.
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is left of a plan that is over, for its source.
    pub(super) fn left_of(&self, peer: &DeviceId, id: &PlanId) -> Option<String> {
        let all = self.left();
        let left = all.get(id).filter(|left| &left.source == peer)?;
        left.words()
    }

    /// Refuses a plan of which an earlier offer is still being removed: they have one journal.
    pub(super) fn check_removed(&self, id: &PlanId) -> Result<(), TargetError> {
        let mut all = self.left();
        let left = all.get(id).filter(|left| !left.again.is_empty());
        if let Some(words) = left.and_then(Left::words) {
            return Err(TargetError::InTheWay {
                what: format!("plan {id}"),
                why: format!("not all of it is removed that was made for it here before: {words}"),
            });
        }
        all.remove(id);
        Ok(())
    }

    /// What a plan made here, twins first. Nothing is changed.
    ///
    /// # Errors
    /// Its runtime does not say.
    pub(super) async fn made_of(
        &self,
        id: &PlanId,
        runtime: &Runtime,
    ) -> Result<Made, TargetError> {
        let mut made = Made {
            things: Vec::new(),
            hidden: Vec::new(),
        };
        let found = self.plans().get(id).map(|known| {
            let later = known.later.as_ref();
            let fences = later.filter(|later| later.is_given_back());
            (
                known.plan.clone(),
                known.places.clone(),
                known.networks.clone(),
                fences.map(|later| later.fences.clone()),
                later.map(|later| later.stores.clone()),
            )
        });
        let Some((plan, places, networks, fences, stores)) = found else {
            return Ok(made);
        };
        for planned in &plan.containers {
            let name = &planned.container.name;
            let mut of_twin = fences.clone().unwrap_or_default();
            of_twin.retain(|fence| &fence.container == name);
            // By its id where that is known: another container may have its name by now.
            let last = of_twin.last();
            let asked = last.map_or(name.as_str(), |fence| &fence.fence.container);
            let found = made.described(runtime.inspect(asked).await)?;
            let state = found
                .as_ref()
                .map_or(Value::Null, |found| found["State"].clone());
            let status = state["Status"].as_str().unwrap_or_default();
            let ours = match &fences {
                Some(_) => last.is_some() || state["Running"].as_bool() != Some(true),
                // Of a plan that was not taken over only a rehearsal that was cut short left one, which was never
                // started; Docker calls one dead whose removal failed.
                None => {
                    crate::containers::inspect::state(status) == State::Created
                        || matches!(status, "dead" | "removing")
                }
            };
            let id = found.and_then(|found| found["Id"].as_str().map(str::to_owned));
            let id = id.filter(|_| ours);
            if id.is_some() || !of_twin.is_empty() {
                made.things.push(Thing::Twin {
                    name: name.clone(),
                    id,
                    state,
                    fences: of_twin,
                });
            }
        }
        let stores = stores.unwrap_or_default().into_iter();
        made.things.extend(stores.map(|(volume, path)| {
            let (made, one, seen) = (true, false, None);
            let place = Place { volume, path, made };
            Thing::Files { place, one, seen }
        }));
        for place in places {
            let (seen, one) = (None, is_one(&plan, place.volume));
            let Some(name) = name_in_runtime(&plan, &place) else {
                made.things.push(Thing::Files { place, one, seen });
                continue;
            };
            if let Some(found) = made.described(runtime.volume(name).await)? {
                made.things.push(Thing::Volume {
                    name: name.to_owned(),
                    path: mountpoint(&found),
                    seen,
                });
            }
        }
        for name in networks {
            if let Some(found) = made.described(runtime.network(&name).await)? {
                let id = found["Id"].as_str().unwrap_or(&name).to_owned();
                made.things.push(Thing::Network { name, id });
            }
        }
        made.things.retain(|thing| !self.is_wanted(id, thing));
        Ok(made)
    }

    /// Whether another plan is to have a thing as it is: a network for its twins, or an empty directory for a volume.
    fn is_wanted(&self, id: &PlanId, thing: &Thing) -> bool {
        let plans = self.plans();
        let mut others = plans.iter().filter(|(other, _)| *other != id);
        match thing {
            Thing::Network { name, .. } => others.any(|(_, known)| {
                let networks = known.plan.containers.iter().flat_map(|one| &one.networks);
                let mut names = networks.map(|network| network["Name"].as_str());
                names.any(|one| one == Some(name.as_str()))
            }),
            Thing::Files { place, .. } => others.any(|(_, known)| {
                let path = &place.path;
                let paths = known.places.iter().map(|place| &place.path);
                // A volume's path is known once its runtime made it.
                let mut paths = paths.filter(|path| path.is_absolute());
                known.owns.is_none()
                    && paths.any(|one| one.starts_with(path) || path.starts_with(one))
            }),
            Thing::Twin { .. } | Thing::Volume { .. } => false,
        }
    }

    /// The container that has files, which the plan left there, as a mount.
    fn user_of(&self, thing: &Thing) -> Option<ContainerName> {
        let Thing::Files { place, .. } = thing else {
            return None;
        };
        let view = self.parts.view.borrow();
        let uses = |container: &&Container| {
            let mut mounts = container.mounts.iter();
            mounts.any(|mount| mount.source.starts_with(&place.path))
        };
        view.containers
            .iter()
            .find(uses)
            .map(|container| container.name.clone())
    }

    /// Takes note of what is left of a plan that is over, and goes on removing it.
    pub(super) fn go_on_removing(
        self: &Arc<Self>,
        id: &PlanId,
        left: Left,
        mut journal: Journal<TargetEvent>,
    ) {
        let again = !left.again.is_empty();
        self.left().insert(id.clone(), left);
        if !again {
            return;
        }
        let (target, id) = (self.clone(), id.clone());
        tokio::spawn(async move {
            let mut pause = AGAIN;
            loop {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(AGAIN_MAX);
                if target.remove_again(&id, &mut journal).await {
                    return;
                }
            }
        });
    }

    /// Tries once more to remove what is left of a plan; whether nothing is left to try.
    pub(super) async fn remove_again(
        &self,
        id: &PlanId,
        journal: &mut Journal<TargetEvent>,
    ) -> bool {
        let Some(before) = self.left().get(id).cloned() else {
            return true;
        };
        let Some(runtime) = self.parts.runtimes.get(&before.runtime) else {
            return false;
        };
        if runtime.answers().await.is_err() {
            return false;
        }
        let mut left = Left {
            again: Vec::new(),
            ..before.clone()
        };
        for (thing, why) in before.again.clone() {
            // Nobody takes a place between the look at it and its end.
            let _offer = self.offers.lock().await;
            match thing.is_same(runtime).await {
                Ok(true) if self.is_wanted(id, &thing) => {}
                Ok(true) => match self.user_of(&thing) {
                    Some(user) => left.stays.push(format!("{why}, and {user} uses it by now")),
                    None => left.remove(thing, runtime).await,
                },
                Ok(false) => {
                    tracing::info!(plan = %id, ?thing, "gone, or somebody else's by now: let be");
                }
                Err(_) => left.again.push((thing, why)),
            }
        }
        if left == before {
            return left.again.is_empty();
        }
        let words = left.words();
        match &words {
            Some(words) => tracing::warn!(plan = %id, "left behind: {words}"),
            None => tracing::info!(plan = %id, "nothing that it had made is left to remove"),
        }
        let is_over = left.again.is_empty();
        let event = TargetEvent::Dismissed {
            reason: "what was left was tried again".to_owned(),
            left: words.is_some().then(|| Box::new(left.clone())),
        };
        // Where that fails the next life finds what is gone changed, and lets it be.
        if let Err(error) = journal.append(crate::fleet::now(), event) {
            tracing::error!("{error}");
        }
        if words.is_some() {
            self.left().insert(id.clone(), left);
        } else {
            self.left().remove(id);
        }
        is_over
    }
}
