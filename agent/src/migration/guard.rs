//! The foreground guard: how fast a copy may read while the workload on its source loses at most its share.
//!
//! What the workload loses is told by the time its block requests take and by the time its tasks wait for a
//! CPU, against what they were while the copy read at its least rate (or not at all). A disk's requests a
//! second fall as their latency rises, so `1 − alone ÷ now` of the latency is lost; of the CPU, the part of its
//! time that it waits. Invariants: never slower than the guaranteed minimum; a workload that does nothing slows
//! nothing. Pure: one step for each sweep of the senses. Non-goals: keeping the rate (transfer).

/// What the workload met with in one sweep.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Felt {
    /// Mean time of its block requests, ns; none when it made too few to tell.
    pub block_ns: Option<f64>,
    /// Share of its time in which it waited for a CPU, 0–1; none when it hardly ran or that is not watched.
    pub waiting: Option<f64>,
}

impl Felt {
    fn is_active(&self) -> bool {
        self.block_ns.is_some() || self.waiting.is_some()
    }
}

/// What an operator allows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Allowed {
    /// Most that the workload may lose, 0–1.
    pub loss: f64,
    /// Bytes a second that the copy may always read.
    pub minimum: u64,
}

/// Sweeps at the least rate that tell what the workload gets alone; the first is still under the copy's queue.
const PROBE: u32 = 3;
/// Sweeps from one probe to the next.
const BETWEEN: u32 = 60;
/// Sweeps without activity after which nothing is guarded.
const QUIET: u32 = 5;
/// Weight of the newest sweep in what is smoothed.
const NEWEST: f64 = 0.5;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Mode {
    /// The workload does nothing.
    Idle,
    /// The copy reads at its least rate; so many sweeps of it are over.
    Probe(u32),
    /// The copy reads at `rate`; so many sweeps since the last probe.
    Run { rate: u64, since: u32 },
}

/// The controller of one plan.
#[derive(Debug)]
pub struct Guard {
    allowed: Allowed,
    mode: Mode,
    alone: Felt,
    now: Felt,
    quiet: u32,
    /// The rate from which the next run begins.
    last: u64,
}

impl Guard {
    /// A guard that knows nothing of the workload yet.
    #[must_use]
    pub fn new(allowed: Allowed) -> Self {
        Self {
            allowed,
            mode: Mode::Idle,
            alone: Felt::default(),
            now: Felt::default(),
            quiet: 0,
            last: allowed.minimum,
        }
    }

    /// Takes note of a sweep in which nothing was copied.
    pub fn rest(&mut self, felt: Felt) {
        self.alone = Felt {
            block_ns: smooth(self.alone.block_ns, felt.block_ns),
            waiting: smooth(self.alone.waiting, felt.waiting),
        };
        self.now = self.alone;
        if felt.is_active() {
            self.mode = Mode::Run {
                rate: self.last,
                since: 0,
            };
        }
    }

    /// Share that the workload loses as far as is known, 0–1.
    #[must_use]
    pub fn loss(&self) -> f64 {
        let block = match (self.alone.block_ns, self.now.block_ns) {
            (Some(alone), Some(now)) if now > alone => 1.0 - alone / now,
            _ => 0.0,
        };
        let waiting = match (self.alone.waiting, self.now.waiting) {
            (alone, Some(now)) => now - alone.unwrap_or(0.0),
            _ => 0.0,
        };
        block.max(waiting).clamp(0.0, 1.0)
    }

    /// Bytes a second that the copy may read until the next sweep, none for no limit; `read` is what it read
    /// a second since the last one.
    pub fn step(&mut self, felt: Felt, read: u64) -> Option<u64> {
        self.quiet = if felt.is_active() { 0 } else { self.quiet + 1 };
        self.now = Felt {
            block_ns: smooth(self.now.block_ns, felt.block_ns),
            waiting: smooth(self.now.waiting, felt.waiting),
        };
        let Allowed { loss, minimum } = self.allowed;
        self.mode = match self.mode {
            _ if self.quiet >= QUIET => Mode::Idle,
            Mode::Idle if felt.is_active() => Mode::Probe(0),
            Mode::Idle => Mode::Idle,
            Mode::Probe(0) => Mode::Probe(1),
            Mode::Probe(1) => {
                self.alone = felt;
                Mode::Probe(2)
            }
            Mode::Probe(done) if done < PROBE => {
                self.alone = Felt {
                    block_ns: smooth(self.alone.block_ns, felt.block_ns),
                    waiting: smooth(self.alone.waiting, felt.waiting),
                };
                self.now = self.alone;
                match done + 1 {
                    PROBE => Mode::Run {
                        rate: self.last,
                        since: 0,
                    },
                    done => Mode::Probe(done),
                }
            }
            Mode::Probe(_) => Mode::Probe(0),
            Mode::Run {
                since: BETWEEN.., ..
            } => Mode::Probe(0),
            Mode::Run { rate, since } => {
                let lost = self.loss();
                let rate = if lost > loss {
                    // What a rate beyond what the copy reads would allow is no limit at all.
                    (rate.min(read.max(minimum)) as f64 * (loss / lost).clamp(0.5, 0.9)) as u64
                } else if lost < loss * 0.8 && read >= rate / 2 {
                    rate.saturating_mul(2)
                } else {
                    rate
                };
                let rate = rate.max(minimum);
                self.last = rate;
                Mode::Run {
                    rate,
                    since: since + 1,
                }
            }
        };
        self.limit()
    }

    fn limit(&self) -> Option<u64> {
        match self.mode {
            Mode::Idle => None,
            Mode::Probe(_) => Some(self.allowed.minimum),
            Mode::Run { rate, .. } => Some(rate),
        }
    }
}

fn smooth(old: Option<f64>, new: Option<f64>) -> Option<f64> {
    match (old, new) {
        (Some(old), Some(new)) => Some(old + NEWEST * (new - old)),
        (old, new) => new.or(old),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const ALLOWED: Allowed = Allowed {
        loss: 0.25,
        minimum: 8 * MIB,
    };
    const CAPACITY: f64 = 400.0 * MIB as f64;

    /// A disk on which latency grows as its capacity is used up.
    fn disk(copy: u64, base_ns: f64) -> Felt {
        let used = (copy as f64 / CAPACITY).min(0.95);
        Felt {
            block_ns: Some(base_ns / (1.0 - used)),
            waiting: Some(0.01),
        }
    }

    fn begun(before: Felt) -> Guard {
        let mut guard = Guard::new(ALLOWED);
        guard.rest(before);
        guard
    }

    fn settle(guard: &mut Guard, steps: usize, felt: impl Fn(u64) -> Felt) -> Vec<u64> {
        let mut reads = Vec::new();
        let mut read = ALLOWED.minimum;
        for _ in 0..steps {
            let limit = guard.step(felt(read), read);
            read = limit.unwrap_or(u64::MAX).min(CAPACITY as u64);
            reads.push(read);
        }
        reads
    }

    #[test]
    fn a_workload_on_the_same_disk_loses_about_its_share_and_the_copy_gets_the_rest() {
        let mut guard = begun(disk(0, 100_000.0));
        let reads = settle(&mut guard, 300, |read| disk(read, 100_000.0));
        let late: Vec<f64> = reads[60..].iter().map(|&read| read as f64).collect();
        let mean = late.iter().sum::<f64>() / late.len() as f64;
        // A quarter is lost at a quarter of the capacity.
        assert!(
            (0.15..0.35).contains(&(mean / CAPACITY)),
            "{}",
            mean / CAPACITY
        );
        let over = late.iter().filter(|read| **read > 0.5 * CAPACITY).count();
        assert!(over * 10 < late.len(), "{over} of {}", late.len());
    }

    #[test]
    fn a_workload_that_does_nothing_slows_nothing() {
        let mut guard = begun(Felt::default());
        for _ in 0..10 {
            assert_eq!(guard.step(Felt::default(), MIB), None);
        }
        assert_eq!(guard.step(disk(0, 1e5), MIB), Some(ALLOWED.minimum));
        for _ in 0..QUIET {
            guard.step(Felt::default(), MIB);
        }
        assert_eq!(guard.step(Felt::default(), MIB), None);
    }

    #[test]
    fn the_guaranteed_minimum_holds_however_much_is_lost() {
        let mut guard = begun(disk(0, 1e5));
        for _ in 0..200 {
            let worse = Felt {
                block_ns: Some(1e9),
                waiting: Some(0.9),
            };
            assert!(guard.step(worse, 4 * MIB) >= Some(ALLOWED.minimum));
        }
    }

    #[test]
    fn a_disk_that_is_slow_for_the_workload_alone_is_not_blamed_on_the_copy_for_long() {
        let mut guard = begun(disk(0, 1e5));
        settle(&mut guard, 30, |read| disk(read, 1e5));
        let reads = settle(&mut guard, 200, |read| disk(read, 2e6));
        let late = &reads[100..];
        let mean = late.iter().sum::<u64>() as f64 / late.len() as f64;
        assert!(mean > 0.12 * CAPACITY, "{}", mean / CAPACITY);
    }

    #[test]
    fn tasks_that_wait_for_a_cpu_slow_the_copy_as_requests_that_wait_for_the_disk_do() {
        let felt = |copy: u64| Felt {
            block_ns: None,
            waiting: Some(copy as f64 / CAPACITY),
        };
        let mut guard = begun(felt(0));
        let reads = settle(&mut guard, 200, felt);
        let late = &reads[60..];
        let mean = late.iter().sum::<u64>() as f64 / late.len() as f64;
        assert!(
            (0.12..0.35).contains(&(mean / CAPACITY)),
            "{}",
            mean / CAPACITY
        );
    }
}
