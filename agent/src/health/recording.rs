//! The recording of a device's samples: an append-only file of checked frames.
//!
//! Purpose: [`Encoder`] turns sweeps into frames, [`sweeps`] reads them back exactly. Invariants: a file that
//! was cut anywhere, as by a crash, is whole up to its last whole frame, and says so; bytes that were
//! altered are found. Non-goals: files; bytes come in and go out.
//!
//! After [`MAGIC`] each frame is: length of the payload (u32, little endian), the first four bytes of the
//! payload's BLAKE3, payload. The payload of a start is `0` and the header as JSON. That of a sweep is `1`,
//! milliseconds since the sweep before (zigzag varint), the series that are new (number, then metric, per
//! and name of each), two bits for each series since the start (absent, same value, whole number, other
//! number), and the values that changed.

use crate::model::metric::{Per, Sample, Subject};
use crate::model::units::UnixMillis;
use crate::model::varint::{get, get_signed, put, put_signed};
use serde::de::IntoDeserializer;
use serde::de::value::StrDeserializer;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

/// What every recording begins with; the number is the version of its format.
pub const MAGIC: &[u8] = b"LIFEBOAT SAMPLES 1\n";

/// No frame is longer: 64 MiB would be a million samples in one sweep.
const MAX_FRAME: usize = 64 << 20;

/// What a recording is of; stands at each start of the recorder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordingHeader {
    /// The device.
    pub device: String,
    /// Version of the program that recorded.
    pub version: String,
    /// When the recorder started.
    pub at: UnixMillis,
}

/// A recording cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordingError {
    /// It is none.
    #[error(
        "is no recording of this version: it does not begin with `LIFEBOAT SAMPLES 1`; make one with `lifeboat record -o FILE`"
    )]
    NotARecording,
    /// A frame that is whole has no meaning.
    #[error("byte {at}: {what}; it was written by another version or altered")]
    Frame {
        /// Where the frame starts.
        at: usize,
        /// What is wrong.
        what: &'static str,
    },
}

#[derive(Default)]
struct Last {
    value: u64,
}

/// Turns sweeps into frames.
#[derive(Default)]
pub struct Encoder {
    known: HashMap<(String, Subject), usize>,
    last: Vec<Last>,
    at: u64,
}

impl Encoder {
    /// An encoder and its first frame. Append that to [`MAGIC`], or to a recording that ends with a whole
    /// frame.
    ///
    /// # Errors
    /// The header is no JSON; it always is.
    pub fn start(header: &RecordingHeader) -> Result<(Self, Vec<u8>), serde_json::Error> {
        let mut payload = vec![0];
        serde_json::to_writer(&mut payload, header)?;
        Ok((Self::default(), frame(&payload)))
    }

    /// The frame of one sweep.
    pub fn sweep(&mut self, at: UnixMillis, samples: &[Sample]) -> Vec<u8> {
        let mut payload = vec![1];
        put_signed(&mut payload, at.0.wrapping_sub(self.at) as i64);
        self.at = at.0;
        let before = self.last.len();
        let mut places = Vec::with_capacity(samples.len());
        let mut names = Vec::new();
        for sample in samples {
            let key = (sample.metric.clone(), sample.subject.clone());
            let next = self.known.len();
            let place = *self.known.entry(key).or_insert_with(|| {
                for text in [
                    &sample.metric,
                    sample.subject.per.word(),
                    &sample.subject.name,
                ] {
                    put(&mut names, text.len() as u64);
                    names.extend_from_slice(text.as_bytes());
                }
                next
            });
            places.push(place);
        }
        self.last.resize_with(self.known.len(), Last::default);
        put(&mut payload, (self.last.len() - before) as u64);
        payload.extend_from_slice(&names);
        let mut codes = vec![0_u8; self.last.len().div_ceil(4)];
        let mut values = vec![None; self.last.len()];
        for (sample, place) in samples.iter().zip(places) {
            values[place] = Some((sample.value, at.0.saturating_sub(sample.at.0)));
        }
        let mut rest = Vec::new();
        for (place, (value, last)) in values.iter().zip(&mut self.last).enumerate() {
            let Some((value, age)) = *value else {
                continue;
            };
            let bits = value.to_bits();
            let whole = value as i64;
            let code = if bits == last.value && place < before {
                1
            } else if (whole as f64).to_bits() == bits && whole.unsigned_abs() < 1 << 53 {
                put_signed(&mut rest, whole);
                2
            } else {
                rest.extend_from_slice(&bits.to_le_bytes());
                3
            };
            codes[place / 4] |= code << (place % 4 * 2);
            last.value = bits;
            put(&mut rest, age);
        }
        payload.extend_from_slice(&codes);
        payload.extend_from_slice(&rest);
        frame(&payload)
    }
}

fn frame(payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(payload.len() + 8);
    frame.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    frame.extend_from_slice(&check(payload));
    frame.extend_from_slice(payload);
    frame
}

fn check(payload: &[u8]) -> [u8; 4] {
    let hash = blake3::hash(payload);
    let bytes = hash.as_bytes();
    [bytes[0], bytes[1], bytes[2], bytes[3]]
}

/// What [`sweeps`] tells of a recording.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecordingEnd {
    /// Bytes up to the end of the last whole frame.
    pub whole: usize,
    /// Bytes after it: a frame that was cut, or altered ones and all that follows them.
    pub torn: usize,
    /// Whether that is more than one frame that a crash cut: bytes that were altered, and what follows them.
    pub altered: bool,
}

/// Reads a recording: `start` is called at each start of the recorder, `sweep` with each sweep and those
/// of its samples whose metric is `wanted`.
///
/// # Errors
/// [`RecordingError`]; a cut or altered last part is none.
pub(super) fn sweeps(
    recording: &[u8],
    wanted: impl Fn(&str) -> bool,
    mut start: impl FnMut(RecordingHeader),
    mut sweep: impl FnMut(UnixMillis, &[Sample]),
) -> Result<RecordingEnd, RecordingError> {
    let mut rest = recording
        .strip_prefix(MAGIC)
        .ok_or(RecordingError::NotARecording)?;
    let mut decoder = Decoder::default();
    let mut samples = Vec::new();
    while let Some((payload, after)) = next_frame(rest) {
        let at = recording.len() - rest.len();
        let wrong = |what| RecordingError::Frame { at, what };
        match payload.split_first() {
            Some((0, header)) => {
                decoder = Decoder::default();
                start(
                    serde_json::from_slice(header)
                        .map_err(|_| wrong("the header cannot be read"))?,
                );
            }
            Some((1, body)) => {
                let at = decoder
                    .sweep(body, &wanted, &mut samples)
                    .ok_or_else(|| wrong("a sweep cannot be read"))?;
                sweep(at, &samples);
            }
            _ => return Err(wrong("a frame of an unknown kind")),
        }
        rest = after;
    }
    Ok(RecordingEnd {
        whole: recording.len() - rest.len(),
        torn: rest.len(),
        altered: is_altered(rest),
    })
}

/// How far a recording is whole.
///
/// # Errors
/// It is none, or of another version.
pub fn recorded(recording: &[u8]) -> Result<RecordingEnd, RecordingError> {
    sweeps(recording, |_| false, |_| {}, |_, _| {})
}

/// Whether more follows the frame that is not whole than the zeros of a file that grew before its data came.
fn is_altered(rest: &[u8]) -> bool {
    let Some((length, after)) = rest.split_first_chunk::<4>() else {
        return false;
    };
    let length = u32::from_le_bytes(*length) as usize;
    let beyond = after.get(length.saturating_add(4)..).unwrap_or_default();
    length > MAX_FRAME || beyond.iter().any(|byte| *byte != 0)
}

fn next_frame(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let (sum, rest) = rest.split_first_chunk::<4>()?;
    let length = u32::from_le_bytes(*length) as usize;
    let (payload, rest) = (length <= MAX_FRAME).then(|| rest.split_at_checked(length))??;
    (check(payload) == *sum).then_some((payload, rest))
}

#[derive(Default)]
struct Decoder {
    /// Metric and subject of each series, none when it is not wanted, and its last value.
    series: Vec<(Option<(String, Subject)>, u64)>,
    at: u64,
}

impl Decoder {
    fn sweep(
        &mut self,
        mut body: &[u8],
        wanted: &impl Fn(&str) -> bool,
        samples: &mut Vec<Sample>,
    ) -> Option<UnixMillis> {
        samples.clear();
        self.at = self.at.wrapping_add(get_signed(&mut body)? as u64);
        for _ in 0..get(&mut body)? {
            let metric = text(&mut body)?;
            let per = per(text(&mut body)?)?;
            let name = text(&mut body)?.to_owned();
            let series = wanted(metric).then(|| (metric.to_owned(), Subject { per, name }));
            self.series.push((series, 0));
        }
        let (codes, mut rest) = body.split_at_checked(self.series.len().div_ceil(4))?;
        for (place, (series, last)) in self.series.iter_mut().enumerate() {
            match codes[place / 4] >> (place % 4 * 2) & 3 {
                0 => continue,
                1 => {}
                2 => *last = (get_signed(&mut rest)? as f64).to_bits(),
                _ => {
                    let (bits, after) = rest.split_first_chunk::<8>()?;
                    *last = u64::from_le_bytes(*bits);
                    rest = after;
                }
            }
            let age = get(&mut rest)?;
            if let Some((metric, subject)) = series {
                samples.push(Sample {
                    metric: metric.clone(),
                    subject: subject.clone(),
                    value: f64::from_bits(*last),
                    at: UnixMillis(self.at.saturating_sub(age)),
                });
            }
        }
        Some(UnixMillis(self.at))
    }
}

fn per(word: &str) -> Option<Per> {
    let word: StrDeserializer<'_, serde::de::value::Error> = word.into_deserializer();
    Per::deserialize(word).ok()
}

fn text<'a>(bytes: &mut &'a [u8]) -> Option<&'a str> {
    let length = usize::try_from(get(bytes)?).ok()?;
    let (text, rest) = bytes.split_at_checked(length)?;
    *bytes = rest;
    std::str::from_utf8(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> RecordingHeader {
        RecordingHeader {
            device: "box1".into(),
            version: "0".into(),
            at: UnixMillis(5),
        }
    }

    type Sweeps = Vec<(UnixMillis, Vec<Sample>)>;

    fn recorded(sweeps: &Sweeps) -> Vec<u8> {
        let (mut encoder, start) = Encoder::start(&header()).unwrap();
        let mut bytes = [MAGIC, &start].concat();
        for (at, samples) in sweeps {
            bytes.extend(encoder.sweep(*at, samples));
        }
        bytes
    }

    fn read(bytes: &[u8]) -> (Sweeps, RecordingEnd) {
        let mut read = Vec::new();
        let end = sweeps(
            bytes,
            |_| true,
            |_| {},
            |at, samples| read.push((at, samples.to_vec())),
        )
        .unwrap();
        (read, end)
    }

    /// A sweep's samples in the order in which their series came first, as a recording keeps them.
    fn sweep() -> impl Strategy<Value = (u64, Vec<Option<f64>>)> {
        let value = prop_oneof![
            Just(None),
            Just(Some(7.0)),
            any::<i32>().prop_map(|n| Some(f64::from(n))),
            any::<f64>()
                .prop_filter("NaN is not equal to itself", |v| !v.is_nan())
                .prop_map(Some),
        ];
        (0_u64..1 << 45, prop::collection::vec(value, 6))
    }

    fn samples(at: u64, values: &[Option<f64>]) -> Vec<Sample> {
        let named = |(place, value): (usize, &Option<f64>)| {
            Some(Sample {
                metric: "block.latency_p99".into(),
                subject: Subject {
                    per: Per::Disk,
                    name: format!("disk {place} ä"),
                },
                value: (*value)?,
                at: UnixMillis(at.saturating_sub(place as u64 * 40)),
            })
        };
        values.iter().enumerate().filter_map(named).collect()
    }

    proptest! {
        #[test]
        fn what_was_recorded_is_read_back_exactly(sweeps in prop::collection::vec(sweep(), 1..30)) {
            let all = (1, vec![Some(0.0); 6]);
            let sweeps: Sweeps = std::iter::once(&all)
                .chain(&sweeps)
                .map(|(at, values)| (UnixMillis(*at), samples(*at, values)))
                .collect();
            let bytes = recorded(&sweeps);
            let (read, end) = read(&bytes);
            prop_assert_eq!(end, RecordingEnd { whole: bytes.len(), torn: 0, altered: false });
            prop_assert_eq!(read, sweeps);
        }

        #[test]
        fn a_recording_cut_anywhere_is_whole_up_to_its_last_frame_and_can_go_on(
            sweeps in prop::collection::vec(sweep(), 1..10), cut in 0.0_f64..1.0,
        ) {
            let sweeps: Sweeps = sweeps
                .iter()
                .map(|(at, values)| (UnixMillis(*at), samples(*at, values)))
                .collect();
            let bytes = recorded(&sweeps);
            let cut = MAGIC.len() + ((bytes.len() - MAGIC.len()) as f64 * cut) as usize;
            let (got, end) = read(&bytes[..cut]);
            prop_assert_eq!(end.whole + end.torn, cut);
            prop_assert!(!end.altered);
            prop_assert_eq!(got.len(), read(&bytes[..end.whole]).0.len());
            let (_, again) = Encoder::start(&header()).unwrap();
            let joined = [&bytes[..end.whole], &again].concat();
            let mut starts = 0;
            super::sweeps(&joined, |_| true, |_| starts += 1, |_, _| {}).unwrap();
            prop_assert_eq!(starts, if got.is_empty() && end.whole == MAGIC.len() { 1 } else { 2 });
        }

        #[test]
        fn a_flipped_byte_never_yields_a_sample_that_was_not_recorded(
            sweeps in prop::collection::vec(sweep(), 1..6), place in 0.0_f64..1.0, bit in 0_u8..8,
        ) {
            let sweeps: Sweeps = sweeps
                .iter()
                .map(|(at, values)| (UnixMillis(*at), samples(*at, values)))
                .collect();
            let mut bytes = recorded(&sweeps);
            let whole = read(&bytes).0;
            let place = MAGIC.len() + ((bytes.len() - MAGIC.len()) as f64 * place) as usize;
            bytes[place] ^= 1 << bit;
            let (got, end) = read(&bytes);
            prop_assert!(end.torn > 0);
            prop_assert_eq!(&whole[..got.len()], &got[..]);
        }
    }

    #[test]
    fn another_file_is_refused() {
        let none = sweeps(b"LIFEBOAT SAMPLES 2\n", |_| true, |_| {}, |_, _| {});
        assert_eq!(none, Err(RecordingError::NotARecording));
    }
}
