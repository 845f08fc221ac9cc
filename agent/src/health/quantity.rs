//! Quantities and spans of time as policies write them, checked against the metric's unit.

use super::policy::Limit;
use crate::model::metric::{Metric, Unit};
use crate::model::units::{Bytes, human_duration};
use std::time::Duration;

/// Reads `20s`, `10m`, `1h30m`.
///
/// # Errors
/// What would be right.
pub fn span(text: &str) -> Result<Duration, String> {
    let wrong = || {
        format!(
            "`{text}` is not a span of time: write a whole number with ms, s, m, h or d, for instance 20s, 10m or 1h30m"
        )
    };
    let mut rest = text.trim();
    let mut total = Duration::ZERO;
    if rest.is_empty() {
        return Err(wrong());
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let letters = rest[digits..]
            .find(|c: char| c.is_ascii_digit())
            .map_or(rest.len(), |length| digits + length);
        let number: u64 = rest[..digits].parse().map_err(|_| wrong())?;
        let unit_ms = match &rest[digits..letters] {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(wrong()),
        };
        let part = number
            .checked_mul(unit_ms)
            .filter(|ms| *ms <= 366 * 86_400_000)
            .ok_or_else(|| format!("`{text}` is too long: at most 366d"))?;
        total += Duration::from_millis(part);
        rest = &rest[letters..];
    }
    Ok(total)
}

/// Reads a quantity in `unit` and returns it in the metric's unit.
///
/// # Errors
/// What would be right.
pub(super) fn quantity(text: &str, unit: Unit) -> Result<f64, String> {
    within(text, unit, most(unit))
}

/// The same, at most as much as `most`, which is also told in words.
fn within(text: &str, unit: Unit, (most, shown): (f64, &str)) -> Result<f64, String> {
    let text = text.trim();
    let (known, example) = units(unit);
    let wrong = || format!("`{text}` does not fit this metric's unit: write {example}");
    let end = text
        .find(|c: char| !(c.is_ascii_digit() || c == '.' || c == '-'))
        .unwrap_or(text.len());
    let number: f64 = text[..end].parse().map_err(|_| wrong())?;
    let suffix = text[end..].trim_start();
    let factor = known
        .iter()
        .find_map(|(name, factor)| (*name == suffix).then_some(*factor))
        .ok_or_else(wrong)?;
    if number < 0.0 && unit != Unit::Celsius {
        return Err(format!("`{text}` is negative: write {example}"));
    }
    if unit == Unit::Percent && number > 100.0 && most <= 100.0 {
        return Err(format!(
            "`{text}` is more than 100%, which is never reached"
        ));
    }
    let value = number * factor;
    // What is a share may be all of it.
    if value > most || (value == most && unit != Unit::Percent) {
        return Err(format!(
            "`{text}` is beyond anything there is: write less than {shown}"
        ));
    }
    Ok(value)
}

/// The most of a share that may pass the whole.
const RATIO: (f64, &str) = (1e6, "1000000%");

/// The most that a policy may say: what is beyond is a slip of the pen.
fn most(unit: Unit) -> (f64, &'static str) {
    match unit {
        // A drive's age is a time, too: a hundred years.
        Unit::Nanoseconds => (36_525.0 * 8.64e13, "36525d"),
        // The largest number of bytes that a file system or a device tells.
        Unit::Bytes => ((1_u64 << 63) as f64, "8388608TiB"),
        Unit::Celsius => (1e4, "10000C"),
        Unit::Percent => (100.0, "100%"),
        Unit::Count | Unit::Events | Unit::PerSecond | Unit::Times => (1e15, "10^15"),
    }
}

/// Reads bytes a second, such as `20MiB`.
///
/// # Errors
/// What would be right.
pub fn rate(text: &str) -> Result<Bytes, String> {
    let bytes = quantity(text.trim().trim_end_matches("/s"), Unit::Bytes)?;
    if bytes < 1024.0 {
        return Err(format!(
            "`{text}` a second would never end: write a rate such as 20MiB"
        ));
    }
    Ok(Bytes(bytes as u64))
}

/// Reads a value that `metric` may have.
///
/// # Errors
/// What would be right.
pub(super) fn value_of(text: &str, metric: &Metric) -> Result<f64, String> {
    let share = metric.passes_whole();
    within(
        text,
        metric.unit,
        if share { RATIO } else { most(metric.unit) },
    )
}

/// Reads a quantity, or one relative to the part's own limit: `device-limit - 5C`. A share that `passes` the whole
/// may be more than 100%.
///
/// # Errors
/// What would be right.
pub(super) fn limit(text: &str, unit: Unit, passes: bool) -> Result<Limit, String> {
    let Some(rest) = text.trim().strip_prefix("device-limit") else {
        let share = passes && unit == Unit::Percent;
        let most = if share { RATIO } else { most(unit) };
        return within(text, unit, most).map(Limit::of);
    };
    let (sign, rest) = match rest.trim_start() {
        "" => {
            return Ok(Limit {
                number: 0.0,
                of_device: true,
            });
        }
        rest => match (rest.strip_prefix('-'), rest.strip_prefix('+')) {
            (Some(rest), _) => (-1.0, rest),
            (_, Some(rest)) => (1.0, rest),
            _ => {
                return Err(format!(
                    "`{text}` is no distance from the part's own limit: write for instance device-limit - 5C"
                ));
            }
        },
    };
    Ok(Limit {
        number: sign * quantity(rest, unit)?,
        of_device: true,
    })
}

/// How a unit is written: suffixes with their factors, and an example for messages.
fn units(unit: Unit) -> (&'static [(&'static str, f64)], &'static str) {
    let (known, example): (&[(&str, f64)], &str) = match unit {
        Unit::Nanoseconds => (
            &[
                ("ns", 1.0),
                ("us", 1e3),
                ("µs", 1e3),
                ("ms", 1e6),
                ("s", 1e9),
                ("m", 6e10),
                ("h", 3.6e12),
                ("d", 8.64e13),
            ],
            "a time such as 40ms (ns, us, ms, s, m, h, d)",
        ),
        Unit::Bytes => (
            &[
                ("B", 1.0),
                ("KiB", 1024.0),
                ("MiB", 1_048_576.0),
                ("GiB", 1_073_741_824.0),
                ("TiB", 1_099_511_627_776.0),
            ],
            "a size such as 3GiB (B, KiB, MiB, GiB, TiB)",
        ),
        Unit::Percent => (&[("%", 1.0)], "a percentage such as 85%"),
        Unit::Celsius => (&[("C", 1.0), ("°C", 1.0)], "a temperature such as 85C"),
        Unit::Count | Unit::Events => (&[("", 1.0)], "a plain number such as 2"),
        Unit::PerSecond => (&[("", 1.0), ("/s", 1.0)], "a number a second such as 120"),
        Unit::Times => (&[("x", 1.0)], "a multiple such as 3x"),
    };
    (known, example)
}

/// A value of a metric as a person writes it.
#[must_use]
pub fn in_unit(value: f64, unit: Unit) -> String {
    // Latencies under 2 s are told in the unit that policies use for them.
    let short = |value: f64| {
        let text = format!("{value:.1}");
        text.strip_suffix(".0").map_or(text.clone(), str::to_owned)
    };
    match unit {
        Unit::Nanoseconds if value < 1e3 => format!("{value:.0} ns"),
        Unit::Nanoseconds if value < 1e6 => format!("{} µs", short(value / 1e3)),
        Unit::Nanoseconds if value < 2e9 => format!("{} ms", short(value / 1e6)),
        Unit::Nanoseconds => human_duration(Duration::from_nanos(value as u64)),
        Unit::Bytes => Bytes(value.max(0.0) as u64).to_string(),
        Unit::Percent => format!("{} %", short(value)),
        Unit::Celsius => format!("{} °C", short(value)),
        Unit::Count | Unit::Events => short(value),
        Unit::PerSecond => format!("{}/s", short(value)),
        Unit::Times => format!("{}x", short(value)),
    }
}
