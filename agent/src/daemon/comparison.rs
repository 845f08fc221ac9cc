//! What this device tells its fleet to be compared with, and what it heard.
//!
//! Invariant: what was heard counts for three heartbeats; older figures are absent. Non-goals: judging them.

use crate::fleet::compare::{Compared, FleetFigures};
use crate::fleet::duplicator::HeartbeatAnswer;
use crate::health::Policy;
use crate::migration::view::HostView;
use crate::model::metric::{Per, Sample, Subject};
use crate::model::units::UnixMillis;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What the duplicator said last, and until when it counts.
#[derive(Default)]
pub struct Comparison(Mutex<Option<(FleetFigures, Instant)>>);

/// An older value of this device is not told.
const FRESH: Duration = Duration::from_secs(10);

impl Comparison {
    /// Takes in an answer to a heartbeat.
    pub fn hear(&self, answer: &HeartbeatAnswer) {
        let until = Instant::now() + 3 * Duration::from_millis(answer.interval_ms.min(600_000));
        let heard = Some((answer.figures.clone(), until));
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = heard;
    }

    fn figures(&self) -> FleetFigures {
        let heard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let counts = heard.as_ref().filter(|(_, until)| Instant::now() < *until);
        counts.map_or_else(FleetFigures::default, |(figures, _)| figures.clone())
    }

    /// The fleet's medians as samples of a sweep.
    pub fn samples(&self, at: UnixMillis) -> impl Iterator<Item = Sample> {
        let medians = self.figures().medians.into_iter();
        medians.map(move |(metric, value)| Sample {
            metric,
            subject: Subject::new(Per::Fleet, ""),
            value,
            at,
        })
    }

    /// What the next heartbeat says: what `policy` compares, and the values the fleet asked for.
    pub fn compared(&self, policy: Option<&Policy>, view: &HostView, now: UnixMillis) -> Compared {
        let asked = self.figures().wanted;
        let samples = view.snapshot.samples.iter().filter(|sample| {
            sample.subject.per == Per::Device
                && asked.contains(&sample.metric)
                && now.since(sample.at) < FRESH
        });
        Compared {
            wanted: policy.map_or_else(Default::default, Policy::compared_with_fleet),
            values: samples
                .map(|sample| (sample.metric.clone(), sample.value))
                .collect(),
        }
    }
}
