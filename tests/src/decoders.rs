//! Every decoder of bytes from outside, as a function of nothing but bytes: what the fuzzers feed and what the
//! kept corpus is replayed through.
//!
//! A decoder may refuse; it may not panic, and what it accepts must mean the same when it is written again.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use lifeboat::containers::{create, inspect, ops};
use lifeboat::fleet::enrol::JoinToken;
use lifeboat::fleet::pairing::{AuthoriseRequest, Notice};
use lifeboat::fleet::secret::Secret;
use lifeboat::fleet::token::{self, SealedToken};
use lifeboat::health::{Policy, RuleTests, recorded};
use lifeboat::migration::events::{SourceEvent, TargetEvent};
use lifeboat::migration::journal;
use lifeboat::model::control::{
    Arrival, Dismiss, GivenBack, Offer, OfferAccepted, Open, Provided, RelayAccepted, RelayRequest,
    TakeOver, TargetStatus, Whole,
};
use lifeboat::model::fleet::Device;
use lifeboat::model::plan::{Release, SignedRelease};
use lifeboat::model::trace::Trace;
use lifeboat::serve::Intent;
use lifeboat::serve::nbd::wire as nbd;
use lifeboat::serve::presence::{PAGES, Presence, WHOLE};
use lifeboat::telemetry::btf::KernelTypes;
use lifeboat::telemetry::{Heard, understands};
use lifeboat::transfer::LinkKey;
use lifeboat::transfer::engine::{Engine, Read, Write};
use lifeboat::transfer::fetch::wire::Answer;
use lifeboat::transfer::frame::{BODY_CAP, HEADER_LEN, Header};
use lifeboat::transfer::hello;
use lifeboat::transfer::message::Message;
use lifeboat::transfer::payload::{self, Payload, PayloadKind};
use lifeboat::volume::codec::Reader;
use lifeboat::volume::mirror::{Change, Log, Record};
use lifeboat::volume::unused::{Image, Trust, find};
use lifeboat::volume::{BlockSize, Entry};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Tries a decoder on these bytes.
///
/// # Panics
/// The decoder broke.
pub type Decoder = fn(&[u8]);

/// Name and function of each decoder.
pub const DECODERS: [(&str, Decoder); 25] = [
    ("frame", frame),
    ("hello", greeting),
    ("message", message),
    ("payload", payload),
    ("entry", entry),
    ("fetched", fetched),
    ("mirrored", mirrored),
    ("mirror-log", mirror_log),
    ("intent", intent),
    ("presence", presence),
    ("nbd-option", nbd_option),
    ("nbd-request", nbd_request),
    ("trace", trace),
    ("ext4", unused),
    ("xfs", unused),
    ("token", sealed_token),
    ("join-token", join_token),
    ("control", control),
    ("journal", journal_lines),
    ("recording", recording),
    ("kernel-types", kernel_types),
    ("kernel-log", kernel_log),
    ("drives", drives),
    ("runtime", runtime),
    ("policy", policy),
];

fn frame(bytes: &[u8]) {
    if let Some((head, _)) = bytes.split_first_chunk::<HEADER_LEN>()
        && let Ok(header) = Header::decode(head)
    {
        assert!(header.length as usize <= BODY_CAP);
        assert_eq!(header.encode(), *head);
    }
}

/// A socket whose peer sends these bytes and then leaves.
struct Peer<'a>(&'a [u8]);

impl Engine for Peer<'_> {
    fn name(&self) -> &'static str {
        "a scripted peer"
    }

    fn open_files(
        &mut self,
        _: BorrowedFd<'_>,
        _: &[&[u8]],
    ) -> Vec<Result<OwnedFd, nix::errno::Errno>> {
        Vec::new()
    }

    fn read(&mut self, _: &mut [Read<'_>]) {}

    fn write(&mut self, _: &mut [Write<'_>]) {}

    fn send(&mut self, _: BorrowedFd<'_>, _: &[u8], _: Duration) -> io::Result<()> {
        Ok(())
    }

    fn receive(&mut self, _: BorrowedFd<'_>, into: &mut [u8], _: Duration) -> io::Result<()> {
        let (now, later) = self
            .0
            .split_at_checked(into.len())
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        into.copy_from_slice(now);
        self.0 = later;
        Ok(())
    }
}

fn greeting(bytes: &[u8]) {
    let key = || LinkKey([1; 32]);
    let stdin = io::stdin();
    let long = Duration::from_secs(60);
    let agreed = hello::answer(&mut Peer(bytes), stdin.as_fd(), |_| vec![(key(), ())], long);
    assert!(agreed.is_err(), "someone proved a key by guessing");
    let plan = "plan-1".into();
    let agreed = hello::call(&mut Peer(bytes), stdin.as_fd(), &plan, &key(), long);
    assert!(agreed.is_err(), "someone proved a key by guessing");
}

fn message(bytes: &[u8]) {
    if let Ok(message) = Message::decode(bytes) {
        let mut again = Vec::new();
        message.encode(&mut again);
        assert_eq!(Message::decode(&again), Ok(message));
    }
}

fn fetched(bytes: &[u8]) {
    let again = |answer: Answer<'_>| {
        let mut again = Vec::new();
        answer.encode(&mut again);
        again
    };
    if let Ok(answer) = Answer::decode(bytes) {
        let once = again(answer);
        assert!(Answer::decode(&once).is_ok_and(|answer| again(answer) == once));
    }
}

/// A change as the target sends it, and as it is kept on the source.
fn mirrored(bytes: &[u8]) {
    let again = |change: &Change| {
        let mut again = Vec::new();
        change.encode(&mut again);
        again
    };
    if let Ok(change) = Change::decode(bytes) {
        let once = again(&change);
        assert!(Change::decode(&once).is_ok_and(|change| again(&change) == once));
    }
    let mut record = Vec::new();
    let content = bytes;
    Record { number: 1, content }.encode(&mut record);
    let decoded = Record::decode(&mut Reader::new(&record));
    assert!(decoded.is_ok_and(|record| record.content == bytes));
    let _ = Record::decode(&mut Reader::new(bytes));
}

/// The file of a mirror's log, whatever is left of it: its head, and without the gap behind that its records.
fn mirror_log(bytes: &[u8]) {
    let (head, records) = bytes.split_at(bytes.len().min(40));
    let file = tempfile::NamedTempFile::new_in("/dev/shm").expect("a file in memory");
    file.as_file()
        .write_all_at(head, 0)
        .and_then(|()| file.as_file().write_all_at(records, 4096))
        .expect("a file in memory");
    let Ok(mut log) = Log::open(file.path(), || Ok([1; 16])) else {
        return;
    };
    let last = log.last();
    // It may be at its cap.
    let Ok(number) = log.append(b"one more") else {
        return;
    };
    assert_eq!(number, last + 1);
    let opened = Log::open(file.path(), || Ok([1; 16])).expect("it is a log");
    assert_eq!(opened.last(), number);
}

/// What an NBD client says before it has chosen an export.
fn nbd_option(bytes: &[u8]) {
    if let Some(name) = nbd::named(bytes) {
        assert!(name.len() + 6 <= bytes.len());
    }
    if let Some((name, queries)) = nbd::queries(bytes) {
        let lengths = queries.iter().map(|query| 4 + query.len());
        assert_eq!(8 + name.len() + lengths.sum::<usize>(), bytes.len());
    }
}

/// What an NBD client says then.
fn nbd_request(bytes: &[u8]) {
    for head in bytes.as_chunks::<{ nbd::Request::LEN }>().0 {
        if let Ok(request) = nbd::Request::decode(head) {
            assert!(!request.carries() || request.length <= nbd::REQUEST_CAP);
        }
    }
}

/// What was about to be changed, as it is noted.
fn intent(bytes: &[u8]) {
    if let Ok(intent) = Intent::decode(bytes) {
        let mut again = Vec::new();
        intent.encode(&mut again);
        assert_eq!(Intent::decode(&again), Ok(intent));
    }
}

/// What is left of the files that say which pages are here.
fn presence(bytes: &[u8]) {
    const START: usize = 64;
    let boot = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let mut of_this_boot = bytes.to_vec();
    for (byte, of) in of_this_boot
        .iter_mut()
        .skip(8)
        .zip(&boot[..36.min(boot.len())])
    {
        *byte = *of;
    }
    let directory = tempfile::tempdir_in("/dev/shm").expect("a directory in memory");
    for (name, bytes) in [("durable", bytes), ("live", &of_this_boot)] {
        std::fs::write(directory.path().join(name), bytes).expect("a file in memory");
    }
    let blocks = (bytes.len().saturating_sub(START) / 8 * 4) as u64;
    let open = || {
        let real = (0..blocks).map(|_| WHOLE);
        Presence::open(directory.path(), blocks, real).expect("it is made anew where it is torn")
    };
    let (first, again) = (open(), open());
    assert!(first.absent() <= blocks * u64::from(PAGES));
    assert_eq!(first.absent(), again.absent());
    for block in 0..blocks {
        assert_eq!(first.of(block), again.of(block));
    }
}

fn trace(bytes: &[u8]) {
    // Also with the check that it would have: few bytes get past that by themselves.
    let checked = [bytes, blake3::hash(bytes).as_bytes()].concat();
    for bytes in [bytes, &checked] {
        if let Ok(trace) = Trace::decode(bytes) {
            let again = Trace::decode(&trace.encode());
            assert!(again.is_ok_and(|again| again.encode() == trace.encode()));
        }
    }
}

fn payload(bytes: &[u8]) {
    let mut space = Vec::new();
    let unpacked = payload::unpack(bytes, |len| {
        assert!(len <= BODY_CAP, "a record of {len} bytes was believed");
        space.resize(len, 0);
        &mut space
    });
    let Ok(bytes) = unpacked else { return };
    let _ = PayloadKind::of(bytes);
    for kib in [64, 1024] {
        let Some(block_size) = BlockSize::new(kib << 10) else {
            unreachable!("both are block sizes");
        };
        if let Ok(Payload::Segment(segment)) = Payload::decode(bytes, block_size) {
            assert!(segment.first <= block_size.blocks_of(segment.size));
        }
    }
}

fn entry(bytes: &[u8]) {
    if let Ok(entry) = Entry::decode(&mut Reader::new(bytes)) {
        let parts = entry.path.split(|byte| *byte == b'/');
        for part in parts {
            assert!(part != b".." && part != b".", "{entry:?} leaves its volume");
        }
        let mut again = Vec::new();
        entry.encode(&mut again);
        let decoded = Entry::decode(&mut Reader::new(&again));
        assert!(decoded.is_ok_and(|decoded| decoded.same(&entry)));
    }
}

/// A disk of 1 GiB on which these bytes come again and again, so that every place that they name holds some.
struct Repeated<'a>(&'a [u8]);

impl Image for Repeated<'_> {
    fn size(&self) -> u64 {
        1 << 30
    }

    fn read(&mut self, into: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(into.len() as u64);
        if end.is_none_or(|end| end > self.size()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let start = usize::try_from(offset % self.0.len() as u64).map_err(io::Error::other)?;
        for (byte, from) in into.iter_mut().zip(self.0.iter().cycle().skip(start)) {
            *byte = *from;
        }
        Ok(())
    }
}

fn unused(bytes: &[u8]) {
    if bytes.is_empty() {
        return;
    }
    for trust in [Trust::Hint, Trust::Unmounted] {
        if let Ok(Some(map)) = find(&mut Repeated(bytes), BlockSize::default(), trust) {
            assert!(map.bytes().0 <= 1 << 30);
            let mut last = 0;
            for run in map.runs() {
                assert!(run.start >= last && run.end > run.start && run.end <= 1 << 14);
                last = run.end;
            }
        }
    }
}

fn sealed_token(bytes: &[u8]) {
    if let Ok(sealed) = serde_json::from_slice::<SealedToken>(bytes) {
        assert!(token::open(&Secret::random(), &sealed).is_err());
    }
}

fn join_token(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(token) = text.parse::<JoinToken>()
    {
        let again: Result<JoinToken, _> = token.to_string().parse();
        assert!(again.is_ok());
    }
}

/// What is accepted is the same after another journey.
fn stable<T: Serialize + DeserializeOwned>(bytes: &[u8]) {
    if let Ok(value) = serde_json::from_slice::<T>(bytes)
        && let Ok(once) = serde_json::to_vec(&value)
    {
        let again: T = serde_json::from_slice(&once).expect("it was written by us");
        assert_eq!(serde_json::to_vec(&again).ok(), Some(once));
    }
}

fn control(bytes: &[u8]) {
    stable::<Offer>(bytes);
    stable::<OfferAccepted>(bytes);
    stable::<Open>(bytes);
    stable::<Whole>(bytes);
    stable::<GivenBack>(bytes);
    stable::<Arrival>(bytes);
    stable::<Provided>(bytes);
    stable::<RelayRequest>(bytes);
    stable::<RelayAccepted>(bytes);
    stable::<TakeOver>(bytes);
    stable::<TargetStatus>(bytes);
    stable::<Dismiss>(bytes);
    stable::<SignedRelease>(bytes);
    stable::<Release>(bytes);
    stable::<AuthoriseRequest>(bytes);
    stable::<Notice>(bytes);
    stable::<Device>(bytes);
}

fn journal_lines(bytes: &[u8]) {
    for whole in [
        journal::entries::<SourceEvent>(bytes).map(|(_, whole)| whole),
        journal::entries::<TargetEvent>(bytes).map(|(_, whole)| whole),
    ]
    .into_iter()
    .flatten()
    {
        assert!(whole <= bytes.len());
        assert!(whole == 0 || bytes[whole - 1] == b'\n');
    }
}

fn recording(bytes: &[u8]) {
    if let Ok(end) = recorded(bytes) {
        assert_eq!(end.whole + end.torn, bytes.len());
    }
}

fn kernel_types(bytes: &[u8]) {
    if let Ok(types) = KernelTypes::parse(bytes.to_vec()) {
        let _ = types.offset("task_struct.pid");
        let _ = types.offset("sock.__sk_common.skc_dport");
        let _ = types.tracepoint_arguments("sched_switch");
    }
}

fn kernel_log(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let mut heard = Heard::default();
    heard.hear(&text);
    assert!(heard.count() <= text.lines().count() as u64);
}

fn drives(bytes: &[u8]) {
    let _ = understands(bytes);
    // Also with the checksums that SMART pages would have.
    let mut checked = bytes.to_vec();
    for page in checked.as_chunks_mut::<512>().0 {
        let sum = page[..511]
            .iter()
            .fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        page[511] = sum.wrapping_neg();
    }
    assert!(understands(&checked) || checked.len() < 1024);
}

fn runtime(bytes: &[u8]) {
    let _ = ops::event(bytes);
    let _ = ops::unframe(bytes);
    let Ok(answer) = serde_json::from_slice::<Value>(bytes) else {
        return;
    };
    let _ = inspect::container(&answer, "/run/runtime.sock", Some("REGISTRATION"));
    for podman in [false, true] {
        let body = create::body(&answer, "image", true, podman);
        let _ = create::differences(&answer, &body);
    }
    assert!(create::differences(&answer, &answer).is_empty());
}

fn policy(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    if let Err(error) = Policy::parse(text, "policy.yaml") {
        assert!(error.to_string().starts_with("policy.yaml:"), "{error}");
    }
    let _ = RuleTests::parse(text);
}
