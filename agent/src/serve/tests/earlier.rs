//! Stores that do not begin empty: with an earlier copy, or made of a list that was taken ahead.

use super::*;

/// Fetches everything; the root that the target then proves.
fn filled_and_proven(store: &Arc<Store>) -> Signature {
    let filler = Filler::start(store, FetchOrder::default()).unwrap();
    let mut root = None;
    wait("the proof", || {
        root = store.root().unwrap();
        root.is_some()
    });
    drop(filler);
    root.unwrap()
}

#[test]
fn what_an_earlier_copy_left_is_taken_where_the_source_says_that_it_is_the_same() {
    let bench = Bench::new(Duration::ZERO);
    let big = random(1, 2_000_003);
    bench.file("big", &big);
    bench.file("grown", &random(2, 900_000));
    bench.file("shrunk", &random(3, 200_000));
    bench.file("one", &random(4, 100_000));
    bench.file("other", &random(5, 100_000));
    bench.file("new", &random(6, 70_000));
    bench.file("zeros", &[0; 300_000]);
    fs::create_dir(bench.source.join("deep")).unwrap();
    bench.file("deep/same", &random(7, 500_000));
    let place = bench.dir.path().join("place");
    let store = bench.dir.path().join("store");
    fs::create_dir(&place).unwrap();
    let copied = |name: &str, bytes: &[u8]| fs::write(place.join(name), bytes).unwrap();
    let mut changed = big.clone();
    changed[1_000_000] ^= 1;
    copied("big", &changed);
    copied("grown", &random(2, 900_000)[..300_000]);
    copied("shrunk", &random(3, 700_000));
    // One file with two names, which are two files on the source.
    copied("one", &random(4, 100_000));
    fs::hard_link(place.join("one"), place.join("other")).unwrap();
    copied("removed", b"was here");
    copied("zeros", &random(8, 300_000));
    fs::create_dir(place.join("deep")).unwrap();
    copied("deep/same", &random(7, 500_000));
    lay_by(&store, &place).unwrap();
    assert_eq!(fs::read_dir(&place).unwrap().count(), 0);
    bring_back(&store, &place).unwrap();
    assert_eq!(fs::read(place.join("removed")).unwrap(), b"was here");
    lay_by(&store, &place).unwrap();

    // As after a death: what the first store took lies by once more.
    drop(bench.open_volume(VolumeId(1), LONG, true));
    bring_back(&store, &place).unwrap();
    assert!(place.join("big").exists() && !store.exists());
    lay_by(&store, &place).unwrap();
    let opened = bench.open_volume(VolumeId(1), LONG, true);
    let file = served(&opened, "big");
    assert_eq!(
        file.read(&opened, 1_000_000, 10).unwrap(),
        big[1_000_000..1_000_010]
    );
    assert_eq!(
        file.read(&opened, 1_500_000, 10).unwrap(),
        big[1_500_000..1_500_010]
    );
    opened
        .write(&file.file, file.number, b"mine", 70_000)
        .unwrap();
    let root = filled_and_proven(&opened);
    let figures = opened.figures();
    // `big` but for one block, four whole ones of `grown`, and all of `shrunk`, `one` and `deep/same`.
    let held = 2_000_003 - BLOCK + 4 * BLOCK + 200_000 + 100_000 + 500_000;
    assert_eq!(figures.held, held, "{figures:?}");
    let scanned = crate::volume::scan(&bench.source, &FleetKey([3; 32]), BlockSize::for_volume(0));
    assert_eq!(root, scanned.unwrap().0.root);
    let mut expected = big;
    expected[70_000..70_004].copy_from_slice(b"mine");
    fs::write(bench.source.join("big"), expected).unwrap();
    let same = std::process::Command::new("diff")
        .args(["--recursive", "--no-dereference"])
        .args([&bench.source, &store.join("data")])
        .status();
    assert!(same.unwrap().success());
    assert!(!store.join("copies").exists());
}

#[test]
fn a_store_that_was_made_ahead_is_filled_and_proven_as_the_source_is_at_last() {
    let bench = Bench::new(Duration::ZERO);
    for (name, seed) in [("first", 1), ("kept", 2), ("grown", 3), ("gone", 4)] {
        bench.file(name, &random(seed, 100_000 * seed as usize));
    }
    let (place, store) = (
        bench.dir.path().join("place"),
        bench.dir.path().join("store"),
    );
    fs::create_dir(&place).unwrap();
    fs::copy(bench.source.join("kept"), place.join("kept")).unwrap();
    lay_by(&store, &place).unwrap();
    let draft = Draft {
        directory: &store,
        volume: "data",
        devices: false,
    };
    let plan = bench.plan(VolumeId(1));
    draft.make(&plan, &options()).unwrap();
    bench.file("grown", &random(5, 400_000));
    bench.file("between", &random(6, 70_000));
    bench.file("first", b"");
    fs::rename(bench.source.join("gone"), bench.source.join("renamed")).unwrap();
    draft.revise(&plan, &options()).unwrap();
    // As when its answer was lost, and the workload ran on.
    drop(bench.open_volume(VolumeId(1), LONG, true));
    bench.file("grown", &random(7, 500_000));
    bench.file("another", &random(8, 70_000));
    draft.revise(&plan, &options()).unwrap();
    let opened = bench.open_volume(VolumeId(1), LONG, true);
    let root = filled_and_proven(&opened);
    assert_eq!(root, scanned(&bench.source));
    assert_eq!(scanned(&store.join("data")), scanned(&bench.source));
    assert_eq!(
        opened.figures().held,
        200_000,
        "what was copied before is kept"
    );
}
