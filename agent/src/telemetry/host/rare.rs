//! Dear sources: read now and then, their values repeated in between.

use super::{HostReading, Look, Value};
use crate::model::metric::{Metric, Unit};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

/// A family that is read at most once in a period, but for its second reading: what is counted has a value
/// only then, and nobody should wait a period for the first one.
///
/// Levels are repeated until the next reading, and vanish with a reading that lacks them; events count
/// once.
pub struct Rare<T> {
    family: T,
    every: Duration,
    read_at: Option<Duration>,
    readings: u32,
    values: Vec<Value>,
    absent: BTreeMap<&'static str, String>,
}

impl<T: Default> Rare<T> {
    pub fn every(every: Duration) -> Self {
        Self::of(T::default(), every)
    }
}

impl<T> Rare<T> {
    pub fn of(family: T, every: Duration) -> Self {
        Self {
            family,
            every,
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
        self.every = every;
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
        if self.readings < 2 || elapsed.is_none_or(|elapsed| elapsed >= self.every) {
            self.readings = self.readings.saturating_add(1);
            let mut fresh = HostReading::default();
            let elapsed = elapsed.unwrap_or_default();
            read(&mut self.family, Look { root, elapsed }, &mut fresh);
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
}
