//! Everything the judge remembers.

use super::policy::{Policy, Stage, Threshold};
use super::series::{Series, Ticks};
use super::verdict::VerdictKind;
use crate::model::action::Actions;
use crate::model::units::UnixMillis;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

/// The judge's memory, to be kept over a restart. Its form is private to this version; state that
/// does not fit the policy any more is dropped when it is loaded.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SavedState {
    /// The judge's own clock: advances with what passed where that is known, else with the wall clock, and
    /// stands still when that steps back.
    pub(super) ticks: Ticks,
    /// Wall clock when it was last advanced.
    pub(super) wall: Option<UnixMillis>,
    pub(super) kind: VerdictKind,
    pub(super) since: Ticks,
    /// Whether the last verdict that was not `unknown` was `degraded`.
    pub(super) degraded: bool,
    /// Last change of that, for `guards.hold`.
    pub(super) turned: Option<Ticks>,
    /// Actions chosen when `degraded` last held by evidence.
    pub(super) delegate: Actions,
    /// How far the degraded device is helped, and since when.
    #[serde(default)]
    pub(super) stage: Option<(Stage, Ticks)>,
    pub(super) thresholds: BTreeMap<String, Remembered>,
}

/// State of one threshold.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Remembered {
    pub definition: String,
    /// By the subject's name; the device's is empty.
    pub series: BTreeMap<String, Series>,
    /// Subjects that were measured last and cannot be judged, with the reason.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub blind: BTreeMap<String, String>,
}

/// What the wall clock is off by less than this is how it is kept right: followed, so that times that were told stay
/// as they are.
const STEP_MS: u64 = 500;

impl SavedState {
    /// Moves the judge's clock to `now`. A step back moves it by the least it can, so that the next
    /// samples still count as newer ones.
    pub(super) fn advance(&mut self, now: UnixMillis) -> Ticks {
        self.ticks = match self.wall {
            // Far from 0, so that a first sample may be older than the first call.
            None => now.0.max(1),
            Some(wall) if now < wall => self.ticks + 1,
            Some(wall) => self.ticks + (now.0 - wall.0),
        };
        self.wall = Some(now);
        self.ticks
    }

    /// Moves the judge's clock by what `passed` until `now`, whatever the wall clock did in between.
    pub(super) fn pass(&mut self, now: UnixMillis, passed: Duration) {
        let Some(wall) = self.wall else {
            return;
        };
        let passed = u64::try_from(passed.as_millis()).unwrap_or(u64::MAX);
        let by_wall = now.0.checked_sub(wall.0);
        if by_wall.is_none_or(|by_wall| by_wall.abs_diff(passed) > STEP_MS) {
            self.ticks = self.ticks.saturating_add(passed.max(1));
            self.wall = Some(now);
        }
    }

    /// When a sample of `at` was measured, on the judge's clock.
    pub(super) fn tick_of(&self, at: UnixMillis) -> Ticks {
        let age = self.wall.unwrap_or_default().0.saturating_sub(at.0);
        self.ticks.saturating_sub(age).max(1)
    }

    /// A tick as a time on today's wall clock.
    pub(super) fn wall_time(&self, tick: Ticks) -> UnixMillis {
        let wall = self.wall.unwrap_or_default();
        UnixMillis(wall.0.saturating_sub(self.ticks.saturating_sub(tick)))
    }

    /// Keeps what belongs to a threshold of `policy` with an unchanged definition.
    pub(super) fn fit(&mut self, policy: &Policy) {
        let definitions: BTreeMap<&str, String> = policy
            .thresholds
            .iter()
            .map(|threshold| (threshold.name.as_str(), threshold.definition()))
            .collect();
        self.thresholds
            .retain(|name, state| definitions.get(name.as_str()) == Some(&state.definition));
    }

    pub(super) fn of(&mut self, threshold: &Threshold) -> &mut Remembered {
        self.thresholds
            .entry(threshold.name.clone())
            .or_insert_with(|| Remembered {
                definition: threshold.definition(),
                ..Remembered::default()
            })
    }
}
