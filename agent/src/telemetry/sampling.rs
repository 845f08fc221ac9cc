//! When the scheduler's program is attached to switches: always on a calm host, in a window of every sweep on one that
//! switches tasks so often that it would slow it down. Pure.
//!
//! Invariants: what it sees, and so what it costs, is bounded by [`BUDGET`] whatever the host does; every sweep has a
//! window, so that no verdict is later than on a calm host; a burst is seen whole for at most [`LOOK_EVERY`] and the
//! window that it falls into. A wait that ends in a window counts from its beginning, or from when its task was moved to
//! another CPU before the window.

use std::time::Duration;

/// Switches a second that it may see. At 150 ns each, that is 0.45 % of a core.
pub const BUDGET: f64 = 30_000.0;

/// Beyond this much of the budget it is detached, so that a host near it does not go to and fro.
const HEADROOM: f64 = 1.25;

/// Shortest window.
const SHORTEST: Duration = Duration::from_millis(20);

/// Between two looks at the number of switches while it is attached.
pub const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Whether it is attached, and what was seen.
#[derive(Debug, Default)]
pub struct Sampling {
    /// Of each sweep; none while it is always attached.
    window: Option<Duration>,
    /// How long it was attached since the last look, and how long it was not.
    attached: Duration,
    detached: Duration,
    /// Share of the time attached at the last look that found any.
    share: Option<f64>,
}

/// What to do until the next sweep.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Next {
    /// Leave it attached.
    Always,
    /// Attach it for this long at the end.
    Window(Duration),
}

impl Sampling {
    /// What to do in the `rest` until the next sweep.
    #[must_use]
    pub fn next(&self, rest: Duration) -> Next {
        let Some(window) = self.window else {
            return Next::Always;
        };
        Next::Window(window.min(rest))
    }

    /// Takes in `switches` that were seen in `time`; true when it may stay attached.
    pub fn look(&mut self, switches: u64, time: Duration) -> bool {
        let rate = switches as f64 / time.as_secs_f64().max(f64::MIN_POSITIVE);
        let limit = if self.window.is_none() {
            BUDGET * HEADROOM
        } else {
            BUDGET
        };
        let window = || SHORTEST.max(Duration::from_secs(1).mul_f64(BUDGET / rate));
        self.window = (rate > limit).then(window);
        self.window.is_none()
    }

    /// Time passed, with it attached or not.
    pub fn passed(&mut self, attached: bool, time: Duration) {
        if attached {
            self.attached += time;
        } else {
            self.detached += time;
        }
    }

    /// Begins a sweep: true when it was attached since the sweep before that saw it so.
    pub fn sweep(&mut self) -> bool {
        if self.attached.is_zero() {
            return false;
        }
        let whole = self.attached + self.detached;
        let share = self.attached.as_secs_f64() / whole.as_secs_f64();
        self.share = (!self.detached.is_zero() || self.window.is_some()).then_some(share);
        (self.attached, self.detached) = (Duration::ZERO, Duration::ZERO);
        true
    }

    /// Share of the time in which it was attached, 0–100; none when always.
    #[must_use]
    pub fn percent(&self) -> Option<f64> {
        self.share.map(|share| share * 100.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// One second: what was done.
    fn second(sampling: &mut Sampling, rate: f64) -> Next {
        let next = sampling.next(SECOND);
        let window = match next {
            Next::Always => SECOND,
            Next::Window(window) => window,
        };
        sampling.passed(false, SECOND - window);
        sampling.passed(true, window);
        sampling.look((rate * window.as_secs_f64()) as u64, window);
        assert!(sampling.sweep(), "every sweep has something new");
        next
    }

    #[test]
    fn a_calm_host_is_always_watched_and_a_busy_one_in_windows_until_it_is_calm_again() {
        let mut sampling = Sampling::default();
        for _ in 0..5 {
            assert_eq!(second(&mut sampling, 20_000.0), Next::Always);
            assert_eq!(sampling.percent(), None);
        }
        second(&mut sampling, 600_000.0);
        for _ in 0..5 {
            let window = Next::Window(Duration::from_millis(50));
            assert_eq!(second(&mut sampling, 600_000.0), window);
            assert_eq!(sampling.percent(), Some(5.0));
        }
        second(&mut sampling, 100.0);
        assert_eq!(second(&mut sampling, 100.0), Next::Always);
        assert_eq!(sampling.percent(), None);
    }

    #[test]
    fn a_sweep_without_a_window_has_nothing_new() {
        let mut sampling = Sampling::default();
        sampling.passed(true, SECOND);
        sampling.look(1_000_000, SECOND);
        assert!(sampling.sweep());
        sampling.passed(false, SECOND);
        assert!(!sampling.sweep());
    }

    proptest! {
        #[test]
        fn what_is_seen_in_a_minute_stays_within_the_budget(rate in 1e3f64..3e6) {
            let mut sampling = Sampling::default();
            // The first second is a burst.
            second(&mut sampling, rate);
            let mut seen = 0.0;
            for _ in 0..60 {
                match second(&mut sampling, rate) {
                    Next::Always => seen += rate,
                    Next::Window(window) => seen += rate * window.as_secs_f64(),
                }
            }
            let of_shortest = rate * SHORTEST.as_secs_f64();
            prop_assert!(seen / 60.0 <= BUDGET.max(of_shortest) * HEADROOM + 1.0, "{}", seen / 60.0);
        }
    }
}
