//! Bad links, bad peers, bad disks: clear errors, nothing silently wrong.

use super::disks::{Disk, tool};
use super::*;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Mutex;

/// What a proxy does to the bytes that pass.
type Meddle = Arc<Mutex<dyn FnMut(&mut [u8], u64) -> bool + Send>>;

/// A TCP proxy in front of `to`. The closure sees each piece, either way, with the count of bytes before
/// it, over all connections; when it returns false, the connection is cut.
pub(super) fn proxy(
    to: SocketAddr,
    meddle: impl FnMut(&mut [u8], u64) -> bool + Send + 'static,
) -> SocketAddr {
    let meddle: Meddle = Arc::new(Mutex::new(meddle));
    let listener = TcpListener::bind(loopback()).unwrap();
    let addr = listener.local_addr().unwrap();
    let count = Arc::new(AtomicU64::new(0));
    std::thread::spawn(move || {
        for caller in listener.incoming().map_while(Result::ok) {
            let Ok(callee) = TcpStream::connect(to) else {
                return;
            };
            let (mut from, mut back) = (caller.try_clone().unwrap(), callee.try_clone().unwrap());
            let (meddle, count) = (Arc::clone(&meddle), Arc::clone(&count));
            let meddle_back = Arc::clone(&meddle);
            let count_back = Arc::clone(&count);
            std::thread::spawn(move || pump(&mut from, &callee, &meddle, &count));
            std::thread::spawn(move || pump(&mut back, &caller, &meddle_back, &count_back));
        }
    });
    addr
}

fn pump(from: &mut TcpStream, mut to: &TcpStream, meddle: &Meddle, count: &AtomicU64) {
    let mut buffer = vec![0; 60_000];
    while let Ok(n) = from.read(&mut buffer) {
        let before = count.fetch_add(n as u64, Ordering::SeqCst);
        let on = n > 0 && (meddle.lock().unwrap())(&mut buffer[..n], before);
        if !on || to.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Both);
    let _ = from.shutdown(std::net::Shutdown::Both);
}

fn some_tree(root: &Path) {
    fs::create_dir(root.join("dir")).unwrap();
    for n in 0..300 {
        fs::write(root.join(format!("dir/small-{n}")), noise(n, 3000)).unwrap();
    }
    fs::write(root.join("large"), noise(7, 12 << 20)).unwrap();
}

#[test]
fn bytes_flipped_on_the_wire_are_noticed_and_sent_again() {
    for (way, engine) in every() {
        let bench = Bench::new(engine);
        some_tree(&bench.source);
        let mut flips = 0;
        let flip = move |bytes: &mut [u8], before: u64| {
            // Not in the greeting, whose failure is another case.
            if flips < 3 && before > 1_000_000 * (flips + 1) {
                let middle = bytes.len() / 2;
                bytes[middle] ^= 0x40;
                flips += 1;
            }
            true
        };
        let (target, relay) = (bench.server.addr(), bench.relay.addr());
        let path = if way == Way::Direct {
            bench.path_to(way, proxy(target, flip), relay)
        } else {
            bench.path_to(way, target, proxy(relay, flip))
        };
        let mut sender = bench.sender(path);
        let (_, report) = bench.send(&mut sender, 1, None).unwrap();
        assert_eq!(report.root, report.target_root, "{way:?}");
        bench.assert_equal();
    }
}

#[test]
fn a_flip_in_every_record_ends_in_an_error_that_names_the_volume() {
    let bench = Bench::new(EngineChoice::Auto);
    some_tree(&bench.source);
    let flip = |bytes: &mut [u8], before: u64| {
        if before > 1000 {
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
        }
        true
    };
    let path = bench.path_to(
        Way::Direct,
        proxy(bench.server.addr(), flip),
        bench.relay.addr(),
    );
    let error = bench.send(&mut bench.sender(path), 1, None).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("volume data"), "{text}");
    assert!(matches!(
        error,
        SendError::Link {
            source: LinkError::Lost { .. },
            ..
        }
    ));
}

#[test]
fn a_link_cut_again_and_again_resumes_where_it_was() {
    for (way, engine) in every() {
        let bench = Bench::new(engine);
        some_tree(&bench.source);
        let mut cuts = 0;
        let cut = move |_: &mut [u8], before: u64| {
            if cuts < 5 && before > 1_500_000 * (cuts + 1) {
                cuts += 1;
                return false;
            }
            true
        };
        let (target, relay) = (bench.server.addr(), bench.relay.addr());
        let path = bench.path_to(way, proxy(target, cut), relay);
        let mut sender = bench.sender(path);
        let (_, report) = bench.send(&mut sender, 1, None).unwrap();
        assert_eq!(report.root, report.target_root, "{way:?}");
        bench.assert_equal();
    }
}

#[test]
fn a_device_started_anew_in_the_middle_is_sent_only_what_it_lacks() {
    for (way, of_target) in [
        (Way::Direct, true),
        (Way::ViaSpool, true),
        (Way::ViaSpool, false),
        (Way::SealReturn, false),
        (Way::SealForward, true),
        (Way::SealForward, false),
    ] {
        let bench = Bench::new(EngineChoice::Auto);
        some_tree(&bench.source);
        fs::write(bench.source.join("larger"), noise(8, 60 << 20)).unwrap();
        let path = bench.path(way);
        let mut sender = bench.sender(path);
        let (again, report) = std::thread::scope(|scope| {
            let restart = scope.spawn(|| {
                let progress = || bench.server.progress(&bench.plan).unwrap().remove(0);
                while progress().bytes_written < 20 << 20 {
                    std::thread::sleep(Duration::from_millis(1));
                }
                let before = progress();
                // As after a restart: admitted, with nothing remembered.
                if of_target {
                    bench.admit_target(&bench.target);
                } else {
                    bench.path(way);
                }
                assert_eq!(before.complete, None, "{way:?}: it was over already");
                before.bytes_again
            });
            let (_, report) = bench.send(&mut sender, 1, None).unwrap();
            (restart.join().unwrap(), report)
        });
        assert_eq!(report.root, report.target_root, "{way:?}");
        bench.assert_equal();
        let after = bench.server.progress(&bench.plan).unwrap().remove(0);
        assert!(
            again + after.bytes_again < (20 << 20) / 100,
            "{way:?}: {after:?}"
        );
    }
}

#[test]
fn another_version_of_the_protocol_is_refused_by_its_number() {
    let bench = Bench::new(EngineChoice::Auto);
    some_tree(&bench.source);
    let listener = TcpListener::bind(loopback()).unwrap();
    let addr = listener.local_addr().unwrap();
    let later = std::thread::spawn(move || {
        let (mut caller, _) = listener.accept().unwrap();
        let greeting: Vec<u8> = b"LIFEBT\x00\x09".iter().copied().chain([3; 32]).collect();
        caller.write_all(&greeting).unwrap();
        let mut answer = Vec::new();
        let _ = caller.read_to_end(&mut answer);
    });
    let path = bench.path_to(Way::Direct, addr, addr);
    let error = bench.send(&mut bench.sender(path), 1, None).unwrap_err();
    later.join().unwrap();
    let text = error.to_string();
    assert!(text.contains("version 9 of the data protocol"), "{text}");
}

#[test]
fn a_wrong_link_key_is_refused_at_once_and_says_so() {
    let bench = Bench::new(EngineChoice::Auto);
    some_tree(&bench.source);
    let path = DataPath::Direct {
        target: Hop {
            addr: bench.server.addr(),
            link_key: LinkKey([0; 32]),
        },
        data_key: DataKey(DATA),
    };
    let started = Instant::now();
    let error = bench.send(&mut bench.sender(path), 1, None).unwrap_err();
    assert!(error.to_string().contains("refused"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(1));
    assert!(!bench.target.exists(), "nothing was touched");
}

#[test]
fn a_wrong_data_key_opens_nothing() {
    let bench = Bench::new(EngineChoice::Auto);
    some_tree(&bench.source);
    let path = DataPath::Direct {
        target: Hop {
            addr: bench.server.addr(),
            link_key: LinkKey(TO_TARGET),
        },
        data_key: DataKey([0; 32]),
    };
    let error = bench.send(&mut bench.sender(path), 1, None).unwrap_err();
    assert!(error.to_string().contains("does not open"), "{error}");
    assert_eq!(fs::read_dir(&bench.target).unwrap().count(), 0);
}

#[test]
fn a_device_that_only_transfers_never_sees_plain_bytes() {
    let bench = Bench::new(EngineChoice::Auto);
    let secret = b"the plain text that nobody else may see".repeat(2000);
    fs::write(bench.source.join("secret-name"), &secret).unwrap();
    let seen: Arc<Mutex<Vec<u8>>> = Arc::default();
    let keep = Arc::clone(&seen);
    let spy = move |bytes: &mut [u8], _: u64| {
        keep.lock().unwrap().extend_from_slice(bytes);
        true
    };
    let relay = proxy(bench.relay.addr(), spy);
    let path = bench.path_to(Way::ViaSpool, bench.server.addr(), relay);
    bench.send(&mut bench.sender(path), 1, None).unwrap();
    bench.assert_equal();
    let seen = seen.lock().unwrap();
    let contains = |needle: &[u8]| seen.windows(needle.len()).any(|window| window == needle);
    assert!(seen.len() > secret.len());
    assert!(!contains(b"the plain text"));
    assert!(!contains(b"secret-name"));
}

/// Everything that passes, both ways, while a large file is sent by a source and a target that were just started.
fn heard(content: &[u8]) -> Vec<u8> {
    let bench = Bench::new(EngineChoice::Auto);
    fs::write(bench.source.join("large"), content).unwrap();
    let heard: Arc<Mutex<Vec<u8>>> = Arc::default();
    let keep = Arc::clone(&heard);
    let spied = proxy(bench.server.addr(), move |bytes, _| {
        keep.lock().unwrap().extend_from_slice(bytes);
        true
    });
    let path = bench.path_to(Way::Direct, spied, bench.relay.addr());
    bench.send(&mut bench.sender(path), 1, None).unwrap();
    heard.lock().unwrap().clone()
}

#[test]
fn after_a_restart_the_same_records_under_the_same_plan_key_are_sealed_as_never_before() {
    let content = noise(1, 3 << 20);
    let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
    // Data and record numbers are the same, so are the keys: a nonce under a key that was used before would show.
    let first: std::collections::HashSet<u64> = heard(&content).chunks_exact(8).map(word).collect();
    assert!(first.len() > content.len() / 9);
    let again = heard(&content);
    assert!(again.len() > content.len());
    let repeated = again
        .windows(8)
        .filter(|bytes| first.contains(&word(bytes)))
        .count();
    // Headers stand in the clear.
    assert!(repeated < content.len() / 8 / 100, "{repeated} words");
}

#[test]
fn a_dead_target_is_noticed_in_seconds() {
    let bench = Bench::new(EngineChoice::Auto);
    some_tree(&bench.source);
    // Accepts and never speaks.
    let listener = TcpListener::bind(loopback()).unwrap();
    let addr = listener.local_addr().unwrap();
    let path = DataPath::Direct {
        target: Hop {
            addr,
            link_key: LinkKey(TO_TARGET),
        },
        data_key: DataKey(DATA),
    };
    let mut options = options(EngineChoice::Threads);
    options.retries = 1;
    options.patience = Duration::from_millis(500);
    let mut sender = Sender::new(bench.plan.clone(), path, FleetKey(FLEET), options);
    let started = Instant::now();
    let error = bench.send(&mut sender, 1, None).unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(4));
    assert!(error.to_string().contains("failed 2 times"), "{error}");
}

#[test]
fn hostile_and_silent_peers_do_not_hold_up_an_honest_one() {
    let bench = Bench::new(EngineChoice::Auto);
    some_tree(&bench.source);
    let mut peers = Vec::new();
    for n in 0..20_u8 {
        let mut socket = TcpStream::connect(bench.server.addr()).unwrap();
        let garbage = noise(u64::from(n), 4096);
        // It may be cut off while writing.
        let _ = match n % 4 {
            0 => Ok(()),
            1 => socket.write_all(&garbage),
            2 => socket.write_all(b"LIFEBT\x00\x01\xff"),
            _ => socket.write_all(b"GET / HTTP/1.1\r\n\r\n"),
        };
        peers.push(socket);
    }
    let mut sender = bench.sender(bench.path(Way::Direct));
    bench.send(&mut sender, 1, None).unwrap();
    bench.assert_equal();
    // Everyone is cut off in the end.
    for mut socket in peers {
        socket
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        let mut rest = Vec::new();
        // Cut off by reset or by end: both are an end.
        let ended = socket.read_to_end(&mut rest);
        assert!(!matches!(ended, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock));
    }
}

#[test]
fn silent_strangers_make_room_for_an_admitted_peer() {
    let bench = Bench::new(EngineChoice::Auto);
    some_tree(&bench.source);
    // Several times as many as there are places; each could stay for the whole patience.
    let silent: Vec<TcpStream> = (0..200)
        .map(|_| TcpStream::connect(bench.server.addr()).unwrap())
        .collect();
    // Without a second attempt: it must get in while all of them are there.
    let options = Options {
        retries: 0,
        ..options(EngineChoice::Auto)
    };
    let path = bench.path(Way::Direct);
    let mut sender = Sender::new(bench.plan.clone(), path, FleetKey(FLEET), options);
    bench.send(&mut sender, 1, None).unwrap();
    bench.assert_equal();
    drop(silent);
}

#[test]
fn a_peer_that_drips_its_greeting_is_cut_off() {
    let bench = Bench::new(EngineChoice::Auto);
    let mut socket = TcpStream::connect(bench.server.addr()).unwrap();
    let started = Instant::now();
    // Each byte comes in time; the whole does not.
    let dripped = (0..100).find(|_| {
        std::thread::sleep(Duration::from_millis(100));
        socket.write_all(b"L").is_err()
    });
    assert!(dripped.is_some(), "it was never cut off");
    assert!(started.elapsed() < Duration::from_secs(6));
}

/// A small file system of its own, if root may make one.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn new(dir: &Path, bytes: u64) -> Option<Self> {
        Self::with(dir, &format!("size={bytes}"))
    }

    fn with(dir: &Path, size: &str) -> Option<Self> {
        fs::create_dir(dir).unwrap();
        let mounted = nix::mount::mount(
            Some("none"),
            dir,
            Some("tmpfs"),
            nix::mount::MsFlags::empty(),
            Some(size),
        );
        match mounted {
            Ok(()) => Some(Self(dir.to_owned())),
            Err(error) => {
                println!("cannot mount a small tmpfs ({error}): full disks not tested");
                None
            }
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH).unwrap();
    }
}

#[test]
fn a_full_target_is_named_with_what_is_needed_and_free_and_a_roomier_one_works() {
    let bench = Bench::new(EngineChoice::Auto);
    some_tree(&bench.source);
    let dir = bench.source.parent().unwrap().join("small");
    let Some(_disk) = SmallDisk::new(&dir, 5 << 20) else {
        return;
    };
    bench.admit_target(&dir.join("data"));
    for way in [Way::Direct, Way::SealForward] {
        let mut sender = bench.sender(bench.path(way));
        let error = bench.send(&mut sender, 1, None).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("no space left on the target"), "{text}");
        assert!(
            text.contains("volume data") && text.contains("free"),
            "{text}"
        );
        // The sender may hear of it before the receiver's worker has written it down.
        let since = Instant::now();
        let failed = || {
            bench.server.progress(&bench.plan).unwrap()[0]
                .failure
                .is_some()
        };
        while !failed() {
            assert!(
                since.elapsed().as_secs() < 10,
                "the target does not know of its failure"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    bench.admit_target(&bench.target);
    let mut sender = bench.sender(bench.path(Way::Direct));
    bench.send(&mut sender, 1, None).unwrap();
    bench.assert_equal();
}

#[test]
fn a_target_without_inodes_says_inodes_and_not_bytes() {
    let bench = Bench::new(EngineChoice::Auto);
    some_tree(&bench.source);
    let dir = bench.source.parent().unwrap().join("small");
    let Some(_disk) = SmallDisk::with(&dir, "size=64m,nr_inodes=100") else {
        return;
    };
    bench.admit_target(&dir.join("data"));
    let mut sender = bench.sender(bench.path(Way::Direct));
    let error = bench.send(&mut sender, 1, None).unwrap_err().to_string();
    assert!(error.contains("no inodes left on the target"), "{error}");
    assert!(error.contains("remove files there"), "{error}");
    assert!(!error.contains("needed"), "{error}");
}

#[test]
fn a_full_spool_is_named() {
    let bench = Bench::new(EngineChoice::Auto);
    some_tree(&bench.source);
    let Some(_disk) = SmallDisk::new(&bench.spool, 2 << 20) else {
        return;
    };
    let mut sender = bench.sender(bench.path(Way::ViaSpool));
    let error = bench.send(&mut sender, 1, None).unwrap_err();
    assert!(error.to_string().contains("spool"), "{error}");
}

#[test]
fn a_symlink_planted_in_the_target_leads_nowhere() {
    let bench = Bench::new(EngineChoice::Auto);
    some_tree(&bench.source);
    let outside = bench.source.parent().unwrap().join("outside");
    fs::create_dir_all(&outside).unwrap();
    fs::create_dir_all(&bench.target).unwrap();
    std::os::unix::fs::symlink(&outside, bench.target.join("dir")).unwrap();
    std::os::unix::fs::symlink(outside.join("file"), bench.target.join("large")).unwrap();
    let mut sender = bench.sender(bench.path(Way::Direct));
    bench.send(&mut sender, 1, None).unwrap();
    bench.assert_equal();
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
}

#[test]
fn a_paired_device_without_space_for_its_spool_is_told_from_a_target_without_space() {
    let bench = Bench::new(EngineChoice::Auto);
    fs::create_dir(&bench.spool).unwrap();
    if !tool(
        "mount",
        &["-t", "tmpfs", "-o", "size=1m", "tmpfs"],
        &[&bench.spool],
    ) {
        println!("no tmpfs can be mounted here: not tested");
        return;
    }
    let _mounted = Disk {
        dir: bench.spool.clone(),
    };
    fs::write(bench.source.join("large"), noise(1, 8 << 20)).unwrap();
    let mut sender = bench.sender(bench.path(Way::ViaSpool));
    match bench.send(&mut sender, 1, None).unwrap_err() {
        SendError::Link { source, .. } => {
            let told = source.to_string();
            assert!(told.contains("paired device reports"), "{told}");
            assert!(source.may_be_of_relay(), "{told}");
        }
        other => panic!("{other}"),
    }
    let mut sender = bench.sender(bench.path(Way::Direct));
    bench.send(&mut sender, 2, None).unwrap();
    bench.assert_equal();
}
