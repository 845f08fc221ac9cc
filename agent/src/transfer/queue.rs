//! A bounded queue between data threads that knows when everything taken from it is done.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Locks, also after another thread panicked while holding the lock: the state of these queues is
/// valid between any two statements.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Many producers, many consumers, at most `cap` items waiting.
#[derive(Debug)]
pub(super) struct Queue<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    cap: usize,
}

#[derive(Debug)]
struct State<T> {
    items: VecDeque<T>,
    /// Taken but not yet reported done.
    busy: usize,
    closed: bool,
}

impl<T> Queue<T> {
    pub(super) fn new(cap: usize) -> Self {
        Self {
            state: Mutex::new(State {
                items: VecDeque::new(),
                busy: 0,
                closed: false,
            }),
            changed: Condvar::new(),
            cap,
        }
    }

    /// Adds an item, waiting for room. Gives it back when the queue is closed.
    pub(super) fn push(&self, item: T) -> Result<(), T> {
        let mut state = lock(&self.state);
        while state.items.len() >= self.cap && !state.closed {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if state.closed {
            return Err(item);
        }
        state.items.push_back(item);
        self.changed.notify_all();
        Ok(())
    }

    /// Adds an item without waiting for room: it had its place here before. Gives it back when the queue is closed.
    pub(super) fn put_back(&self, item: T) -> Result<(), T> {
        let mut state = lock(&self.state);
        if state.closed {
            return Err(item);
        }
        state.items.push_back(item);
        self.changed.notify_all();
        Ok(())
    }

    /// Takes an item, waiting for one; none once the queue is closed and empty. Each item taken must
    /// be reported with [`Queue::done`].
    pub(super) fn take(&self) -> Option<T> {
        let mut state = lock(&self.state);
        loop {
            if let Some(item) = state.items.pop_front() {
                state.busy += 1;
                self.changed.notify_all();
                return Some(item);
            }
            if state.closed {
                return None;
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Reports one taken item as finished.
    pub(super) fn done(&self) {
        let mut state = lock(&self.state);
        state.busy = state.busy.saturating_sub(1);
        self.changed.notify_all();
    }

    /// Waits until nothing waits and nothing is being worked on.
    pub(super) fn drain(&self) {
        let mut state = lock(&self.state);
        while !(state.items.is_empty() && state.busy == 0) {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// No more items are accepted; what waits is still handed out.
    pub(super) fn close(&self) {
        lock(&self.state).closed = true;
        self.changed.notify_all();
    }

    /// Nothing more is handed out, and nobody waits for what was taken: who took it panicked.
    pub(super) fn abandon(&self) {
        let mut state = lock(&self.state);
        (state.closed, state.busy) = (true, 0);
        state.items.clear();
        self.changed.notify_all();
    }
}

/// Does something when its thread panics, or nobody there would wake those who wait for it.
pub(super) struct OnPanic<F: Fn()>(pub(super) F);

impl<F: Fn()> Drop for OnPanic<F> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            (self.0)();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_waits_for_a_thread_that_panicked() {
        let queue: Queue<u8> = Queue::new(1);
        let ended = std::panic::catch_unwind(|| {
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let _end = OnPanic(|| queue.abandon());
                    queue.take();
                    panic!("as a reader might");
                });
                while queue.push(1).is_ok() {}
                queue.drain();
            });
        });
        assert!(ended.is_err(), "the panic is passed on");
        assert_eq!(queue.take(), None);
    }
}
