//! The list of a volume as it is asked for: over a connection of its own, and of what is known here already only named.

use super::connect::fetching;
use super::piece::Pieces;
use super::plan::{Admit, FetchError, FetchPlan};
use super::target::Fetcher;
use super::wire::{Answer, Class, Fetch};
use crate::model::ids::Epoch;
use crate::model::units::Bytes;
use crate::transfer::Options;
use crate::transfer::connection::Incoming;
use crate::transfer::message::Message;
use crate::volume::Entry;
use crate::volume::tree::Xattr;
use std::time::{Duration, Instant};

impl Fetcher {
    /// Every entry of the volume in path order, files without block signatures, over a connection of its
    /// own; what of that is in the list that is `known` here already is not sent.
    ///
    /// # Errors
    /// The source cannot be asked.
    pub fn list(
        plan: &FetchPlan,
        options: &Options,
        known: &[Entry],
    ) -> Result<Vec<Entry>, FetchError> {
        if let Some(stand_in) = plan.stand_in.as_ref().filter(|stand_in| stand_in.lists) {
            match Self::list_by(&stand_in.admit, plan, options, known) {
                Err(error) => {
                    tracing::info!(plan = %plan.plan, "the paired device does not list the volume, the source is asked: {error}");
                }
                listed => return listed,
            }
        }
        Self::list_by(&plan.admit, plan, options, known)
    }

    fn list_by(
        admit: &Admit,
        plan: &FetchPlan,
        options: &Options,
        known: &[Entry],
    ) -> Result<Vec<Entry>, FetchError> {
        let link = |error: &dyn std::fmt::Display| FetchError::Link(error.to_string());
        let grant = admit().map_err(FetchError::NotAdmitted)?;
        let (_socket, mut receiver, mut transmitter, guard) =
            fetching(plan, &grant, options, Class::Demand).map_err(|e| link(&e))?;
        let pieces = Pieces::of(known, &plan.fleet_key);
        let question = Fetch::List {
            bits: pieces.bits,
            pieces: pieces.signatures.clone(),
        };
        transmitter
            .message(plan.volume, Epoch(0), &Message::Fetch(question))
            .map_err(|e| link(&e))?;
        let mut listed = Listed::of(known, &pieces, LIST_CAP);
        let mut record = Vec::new();
        // Walking a large tree takes longer than a peer may be silent.
        let until = Instant::now() + LIST_TIME;
        let mut ping = || {
            let said = transmitter.message(plan.volume, Epoch(0), &Message::Ping);
            said.map_err(|e| link(&e))
        };
        ping()?;
        loop {
            match receiver.next(std::mem::take(&mut record)) {
                Ok(Incoming::Message(_, _, Message::Ping)) => {
                    std::thread::sleep(Duration::from_millis(10));
                    ping()?;
                }
                Ok(Incoming::Record(header, bytes)) => {
                    record = bytes;
                    let plain = guard.open(&header, &mut record).map_err(|e| link(&e))?;
                    let answer = Answer::decode(plain).map_err(|e| link(&e))?;
                    if listed.take(answer, plain.len())? {
                        return Ok(listed.entries);
                    }
                }
                Ok(_) => return Err(FetchError::Link("a message came unasked".to_owned())),
                Err(error) => return Err(link(&error)),
            }
            if Instant::now() > until {
                return Err(FetchError::Link("listing took too long".to_owned()));
            }
        }
    }
}

/// A list as it arrives: of what came and of what is known, each once, so that no source fills the memory here.
struct Listed<'a> {
    known: &'a [Entry],
    pieces: &'a Pieces,
    /// Bytes that may still come.
    room: usize,
    cap: usize,
    /// Where the known entries begin that were not named.
    unnamed: usize,
    entries: Vec<Entry>,
}

impl<'a> Listed<'a> {
    fn of(known: &'a [Entry], pieces: &'a Pieces, cap: usize) -> Self {
        Self {
            known,
            pieces,
            room: cap,
            cap,
            unnamed: 0,
            entries: Vec::new(),
        }
    }

    /// Takes an answer of so many bytes; whether it was the last. What holds them counts too: of short entries it is most.
    fn take(&mut self, answer: Answer<'_>, bytes: usize) -> Result<bool, FetchError> {
        let wrong = |why: &str| FetchError::Link(why.to_owned());
        match answer {
            Answer::Entries { last, entries } => {
                let attributes: usize = entries.iter().map(|entry| entry.xattrs.len()).sum();
                let held = entries.len() * size_of::<Entry>() + attributes * size_of::<Xattr>();
                let room = self.room.checked_sub(bytes + held);
                self.room = room.ok_or(FetchError::TooLong(Bytes(self.cap as u64)))?;
                self.entries.extend(entries);
                Ok(last)
            }
            Answer::Same(same) => {
                for piece in same {
                    let range = self.pieces.range(&piece);
                    let range = range.filter(|range| range.start >= self.unnamed);
                    let range = range.ok_or_else(|| wrong("a piece is named that is not here"))?;
                    self.unnamed = range.end;
                    self.entries.extend_from_slice(&self.known[range]);
                }
                Ok(false)
            }
            _ => Err(wrong("an answer came unasked")),
        }
    }
}

/// Bytes of a list as it is held: some twenty million entries.
const LIST_CAP: usize = 4 << 30;

/// A tree of millions of files on a slow disk takes minutes to walk.
const LIST_TIME: Duration = Duration::from_secs(1800);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::FleetKey;
    use crate::volume::Kind;
    use crate::volume::tree::{Seen, Timestamp};

    #[test]
    fn a_list_that_never_ends_or_names_what_is_known_again_and_again_is_refused() {
        let entry = |number: usize| Entry {
            path: format!("{number:08}").into_bytes().into(),
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: Timestamp::default(),
            xattrs: Vec::new(),
            kind: Kind::Fifo,
            seen: Seen::default(),
        };
        let known: Vec<Entry> = (0..10_000).map(entry).collect();
        let pieces = Pieces::of(&known, &FleetKey([3; 32]));
        let all = || Answer::Same(pieces.signatures.clone());
        let more = |last| Answer::Entries {
            last,
            entries: vec![entry(10_000)],
        };
        // For one entry with its bytes, and the bytes of the next alone.
        let mut listed = Listed::of(&known, &pieces, size_of::<Entry>() + 610);
        assert!(!listed.take(all(), 10).unwrap());
        let named = listed.entries.len();
        assert!(named > 9000 && listed.take(more(true), 600).unwrap());
        assert_eq!(listed.entries.len(), named + 1);
        let said = listed.take(more(false), 10).unwrap_err().to_string();
        assert!(said.contains("is longer than"), "{said}");
        assert!(listed.take(all(), 10).is_err());
        assert_eq!(listed.entries.len(), named + 1);
    }
}
