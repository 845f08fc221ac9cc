//! Every interleaving of one plan on a source and a target: deaths of either agent at every step, reboots of the
//! source's host, calls and answers that are lost, come late or come twice, and an abort at any time.
//!
//! The steps are those of `source.rs`, `switch.rs`, `roll_back.rs` and `resume.rs`, and of the target; what a journal
//! commits a source to is asked of the code itself. Invariant of the model: a step that can be seen from outside
//! (a container, a call, the other side's disk) is one step, so that a death fits between any two.

use super::events::{ContainerFence, SourceEvent};
use super::moving::Done;
use super::resume::{After, UnderWay};
use crate::model::plan::SignedRelease;
use crate::model::units::UnixMillis;
use std::collections::{HashMap, HashSet, VecDeque};

/// Deaths of the source's agent, of the target's, and reboots of the source's host in one history.
const DEATHS: [u8; 3] = [2, 2, 1];
/// States of the data that are told apart: a write beyond them looks like the last.
const WRITES: u8 = 5;

/// The source's journal, without what the protocol does not depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Line {
    Planned,
    Prepared,
    Fencing,
    Fenced,
    Pausing,
    Final,
    Released(u8),
    TargetOwns,
    Stopped,
    Completed,
    GivenUp,
    Aborted,
    TargetFreed,
    Resumed,
}

impl Line {
    fn event(self) -> SourceEvent {
        let reason = || "asked to".to_owned();
        match self {
            // Any event that commits to nothing.
            Self::Planned | Self::Final => SourceEvent::NotPaired { reason: reason() },
            Self::Prepared => SourceEvent::Prepared {
                images_present: Vec::new(),
                layers_present: 0,
                times: Default::default(),
            },
            Self::Fencing => SourceEvent::Fencing,
            Self::Fenced => SourceEvent::Fenced {
                fences: vec![fence()],
            },
            Self::Pausing => SourceEvent::Pausing { containers: None },
            Self::Released(data) => SourceEvent::Released {
                release: SignedRelease {
                    body: data.to_string(),
                    certificate: Vec::new(),
                    signature: Vec::new(),
                },
            },
            Self::TargetOwns | Self::Stopped => SourceEvent::SourceStopped {
                containers: Vec::new(),
            },
            Self::Completed => SourceEvent::Completed,
            Self::GivenUp => SourceEvent::GivenUp { reason: reason() },
            Self::Aborted => SourceEvent::Aborted { reason: reason() },
            Self::TargetFreed => SourceEvent::TargetFreed { left: None },
            Self::Resumed => SourceEvent::Resumed,
        }
    }
}

fn fence() -> ContainerFence {
    ContainerFence {
        container: "db".into(),
        fence: crate::containers::Fence {
            runtime: "/run/podman/podman.sock".into(),
            container: "db".into(),
            how: crate::containers::Means::RestartPolicy {
                previous: serde_json::Value::Null,
            },
        },
    }
}

/// What the source's agent does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum At {
    Dead,
    Offer,
    Copy,
    Fencing,
    Fence,
    Fenced,
    Pausing,
    Freeze,
    Final,
    Release(u8),
    /// The release could not be written, and may be on disk all the same.
    Torn,
    HandOver(u8),
    Owned,
    Kill,
    Stopped,
    AwaitTwin,
    Thaw,
    GivenUp,
    Unfence,
    Dismiss,
    Aborted(bool),
    Free,
    Freed,
    LetRun,
    LetStart,
    Resumed,
    Over,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Container {
    Running,
    Frozen,
    /// Ended by a reboot; its runtime or the agent may start it when it is not fenced.
    Down,
    Killed,
}

/// A call on its way: it may arrive late, more than once, or never.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Call {
    Offer,
    Release(u8),
    Dismiss,
}

/// A mistake in the protocol that the model must find.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Flaw {
    NoFence,
    NoFreeze,
    ForgottenRelease,
    TwinWithoutRelease,
    ForgottenFence,
    TornRelease,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    flaw: Option<Flaw>,
    journal: Vec<Line>,
    at: At,
    container: Container,
    fenced: bool,
    data: u8,
    /// Of the source, of the target, of the source's host.
    deaths: [u8; 3],
    calls: Vec<Call>,
    accepted: bool,
    arrived: Option<u8>,
    owns: Option<u8>,
    target_up: bool,
    twin: bool,
}

impl World {
    fn first(flaw: Option<Flaw>) -> Self {
        Self {
            flaw,
            journal: vec![Line::Planned],
            at: At::Offer,
            container: Container::Running,
            fenced: false,
            data: 0,
            deaths: [0; 3],
            calls: Vec::new(),
            accepted: false,
            arrived: None,
            owns: None,
            target_up: true,
            twin: false,
        }
    }

    fn released(&self) -> Option<u8> {
        self.journal.iter().find_map(|line| match line {
            Line::Released(data) => Some(*data),
            _ => None,
        })
    }

    /// What a roll-back would undo, by the journal.
    fn done(&self) -> Done {
        let mut done = Done::default();
        for line in &self.journal {
            done.note(UnixMillis(1), &line.event());
        }
        done
    }

    fn with(&self, change: impl FnOnce(&mut Self)) -> Self {
        let mut next = self.clone();
        change(&mut next);
        next
    }

    fn writes(&self, line: Line, then: At) -> Self {
        self.with(|next| {
            next.journal.push(line);
            next.at = then;
        })
    }

    fn run(&mut self) {
        if self.container != Container::Running {
            self.container = Container::Running;
            self.data = (self.data + 1).min(WRITES);
        }
    }

    fn with_call(&self, call: Call) -> Self {
        self.with(|next| {
            if !next.calls.contains(&call) {
                next.calls.push(call);
                next.calls.sort();
            }
        })
    }

    /// The target takes a call; whether it agreed.
    fn takes(&mut self, call: Call) -> bool {
        match call {
            Call::Offer => {
                if self.owns.is_none() && !self.accepted {
                    (self.accepted, self.arrived) = (true, None);
                }
                self.owns.is_none()
            }
            Call::Release(data) => {
                if self.owns.is_none() && self.accepted && self.arrived == Some(data) {
                    self.owns = Some(data);
                }
                self.owns.is_some()
            }
            Call::Dismiss => {
                if self.owns.is_none() {
                    (self.accepted, self.arrived) = (false, None);
                }
                self.owns.is_none()
            }
        }
    }

    /// Makes a call now: it is lost, or it is answered and the source goes on at `then`.
    fn call(&self, call: Call, then: At, next: &mut Vec<Self>) {
        let sent = self.with_call(call);
        if sent.target_up {
            let mut taken = sent.clone();
            if taken.takes(call) {
                taken.at = then;
                next.push(taken);
            }
        }
        next.push(sent);
    }

    /// Everything that can happen next.
    fn next(&self) -> Vec<Self> {
        let mut next = Vec::new();
        self.source(&mut next);
        self.target(&mut next);
        self.faults(&mut next);
        next
    }

    fn source(&self, next: &mut Vec<Self>) {
        match self.at {
            At::Dead => next.push(self.restarted()),
            At::Offer => {
                self.call(Call::Offer, At::Copy, next);
                for agreed in next.iter_mut().filter(|next| next.at == At::Copy) {
                    agreed.journal.push(Line::Prepared);
                }
            }
            At::Copy => self.sends(At::Fencing, next),
            At::Fencing => next.push(self.writes(Line::Fencing, At::Fence)),
            At::Fence => next.push(self.with(|next| {
                next.fenced = next.flaw != Some(Flaw::NoFence);
                next.at = At::Fenced;
            })),
            At::Fenced => next.push(self.writes(Line::Fenced, At::Pausing)),
            At::Pausing => next.push(self.writes(Line::Pausing, At::Freeze)),
            At::Freeze => next.push(self.with(|next| {
                if next.container == Container::Running && next.flaw != Some(Flaw::NoFreeze) {
                    next.container = Container::Frozen;
                }
                next.at = At::Final;
            })),
            At::Final => {
                self.sends(At::Release(self.data), next);
                for sent in next.iter_mut().filter(|next| next.at != At::Final) {
                    sent.journal.push(Line::Final);
                }
            }
            // The target itself is asked what arrived, and nothing may run.
            At::Release(data) => {
                let stands = self.target_up && self.accepted && self.arrived == Some(data);
                let frozen = self.container != Container::Running;
                if stands && (frozen || self.flaw == Some(Flaw::NoFreeze)) {
                    next.push(self.writes(Line::Released(data), At::HandOver(data)));
                    next.push(self.writes(Line::Released(data), At::Torn));
                }
            }
            At::Torn => next.push(self.with(|next| {
                if next.flaw != Some(Flaw::TornRelease) {
                    next.journal.pop();
                }
                next.at = At::Thaw;
            })),
            At::HandOver(data) => self.call(Call::Release(data), At::Owned, next),
            At::Owned => next.push(self.writes(Line::TargetOwns, At::Kill)),
            At::Kill => next.push(self.with(|next| {
                (next.container, next.at) = (Container::Killed, At::Stopped);
            })),
            At::Stopped => next.push(self.writes(Line::Stopped, At::AwaitTwin)),
            At::AwaitTwin if self.target_up && self.twin => {
                next.push(self.writes(Line::Completed, At::Over));
            }
            At::AwaitTwin | At::Over => {}
            At::Thaw => next.push(self.with(|next| {
                next.thaw();
                next.at = At::GivenUp;
            })),
            At::GivenUp => next.push(self.writes(Line::GivenUp, At::Unfence)),
            At::Unfence => next.push(self.with(|next| {
                next.unfence();
                next.at = At::Dismiss;
            })),
            At::Dismiss => {
                self.call(Call::Dismiss, At::Aborted(true), next);
                next.push(self.with(|next| next.at = At::Aborted(false)));
            }
            At::Aborted(freed) => {
                let then = if freed { At::Freed } else { At::Free };
                next.push(self.writes(Line::Aborted, then));
            }
            At::Free => self.call(Call::Dismiss, At::Freed, next),
            At::Freed => next.push(self.writes(Line::TargetFreed, At::Over)),
            At::LetRun => next.push(self.with(|next| {
                next.thaw();
                next.at = At::LetStart;
            })),
            At::LetStart => next.push(self.with(|next| {
                next.unfence();
                next.at = At::Resumed;
            })),
            At::Resumed => {
                let mut resumed = self.writes(Line::Resumed, At::Offer);
                // What was before means nothing any more: fewer histories to tell apart.
                assert!(resumed.released().is_none() && !resumed.journal.contains(&Line::GivenUp));
                resumed.journal = vec![Line::Planned, Line::Resumed];
                next.push(resumed);
            }
        }
        // An abort, or any error, before the release.
        let before_the_release = matches!(
            self.at,
            At::Offer
                | At::Copy
                | At::Fencing
                | At::Fence
                | At::Fenced
                | At::Pausing
                | At::Freeze
                | At::Final
                | At::Release(_)
        );
        if before_the_release {
            next.push(self.with(|next| next.at = At::Thaw));
        }
    }

    /// The data as it is now arrives, or the connection is lost on the way.
    fn sends(&self, then: At, next: &mut Vec<Self>) {
        if self.target_up && self.accepted && self.owns.is_none() {
            next.push(self.with(|next| {
                (next.arrived, next.at) = (Some(next.data), then);
            }));
            next.push(self.with(|next| next.arrived = None));
        }
    }

    fn thaw(&mut self) {
        let done = self.done();
        if done.pausing.is_some() && self.container == Container::Frozen {
            self.run();
        }
    }

    /// Lifts the fence that the journal knows of, and starts what only the fence kept down.
    fn unfence(&mut self) {
        let done = self.done();
        let forgotten = self.flaw == Some(Flaw::ForgottenFence);
        if !forgotten && (done.fencing || !done.fences.is_empty()) {
            self.fenced = false;
            if self.container == Container::Down {
                self.run();
            }
        }
    }

    fn restarted(&self) -> Self {
        let events: Vec<SourceEvent> = self.journal.iter().map(|line| line.event()).collect();
        let at = match After::of(events.iter()) {
            After::Nothing | After::Forward => At::Over,
            After::FreeTarget(_) => At::Free,
            After::GoOn(UnderWay::Released(_)) if self.flaw == Some(Flaw::ForgottenRelease) => {
                At::Thaw
            }
            After::GoOn(UnderWay::Released(release)) => {
                At::HandOver(release.body.parse().expect("a release of this model"))
            }
            After::GoOn(UnderWay::Returning { .. }) => unreachable!("copied first, as here"),
            After::GoOn(UnderWay::GivenUp(_)) => At::Thaw,
            After::GoOn(UnderWay::Unreleased) => At::LetRun,
        };
        self.with(|next| next.at = at)
    }

    fn target(&self, next: &mut Vec<Self>) {
        if !self.target_up {
            next.push(self.with(|next| next.target_up = true));
            return;
        }
        for call in &self.calls {
            next.push(self.with(|next| {
                next.takes(*call);
            }));
        }
        let early = self.flaw == Some(Flaw::TwinWithoutRelease) && self.arrived.is_some();
        if (self.owns.is_some() || early) && !self.twin {
            next.push(self.with(|next| next.twin = true));
        }
    }

    fn faults(&self, next: &mut Vec<Self>) {
        let died = |which: usize| {
            (self.deaths[which] < DEATHS[which]).then(|| {
                self.with(|next| {
                    next.deaths[which] += 1;
                })
            })
        };
        if self.at != At::Dead
            && let Some(mut dead) = died(0)
        {
            dead.at = At::Dead;
            next.push(dead);
        }
        if self.target_up
            && let Some(mut dead) = died(1)
        {
            dead.target_up = false;
            next.push(dead);
        }
        if let Some(mut rebooted) = died(2) {
            rebooted.at = At::Dead;
            if rebooted.container != Container::Killed {
                rebooted.container = Container::Down;
            }
            // What nothing forbids, the runtime starts at boot.
            if !rebooted.fenced {
                rebooted.run();
            }
            next.push(rebooted);
        }
        if self.container == Container::Running && self.data < WRITES {
            next.push(self.with(|next| next.data += 1));
        }
    }

    fn check(&self) -> Result<(), &'static str> {
        let runs = self.container == Container::Running;
        if runs && self.twin {
            return Err("container and twin run");
        }
        if runs && self.released().is_some() {
            return Err("a released container runs");
        }
        if self.owns.is_some() && self.released() != self.owns {
            return Err("the target owns what was not released");
        }
        if let Some(released) = self.released()
            && released != self.data
        {
            return Err("a write is lost: what was released is not the last state");
        }
        if self.owns.is_some() && self.arrived != self.owns {
            return Err("the target owns what it does not have");
        }
        if self.at == At::Over
            && self.released().is_none()
            && (self.fenced || matches!(self.container, Container::Frozen | Container::Down))
        {
            return Err("a plan was given up, and its container does not run");
        }
        Ok(())
    }

    /// The plan is over as it may be: the container runs and can be started, or its twin runs.
    fn is_well(&self) -> bool {
        let here = self.container == Container::Running && !self.fenced && self.owns.is_none();
        let there = self.twin && self.container == Container::Killed && self.fenced;
        self.at == At::Over && (here || there)
    }
}

/// Every state that can be reached, and the edges backwards; none when a rule is broken in one.
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
fn in_every_interleaving_the_data_has_one_owner_and_the_plan_can_still_end_well() {
    let (worlds, back) = explore(None).unwrap();
    // Whether a good end can be reached from everywhere without another fault: from the ends backwards.
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
    assert!(
        stuck.is_none(),
        "no way out of {:?}",
        stuck.map(|i| &worlds[i])
    );
    println!("{} states", worlds.len());
    assert!(worlds.len() > 10_000, "only {} states", worlds.len());
    assert!(worlds.iter().any(|world| world.is_well() && world.twin));
    assert!(worlds.iter().any(|world| world.is_well() && !world.twin));
}

#[test]
fn a_protocol_with_a_mistake_in_it_is_found_out() {
    for (flaw, rule) in [
        (Flaw::NoFence, "a released container runs"),
        (Flaw::NoFreeze, "a released container runs"),
        (Flaw::ForgottenRelease, "a released container runs"),
        (Flaw::TwinWithoutRelease, "container and twin run"),
        (Flaw::TornRelease, "a released container runs"),
        (
            Flaw::ForgottenFence,
            "a plan was given up, and its container does not run",
        ),
    ] {
        let found = explore(Some(flaw)).err();
        let found = found.unwrap_or_else(|| panic!("{flaw:?} breaks no rule"));
        assert!(found.starts_with(rule), "{flaw:?}: {found}");
    }
}
