//! When the scheduler programs are attached: always on a calm host, in a window of every sweep on one that switches
//! tasks so often that they would slow it down. Pure.
//!
//! Invariants: what they see, and so what they cost, is bounded by [`BUDGET`] whatever the host does, as long as nobody
//! waits for long; every sweep has a window, so that no verdict is later than on a calm host; a burst is seen whole for
//! at most [`LOOK_EVERY`] and the window that it falls into.

use std::time::Duration;

/// Switches a second that the programs may see. At 250 ns for a switch and the wake-up before it, that is 0.75 %
/// of a core.
pub const BUDGET: f64 = 30_000.0;

/// Beyond this much of the budget the programs are detached, so that a host near it does not go to and fro.
const HEADROOM: f64 = 1.25;

/// Shortest window.
const SHORTEST: Duration = Duration::from_millis(20);

/// A window at whose end somebody has waited for half of it goes on for up to so long. With the time between two sweeps
/// it is less than the second that a verdict may be late.
const PROLONGED: Duration = Duration::from_millis(80);

/// When that was too short as well, the next sweep's is this long. Longer waits are seen only as that long.
const LONGEST: Duration = Duration::from_millis(200);

/// Between two looks at the number of switches while the programs are attached.
pub const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Whether the programs are attached, and what was seen.
#[derive(Debug, Default)]
pub struct Sampling {
    /// Of each sweep; none while they are always attached.
    window: Option<Duration>,
    /// Somebody still waited at the end of the window before, however long it became.
    too_short: bool,
    /// How long the programs were attached since the last look, and how long they were not.
    attached: Duration,
    detached: Duration,
    /// Share of the time attached at the last look that found any.
    share: Option<f64>,
}

/// What to do until the next sweep.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Next {
    /// Leave the programs attached.
    Always,
    /// Attach them for this long at the end.
    Window(Duration),
}

impl Sampling {
    /// What to do in the `rest` until the next sweep.
    #[must_use]
    pub fn next(&self, rest: Duration) -> Next {
        let Some(window) = self.window else {
            return Next::Always;
        };
        let wanted = if self.too_short {
            window.max(LONGEST)
        } else {
            window
        };
        Next::Window(wanted.min(rest))
    }

    /// For how much longer a window goes on that is as long as `window` by now and in which somebody has waited for
    /// `waited` and waits still; none when it ends.
    pub fn prolong(&mut self, window: Duration, waited: Duration) -> Option<Duration> {
        self.too_short = waited >= window / 2;
        let more = window.min(PROLONGED.saturating_sub(window));
        (self.too_short && !more.is_zero()).then_some(more)
    }

    /// Takes in `switches` that were seen in `time`; true when the programs may stay attached.
    pub fn look(&mut self, switches: u64, time: Duration) -> bool {
        let rate = switches as f64 / time.as_secs_f64().max(f64::MIN_POSITIVE);
        let limit = if self.window.is_none() {
            BUDGET * HEADROOM
        } else {
            BUDGET
        };
        let window = || SHORTEST.max(Duration::from_secs(1).mul_f64(BUDGET / rate));
        self.window = (rate > limit).then(window);
        self.too_short &= self.window.is_some();
        self.window.is_none()
    }

    /// Time passed, with the programs attached or not.
    pub fn passed(&mut self, attached: bool, time: Duration) {
        if attached {
            self.attached += time;
        } else {
            self.detached += time;
        }
    }

    /// Begins a sweep: true when the programs were attached since the sweep before that saw them so.
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

    /// Share of the time in which the programs were attached, 0–100; none when always.
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

    /// One second: what was done, and whether the programs are attached after it.
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
    fn a_window_goes_on_while_somebody_waits_and_the_next_is_longer_when_that_was_too_short() {
        let mut sampling = Sampling::default();
        second(&mut sampling, 600_000.0);
        let ms = Duration::from_millis;
        assert_eq!(sampling.prolong(ms(50), ms(10)), None);
        assert_eq!(sampling.next(SECOND), Next::Window(ms(50)));
        assert_eq!(sampling.prolong(ms(50), ms(25)), Some(ms(30)));
        assert_eq!(sampling.prolong(ms(80), ms(55)), None);
        assert_eq!(sampling.next(SECOND), Next::Window(LONGEST));
        assert_eq!(sampling.prolong(LONGEST, ms(150)), None);
        assert_eq!(sampling.next(SECOND), Next::Window(LONGEST));
        assert_eq!(sampling.prolong(LONGEST, ms(90)), None);
        assert_eq!(sampling.next(SECOND), Next::Window(ms(50)));
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
