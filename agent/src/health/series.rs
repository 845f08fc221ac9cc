//! One threshold on one subject over time: not yet, passed for a while, failed, over.

use super::policy::{Measure, Rule, Threshold};
use super::reading::Reading;
use super::trend::Trend;
use crate::model::metric::Unit;
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
    /// The judged value of it, or the events within the span.
    pub value: f64,
    /// What it was held against: the part's own limit, the load, the peers' median, or the
    /// milliseconds until the forecast is reached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub against: Option<f64>,
    /// Start of the time in which the limit is passed without a break; kept until it clears.
    pub beyond_since: Option<Ticks>,
    /// Whether it has been passed for long enough, and has not cleared since.
    pub failed: bool,
    /// Since when there has been too little load to judge.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    idle_since: Option<Ticks>,
    /// Events of the window, oldest first.
    #[serde(default, skip_serializing_if = "VecDeque::is_empty")]
    window: VecDeque<(Ticks, u64)>,
    /// Values, for `rising` and `forecast`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    trend: Option<Box<Trend>>,
    /// Values and loads, for `relative_to_load`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    load: Option<Box<Trend>>,
}

impl Series {
    /// Takes in one reading. One that is not newer than the last, or no number, changes nothing.
    pub(super) fn take(
        &mut self,
        threshold: &Threshold,
        stale: Duration,
        reading: &Reading,
        at: Ticks,
    ) {
        if at <= self.last_at {
            return;
        }
        let value = match *reading {
            Reading::Value { value, against } => {
                self.against = against;
                Some(value)
            }
            Reading::PerLoad { value, load } => self.per_load(threshold, stale, value, load, at),
            Reading::Idle => None,
            Reading::Blind(_) => return,
        };
        if value.is_some_and(|value| !value.is_finite()) {
            return;
        }
        // A limit passed before a silence and after it need not have been passed in between.
        if !self.failed && (value.is_none() || !self.is_fresh(at, stale)) {
            self.beyond_since = None;
        }
        if value.is_some() {
            self.idle_since = None;
        }
        self.last_at = at;
        if let Some(value) = value {
            self.judge(threshold, value, at);
        }
    }

    fn judge(&mut self, threshold: &Threshold, value: f64, at: Ticks) {
        let mut trending = true;
        let (beyond, over) = match threshold.rule {
            Rule::Above {
                enter,
                clear,
                rising,
            } => {
                if rising {
                    trending = self.slope(threshold.lasting, value, at) > 0.0;
                }
                (
                    value > enter.at(self.against),
                    value <= clear.at(self.against),
                )
            }
            Rule::Below { enter, clear } => (
                value < enter.at(self.against),
                value >= clear.at(self.against),
            ),
            Rule::Forecast { within, clear, .. } => {
                let reached = self.forecast(&threshold.rule, value, at);
                self.against = reached;
                let before =
                    |span: Duration| reached.is_some_and(|ms| ms <= span.as_millis() as f64);
                (before(within), !before(clear))
            }
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
            let long = u128::from(at - since) >= threshold.lasting.as_millis();
            self.failed = long && trending;
        } else {
            self.beyond_since = None;
        }
    }

    fn slope(&mut self, span: Duration, value: f64, at: Ticks) -> f64 {
        let trend = self.trend.get_or_insert_default();
        trend.add(span, at, value);
        trend.line(at).and_then(|line| line.slope).unwrap_or(0.0)
    }

    /// Milliseconds until the value is reached; none when it never is, or nobody can tell yet.
    fn forecast(&mut self, rule: &Rule, value: f64, at: Ticks) -> Option<f64> {
        let Rule::Forecast {
            reaches,
            falling,
            over,
            ..
        } = *rule
        else {
            return None;
        };
        let trend = self.trend.get_or_insert_default();
        trend.add(over, at, value);
        let aim = reaches.at(self.against);
        let sign = if falling { -1.0 } else { 1.0 };
        if sign * (aim - value) <= 0.0 {
            return Some(0.0);
        }
        if trend.covers(at) < over / 2 {
            return None;
        }
        let line = trend.line(at)?;
        let slope = line.slope.filter(|slope| slope * sign > 0.0)?;
        Some(((aim - line.level) / slope).max(0.0))
    }

    /// Time from the last sample until a forecast's value is reached; none when it never is.
    pub(super) fn reached_in(&self, rule: &Rule) -> Option<Duration> {
        let ms = self
            .against
            .filter(|_| matches!(rule, Rule::Forecast { .. }))?;
        Duration::try_from_secs_f64(ms / 1e3).ok()
    }

    /// How much longer a forecast must look before it can say something.
    pub(super) fn learns_for(&self, rule: &Rule) -> Option<Duration> {
        let Rule::Forecast { over, .. } = rule else {
            return None;
        };
        let covered = self
            .trend
            .as_ref()
            .map_or(Duration::ZERO, |trend| trend.covers(self.last_at));
        (over.checked_div(2)?)
            .checked_sub(covered)
            .filter(|left| !left.is_zero())
    }

    /// The value for each unit of load over the span; none while there is too little load.
    fn per_load(
        &mut self,
        threshold: &Threshold,
        stale: Duration,
        value: f64,
        load: f64,
        at: Ticks,
    ) -> Option<f64> {
        let Measure::PerLoad {
            load: metric,
            at_least,
            over,
        } = threshold.measure
        else {
            return None;
        };
        if !value.is_finite() || !load.is_finite() {
            return Some(f64::NAN);
        }
        let since = at.saturating_sub(self.last_at);
        let (events, loads) = (
            Unit::Events == threshold.metric.unit,
            metric.unit == Unit::Events,
        );
        // A rate is events of the time since the sample before, where that is known.
        let amount = match (events, metric.unit) {
            (true, Unit::PerSecond) if u128::from(since) > stale.as_millis() => return None,
            (true, Unit::PerSecond) => load * since as f64 / 1000.0,
            _ => load,
        };
        let window = self.load.get_or_insert_default();
        window.add_load(over, at, since, value, amount);
        let (value, amount, samples) = window.sums();
        let mean = match (events, loads) {
            (_, true) => amount,
            (true, false) if metric.unit == Unit::PerSecond => {
                amount * 1000.0 / window.lasts(at).as_millis().max(1) as f64
            }
            _ => amount / samples,
        };
        if amount <= 0.0 || mean < at_least {
            self.idles(over, stale, at);
            return None;
        }
        self.against = Some(mean);
        let ratio = value / amount;
        Some(if threshold.unit == Unit::Percent {
            100.0 * ratio
        } else {
            ratio
        })
    }

    /// There is too little load to judge. That it failed is over when so it has been for the whole span: what does
    /// nothing is judged no worse for what it did before.
    fn idles(&mut self, over: Duration, stale: Duration, at: Ticks) {
        if !self.is_fresh(at, stale) {
            self.idle_since = None;
        }
        let since = *self.idle_since.get_or_insert(at);
        if self.failed && u128::from(at - since) >= over.as_millis() {
            self.failed = false;
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

    /// Whether it neither fails nor is on the way there.
    pub(super) fn is_well(&self) -> bool {
        !self.failed && self.window.is_empty()
    }

    /// Whether the last sample is recent enough to say something about now.
    pub(super) fn is_fresh(&self, now: Ticks, stale: Duration) -> bool {
        u128::from(now.saturating_sub(self.last_at)) <= stale.as_millis()
    }
}
