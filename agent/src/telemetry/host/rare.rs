//! Dear sources: read now and then, their values repeated in between.

use super::{HostReading, Look, Value};
use crate::model::metric::{Metric, Unit};
use nix::time::{ClockId, clock_gettime};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

/// A source that may be read as often as its cost allows takes one part of so many of a core at most: 0.05 %.
const OF_A_CORE: u32 = 2_000;
/// And the sweep waits for it for one part of so many of the time: what asks a slow bus uses no CPU.
const OF_THE_TIME: u32 = 100;

/// When a family is read anew.
#[derive(Clone, Copy)]
enum Period {
    /// So often, whatever it costs.
    Fixed(Duration),
    /// As often as [`OF_A_CORE`] and [`OF_THE_TIME`] allow, and at least so often.
    ByCost(Duration),
}

/// A family that is read at most once in a period, but for its second reading: what is counted has a value
/// only then, and nobody should wait a period for the first one.
///
/// Levels are repeated until the next reading, and vanish with a reading that lacks them; events count
/// once.
pub struct Rare<T> {
    family: T,
    period: Period,
    /// Least time between two readings for what the last two of them cost: one alone may have been disturbed.
    costs: [Duration; 2],
    announced: bool,
    read_at: Option<Duration>,
    readings: u32,
    values: Vec<Value>,
    absent: BTreeMap<&'static str, String>,
}

impl<T: Default> Rare<T> {
    pub fn every(every: Duration) -> Self {
        Self::of(T::default(), every)
    }

    /// One that is read as often as its cost allows, and at least every `longest`.
    pub fn by_cost(longest: Duration) -> Self {
        Self {
            period: Period::ByCost(longest),
            ..Self::every(longest)
        }
    }
}

impl<T> Rare<T> {
    pub fn of(family: T, every: Duration) -> Self {
        Self {
            family,
            period: Period::Fixed(every),
            costs: [Duration::ZERO; 2],
            announced: false,
            read_at: None,
            readings: 0,
            values: Vec::new(),
            absent: BTreeMap::new(),
        }
    }

    pub fn family(&mut self) -> &mut T {
        &mut self.family
    }

    pub fn set_every(&mut self, every: Duration) {
        self.period = Period::Fixed(every);
    }

    /// Takes in that what the family tells has changed: its next reading is a new one.
    pub fn announce(&mut self) {
        self.announced = true;
    }

    fn is_due(&self, elapsed: Option<Duration>) -> bool {
        let period = match self.period {
            Period::Fixed(every) => every,
            Period::ByCost(longest) => self.costs[0].min(self.costs[1]).min(longest),
        };
        self.announced || self.readings < 2 || elapsed.is_none_or(|elapsed| elapsed >= period)
    }

    /// Adds the family's values to `reading`, read anew when that is due at `now`.
    pub fn read(
        &mut self,
        root: &Path,
        now: Duration,
        reading: &mut HostReading,
        read: impl FnOnce(&mut T, Look, &mut HostReading),
    ) {
        let elapsed = self.read_at.map(|before| now.saturating_sub(before));
        if self.is_due(elapsed) {
            self.announced = false;
            self.readings = self.readings.saturating_add(1);
            let mut fresh = HostReading::default();
            let elapsed = elapsed.unwrap_or_default();
            let began = (Instant::now(), cpu_time());
            read(&mut self.family, Look { root, elapsed }, &mut fresh);
            let used = cpu_time().saturating_sub(began.1) * OF_A_CORE;
            let waited = began.0.elapsed() * OF_THE_TIME;
            self.costs = [self.costs[1], used.max(waited)];
            self.read_at = Some(now);
            reading.values.extend(fresh.values.iter().cloned());
            self.values = fresh.values;
            self.absent = fresh.absent;
            for (name, _, value) in &mut self.values {
                if Metric::named(name).is_some_and(|metric| metric.unit == Unit::Events) {
                    *value = 0.0;
                }
            }
        } else {
            reading.values.extend(self.values.iter().cloned());
        }
        for (metric, why) in &self.absent {
            reading.absent(&[metric], why);
        }
    }
}

/// What this thread has used of a core.
fn cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_repeated_between_readings_and_events_count_once() {
        let mut rare = Rare::<u32>::every(Duration::from_secs(10));
        let mut read = |second| {
            let mut reading = HostReading::default();
            let family = |times: &mut u32, _: Look, reading: &mut HostReading| {
                *times += 1;
                reading.device("memory.ecc_corrected", 5.0);
                reading.device("cpu.temperature", f64::from(*times));
            };
            let now = Duration::from_secs(second);
            rare.read(Path::new("/"), now, &mut reading, family);
            reading
                .values
                .iter()
                .map(|value| value.2)
                .collect::<Vec<f64>>()
        };
        assert_eq!(read(1), [5.0, 1.0]);
        assert_eq!(read(2), [5.0, 2.0], "the second is not waited for");
        assert_eq!(read(3), [0.0, 2.0]);
        assert_eq!(read(11), [0.0, 2.0]);
        assert_eq!(read(12), [5.0, 3.0]);
    }

    /// At which of so many seconds a family was read that takes so long of a core.
    fn read_at(takes: Duration, announced: Option<u64>) -> Vec<u64> {
        let mut rare = Rare::<Vec<u64>>::by_cost(Duration::from_secs(10));
        for second in 1..=24 {
            if announced == Some(second) {
                rare.announce();
            }
            let family = |at: &mut Vec<u64>, _: Look, _: &mut HostReading| {
                at.push(second);
                let until = cpu_time() + takes;
                while cpu_time() < until {}
            };
            let now = Duration::from_secs(second);
            rare.read(Path::new("/"), now, &mut HostReading::default(), family);
        }
        rare.family
    }

    #[test]
    fn a_source_is_read_as_often_as_its_cost_allows_and_at_once_when_it_announces() {
        let cheap = read_at(Duration::ZERO, None);
        assert_eq!(cheap, (1..=24).collect::<Vec<u64>>());
        assert_eq!(read_at(Duration::from_millis(20), None), [1, 2, 12, 22]);
        let announced = read_at(Duration::from_millis(20), Some(5));
        assert_eq!(announced, [1, 2, 5, 15]);
    }
}
