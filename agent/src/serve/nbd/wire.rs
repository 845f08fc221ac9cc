//! Layouts of the NBD protocol: what a client says, decoded against its caps, and the heads of the answers.
//!
//! Pure. Numbers are in network byte order.

use crate::serve::piece::NAME_CAP;

pub(super) const MAGIC: u64 = 0x4e42_444d_4147_4943;
pub(super) const I_HAVE_OPT: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const SIMPLE_REPLY: u32 = 0x6744_6698;
const STRUCTURED_REPLY: u32 = 0x668e_33ef;

pub(super) const FIXED_NEWSTYLE: u16 = 1;
pub(super) const NO_ZEROES: u16 = 2;

pub(super) const OPT_EXPORT_NAME: u32 = 1;
pub(super) const OPT_ABORT: u32 = 2;
pub(super) const OPT_LIST: u32 = 3;
pub(super) const OPT_INFO: u32 = 6;
pub(super) const OPT_GO: u32 = 7;
pub(super) const OPT_STRUCTURED_REPLY: u32 = 8;
pub(super) const OPT_LIST_META_CONTEXT: u32 = 9;
pub(super) const OPT_SET_META_CONTEXT: u32 = 10;

pub(super) const REP_ACK: u32 = 1;
pub(super) const REP_SERVER: u32 = 2;
pub(super) const REP_INFO: u32 = 3;
pub(super) const REP_META_CONTEXT: u32 = 4;
pub(super) const REP_ERR_UNSUP: u32 = 0x8000_0001;
pub(super) const REP_ERR_INVALID: u32 = 0x8000_0003;
pub(super) const REP_ERR_UNKNOWN: u32 = 0x8000_0006;
pub(super) const REP_ERR_TOO_BIG: u32 = 0x8000_0009;

pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

pub(super) const HAS_FLAGS: u16 = 1;
pub(super) const READ_ONLY: u16 = 1 << 1;
pub(super) const SEND_FLUSH: u16 = 1 << 2;
pub(super) const SEND_FUA: u16 = 1 << 3;
pub(super) const SEND_TRIM: u16 = 1 << 5;
pub(super) const SEND_WRITE_ZEROES: u16 = 1 << 6;
pub(super) const SEND_DF: u16 = 1 << 7;
pub(super) const CAN_MULTI_CONN: u16 = 1 << 8;

pub(super) const CMD_READ: u16 = 0;
pub(super) const CMD_WRITE: u16 = 1;
pub(super) const CMD_DISC: u16 = 2;
pub(super) const CMD_FLUSH: u16 = 3;
pub(super) const CMD_TRIM: u16 = 4;
pub(super) const CMD_WRITE_ZEROES: u16 = 6;
pub(super) const CMD_BLOCK_STATUS: u16 = 7;

pub(super) const CMD_FLAG_FUA: u16 = 1;
pub(super) const CMD_FLAG_NO_HOLE: u16 = 2;
pub(super) const CMD_FLAG_DF: u16 = 4;
pub(super) const CMD_FLAG_REQ_ONE: u16 = 8;

pub(super) const REPLY_NONE: u16 = 0;
pub(super) const REPLY_OFFSET_DATA: u16 = 1;
pub(super) const REPLY_OFFSET_HOLE: u16 = 2;
pub(super) const REPLY_BLOCK_STATUS: u16 = 5;
pub(super) const REPLY_ERROR: u16 = (1 << 15) + 1;

pub(super) const EPERM: u32 = 1;
pub(super) const EIO: u32 = 5;
pub(super) const EINVAL: u32 = 22;
pub(super) const ENOSPC: u32 = 28;
pub(super) const ENOTSUP: u32 = 95;

/// The metadata context that tells holes from data.
pub(super) const ALLOCATION: &[u8] = b"base:allocation";
/// Its number in the answers of a connection: there is no other.
pub(super) const ALLOCATION_ID: u32 = 1;
/// What it says of a hole: it takes no space, and reads as zeros.
pub(super) const STATE_HOLE_ZERO: u32 = 1 | 2;

/// Longest option: two names of 4096 bytes and a list of what is asked about them.
pub(super) const OPTION_CAP: u32 = 16 << 10;
/// Longest read or write: what a client may send that did not ask for the limit.
pub const REQUEST_CAP: u32 = 32 << 20;

/// What comes before the bytes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    pub(super) flags: u16,
    pub(super) kind: u16,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    /// Bytes that it is about.
    pub length: u32,
}

impl Request {
    /// Bytes of its layout.
    pub const LEN: usize = 28;

    /// From its layout.
    ///
    /// # Errors
    /// It is none, or it is about more bytes than the cap of those that carry them.
    pub fn decode(bytes: &[u8; Self::LEN]) -> Result<Self, &'static str> {
        let short = |at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let long = |at: usize| {
            let bytes = bytes[at..].first_chunk().copied();
            u64::from_be_bytes(bytes.unwrap_or_default())
        };
        let [.., a, b, c, d] = *bytes;
        if !bytes.starts_with(&REQUEST.to_be_bytes()) {
            return Err("a request does not begin as one");
        }
        let request = Self {
            flags: short(4),
            kind: short(6),
            cookie: long(8),
            offset: long(16),
            length: u32::from_be_bytes([a, b, c, d]),
        };
        if request.carries() && request.length > REQUEST_CAP {
            return Err("a request is longer than its cap");
        }
        Ok(request)
    }

    /// Whether bytes come with it or with its answer.
    #[must_use]
    pub fn carries(&self) -> bool {
        matches!(self.kind, CMD_READ | CMD_WRITE)
    }
}

/// The export's name in the data of `INFO` and `GO`.
#[must_use]
pub fn named(data: &[u8]) -> Option<&[u8]> {
    let (name, rest) = string(data)?;
    let (asked, rest) = rest.split_first_chunk::<2>()?;
    let whole = rest.len() == usize::from(u16::from_be_bytes(*asked)) * 2;
    whole.then_some(name)
}

/// The export's name and the queries in the data of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
#[must_use]
pub fn queries(data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let (name, rest) = string(data)?;
    let (count, mut rest) = rest.split_first_chunk::<4>()?;
    let mut queries = Vec::new();
    for _ in 0..u32::from_be_bytes(*count) {
        // Each takes four bytes at least: the data bounds their number.
        let query;
        (query, rest) = string(rest)?;
        queries.push(query);
    }
    rest.is_empty().then_some((name, queries))
}

fn string(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = data.split_first_chunk::<4>()?;
    let length = u32::from_be_bytes(*length) as usize;
    let (string, rest) = rest.split_at_checked(length)?;
    (length <= NAME_CAP).then_some((string, rest))
}

/// An answer to an option.
pub(super) fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_REPLY.to_be_bytes().to_vec();
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// Head of a simple reply; what a read asked for follows one without an error.
pub(super) fn simple(error: u32, cookie: u64) -> Vec<u8> {
    let mut bytes = SIMPLE_REPLY.to_be_bytes().to_vec();
    bytes.extend_from_slice(&error.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes
}

/// One chunk of a structured reply, without the bytes of which `more` follow.
pub(super) fn chunk(is_last: bool, kind: u16, cookie: u64, content: &[u8], more: usize) -> Vec<u8> {
    let mut bytes = STRUCTURED_REPLY.to_be_bytes().to_vec();
    bytes.extend_from_slice(&u16::from(is_last).to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    let length = u32::try_from(content.len() + more).unwrap_or(u32::MAX);
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(content);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(bytes: &[u8]) -> Vec<u8> {
        let length = u32::try_from(bytes.len()).unwrap();
        [&length.to_be_bytes(), bytes].concat()
    }

    #[test]
    fn the_name_in_a_question_is_checked_against_its_length() {
        let question = |length: u32, name: &[u8], asked: u16, more: &[u8]| {
            let mut data = length.to_be_bytes().to_vec();
            data.extend_from_slice(name);
            data.extend_from_slice(&asked.to_be_bytes());
            data.extend_from_slice(more);
            data
        };
        assert_eq!(
            named(&question(3, b"a/b", 1, &[0, 3])),
            Some(b"a/b".as_slice())
        );
        assert_eq!(named(&question(0, b"", 0, b"")), Some(b"".as_slice()));
        assert_eq!(named(&question(9, b"a", 0, b"")), None);
        assert_eq!(named(&question(1, b"a", 2, &[0])), None);
        assert_eq!(named(b""), None);
    }

    #[test]
    fn queries_are_as_many_as_they_say() {
        let asked = |name: &[u8], count: u32, queries: &[&[u8]]| {
            let mut data = text(name);
            data.extend_from_slice(&count.to_be_bytes());
            data.extend(queries.iter().flat_map(|query| text(query)));
            data
        };
        let of = |data: &[u8]| {
            queries(data).map(|(name, queries)| {
                let queries: Vec<_> = queries.iter().map(|query| query.to_vec()).collect();
                (name.to_vec(), queries)
            })
        };
        let two = asked(b"disk", 2, &[b"base:", ALLOCATION]);
        let known = (
            b"disk".to_vec(),
            vec![b"base:".to_vec(), ALLOCATION.to_vec()],
        );
        assert_eq!(of(&two), Some(known));
        assert_eq!(of(&asked(b"", 0, &[])), Some((vec![], vec![])));
        assert_eq!(of(&asked(b"disk", 3, &[b"base:", ALLOCATION])), None);
        assert_eq!(of(&asked(b"disk", 1, &[b"base:", ALLOCATION])), None);
        assert_eq!(of(&asked(b"disk", u32::MAX, &[])), None);
        assert_eq!(of(&asked(&vec![b'a'; NAME_CAP + 1], 0, &[])), None);
    }

    #[test]
    fn a_request_is_held_to_the_cap_of_those_that_carry_bytes() {
        let request = |kind: u16, length: u32| {
            let mut bytes = [7; Request::LEN];
            bytes[..4].copy_from_slice(&REQUEST.to_be_bytes());
            bytes[6..8].copy_from_slice(&kind.to_be_bytes());
            bytes[24..].copy_from_slice(&length.to_be_bytes());
            Request::decode(&bytes)
        };
        let read = request(CMD_READ, REQUEST_CAP).unwrap();
        assert_eq!((read.kind, read.length), (CMD_READ, REQUEST_CAP));
        assert_eq!(
            (read.offset, read.cookie),
            (read.cookie, 0x0707_0707_0707_0707)
        );
        assert!(request(CMD_WRITE, REQUEST_CAP + 1).is_err());
        assert!(request(CMD_TRIM, u32::MAX).is_ok());
        assert!(Request::decode(&[0; Request::LEN]).is_err());
    }
}
