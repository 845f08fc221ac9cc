//! When the scheduler programs are attached: always on a calm host, in windows on one that switches tasks so
//! often that they would slow it down. Pure.
//!
//! Invariant: what they see, and so what they cost, is bounded by [`BUDGET`] whatever the host does; a burst is
//! seen whole for at most [`LOOK_EVERY`] and the window that it falls into.

use std::time::Duration;

/// Switches a second that the programs may see. At 250 ns for a switch and the wake-up before it, that is 0.75 %
/// of a core.
pub const BUDGET: f64 = 30_000.0;

/// Beyond this much of the budget the programs are detached, so that a host near it does not go to and fro.
const HEADROOM: f64 = 1.25;

/// Shortest window: longer waits than this are seen only as that long.
const SHORTEST: Duration = Duration::from_millis(200);

/// Longest time from one window to the next, which a policy may have to wait for a value.
const LONGEST_TURN: Duration = Duration::from_secs(10);

/// Between two looks at the number of switches while the programs are attached.
pub const LOOK_EVERY: Duration = Duration::from_millis(100);

/// A window, and the time from its end to the end of the next one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Turn {
    /// How long the programs are attached.
    pub window: Duration,
    /// From one end to the next.
    pub every: Duration,
}

/// Whether the programs are attached, and what was seen.
#[derive(Debug, Default)]
pub struct Sampling {
    /// None while they are always attached.
    turn: Option<Turn>,
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
    /// Leave them detached.
    Rest,
    /// Attach them for this long at the end.
    Window(Duration),
}

impl Sampling {
    /// What to do in the `rest` until the next sweep.
    #[must_use]
    pub fn next(&self, rest: Duration) -> Next {
        let Some(turn) = self.turn else {
            return Next::Always;
        };
        // Half a window early is nearer than a whole sweep late.
        if self.detached + rest + SHORTEST / 2 < turn.every {
            return Next::Rest;
        }
        Next::Window(turn.window.min(rest))
    }

    /// Takes in `switches` that were seen in `time`; true when the programs may stay attached.
    pub fn look(&mut self, switches: u64, time: Duration) -> bool {
        let rate = switches as f64 / time.as_secs_f64().max(f64::MIN_POSITIVE);
        let limit = if self.turn.is_none() {
            BUDGET * HEADROOM
        } else {
            BUDGET
        };
        self.turn = (rate > limit).then(|| turn(rate));
        self.turn.is_none()
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
        self.share = (!self.detached.is_zero() || self.turn.is_some()).then_some(share);
        (self.attached, self.detached) = (Duration::ZERO, Duration::ZERO);
        true
    }

    /// Share of the time in which the programs were attached, 0–100; none when always.
    #[must_use]
    pub fn percent(&self) -> Option<f64> {
        self.share.map(|share| share * 100.0)
    }
}

fn turn(rate: f64) -> Turn {
    let share = BUDGET / rate;
    let window = SHORTEST.max(Duration::from_secs(1).mul_f64(share));
    Turn {
        window,
        every: window.div_f64(share).min(LONGEST_TURN),
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
            Next::Rest => Duration::ZERO,
            Next::Window(window) => window,
        };
        sampling.passed(false, SECOND - window);
        sampling.passed(true, window);
        if !window.is_zero() {
            sampling.look((rate * window.as_secs_f64()) as u64, window);
        }
        sampling.sweep();
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
        let busy: Vec<Next> = (0..8).map(|_| second(&mut sampling, 600_000.0)).collect();
        let window = Next::Window(SHORTEST);
        let rest = Next::Rest;
        assert_eq!(
            busy,
            [rest, rest, rest, window, rest, rest, rest, window],
            "5 % of the time"
        );
        assert_eq!(sampling.percent(), Some(5.0));
        let calm: Vec<Next> = (0..5).map(|_| second(&mut sampling, 100.0)).collect();
        assert_eq!(calm, [rest, rest, rest, window, Next::Always]);
        assert_eq!(sampling.percent(), None);
    }

    #[test]
    fn a_host_somewhat_beyond_the_budget_is_watched_in_every_second() {
        let mut sampling = Sampling::default();
        second(&mut sampling, 2.0 * BUDGET);
        for _ in 0..3 {
            assert_eq!(
                second(&mut sampling, 2.0 * BUDGET),
                Next::Window(SECOND / 2)
            );
        }
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
                    Next::Rest => {}
                    Next::Window(window) => seen += rate * window.as_secs_f64(),
                }
            }
            let of_longest = rate * SHORTEST.as_secs_f64() / LONGEST_TURN.as_secs_f64();
            prop_assert!(seen / 60.0 <= BUDGET.max(of_longest) * HEADROOM + 1.0, "{}", seen / 60.0);
        }
    }
}
