//! The access trace: what of a device or directory was touched first, and how often, in a portable file.
//!
//! Invariants: reading never panics and allocates no more than the file's own size asks for; a file that was
//! cut or altered anywhere is refused. Non-goals: I/O; bytes come in and go out.
//!
//! The file is [`MAGIC`], a body, and the BLAKE3 of both. In the body every number is a LEB128 varint, signed
//! ones zigzag, and every text its length and its bytes:
//!
//! * what was traced (0 a device, 1 a directory), its name, start (ms since 1970), length (ms), bytes of an
//!   extent, accesses lost, accesses elsewhere;
//! * how many causes, and of each its container's name (empty: none) and its cgroup;
//! * how many files, and of each its path and its length; of a device one, with an empty path;
//! * how many touches, and of each, in the order of their first access: its file (signed, less that of the
//!   touch before), 2 × its cause + 1 for writes, ms since the touch before, its extent (signed, less the one
//!   after that of the touch before), its heat.

use super::ids::ContainerName;
use super::units::{Bytes, UnixMillis};
use super::varint::{get, get_signed, put, put_signed};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::ops::Range;
use std::path::{Component, Path};
use std::time::Duration;

/// What every trace begins with; the number is the version of its format.
pub const MAGIC: &[u8] = b"LIFEBOAT TRACE 1\n";

/// No trace is longer.
pub const MAX_TRACE: usize = 64 << 20;

/// No trace has more touches: 4 Mi are 256 GiB in extents of 64 KiB, and 160 MiB of memory.
pub const MAX_TOUCHES: usize = 4 << 20;

/// Longest path in a trace, as the kernel's PATH_MAX.
const MAX_PATH: usize = 4096;

const CHECK: usize = 32;

/// What was traced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Of {
    /// A block device, by its path.
    Device(String),
    /// The files of a directory, by its path.
    Directory(String),
}

/// Who accessed.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Cause {
    /// The container; none for processes outside of containers.
    pub container: Option<ContainerName>,
    /// Its cgroup2 path on the host, empty where that was gone before it was looked at.
    pub cgroup: String,
}

/// A file in which extents lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TracedFile {
    /// Path below the directory; empty for a device.
    pub path: Vec<u8>,
    /// Length at the end of the trace.
    pub length: Bytes,
}

/// The accesses of one cause to one extent, reads or writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touch {
    /// Index of its file.
    pub file: u32,
    /// Number of the extent in the file.
    pub extent: u64,
    /// Index of its cause.
    pub cause: u32,
    /// Whether these are the writes.
    pub write: bool,
    /// Time of the first access since the start of the trace, ms.
    pub at_ms: u64,
    /// How many of the block layer's I/Os touched it.
    pub heat: u64,
}

/// Accesses in the order in which they were made first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// What was traced.
    pub of: Of,
    /// When it started.
    pub started: UnixMillis,
    /// How long it lasted; whole milliseconds.
    pub lasted: Duration,
    /// Length of an extent: a power of two.
    pub extent: Bytes,
    /// Accesses that found no room in memory.
    pub lost: u64,
    /// Accesses to parts of the device that belong to no file of the directory.
    pub elsewhere: u64,
    /// Who accessed.
    pub causes: Vec<Cause>,
    /// What was accessed.
    pub files: Vec<TracedFile>,
    /// By time of first access.
    pub touches: Vec<Touch>,
}

/// A trace cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TraceError {
    /// It is none.
    #[error(
        "is no trace of this version: it does not begin with `LIFEBOAT TRACE 1`; make one with `lifeboat record --trace FILE`"
    )]
    NotATrace,
    /// Its checksum is another.
    #[error("was cut or altered: its checksum does not match; copy it anew")]
    Altered,
    /// A part has no meaning.
    #[error("has {0} that cannot be; it was written by another version")]
    Malformed(&'static str),
}

impl Trace {
    /// The bytes of its file.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        let (kind, name) = match &self.of {
            Of::Device(name) => (0, name),
            Of::Directory(name) => (1, name),
        };
        put(&mut out, kind);
        put_text(&mut out, name.as_bytes());
        put(&mut out, self.started.0);
        put(&mut out, self.lasted.as_millis() as u64);
        put(&mut out, self.extent.0);
        put(&mut out, self.lost);
        put(&mut out, self.elsewhere);
        put(&mut out, self.causes.len() as u64);
        for cause in &self.causes {
            let container = cause.container.as_ref().map_or("", ContainerName::as_str);
            put_text(&mut out, container.as_bytes());
            put_text(&mut out, cause.cgroup.as_bytes());
        }
        put(&mut out, self.files.len() as u64);
        for file in &self.files {
            put_text(&mut out, &file.path);
            put(&mut out, file.length.0);
        }
        put(&mut out, self.touches.len() as u64);
        let (mut file, mut at_ms, mut extent) = (0, 0, 0);
        for touch in &self.touches {
            put_signed(&mut out, i64::from(touch.file) - file);
            put(
                &mut out,
                u64::from(touch.cause) * 2 + u64::from(touch.write),
            );
            put(&mut out, touch.at_ms.saturating_sub(at_ms));
            put_signed(&mut out, touch.extent.wrapping_sub(extent) as i64);
            put(&mut out, touch.heat);
            (file, at_ms) = (i64::from(touch.file), touch.at_ms);
            extent = touch.extent.wrapping_add(1);
        }
        let check = blake3::hash(&out);
        out.extend_from_slice(check.as_bytes());
        out
    }

    /// Reads a file's bytes.
    ///
    /// # Errors
    /// Any [`TraceError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, TraceError> {
        if !bytes.starts_with(MAGIC) {
            return Err(TraceError::NotATrace);
        }
        if bytes.len() > MAX_TRACE {
            return Err(TraceError::Malformed("a length"));
        }
        let (body, check) = bytes
            .split_last_chunk::<CHECK>()
            .ok_or(TraceError::Altered)?;
        if blake3::hash(body) != *check {
            return Err(TraceError::Altered);
        }
        let mut rest = body
            .strip_prefix(MAGIC)
            .ok_or(TraceError::Malformed("a beginning"))?;
        let trace = Self::read(&mut rest)?;
        if rest.is_empty() {
            Ok(trace)
        } else {
            Err(TraceError::Malformed("an end"))
        }
    }

    fn read(rest: &mut &[u8]) -> Result<Self, TraceError> {
        let wrong = TraceError::Malformed;
        let kind = get(rest);
        let name = utf8(rest).ok_or(wrong("a name"))?;
        let of = match kind {
            Some(0) => Of::Device(name),
            Some(1) => Of::Directory(name),
            _ => return Err(wrong("a kind")),
        };
        let mut number = |what| get(rest).ok_or(wrong(what));
        let started = UnixMillis(number("a start")?);
        let lasted = Duration::from_millis(number("a length")?);
        let extent = number("an extent length")?;
        if !extent.is_power_of_two() || !(4 << 10..=1 << 30).contains(&extent) {
            return Err(wrong("an extent length"));
        }
        let (lost, elsewhere) = (number("a count")?, number("a count")?);
        let causes = many(rest, 2, MAX_TOUCHES, |rest| {
            let container = utf8(rest)?;
            let cgroup = utf8(rest)?;
            Some(Cause {
                container: (!container.is_empty()).then_some(ContainerName(container)),
                cgroup,
            })
        });
        let causes = causes.ok_or(wrong("a cause"))?;
        let is_device = matches!(of, Of::Device(_));
        let files = many(rest, 2, MAX_TOUCHES, |rest| {
            let path = text(rest)?.to_vec();
            let fits = if is_device {
                path.is_empty()
            } else {
                is_below(&path)
            };
            let length = Bytes(get(rest)?);
            fits.then_some(TracedFile { path, length })
        });
        let files = files.ok_or(wrong("a file"))?;
        let (mut file, mut at_ms, mut next) = (0_i64, 0_u64, 0_u64);
        let touches = many(rest, 5, MAX_TOUCHES, |rest| {
            file = file.checked_add(get_signed(rest)?)?;
            let who = get(rest)?;
            at_ms = at_ms.checked_add(get(rest)?)?;
            let at = next.wrapping_add(get_signed(rest)? as u64);
            next = at.wrapping_add(1);
            let touch = Touch {
                file: u32::try_from(file).ok()?,
                extent: at,
                cause: u32::try_from(who >> 1).ok()?,
                write: who & 1 == 1,
                at_ms,
                heat: get(rest)?,
            };
            // Whoever multiplies it by the length of an extent must get a 63-bit file offset.
            let fits = at < (1 << 63) / extent && touch.heat > 0;
            let known =
                (touch.file as usize) < files.len() && (touch.cause as usize) < causes.len();
            (fits && known).then_some(touch)
        });
        Ok(Self {
            of,
            started,
            lasted,
            extent: Bytes(extent),
            lost,
            elsewhere,
            touches: touches.ok_or(wrong("a touch"))?,
            causes,
            files,
        })
    }

    /// What a copy wants first, of what the wanted causes read: (file, extent, reads), those with the most
    /// reads first, and among equals the one read first.
    pub fn hottest(&self, wanted: impl Fn(&Cause) -> bool) -> Vec<(u32, u64, u64)> {
        let mut heats: HashMap<(u32, u64), (u64, usize)> = HashMap::new();
        for (order, touch) in self.touches.iter().enumerate() {
            if !touch.write && wanted(&self.causes[touch.cause as usize]) {
                let heat = heats
                    .entry((touch.file, touch.extent))
                    .or_insert((0, order));
                heat.0 = heat.0.saturating_add(touch.heat);
            }
        }
        let mut extents: Vec<_> = heats.into_iter().collect();
        extents.sort_unstable_by_key(|(_, (heat, order))| (std::cmp::Reverse(*heat), *order));
        let extents = extents.into_iter();
        extents
            .map(|((file, extent), (heat, _))| (file, extent, heat))
            .collect()
    }
}

/// Ranges of the files of a volume, in the order in which they are fetched.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FetchOrder {
    files: Vec<RawPath>,
    /// Index of the file, first byte and bytes of each.
    ranges: Vec<(u32, u64, u64)>,
}

/// Path below the volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct RawPath(#[serde(with = "hex::serde")] Vec<u8>);

impl FetchOrder {
    /// Bytes that a range takes as JSON, most often.
    const RANGE: usize = 32;

    /// Appends what was read most, neighbours as one range. `place` tells where a traced file lies in the volume; `room`
    /// is about how many bytes all of it may take as JSON, and then what is left. What finds no room is left out. `hottest`
    /// is what [`Trace::hottest`] gives.
    pub fn append(
        &mut self,
        trace: &Trace,
        hottest: &[(u32, u64, u64)],
        place: impl Fn(&[u8]) -> Option<Vec<u8>>,
        room: &mut usize,
    ) {
        let mut indices: HashMap<u32, Option<u32>> = HashMap::new();
        for &(file, extent, _) in hottest {
            let index = indices.entry(file).or_insert_with(|| {
                let path = place(&trace.files[file as usize].path)?;
                *room = room.checked_sub(2 * path.len())?;
                let index = u32::try_from(self.files.len()).ok()?;
                self.files.push(RawPath(path));
                Some(index)
            });
            let Some(index) = *index else {
                continue;
            };
            let offset = extent.saturating_mul(trace.extent.0);
            match self.ranges.last_mut() {
                Some((last, first, length)) if *last == index && *first + *length == offset => {
                    *length += trace.extent.0;
                }
                _ => {
                    let Some(left) = room.checked_sub(Self::RANGE) else {
                        return;
                    };
                    *room = left;
                    self.ranges.push((index, offset, trace.extent.0));
                }
            }
        }
    }

    /// Whether it names nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Bytes in all ranges.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        self.ranges.iter().map(|(.., length)| Bytes(*length)).sum()
    }

    /// Path and bytes of each range, in order.
    pub fn ranges(&self) -> impl Iterator<Item = (&[u8], Range<u64>)> {
        self.ranges.iter().filter_map(|(index, first, length)| {
            let RawPath(path) = self.files.get(*index as usize)?;
            Some((&path[..], *first..first.saturating_add(*length)))
        })
    }
}

fn put_text(out: &mut Vec<u8>, text: &[u8]) {
    put(out, text.len() as u64);
    out.extend_from_slice(text);
}

fn text<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = usize::try_from(get(bytes)?).ok()?;
    let (text, rest) = bytes.split_at_checked(length)?;
    *bytes = rest;
    (length < MAX_PATH).then_some(text)
}

fn utf8(bytes: &mut &[u8]) -> Option<String> {
    Some(std::str::from_utf8(text(bytes)?).ok()?.to_owned())
}

/// As many as the next number says, at most `most`, of which each takes at least so many bytes.
fn many<T>(
    rest: &mut &[u8],
    least: usize,
    most: usize,
    mut one: impl FnMut(&mut &[u8]) -> Option<T>,
) -> Option<Vec<T>> {
    let count = usize::try_from(get(rest)?).ok()?;
    if count > most.min(rest.len() / least) {
        return None;
    }
    (0..count).map(|_| one(rest)).collect()
}

/// Whether a path leads to something below the directory it is relative to, by its words alone.
fn is_below(path: &[u8]) -> bool {
    use std::os::unix::ffi::OsStrExt;
    let path = Path::new(std::ffi::OsStr::from_bytes(path));
    let mut components = path.components().peekable();
    components.peek().is_some()
        && components.all(|component| matches!(component, Component::Normal(_)))
        && !path.as_os_str().as_bytes().contains(&0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn trace(of: Of, paths: &[&[u8]], touches: Vec<Touch>) -> Trace {
        let cause = |container: Option<&str>, cgroup: &str| Cause {
            container: container.map(ContainerName::from),
            cgroup: cgroup.to_owned(),
        };
        Trace {
            of,
            started: UnixMillis(1_700_000_000_000),
            lasted: Duration::from_millis(60_001),
            extent: Bytes(64 << 10),
            lost: 3,
            elsewhere: 4,
            causes: vec![cause(Some("db"), "/pod/db"), cause(None, "")],
            files: paths
                .iter()
                .map(|path| TracedFile {
                    path: path.to_vec(),
                    length: Bytes(1 << 40),
                })
                .collect(),
            touches,
        }
    }

    fn touch(file: u32, extent: u64, heat: u64) -> Touch {
        Touch {
            file,
            extent,
            cause: 0,
            write: false,
            at_ms: 0,
            heat,
        }
    }

    /// As an attacker would write it, who can compute a checksum as well.
    fn with_check(mut body: Vec<u8>) -> Vec<u8> {
        let check = blake3::hash(&body);
        body.extend_from_slice(check.as_bytes());
        body
    }

    fn any_trace() -> impl Strategy<Value = Trace> {
        let one = (
            0..3_u32,
            0..1_u64 << 40,
            0..2_u32,
            any::<bool>(),
            0..5_u64,
            1..u64::MAX,
        );
        prop::collection::vec(one, 0..40).prop_map(|touches| {
            let mut now = 0;
            let touches = touches.into_iter();
            let touches = touches.map(|(file, extent, cause, write, later, heat)| {
                now += later;
                Touch {
                    file,
                    extent,
                    cause,
                    write,
                    at_ms: now,
                    heat,
                }
            });
            let of = Of::Directory("/srv/data".to_owned());
            trace(of, &[b"a", b"b/\xff", b"c"], touches.collect())
        })
    }

    #[test]
    fn the_hottest_come_first_and_equals_in_the_order_of_first_reads() {
        let mut written = touch(0, 5, 100);
        written.write = true;
        let mut of_another = touch(0, 7, 9);
        of_another.cause = 1;
        let touches = vec![
            touch(0, 9, 1),
            touch(0, 2, 1),
            written,
            touch(0, 3, 4),
            of_another,
        ];
        let trace = trace(Of::Device("/dev/sda".to_owned()), &[b""], touches);
        let all = trace.hottest(|_| true);
        assert_eq!(all, [(0, 7, 9), (0, 3, 4), (0, 9, 1), (0, 2, 1)]);
        let of_db = trace.hottest(|cause| cause.container.is_some());
        assert_eq!(of_db, [(0, 3, 4), (0, 9, 1), (0, 2, 1)]);
    }

    #[test]
    fn a_fetch_order_has_what_was_read_most_first_and_neighbours_together_as_far_as_there_is_room()
    {
        let touches = vec![
            touch(0, 4, 1),
            touch(1, 2, 7),
            touch(2, 9, 8),
            touch(0, 5, 1),
        ];
        let trace = trace(
            Of::Directory("/srv".to_owned()),
            &[b"a", b"b\xff", b"elsewhere"],
            touches,
        );
        let place = |path: &[u8]| (path != b"elsewhere").then(|| [b"in/", path].concat());
        let ordered = |mut room: usize| {
            let mut order = FetchOrder::default();
            order.append(&trace, &trace.hottest(|_| true), place, &mut room);
            let json = serde_json::to_string(&order).unwrap();
            assert_eq!(serde_json::from_str::<FetchOrder>(&json).unwrap(), order);
            order
        };
        const EXTENT: u64 = 64 << 10;
        let first = (&b"in/b\xff"[..], 2 * EXTENT..3 * EXTENT);
        let second = (&b"in/a"[..], 4 * EXTENT..6 * EXTENT);
        let all = ordered(1000);
        assert!(all.ranges().eq([first.clone(), second]));
        assert_eq!(all.bytes(), Bytes(3 * EXTENT));
        assert!(ordered(60).ranges().eq([first]));
        assert!(ordered(0).is_empty());
    }

    #[test]
    fn a_fetch_order_that_points_nowhere_is_no_range() {
        let order = r#"{"files":["61"],"ranges":[[7,0,1],[0,18446744073709551615,9]]}"#;
        let order: FetchOrder = serde_json::from_str(order).unwrap();
        assert!(order.ranges().eq([(&b"a"[..], u64::MAX..u64::MAX)]));
    }

    #[test]
    fn a_path_that_leads_out_of_the_directory_is_refused() {
        for path in [&b"../etc"[..], b"/etc", b"a/../../b", b"", b"a\0b"] {
            let bytes = trace(Of::Directory("/srv".to_owned()), &[path], vec![]).encode();
            let refused = TraceError::Malformed("a file");
            assert_eq!(Trace::decode(&bytes), Err(refused), "{path:?}");
        }
    }

    #[test]
    fn what_points_nowhere_is_refused() {
        for touch in [touch(1, 0, 1), touch(0, 1 << 47, 1), touch(0, 0, 0)] {
            let bytes = trace(Of::Device("/dev/sda".to_owned()), &[b""], vec![touch]).encode();
            assert_eq!(Trace::decode(&bytes), Err(TraceError::Malformed("a touch")));
        }
    }

    #[test]
    fn sequential_touches_take_few_bytes() {
        let touches = (0..1_000).map(|extent| touch(0, extent, 3)).collect();
        let bytes = trace(Of::Device("/dev/sda".to_owned()), &[b""], touches).encode();
        assert!(bytes.len() < 5_200, "{}", bytes.len());
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(trace in any_trace()) {
            prop_assert_eq!(Trace::decode(&trace.encode()), Ok(trace));
        }

        #[test]
        fn a_cut_or_flipped_trace_is_refused(trace in any_trace(), at: prop::sample::Index, bit in 0..8) {
            let whole = trace.encode();
            prop_assert!(Trace::decode(&whole[..at.index(whole.len())]).is_err());
            let mut flipped = whole.clone();
            flipped[at.index(whole.len())] ^= 1_u8 << bit;
            prop_assert!(Trace::decode(&flipped).is_err());
        }

        #[test]
        fn a_hostile_trace_with_a_true_checksum_is_no_panic(
            trace in any_trace(), at: prop::sample::Index, bytes in prop::collection::vec(any::<u8>(), 0..24),
        ) {
            let whole = trace.encode();
            let mut body = whole[..whole.len() - CHECK].to_vec();
            let at = MAGIC.len() + at.index(body.len() - MAGIC.len());
            body.splice(at..(at + bytes.len()).min(body.len()), bytes);
            if let Ok(read) = Trace::decode(&with_check(body)) {
                let _ = read.hottest(|_| true);
                prop_assert!(Trace::decode(&read.encode()).is_ok());
            }
        }
    }
}
