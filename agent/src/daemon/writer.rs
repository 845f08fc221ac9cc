//! A thread that writes small files, so that a disk that hangs stops nobody else.
//!
//! Invariant: of what waits for one file only the latest is kept. Non-goals: telling whoever asked when it is done.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Default)]
struct Waiting {
    files: BTreeMap<PathBuf, Vec<u8>>,
    closed: bool,
}

type Shared = (Mutex<Waiting>, Condvar);

/// The thread's other end; when it is dropped, the thread writes what waits and ends.
pub struct Writer(Arc<Shared>);

impl Writer {
    /// Starts the thread.
    ///
    /// # Errors
    /// Those of starting a thread.
    pub fn start(write: impl Fn(&Path, &[u8]) + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let (theirs, name) = (shared.clone(), "writer".to_owned());
        let writes = move || {
            while let Some((path, bytes)) = next(&theirs) {
                write(&path, &bytes);
            }
        };
        std::thread::Builder::new().name(name).spawn(writes)?;
        Ok(Self(shared))
    }

    /// Has `bytes` written to `path`, in place of what waits for it.
    pub fn put(&self, path: &Path, bytes: Vec<u8>) {
        locked(&self.0).files.insert(path.to_owned(), bytes);
        self.0.1.notify_one();
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        locked(&self.0).closed = true;
        self.0.1.notify_one();
    }
}

fn locked(shared: &Shared) -> MutexGuard<'_, Waiting> {
    shared.0.lock().unwrap_or_else(PoisonError::into_inner)
}

fn next(shared: &Shared) -> Option<(PathBuf, Vec<u8>)> {
    let idle = |waiting: &mut Waiting| waiting.files.is_empty() && !waiting.closed;
    let waited = shared.1.wait_while(locked(shared), idle);
    let mut waiting = waited.unwrap_or_else(PoisonError::into_inner);
    waiting.files.pop_first()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn a_disk_that_hangs_stops_nobody_and_gets_the_latest_of_each_file_when_it_answers() {
        let (begun, begins) = mpsc::channel();
        let (answer, answers) = mpsc::channel::<()>();
        let writer = Writer::start(move |path, bytes| {
            begun.send((path.to_owned(), bytes.to_vec())).unwrap();
            let _ = answers.recv();
        })
        .unwrap();
        let next = || begins.recv_timeout(Duration::from_secs(30)).unwrap();
        let (a, b) = (Path::new("a"), Path::new("b"));
        writer.put(a, vec![1]);
        assert_eq!(next(), (a.to_owned(), vec![1]));
        // It hangs in the first write.
        for number in 2..100 {
            writer.put(a, vec![number]);
        }
        writer.put(b, vec![7]);
        drop((answer, writer));
        assert_eq!(next(), (a.to_owned(), vec![99]));
        assert_eq!(next(), (b.to_owned(), vec![7]));
        assert!(begins.recv_timeout(Duration::from_secs(30)).is_err());
    }
}
