//! Holes of files whose data is still on the source.

use super::*;
use crate::serve::store::Extent;

#[test]
fn holes_are_learnt_from_the_source_without_fetching_them_and_stay_as_they_were_told() {
    const DATA: [u64; 3] = [0, 40 << 20, (64 << 20) - 5000];
    let bench = Bench::new(Duration::ZERO);
    let path = bench.source.join("sparse");
    let source = File::create(&path).unwrap();
    source.set_len(64 << 20).unwrap();
    for (seed, at) in DATA.into_iter().enumerate() {
        source.write_all_at(&random(seed as u64, 5000), at).unwrap();
    }
    let model = fs::read(&path).unwrap();
    let store = bench.open_volume(VolumeId(1), Duration::from_millis(500), true);
    let file = served(&store, "sparse");
    let parts = |length: u64, cap: usize| {
        let range = 0..length;
        store.extents(&file.file, file.number, range, cap).unwrap()
    };
    let all = |is_hole| Extent {
        length: 64 << 20,
        is_hole,
    };
    assert_eq!(
        parts(64 << 20, 9),
        [all(false)],
        "what is absent is no hole"
    );

    bench.wire.cut(true);
    store.learn_holes(file.number, 0, 64 << 20);
    assert_eq!(parts(64 << 20, 9), [all(false)], "nobody has said so");
    bench.wire.cut(false);
    wait("the holes", || {
        store.learn_holes(file.number, 0, 64 << 20);
        parts(64 << 20, 9).len() > 1
    });
    let told = parts(64 << 20, 9);
    let holes: Vec<bool> = told.iter().map(|part| part.is_hole).collect();
    assert_eq!(holes, [false, true, false, true, false], "{told:?}");
    assert_eq!((told[0].length, told[2].length), (BLOCK, BLOCK));
    let length: u64 = told.iter().map(|part| part.length).sum();
    assert_eq!(length, 64 << 20);
    assert_eq!(parts(64 << 20, 1), told[..1]);
    assert_eq!(
        parts(1000, 9),
        [Extent {
            length: 1000,
            is_hole: false
        }]
    );
    let figures = store.figures();
    assert_eq!((figures.on_demand, figures.ahead), (0, 0));
    assert_eq!(figures.absent, 3 * BLOCK);

    // What the source writes there later is of another time than what was told.
    source.write_all_at(b"late", 10 << 20).unwrap();
    assert_eq!(file.read(&store, 10 << 20, 4).unwrap(), [0; 4]);
    store
        .write(&file.file, file.number, b"mine", 20 << 20)
        .unwrap();
    store.learn_holes(file.number, 0, 64 << 20);
    let filler = Filler::start(&store, FetchOrder::default()).unwrap();
    wait("the filler", || filler.is_over());
    wait("everything to be here", || store.figures().absent == 0);
    let mut expected = model;
    expected[20 << 20..(20 << 20) + 4].copy_from_slice(b"mine");
    let here = bench.dir.path().join("store/data/sparse");
    assert!(fs::read(&here).unwrap() == expected);
    let is_same = |a: &fs::Metadata, b: &fs::Metadata| a.blocks() < 1000 && b.blocks() < 1000;
    assert!(is_same(
        &fs::metadata(here).unwrap(),
        &fs::metadata(path).unwrap()
    ));
    store.detach();
    drop(store);

    // The marks are those of one that is opened again.
    bench.wire.cut(true);
    let store = bench.open_volume(VolumeId(1), Duration::from_millis(100), false);
    assert_eq!(store.figures().absent, 0);
}

#[test]
fn what_arrives_while_the_parts_of_a_file_are_told_is_never_told_as_a_hole() {
    let bench = Bench::new(Duration::ZERO);
    bench.file("dense", &random(3, 48 << 20));
    let store = bench.open(LONG);
    let file = served(&store, "dense");
    store.learn_holes(file.number, 0, 48 << 20);
    let filler = Filler::start(&store, FetchOrder::default()).unwrap();
    while store.figures().absent > 0 {
        let told = store.extents(&file.file, file.number, 0..48 << 20, 4096);
        assert!(told.unwrap().iter().all(|part| !part.is_hole));
    }
    drop(filler);
}
