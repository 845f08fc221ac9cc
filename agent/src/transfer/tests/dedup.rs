//! Blocks that the target holds already do not travel again: counted in bytes on the wire.

use super::*;

const LARGE: usize = 24 << 20;

fn random(bytes: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; bytes];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

fn fill(root: &Path) {
    fs::write(root.join("large"), random(LARGE, 1)).unwrap();
    for number in 0..40 {
        let name = root.join(format!("small-{number}"));
        fs::write(name, random(90_000 + number * 500, 10 + number as u64)).unwrap();
    }
    // An image with holes and a tail that is no whole block.
    let image = fs::File::create(root.join("image")).unwrap();
    image.write_all_at(&random(3 << 20, 2), 5 << 20).unwrap();
    image.set_len((12 << 20) + 77).unwrap();
}

/// Sends the source to a destination that is new and returns what it took.
fn to_new(bench: &Bench, way: Way, name: &str) -> EpochReport {
    let target = bench.target.with_file_name(name);
    bench.admit_target(&target);
    let mut sender = bench.sender(bench.path(way));
    let (_, report) = bench.send(&mut sender, 1, None).unwrap();
    assert_same_tree(&bench.source, &target);
    report
}

#[test]
fn a_second_volume_of_the_same_content_costs_less_than_a_hundredth_of_its_bytes() {
    for (way, engine) in every().filter(|(way, _)| *way != Way::ViaSpool) {
        let bench = Bench::new(engine);
        fill(&bench.source);
        let first = to_new(&bench, way, "first");
        let bytes = first.bytes_read.0;
        assert!(first.bytes_on_wire.0 > bytes, "{first:?}");
        assert_eq!(first.held_blocks, 0);
        let second = to_new(&bench, way, "second");
        assert!(
            second.bytes_on_wire.0 * 100 < bytes,
            "{way:?} {engine:?}: {second:?}"
        );
        assert_eq!(second.root, first.root);
        assert_eq!(second.held_blocks, first.blocks_sent - second.blocks_sent);
    }
}

#[test]
fn of_a_sparse_file_only_blocks_with_data_are_read() {
    const EACH: u64 = 64 << 10;
    for (way, engine) in every() {
        let bench = Bench::new(engine);
        let image = fs::File::create(bench.source.join("image")).unwrap();
        for at in 0..4 {
            let data = random(EACH as usize, at);
            image.write_all_at(&data, (at << 20) + 3 * EACH).unwrap();
        }
        image.set_len(9 << 20).unwrap();
        image.sync_all().unwrap();
        let report = to_new(&bench, way, "first");
        assert_eq!(report.bytes_read, Bytes(4 * EACH), "{way:?} {engine:?}");
    }
}

#[test]
fn over_a_spool_nothing_is_offered() {
    let bench = Bench::new(EngineChoice::Auto);
    fill(&bench.source);
    let first = to_new(&bench, Way::ViaSpool, "first");
    let second = to_new(&bench, Way::ViaSpool, "second");
    assert_eq!(second.held_blocks, 0);
    assert_eq!(second.blocks_sent, first.blocks_sent);
}

#[test]
fn an_old_copy_that_changed_meanwhile_gives_only_what_is_still_true() {
    let bench = Bench::new(EngineChoice::Auto);
    fill(&bench.source);
    to_new(&bench, Way::Direct, "first");
    let old = bench.target.with_file_name("first");
    let large = fs::OpenOptions::new()
        .write(true)
        .open(old.join("large"))
        .unwrap();
    // One block of sixteen in a megabyte is another now, and the last three megabytes are gone.
    for megabyte in 0..21 {
        large
            .write_all_at(b"other", (megabyte << 20) + 300_000)
            .unwrap();
    }
    large.set_len(21 << 20).unwrap();
    fs::remove_file(old.join("small-7")).unwrap();
    let report = to_new(&bench, Way::Direct, "second");
    // 21 single blocks, 48 that were cut off, two of the removed file; tails below 16 KiB come with them.
    assert!(
        (71..90).contains(&report.blocks_sent),
        "{} blocks were sent",
        report.blocks_sent
    );
    assert!(report.held_blocks > 400, "{report:?}");
}

#[test]
fn blocks_that_repeat_within_a_volume_hardly_travel_again() {
    let bench = Bench::new(EngineChoice::Auto);
    let content = random(2 << 20, 3);
    let mut file = Vec::new();
    for _ in 0..40 {
        file.extend_from_slice(&content);
    }
    fs::write(bench.source.join("repeats"), &file).unwrap();
    let report = to_new(&bench, Way::Direct, "first");
    assert!(
        report.bytes_on_wire.0 * 2 < file.len() as u64,
        "{} of {} bytes travelled",
        report.bytes_on_wire,
        file.len()
    );
}

#[test]
fn of_a_volume_of_which_the_target_holds_a_twentieth_no_held_block_travels() {
    const BLOCK: usize = 64 << 10;
    const BLOCKS: usize = 960;
    for (way, engine) in every().filter(|(way, _)| *way != Way::ViaSpool) {
        let bench = Bench::new(engine);
        let held = random(BLOCKS / 20 * BLOCK, 4);
        let path = bench.source.join("file");
        fs::write(&path, &held).unwrap();
        to_new(&bench, way, "first");
        // A record of sixteen blocks has one that is held, or none.
        let mut mixed = random(BLOCKS * BLOCK, 5);
        for (number, block) in held.chunks(BLOCK).enumerate() {
            let at = (number * 20 + number % 20) * BLOCK;
            mixed[at..at + BLOCK].copy_from_slice(block);
        }
        fs::write(&path, &mixed).unwrap();
        let report = to_new(&bench, way, "second");
        assert_eq!(report.held_blocks, BLOCKS as u64 / 20, "{way:?} {engine:?}");
        let lacking = mixed.len() - held.len();
        let wire = report.bytes_on_wire.0;
        assert!(
            wire < (lacking + lacking / 100) as u64,
            "{way:?} {engine:?}: {wire}"
        );
    }
}

#[test]
fn answers_that_a_broken_connection_took_along_are_given_again() {
    let bench = Bench::new(EngineChoice::Auto);
    fill(&bench.source);
    let first = to_new(&bench, Way::Direct, "first");
    let target = bench.target.with_file_name("second");
    bench.admit_target(&target);
    let mut cuts = 0;
    let all_cuts = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&all_cuts);
    let cut = move |_: &mut [u8], before: u64| {
        if cuts < 3 && before > 8_000 * (cuts + 1) {
            cuts += 1;
            counted.store(cuts, Ordering::SeqCst);
            return false;
        }
        true
    };
    let proxied = faults::proxy(bench.server.addr(), cut);
    let path = bench.path_to(Way::Direct, proxied, bench.relay.addr());
    let (_, report) = bench.send(&mut bench.sender(path), 1, None).unwrap();
    let cuts = all_cuts.load(Ordering::SeqCst);
    assert!(cuts > 1, "{cuts} connections were cut");
    assert_same_tree(&bench.source, &target);
    assert_eq!(report.root, first.root);
    assert!(report.held_blocks > 300, "{report:?}");
}
