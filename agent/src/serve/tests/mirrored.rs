//! What a mirror makes of a death in the middle of a change, and of a log that lost some.

use super::*;
use std::os::unix::fs::PermissionsExt as _;

/// A store whose mirror logs what is changed, to a source that is away.
fn apart(bench: &Bench) -> Arc<Store> {
    bench.wire.cut(true);
    let store = bench.open(LONG);
    store.mirror(Duration::ZERO).unwrap();
    store
}

fn note(bench: &Bench) -> PathBuf {
    bench.dir.path().join("store/mirror/intended")
}

/// Renames in the mirrored tree, and gives what a death before it was logged leaves of the note.
fn rename(bench: &Bench, store: &Store, (from, to): (&str, &str), exchange: bool) -> Vec<u8> {
    let mirror = store.logs_to().unwrap();
    let _turn = mirror.turn();
    let data = bench.dir.path().join("store/data");
    let (old, new) = (data.join(from), data.join(to));
    let intent = Intent::Renamed {
        from: from.into(),
        to: to.into(),
        exchange,
        inode: old.metadata().unwrap().ino(),
    };
    mirror.intend(&intent);
    let noted = fs::read(note(bench)).unwrap();
    if exchange {
        reuse::exchange(&old, &new).unwrap();
    } else {
        fs::rename(&old, &new).unwrap();
    }
    mirror.log(store, &intent, None);
    noted
}

#[test]
fn a_rename_is_in_the_mirror_once_whether_the_agent_died_before_or_behind_its_record() {
    for (exchange, dies_before) in [(false, false), (false, true), (true, false), (true, true)] {
        let bench = Bench::new(Duration::ZERO);
        bench.file("one", b"one");
        bench.file("two", b"two");
        drop(bench.open(LONG));
        let store = apart(&bench);
        rename(&bench, &store, ("two", "three"), false);
        let log = bench.dir.path().join("store/mirror/log");
        let before = fs::metadata(&log).unwrap().len();
        let noted = rename(&bench, &store, ("one", "three"), exchange);
        assert_eq!(store.mirrored().unwrap().changes, 2);
        drop(store);
        fs::write(note(&bench), noted).unwrap();
        if dies_before {
            let log = File::options().write(true).open(&log).unwrap();
            log.set_len(before).unwrap();
        }
        for _ in 0..2 {
            let store = apart(&bench);
            let mirrored = store.mirrored().unwrap();
            assert_eq!(mirrored.changes, 2, "{exchange} {dies_before}");
            assert!(store.logs_to().is_some(), "{mirrored:?}");
        }
    }
}

#[test]
fn what_an_earlier_agent_was_changing_when_it_died_is_logged_or_the_mirror_ends() {
    let written = Intent::Written {
        path: b"one".into(),
        offset: 0,
        length: 3,
    };
    let renamed = Intent::Renamed {
        from: b"one".into(),
        to: b"two".into(),
        exchange: false,
        inode: 7,
    };
    let noted = |intent: &Intent| {
        let mut bytes = Vec::new();
        intent.encode(&mut bytes);
        // Of a longer one before.
        [&(bytes.len() as u32).to_le_bytes()[..], &bytes, b"behind"].concat()
    };
    // What it left, and how many changes are in the log then, where that goes on.
    let cases = [
        (vec![], Some(0)),
        (vec![0; 30], Some(0)),
        (noted(&written), Some(2)),
        (noted(&renamed), None),
        (noted(&written)[..20].to_vec(), None),
    ];
    for (left, logged) in cases {
        let bench = Bench::new(Duration::ZERO);
        bench.file("one", b"one");
        let store = bench.open(LONG);
        let one = served(&store, "one");
        assert_eq!(one.read(&store, 0, 3).unwrap(), b"one");
        drop(store);
        drop(apart(&bench));
        let former = bench.dir.path().join("store/mirror/pending");
        fs::write(&former, &left).unwrap();
        for _ in 0..2 {
            let store = apart(&bench);
            let mirrored = store.mirrored().unwrap();
            assert_eq!(store.logs_to().is_some(), logged.is_some(), "{left:?}");
            assert_eq!(mirrored.changes, logged.unwrap_or(0), "{left:?}");
            assert!(!former.exists());
        }
    }
}

#[test]
fn a_log_that_lost_what_was_noted_to_be_in_it_ends_the_mirror() {
    let bench = Bench::new(Duration::ZERO);
    bench.file("one", b"one");
    drop(bench.open(LONG));
    let store = apart(&bench);
    rename(&bench, &store, ("one", "two"), false);
    let log = bench.dir.path().join("store/mirror/log");
    let before = fs::metadata(&log).unwrap().len();
    rename(&bench, &store, ("two", "three"), false);
    drop(store);
    assert!(apart(&bench).logs_to().is_some());
    let file = File::options().write(true).open(&log).unwrap();
    file.set_len(before).unwrap();
    let store = apart(&bench);
    let why = store.mirrored().unwrap().unmirrored.unwrap();
    assert!(why.contains("did not take all of its log"), "{why}");
    assert!(store.logs_to().is_none());
}

#[test]
fn nobody_else_reads_what_is_kept_of_a_volume() {
    let bench = Bench::new(Duration::ZERO);
    bench.file("one", b"one");
    let directory = bench.dir.path().join("store");
    // As an earlier attempt may have left it.
    fs::create_dir(&directory).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_ne!(mode(&directory), 0o700);
    fs::set_permissions(&bench.source, fs::Permissions::from_mode(0o751)).unwrap();
    drop(bench.open(LONG));
    assert_eq!(mode(&directory), 0o700);
    // As an agent before that left it.
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).unwrap();
    drop(apart(&bench));
    assert_eq!(mode(&directory), 0o700);
    assert_eq!(mode(&directory.join("mirror/log")), 0o600);
    assert_eq!(mode(&directory.join("data")), 0o751, "it takes its place");
    let place = bench.dir.path().join("place");
    fs::create_dir(&place).unwrap();
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).unwrap();
    lay_by(&directory, &place).unwrap();
    assert_eq!(mode(&directory), 0o700);

    let (others, link) = (
        bench.dir.path().join("others"),
        bench.dir.path().join("link"),
    );
    fs::create_dir(&others).unwrap();
    fs::set_permissions(&others, fs::Permissions::from_mode(0o755)).unwrap();
    std::os::unix::fs::symlink(&others, &link).unwrap();
    assert!(lay_by(&link, &place).is_err());
    assert_eq!(mode(&others), 0o755, "it is somebody else's");
}
