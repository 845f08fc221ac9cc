//! Spares the workload that runs on the source while a plan copies: watches the senses, and tells the copy how
//! fast it may read.
//!
//! Non-goals: judging what is lost (the guard); the final changeset, which nobody else runs beside.

use super::active::Active;
use super::delegator::Delegator;
use super::guard::{Allowed, Felt, Guard};
use super::view::HostView;
use crate::model::ids::ContainerName;
use crate::model::metric::Per;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::AbortHandle;

/// Requests a second below which their mean time tells nothing.
const REQUESTS_MIN: f64 = 5.0;
/// Share of one CPU that a workload must want before its waiting tells something.
const CPU_MIN: f64 = 0.05;

/// Ends the watch when it is dropped.
pub(super) struct Spared(AbortHandle);

impl Drop for Spared {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Spares the workload as long as the returned value lives.
pub(super) fn spare(delegator: &Delegator, active: &Arc<Active>) -> Spared {
    let settings = delegator.settings();
    let allowed = Allowed {
        loss: settings.workload_loss_max_percent / 100.0,
        minimum: settings.rate_min_bytes,
    };
    let (view, active) = (delegator.parts().view.clone(), active.clone());
    Spared(tokio::spawn(watch(view, active, allowed)).abort_handle())
}

async fn watch(mut view: watch::Receiver<Arc<HostView>>, active: Arc<Active>, allowed: Allowed) {
    if allowed.loss >= 1.0 {
        return;
    }
    let mut guard = Guard::new(allowed);
    let now = view.borrow_and_update().clone();
    guard.rest(felt(&now, Duration::ZERO));
    let mut last = (now.snapshot.at, active.copied());
    while view.changed().await.is_ok() {
        let view = view.borrow_and_update().clone();
        let now = (view.snapshot.at, active.copied());
        let interval = now.0.since(last.0);
        let felt = felt(&view, interval);
        if active.copies() {
            let read = (now.1 - last.1) as f64 / interval.as_secs_f64().max(0.001);
            let rate = guard.step(felt, read as u64);
            active.spare_workload(rate, rate.map(|_| guard.loss()));
        } else {
            guard.rest(felt);
            active.spare_workload(None, None);
        }
        last = now;
    }
}

/// What the containers of this host met with in the last sweep, which took `interval`.
fn felt(view: &HostView, interval: Duration) -> Felt {
    let containers = view.containers.iter();
    let workload: BTreeSet<&ContainerName> = containers
        .filter(|container| container.runtime.is_some())
        .map(|container| &container.name)
        .collect();
    let snapshot = &view.snapshot;
    let (mut requests, mut under_way, mut waited_ns) = (0.0, 0.0, 0.0);
    for stats in &snapshot.containers {
        if !workload.contains(&stats.name) {
            continue;
        }
        if let Some(block) = &stats.block {
            requests += block.reads.iops + block.writes.iops + block.discards.iops;
            under_way += block.queue_depth;
        }
        if let Some(run_queue) = &stats.run_queue {
            waited_ns += run_queue.latency.sum();
        }
    }
    // Little's law: so many requests under way, each for that long.
    let block_ns = (requests >= REQUESTS_MIN).then(|| under_way / requests * 1e9);
    let used: f64 = snapshot
        .samples
        .iter()
        .filter(|sample| sample.metric == "cpu.used" && sample.subject.per == Per::Container)
        .filter(|sample| {
            workload
                .iter()
                .any(|name| name.as_str() == sample.subject.name)
        })
        .map(|sample| sample.value / 100.0)
        .sum();
    let watched = snapshot.watched_percent.is_none() && !interval.is_zero();
    let waiting = snapshot.host.cpus.filter(|_| watched).and_then(|cpus| {
        let ran = used * f64::from(cpus);
        let waited = waited_ns / interval.as_nanos() as f64;
        (ran + waited >= CPU_MIN).then(|| waited / (ran + waited))
    });
    Felt { block_ns, waiting }
}
