//! The catalogue of metrics beside what this host has of it.

use super::daemon::ask;
use super::output::{say, table};
use super::{Context, Failure, Outcome};
use crate::api::local::Status;
use crate::health::in_unit;
use crate::model::metric::{METRICS, Metric, Per, Sample};
use crate::model::nearest::hint;
use crate::model::telemetry::Snapshot;
use crate::model::units::{UnixMillis, utc};
use serde::Serialize;
use std::collections::BTreeMap;

/// Lists every metric with what this host has of it now, and if nothing, why.
#[derive(clap::Args)]
pub struct Arguments {
    /// Only metrics whose names begin with one of these (`cpu`, `disk.`).
    names: Vec<String>,
}

/// One metric and what the host has of it.
#[derive(Debug, Serialize)]
struct Row {
    #[serde(flatten)]
    metric: &'static Metric,
    /// Whether it has a value now.
    available: bool,
    /// Its values now.
    values: Vec<Value>,
    /// Share of the time in which it was watched, when not always.
    #[serde(skip_serializing_if = "Option::is_none")]
    sampled_percent: Option<f64>,
    /// Why it has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    why_not: Option<String>,
}

#[derive(Debug, Serialize)]
struct Value {
    per: Per,
    name: String,
    value: f64,
    /// When its container ended; none while it lives.
    #[serde(skip_serializing_if = "Option::is_none")]
    ended: Option<UnixMillis>,
}

/// Prints the list.
pub fn run(arguments: &Arguments, context: &Context) -> Outcome {
    if let Some(name) = unknown(&arguments.names) {
        let known = METRICS.iter().map(|metric| metric.name);
        return Err(Failure::Failed(anyhow::anyhow!(
            "no metric's name begins with `{name}`{}; `lifeboat metrics` lists all",
            hint(name, known)
        )));
    }
    ask(&context.socket, async |agent| {
        let status: Status = agent.get("/v1/status").await.map_err(Failure::of)?;
        let rows = rows(&status.view.snapshot, &arguments.names);
        if context.json {
            say(&serde_json::to_string(&rows)?);
        } else {
            say(&render(&rows));
        }
        Ok(())
    })
}

/// The first name that no metric's begins with.
fn unknown(names: &[String]) -> Option<&String> {
    let begins = |name: &&String| {
        METRICS
            .iter()
            .any(|metric| metric.name.starts_with(name.as_str()))
    };
    names.iter().find(|name| !begins(name))
}

fn rows(snapshot: &Snapshot, names: &[String]) -> Vec<Row> {
    METRICS
        .iter()
        .filter(|metric| names.is_empty() || names.iter().any(|name| metric.name.starts_with(name)))
        .map(|metric| {
            let of_metric = |sample: &&Sample| sample.metric == metric.name;
            let value = |ended: bool| {
                move |sample: &Sample| Value {
                    per: sample.subject.per,
                    name: sample.subject.name.clone(),
                    value: sample.value,
                    ended: ended.then_some(sample.at),
                }
            };
            let now = snapshot.samples.iter().filter(of_metric).map(value(false));
            let ended = snapshot.ended.iter().filter(of_metric).map(value(true));
            let values: Vec<Value> = now.chain(ended).collect();
            let why_not = snapshot.absent.iter().find(|one| one.what == metric.name);
            Row {
                metric,
                available: values.iter().any(|value| value.ended.is_none()),
                sampled_percent: snapshot
                    .watched_percent
                    .filter(|_| metric.name.starts_with("sched.run_queue_latency")),
                why_not: why_not.map(|one| one.why.clone()),
                values,
            }
        })
        .collect()
}

fn render(rows: &[Row]) -> String {
    let available = rows.iter().filter(|row| row.available).count();
    let lines: Vec<[String; 5]> = rows
        .iter()
        .map(|row| {
            let per: Vec<&str> = row.metric.per.iter().map(|per| per.word()).collect();
            [
                row.metric.name.to_owned(),
                row.metric.unit.word().to_owned(),
                per.join(", "),
                here(row),
                match row.sampled_percent {
                    Some(percent) => format!("{}, sampled {percent:.0} %", row.metric.source),
                    None => row.metric.source.to_owned(),
                },
            ]
        })
        .collect();
    let heading = ["METRIC", "UNIT", "PER", "HERE", "SOURCE"];
    let table = table(heading, &lines);
    let absent: String = rows
        .iter()
        .filter_map(|row| {
            let why = row.why_not.as_deref()?;
            Some(format!("{}: {why}\n", row.metric.name))
        })
        .collect();
    let mut counted = format!("{available} of {} metrics have a value now.\n", rows.len());
    let ended: BTreeMap<&str, UnixMillis> = rows
        .iter()
        .flat_map(|row| &row.values)
        .filter_map(|value| Some((value.name.as_str(), value.ended?)))
        .collect();
    for (name, at) in ended {
        let of = rows.iter().filter_map(|row| {
            let value = row.values.iter().find(|value| value.name == name)?;
            let text = in_unit(value.value, row.metric.unit);
            (value.value != 0.0).then(|| format!("{} {text}", row.metric.name))
        });
        let told: Vec<String> = of.collect();
        counted.push_str(&format!("Ended {}: {name}: {}\n", utc(at), told.join(", ")));
    }
    if absent.is_empty() {
        return format!("{table}\n{counted}");
    }
    format!("{table}\n{counted}\nNot here now:\n{absent}")
}

/// The device's value, and of how many other things there is one: `3.1 %, 2 disks`.
fn here(row: &Row) -> String {
    let told: Vec<String> = row
        .metric
        .per
        .iter()
        .filter_map(|per| {
            let of = |value: &&Value| value.per == *per && value.ended.is_none();
            let first = row.values.iter().find(of)?;
            Some(match (per, row.values.iter().filter(of).count()) {
                (Per::Device, _) => in_unit(first.value, row.metric.unit),
                (per, 1) => format!("1 {}", per.word()),
                (per, count) => format!("{count} {}s", per.word()),
            })
        })
        .collect();
    if told.is_empty() {
        return "no".to_owned();
    }
    told.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::metric::Subject;
    use crate::model::telemetry::Disabled;

    #[test]
    fn a_name_that_no_metric_begins_with_is_found() {
        let names = |names: &[&str]| {
            names
                .iter()
                .map(|name| (*name).to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(unknown(&names(&["cpu", "disk.used"])), None);
        assert_eq!(
            unknown(&names(&["cpu", "dsk"])).map(String::as_str),
            Some("dsk")
        );
        assert_eq!(unknown(&[]), None);
    }

    #[test]
    fn each_metric_has_its_values_or_the_reason_for_having_none() {
        let sample = |subject, value| Sample {
            metric: "cpu.temperature".to_owned(),
            subject,
            value,
            at: Default::default(),
        };
        let snapshot = Snapshot {
            samples: vec![
                sample(Subject::new(Per::Sensor, "coretemp/Core 0"), 51.0),
                sample(Subject::new(Per::Sensor, "coretemp/Core 1"), 53.0),
                sample(Subject::device(), 53.0),
            ],
            watched_percent: Some(4.0),
            absent: vec![Disabled {
                what: "cpu.temperature_limit".to_owned(),
                why: "the sensors here publish no limit".to_owned(),
            }],
            ..Snapshot::default()
        };
        let rows = rows(&snapshot, &["cpu.temperature".to_owned()]);
        assert_eq!(rows.len(), 3);
        assert_eq!(here(&rows[0]), "53 °C, 2 sensors");
        assert_eq!(here(&rows[1]), "no");
        let text = render(&rows);
        assert!(text.contains("1 of 3 metrics"), "{text}");
        assert!(text.contains("cpu.temperature_limit: the sensors here publish no limit"));
        let sampled = super::rows(&snapshot, &["sched.run_queue_latency_p99".to_owned()]);
        assert!(render(&sampled).contains("sched_switch, sampled 4 %"));
        let json = serde_json::to_value(&rows).expect("JSON");
        assert_eq!(json[0]["name"], "cpu.temperature");
        assert_eq!(json[0]["per"], serde_json::json!(["device", "sensor"]));
        assert_eq!(json[0]["values"][2]["value"], 53.0);
        assert_eq!(json[1]["why_not"], "the sensors here publish no limit");
    }
}
