//! Copying first or switching first: what each would take from here, which is better, and why.
//!
//! *Copy first* sends everything and then changesets while the workload runs, and freezes it for the last one.
//! *Switch first* freezes it at once, lets the twin start, and sends the data behind it: every byte once.
//! Invariant: asked again after every round with what that round measured, so the answer may change on the way.
//! Non-goals: measuring, and carrying out what was chosen.

use super::units::{Bytes, UnixMillis, human_duration};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// The two ways to move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// Data, then ownership.
    CopyFirst,
    /// Ownership, then data.
    SwitchFirst,
}

/// Bytes a second.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    /// Bytes in each second.
    pub bytes: Bytes,
    /// How it is known.
    pub from: String,
}

/// When the policy expects the worst.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deadline {
    /// From now.
    pub left: Duration,
    /// The threshold that says so.
    pub threshold: String,
}

/// One round of replication.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changeset {
    /// Bytes sent.
    pub bytes: Bytes,
    /// Time it took.
    pub took: Duration,
}

/// What is known when it is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outlook {
    /// All that moves.
    pub size: Bytes,
    /// What of it the whole copy has taken over so far, while it is not over.
    #[serde(default)]
    pub copied: Bytes,
    /// Rounds since the evacuation began.
    pub rounds: u32,
    /// The last of them that sent a changeset; none before the second, as the first sends everything.
    pub last: Option<Changeset>,
    /// Bytes of the round before that.
    pub before: Option<Bytes>,
    /// Time the whole copy took; none while it is not over.
    pub whole: Option<Duration>,
    /// How fast the copy is.
    pub copy: Rate,
    /// How fast the workload changes the data; none while nobody knows.
    pub dirty: Option<Rate>,
    /// What a round takes beside its bytes, for instance to look at each file.
    pub overhead: Duration,
    /// When the host may be gone; none when nothing says so.
    pub deadline: Option<Deadline>,
    /// Why it cannot switch first here; none when it can.
    pub obstacle: Option<String>,
    /// An operator's word.
    pub word: Option<Way>,
    /// Bounds.
    pub bounds: Bounds,
}

/// What an operator set, and what the pause may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bounds {
    /// A changeset of so many bytes is small enough to pause for.
    pub threshold: Bytes,
    /// Rounds at most.
    pub rounds: u32,
    /// A pause that takes longer is given up.
    pub pause: Duration,
}

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Next {
    /// One more round.
    Copy,
    /// The pause with the final changeset.
    Pause,
    /// The pause now, the data behind the twin.
    SwitchFirst,
}

/// What was chosen, what it should take, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    /// What comes next.
    pub next: Next,
    /// Rounds still to come by copying first.
    pub rounds: u32,
    /// Time they should take.
    pub copying: Duration,
    /// The pause that should follow on them.
    pub pause: Duration,
    /// One sentence with the figures.
    pub why: String,
    /// What was known.
    pub outlook: Outlook,
}

/// Where copying first leads from here.
struct Course {
    rounds: u32,
    copying: Duration,
    pause: Duration,
}

/// A changeset that is not smaller than this share of the one before has stopped shrinking, in percent.
const SHRINKS_PERCENT: u128 = 80;

/// What is shorter is not known from bytes alone.
const TELLS_PAUSE: Duration = Duration::from_secs(1);

/// Longer forecasts are not told apart: a rate near zero must not overflow a duration.
const FOR_EVER: Duration = Duration::from_hours(24 * 365);

impl Outlook {
    /// What to do now.
    #[must_use]
    pub fn choose(self) -> Choice {
        let course = self.course();
        let copy = if self.rests(self.last, self.before, self.rounds) {
            Next::Pause
        } else {
            Next::Copy
        };
        let better = self.better(&course);
        let (next, why) = match (self.word, &self.obstacle, better) {
            (Some(Way::SwitchFirst), None, _) => {
                (Next::SwitchFirst, "as an operator said".to_owned())
            }
            (Some(Way::SwitchFirst), Some(obstacle), _) => (
                copy,
                format!("an operator said to switch first, which cannot be done: {obstacle}"),
            ),
            (Some(Way::CopyFirst), _, _) => (copy, "as an operator said".to_owned()),
            (None, None, Some(better)) => (Next::SwitchFirst, better),
            (None, Some(obstacle), Some(better)) => (
                copy,
                format!("{better}, but switching first cannot be done: {obstacle}"),
            ),
            (None, _, None) => (copy, self.plainly()),
        };
        let why = format!(
            "{}: {}; {why}",
            self.head(next),
            self.figures(&course, next)
        );
        Choice {
            next,
            rounds: course.rounds,
            copying: course.copying,
            pause: course.pause,
            why,
            outlook: self,
        }
    }

    /// Whether copying on is of no more use after a round of `last` that followed on one of `before`.
    fn rests(&self, last: Option<Changeset>, before: Option<Bytes>, rounds: u32) -> bool {
        // The first round is the whole copy: what changed meanwhile is not known before the second.
        let Some(last) = last else {
            return false;
        };
        let stuck = before.is_some_and(|before| {
            u128::from(last.bytes.0) * 100 > u128::from(before.0) * SHRINKS_PERCENT
        });
        // A pause that would be given up is not begun while more rounds may still shorten it.
        rounds >= self.bounds.rounds
            || ((stuck || last.bytes <= self.bounds.threshold)
                && self.pause_after(last.took) <= self.bounds.pause)
    }

    /// Bytes that the workload changes meanwhile.
    fn changed_in(&self, span: Duration) -> Bytes {
        let rate = self.dirty.as_ref().map_or(0, |dirty| dirty.bytes.0);
        let bytes = rate as f64 * span.as_secs_f64();
        Bytes((bytes as u64).min(self.size.0))
    }

    fn time_for(&self, bytes: Bytes) -> Duration {
        let seconds = bytes.0 as f64 / self.copy.bytes.0.max(1) as f64;
        Duration::try_from_secs_f64(seconds)
            .unwrap_or(FOR_EVER)
            .saturating_add(self.overhead)
            .min(FOR_EVER)
    }

    fn pause_after(&self, round: Duration) -> Duration {
        self.time_for(self.changed_in(round))
    }

    /// Plays the rounds to come with the figures as they are.
    fn course(&self) -> Course {
        let (mut last, mut before, mut rounds) = (self.last, self.before, self.rounds);
        let (mut copying, mut took) = (Duration::ZERO, self.whole);
        while !self.rests(last, before, rounds) {
            let (bytes, is_whole) = match (last, took) {
                (None, None) => (Bytes(self.size.0.saturating_sub(self.copied.0)), true),
                (None, Some(took)) => (self.changed_in(took), false),
                (Some(last), _) => (self.changed_in(last.took), false),
            };
            let round = self.time_for(bytes);
            if is_whole {
                (took, before) = (Some(round), Some(bytes));
            } else {
                before = last.map_or(before, |last| Some(last.bytes));
                last = Some(Changeset { bytes, took: round });
            }
            rounds += 1;
            copying = copying.saturating_add(round).min(FOR_EVER);
        }
        let took = last.map_or(Duration::ZERO, |last| last.took);
        Course {
            rounds: rounds.saturating_sub(self.rounds),
            copying,
            pause: self.pause_after(took),
        }
    }

    /// Whether a forecast alone makes switching first better.
    #[must_use]
    pub fn is_late(&self) -> bool {
        self.late(&self.course()).is_some()
    }

    /// Whether all data would be whole on the target in time if it switched first now. What was copied counts only
    /// once the source has read it again and named each block.
    fn whole_in(&self, left: Duration) -> bool {
        self.time_for(self.size) <= left
    }

    /// Why switching first would be better; none when it would not.
    fn better(&self, course: &Course) -> Option<String> {
        if course.pause > self.bounds.pause {
            return Some(format!(
                "the changesets do not get small, and a pause may take {} at most",
                human_duration(self.bounds.pause)
            ));
        }
        self.late(course)
    }

    fn late(&self, course: &Course) -> Option<String> {
        let deadline = self.deadline.as_ref()?;
        let copied = course.copying.saturating_add(course.pause);
        // What cannot be had in time either way stays whole in one place.
        (copied > deadline.left && self.whole_in(deadline.left)).then(|| {
            format!(
                "copying would not be over in the {} that `{}` forecasts, and switched first each byte goes once",
                human_duration(deadline.left),
                deadline.threshold
            )
        })
    }

    /// Why it copies when nothing speaks against it.
    fn plainly(&self) -> String {
        let too_late = self
            .deadline
            .as_ref()
            .filter(|deadline| !self.whole_in(deadline.left));
        match (&self.dirty, too_late) {
            (_, Some(deadline)) => format!(
                "neither way is over in the {} that `{}` forecasts, and until the switch everything is in one place",
                human_duration(deadline.left),
                deadline.threshold
            ),
            (None, None) => "how much changes meanwhile is measured on the way".to_owned(),
            (Some(_), None) => "until the switch everything is in one place".to_owned(),
        }
    }

    fn head(&self, next: Next) -> &'static str {
        match (next, self.whole.is_some() || self.copied.0 > 0) {
            (Next::SwitchFirst, false) => "switch first",
            (Next::SwitchFirst, true) => "switch first, with what was copied so far",
            (Next::Pause, _) => "pause now",
            (Next::Copy, false) => "copy first",
            (Next::Copy, true) => "go on copying",
        }
    }

    fn figures(&self, course: &Course, next: Next) -> String {
        let what = match self.last {
            Some(last) => format!("{} changed in the last round", last.bytes),
            None => format!("{} in all", self.size),
        };
        let dirty = match &self.dirty {
            Some(dirty) => format!(", {}/s changed anew ({})", dirty.bytes, dirty.from),
            None => String::new(),
        };
        let copy = &self.copy;
        // Before a changeset was sent the bytes alone are known; a short pause is mostly something else.
        let pause = match self.last {
            None if course.pause < TELLS_PAUSE => "a pause that is not measured yet".to_owned(),
            _ => format!("a pause of about {}", human_duration(course.pause)),
        };
        let (rounds, copying) = (course.rounds, human_duration(course.copying));
        let then = match next {
            Next::Pause => pause,
            Next::Copy => format!("{rounds} more round(s) in {copying}, then {pause}"),
            Next::SwitchFirst => {
                format!("copying would take {rounds} more round(s) in {copying} and {pause}")
            }
        };
        format!(
            "{what}, {}/s copied ({}){dirty}: {then}",
            copy.bytes, copy.from
        )
    }
}

/// What the rounds so far have measured.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// Time the whole copy took.
    pub whole: Option<Duration>,
    /// The last changeset.
    pub last: Option<Changeset>,
    /// The round that carried most, which tells the rate best.
    most: Option<Changeset>,
    dirty: Option<Bytes>,
    began: Option<UnixMillis>,
    rounds: u32,
}

/// A round of fewer bytes says little of the rate: it is mostly looking.
const TELLS_RATE: Bytes = Bytes(16 << 20);

/// The rate of a copy; none while too little was copied to tell.
#[must_use]
pub fn rate_of(copied: Bytes, took: Duration) -> Option<Rate> {
    let seconds = took.as_secs_f64().max(1e-3);
    (copied >= TELLS_RATE).then(|| Rate {
        bytes: Bytes((copied.0 as f64 / seconds) as u64),
        from: "measured".into(),
    })
}

impl Measured {
    /// Takes note of a round.
    pub fn note(&mut self, ended: UnixMillis, round: Changeset) {
        self.rounds += 1;
        if self.most.is_none_or(|most| round.bytes >= most.bytes) {
            self.most = Some(round);
        }
        let took = u64::try_from(round.took.as_millis()).unwrap_or(u64::MAX);
        let began = UnixMillis(ended.0.saturating_sub(took));
        if self.whole.is_none() {
            self.whole = Some(round.took);
        } else {
            // It found what had changed since the round before looked.
            let since = self
                .began
                .map_or(Duration::ZERO, |before| began.since(before));
            self.dirty = (!since.is_zero())
                .then(|| Bytes((round.bytes.0 as f64 / since.as_secs_f64()) as u64));
            self.last = Some(round);
        }
        self.began = Some(began);
    }

    /// The next round is a whole one again; what was learnt of the rate stays.
    pub fn restart(&mut self) {
        (self.whole, self.last, self.dirty, self.began) = (None, None, None, None);
    }

    /// Rounds from here on may be faster: what those before took says nothing of them.
    pub fn hurry(&mut self) {
        (self.last, self.most) = (None, None);
    }

    /// How fast the copy is; none while too little was copied to tell.
    #[must_use]
    pub fn copy(&self) -> Option<Rate> {
        let most = self.most?;
        rate_of(most.bytes, most.took)
    }

    /// How fast the workload changes the data.
    #[must_use]
    pub fn dirty(&self) -> Option<Rate> {
        Some(Rate {
            bytes: self.dirty?,
            from: format!("measured in round {}", self.rounds),
        })
    }

    /// What the last round took beside its bytes.
    #[must_use]
    pub fn overhead(&self, copy: &Rate) -> Duration {
        let Some(last) = self.last else {
            return Duration::ZERO;
        };
        let bytes = last.bytes.0 as f64 / copy.bytes.0.max(1) as f64;
        let bytes = Duration::try_from_secs_f64(bytes).unwrap_or(FOR_EVER);
        last.took.saturating_sub(bytes)
    }
}
