//! Read-ahead: which blocks of files that are read in order are asked for before they are read.
//!
//! A file's first reads in order ask for a little more, each next for twice as much up to [`WINDOW`], so that a
//! reader does not pay the round trip for every block; any other read begins anew. Pure.

use std::collections::VecDeque;
use std::ops::Range;

/// Most blocks that are asked for ahead of a reader: 4 MiB.
const WINDOW: u64 = 64;
/// Blocks that the first read in order asks for.
const FIRST: u64 = 4;
/// Files that are looked at.
const STREAMS_CAP: usize = 64;

struct Stream {
    number: u32,
    /// The block after the last read.
    next: u64,
    /// The block after the last that was asked for.
    until: u64,
    window: u64,
}

/// The readers.
#[derive(Default)]
pub(super) struct Streams(VecDeque<Stream>);

impl Streams {
    /// Somebody reads these blocks of a file, and some of them are `lacking`: which to ask for ahead.
    pub(super) fn read(&mut self, number: u32, blocks: Range<u64>, lacking: bool) -> Range<u64> {
        let known = self.0.iter_mut().find(|stream| stream.number == number);
        let Some(stream) = known else {
            if lacking {
                self.0.push_back(Stream {
                    number,
                    next: blocks.end,
                    until: blocks.end,
                    window: 0,
                });
                if self.0.len() > STREAMS_CAP {
                    self.0.pop_front();
                }
            }
            return 0..0;
        };
        let in_order = stream.next.saturating_sub(1) <= blocks.start && blocks.start <= stream.next;
        if !in_order {
            // A reader of what is here disturbs nobody.
            if lacking {
                stream.next = blocks.end;
                stream.until = blocks.end;
                stream.window = 0;
            }
            return 0..0;
        }
        let moved = blocks.end > stream.next;
        stream.next = stream.next.max(blocks.end);
        stream.until = stream.until.max(stream.next);
        if !moved || stream.until - stream.next > stream.window / 2 {
            return 0..0;
        }
        stream.window = (stream.window * 2).clamp(FIRST, WINDOW);
        let from = stream.until;
        stream.until = stream.next + stream.window;
        from..stream.until
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_in_order_asks_for_more_and_more_and_never_twice() {
        let mut streams = Streams::default();
        assert!(streams.read(1, 0..1, true).is_empty());
        let mut asked = 1;
        for block in 1..1000 {
            let ahead = streams.read(1, block..block + 1, block >= asked);
            if !ahead.is_empty() {
                assert!(ahead.start >= asked, "{ahead:?} after {asked}");
                asked = ahead.end;
            }
            assert!(asked <= block + 1 + WINDOW);
            assert!(block < 200 || asked > block + WINDOW / 2, "{block} {asked}");
        }
    }

    #[test]
    fn reading_here_and_there_asks_for_nothing() {
        let mut streams = Streams::default();
        for block in [5, 900, 17, 400, 30, 30, 30] {
            assert!(streams.read(1, block..block + 1, true).is_empty());
        }
        for number in 0..1000 {
            assert!(streams.read(number, 0..1, true).is_empty());
        }
        assert!(streams.0.len() <= STREAMS_CAP);
    }
}
