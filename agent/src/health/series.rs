//! One threshold on one subject over time: not yet, passed for a while, failed, over.

use super::policy::{Rule, Threshold};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::time::Duration;

/// Events that a window keeps one by one; older ones are dropped only when the newer ones alone
/// already reach the limit, so the answer never changes, only the number that is shown.
const MAX_WINDOW: usize = 4096;

/// Milliseconds of the judge's own clock, which never steps back.
pub(super) type Ticks = u64;

/// State of one threshold on one subject.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Series {
    /// When the last accepted sample was measured.
    pub last_at: Ticks,
    /// Its value, or the events within the span.
    pub value: f64,
    /// Start of the time in which the limit is passed without a break; kept until it clears.
    pub beyond_since: Option<Ticks>,
    /// Whether it has been passed for long enough, and has not cleared since.
    pub failed: bool,
    /// Events of the window, oldest first.
    #[serde(default, skip_serializing_if = "VecDeque::is_empty")]
    window: VecDeque<(Ticks, u64)>,
}

impl Series {
    /// Takes in one sample. One that is not newer than the last, or no number, changes nothing.
    pub(super) fn take(&mut self, threshold: &Threshold, stale: Duration, value: f64, at: Ticks) {
        if !value.is_finite() || at <= self.last_at {
            return;
        }
        // A limit passed before a silence and after it need not have been passed in between.
        if !self.is_fresh(at, stale) && !self.failed {
            self.beyond_since = None;
        }
        self.last_at = at;
        let (beyond, over) = match threshold.rule {
            Rule::Above { enter, clear } => (value > enter, value <= clear),
            Rule::Below { enter, clear } => (value < enter, value >= clear),
            Rule::Count { at_least, within } => {
                let sum = self.count(at_least, within, value, at);
                (sum >= at_least, sum < at_least)
            }
        };
        if !matches!(threshold.rule, Rule::Count { .. }) {
            self.value = value;
        }
        if self.failed {
            if over {
                self.failed = false;
                self.beyond_since = None;
            }
        } else if beyond {
            let since = *self.beyond_since.get_or_insert(at);
            self.failed = u128::from(at - since) >= threshold.lasting.as_millis();
        } else {
            self.beyond_since = None;
        }
    }

    fn count(&mut self, at_least: u64, within: Duration, value: f64, at: Ticks) -> u64 {
        let events = value.max(0.0).round() as u64;
        if events > 0 {
            self.window.push_back((at, events));
        }
        let oldest = u128::from(at).saturating_sub(within.as_millis());
        let mut sum: u64 = self.window.iter().map(|(_, events)| events).sum();
        while let Some(&(when, events)) = self.window.front() {
            let leaked = u128::from(when) < oldest;
            let spare = self.window.len() > MAX_WINDOW && sum - events >= at_least;
            if !leaked && !spare {
                break;
            }
            self.window.pop_front();
            sum -= events;
        }
        self.value = sum as f64;
        sum
    }

    /// Whether the last sample is recent enough to say something about now.
    pub(super) fn is_fresh(&self, now: Ticks, stale: Duration) -> bool {
        u128::from(now.saturating_sub(self.last_at)) <= stale.as_millis()
    }
}
