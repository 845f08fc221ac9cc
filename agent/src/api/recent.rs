//! The last sweeps, for whoever records them.
//!
//! Invariant: a recorder that is late by less than a dozen sweeps misses none. Nothing is kept while nobody records.

use crate::migration::view::HostView;
use crate::model::units::UnixMillis;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Sweeps that are kept: eleven seconds of a disk or a recorder that hesitates.
const KEPT: usize = 12;

/// Nobody records who has not asked for this long.
const ASKED_LATELY: Duration = Duration::from_secs(60);

/// The last sweeps of this life of the agent.
pub struct Recent {
    /// Tells this life from another: when it began.
    pub life: UnixMillis,
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    asked: Option<Instant>,
    views: VecDeque<Arc<HostView>>,
}

impl Recent {
    /// None yet, in the life that begins at `life`.
    #[must_use]
    pub fn new(life: UnixMillis) -> Self {
        Self {
            life,
            kept: Mutex::default(),
        }
    }

    /// Keeps a sweep, if anybody records.
    pub fn keep(&self, view: &Arc<HostView>) {
        let mut kept = self.locked();
        if kept.asked.is_none_or(|at| at.elapsed() > ASKED_LATELY) {
            kept.views.clear();
            return;
        }
        kept.views.push_back(view.clone());
        while kept.views.len() > KEPT {
            kept.views.pop_front();
        }
    }

    /// The first sweep after number `after`, of what is kept or else `latest`.
    pub fn after(&self, after: u64, latest: &Arc<HostView>) -> Option<Arc<HostView>> {
        let mut kept = self.locked();
        kept.asked = Some(Instant::now());
        let mut views = kept.views.iter().chain([latest]);
        views.find(|view| view.number > after).cloned()
    }

    fn locked(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recorder_that_is_late_gets_every_sweep_of_the_last_dozen_in_its_turn() {
        let recent = Recent::new(UnixMillis(1));
        let sweep = |number| {
            let number = HostView {
                number,
                ..HostView::default()
            };
            Arc::new(number)
        };
        let next = |after, latest: &Arc<HostView>| recent.after(after, latest).map(|v| v.number);
        assert_eq!(next(0, &sweep(0)), None, "before the first sweep");
        recent.keep(&sweep(1));
        assert_eq!(next(0, &sweep(1)), Some(1));
        for number in 2..=5 {
            recent.keep(&sweep(number));
        }
        let mut heard = 1;
        while let Some(number) = next(heard, &sweep(5)) {
            assert_eq!(number, heard + 1);
            heard = number;
        }
        assert_eq!(heard, 5);
        for number in 6..=30 {
            recent.keep(&sweep(number));
        }
        assert_eq!(next(5, &sweep(30)), Some(19), "older ones are gone");
    }

    #[test]
    fn nothing_is_kept_while_nobody_records() {
        let recent = Recent::new(UnixMillis(1));
        recent.keep(&Arc::new(HostView::default()));
        assert!(recent.locked().views.is_empty());
    }
}
