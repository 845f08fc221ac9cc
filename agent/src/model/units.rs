//! Quantities with their units in the type.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign};

/// A quantity of data.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
        if self.0 < 1024 {
            return f.pad(&format!("{} B", self.0));
        }
        let mut value = self.0 as f64 / 1024.0;
        let mut unit = 0;
        while value >= 1024.0 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        f.pad(&format!("{value:.1} {}", UNITS[unit]))
    }
}

impl Add for Bytes {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        // Files of nothing but holes may be of any length.
        Self(self.0.saturating_add(other.0))
    }
}

impl AddAssign for Bytes {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sum for Bytes {
    fn sum<I: Iterator<Item = Self>>(values: I) -> Self {
        values.fold(Self(0), Self::add)
    }
}

/// A point in time: milliseconds since the Unix epoch, UTC.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct UnixMillis(pub u64);

impl UnixMillis {
    /// Time passed since `earlier`; zero when the clock went back.
    #[must_use]
    pub fn since(self, earlier: Self) -> std::time::Duration {
        std::time::Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

/// A span of time printed as a person would: `850 ms`, `2.4 s`, `3 min 5 s`.
#[must_use]
pub fn human_duration(span: std::time::Duration) -> String {
    let ms = span.as_millis();
    match ms {
        0 => format!("{} µs", span.as_micros()),
        1..1_000 => format!("{ms} ms"),
        1_000..60_000 => format!("{:.1} s", span.as_secs_f64()),
        60_000..3_600_000 => format!("{} min {} s", ms / 60_000, ms % 60_000 / 1_000),
        _ => format!("{} h {} min", ms / 3_600_000, ms % 3_600_000 / 60_000),
    }
}

/// A point in time as `2026-11-22 02:20:05 UTC`.
#[must_use]
pub fn utc(at: UnixMillis) -> String {
    // Days to a date of the Gregorian calendar: Howard Hinnant, "chrono-Compatible Low-Level Date
    // Algorithms", civil_from_days.
    let (days, second) = (at.0 / 86_400_000 + 719_468, at.0 / 1000 % 86_400);
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let shifted = (5 * day + 2) / 153;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    format!(
        "{:04}-{month:02}-{:02} {:02}:{:02}:{:02} UTC",
        year + era * 400 + u64::from(month <= 2),
        day - (153 * shifted + 2) / 5 + 1,
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_told_as_dates() {
        assert_eq!(utc(UnixMillis(0)), "1970-01-01 00:00:00 UTC");
        assert_eq!(utc(UnixMillis(951_782_399_999)), "2000-02-28 23:59:59 UTC");
        assert_eq!(utc(UnixMillis(951_782_400_000)), "2000-02-29 00:00:00 UTC");
        assert_eq!(
            utc(UnixMillis(1_893_456_000_000)),
            "2030-01-01 00:00:00 UTC"
        );
    }

    #[test]
    fn bytes_are_printed_in_binary_units() {
        assert_eq!(Bytes(1023).to_string(), "1023 B");
        assert_eq!(Bytes(1536).to_string(), "1.5 KiB");
        assert_eq!(Bytes(2 << 30).to_string(), "2.0 GiB");
    }
}
