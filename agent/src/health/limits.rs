//! The meaning of a threshold in the policy file, each mistake with its place.

use super::file::Check;
use super::form::{FileCount, FileForecast, FileLoad, FilePeers, FileThreshold, Scalar};
use super::policy::{Among, Limit, Measure, Rule, Threshold};
use super::quantity::{limit, quantity, span};
use crate::model::locate::Field;
use crate::model::metric::{METRICS, Metric, Per, Unit};
use crate::model::nearest::hint;
use std::time::Duration;

/// Span over which a value and its load are taken: long enough that single sweeps do not decide.
const LOAD_SPAN: Duration = Duration::from_secs(60);

/// Fewest peers: with one alone nobody can tell which of the two is the slow one.
const PEERS: usize = 2;

/// Fewer other devices than this are no fleet to compare with: the median of two is either's accident.
pub const FLEET_PEERS: usize = 3;

/// Shortest `for` of `rising`: the line through a value takes five sweeps at least.
const RISES_IN: Duration = Duration::from_secs(5);

/// A forecast looks ahead four times as far as it looks back, as the file system alerts of the
/// node_exporter mixin do (6 h of samples for 24 h).
const AHEAD: u32 = 4;

impl Check<'_> {
    pub(super) fn threshold(
        &mut self,
        field: &Field,
        name: String,
        entry: &FileThreshold,
    ) -> Option<Threshold> {
        let metric = self.metric(&field.at("metric"), &entry.metric)?;
        let before = self.faults.len();
        let (per, unit) = (self.per(field, entry, metric), entry.unit(metric));
        let measure = self.measure(field, entry, metric, per);
        let lasting = self.span(&field.at("for"), entry.lasting.as_ref(), Duration::ZERO);
        let rule = self.rule(field, entry, metric, unit);
        if let Some(Rule::Above { enter, .. }) = rule
            && measure == Some(Measure::Value)
            && metric.is_flag(per)
            && enter.number >= 1.0
        {
            let (name, per) = (metric.name, per.word());
            self.value(
                &field.at("above"),
                format!("{name} is never above 1 per {per}: write a smaller limit"),
            );
        }
        if entry.rising && lasting < RISES_IN {
            self.key(
                &field.at("rising"),
                "needs a span in which the value can be seen to rise: write `for: 5s` or more beside it",
            );
        }
        (self.faults.len() == before).then_some(())?;
        Some(Threshold {
            name,
            metric,
            per,
            measure: measure?,
            rule: rule?,
            unit,
            lasting,
            severity: entry.severity,
            optional: entry.optional,
        })
    }

    fn metric(&mut self, field: &Field, name: &str) -> Option<&'static Metric> {
        let found = METRICS.iter().find(|metric| metric.name == name);
        if found.is_none() {
            let near = hint(name, METRICS.iter().map(|metric| metric.name));
            self.value(field, format!("unknown metric `{name}`{near}"));
        }
        found
    }

    /// What the threshold is measured on. A limit of its own, and peers on this host, are those of a
    /// part, so `per` is then by itself the part that the metric has.
    fn per(&mut self, field: &Field, entry: &FileThreshold, metric: &Metric) -> Per {
        let own_limit = entry.limits().any(|limit| limit.0.contains("device-limit"));
        let with_host = entry
            .relative_to_peers
            .as_ref()
            .is_some_and(|peers| peers.among == Among::Host);
        let parts: Vec<Per> = metric
            .per
            .iter()
            .copied()
            .filter(|per| *per != Per::Device)
            .collect();
        let per = match (entry.per, parts.first()) {
            (Some(per), _) => per,
            (None, Some(part)) if own_limit || with_host => *part,
            (None, _) => Per::Device,
        };
        let field = field.at("per");
        if !metric.per.contains(&per) {
            let message = format!(
                "{} is not measured per {}: write {}",
                metric.name,
                per.word(),
                words(metric.per)
            );
            self.value(&field, message);
        } else if per == Per::Device && (own_limit || with_host) {
            let what = if own_limit {
                "device-limit is the limit"
            } else {
                "the peers on this host are those"
            };
            let right = if parts.is_empty() {
                format!(
                    "{} is measured on the device only, which has none",
                    metric.name
                )
            } else {
                format!("write {}", words(&parts))
            };
            self.value(&field, format!("{what} of a part: {right}"));
        }
        per
    }

    fn measure(
        &mut self,
        field: &Field,
        entry: &FileThreshold,
        metric: &Metric,
        per: Per,
    ) -> Option<Measure> {
        let alone = |check: &mut Self, key: &str| {
            for (set, other) in [
                (entry.count.is_some(), "count"),
                (entry.forecast.is_some(), "forecast"),
                (
                    key == "relative_to_peers" && entry.relative_to_load.is_some(),
                    "relative_to_load",
                ),
            ] {
                if set {
                    check.key(
                        &field.at(key),
                        format!("does not go with {other}: remove one of them"),
                    );
                }
            }
        };
        match (&entry.relative_to_load, &entry.relative_to_peers) {
            (None, None) => Some(Measure::Value),
            (Some(load), None) => {
                alone(self, "relative_to_load");
                self.load(&field.at("relative_to_load"), load, per)
            }
            (_, Some(peers)) => {
                alone(self, "relative_to_peers");
                self.peers(&field.at("relative_to_peers"), peers, metric, per)
            }
        }
    }

    fn load(&mut self, field: &Field, entry: &FileLoad, per: Per) -> Option<Measure> {
        let load = self.metric(&field.at("metric"), &entry.metric)?;
        if !load.per.contains(&per) {
            let message = format!(
                "{} is not measured per {} as the threshold is: choose a load that is",
                load.name,
                per.word()
            );
            self.value(&field.at("metric"), message);
        }
        let at_least =
            self.optional_quantity(&field.at("at_least"), entry.at_least.as_ref(), load.unit);
        let over = self.span(&field.at("over"), entry.over.as_ref(), LOAD_SPAN);
        if over < Duration::from_secs(1) {
            self.value(&field.at("over"), "shorter than a sweep: write at least 1s");
        }
        Some(Measure::PerLoad {
            load,
            at_least,
            over,
        })
    }

    fn peers(
        &mut self,
        field: &Field,
        entry: &FilePeers,
        metric: &Metric,
        per: Per,
    ) -> Option<Measure> {
        if metric.unit == Unit::Events {
            let message = format!(
                "{} counts events, which have no median: compare a level such as a latency",
                metric.name
            );
            self.key(field, message);
            return None;
        }
        if entry.among == Among::Fleet && per != Per::Device {
            self.value(
                &field.at("among"),
                "the fleet is compared device by device: leave `per` out",
            );
        }
        let usual = match entry.among {
            Among::Host => PEERS,
            Among::Fleet => FLEET_PEERS,
        };
        let peers = entry.peers.unwrap_or(usual);
        if peers == 0 || (peers != usual && entry.among == Among::Fleet) {
            self.value(
                &field.at("peers"),
                format!("write 1 or more, and among: fleet always takes {FLEET_PEERS}"),
            );
        }
        let at_least =
            self.optional_quantity(&field.at("at_least"), entry.at_least.as_ref(), metric.unit);
        Some(Measure::ToPeers {
            among: entry.among,
            at_least,
            peers,
        })
    }

    fn optional_quantity(&mut self, field: &Field, scalar: Option<&Scalar>, unit: Unit) -> f64 {
        scalar
            .and_then(|scalar| self.ok(field, quantity(&scalar.0, unit)))
            .unwrap_or_default()
    }

    fn rule(
        &mut self,
        field: &Field,
        entry: &FileThreshold,
        metric: &Metric,
        unit: Unit,
    ) -> Option<Rule> {
        if entry.rising && entry.above.is_none() {
            self.key(
                &field.at("rising"),
                "goes with `above` only: remove it, or write above",
            );
        }
        match (&entry.above, &entry.below, &entry.count, &entry.forecast) {
            (Some(above), None, None, None) => {
                let (enter, clear) = self.limits(field, "above", above, entry, metric, unit)?;
                Some(Rule::Above {
                    enter,
                    clear,
                    rising: entry.rising,
                })
            }
            (None, Some(below), None, None) => {
                let (enter, clear) = self.limits(field, "below", below, entry, metric, unit)?;
                Some(Rule::Below { enter, clear })
            }
            (None, None, Some(count), None) => self.count(field, count, entry, metric),
            (None, None, None, Some(forecast)) => self.forecast(field, forecast, entry, metric),
            (None, None, None, None) => {
                let right = if unit == Unit::Events {
                    "count: { at_least: 3, within: 10m }"
                } else {
                    "above, below or forecast"
                };
                self.key(field, format!("has no limit: write {right}"));
                None
            }
            _ => {
                self.key(field, "has several limits: write only one of above, below, count and forecast, and a threshold for each");
                None
            }
        }
    }

    fn limits(
        &mut self,
        field: &Field,
        side: &str,
        enter: &Scalar,
        entry: &FileThreshold,
        metric: &Metric,
        unit: Unit,
    ) -> Option<(Limit, Limit)> {
        if unit == Unit::Events {
            self.key(
                &field.at(side),
                format!("{} counts events: write count: {{ at_least: 3, within: 10m }} instead of {side}", metric.name),
            );
            return None;
        }
        let at = self.limit(&field.at(side), enter, entry, metric, unit);
        if unit == Unit::Percent
            && side == "above"
            && !passes_whole(metric, entry)
            && at.is_some_and(|at| at.number >= 100.0)
        {
            self.value(
                &field.at(side),
                format!("{} is never above 100%: write a smaller limit", metric.name),
            );
        }
        let negative = unit == Unit::Celsius || metric.name.ends_with("_margin");
        if side == "below" && !negative && at.is_some_and(|at| at.number <= 0.0) {
            self.value(
                &field.at(side),
                format!("{} is never below 0: write a larger limit", metric.name),
            );
        }
        let clear_field = field.at("clear");
        let clear = match &entry.clear {
            Some(clear) => self.limit(&clear_field, clear, entry, metric, unit)?,
            None => at?,
        };
        let at = at?;
        let written = entry.clear.as_ref().map_or("", |clear| clear.0.as_str());
        if clear.of_device != at.of_device {
            let right = if at.of_device {
                "device-limit - 10C"
            } else {
                "a plain value"
            };
            self.value(
                &clear_field,
                format!(
                    "{written} cannot be compared with {side}: {}: write {right}",
                    enter.0
                ),
            );
            return None;
        }
        let wrong_side = if side == "above" {
            clear.number > at.number
        } else {
            clear.number < at.number
        };
        if wrong_side {
            let right = if side == "above" {
                "at most"
            } else {
                "at least"
            };
            self.value(
                &clear_field,
                format!(
                    "{written} is not on the healthy side of {side}: write {right} {}",
                    enter.0
                ),
            );
            return None;
        }
        Some((at, clear))
    }

    fn limit(
        &mut self,
        field: &Field,
        scalar: &Scalar,
        entry: &FileThreshold,
        metric: &Metric,
        unit: Unit,
    ) -> Option<Limit> {
        let passes = passes_whole(metric, entry);
        let limit = self.ok(field, limit(&scalar.0, unit, passes))?;
        if limit.of_device && (own_limit(metric).is_none() || entry.is_relative()) {
            let known: Vec<&str> = METRICS
                .iter()
                .filter(|metric| own_limit(metric).is_some())
                .map(|metric| metric.name)
                .collect();
            let message = format!(
                "device-limit is known of the plain values of {} only: write a value",
                known.join(", ")
            );
            self.value(field, message);
            return None;
        }
        Some(limit)
    }

    fn count(
        &mut self,
        field: &Field,
        count: &FileCount,
        entry: &FileThreshold,
        metric: &Metric,
    ) -> Option<Rule> {
        if metric.unit != Unit::Events {
            self.key(
                &field.at("count"),
                format!(
                    "{} is a level, not events: write above or below",
                    metric.name
                ),
            );
            return None;
        }
        for (set, key) in [(&entry.clear, "clear"), (&entry.lasting, "for")] {
            if set.is_some() {
                self.key(
                    &field.at(key),
                    "does not go with count: it clears when fewer events lie within the span; remove it",
                );
            }
        }
        if count.at_least == 0 {
            self.value(
                &field.at("count").at("at_least"),
                "0 would always fail: write at least 1",
            );
        }
        let within_field = field.at("count").at("within");
        let within = self.ok(&within_field, span(&count.within.0))?;
        if within.is_zero() {
            self.value(
                &within_field,
                "0 would never fail: write a span such as 10m",
            );
        }
        Some(Rule::Count {
            at_least: count.at_least,
            within,
        })
    }

    fn forecast(
        &mut self,
        field: &Field,
        forecast: &FileForecast,
        entry: &FileThreshold,
        metric: &Metric,
    ) -> Option<Rule> {
        let below = field.at("forecast");
        if metric.unit == Unit::Events {
            let message = format!(
                "{} counts events, which have no course: write count",
                metric.name
            );
            self.key(&below, message);
            return None;
        }
        let (key, reaches) = match (&forecast.reaches, &forecast.falls_to) {
            (Some(reaches), None) => ("reaches", reaches),
            (None, Some(falls_to)) => ("falls_to", falls_to),
            _ => {
                self.key(
                    &below,
                    "write exactly one of reaches (from below) and falls_to (from above)",
                );
                return None;
            }
        };
        let reaches = self.limit(&below.at(key), reaches, entry, metric, metric.unit);
        let within = self.ok(&below.at("within"), span(&forecast.within.0))?;
        let over = self.span(&below.at("over"), forecast.over.as_ref(), within / AHEAD);
        let short = Duration::from_secs(60);
        if forecast.over.is_some() && over < short {
            self.value(
                &below.at("over"),
                "too short for a line through samples: write at least 1m",
            );
        } else if over < short {
            self.value(&below.at("within"), "a quarter of it is too short for a line through samples: write at least 4m, or `over: 1m` beside it");
        }
        let clear = self.span(&field.at("clear"), entry.clear.as_ref(), within);
        if clear < within {
            self.value(
                &field.at("clear"),
                format!(
                    "is not on the healthy side of the forecast: write at least {}",
                    forecast.within.0
                ),
            );
        }
        Some(Rule::Forecast {
            reaches: reaches?,
            falling: key == "falls_to",
            within,
            clear,
            over,
        })
    }
}

impl FileThreshold {
    fn limits(&self) -> impl Iterator<Item = &Scalar> {
        let forecast = self
            .forecast
            .iter()
            .flat_map(|forecast| [&forecast.reaches, &forecast.falls_to]);
        [&self.above, &self.below]
            .into_iter()
            .chain(forecast)
            .flatten()
    }

    fn is_relative(&self) -> bool {
        self.relative_to_load.is_some() || self.relative_to_peers.is_some()
    }

    /// Unit of the judged value: a share where value and load are of one kind.
    fn unit(&self, metric: &Metric) -> Unit {
        let load = self
            .relative_to_load
            .as_ref()
            .and_then(|load| METRICS.iter().find(|metric| metric.name == load.metric));
        match (&self.relative_to_peers, load) {
            (Some(_), _) => Unit::Times,
            (None, Some(load)) if load.unit == metric.unit => Unit::Percent,
            (None, Some(_)) if metric.unit == Unit::Events => Unit::Count,
            _ => metric.unit,
        }
    }
}

/// Whether what is judged may be more than the whole: a ratio to a load is no share.
fn passes_whole(metric: &Metric, entry: &FileThreshold) -> bool {
    metric.passes_whole() || entry.is_relative()
}

/// The metric of the limit that a part publishes for `metric`.
pub(super) fn own_limit(metric: &Metric) -> Option<&'static Metric> {
    METRICS
        .iter()
        .find(|limit| limit.name.strip_suffix("_limit") == Some(metric.name))
}

fn words(per: &[Per]) -> String {
    let words: Vec<&str> = per.iter().map(|per| per.word()).collect();
    words.join(" or ")
}
