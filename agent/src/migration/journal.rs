//! The journal of one plan on one device: append-only, one JSON object a line, durable line by line.
//!
//! Invariants: an event is on disk before the act that it announces can be seen by another device; a
//! torn last line (the process died while writing) is as if it had not been written. Non-goals: it is
//! no queue; replaying it only tells how far the plan got.

use crate::model::ids::PlanId;
use crate::model::units::UnixMillis;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

/// One line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry<E> {
    /// When it was written.
    pub at: UnixMillis,
    /// What happened.
    pub event: E,
}

/// An open journal of events `E`.
#[derive(Debug)]
pub struct Journal<E> {
    path: PathBuf,
    file: File,
    /// Length of the whole lines.
    whole: u64,
    /// Whether the file may hold more than them: what of a failed line is on disk is not known.
    torn: bool,
    events: PhantomData<E>,
}

/// Why a journal could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot {doing} journal {path}: {error}; free space or repair the file system, then restart the agent"
)]
pub struct JournalError {
    doing: &'static str,
    path: PathBuf,
    error: std::io::Error,
}

/// Directory of a plan's files below the agent's state directory.
#[must_use]
pub fn plan_directory(state: &Path, role: &str, plan: &PlanId) -> PathBuf {
    state.join("plans").join(format!("{plan}.{role}"))
}

/// The whole entries of the journal in `directory`; none when there is no journal.
///
/// # Errors
/// The file cannot be read, or it is damaged before its last line.
pub fn read<E: DeserializeOwned>(directory: &Path) -> Result<Vec<Entry<E>>, JournalError> {
    read_whole(&directory.join("journal.jsonl")).map(|(entries, _)| entries)
}

/// Those whole entries of the journal in `directory` that are understood, also where it is damaged; none when there is
/// no journal.
///
/// # Errors
/// The file cannot be read.
pub fn legible<E: DeserializeOwned>(directory: &Path) -> Result<Vec<Entry<E>>, JournalError> {
    let text = text(&directory.join("journal.jsonl"))?;
    let lines = text.split_inclusive(|byte| *byte == b'\n');
    let whole = lines.filter(|line| line.ends_with(b"\n"));
    let entries = whole.filter_map(|line| serde_json::from_slice(line).ok());
    Ok(entries.collect())
}

/// What a journal holds; nothing when there is none.
fn text(path: &Path) -> Result<Vec<u8>, JournalError> {
    match std::fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        read => read.map_err(|error| failed_read(path, error)),
    }
}

fn failed_read(path: &Path, error: std::io::Error) -> JournalError {
    JournalError {
        doing: "read",
        path: path.to_owned(),
        error,
    }
}

/// The entries and the length of the bytes that hold them.
fn read_whole<E: DeserializeOwned>(path: &Path) -> Result<(Vec<Entry<E>>, usize), JournalError> {
    entries(&text(path)?).map_err(|error| failed_read(path, std::io::Error::other(error)))
}

/// The whole entries of a journal's text, and the length of the bytes that hold them: a torn last line is
/// none.
///
/// # Errors
/// The first line that is damaged.
pub fn entries<E: DeserializeOwned>(text: &[u8]) -> Result<(Vec<Entry<E>>, usize), String> {
    let mut entries = Vec::new();
    let mut whole = 0;
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        match serde_json::from_slice(line) {
            _ if !line.ends_with(b"\n") => break,
            Ok(entry) => entries.push(entry),
            Err(error) => {
                return Err(format!("line {} is not valid: {error}", entries.len() + 1));
            }
        }
        whole += line.len();
    }
    Ok((entries, whole))
}

impl<E: Serialize + DeserializeOwned> Journal<E> {
    /// Opens or creates the journal in `directory`, dropping a torn last line.
    ///
    /// # Errors
    /// The directory or file cannot be made, read, written or synced.
    pub fn open(directory: &Path) -> Result<(Self, Vec<Entry<E>>), JournalError> {
        let path = directory.join("journal.jsonl");
        let fail = |doing| {
            let path = path.clone();
            move |error| JournalError { doing, path, error }
        };
        std::fs::create_dir_all(directory).map_err(fail("create"))?;
        let (entries, whole) = read_whole(&path)?;
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(fail("open"))?;
        file.set_len(whole as u64).map_err(fail("trim"))?;
        file.sync_all().map_err(fail("sync"))?;
        File::open(directory)
            .and_then(|handle| handle.sync_all())
            .map_err(fail("sync"))?;
        Ok((
            Self {
                path,
                file,
                whole: whole as u64,
                torn: false,
                events: PhantomData,
            },
            entries,
        ))
    }

    /// Appends one event and waits until it is on disk.
    ///
    /// # Errors
    /// The write or the sync failed; the event counts as not written once [`Self::cut_back`] has succeeded.
    pub fn append(&mut self, at: UnixMillis, event: E) -> Result<(), JournalError> {
        let mut line = serde_json::to_vec(&Entry { at, event }).map_err(|error| JournalError {
            doing: "encode an event of",
            path: self.path.clone(),
            error: error.into(),
        })?;
        line.push(b'\n');
        self.cut_back()?;
        if let Err(error) = self
            .file
            .write_all(&line)
            .and_then(|()| self.file.sync_data())
        {
            self.torn = true;
            // Tried again by the next append, or by a caller who must know.
            let _ = self.cut_back();
            return Err(JournalError {
                doing: "write",
                path: self.path.clone(),
                error,
            });
        }
        self.whole += line.len() as u64;
        Ok(())
    }

    /// Makes certain that of an event which could not be appended nothing is there after a restart.
    ///
    /// # Errors
    /// The file cannot be cut; whether the event is on disk is not known.
    pub fn cut_back(&mut self) -> Result<(), JournalError> {
        if self.torn {
            let cut = self.file.set_len(self.whole);
            cut.and_then(|()| self.file.sync_data())
                .map_err(|error| JournalError {
                    doing: "cut a half-written event off",
                    path: self.path.clone(),
                    error,
                })?;
            self.torn = false;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_last_line_is_dropped_and_later_events_follow() {
        let directory = tempfile::tempdir().unwrap();
        let (mut journal, entries) = Journal::<String>::open(directory.path()).unwrap();
        assert!(entries.is_empty());
        journal.append(UnixMillis(1), "one".into()).unwrap();
        journal.append(UnixMillis(2), "two".into()).unwrap();
        let path = directory.path().join("journal.jsonl");
        let whole = std::fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let (mut journal, entries) = Journal::<String>::open(directory.path()).unwrap();
            let complete = whole[..cut].iter().filter(|byte| **byte == b'\n').count();
            assert_eq!(entries.len(), complete);
            journal.append(UnixMillis(3), "three".into()).unwrap();
            let (_, entries) = Journal::<String>::open(directory.path()).unwrap();
            assert_eq!(entries.last().unwrap().event, "three");
        }
    }

    #[test]
    fn an_event_that_could_not_be_written_is_cut_off_before_another_one_follows() {
        let directory = tempfile::tempdir().unwrap();
        let (mut journal, _) = Journal::<String>::open(directory.path()).unwrap();
        journal.append(UnixMillis(1), "one".into()).unwrap();
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let good = std::mem::replace(&mut journal.file, full);
        journal.append(UnixMillis(2), "two".into()).unwrap_err();
        let error = journal.cut_back().unwrap_err().to_string();
        assert!(error.contains("half-written"), "{error}");
        // As if half of it had come to the disk after all.
        (&good).write_all(b"{\"at\":2,\"event\":\"tw").unwrap();
        journal.file = good;
        journal.append(UnixMillis(3), "three".into()).unwrap();
        let (_, entries) = Journal::<String>::open(directory.path()).unwrap();
        let events: Vec<&str> = entries.iter().map(|entry| &*entry.event).collect();
        assert_eq!(events, ["one", "three"]);
    }

    #[test]
    fn damage_before_the_last_line_is_an_error_not_a_shorter_history() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal.jsonl");
        std::fs::write(&path, "garbage\n{\"at\":1,\"event\":\"one\"}\n").unwrap();
        let error = Journal::<String>::open(directory.path())
            .unwrap_err()
            .to_string();
        assert!(error.contains("line 1"), "{error}");
    }
}
