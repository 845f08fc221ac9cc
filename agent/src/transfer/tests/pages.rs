//! Blocks of which only some pages changed.

use super::*;
use crate::model::volume::ChangesBy;
use crate::volume::rewritten::Written;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

const BLOCK: u64 = 64 << 10;
const PAGE: u64 = BLOCK / 16;

fn write(file: &Path, offset: u64, bytes: &[u8]) {
    let file = fs::File::options().write(true).open(file).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

#[test]
fn of_a_block_only_the_pages_that_changed_travel_on_every_path() {
    for (way, engine) in every() {
        let bench = Bench::new(engine);
        let file = bench.source.join("table");
        fs::write(&file, noise(1, (5 << 20) + 12_345)).unwrap();
        let mut sender = bench.sender(bench.path(way));
        let (state, _) = bench.send(&mut sender, 1, None).unwrap();
        // A byte in a page; the end of one and the beginning of the next; two that do not follow each other.
        write(&file, 3 * BLOCK + 5 * PAGE + 7, b"n");
        write(&file, 20 * BLOCK + PAGE - 1, b"nn");
        write(&file, 21 * BLOCK, b"n");
        write(&file, 22 * BLOCK - 1, b"n");
        let (state, report) = bench.send(&mut sender, 2, Some(&state)).unwrap();
        let sent = (report.blocks_sent, report.changeset);
        assert_eq!(sent, (3, Bytes(5 * PAGE)), "{way:?}");
        assert!(
            report.bytes_on_wire.0 < 10 * PAGE,
            "{:?}",
            report.bytes_on_wire
        );
        bench.assert_equal();
        // The same page again; more than half of a block; the block at the end, which is a short one.
        write(&file, 3 * BLOCK + 5 * PAGE, b"again");
        write(&file, 40 * BLOCK, &noise(2, 9 * PAGE as usize));
        write(&file, (5 << 20) + 12_000, b"end");
        let (state, report) = bench.send(&mut sender, 3, Some(&state)).unwrap();
        let expected = Bytes(PAGE + BLOCK + 12_345);
        assert_eq!(
            (report.blocks_sent, report.changeset),
            (3, expected),
            "{way:?}"
        );
        bench.assert_equal();
        // A target that knows nothing of it any more finds that it has everything.
        bench.admit_target(&bench.target);
        let (_, report) = bench.send(&mut sender, 4, None).unwrap();
        assert_eq!(
            (report.blocks_sent, report.root),
            (0, state.root),
            "{way:?}"
        );
    }
}

#[test]
fn a_block_that_was_altered_on_the_target_is_noticed_and_then_travels_whole() {
    for (way, engine) in every() {
        let bench = Bench::new(engine);
        let (file, copy) = (bench.source.join("table"), bench.target.join("table"));
        fs::write(&file, noise(1, 5 << 20)).unwrap();
        let mut sender = bench.sender(bench.path(way));
        let (state, _) = bench.send(&mut sender, 1, None).unwrap();
        let before = fs::metadata(&copy).unwrap().modified().unwrap();
        write(&copy, 7 * BLOCK + 9 * PAGE, b"altered");
        write(
            &copy,
            30 * BLOCK,
            b"altered too, but nothing of this block is sent",
        );
        let handle = fs::File::options().write(true).open(&copy).unwrap();
        handle.set_modified(before).unwrap();
        write(&file, 7 * BLOCK, b"new");
        let (state, report) = bench.send(&mut sender, 2, Some(&state)).unwrap();
        assert_eq!(report.root, state.root, "{way:?}");
        assert_eq!(
            report.changeset,
            Bytes(2 * BLOCK),
            "{way:?}: found anew and sent whole"
        );
        bench.assert_equal();
    }
}

#[test]
fn any_changes_arrive_in_pages() {
    let seed = rand::random();
    println!("seed {seed}");
    let mut chance = StdRng::seed_from_u64(seed);
    for way in WAYS {
        let bench = Bench::new(EngineChoice::Auto);
        let file = bench.source.join("table");
        fs::write(&file, noise(1, 4 << 20)).unwrap();
        let mut sender = bench.sender(bench.path(way));
        let mut previous = None;
        for epoch in 1..25 {
            let (state, _) = bench.send(&mut sender, epoch, previous.as_ref()).unwrap();
            // Now and then nobody knows what is there.
            previous = chance.random_bool(0.9).then_some(state);
            let (is, was) = (
                fs::read(bench.target.join("table")).unwrap(),
                fs::read(&file).unwrap(),
            );
            assert!(is == was, "{way:?}, epoch {epoch} of seed {seed}");
            for _ in 0..chance.random_range(1..5) {
                let size = fs::metadata(&file).unwrap().len();
                let at = chance.random_range(0..size.max(1));
                match chance.random_range(0..8) {
                    0 => {
                        let size = chance.random_range((1 << 20) + 1..6 << 20);
                        let open = fs::File::options().write(true).open(&file).unwrap();
                        open.set_len(size).unwrap();
                    }
                    1 => write(&file, at / BLOCK * BLOCK, &vec![0; BLOCK as usize]),
                    2 => write(
                        &file,
                        at,
                        &noise(epoch, chance.random_range(1..3 * BLOCK as usize)),
                    ),
                    3 => write(&file, at, &vec![0; chance.random_range(1..BLOCK as usize)]),
                    _ => write(&file, at, &noise(epoch, chance.random_range(1..5000))),
                }
            }
        }
    }
}

/// Says of one device that everything on it was written, but not without saying where.
#[derive(Debug)]
pub(super) struct Everywhere(pub(super) u64);

impl Written for Everywhere {
    fn device(&self) -> u64 {
        self.0
    }

    fn anywhere(&self) -> bool {
        false
    }

    fn within(&self, _: &Range<u64>) -> bool {
        true
    }
}

#[test]
fn what_was_cut_off_and_came_back_travels_whole() {
    for (way, engine) in every() {
        let bench = Bench::new(engine);
        let file = bench.source.join("table");
        let old = noise(1, 5 << 20);
        fs::write(&file, &old).unwrap();
        let device = fs::metadata(&file).unwrap().dev();
        let mut volume = bench.volume();
        volume.changes = ChangesBy::WrittenExtents;
        let mut sender = bench.sender(bench.path(way));
        let mut previous: Option<TreeState> = None;
        let mut send = |epoch| {
            let sent = sender.send_epoch(
                &volume,
                Epoch(epoch),
                false,
                previous.as_ref(),
                &Arc::default(),
            );
            let (mut state, report) = sent.unwrap();
            state.written = Some(Arc::new(Everywhere(device)));
            previous = Some(state);
            report
        };
        send(1);
        let open = fs::File::options().write(true).open(&file).unwrap();
        open.set_len(2 << 20).unwrap();
        send(2);
        write(&file, 2 << 20, &old[2 << 20..]);
        for block in 32..80 {
            write(&file, block * BLOCK + 17, b"new");
        }
        write(&file, 50 * BLOCK, &noise(3, BLOCK as usize));
        let report = send(3);
        assert_eq!(report.changeset, Bytes(3 << 20), "{way:?}");
        bench.assert_equal();
        write(&file, 60 * BLOCK + PAGE, b"newer");
        assert_eq!(send(4).changeset, Bytes(PAGE), "{way:?}");
        bench.assert_equal();
    }
}
