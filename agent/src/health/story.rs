//! What a failure is, in a person's words.

use super::policy::{Among, Limit, Measure, Rule, Threshold};
use super::quantity::in_unit;
use super::series::Series;
use crate::model::units::human_duration;
use std::time::Duration;

/// The parts of a sentence about a failing series.
pub(super) struct Story {
    /// The limit, in the threshold's unit.
    pub limit: f64,
    /// The value and the limit that it passed.
    pub passed: String,
    /// What would end it.
    pub clears_when: String,
}

pub(super) fn story(threshold: &Threshold, series: &Series) -> Story {
    let mut story = by_rule(threshold, series);
    if let Measure::PerLoad {
        load,
        at_least,
        over,
    } = threshold.measure
    {
        let little = if at_least > 0.0 {
            format!("less than {}", in_unit(at_least, load.unit))
        } else {
            "none".to_owned()
        };
        story.clears_when += &format!(
            ", or after {} with {little} of {}",
            human_duration(over),
            load.name
        );
    }
    story
}

fn by_rule(threshold: &Threshold, series: &Series) -> Story {
    let show = |value| in_unit(value, threshold.unit);
    let at = |limit: Limit| show(limit.at(series.against));
    let value = format!("{}{}", show(series.value), beside(threshold, series));
    let own = |limit: Limit| own(threshold, series, limit);
    match threshold.rule {
        Rule::Above {
            enter,
            clear,
            rising,
        } => {
            let limit = enter.at(series.against);
            let is = still(series.value > limit);
            let rising = if rising { " and was rising" } else { "" };
            Story {
                limit,
                passed: format!("{value}{is} above {}{}{rising}", at(enter), own(enter)),
                clears_when: format!("{} or less", at(clear)),
            }
        }
        Rule::Below { enter, clear } => {
            let limit = enter.at(series.against);
            let is = still(series.value < limit);
            Story {
                limit,
                passed: format!("{value}{is} below {}{}", at(enter), own(enter)),
                clears_when: format!("{} or more", at(clear)),
            }
        }
        Rule::Count { at_least, within } => {
            let within = human_duration(within);
            Story {
                limit: at_least as f64,
                passed: format!("{value} within {within}, at least {at_least}"),
                clears_when: format!("fewer than {at_least} within {within}"),
            }
        }
        Rule::Forecast {
            reaches,
            falling,
            within,
            clear,
            ..
        } => {
            let aim = if reaches.of_device {
                "the part's own limit".to_owned()
            } else {
                show(reaches.number)
            };
            let reached = match series.against {
                Some(ms) if ms > 0.0 => {
                    let verb = if falling { "falls to" } else { "reaches" };
                    let left = human_duration(Duration::from_millis(ms as u64));
                    let is = still(ms <= within.as_millis() as f64);
                    format!(
                        "{verb} {aim} in {left} at this rate{is} within {}",
                        human_duration(within)
                    )
                }
                Some(_) => format!("has reached {aim}"),
                None => format!("was on its way to {aim}"),
            };
            Story {
                limit: reaches.number,
                passed: format!("{value} and {reached}"),
                clears_when: format!("a rate that takes more than {}", human_duration(clear)),
            }
        }
    }
}

/// A failure lasts until it clears, so that its value need not be beyond the limit any more.
fn still(beyond: bool) -> &'static str {
    if beyond { "," } else { ", and was" }
}

/// What the value was divided by.
fn beside(threshold: &Threshold, series: &Series) -> String {
    let Some(against) = series.against else {
        return String::new();
    };
    match threshold.measure {
        Measure::Value => String::new(),
        Measure::PerLoad { load, over, .. } => format!(
            " for each {} ({} over {})",
            load.name,
            in_unit(against, load.unit),
            human_duration(over)
        ),
        Measure::ToPeers { among, .. } => {
            let who = match among {
                Among::Host => "its peers",
                Among::Fleet => "the fleet",
            };
            let median = in_unit(against, threshold.metric.unit);
            format!(" the median of {who} ({median})")
        }
    }
}

fn own(threshold: &Threshold, series: &Series, limit: Limit) -> String {
    match series.against.filter(|_| limit.of_device) {
        Some(own) => format!(" (its own limit is {})", in_unit(own, threshold.unit)),
        None => String::new(),
    }
}
