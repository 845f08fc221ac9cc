//! A straight line through the samples of a span, and their sums, in bounded memory.

use super::series::Ticks;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::time::Duration;

/// Groups that a span is kept in: enough for a line, and 2 KiB for each series that needs one.
const GROUPS: u64 = 64;

/// Fewest groups that a line is drawn through.
const FEWEST: usize = 5;

/// Standard errors that a slope must be away from none: about 95 % of flat, noisy signals are not
/// taken for a trend (Student's t for two sides and many samples).
const SIGNIFICANT: f64 = 2.0;

/// Samples of a span.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Trend(VecDeque<Group>);

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Group {
    number: u64,
    /// Time of the first sample; the others are counted from it.
    first: Ticks,
    /// The time until that sample for which it stands.
    #[serde(default)]
    before: Ticks,
    samples: u32,
    after: f64,
    value: f64,
    load: f64,
}

/// A line.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Line {
    /// Where it stands at the last sample.
    pub level: f64,
    /// How much it rises in a millisecond; none when that is no more than noise.
    pub slope: Option<f64>,
}

impl Trend {
    /// Adds a sample and drops what is older than `span`.
    pub(super) fn add(&mut self, span: Duration, at: Ticks, value: f64) {
        self.add_load(span, at, 0, value, 0.0);
    }

    /// Adds a sample that stands for the time of `lasting` until it, with its load.
    pub(super) fn add_load(
        &mut self,
        span: Duration,
        at: Ticks,
        lasting: Ticks,
        value: f64,
        load: f64,
    ) {
        let span = u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
        let number = at / (span / GROUPS).max(1);
        match self.0.back_mut().filter(|last| last.number == number) {
            Some(last) => {
                last.samples += 1;
                last.after += at.saturating_sub(last.first) as f64;
                last.value += value;
                last.load += load;
            }
            None => self.0.push_back(Group {
                number,
                first: at,
                before: lasting,
                samples: 1,
                after: 0.0,
                value,
                load,
            }),
        }
        while self
            .0
            .front()
            .is_some_and(|group| group.first < at.saturating_sub(span))
        {
            self.0.pop_front();
        }
    }

    /// Time between the first sample and `now`.
    pub(super) fn covers(&self, now: Ticks) -> Duration {
        let first = self.0.front().map_or(now, |group| group.first);
        Duration::from_millis(now.saturating_sub(first))
    }

    /// The time that the samples' rates stand for: [`Self::covers`] and that of the first sample.
    pub(super) fn lasts(&self, now: Ticks) -> Duration {
        let before = self.0.front().map_or(0, |group| group.before);
        self.covers(now) + Duration::from_millis(before)
    }

    /// Sum of the values, sum of the loads, and the number of samples.
    pub(super) fn sums(&self) -> (f64, f64, f64) {
        self.0
            .iter()
            .fold((0.0, 0.0, 0.0), |(value, load, samples), group| {
                (
                    value + group.value,
                    load + group.load,
                    samples + f64::from(group.samples),
                )
            })
    }

    /// The line of least squares through the groups' means; none through too few.
    pub(super) fn line(&self, now: Ticks) -> Option<Line> {
        if self.0.len() < FEWEST {
            return None;
        }
        let points: Vec<(f64, f64)> = self
            .0
            .iter()
            .map(|group| {
                let samples = f64::from(group.samples);
                let before = now.saturating_sub(group.first) as f64 - group.after / samples;
                (-before, group.value / samples)
            })
            .collect();
        let n = points.len() as f64;
        let mean = |part: fn(&(f64, f64)) -> f64| points.iter().map(part).sum::<f64>() / n;
        let (x, y) = (mean(|point| point.0), mean(|point| point.1));
        let xx: f64 = points.iter().map(|point| (point.0 - x).powi(2)).sum();
        let xy: f64 = points
            .iter()
            .map(|point| (point.0 - x) * (point.1 - y))
            .sum();
        if xx <= 0.0 {
            return None;
        }
        let slope = xy / xx;
        let level = y - slope * x;
        let squares: f64 = points
            .iter()
            .map(|point| (point.1 - level - slope * point.0).powi(2))
            .sum();
        let error = (squares / (n - 2.0) / xx).sqrt();
        let trend = slope.abs() > SIGNIFICANT * error && slope.abs() > f64::EPSILON * level.abs();
        Some(Line {
            level,
            slope: trend.then_some(slope),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_flat_signal_has_no_slope_and_a_ramp_has_its_own() {
        let (mut flat, mut ramp) = (Trend::default(), Trend::default());
        for second in 0..7200_u64 {
            // Noise that repeats has no trend over whole periods.
            flat.add(HOUR, second * 1000, (second % 7) as f64);
            ramp.add(HOUR, second * 1000, second as f64 + (second % 7) as f64);
        }
        let now = 7_199_000;
        assert_eq!(flat.line(now).unwrap().slope, None);
        let slope = ramp.line(now).unwrap().slope.unwrap();
        assert!((slope - 0.001).abs() < 1e-5, "{slope}");
    }

    proptest! {
        #[test]
        fn memory_is_bounded_and_the_line_of_a_line_is_that_line(
            pauses in prop::collection::vec(1_u64..5000, 20..2000), slope in -10.0_f64..10.0,
        ) {
            let mut trend = Trend::default();
            let mut at = 1_000_000;
            for pause in pauses {
                at += pause;
                trend.add(HOUR, at, slope * at as f64);
            }
            prop_assert!(trend.0.len() <= GROUPS as usize + 2);
            if let Some(line) = trend.line(at) {
                let expected = slope * at as f64;
                prop_assert!((line.level - expected).abs() <= 1e-6 * expected.abs().max(1.0));
            }
        }
    }
}
