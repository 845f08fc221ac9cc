//! The source's side: sends one epoch of a volume along its path.
//!
//! Invariant: an epoch is reported as sent only when the target has said, provably, that it applied
//! everything, made it durable, and computed the same root.

use super::frame::{FrameKind, Header};
use super::link::{Event, Handler, Hop, Link, LinkError, LinkSetup, Opened};
use super::message::{Basis, Done, Held as Answer, Message};
use super::offers::Offers;
use super::packing::Packing;
use super::payload::{self, PayloadKind};
use super::reading::held_by_readers;
use super::record::{Record, Slots};
use super::seal::{DataKey, NoRandom, Salt, Sealer, Tagger, random};
use super::source::{Held, Source};
use super::{Options, Progress};
use crate::model::ids::{Epoch, PlanId, Signature, VolumeId};
use crate::model::units::{Bytes, UnixMillis};
use crate::model::volume::{TimesKept, VolumeSpec};
use crate::volume::pages::Marker;
use crate::volume::scan::ScanError;
use crate::volume::{BlockSize, Exception, FleetKey, TreeState, Unreadable};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

/// The path of a block (who seals, who carries).
#[derive(Clone, Debug)]
pub enum DataPath {
    /// The source seals and sends to the target.
    Direct {
        /// The target.
        target: Hop,
        /// The plan's key.
        data_key: DataKey,
    },
    /// The source seals; the paired device keeps the records on disk and carries them.
    ViaSpool {
        /// The paired device.
        relay: Hop,
        /// The plan's key, which the paired device does not have.
        data_key: DataKey,
    },
    /// The paired device seals and returns the records; the source sends them to the target.
    SealReturn {
        /// The paired device, over a trusted link.
        sealer: Hop,
        /// The target.
        target: Hop,
    },
    /// The paired device seals and carries.
    SealForward {
        /// The paired device, over a trusted link.
        relay: Hop,
    },
}

/// An epoch was not sent. The source's data is untouched; the epoch can be sent again.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The source's tree could not be read.
    #[error("volume {volume}: {source}")]
    Read {
        /// The volume.
        volume: String,
        /// Why.
        source: ScanError,
    },
    /// The records did not get through, or the target could not take them.
    #[error("volume {volume}, epoch {epoch}: {source}")]
    Link {
        /// The volume.
        volume: String,
        /// The epoch.
        epoch: Epoch,
        /// Why.
        source: LinkError,
    },
    /// A file changed although its containers are frozen.
    #[error(
        "volume {volume}: `{path}` changed while its containers were frozen; find what else writes to it, stop that, and evacuate again"
    )]
    ChangedWhileFrozen {
        /// The volume.
        volume: String,
        /// The file.
        path: String,
    },
    /// Source and target disagree.
    #[error(
        "volume {volume}, epoch {epoch}: the target's root {target} differs from the source's {source_root}; the copy is not used, send the epoch again"
    )]
    RootDiffers {
        /// The volume.
        volume: String,
        /// The epoch.
        epoch: Epoch,
        /// Computed here.
        source_root: Signature,
        /// Computed there.
        target: Signature,
    },
    /// The acknowledgement did not come from the target.
    #[error(
        "volume {volume}, epoch {epoch}: the acknowledgement is not the target's; check who stands between source and target"
    )]
    ForgedAcknowledgement {
        /// The volume.
        volume: String,
        /// The epoch.
        epoch: Epoch,
    },
    /// No random bytes for a session.
    #[error(transparent)]
    Random(#[from] NoRandom),
}

/// What sending an epoch did.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct EpochReport {
    /// The epoch.
    pub epoch: Epoch,
    /// Root computed by the source.
    pub root: Signature,
    /// Root computed by the target; the same, or the epoch would have failed.
    pub target_root: Signature,
    /// Entries in the tree.
    pub entries: u64,
    /// Entries that are new or differ from the epoch before.
    pub changed_entries: u64,
    /// Entries that are gone.
    pub removed: u64,
    /// Blocks whose bytes were sent.
    pub blocks_sent: u64,
    /// Blocks sent as a mark for zeros.
    pub zero_blocks: u64,
    /// Blocks that differ and that the target took from what it holds elsewhere.
    pub held_blocks: u64,
    /// Blocks that were read and found to be at the target already.
    pub unchanged_blocks: u64,
    /// Plain bytes of the blocks that were sent, or of their pages that were: the size of the changeset.
    pub changeset: Bytes,
    /// Bytes read from files.
    pub bytes_read: Bytes,
    /// Bytes of records.
    pub bytes_on_wire: Bytes,
    /// Bytes of payloads that were packed because the link was the limit, as they were before.
    #[serde(default)]
    pub packed_from: Bytes,
    /// What was left of them.
    #[serde(default)]
    pub packed_to: Bytes,
    /// Bytes that the file system of a volume of one piece does not use: zeros on the target.
    #[serde(default)]
    pub unused: Bytes,
    /// Processor time of this process from the beginning of the epoch to its end, in all threads.
    pub source_cpu: Duration,
    /// What was left out on purpose.
    pub skipped: Vec<Exception>,
    /// What the source's disk did not give up.
    pub unreadable: Vec<Unreadable>,
    /// From the first look at the tree to the target's acknowledgement.
    pub duration: Duration,
}

/// What came of an attempt, also of one that failed.
#[derive(Default)]
struct Attempt {
    /// Bytes of records.
    wire: Bytes,
    /// The target took some of them.
    moved: bool,
}

/// Sends volumes of one plan along one path.
#[derive(Debug)]
pub struct Sender {
    plan: PlanId,
    /// The peers agreed to the plan before.
    agreed: bool,
    path: DataPath,
    fleet_key: FleetKey,
    options: Options,
    times: BTreeMap<VolumeId, TimesKept>,
    since: Option<UnixMillis>,
    /// What was lost of each volume's last complete epoch, in the order of path and offset.
    lost: BTreeMap<VolumeId, Vec<Unreadable>>,
}

/// What a link keeps in any case: some records, or nothing would move.
const WINDOW_LEAST: usize = 8 << 20;

/// Seals or tags records and numbers them.
pub(super) struct Outlet {
    link: Arc<Link>,
    protection: Protection,
    next: AtomicU64,
    pub(super) bytes: AtomicU64,
    volume: VolumeId,
    epoch: Epoch,
    /// The link on which the target answers offers.
    answering: Arc<Link>,
    pub(super) offers: Offers,
    packing: Packing,
    /// What records with much data are made in.
    pub(super) slots: Arc<Slots>,
}

enum Protection {
    Seal(Sealer),
    Tag(Tagger),
    SealAndTag(Sealer, Tagger),
}

impl Outlet {
    /// A buffer for a record.
    pub(super) fn buffer(&self) -> Vec<u8> {
        self.link.buffer()
    }

    /// Numbers, protects and sends a record; waits while too much is in flight.
    pub(super) fn emit(
        &self,
        record: impl Into<Record>,
        barrier: bool,
        first_block: u64,
    ) -> Result<(), LinkError> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.push(number, record.into(), barrier, first_block)
    }

    /// Sends a record with offered blocks and returns the number under which it is answered.
    pub(super) fn offer(&self, record: Vec<u8>, first_block: u64) -> Result<u64, LinkError> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.answering.expect(number);
        self.push(number, record.into(), false, first_block)?;
        Ok(number)
    }

    /// Whether the answer to an offer is there.
    pub(super) fn is_answered(&self, number: u64) -> bool {
        self.answering.is_answered(number)
    }

    /// Waits for the answer to an offer.
    pub(super) fn answer(&self, number: u64) -> Result<Answer, LinkError> {
        self.answering.answer(number)
    }

    fn push(
        &self,
        number: u64,
        record: Record,
        barrier: bool,
        first_block: u64,
    ) -> Result<(), LinkError> {
        let limit = self.link.limit();
        let (mut record, unused) = self.packing.pack(record, limit, || self.link.buffer());
        if let Some(unused) = unused {
            self.link.give_back(unused);
        }
        record = record.dense();
        let mut header = Header {
            kind: FrameKind::Sealed,
            barrier,
            length: 0,
            volume: self.volume,
            epoch: self.epoch,
            number,
            first_block,
        };
        match &self.protection {
            Protection::Seal(sealer) => sealer.seal(&header, &mut record),
            Protection::SealAndTag(sealer, tagger) => {
                sealer.seal(&header, &mut record);
                tagger.wrap(&header, &mut record);
            }
            Protection::Tag(tagger) => {
                header.kind = FrameKind::Tagged;
                tagger.tag(&header, &mut record);
            }
        }
        self.bytes.fetch_add(record.len() as u64, Ordering::Relaxed);
        self.link.push(number, record)
    }
}

/// The links of a path while an epoch is under way.
struct Route {
    outlet: Outlet,
    opened: Opened,
    /// The link whose far end is the target.
    last: Arc<Link>,
}

impl Sender {
    /// For a plan whose blocks take `path`.
    #[must_use]
    pub fn new(plan: PlanId, path: DataPath, fleet_key: FleetKey, options: Options) -> Self {
        Self {
            plan,
            agreed: false,
            path,
            fleet_key,
            options,
            times: BTreeMap::new(),
            since: None,
            lost: BTreeMap::new(),
        }
    }

    /// Sends times as the target's file systems keep them, volumes that are not named with all of them.
    #[must_use]
    pub fn keeping(self, times: BTreeMap<VolumeId, TimesKept>) -> Self {
        Self { times, ..self }
    }

    /// Goes on after earlier attempts of the plan, which was made at `since`: of each volume its last complete epoch
    /// lacked what is in `lost`.
    #[must_use]
    pub fn after(self, since: UnixMillis, lost: BTreeMap<VolumeId, Vec<Unreadable>>) -> Self {
        Self {
            since: Some(since),
            lost,
            ..self
        }
    }

    /// Sends what changed in `volume` since `previous` (everything without it) and waits until the
    /// target has applied and verified it. With `frozen`, the volume's containers must be paused, and file systems
    /// mounted from it frozen: a change while reading is then an error instead of work for the next epoch.
    ///
    /// Blocks. Stops soon after [`Progress::cancel`].
    ///
    /// # Errors
    /// [`SendError`]; the epoch can be sent again, with the same `previous` or with none: what the
    /// target already has is not sent twice.
    pub fn send_epoch(
        &mut self,
        volume: &VolumeSpec,
        epoch: Epoch,
        frozen: bool,
        previous: Option<&TreeState>,
        progress: &Arc<Progress>,
    ) -> Result<(TreeState, EpochReport), SendError> {
        let (started, cpu) = (Instant::now(), processor_time());
        let (mut wire, mut fruitless) = (0, 0);
        loop {
            let mut attempt = Attempt::default();
            let sent = self.attempt(volume, epoch, frozen, previous, progress, &mut attempt);
            wire += attempt.wire.0;
            match sent {
                Err(SendError::Link { source, .. })
                    if source.is_forgotten() && fruitless < self.options.retries =>
                {
                    // What the peer has of it by now it will say, and that is not sent again.
                    fruitless = if attempt.moved { 0 } else { fruitless + 1 };
                    tracing::warn!(volume = volume.name, %epoch, "{source}; it is begun again");
                    self.agreed = true;
                }
                Ok((state, mut report)) => {
                    report.bytes_on_wire = Bytes(wire);
                    report.source_cpu = processor_time().saturating_sub(cpu);
                    report.duration = started.elapsed();
                    self.lost.insert(volume.id, report.unreadable.clone());
                    return Ok((state, report));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// One attempt, from its first connection to the target's word.
    fn attempt(
        &self,
        volume: &VolumeSpec,
        epoch: Epoch,
        frozen: bool,
        previous: Option<&TreeState>,
        progress: &Arc<Progress>,
        attempt: &mut Attempt,
    ) -> Result<(TreeState, EpochReport), SendError> {
        let block_size = previous.map_or_else(
            || BlockSize::for_volume(volume.size.0),
            |state| state.block_size,
        );
        let failed = |source: LinkError| SendError::Link {
            volume: volume.name.clone(),
            epoch,
            source,
        };
        let route = self.open(volume.id, epoch, block_size, previous, progress)?;
        let Route {
            outlet,
            opened,
            last,
        } = route.map_err(failed)?;
        let held = match (opened.basis, previous) {
            (Basis::Known, Some(previous)) => Held::Previous(previous),
            _ => Held::list(&self.fleet_key, opened.have),
        };
        let lost = match held.previous() {
            Some(previous) => Some(&previous.unreadable),
            None => self.lost.get(&volume.id),
        };
        let source = Source {
            volume,
            key: &self.fleet_key,
            marker: Marker::new(&self.fleet_key),
            block_size,
            held,
            earlier: previous,
            lost: lost.map_or(&[], Vec::as_slice),
            // Before a volume's first complete epoch, what lies on the target may be anybody's.
            since: self.since.filter(|_| self.lost.contains_key(&volume.id)),
            frozen,
            progress,
            outlet: &outlet,
            options: &self.options,
            times: self.times.get(&volume.id).copied().unwrap_or_default(),
        };
        let sent = self.send(&source, epoch, &last);
        attempt.wire = Bytes(outlet.bytes.into_inner());
        attempt.moved = last.acknowledged() > 0;
        sent
    }

    fn send(
        &self,
        source: &Source<'_>,
        epoch: Epoch,
        last: &Link,
    ) -> Result<(TreeState, EpochReport), SendError> {
        let (volume, outlet) = (source.volume, source.outlet);
        let failed = |source: LinkError| SendError::Link {
            volume: volume.name.clone(),
            epoch,
            source,
        };
        let (state, tally) = source.send().map_err(|error| error.at(volume, epoch))?;
        let mut end = payload::start(outlet.buffer(), PayloadKind::End);
        payload::put_end(&mut end, state.root, state.entries());
        outlet.emit(end, true, 0).map_err(failed)?;
        let done = last.finish().map_err(failed)?;
        let expected = proof(&self.fleet_key, &self.plan, volume.id, epoch, &done);
        if blake3::Hash::from(done.proof) != blake3::Hash::from(expected) {
            let volume = volume.name.clone();
            return Err(SendError::ForgedAcknowledgement { volume, epoch });
        }
        if done.root != state.root {
            return Err(SendError::RootDiffers {
                volume: volume.name.clone(),
                epoch,
                source_root: state.root,
                target: done.root,
            });
        }
        let report = EpochReport {
            epoch,
            root: state.root,
            target_root: done.root,
            entries: state.entries(),
            changed_entries: tally.changed_entries.into_inner(),
            removed: tally.removed.into_inner(),
            blocks_sent: tally.blocks_sent.into_inner(),
            zero_blocks: tally.zero_blocks.into_inner(),
            held_blocks: tally.held_blocks.into_inner(),
            unchanged_blocks: tally.unchanged_blocks.into_inner(),
            changeset: Bytes(tally.changeset.into_inner()),
            bytes_read: Bytes(tally.bytes_read.into_inner()),
            bytes_on_wire: Bytes(0),
            packed_from: Bytes(outlet.packing.before.load(Ordering::Relaxed)),
            packed_to: Bytes(outlet.packing.after.load(Ordering::Relaxed)),
            unused: state.unused.as_ref().map_or(Bytes(0), |map| map.bytes()),
            source_cpu: Duration::ZERO,
            skipped: tally.skipped,
            unreadable: state.unreadable.clone(),
            duration: Duration::ZERO,
        };
        Ok((state, report))
    }

    /// Bytes of records that a link of this path may keep, so that all memory in flight stays below its cap.
    fn window(&self) -> usize {
        let links = match &self.path {
            DataPath::SealReturn { .. } => 2,
            _ => 1,
        };
        let held = held_by_readers(self.options.workers);
        (self.options.in_flight_cap.saturating_sub(held) / links).max(WINDOW_LEAST)
    }

    fn open(
        &self,
        volume: VolumeId,
        epoch: Epoch,
        block_size: BlockSize,
        previous: Option<&TreeState>,
        progress: &Arc<Progress>,
    ) -> Result<Result<Route, LinkError>, NoRandom> {
        let session = random()?;
        let salt: Salt = random()?;
        let setup = |hop: &Hop, salt: Salt| LinkSetup {
            plan: self.plan.clone(),
            hop: hop.clone(),
            volume,
            epoch,
            begin: Message::Begin {
                session,
                salt,
                block_size,
                basis: previous.map(|state| state.root),
            },
            known: self.agreed,
            options: Options {
                in_flight_cap: self.window(),
                ..self.options.clone()
            },
            progress: Arc::clone(progress),
        };
        let outlet = |link: &Arc<Link>, last: &Arc<Link>, opened: &Opened, protection| Outlet {
            link: Arc::clone(link),
            protection,
            next: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            volume,
            epoch,
            answering: Arc::clone(last),
            offers: Offers::new(opened.holdings),
            packing: Packing::default(),
            slots: Arc::default(),
        };
        let route = || match &self.path {
            DataPath::Direct { target, data_key } => {
                let (link, opened) = Link::open(setup(target, salt), deaf())?;
                let link = Arc::new(link);
                let sealer = Sealer::new(&self.plan, data_key, &salt);
                Ok(Route {
                    outlet: outlet(&link, &link, &opened, Protection::Seal(sealer)),
                    opened,
                    last: link,
                })
            }
            DataPath::ViaSpool { relay, data_key } => {
                let (link, opened) = Link::open(setup(relay, salt), deaf())?;
                let link = Arc::new(link);
                let sealer = Sealer::new(&self.plan, data_key, &salt);
                let tagger = Tagger::new(&relay.link_key, &session);
                Ok(Route {
                    outlet: outlet(
                        &link,
                        &link,
                        &opened,
                        Protection::SealAndTag(sealer, tagger),
                    ),
                    opened,
                    last: link,
                })
            }
            DataPath::SealForward { relay } => {
                let (link, opened) = Link::open(setup(relay, salt), deaf())?;
                let link = Arc::new(link);
                let tagger = Tagger::new(&relay.link_key, &session);
                Ok(Route {
                    outlet: outlet(&link, &link, &opened, Protection::Tag(tagger)),
                    opened,
                    last: link,
                })
            }
            DataPath::SealReturn { sealer, target } => {
                let onward: Arc<OnceLock<Arc<Link>>> = Arc::default();
                let back: Arc<OnceLock<Weak<Link>>> = Arc::default();
                let handler = {
                    let (onward, back) = (Arc::clone(&onward), Arc::clone(&back));
                    let tagger = Tagger::new(&sealer.link_key, &session);
                    Box::new(move |event| {
                        let Some(link) = onward.get() else {
                            return Ok(());
                        };
                        match event {
                            Event::Record(header, mut record) => {
                                tagger.unwrap(&header, &mut record)?;
                                if let Err(error) = link.push(header.number, record)
                                    && let Some(back) = back.get().and_then(Weak::upgrade)
                                {
                                    back.fail(error);
                                }
                            }
                            Event::Failed(error) => link.fail(error),
                            Event::Ack(_) | Event::Held(_) | Event::Done(_) => {}
                        }
                        Ok(())
                    })
                };
                let (link, sealing) = Link::open(setup(sealer, salt), handler)?;
                let link = Arc::new(link);
                let (last, opened) = Link::open(setup(target, sealing.salt), deaf())?;
                let last = Arc::new(last);
                // The handler can only have been called for records, and none was sent yet.
                let _ = onward.set(Arc::clone(&last));
                let _ = back.set(Arc::downgrade(&link));
                let tagger = Tagger::new(&sealer.link_key, &session);
                Ok(Route {
                    outlet: outlet(&link, &last, &opened, Protection::Tag(tagger)),
                    opened,
                    last,
                })
            }
        };
        Ok(route())
    }
}

/// Processor time that this process has used, in all its threads.
fn processor_time() -> Duration {
    use nix::time::{ClockId, clock_gettime};
    // Every kernel has this clock.
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// For a link whose events need no one's attention.
fn deaf() -> Handler {
    Box::new(|_| Ok(()))
}

/// The target's proof of an acknowledgement, which no relay can make.
pub(super) fn proof(
    key: &FleetKey,
    plan: &PlanId,
    volume: VolumeId,
    epoch: Epoch,
    done: &Done,
) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_keyed(&key.0);
    hasher
        .update(b"lifeboat epoch done 1\0")
        .update(plan.as_str().as_bytes())
        .update(&[0])
        .update(&volume.0.to_le_bytes())
        .update(&epoch.0.to_le_bytes())
        .update(&done.root.0)
        .update(&done.entries.to_le_bytes());
    *hasher.finalize().as_bytes()
}

/// How a path is named in a list that relays can see.
pub(super) fn path_hash(key: &FleetKey, path: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_keyed(&key.0);
    hasher.update(b"lifeboat path 1\0").update(path);
    *hasher.finalize().as_bytes()
}
