//! What counts as durable when the disk here failed or the process died, and what is done about the rest.

use super::*;

/// Notes in a store that nobody has open that something could not be written back, as this boot's or another's.
fn note_unsafe(bench: &Bench, note: &[u8]) {
    fs::write(bench.dir.path().join("store/unsafe"), note).unwrap();
}

fn boot() -> Vec<u8> {
    let id = fs::read("/proc/sys/kernel/random/boot_id").unwrap();
    id[..36].to_vec()
}

fn reopened_with(bench: &Bench, note: &[u8]) -> Arc<Store> {
    note_unsafe(bench, note);
    bench.open_volume(VolumeId(1), LONG, true)
}

#[test]
fn a_sync_after_a_write_back_failed_is_refused_as_the_hosts_next_life_has_the_sources_bytes() {
    let bench = Bench::new(Duration::ZERO);
    let bytes = random(1, 300_000);
    bench.file("image", &bytes);
    let store = bench.open_volume(VolumeId(1), LONG, true);
    let file = served(&store, "image");
    store.write(&file.file, file.number, &[7; 4096], 0).unwrap();
    store.sync(&file.file, file.number).unwrap();
    drop((file, store));

    let store = reopened_with(&bench, &[&boot()[..], b"why"].concat());
    assert_eq!(store.unsafe_here().as_deref(), Some("why"));
    let file = served(&store, "image");
    store.sync(&file.file, file.number).unwrap();
    store.write(&file.file, file.number, &[8; 4096], 0).unwrap();
    // In place of what is durable: it is there, or the sync fails of itself.
    store.sync(&file.file, file.number).unwrap();
    store
        .write(&file.file, file.number, &[9; 4096], 65536)
        .unwrap();
    assert!(is_eio(store.sync(&file.file, file.number)));
    assert!(is_eio(store.sync(&file.file, file.number)), "each time");
    assert!(is_eio(store.truncate(&file.file, file.number, 65536 + 100)));
    drop((file, store));

    let live = bench.dir.path().join("store/live");
    let live = File::options().write(true).open(live).unwrap();
    live.write_all_at(&[b'x'; 36], 8).unwrap();
    let store = reopened_with(&bench, &[b'x'; 36]);
    assert_eq!(store.unsafe_here(), None);
    let file = served(&store, "image");
    assert_eq!(file.read(&store, 0, 4096).unwrap(), [8; 4096]);
    let lost = file.read(&store, 65536, 4096).unwrap();
    assert_eq!(lost, bytes[65536..65536 + 4096]);
    store
        .write(&file.file, file.number, &[9; 4096], 65536)
        .unwrap();
    store.sync(&file.file, file.number).unwrap();
}

#[test]
fn a_note_of_a_failed_write_back_that_is_torn_counts_until_the_next_boot() {
    let bench = Bench::new(Duration::ZERO);
    bench.file("image", &random(1, 100));
    drop(bench.open_volume(VolumeId(1), LONG, true));
    for torn in [&boot()[..10], &boot()] {
        let store = reopened_with(&bench, torn);
        let why = store.unsafe_here().unwrap();
        assert!(why.contains("could not be written back"), "{why}");
        drop(store);
        let again = bench.open_volume(VolumeId(1), LONG, true);
        assert_eq!(again.unsafe_here(), Some(why), "the note of it is whole");
    }
    let note = fs::read(bench.dir.path().join("store/unsafe")).unwrap();
    assert!(note.starts_with(&boot()));
    let store = reopened_with(&bench, &[&[b'x'; 36], &note[36..]].concat());
    assert_eq!(store.unsafe_here(), None);
    let note = fs::metadata(bench.dir.path().join("store/unsafe")).unwrap();
    assert_eq!((note.len(), note.blocks()), (4096, 8), "it has its space");
}

#[test]
fn a_removed_file_that_was_let_go_of_before_a_death_is_not_waited_for() {
    let bench = Bench::new(Duration::ZERO);
    bench.file("gone", &random(1, 200_000));
    bench.file("later", &random(2, 200_000));
    let store = bench.open_volume(VolumeId(1), LONG, true);
    let gone = served(&store, "gone").number.unwrap();
    assert!(gone < served(&store, "later").number.unwrap());
    fs::remove_file(bench.dir.path().join("store/data/gone")).unwrap();
    assert!(store.settle(gone).unwrap());
    drop(store);
    let store = bench.open_volume(VolumeId(1), LONG, true);
    let filler = Filler::start(&store, FetchOrder::default()).unwrap();
    wait("the filler", || filler.is_over());
    let mut root = None;
    wait("the proof", || {
        root = store.root().unwrap();
        root.is_some()
    });
    assert_eq!(root, Some(scanned(&bench.source)));
}

#[test]
fn a_background_that_cannot_let_go_of_anything_ends_and_is_not_started_again() {
    let bench = Bench::new(Duration::ZERO);
    bench.file("gone", &random(1, 200_000));
    bench.file("kept", &random(2, 200_000));
    drop(bench.open_volume(VolumeId(1), LONG, true));
    let store = reopened_with(&bench, &[&boot()[..], b"why"].concat());
    let gone = served(&store, "gone");
    // Something of it is here, and not durable; nothing of the rest comes.
    store.write(&gone.file, gone.number, &[7; 4096], 0).unwrap();
    fs::remove_file(bench.dir.path().join("store/data/gone")).unwrap();
    let filler = Filler::start(&store, FetchOrder::default()).unwrap();
    wait("the filler", || filler.is_over());
    assert!(!store.is_whole(gone.number.unwrap()));
    assert!(!store.is_unfinished());
    assert!(store.root().is_err());
}

#[test]
fn a_background_has_no_more_to_do_once_what_was_refused_came() {
    let bench = Bench::new(Duration::ZERO);
    bench.file("one", &random(9, 300_000));
    let store = bench.open_volume(VolumeId(1), LONG, true);
    let origin = bench.dir.path().join("store/origins/0");
    let aside = bench.dir.path().join("aside");
    fs::rename(&origin, &aside).unwrap();
    fs::create_dir(&origin).unwrap();
    let filler = Filler::start(&store, FetchOrder::default()).unwrap();
    wait("the filler", || filler.is_over());
    assert!(store.figures().refused > 0 && store.is_unfinished());
    fs::remove_dir(&origin).unwrap();
    fs::rename(&aside, &origin).unwrap();
    let filler = Filler::start(&store, FetchOrder::default()).unwrap();
    wait("everything to be here", || filler.is_over());
    assert!(!store.is_unfinished());
}

#[test]
fn the_name_that_a_mend_cut_short_by_a_kill_left_is_let_go_of_and_the_mend_is_done_again() {
    let bench = Bench::new(Duration::ZERO);
    bench.file("image", &random(1, 300_000));
    let store = bench.open_volume(VolumeId(1), LONG, true);
    let filler = Filler::start(&store, FetchOrder::default()).unwrap();
    wait("the filler", || filler.is_over());
    let proven = |store: &Arc<Store>| {
        let mut root = None;
        wait("the proof", || {
            root = store.root().unwrap();
            root.is_some()
        });
        root
    };
    proven(&store);
    drop((filler, store));
    flip(&bench, "image", 70_000);
    // As a kill leaves it within the mend: written, with the store's name.
    let (data, origin) = (
        bench.dir.path().join("store/data/image"),
        bench.dir.path().join("store/origins/0"),
    );
    fs::hard_link(&data, &origin).unwrap();
    let mended = fs::read(bench.source.join("image")).unwrap();
    fs::write(&data, &mended).unwrap();
    let store = bench.open_volume(VolumeId(1), LONG, true);
    assert_eq!(store.root().unwrap(), None, "it is not let go of");
    let filler = Filler::start(&store, FetchOrder::default()).unwrap();
    wait("the filler", || filler.is_over());
    assert!(!origin.exists());
    proven(&store);
    assert!(store.doubt().unwrap());
    assert_eq!(proven(&store), Some(scanned(&bench.source)));
    assert!(!origin.exists(), "nothing of the store is left on it");
    assert!(fs::read(&data).unwrap() == mended);
}

#[test]
fn what_could_not_be_kept_still_comes_after_a_write_back_failed() {
    let bench = Bench::new(Duration::ZERO);
    let bytes = random(9, 300_000);
    bench.file("one", &bytes);
    drop(bench.open_volume(VolumeId(1), LONG, true));
    let store = reopened_with(&bench, &[&boot()[..], b"why"].concat());
    let origin = bench.dir.path().join("store/origins/0");
    let aside = bench.dir.path().join("aside");
    fs::rename(&origin, &aside).unwrap();
    fs::create_dir(&origin).unwrap();
    let filler = Filler::start(&store, FetchOrder::default()).unwrap();
    wait("the filler", || filler.is_over());
    assert!(store.figures().absent > 0 && store.is_unfinished());
    fs::remove_dir(&origin).unwrap();
    fs::rename(&aside, &origin).unwrap();
    let filler = Filler::start(&store, FetchOrder::default()).unwrap();
    wait("everything to be here", || filler.is_over());
    assert_eq!(store.figures().absent, 0);
    assert!(!store.is_unfinished() && !store.is_settled());
}

#[test]
fn what_the_source_does_not_give_is_told_until_it_comes() {
    let bench = Bench::new(Duration::ZERO);
    bench.file("over", &random(1, 5_000));
    bench.file("read", &random(2, 200_000));
    let store = bench.open_volume(VolumeId(1), LONG, true);
    // Of this one only the signature is wanted.
    let over = served(&store, "over");
    store
        .write(&over.file, over.number, &[7; 5_000], 0)
        .unwrap();
    let aside = |name: &str| bench.dir.path().join(name);
    let modified = fs::metadata(&bench.source).unwrap().modified().unwrap();
    for name in ["over", "read"] {
        fs::rename(bench.source.join(name), aside(name)).unwrap();
    }
    let mut filler = Filler::start(&store, FetchOrder::default()).unwrap();
    for name in ["read", "over"] {
        let mut look = |done: &mut dyn FnMut(Option<String>) -> bool| {
            wait(name, || {
                if filler.is_over() && store.is_unfinished() {
                    filler = Filler::start(&store, FetchOrder::default()).unwrap();
                }
                let root = store.root().unwrap();
                assert_eq!(root, None);
                done(store.withheld())
            });
        };
        let mut told = None;
        look(&mut |withheld| {
            told = withheld.filter(|told| told.contains(&format!("`{name}` at offset ")));
            told.is_some()
        });
        fs::rename(aside(name), bench.source.join(name)).unwrap();
        if name == "read" {
            look(&mut |withheld| withheld != told);
        }
        let told = told.unwrap();
        assert!(told.contains("not there any more"), "{told}");
    }
    let directory = File::open(&bench.source).unwrap();
    directory.set_modified(modified).unwrap();
    let mut root = None;
    wait("the proof", || {
        root = store.root().unwrap();
        root.is_some()
    });
    assert_eq!(root, Some(scanned(&bench.source)));
    assert_eq!(store.withheld(), None);
}
