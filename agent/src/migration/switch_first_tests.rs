//! Switching first: every interleaving of one plan whose twin starts before its data is there.
//!
//! Rules that the steps follow, beyond those of copying first:
//! 1. The release says that the data comes later: the source has frozen the workload and listed the volume, and the
//!    target has the list, durably. From then on the source serves what it listed, read-only, also after a restart.
//! 2. A block that arrives is kept only where nothing was written here.
//! 3. A write is acknowledged when it is durable on the target and in the source's mirror. While the source cannot be
//!    reached, the target first notes in its journal that writes go unmirrored; it mirrors them all before it says
//!    otherwise.
//! 4. When every block is here and the root of what arrived is the source's, the target notes that the volume is whole,
//!    tells the source, and only then may the source let go of data and mirror.
//! 5. Abort before that: the twin is frozen, what is not mirrored is, then the target signs and notes that it gives the
//!    volume back (its own release: the twin is never started again), then the source writes the mirror over its data,
//!    durably, notes that it owns n+2, and only then lets its container run. The target removes its copy when it was
//!    told so.

use std::collections::{HashMap, HashSet, VecDeque};

const BLOCKS: usize = 2;
const WRITES: u8 = 2;
const DEATHS: [u8; 2] = [2, 2];

/// A mistake in the protocol that the model must find.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Flaw {
    AckBeforeMirror,
    ArrivalOverWrite,
    RunBeforeApplied,
    TwinAfterGivingBack,
    WholeUnchecked,
    GiveBackUnmirrored,
}

/// How far the source's journal is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Source {
    Frozen,
    Released,
    /// The target is whole: data and mirror may go.
    Completed,
    /// It has the target's word that it gives the volume back.
    Returning,
    /// It owns n+2.
    Owns,
}

/// How far the target's journal is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Target {
    Listed,
    Owns,
    Whole,
    GivenBack,
    Freed,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    flaw: Option<Flaw>,
    source: Source,
    source_up: bool,
    /// The source's container runs.
    runs: bool,
    /// The source's own blocks: 0 is what it listed; none once let go of.
    data: Option<[u8; BLOCKS]>,
    mirror: [u8; BLOCKS],
    /// Blocks of the mirror that were written over the data since the volume was given back.
    applied: usize,
    target: Target,
    target_up: bool,
    twin: bool,
    /// The operator asked to abort, which the source does not forget; the twin has ended from then on.
    aborting: bool,
    here: [Option<u8>; BLOCKS],
    /// Noted durably: writes may not be in the mirror.
    unmirrored: bool,
    /// What the workload was told is safe.
    acknowledged: [u8; BLOCKS],
    written: u8,
    deaths: [u8; 2],
}

impl World {
    fn first(flaw: Option<Flaw>) -> Self {
        Self {
            flaw,
            source: Source::Frozen,
            source_up: true,
            runs: false,
            data: Some([0; BLOCKS]),
            mirror: [0; BLOCKS],
            applied: 0,
            target: Target::Listed,
            target_up: true,
            twin: false,
            aborting: false,
            here: [None; BLOCKS],
            unmirrored: false,
            acknowledged: [0; BLOCKS],
            written: 0,
            deaths: [0; 2],
        }
    }

    fn has(&self, flaw: Flaw) -> bool {
        self.flaw == Some(flaw)
    }

    fn with(&self, change: impl FnOnce(&mut Self)) -> Self {
        let mut next = self.clone();
        change(&mut next);
        next
    }

    fn local(&self, block: usize) -> u8 {
        self.here[block].unwrap_or(0)
    }

    fn is_mirrored(&self) -> bool {
        (0..BLOCKS).all(|block| self.local(block) == self.mirror[block])
    }

    fn next(&self) -> Vec<Self> {
        let mut next = Vec::new();
        let both = self.source_up && self.target_up;
        // The source.
        if self.source_up {
            match self.source {
                Source::Frozen => {
                    next.push(self.with(|next| next.source = Source::Released));
                    // Until the release, everything goes back.
                    next.push(self.with(|next| {
                        (next.runs, next.source, next.target) = (true, Source::Owns, Target::Freed);
                    }));
                }
                Source::Completed if self.data.is_some() => {
                    next.push(self.with(|next| (next.data, next.mirror) = (None, [0; BLOCKS])));
                }
                Source::Returning if self.applied < BLOCKS => next.push(self.with(|next| {
                    let block = next.applied;
                    if let Some(data) = &mut next.data {
                        data[block] = data[block].max(next.mirror[block]);
                    }
                    next.applied += 1;
                })),
                Source::Returning => next.push(self.with(|next| next.source = Source::Owns)),
                Source::Owns if !self.runs => next.push(self.with(|next| next.runs = true)),
                _ => {}
            }
            if self.source == Source::Returning && self.has(Flaw::RunBeforeApplied) {
                next.push(self.with(|next| (next.source, next.runs) = (Source::Owns, true)));
            }
        } else {
            next.push(self.with(|next| next.source_up = true));
        }
        // Calls between them: each may be made again, as nothing tells that it arrived but the other's state.
        if both {
            if self.source == Source::Released && self.target == Target::Listed {
                next.push(self.with(|next| next.target = Target::Owns));
            }
            if self.source == Source::Released && self.target == Target::Whole {
                next.push(self.with(|next| next.source = Source::Completed));
            }
            if self.source == Source::Released && self.target == Target::GivenBack {
                next.push(self.with(|next| next.source = Source::Returning));
            }
            if self.source == Source::Owns && self.target == Target::GivenBack {
                next.push(self.with(|next| {
                    (next.target, next.here) = (Target::Freed, [None; BLOCKS]);
                }));
            }
        }
        // The target.
        if self.target_up {
            self.target(both, &mut next);
        } else {
            next.push(self.with(|next| next.target_up = true));
        }
        // Faults.
        if self.source_up && self.deaths[0] < DEATHS[0] {
            next.push(self.with(|next| {
                next.deaths[0] += 1;
                next.source_up = false;
            }));
        }
        if self.target_up && self.deaths[1] < DEATHS[1] {
            next.push(self.with(|next| {
                next.deaths[1] += 1;
                // The mount dies with the agent, and the twin with the mount. The source asks for the abort again.
                (next.target_up, next.twin, next.aborting) = (false, false, false);
            }));
        }
        next
    }

    fn target(&self, both: bool, next: &mut Vec<Self>) {
        let serves = self.target == Target::Owns;
        let serving = both && self.data.is_some();
        for block in 0..BLOCKS {
            // A block arrives.
            let wanted = self.here[block].is_none() || self.has(Flaw::ArrivalOverWrite);
            if serves && serving && wanted {
                next.push(self.with(|next| next.here[block] = next.data.map(|data| data[block])));
            }
            // The twin writes; what it was told is safe is so.
            if self.twin && self.written < WRITES {
                let write = |next: &mut Self| {
                    next.written += 1;
                    next.here[block] = Some(next.written);
                };
                if both && !self.unmirrored && self.target == Target::Owns {
                    next.push(self.with(|next| {
                        write(next);
                        next.mirror[block] = next.written;
                        next.acknowledged[block] = next.written;
                    }));
                    // Durable here, and not there yet: nobody was told.
                    next.push(self.with(write));
                }
                if self.unmirrored
                    || self.target == Target::Whole
                    || self.has(Flaw::AckBeforeMirror)
                {
                    next.push(self.with(|next| {
                        write(next);
                        next.acknowledged[block] = next.written;
                    }));
                }
            }
            // Mirroring what is not there yet, after which it may be acknowledged.
            if serves && both && self.local(block) != self.mirror[block] {
                next.push(self.with(|next| {
                    next.mirror[block] = next.local(block);
                    next.acknowledged[block] = next.local(block);
                }));
            }
        }
        match self.target {
            Target::Owns => {
                let whole = self.here.iter().all(Option::is_some) || self.has(Flaw::WholeUnchecked);
                if whole && !self.aborting {
                    next.push(self.with(|next| next.target = Target::Whole));
                }
                if !self.source_up && !self.unmirrored {
                    next.push(self.with(|next| next.unmirrored = true));
                }
                if both && self.unmirrored && self.is_mirrored() {
                    next.push(self.with(|next| next.unmirrored = false));
                }
                if !self.twin && !self.aborting {
                    next.push(self.with(|next| next.twin = true));
                }
                if !self.aborting {
                    next.push(self.with(|next| (next.aborting, next.twin) = (true, false)));
                }
                let given = self.is_mirrored() || self.has(Flaw::GiveBackUnmirrored);
                if self.aborting && given {
                    next.push(self.with(|next| next.target = Target::GivenBack));
                }
            }
            Target::Whole if !self.twin => next.push(self.with(|next| next.twin = true)),
            Target::GivenBack if self.has(Flaw::TwinAfterGivingBack) => {
                next.push(self.with(|next| next.twin = true));
            }
            _ => {}
        }
    }

    fn check(&self) -> Result<(), &'static str> {
        if self.runs && self.twin {
            return Err("container and twin run");
        }
        let source_owns = matches!(self.source, Source::Frozen | Source::Owns);
        let target_owns = matches!(self.target, Target::Owns | Target::Whole);
        if source_owns && target_owns {
            return Err("two owners");
        }
        for block in 0..BLOCKS {
            let acknowledged = self.acknowledged[block];
            // Were the target lost now, the source alone would still have it.
            let on_source = self
                .data
                .map_or(0, |data| data[block])
                .max(self.mirror[block]);
            let kept = !self.unmirrored && self.target == Target::Owns;
            if (kept || source_owns) && on_source < acknowledged {
                return Err("an acknowledged write is not on the source");
            }
            if source_owns && self.data.is_none_or(|data| data[block] < acknowledged) {
                return Err("the source owns without an acknowledged write");
            }
            if target_owns && self.local(block) < acknowledged {
                return Err("an acknowledged write is not on the target");
            }
            if target_owns && self.here[block].is_none() && self.data.is_none() {
                return Err("a block is nowhere");
            }
        }
        Ok(())
    }

    fn is_well(&self) -> bool {
        let there = self.target == Target::Whole && self.twin && self.source == Source::Completed;
        let here = self.source == Source::Owns && self.runs && self.target == Target::Freed;
        (there || here) && self.source_up && self.target_up
    }
}

fn explore(flaw: Option<Flaw>) -> Result<(Vec<World>, Vec<Vec<usize>>), String> {
    let first = World::first(flaw);
    let mut index = HashMap::from([(first.clone(), 0)]);
    let (mut worlds, mut back) = (vec![first], vec![Vec::new()]);
    let mut queue = VecDeque::from([0]);
    while let Some(from) = queue.pop_front() {
        for next in worlds[from].next() {
            let to = match index.get(&next) {
                Some(known) => *known,
                None => {
                    let broken = |rule| format!("{rule}: {next:?}, after {:?}", worlds[from]);
                    next.check().map_err(broken)?;
                    index.insert(next.clone(), worlds.len());
                    queue.push_back(worlds.len());
                    worlds.push(next);
                    back.push(Vec::new());
                    worlds.len() - 1
                }
            };
            back[to].push(from);
        }
    }
    Ok((worlds, back))
}

#[test]
fn in_every_interleaving_what_was_acknowledged_is_kept_and_the_plan_can_end_well() {
    let (worlds, back) = explore(None).unwrap();
    let mut good: HashSet<usize> = (0..worlds.len()).filter(|i| worlds[*i].is_well()).collect();
    let mut queue: VecDeque<usize> = good.iter().copied().collect();
    while let Some(to) = queue.pop_front() {
        for &from in &back[to] {
            if worlds[from].deaths == worlds[to].deaths && good.insert(from) {
                queue.push_back(from);
            }
        }
    }
    let stuck = (0..worlds.len()).find(|world| !good.contains(world));
    println!("{} states", worlds.len());
    assert!(
        stuck.is_none(),
        "no way out of {:?}",
        stuck.map(|i| &worlds[i])
    );
    assert!(worlds.iter().any(|world| world.is_well() && world.twin));
    assert!(
        worlds
            .iter()
            .any(|world| world.is_well() && world.runs && world.written == WRITES)
    );
}

#[test]
fn a_protocol_with_a_mistake_in_it_is_found_out() {
    for (flaw, rule) in [
        (
            Flaw::AckBeforeMirror,
            "an acknowledged write is not on the source",
        ),
        (
            Flaw::ArrivalOverWrite,
            "an acknowledged write is not on the target",
        ),
        (
            Flaw::RunBeforeApplied,
            "the source owns without an acknowledged write",
        ),
        (Flaw::TwinAfterGivingBack, "container and twin run"),
        (Flaw::WholeUnchecked, "a block is nowhere"),
        (
            Flaw::GiveBackUnmirrored,
            "an acknowledged write is not on the source",
        ),
    ] {
        let found = explore(Some(flaw)).err();
        let found = found.unwrap_or_else(|| panic!("{flaw:?} breaks no rule"));
        assert!(found.starts_with(rule), "{flaw:?}: {found}");
    }
}
