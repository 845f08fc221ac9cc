//! What is fetched, from whom, and who takes what comes.

use super::wire::{Class, Refusal};
use crate::model::ids::{PlanId, Signature, VolumeId};
use crate::model::units::Bytes;
use crate::transfer::link::Hop;
use crate::transfer::seal::DataKey;
use crate::volume::FleetKey;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Where the source gives out blocks, and the keys for it.
#[derive(Clone, Debug)]
pub struct Grant {
    /// Its data address with the key of its door.
    pub hop: Hop,
    /// What blocks are sealed with; none where they come plain with a tag, over a trusted link.
    pub data_key: Option<DataKey>,
}

/// A block of a file: the number that the caller gave the file, and the block's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// File.
    pub file: u32,
    /// Block.
    pub block: u64,
}

/// A block as the source gave it.
#[derive(Clone, Copy, Debug)]
pub struct Block<'a> {
    /// Its signature, which the bytes bear.
    pub signature: Signature,
    /// What came with it.
    pub content: Content<'a>,
}

/// What came with a block's signature.
#[derive(Clone, Copy, Debug)]
pub enum Content<'a> {
    /// Its bytes: fewer than a block at the end of the file, none for zeros.
    Bytes(&'a [u8]),
    /// Nothing: it is what was said to be here.
    Held,
    /// Nothing: only the signature was asked for.
    Unasked,
}

/// Who takes what arrives. Called from the connections' threads; must not ask for more from there.
pub trait Arrivals: Send + Sync {
    /// A block, or why it does not come.
    fn arrived(&self, class: Class, place: Place, block: Result<Block<'_>, Refusal>);

    /// Which of the `count` blocks from `first` on are holes, in runs counted from there; none are where the source cannot
    /// tell.
    fn mapped(&self, first: Place, count: u32, holes: &[Range<u32>]);

    /// The source is out of reach, for a block or a number of `holes` from there on. Never called of a plan that insists;
    /// of others also by who asks, before the asking returns.
    fn away(&self, _place: Place, _holes: Option<u32>) {}
}

/// Asks a device to let this one in.
pub type Admit = Box<dyn Fn() -> Result<Grant, String> + Send + Sync>;

/// The paired device that answers in the source's stead.
pub struct StandIn {
    /// Asks it to let this device in.
    pub admit: Admit,
    /// Whether it is asked for the list too.
    pub lists: bool,
}

/// Bytes of blocks that came from each.
#[derive(Debug, Default)]
pub struct Tally {
    source: AtomicU64,
    stand_in: AtomicU64,
}

impl Tally {
    /// From the source itself.
    #[must_use]
    pub fn source(&self) -> u64 {
        self.source.load(Ordering::Relaxed)
    }

    /// From the paired device that stands in for it.
    #[must_use]
    pub fn stand_in(&self) -> u64 {
        self.stand_in.load(Ordering::Relaxed)
    }

    pub(super) fn of(&self, by: By) -> &AtomicU64 {
        match by {
            By::Source => &self.source,
            By::StandIn => &self.stand_in,
        }
    }
}

/// What is fetched from.
pub struct FetchPlan {
    /// Plan.
    pub plan: PlanId,
    /// Volume.
    pub volume: VolumeId,
    /// Blocks are signed with this key.
    pub fleet_key: FleetKey,
    /// Asks the source to let this device in; asked again when it does not (it was started anew).
    pub admit: Admit,
    /// Who answers in its stead, as long as it does.
    pub stand_in: Option<StandIn>,
    /// Whether a question that the source does not get is kept until it does; the arrivals hear of it else.
    pub insists: bool,
    /// What came from whom.
    pub tally: Tally,
}

impl FetchPlan {
    /// Of the source alone, which is asked until it answers.
    #[must_use]
    pub fn of_source(plan: PlanId, volume: VolumeId, fleet_key: FleetKey, admit: Admit) -> Self {
        Self {
            plan,
            volume,
            fleet_key,
            admit,
            stand_in: None,
            insists: true,
            tally: Tally::default(),
        }
    }

    pub(super) fn admission(&self, by: By) -> Option<&Admit> {
        match by {
            By::Source => Some(&self.admit),
            By::StandIn => self.stand_in.as_ref().map(|stand_in| &stand_in.admit),
        }
    }
}

/// Whom a connection asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum By {
    Source,
    StandIn,
}

/// The source cannot be asked now. Trying again can help.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// It lets nobody in.
    #[error("the source does not give out the volume: {0}")]
    NotAdmitted(String),
    /// Its list is of no use.
    #[error("the source's list of the volume is longer than {0}; copy first")]
    TooLong(Bytes),
    /// The link failed.
    #[error("the link to the source failed: {0}; check the network and the agent there")]
    Link(String),
}
