//! The NBD server under clients that say anything.

use super::*;

/// What an NBD client says from its first byte to its good-bye: it wants structured replies and the map of `disk.img`,
/// names that, reads, writes, clears, flushes and asks what the file consists of.
fn nbd_session() -> Vec<u8> {
    let mut said = 3_u32.to_be_bytes().to_vec();
    let name = [&8_u32.to_be_bytes(), b"disk.img".as_slice()].concat();
    let context = [&15_u32.to_be_bytes(), b"base:allocation".as_slice()].concat();
    let mapped = [&*name, &1_u32.to_be_bytes(), &*context].concat();
    let chosen = [&*name, &[0, 0]].concat();
    for (option, data) in [
        (8_u32, vec![]),
        (9, mapped.clone()),
        (10, mapped),
        (7, chosen),
    ] {
        said.extend(b"IHAVEOPT");
        said.extend(option.to_be_bytes());
        said.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        said.extend(data);
    }
    for (kind, length) in [
        (0_u16, 5000_u32),
        (1, 8),
        (6, 4096),
        (0, 150_000),
        (4, 512),
        (7, 199_000),
        (3, 0),
        (2, 0),
    ] {
        said.extend(0x2560_9513_u32.to_be_bytes());
        said.extend([0, 0]);
        said.extend(kind.to_be_bytes());
        said.extend(u64::from(kind).to_be_bytes());
        said.extend(1000_u64.to_be_bytes());
        said.extend(length.to_be_bytes());
        if kind == 1 {
            said.extend(b"eight of");
        }
    }
    said
}

/// The cookies of all requests but the good-bye: those of reads twice.
const WHOLE: [u64; 7] = [0, 0, 1, 3, 4, 6, 7];

/// The cookies of what was done without an error, in order. What a read or a map consists of depends on what others
/// wrote, and in which order answers come on who was faster.
fn answered(heard: &[u8]) -> Vec<u64> {
    let number = |at: usize, length: usize| {
        let bytes = &heard[at..at + length];
        bytes
            .iter()
            .fold(0, |number, byte| number << 8 | u64::from(*byte))
    };
    let (mut at, mut cookies) = (18, Vec::new());
    while at < heard.len() {
        match number(at, 4) {
            // The reply to an option.
            0x0003_e889 => at += 20 + number(at + 16, 4) as usize,
            0x6744_6698 => {
                assert_eq!(number(at + 4, 4), 0, "an error number");
                cookies.push(number(at + 8, 8));
                at += 16;
            }
            0x668e_33ef => {
                assert!(number(at + 6, 2) < 0x8000, "an error chunk");
                if number(at + 4, 2) & 1 != 0 {
                    cookies.push(number(at + 8, 8));
                }
                at += 20 + number(at + 16, 4) as usize;
            }
            other => panic!("{other:x} is no answer"),
        }
    }
    cookies.sort_unstable();
    cookies
}

#[test]
fn whatever_an_nbd_client_says_the_next_one_is_served() {
    use std::os::unix::net::UnixStream;
    let bench = Bench::new(Duration::ZERO);
    bench.file("disk.img", &random(1, 200_000));
    let store = bench.open(LONG);
    let socket = bench.dir.path().join("nbd.sock");
    let _server =
        NbdServer::bind(&NbdAddress::Unix(socket.clone()), Arc::clone(&store), false).unwrap();
    let answer = |said: &[u8]| {
        let mut client = UnixStream::connect(&socket).unwrap();
        client.set_read_timeout(Some(LONG)).unwrap();
        // It may hang up before it has heard everything.
        let _ = client.write_all(said);
        let _ = client.shutdown(Shutdown::Write);
        let mut heard = Vec::new();
        let ended = client.read_to_end(&mut heard);
        let hangs = ended.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock);
        assert!(!hangs, "it does not end with {said:?}");
        heard
    };
    let whole = nbd_session();
    assert_eq!(answered(&answer(&whole)), WHOLE);
    let seed = rand::rng().random();
    println!("seed {seed}");
    let mut chance = StdRng::seed_from_u64(seed);
    for _ in 0..400 {
        let mut said = whole.clone();
        for _ in 0..chance.random_range(1..5) {
            let at = chance.random_range(0..said.len());
            match chance.random_range(0..4) {
                0 => said[at] = chance.random(),
                1 => said[at] ^= 1 << chance.random_range(0..8),
                2 => said.truncate(at.max(1)),
                _ => said[at] = [0, 0x7f, 0x80, 0xff][chance.random_range(0..4)],
            }
        }
        answer(&said);
    }
    assert_eq!(answered(&answer(&whole)), WHOLE);
    let held = fs::read(bench.dir.path().join("store/data/disk.img")).unwrap();
    assert_eq!(held.len(), 200_000);
}
