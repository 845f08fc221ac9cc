//! Threads for calls that may wait for the source or the disk, so that those which need not wait go on.
//!
//! Invariants: threads are started as they are needed, at most [`THREADS`], and end when there is nothing to do;
//! what waits for a thread is bounded by who waits for its answer: one call for each thread of a client.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

const THREADS: usize = 256;
/// How long a thread waits for something to do before it ends.
const IDLE: Duration = Duration::from_secs(5);

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
    over: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// The threads; dropped, it waits until all is done.
#[derive(Default)]
pub(super) struct Pool(Arc<Shared>);

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Whole after every statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut state = self.state();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                job();
                state = self.state();
                continue;
            }
            if state.over {
                break;
            }
            state.idle += 1;
            let waited = self.changed.wait_timeout(state, IDLE);
            let (woken, time) = waited.unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.idle -= 1;
            if time.timed_out() && state.jobs.is_empty() {
                break;
            }
        }
        state.threads -= 1;
        self.changed.notify_all();
    }
}

impl Pool {
    /// Runs `job` on a thread of the pool.
    pub(super) fn run(&self, job: impl FnOnce() + Send + 'static) {
        let mut state = self.0.state();
        state.jobs.push_back(Box::new(job));
        if state.jobs.len() <= state.idle || state.threads == THREADS {
            self.0.changed.notify_one();
            return;
        }
        state.threads += 1;
        drop(state);
        let shared = Arc::clone(&self.0);
        let spawned = std::thread::Builder::new()
            .name("lifeboat-served".to_owned())
            .spawn(move || shared.work());
        if let Err(error) = spawned {
            tracing::error!("cannot start a thread for a served volume: {error}");
            // Done here and now rather than never.
            self.0.work();
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.over = true;
        self.0.changed.notify_all();
        while state.threads > 0 {
            let waited = self.0.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn who_waits_holds_up_nobody_and_all_is_done_at_the_end() {
        let pool = Pool::default();
        // All of these can go on only when each has its own thread.
        let together = Arc::new(Barrier::new(65));
        for _ in 0..64 {
            let together = Arc::clone(&together);
            pool.run(move || {
                together.wait();
            });
        }
        together.wait();
        let done = Arc::new(AtomicUsize::new(0));
        for _ in 0..2 * THREADS {
            let done = Arc::clone(&done);
            pool.run(move || {
                std::thread::sleep(Duration::from_millis(1));
                done.fetch_add(1, Ordering::Relaxed);
            });
        }
        drop(pool);
        assert_eq!(done.load(Ordering::Relaxed), 2 * THREADS);
    }
}
