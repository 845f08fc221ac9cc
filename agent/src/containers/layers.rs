//! Leaving layers out of an image archive, as it streams by.
//!
//! A layer that the target's runtime has at the same place of a chain need not travel: Docker does not open its file
//! in the archive, Podman looks whether the file is there and takes its own. So the file stays in the archive,
//! empty. A layer is known by the digest of its content, which is its diff id. Invariant: what is not such a layer
//! passes through byte for byte. Non-goals: archives with compressed layers (neither runtime exports them), whose
//! digests match nothing.

use aws_lc_rs::digest::{Context, SHA256};
use std::collections::HashSet;

/// What to do to the file that is written.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    Append(Vec<u8>),
    /// Cut the file to this length.
    CutTo(u64),
}

const BLOCK: usize = 512;
/// Longest extended header that is looked into; Go writes a few hundred bytes.
const EXTENDED_CAP: u64 = 1 << 20;

enum State {
    /// Bytes of the next header so far.
    Header(Vec<u8>),
    /// Content of an entry, then its padding.
    Content {
        left: u64,
        padding: u64,
        watched: Option<Watched>,
        /// Content of an extended header so far.
        extended: Option<Vec<u8>>,
    },
    /// Behind the last entry, or something that this does not understand.
    Rest,
}

/// An entry that may be left out.
struct Watched {
    header: Vec<u8>,
    begins: u64,
    hash: Context,
}

/// A tar archive on its way into a file.
pub(super) struct Sieve {
    leave_out: HashSet<String>,
    state: State,
    written: u64,
    /// Size of the next entry by the extended header before it.
    size: Option<u64>,
}

impl Sieve {
    /// Leaves out the layers with these diff ids (`sha256:…`).
    pub(super) fn new(leave_out: &[String]) -> Self {
        Self {
            leave_out: leave_out.iter().cloned().collect(),
            state: State::Header(Vec::new()),
            written: 0,
            size: None,
        }
    }

    /// Takes the next piece of the archive.
    pub(super) fn feed(&mut self, mut piece: &[u8]) -> Vec<Change> {
        let mut changes = Vec::new();
        if self.leave_out.is_empty() {
            self.append(&mut changes, piece.to_vec());
            return changes;
        }
        while !piece.is_empty() {
            match &mut self.state {
                State::Rest => {
                    self.append(&mut changes, piece.to_vec());
                    return changes;
                }
                State::Header(header) => {
                    let taken = piece.len().min(BLOCK - header.len());
                    header.extend_from_slice(&piece[..taken]);
                    let whole = (header.len() == BLOCK).then(|| std::mem::take(header));
                    self.append(&mut changes, piece[..taken].to_vec());
                    piece = &piece[taken..];
                    if let Some(header) = whole {
                        self.state = self.entry(&header);
                    }
                }
                State::Content {
                    left,
                    padding,
                    watched,
                    extended,
                } => {
                    let of_content = usize::try_from(*left)
                        .unwrap_or(usize::MAX)
                        .min(piece.len());
                    let of_padding = usize::try_from(*padding)
                        .unwrap_or(usize::MAX)
                        .min(piece.len() - of_content);
                    let (content, taken) = (&piece[..of_content], of_content + of_padding);
                    if let Some(watched) = watched {
                        watched.hash.update(content);
                    }
                    if let Some(extended) = extended {
                        extended.extend_from_slice(content);
                    }
                    *left -= of_content as u64;
                    *padding -= of_padding as u64;
                    let whole = (*left, *padding) == (0, 0);
                    let ended = whole.then(|| (watched.take(), extended.take()));
                    self.append(&mut changes, piece[..taken].to_vec());
                    piece = &piece[taken..];
                    if let Some((watched, extended)) = ended {
                        self.state = State::Header(Vec::new());
                        self.size = extended.as_deref().and_then(size_in);
                        if let Some(watched) = watched {
                            self.judge(watched, &mut changes);
                        }
                    }
                }
            }
        }
        changes
    }

    fn append(&mut self, changes: &mut Vec<Change>, bytes: Vec<u8>) {
        self.written += bytes.len() as u64;
        changes.push(Change::Append(bytes));
    }

    /// The state behind a header.
    fn entry(&mut self, header: &[u8]) -> State {
        let by_extended = self.size.take();
        let Some(size) = by_extended.or_else(|| number(&header[124..136])) else {
            return State::Rest;
        };
        if header.iter().all(|byte| *byte == 0) {
            return State::Rest;
        }
        let kind = header[156];
        let is_file = matches!(kind, b'0' | 0) && by_extended.is_none() && size > 0;
        if size == 0 {
            return State::Header(Vec::new());
        }
        State::Content {
            left: size,
            padding: size.next_multiple_of(BLOCK as u64) - size,
            watched: is_file.then(|| Watched {
                header: header.to_vec(),
                begins: self.written - BLOCK as u64,
                hash: Context::new(&SHA256),
            }),
            extended: (kind == b'x' && size <= EXTENDED_CAP).then(Vec::new),
        }
    }

    /// Cuts an entry's content off again when it is a layer to leave out.
    fn judge(&mut self, watched: Watched, changes: &mut Vec<Change>) {
        let Watched {
            mut header,
            begins,
            hash,
        } = watched;
        let digest = format!("sha256:{}", hex::encode(hash.finish()));
        if !self.leave_out.contains(&digest) {
            return;
        }
        header[124..136].copy_from_slice(b"00000000000\0");
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        changes.push(Change::CutTo(begins));
        self.written = begins;
        self.append(changes, header);
    }
}

/// A number of a header: octal text, or binary behind a set top bit.
fn number(field: &[u8]) -> Option<u64> {
    if field[0] & 0x80 != 0 {
        let bytes: [u8; 8] = field[field.len() - 8..].try_into().ok()?;
        let above = &field[1..field.len() - 8];
        return above
            .iter()
            .all(|byte| *byte == 0)
            .then(|| u64::from_be_bytes(bytes));
    }
    let text = std::str::from_utf8(field).ok()?;
    let text = text.trim_matches([' ', '\0']);
    if text.is_empty() {
        return Some(0);
    }
    u64::from_str_radix(text, 8).ok()
}

/// The size that an extended header gives, in lines `LENGTH size=NUMBER`.
fn size_in(extended: &[u8]) -> Option<u64> {
    let text = String::from_utf8_lossy(extended);
    let value = text.lines().find_map(|line| {
        let (_, record) = line.split_once(' ')?;
        record.strip_prefix("size=")
    })?;
    value.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(kind: u8, name: &str, content: &[u8]) -> Vec<u8> {
        let mut header = vec![0; BLOCK];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
        header[156] = kind;
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        header.extend_from_slice(content);
        header.resize(header.len().next_multiple_of(BLOCK), 0);
        header
    }

    fn digest(content: &[u8]) -> String {
        let digest = aws_lc_rs::digest::digest(&SHA256, content);
        format!("sha256:{}", hex::encode(digest))
    }

    fn sieved(archive: &[u8], leave_out: &[String], cut: usize) -> Vec<u8> {
        let mut sieve = Sieve::new(leave_out);
        let mut file: Vec<u8> = Vec::new();
        for piece in archive.chunks(cut) {
            for change in sieve.feed(piece) {
                match change {
                    Change::Append(bytes) => file.extend(bytes),
                    Change::CutTo(length) => file.truncate(length as usize),
                }
            }
        }
        file
    }

    #[test]
    fn a_layer_that_the_target_has_is_an_empty_file_and_all_else_is_as_it_was() {
        let (held, other) = (vec![1; 5000], vec![2; 700]);
        let end = vec![0; 2 * BLOCK];
        let extended = entry(b'x', "pax", b"19 path=some/layer\n");
        let before = [
            entry(b'0', "held.tar", &held),
            extended.clone(),
            entry(b'0', "other.tar", &other),
            entry(b'2', "link", b""),
            entry(b'0', "manifest.json", b"{}"),
            end.clone(),
        ];
        let after = [
            entry(b'0', "held.tar", b""),
            extended,
            entry(b'0', "other.tar", &other),
            entry(b'2', "link", b""),
            entry(b'0', "manifest.json", b"{}"),
            end,
        ];
        for cut in [1, 7, 512, 1000, 1 << 20] {
            let file = sieved(&before.concat(), &[digest(&held)], cut);
            assert!(file == after.concat(), "pieces of {cut}");
        }
    }

    #[test]
    fn a_size_in_an_extended_header_counts_and_its_entry_stays() {
        let content = vec![3; 1000];
        let mut of_extended = entry(b'0', "large", &content);
        of_extended[124..135].copy_from_slice(b"00000000000");
        let archive = [
            entry(b'x', "pax", b"13 size=1000\n"),
            of_extended,
            entry(b'0', "next", b"abc"),
        ]
        .concat();
        let leave_out = [digest(&content), digest(b"abc")];
        let file = sieved(&archive, &leave_out, 100);
        assert_eq!(file.len(), archive.len() - BLOCK);
    }

    proptest! {
        #[test]
        fn what_is_no_archive_passes_through(bytes: Vec<u8>, cut in 1_usize..600) {
            prop_assert_eq!(sieved(&bytes, &[digest(b"x")], cut), bytes);
        }
    }
}
