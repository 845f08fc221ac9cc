//! From the samples of one sweep to what one threshold judges.

use super::limits::{FLEET_PEERS, own_limit};
use super::policy::{Among, Measure, Threshold};
use crate::model::metric::{Per, Sample};
use std::collections::BTreeSet;

/// What a sweep says of one subject.
#[derive(Debug, PartialEq)]
pub(super) enum Reading {
    /// A value, and what it was held against: the part's own limit or the peers' median.
    Value { value: f64, against: Option<f64> },
    /// A value and the load that it is divided by.
    PerLoad { value: f64, load: f64 },
    /// It was measured, and there is nothing to judge.
    Idle,
    /// It cannot be judged; why.
    Blind(String),
}

/// The readings of the subjects of `threshold`, with their samples.
pub(super) fn readings<'a>(
    threshold: &Threshold,
    samples: &'a [Sample],
) -> Vec<(&'a Sample, Reading)> {
    let own: Vec<&Sample> = of(samples, threshold.metric.name, threshold.per).collect();
    match threshold.measure {
        Measure::Value => {
            let limits = own_limit(threshold.metric).filter(|_| threshold.needs_own_limit());
            own.into_iter()
                .map(|sample| {
                    let against = limits.and_then(|limit| beside(samples, limit.name, sample));
                    let reading = if limits.is_some() && against.is_none() {
                        Reading::Blind(format!("{} publishes no limit of its own", sample.subject))
                    } else {
                        Reading::Value {
                            value: sample.value,
                            against,
                        }
                    };
                    (sample, reading)
                })
                .collect()
        }
        Measure::PerLoad { load, .. } => own
            .into_iter()
            .map(|sample| {
                let reading = match beside(samples, load.name, sample) {
                    Some(load) => Reading::PerLoad {
                        value: sample.value,
                        load,
                    },
                    None => Reading::Blind(format!(
                        "{} of {} is not measured",
                        load.name, sample.subject
                    )),
                };
                (sample, reading)
            })
            .collect(),
        Measure::ToPeers {
            among: Among::Fleet,
            at_least,
            ..
        } => {
            let median = of(samples, threshold.metric.name, Per::Fleet).next();
            own.into_iter()
                .map(|sample| {
                    let reading = match median {
                        Some(median) => compare(sample.value, median.value, at_least),
                        None => Reading::Blind(format!(
                            "the duplicator tells no figure of {FLEET_PEERS} other live devices"
                        )),
                    };
                    (sample, reading)
                })
                .collect()
        }
        Measure::ToPeers {
            at_least, peers, ..
        } => among_host(&own, at_least, peers),
    }
}

/// Tells which file systems are mounted.
pub(super) const MOUNTED: &str = "filesystem.mounted";

/// The file systems that the kernel has in its table of mounts; none when that was not read.
pub(super) fn mounted(samples: &[Sample]) -> Option<BTreeSet<&str>> {
    let mounted: BTreeSet<&str> = of(samples, MOUNTED, Per::Mount)
        .map(|sample| sample.subject.name.as_str())
        .collect();
    (!mounted.is_empty()).then_some(mounted)
}

fn of<'a>(samples: &'a [Sample], metric: &str, per: Per) -> impl Iterator<Item = &'a Sample> {
    samples
        .iter()
        .filter(move |sample| sample.subject.per == per && sample.metric == metric)
}

/// The value of another metric of the same subject.
fn beside(samples: &[Sample], metric: &str, sample: &Sample) -> Option<f64> {
    of(samples, metric, sample.subject.per)
        .find(|other| other.subject.name == sample.subject.name)
        .map(|other| other.value)
        .filter(|value| value.is_finite())
}

fn among_host<'a>(own: &[&'a Sample], at_least: f64, fewest: usize) -> Vec<(&'a Sample, Reading)> {
    own.iter()
        .map(|sample| {
            let mut peers: Vec<f64> = own
                .iter()
                .filter(|peer| peer.subject.name != sample.subject.name && same_kind(sample, peer))
                .map(|peer| peer.value)
                .collect();
            if peers.len() < fewest {
                let why = format!(
                    "{} has {} peer(s) here, {fewest} are needed",
                    sample.subject,
                    peers.len()
                );
                return (*sample, Reading::Blind(why));
            }
            // A peer that does nothing is no measure of what is usual.
            peers.retain(|value| *value > 0.0);
            if peers.len() < fewest {
                return (*sample, compare(sample.value, 0.0, at_least));
            }
            (*sample, compare(sample.value, median(&mut peers), at_least))
        })
        .collect()
}

/// A value beside its peers' median, which is none where they are idle.
fn compare(value: f64, median: f64, at_least: f64) -> Reading {
    if value < at_least || (value <= 0.0 && median <= 0.0) {
        // Too small to be a failure: as good as its peers, so that one that was failing is over.
        return Reading::Value {
            value: 1.0,
            against: Some(median),
        };
    }
    if median <= 0.0 {
        return Reading::Idle;
    }
    Reading::Value {
        value: value / median,
        against: Some(median),
    }
}

/// The middle value, or the mean of the two in the middle.
pub(crate) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 {
        values[middle]
    } else {
        (values[middle - 1] + values[middle]) / 2.0
    }
}

/// Disks and interfaces of one driver are of one kind, told by the letters that their names begin
/// with (`nvme0n1`, `sda`, `eth0`): a rotating disk is always slower than flash.
fn same_kind(one: &Sample, other: &Sample) -> bool {
    if !matches!(one.subject.per, Per::Disk | Per::Interface) {
        return true;
    }
    let driver = |sample: &Sample| {
        let name = &sample.subject.name;
        let letters = name
            .find(|c: char| !c.is_ascii_alphabetic())
            .unwrap_or(name.len());
        // The kernel letters the disks of these drivers: sda, vdb, xvdc, hdd.
        let stem = ["xvd", "sd", "vd", "hd"]
            .into_iter()
            .find(|stem| name.starts_with(stem));
        stem.map_or_else(|| name[..letters].to_owned(), str::to_owned)
    };
    driver(one) == driver(other)
}
