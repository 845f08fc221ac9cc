//! A served volume over loopback: real files, real sockets, a link with a delay that can be cut.

mod bench;
mod classes;
mod earlier;
mod holes;
mod lasting;
mod mirrored;
mod nbd;
mod stands_in;

use super::*;
use crate::model::fleet::Role;
use crate::model::ids::{PlanId, Signature, VolumeId};
use crate::model::trace::FetchOrder;
use crate::transfer::fetch::{Admit, BLOCK, FetchPlan, Grant};
use crate::transfer::{
    DataKey, DataServer, Door, Hop, LinkKey, Options, ProvidePlan, ProvideVolume, Sealing,
    Whereabouts,
};
use crate::volume::{BlockSize, FleetKey};
use bench::*;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use serde_json::json;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(60);

#[test]
fn a_tree_is_there_at_once_and_its_bytes_come_when_they_are_read() {
    let bench = Bench::new(Duration::ZERO);
    let big = random(1, 1_000_003);
    bench.file("big", &big);
    bench.file("small", b"hello");
    bench.file("empty", b"");
    let hole = File::create(bench.source.join("hole")).unwrap();
    hole.set_len(5 << 20).unwrap();
    hole.write_all_at(b"end", (5 << 20) - 3).unwrap();
    fs::create_dir(bench.source.join("deep")).unwrap();
    bench.file("deep/other", &random(2, 70_000));
    fs::hard_link(bench.source.join("big"), bench.source.join("deep/big")).unwrap();
    std::os::unix::fs::symlink("small", bench.source.join("link")).unwrap();

    let store = bench.open(LONG);
    let before = store.figures();
    assert_eq!((before.on_demand, before.ahead), (0, 0));
    assert!(before.absent >= before.bytes && !before.detached);
    let file = served(&store, "big");
    assert_eq!(file.file.metadata().unwrap().len(), big.len() as u64);
    assert_eq!(file.read(&store, 999_999, 100).unwrap(), big[999_999..]);
    assert_eq!(
        file.read(&store, 65_000, 2000).unwrap(),
        big[65_000..67_000]
    );
    assert_eq!(store.figures().on_demand, 3, "two blocks and the last one");
    let linked = served(&store, "deep/big");
    assert_eq!(linked.number, file.number);
    assert_eq!(linked.read(&store, 0, 10).unwrap(), big[..10]);
    let zeros = served(&store, "hole").read(&store, 1 << 20, 4096).unwrap();
    assert_eq!(zeros, [0; 4096]);

    let filler = Filler::start(&store, FetchOrder::default()).unwrap();
    wait("everything to be here", || store.figures().detached);
    drop(filler);
    let path = |root: &Path| {
        let status = std::process::Command::new("diff")
            .args(["--recursive", "--no-dereference"])
            .arg(&bench.source)
            .arg(root)
            .status();
        assert!(status.unwrap().success());
    };
    path(&bench.dir.path().join("store/data"));
    let is = |name: &str| fs::metadata(bench.dir.path().join(name)).unwrap();
    assert_eq!(
        is("store/data/big").mtime_nsec(),
        is("source/big").mtime_nsec()
    );
    assert_eq!(
        is("store/data/big").nlink(),
        2,
        "nothing of the store is left on it"
    );
    assert!(is("store/data/hole").blocks() < 1000, "holes are holes");
}

fn scanned(path: &Path) -> Signature {
    let (state, _) =
        crate::volume::scan(path, &FleetKey([3; 32]), BlockSize::for_volume(0)).unwrap();
    state.root
}

#[test]
fn what_arrived_is_proven_also_where_it_was_written_over_or_removed_before() {
    let bench = Bench::new(Duration::ZERO);
    bench.file("kept", &random(1, 700_000));
    bench.file("over", &random(2, 300_000));
    bench.file("gone", &random(3, 200_000));
    bench.file("empty", b"");
    bench.file("zeros", &[0; 100_000]);
    let store = bench.open_volume(VolumeId(1), LONG, true);
    assert_eq!(store.root().unwrap(), None, "nothing is here");
    let over = served(&store, "over");
    store
        .write(&over.file, over.number, &random(4, 300_000), 0)
        .unwrap();
    fs::remove_file(bench.dir.path().join("store/data/gone")).unwrap();
    let filler = Filler::start(&store, FetchOrder::default()).unwrap();
    wait("the filler", || filler.is_over());
    let mut root = None;
    wait("the proof", || {
        root = store.root().unwrap();
        root.is_some()
    });
    assert_eq!(root, Some(scanned(&bench.source)));
    assert!(
        !store.figures().detached,
        "the source may be asked until it is proven"
    );
    let list = crate::transfer::fetch::list_root(
        &crate::volume::Confined::open(&bench.source).unwrap(),
        &FleetKey([3; 32]),
    );
    let kept = Store::list_root(&bench.dir.path().join("store"), &FleetKey([3; 32]));
    assert_eq!(list.unwrap().0, kept.unwrap());
}

/// Changes a byte of a file of the source behind everybody's back.
fn flip(bench: &Bench, name: &str, at: usize) {
    let path = bench.source.join(name);
    let times = fs::metadata(&path).unwrap().modified().unwrap();
    let mut bytes = fs::read(&path).unwrap();
    bytes[at] ^= 1;
    fs::write(&path, bytes).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.set_modified(times).unwrap();
}

#[test]
fn a_byte_that_is_not_the_sources_is_found_by_path_and_offset_and_fetched_again() {
    let bench = Bench::new(Duration::ZERO);
    bench.file("one", &random(1, 700_000));
    bench.file("two", &random(2, 300_000));
    bench.file("three", &random(3, 10));
    bench.file("four", &random(4, 100_000));
    let store = bench.open_volume(VolumeId(1), LONG, true);
    let filler = Filler::start(&store, FetchOrder::default()).unwrap();
    wait("the filler", || filler.is_over());
    let proven = || {
        let mut root = None;
        wait("the proof", || {
            root = store.root().unwrap();
            root.is_some()
        });
        root
    };
    let first = proven();
    assert_eq!(first, Some(scanned(&bench.source)));
    assert_eq!(store.doubted(), None);

    // What came of `one` is here still, of `two` the twin has written a byte.
    flip(&bench, "one", 400_000);
    assert_eq!(first, proven(), "nobody doubts it yet");
    assert!(store.doubt().unwrap());
    assert_eq!(proven(), Some(scanned(&bench.source)));
    let told = store.doubted().unwrap();
    assert!(
        told.contains("`one` at offset 393216") && told.contains("fetched again"),
        "{told}"
    );
    let data = bench.dir.path().join("store/data");
    let is_same = |name: &str| {
        fs::read(data.join(name)).unwrap() == fs::read(bench.source.join(name)).unwrap()
    };
    assert!(is_same("one") && is_same("two") && is_same("three"));
    let modified = |path: &Path| fs::metadata(path).unwrap().modified().unwrap();
    assert_eq!(
        modified(&data.join("one")),
        modified(&bench.source.join("one"))
    );

    let two = served(&store, "two");
    store.write(&two.file, two.number, b"twin", 70_000).unwrap();
    // What has the same bytes and took the place of what came is not that.
    let copied = fs::read(data.join("four")).unwrap();
    fs::write(data.join("new"), &copied).unwrap();
    fs::rename(data.join("new"), data.join("four")).unwrap();
    flip(&bench, "two", 100_000);
    flip(&bench, "three", 5);
    flip(&bench, "four", 5);
    assert!(store.doubt().unwrap());
    let root = proven();
    assert_ne!(root, Some(scanned(&bench.source)), "a block is not proven");
    let told = store.doubted().unwrap();
    assert!(
        told.contains("`two` at offset 65536") && told.contains("abort"),
        "{told}"
    );
    assert!(told.contains("`four` at offset 0"), "{told}");
    assert_eq!(fs::read(data.join("four")).unwrap(), copied);
    assert!(is_same("three"));
    assert_eq!(
        &fs::read(data.join("two")).unwrap()[70_000..70_004],
        b"twin"
    );
    assert!(!store.doubt().unwrap(), "it stays as it is");
}

#[test]
fn a_source_that_cannot_be_asked_is_compared_with_once_it_can() {
    let bench = Bench::new(Duration::ZERO);
    bench.file("one", &random(1, 100));
    let store = bench.open_volume(VolumeId(1), LONG, true);
    let filler = Filler::start(&store, FetchOrder::default()).unwrap();
    wait("the filler", || filler.is_over());
    wait("the proof", || store.root().unwrap().is_some());
    bench.wire.cut(true);
    for _ in 0..4 {
        assert!(store.doubt().is_err());
    }
    bench.wire.cut(false);
    assert!(store.doubt().unwrap());
}

#[test]
fn what_somebody_changed_on_the_source_is_named_and_not_fetched_again() {
    let bench = Bench::new(Duration::ZERO);
    bench.file("kept", &random(1, 100_000));
    bench.file("other", &random(2, 100_000));
    let store = bench.open_volume(VolumeId(1), LONG, true);
    let filler = Filler::start(&store, FetchOrder::default()).unwrap();
    wait("the filler", || filler.is_over());
    wait("the proof", || store.root().unwrap().is_some());
    let before = fs::read(bench.dir.path().join("store/data/kept")).unwrap();
    bench.file("kept", b"by somebody");
    assert!(!store.doubt().unwrap());
    let told = store.doubted().unwrap();
    assert!(
        told.contains("`kept`") && !told.contains("`other`"),
        "{told}"
    );
    assert!(told.contains("see who writes there"), "{told}");
    assert_eq!(
        fs::read(bench.dir.path().join("store/data/kept")).unwrap(),
        before
    );
}

#[test]
fn whatever_is_written_before_during_and_after_an_arrival_wins() {
    const LENGTH: usize = 3_000_001;
    for seed in 0..4 {
        let bench = Bench::new(Duration::from_millis(1));
        let mut model = random(seed, LENGTH);
        bench.file("image", &model);
        let store = bench.open(LONG);
        let file = served(&store, "image");
        let mut chance = StdRng::seed_from_u64(seed);
        let mut filler = None;
        for step in 0..250 {
            if step == 40 {
                filler = Some(Filler::start(&store, FetchOrder::default()).unwrap());
            }
            let at = chance.random_range(0..model.len().max(1));
            let length = if chance.random_bool(0.5) {
                chance.random_range(1..9000)
            } else {
                chance.random_range(1..200_000)
            };
            let end = (at + length).min(model.len());
            match chance.random_range(0..10) {
                0..4 => {
                    let read = file.read(&store, at as u64, length).unwrap();
                    assert!(read == model[at..end], "seed {seed}, step {step}, at {at}");
                }
                4..8 => {
                    let bytes = random(step, length);
                    if model.len() < at + length {
                        model.resize(at + length, 0);
                    }
                    model[at..at + length].copy_from_slice(&bytes);
                    store
                        .write(&file.file, file.number, &bytes, at as u64)
                        .unwrap();
                }
                8 => {
                    let hole = chance.random_bool(0.5);
                    model[at..end].fill(0);
                    store
                        .zero(&file.file, file.number, at as u64, (end - at) as u64, hole)
                        .unwrap();
                }
                _ => {
                    let size = chance.random_range(LENGTH / 2..LENGTH + 100_000);
                    model.resize(size, 0);
                    store
                        .truncate(&file.file, file.number, size as u64)
                        .unwrap();
                }
            }
        }
        wait("everything to be here", || store.figures().detached);
        drop(filler);
        assert!(
            fs::read(bench.dir.path().join("store/data/image")).unwrap() == model,
            "seed {seed}"
        );
        assert!(fs::read(bench.source.join("image")).unwrap() == random(seed, LENGTH));
    }
}

#[test]
fn what_came_and_what_was_written_is_there_when_the_store_is_opened_again() {
    let bench = Bench::new(Duration::ZERO);
    let bytes = random(7, 500_000);
    bench.file("image", &bytes);
    let store = bench.open(LONG);
    let file = served(&store, "image");
    file.read(&store, 0, 4096).unwrap();
    store
        .write(&file.file, file.number, b"mine", 100_000)
        .unwrap();
    let absent = store.figures().absent;
    store.detach();
    drop(store);

    bench.wire.cut(true);
    let store = bench.open(Duration::from_millis(300));
    assert_eq!(store.figures().absent, absent);
    let file = served(&store, "image");
    assert_eq!(file.read(&store, 0, 4096).unwrap(), bytes[..4096]);
    assert_eq!(file.read(&store, 100_000, 4).unwrap(), b"mine");
    assert!(is_eio(file.read(&store, 300_000, 4)));
}

#[test]
fn what_lay_beyond_the_end_of_a_file_that_was_cut_at_a_death_does_not_come_back() {
    let bench = Bench::new(Duration::ZERO);
    let bytes = random(8, 500_000);
    bench.file("image", &bytes);
    let store = bench.open(LONG);
    // As after a death between the cut and the marks: the page of the new end was fetched before.
    served(&store, "image").read(&store, 99_999, 1).unwrap();
    store.detach();
    drop(store);
    let here = bench.dir.path().join("store/data/image");
    File::options()
        .write(true)
        .open(&here)
        .unwrap()
        .set_len(100_000)
        .unwrap();
    let store = bench.open(LONG);
    let file = served(&store, "image");
    assert_eq!(file.read(&store, 0, 4096).unwrap(), bytes[..4096]);
    store.truncate(&file.file, file.number, 300_000).unwrap();
    let filler = Filler::start(&store, FetchOrder::default()).unwrap();
    wait("everything to be here", || store.figures().detached);
    drop(filler);
    let mut expected = bytes[..100_000].to_vec();
    expected.resize(300_000, 0);
    assert!(fs::read(here).unwrap() == expected);
}

#[test]
fn the_end_of_a_file_that_was_cut_stays_over_a_death_of_the_host() {
    let bench = Bench::new(Duration::ZERO);
    let bytes = random(8, 500_000);
    bench.file("image", &bytes);
    let store = bench.open(LONG);
    let file = served(&store, "image");
    store.truncate(&file.file, file.number, 100_000).unwrap();
    store.detach();
    drop((file, store));
    // What is not durable is of another boot.
    let live = bench.dir.path().join("store/live");
    let live = File::options().write(true).open(live).unwrap();
    live.write_all_at(&[b'x'; 36], 8).unwrap();
    let store = bench.open(LONG);
    let file = served(&store, "image");
    store.truncate(&file.file, file.number, 300_000).unwrap();
    let filler = Filler::start(&store, FetchOrder::default()).unwrap();
    wait("everything to be here", || store.figures().detached);
    drop(filler);
    let mut expected = bytes[..100_000].to_vec();
    expected.resize(300_000, 0);
    assert!(fs::read(bench.dir.path().join("store/data/image")).unwrap() == expected);
}

#[test]
fn a_file_that_is_removed_while_it_is_open_is_read_to_its_end() {
    let bench = Bench::new(Duration::ZERO);
    let bytes = random(11, 3_000_000);
    bench.file("open", &bytes);
    bench.file("closed", &bytes);
    let store = bench.open(LONG);
    let file = served(&store, "open");
    let held = store.hold(file.file.metadata().unwrap().ino());
    for name in ["open", "closed"] {
        fs::remove_file(bench.dir.path().join("store/data").join(name)).unwrap();
    }
    let filler = Filler::start(&store, FetchOrder::default()).unwrap();
    wait("the end of the source", || store.figures().detached);
    assert!(file.read(&store, 0, bytes.len()).unwrap() == bytes);
    assert!(
        store.figures().absent >= bytes.len() as u64,
        "what nobody has open was fetched"
    );
    drop((filler, held));
}

#[test]
fn the_names_of_a_file_are_counted_without_the_stores_own_also_while_that_is_removed() {
    let bench = Bench::new(Duration::ZERO);
    bench.file("one", &random(1, 10));
    let store = bench.open(LONG);
    let one = served(&store, "one");
    store.write(&one.file, one.number, &[7; 10], 0).unwrap();
    let looks = AtomicU32::new(0);
    let look = || {
        let stat = nix::sys::stat::fstat(&one.file);
        if looks.fetch_add(1, Ordering::Relaxed) == 0 {
            assert!(store.settle(one.number.unwrap()).unwrap());
        }
        stat
    };
    assert_eq!(store.links(look).unwrap().1, 1);
    assert_eq!(looks.load(Ordering::Relaxed), 2);
    let links = store.links(|| nix::sys::stat::fstat(&one.file));
    assert_eq!(links.unwrap().1, 1);
}

#[test]
fn an_origin_that_has_no_name_any_more_is_let_go_of_where_it_is_whole() {
    let bench = Bench::new(Duration::ZERO);
    let bytes = random(13, 10);
    bench.file("absent", &bytes);
    bench.file("whole", &bytes);
    let store = bench.open(LONG);
    let (absent, whole) = (served(&store, "absent"), served(&store, "whole"));
    assert!(whole.read(&store, 0, 10).unwrap() == bytes);
    for one in [&absent, &whole] {
        let (number, inode) = (one.number.unwrap(), one.file.metadata().unwrap().ino());
        let name = format!("store/origins/{number}");
        fs::remove_file(bench.dir.path().join(name)).unwrap();
        assert!(store.settle(number).unwrap());
        let kept = (!store.is_whole(number)).then_some(number);
        assert_eq!(store.number(inode), kept);
    }
}

#[test]
fn a_removed_file_that_is_opened_just_as_it_is_let_go_of_stays_with_the_source() {
    let bench = Bench::new(Duration::ZERO);
    let bytes = random(12, 300_000);
    bench.file("open", &bytes);
    let store = bench.open(LONG);
    let file = served(&store, "open");
    fs::remove_file(bench.dir.path().join("store/data/open")).unwrap();
    let number = file.number.unwrap();
    assert!(store.is_removed(number), "who lets go of it looks first");
    let inode = file.file.metadata().unwrap().ino();
    let held = store.hold(inode).unwrap();
    assert!(!store.settle(number).unwrap());
    assert!(file.read(&store, 0, bytes.len()).unwrap() == bytes);
    drop(held);
    assert!(store.settle(number).unwrap());
    assert!(store.hold(inode).is_none());
}

#[test]
fn without_the_link_a_read_waits_then_fails_and_goes_on_when_it_is_back() {
    let bench = Bench::new(Duration::ZERO);
    let bytes = random(9, 2_000_000);
    bench.file("image", &bytes);
    let store = bench.open(Duration::from_millis(400));
    let file = served(&store, "image");
    assert_eq!(file.read(&store, 0, 10).unwrap(), bytes[..10]);
    bench.wire.cut(true);
    let began = Instant::now();
    assert!(is_eio(file.read(&store, 1_000_000, 10)));
    assert!(began.elapsed() >= Duration::from_millis(400), "it waited");
    assert_eq!(
        file.read(&store, 5, 10).unwrap(),
        bytes[5..15],
        "what is here is"
    );
    store
        .write(&file.file, file.number, &[4; 4096], 8192 * 100)
        .unwrap();
    bench.wire.cut(false);
    wait("the link", || file.read(&store, 1_000_000, 10).is_ok());
    assert_eq!(
        file.read(&store, 1_000_000, 10).unwrap(),
        bytes[1_000_000..1_000_010]
    );
    assert_eq!(file.read(&store, 8192 * 100, 4096).unwrap(), [4; 4096]);
}

#[test]
fn who_waits_gets_an_error_when_the_source_is_let_go_of() {
    let bench = Bench::new(Duration::ZERO);
    bench.file("image", &random(9, 2_000_000));
    let store = bench.open(LONG);
    let file = served(&store, "image");
    bench.wire.cut(true);
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| file.read(&store, 1_000_000, 10));
        wait("the question", || !store.recent.lock().unwrap().is_empty());
        let began = Instant::now();
        store.detach();
        assert!(is_eio(waits.join().unwrap()));
        assert!(began.elapsed() < LONG / 2, "it waited for nobody");
    });
}

#[test]
fn a_file_that_is_gone_on_the_source_is_an_error_and_no_zeros() {
    let bench = Bench::new(Duration::ZERO);
    bench.file("gone", &random(3, 100_000));
    bench.file("stays", &random(4, 100_000));
    let store = bench.open(LONG);
    fs::remove_file(bench.source.join("gone")).unwrap();
    assert!(is_eio(served(&store, "gone").read(&store, 0, 10)));
    let stays = served(&store, "stays").read(&store, 0, 100_000).unwrap();
    assert!(stays == random(4, 100_000));
    assert!(store.figures().refused > 0);
}

#[test]
fn what_a_trace_found_hot_comes_first_and_what_is_read_goes_before_the_rest() {
    let bench = Bench::new(Duration::from_millis(2));
    for name in ["a", "b", "c"] {
        bench.file(name, &random(5, 8 << 20));
    }
    let store = bench.open(LONG);
    let (hot_from, hot_length) = (4 << 20, 1 << 20);
    let hot = json!({"files": [hex::encode("c")], "ranges": [[0, hot_from, hot_length]]});
    let first = served(&store, "a");
    let filler = Filler::start(&store, serde_json::from_value(hot).unwrap()).unwrap();
    let last = served(&store, "c");
    wait("the hot range", || {
        !store.waits(last.number, hot_from, hot_length)
    });
    assert!(
        store.waits(first.number, 0, 8 << 20),
        "the hot range came before the first file"
    );
    wait("everything to be here", || store.figures().detached);
    drop(filler);
}

#[test]
fn many_random_reads_share_the_round_trips() {
    const READS: usize = 512;
    let round_trip = Duration::from_millis(30);
    let bench = Bench::new(round_trip / 2);
    let bytes = random(8, 64 << 20);
    bench.file("image", &bytes);
    let store = bench.open(LONG);
    let file = served(&store, "image");
    let mut chance = StdRng::seed_from_u64(1);
    let places: Vec<u64> = (0..READS)
        .map(|_| chance.random_range(0..(64 << 20) / 4096) * 4096)
        .collect();
    file.read(&store, 0, 1).unwrap();
    let began = Instant::now();
    let next = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..64 {
            scope.spawn(|| {
                while let Some(&place) = places.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let read = file.read(&store, place, 4096).unwrap();
                    assert!(read == bytes[place as usize..place as usize + 4096]);
                }
            });
        }
    });
    let took = began.elapsed();
    let alone = round_trip * READS as u32;
    println!(
        "{READS} random reads of 4 KiB, 64 at a time, round trip {round_trip:?}: {took:?}; one after another {alone:?}"
    );
    // One in the other's wake would take all of it; at this depth a sixty-fourth is possible.
    assert!(took < alone / 4, "{took:?}");
}

#[test]
fn a_volume_of_one_file_is_a_tree_with_that_file() {
    let bench = Bench::new(Duration::ZERO);
    let bytes = random(6, 300_000);
    bench.file("disk.img", &bytes);
    bench.file("neighbour", b"not of this volume");
    let store = bench.open_volume(VolumeId(2), LONG, false);
    let file = served(&store, "content");
    assert!(file.read(&store, 1000, 300_000).unwrap() == bytes[1000..]);
    let data = bench.dir.path().join("store/data");
    assert_eq!(fs::read_dir(data).unwrap().count(), 1);
}

#[test]
fn what_cannot_be_kept_is_told_and_comes_once_it_can() {
    let bench = Bench::new(Duration::ZERO);
    bench.file("one", &random(9, 300_000));
    let store = bench.open(LONG);
    let origin = bench.dir.path().join("store/origins/0");
    let aside = bench.dir.path().join("aside");
    fs::rename(&origin, &aside).unwrap();
    fs::create_dir(&origin).unwrap();
    let mut filler = Filler::start(&store, FetchOrder::default()).unwrap();
    wait("the filler", || filler.is_over());
    let told = store.unkept().unwrap();
    assert!(
        told.contains("volume data") && told.contains("free space"),
        "{told}"
    );
    assert!(
        store.figures().refused > 0,
        "nobody would know that more is to be asked for"
    );
    fs::remove_dir(&origin).unwrap();
    fs::rename(&aside, &origin).unwrap();
    filler = Filler::start(&store, FetchOrder::default()).unwrap();
    wait("everything to be here", || filler.is_over());
    assert_eq!((store.figures().absent, store.unkept()), (0, None));
}
