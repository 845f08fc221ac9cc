//! The target's side of switching first: twins run on volumes whose data is still on the source.
//!
//! Each tree has a store beside its final place, on the same file system, and a mount of it over that place. When
//! everything is here and proven, the data takes the final place itself. Invariants: what is about to be made or
//! moved is in the journal first, and each step may be done again; until the volumes are whole no runtime starts a
//! twin by itself, because without the mount it would write into the empty place below. Non-goal: what the source
//! does meanwhile (`switch_first`).

use super::events::{ContainerFence, Place, TargetEvent};
use super::fenced::GRACE;
use super::opening::Lists;
use super::places::is_one;
use super::target::{Receiving, Target, TargetError};
use crate::model::control::{Arrival, Whole};
use crate::model::fleet::PeerAddress;
use crate::model::ids::{ContainerName, DeviceId, PlanId, Signature, VolumeId};
use crate::model::plan::{Plan, SignedRelease, VolumeRelease};
use crate::model::trace::FetchOrder;
use crate::model::units::Bytes;
use crate::model::volume::VolumeKind;
use crate::serve::{Filler, Mount, Store, StoreError, exchange};
use nix::fcntl::{OFlag, PosixFadviseAdvice, posix_fadvise};
use nix::sys::stat::Mode;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How long a twin's `fsync` waits for a source that is away, before it is noted that writes go unmirrored.
pub(super) const MIRROR_PATIENCE: Duration = Duration::from_secs(5);
/// Between two tries of what must be over before twins are started in a new life.
const RESUME_RETRY: Duration = Duration::from_secs(5);
/// How often it is looked whether all is here.
const LOOK: Duration = Duration::from_millis(500);

/// A plan whose twins run here before its data is here.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Arriving {
    /// Plan.
    pub plan: PlanId,
    /// Who has the data.
    pub source: DeviceId,
    /// How far it is.
    pub arrival: Arrival,
}

/// Volumes of a plan whose data comes behind the twins.
pub(super) struct Later {
    /// Who has the data.
    pub(super) source: PeerAddress,
    /// The directory of each store.
    pub(super) stores: BTreeMap<VolumeId, PathBuf>,
    /// The lists that were taken.
    pub(super) opened: Vec<VolumeRelease>,
    /// What keeps the runtime from starting each twin by itself.
    pub(super) fences: Vec<ContainerFence>,
    /// The inode of each tree's data, once it is proven.
    proven: Option<BTreeMap<VolumeId, u64>>,
    /// The source is not needed any more.
    pub(super) whole: bool,
    /// No twin is started any more, at least for now.
    pub(super) returning: bool,
    /// What was signed when the volumes were given back.
    pub(super) given_back: Option<SignedRelease>,
    pub(super) live: BTreeMap<VolumeId, Live>,
    roots: BTreeMap<VolumeId, Signature>,
    trouble: Option<String>,
}

/// One volume as this life of the agent serves it; its parts end in this order.
pub(super) struct Live {
    pub(super) mount: Option<Mount>,
    pub(super) filler: Option<Filler>,
    pub(super) store: Arc<Store>,
}

impl Later {
    fn new(source: &PeerAddress, stores: &BTreeMap<VolumeId, PathBuf>) -> Self {
        Self {
            source: source.clone(),
            stores: stores.clone(),
            opened: Vec::new(),
            fences: Vec::new(),
            proven: None,
            whole: false,
            returning: false,
            given_back: None,
            live: BTreeMap::new(),
            roots: BTreeMap::new(),
            trouble: None,
        }
    }

    /// Takes note of a journalled event.
    pub(super) fn note(later: &mut Option<Self>, event: &TargetEvent) {
        if let TargetEvent::Opening { source, stores } = event {
            *later = Some(Self::new(source, stores));
        }
        if matches!(event, TargetEvent::NotOpened) {
            *later = None;
        }
        let Some(later) = later else {
            return;
        };
        match event {
            TargetEvent::Opened { volumes } => later.opened.clone_from(volumes),
            TargetEvent::TwinFenced { fence } => later.fences.push(fence.clone()),
            TargetEvent::Proven { inodes } => later.proven = Some(inodes.clone()),
            TargetEvent::Whole => later.whole = true,
            TargetEvent::GivenBack { word } => {
                later.given_back = Some(word.clone());
                later.returning = true;
            }
            _ => {}
        }
    }

    pub(super) fn is_given_back(&self) -> bool {
        self.given_back.is_some()
    }

    /// Whether the data is about to take, or has taken, its final place.
    pub(super) fn is_proven(&self) -> bool {
        self.proven.is_some() || self.whole
    }

    /// Takes what came of computing the roots, with why some background could not be started.
    fn take_roots(
        &mut self,
        computed: Result<BTreeMap<VolumeId, Signature>, String>,
        idle: Option<String>,
    ) {
        match computed {
            Ok(roots) => (self.roots, self.trouble) = (roots, idle),
            Err(error) => self.trouble = Some(error),
        }
    }

    /// How far it is.
    pub(super) fn arrival(&self) -> Arrival {
        let mut arrival = Arrival {
            whole: self.whole,
            roots: self.roots.clone(),
            trouble: self.trouble.clone(),
            ..Arrival::default()
        };
        for live in self.live.values() {
            let figures = live.store.figures();
            arrival.bytes += Bytes(figures.bytes);
            arrival.absent += Bytes(figures.absent);
            arrival.held += Bytes(figures.held);
            let trouble = || {
                let store = &live.store;
                let first = store.unsafe_here().or_else(|| store.unkept());
                first
                    .or_else(|| store.withheld())
                    .or_else(|| store.doubted())
            };
            arrival.trouble = arrival.trouble.or_else(trouble);
            let mirrored = live.store.mirrored();
            let alone = mirrored.and_then(|mirrored| mirrored.unmirrored);
            arrival.unmirrored = arrival.unmirrored.or(alone.filter(|_| !self.whole));
        }
        arrival
    }
}

/// The trees of a plan with their places.
pub(super) fn trees<'a>(plan: &'a Plan, places: &'a [Place]) -> impl Iterator<Item = &'a Place> {
    places.iter().filter(|place| {
        let volume = plan.volumes.iter().find(|volume| volume.id == place.volume);
        volume.is_some_and(|volume| {
            matches!(volume.kind, VolumeKind::Named(_) | VolumeKind::Bind)
                && !is_one(plan, place.volume)
        })
    })
}

impl Target {
    fn with_later<T>(&self, id: &PlanId, act: impl FnOnce(&mut Receiving) -> T) -> Option<T> {
        let mut plans = self.plans();
        let known = plans.get_mut(id).filter(|known| known.later.is_some());
        known.map(act)
    }

    pub(super) fn later<T>(&self, id: &PlanId, act: impl FnOnce(&mut Later) -> T) -> Option<T> {
        self.with_later(id, |known| known.later.as_mut().map(act))?
    }

    /// Whether no twin of a plan may be started, as its volumes are given back.
    pub(super) fn is_returning(&self, id: &PlanId) -> bool {
        self.later(id, |later| later.returning).unwrap_or(false)
    }

    /// Whether the twins of a plan run, or will run, on volumes that are not whole.
    pub(super) fn is_filling(&self, id: &PlanId) -> bool {
        self.later(id, |later| !later.whole).unwrap_or(false)
    }

    pub(super) fn note_later(&self, id: &PlanId, event: &TargetEvent) -> Result<(), TargetError> {
        let mut plans = self.plans();
        let known = plans
            .get_mut(id)
            .ok_or_else(|| TargetError::Unknown(id.clone()))?;
        known.journal.append(crate::fleet::now(), event.clone())?;
        Later::note(&mut known.later, event);
        Ok(())
    }

    /// Mounts every volume whose data comes later over its final place, and lets the rest come behind.
    pub(super) async fn mount_later(self: &Arc<Self>, plan: &Plan) -> Result<(), String> {
        if !self.is_filling(&plan.id) {
            return Ok(());
        }
        let _starts = self.starts.lock().await;
        self.may_start(&plan.id)?;
        let places = self.plans().get(&plan.id).map(|known| known.places.clone());
        let places = places.unwrap_or_default();
        self.make_stores(plan, &places, Lists::Kept).await?;
        let mut mounted = false;
        for place in trees(plan, &places) {
            let bare = self.later(&plan.id, |later| {
                let live = later.live.get(&place.volume);
                live.filter(|live| live.mount.is_none())
                    .map(|live| Arc::clone(&live.store))
            });
            let Some(store) = bare.flatten() else {
                continue;
            };
            let directory = place.path.clone();
            let hot = plan.fetch_orders.get(&place.volume).cloned();
            let mounting = tokio::task::spawn_blocking(move || {
                store
                    .mirror(MIRROR_PATIENCE)
                    .map_err(|error| error.to_string())?;
                let mount = Mount::at(&directory, Arc::clone(&store), false);
                let mount = mount.map_err(|error| error.to_string())?;
                let filler = Filler::start(&store, hot.unwrap_or_default());
                let filler = filler.map_err(|error| format!("cannot start a thread: {error}"))?;
                Ok::<_, String>((mount, filler))
            });
            let (mount, filler) = mounting.await.map_err(|error| error.to_string())??;
            mounted = true;
            tracing::info!(plan = %plan.id, at = %place.path.display(), "serves a volume to its twins before its data is here");
            self.later(&plan.id, |later| {
                if let Some(live) = later.live.get_mut(&place.volume) {
                    (live.mount, live.filler) = (Some(mount), Some(filler));
                }
            });
        }
        if mounted {
            tokio::spawn(self.clone().until_filled(plan.clone()));
        }
        Ok(())
    }

    /// Computes the roots once everything is here, for the source to compare. Until it is whole, twins that crash are
    /// started again here, and what could not be had is asked for again.
    async fn until_filled(self: Arc<Self>, plan: Plan) {
        loop {
            self.revive(&plan).await;
            let mut idle = None;
            let over = self.later(&plan.id, |later| {
                let unproven = later.roots.is_empty();
                let live = later.live.values_mut();
                let over = live.filter(|live| live.filler.as_ref().is_some_and(Filler::is_over));
                for live in over.filter(|live| live.store.is_unfinished() && unproven) {
                    match Filler::start(&live.store, FetchOrder::default()) {
                        Ok(filler) => live.filler = Some(filler),
                        Err(error) => idle = Some(error.to_string()),
                    }
                }
            });
            if over.is_none() {
                return;
            }
            let stores = self.later(&plan.id, |later| {
                let live = later.live.iter();
                let stores: Vec<_> = live
                    .map(|(volume, live)| (*volume, Arc::clone(&live.store)))
                    .collect();
                (!later.whole && !later.live.is_empty()).then(|| {
                    if later.roots.is_empty() {
                        stores
                    } else {
                        Vec::new()
                    }
                })
            });
            let Some(stores) = stores.flatten() else {
                return;
            };
            if stores.is_empty() {
                tokio::time::sleep(LOOK).await;
                continue;
            }
            let places = self.plans().get(&plan.id).map(|known| known.places.clone());
            let computed = tokio::task::spawn_blocking(move || {
                let mut roots = BTreeMap::new();
                // Each reads the list of all its files: once, when all can be had.
                if !stores.iter().all(|(_, store)| store.is_settled()) {
                    return Ok(roots);
                }
                for (volume, store) in stores {
                    match store.root()? {
                        Some(root) => roots.insert(volume, root),
                        None => return Ok(BTreeMap::new()),
                    };
                    let mut places = places.iter().flatten();
                    if let Some(place) = places.find(|place| place.volume == volume) {
                        forget_cached(&place.path, &store.take_mended());
                    }
                }
                Ok::<_, StoreError>(roots)
            });
            let computed = computed.await.map_err(|error| error.to_string());
            let computed = computed.and_then(|roots| roots.map_err(|error| error.to_string()));
            self.later(&plan.id, |later| later.take_roots(computed, idle));
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Takes the source's word that everything is here; the data takes its final place, and the twins run on.
    ///
    /// # Errors
    /// The roots differ, the plan was not switched first, or a step failed, which may be tried again.
    pub async fn whole(
        self: &Arc<Self>,
        peer: &DeviceId,
        id: &PlanId,
        word: Whole,
    ) -> Result<(), TargetError> {
        let _turn = self.turn(peer).await;
        let (plan, _) = self.known(peer, id)?;
        let known = self.later(id, |later| {
            let agreed = !later.returning && !later.roots.is_empty() && later.roots == word.roots;
            (later.whole, agreed || later.proven.is_some())
        });
        match known {
            Some((true, _)) => Ok(()),
            Some((false, true)) => self.settle(&plan).await,
            _ => Err(TargetError::InTheWay {
                what: "the end of the filling".into(),
                why: self.doubt(id, &word).await,
            }),
        }
    }

    /// Compares volumes whose roots are not those of the source with it again; what came of that, for people.
    async fn doubt(&self, id: &PlanId, word: &Whole) -> String {
        let unlike = self.later(id, |later| {
            let roots = later.roots.clone();
            let unlike = later.live.iter().filter(|(volume, _)| {
                let root = roots.get(volume);
                root.is_some() && root != word.roots.get(volume)
            });
            unlike
                .map(|(_, live)| Arc::clone(&live.store))
                .collect::<Vec<_>>()
        });
        let unlike = unlike.unwrap_or_default();
        let stores = unlike.clone();
        let doubting = tokio::task::spawn_blocking(move || {
            let mut again = false;
            for store in &unlike {
                again |= store.doubt()?;
            }
            Ok::<_, StoreError>(again)
        });
        match doubting.await {
            Ok(Ok(true)) => {
                self.later(id, |later| later.roots.clear());
                "the roots of what arrived are not those of the source; every block is compared with it again".into()
            }
            Ok(Ok(false)) => {
                let known = stores.iter().find_map(|store| store.doubted());
                known.unwrap_or_else(|| "the roots of what arrived are not here yet".into())
            }
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        }
    }

    /// Lets the data take the final places. Doing so again is no error.
    async fn settle(self: &Arc<Self>, plan: &Plan) -> Result<(), TargetError> {
        // A twin that is being started is fenced again afterwards, which nobody would lift once this is over.
        let _starts = self.starts.lock().await;
        let id = &plan.id;
        if !self.is_filling(id) {
            return Ok(());
        }
        if self.is_over(id) {
            return Err(TargetError::InTheWay {
                what: "the end of the filling".into(),
                why: "the agent ends; its next life goes on".into(),
            });
        }
        let places = self.plans().get(id).map(|known| known.places.clone());
        let places = places.unwrap_or_default();
        let Some((stores, proven)) =
            self.later(id, |later| (later.stores.clone(), later.proven.clone()))
        else {
            return Ok(());
        };
        let failed = |doing: String| move |error| TargetError::File { doing, error };
        let inodes = match proven {
            Some(inodes) => inodes,
            None => {
                let mut inodes = BTreeMap::new();
                for (volume, directory) in &stores {
                    let data = directory.join("data");
                    let look = failed(format!("look at {}", data.display()));
                    inodes.insert(*volume, std::fs::metadata(&data).map_err(look)?.ino());
                }
                let event = TargetEvent::Proven {
                    inodes: inodes.clone(),
                };
                self.note_later(id, &event)?;
                inodes
            }
        };
        super::faults::die_at("proven");
        for place in trees(plan, &places) {
            let (Some(directory), Some(inode)) =
                (stores.get(&place.volume), inodes.get(&place.volume))
            else {
                continue;
            };
            let live = self.later(id, |later| {
                let live = later.live.get_mut(&place.volume)?;
                Some((live.mount.take(), live.filler.take(), live.store.clone()))
            });
            let (directory, place, inode) = (directory.clone(), place.path.clone(), *inode);
            let moved = tokio::task::spawn_blocking(move || {
                if let Some((mount, filler, store)) = live.flatten() {
                    drop(filler);
                    store.end_mirror();
                    store.detach();
                    mount.map_or(Ok(()), Mount::let_go)?;
                }
                take_place(&directory, &place, inode)
            });
            let moved = moved.await.map_err(io::Error::other).flatten();
            moved.map_err(failed(format!("bring the data of plan {id} to its place")))?;
        }
        let runtime = self.runtime_for(plan).await?;
        let fences = self.later(id, |later| later.fences.clone());
        for fence in fences.unwrap_or_default() {
            // One that left is fenced by the plan with which it did, in the same way.
            let left = self.has_left(plan, &fence.container).await;
            let left = left.map_err(|why| TargetError::InTheWay {
                what: fence.container.to_string(),
                why,
            })?;
            if left {
                continue;
            }
            runtime
                .lift_fence(&fence.fence)
                .await
                .map_err(|error| TargetError::InTheWay {
                    what: fence.container.to_string(),
                    why: error.to_string(),
                })?;
        }
        // From here on the journal's word counts that twins of an earlier life are ready; those of this life may not be.
        let waiting = self.plans().get(id).map(|known| {
            let ready = |name: &ContainerName| {
                let mut twins = known.twins.iter();
                twins.any(|twin| &twin.container == name && twin.ready.is_some())
            };
            let all = plan.order.iter().flat_map(|step| &step.containers);
            all.filter(|name| !ready(name)).cloned().collect::<Vec<_>>()
        });
        if let Some(waiting) = waiting.filter(|waiting| !waiting.is_empty()) {
            self.note_ended(id, waiting)?;
        }
        self.note_later(id, &TargetEvent::Whole)?;
        tracing::info!(plan = %id, "everything is here; the source is not needed any more");
        Ok(())
    }

    /// Takes up, after a restart of the agent, what an earlier life owned before its data was here.
    pub(super) async fn resume_later(self: Arc<Self>, plan: Plan) {
        if self.is_filling(&plan.id) {
            while let Err(error) = self.clear_mounts(&plan).await {
                if self.is_over(&plan.id) {
                    return;
                }
                tracing::error!(plan = %plan.id, "{error}");
                self.later(&plan.id, |later| later.trouble = Some(error));
                tokio::time::sleep(RESUME_RETRY).await;
            }
            self.later(&plan.id, |later| later.trouble = None);
            return self.start_twins(plan).await;
        }
        let mut said = String::new();
        while let Err(error) = self.leave_mounts(&plan).await {
            if self.is_over(&plan.id) {
                return;
            }
            // Its runtime may be away for good.
            if said != error {
                tracing::error!(plan = %plan.id, "{error}");
                said = error;
            }
            tokio::time::sleep(RESUME_RETRY).await;
        }
        let started = self
            .plans()
            .get(&plan.id)
            .is_some_and(|known| known.start_up.is_some());
        if !started {
            self.start_twins(plan).await;
        }
    }

    /// Ends what runs on mounts that died with the agent, and lets proven data take its place.
    async fn clear_mounts(self: &Arc<Self>, plan: &Plan) -> Result<(), String> {
        self.end_twins(plan, true).await?;
        if self.later(&plan.id, |later| later.proven.is_some()) != Some(true) {
            return Ok(());
        }
        for path in self.places_of(plan) {
            // Nobody looks below a dead mount.
            if let Err(error) = Mount::check(&path) {
                tracing::debug!("{error}");
            }
        }
        self.settle(plan).await.map_err(|error| error.to_string())
    }

    pub(super) fn places_of(&self, plan: &Plan) -> Vec<PathBuf> {
        let plans = self.plans();
        let places = plans.get(&plan.id).map(|known| known.places.as_slice());
        let trees = trees(plan, places.unwrap_or_default());
        trees.map(|place| place.path.clone()).collect()
    }

    /// Plans that were switched first and are not whole, each with its source and how far it is.
    #[must_use]
    pub fn arriving(&self) -> Vec<Arriving> {
        let plans = self.plans();
        let arriving = plans.values().filter_map(|known| {
            let later = known.later.as_ref()?;
            let filling = known.owns.is_some() && !later.whole;
            filling.then(|| Arriving {
                plan: known.plan.id.clone(),
                source: known.plan.source.clone(),
                arrival: later.arrival(),
            })
        });
        arriving.collect()
    }

    /// Ends, before the agent does, what runs on its mounts: twins of volumes that are not whole end until its next
    /// life, the others start anew on the plain place. No twin is started from here on but by this.
    pub async fn stop(&self) {
        self.ending.store(true, Ordering::Release);
        // Of one that is just being started it is known then that it runs.
        let _starts = tokio::time::timeout(GRACE, self.starts.lock()).await;
        let plans: Vec<(Plan, bool)> = {
            let plans = self.plans();
            let owned = plans.values().filter(|known| known.owns.is_some());
            owned
                .filter_map(|known| Some((known.plan.clone(), known.later.as_ref()?.whole)))
                .collect()
        };
        for (plan, whole) in plans {
            // What fails is said where it does, and left to the next life.
            if whole {
                let _ = self.leave_mounts(&plan).await;
            } else {
                let all = plan.order.iter().flat_map(|step| &step.containers);
                if let Err(error) = self.note_ended(&plan.id, all.cloned().collect()) {
                    tracing::error!(plan = %plan.id, "{error}");
                }
                let _ = self.end_twins(&plan, false).await;
            }
            self.close_later(&plan.id).await;
        }
    }

    /// Closes what is open of a plan's stores.
    pub(super) async fn close_later(&self, id: &PlanId) {
        let live = self.later(id, |later| std::mem::take(&mut later.live));
        let closing = tokio::task::spawn_blocking(move || {
            for live in live.unwrap_or_default().into_values() {
                live.store.detach();
                drop(live);
            }
        });
        if let Err(error) = closing.await {
            tracing::error!("internal task failed: {error}");
        }
    }
}

/// Lets the kernel forget what it read of files of a mount that were written below it.
fn forget_cached(mount: &Path, paths: &[Arc<[u8]>]) {
    for path in paths {
        let path = mount.join(OsStr::from_bytes(path));
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW;
        let forgotten = nix::fcntl::open(&path, flags, Mode::empty()).and_then(|file| {
            let advice = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
            posix_fadvise(&file, 0, 0, advice)
        });
        if let Err(error) = forgotten {
            tracing::warn!(path = %path.display(), "may be read as it was until it is opened anew: {error}");
        }
    }
}

fn remove_store(directory: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Exchanges the data of a store, known by its inode, with its final place, durably, and removes the store. Doing so
/// again is no error.
fn take_place(store: &Path, place: &Path, inode: u64) -> io::Result<()> {
    if std::fs::symlink_metadata(place)?.ino() != inode {
        exchange(&store.join("data"), place)?;
        for directory in [Some(store), place.parent()].into_iter().flatten() {
            File::open(directory)?.sync_all()?;
        }
    }
    remove_store(store)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn why_the_roots_could_not_be_computed_is_told_until_they_can() {
        let source = PeerAddress {
            device: "s".into(),
            addr: ([127, 0, 0, 1], 1).into(),
        };
        let mut later = Later::new(&source, &BTreeMap::new());
        later.take_roots(Err("the disk".into()), None);
        assert_eq!(later.arrival().trouble.as_deref(), Some("the disk"));
        later.take_roots(Ok(BTreeMap::new()), None);
        assert_eq!(later.arrival().trouble, None);
        later.take_roots(Ok(BTreeMap::new()), Some("no thread".into()));
        assert_eq!(later.arrival().trouble.as_deref(), Some("no thread"));
    }

    #[test]
    fn data_takes_its_place_once_however_often_it_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let (store, place) = (
            directory.path().join("store"),
            directory.path().join("place"),
        );
        std::fs::create_dir_all(store.join("data")).unwrap();
        std::fs::write(store.join("data/file"), "bytes").unwrap();
        std::fs::write(store.join("index"), "").unwrap();
        std::fs::create_dir(&place).unwrap();
        let inode = std::fs::metadata(store.join("data")).unwrap().ino();
        for _ in 0..3 {
            take_place(&store, &place, inode).unwrap();
            assert_eq!(std::fs::read(place.join("file")).unwrap(), b"bytes");
            assert!(!store.exists());
        }
        let other = directory.path().join("other");
        std::fs::create_dir(&other).unwrap();
        assert!(
            take_place(&store, &other, inode).is_err(),
            "neither is the data"
        );
    }
}
