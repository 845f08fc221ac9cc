//! What devices compare with their fleet: who wants which metric, what the live ones say, the medians.
//!
//! Invariants: pure but for the lock; bounded for each device; a device that is not live does not count, nor
//! does it for itself; fewer than [`FEWEST`] others are no figure. Kept in memory: a duplicator that was
//! restarted has figures again after one heartbeat of each.

use crate::health::median;
use crate::model::ids::DeviceId;
use crate::model::units::UnixMillis;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

/// Fewer other devices are no fleet to compare with.
pub use crate::health::FLEET_PEERS as FEWEST;

/// Metrics of one device, and of all devices together, that are compared at most.
const MOST_OF_DEVICE: usize = 16;
const MOST: usize = 64;

/// What a device says with a heartbeat.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Compared {
    /// Metrics that its policy compares with the fleet.
    pub wanted: BTreeSet<String>,
    /// Values of the metrics that the fleet compares, where it has them.
    pub values: BTreeMap<String, f64>,
}

/// What it hears in the answer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct FleetFigures {
    /// Metrics whose values the fleet's devices want.
    pub wanted: BTreeSet<String>,
    /// The median of the other live devices, of the metrics that this device wants.
    pub medians: BTreeMap<String, f64>,
}

/// The duplicator's memory of it.
#[derive(Debug, Default)]
pub(super) struct Board(Mutex<BTreeMap<DeviceId, (UnixMillis, Compared)>>);

impl Board {
    /// Takes in what `device` says at `now`, and answers with the figures of those heard since `live_since`.
    pub(super) fn exchange(
        &self,
        device: &DeviceId,
        mut said: Compared,
        live_since: UnixMillis,
        now: UnixMillis,
    ) -> FleetFigures {
        said.values.retain(|_, value| value.is_finite());
        said.values = said.values.into_iter().take(MOST).collect();
        said.wanted = said.wanted.into_iter().take(MOST_OF_DEVICE).collect();
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|_, (at, _)| *at >= live_since);
        let wanted = known.values().flat_map(|(_, one)| &one.wanted);
        let wanted: BTreeSet<String> = wanted.chain(&said.wanted).take(MOST).cloned().collect();
        let of_others = |metric: &String| {
            let others = known.iter().filter(|(id, _)| *id != device);
            let mut values: Vec<f64> = others
                .filter_map(|(_, (_, one))| one.values.get(metric).copied())
                .collect();
            (values.len() >= FEWEST).then(|| (metric.clone(), median(&mut values)))
        };
        let medians = said.wanted.iter().filter_map(of_others).collect();
        known.insert(device.clone(), (now, said));
        FleetFigures { wanted, medians }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says(board: &Board, device: &str, wants: bool, value: f64, at: u64) -> FleetFigures {
        let metric = || "cpu.used".to_owned();
        let said = Compared {
            wanted: wants.then(metric).into_iter().collect(),
            values: [(metric(), value)].into(),
        };
        let live_since = UnixMillis(at.saturating_sub(15_000));
        board.exchange(&device.into(), said, live_since, UnixMillis(at))
    }

    #[test]
    fn a_device_hears_the_median_of_at_least_three_other_live_devices() {
        let board = Board::default();
        assert!(says(&board, "a", true, 90.0, 1000).medians.is_empty());
        let heard = says(&board, "b", false, 1.0, 1000);
        assert!(
            heard.wanted.contains("cpu.used"),
            "what one wants all are asked"
        );
        assert!(heard.medians.is_empty(), "it wants nothing itself");
        says(&board, "c", false, 2.0, 2000);
        assert!(says(&board, "a", true, 90.0, 3000).medians.is_empty());
        says(&board, "d", false, 9.0, 9000);
        assert_eq!(says(&board, "a", true, 90.0, 9000).medians["cpu.used"], 2.0);
        // c fell silent 15 s ago, and b too.
        assert!(says(&board, "a", true, 90.0, 17_001).medians.is_empty());
    }

    #[test]
    fn what_is_no_number_does_not_count_and_no_device_can_want_everything() {
        let board = Board::default();
        for device in ["b", "c", "d"] {
            says(&board, device, false, f64::NAN, 1000);
        }
        assert!(says(&board, "a", true, 1.0, 1000).medians.is_empty());
        let greedy = Compared {
            wanted: (0..1000).map(|n| format!("m{n}")).collect(),
            values: (0..1000).map(|n| (format!("m{n}"), 1.0)).collect(),
        };
        let heard = board.exchange(&"e".into(), greedy, UnixMillis(0), UnixMillis(1000));
        assert!(heard.wanted.len() <= MOST_OF_DEVICE + 1, "{heard:?}");
    }
}
