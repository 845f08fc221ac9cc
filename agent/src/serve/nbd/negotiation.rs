//! How a client chooses an export, and what it understands: fixed newstyle negotiation.
//!
//! Invariant: an option is read whole, within its cap, before it is answered.

use super::wire::{
    ALLOCATION, ALLOCATION_ID, CAN_MULTI_CONN, FIXED_NEWSTYLE, HAS_FLAGS, I_HAVE_OPT,
    INFO_BLOCK_SIZE, INFO_EXPORT, MAGIC, NO_ZEROES, OPT_ABORT, OPT_EXPORT_NAME, OPT_GO, OPT_INFO,
    OPT_LIST, OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT, OPT_STRUCTURED_REPLY, OPTION_CAP,
    READ_ONLY, REP_ACK, REP_ERR_INVALID, REP_ERR_TOO_BIG, REP_ERR_UNKNOWN, REP_ERR_UNSUP, REP_INFO,
    REP_META_CONTEXT, REP_SERVER, REQUEST_CAP, SEND_DF, SEND_FLUSH, SEND_FUA, SEND_TRIM,
    SEND_WRITE_ZEROES, named, option_reply, queries,
};
use super::{Shared, Stream, array, invalid};
use crate::serve::piece::{self, Piece};
use std::io::{self, Read as _, Write as _};

/// What was agreed on.
pub(super) struct Agreed {
    pub(super) export: Piece,
    /// The client understands structured replies.
    pub(super) is_structured: bool,
    /// It may ask which parts are holes.
    pub(super) maps: bool,
}

/// What a client has asked for before it chooses its export.
#[derive(Default)]
struct Terms {
    is_structured: bool,
    /// The export whose holes it may ask for.
    mapped: Option<Box<[u8]>>,
}

/// What the client chose; none when it left.
pub(super) fn negotiate(shared: &Shared, stream: &Stream) -> io::Result<Option<Agreed>> {
    let mut greeting = MAGIC.to_be_bytes().to_vec();
    greeting.extend_from_slice(&I_HAVE_OPT.to_be_bytes());
    greeting.extend_from_slice(&(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
    let mut socket = stream;
    socket.write_all(&greeting)?;
    let flags = u32::from_be_bytes(array(stream)?);
    if flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
        return Err(invalid("it wants features that nobody offered"));
    }
    let mut terms = Terms::default();
    loop {
        if u64::from_be_bytes(array(stream)?) != I_HAVE_OPT {
            return Err(invalid("an option does not begin as one"));
        }
        let option = u32::from_be_bytes(array(stream)?);
        let length = u32::from_be_bytes(array(stream)?);
        let reply = |kind: u32, data: &[u8]| {
            let mut out = stream;
            out.write_all(&option_reply(option, kind, data))
        };
        if length > OPTION_CAP {
            reply(REP_ERR_TOO_BIG, b"")?;
            return Err(invalid("an option is longer than its cap"));
        }
        let mut data = vec![0; length as usize];
        socket.read_exact(&mut data)?;
        match option {
            OPT_EXPORT_NAME => {
                // This option has no way to refuse but to hang up.
                let Some(export) = find(shared, &data) else {
                    return Ok(None);
                };
                let mut answer = export.size.to_be_bytes().to_vec();
                answer.extend_from_slice(&flags_of(shared, &terms).to_be_bytes());
                if flags & u32::from(NO_ZEROES) == 0 {
                    answer.resize(10 + 124, 0);
                }
                socket.write_all(&answer)?;
                return Ok(Some(terms.agreed(&data, export)));
            }
            OPT_ABORT => {
                reply(REP_ACK, b"")?;
                return Ok(None);
            }
            OPT_LIST if data.is_empty() => {
                for name in piece::names(&shared.store) {
                    let length = u32::try_from(name.len()).unwrap_or(u32::MAX);
                    reply(REP_SERVER, &[&length.to_be_bytes(), &*name].concat())?;
                }
                reply(REP_ACK, b"")?;
            }
            OPT_STRUCTURED_REPLY if data.is_empty() => {
                terms.is_structured = true;
                reply(REP_ACK, b"")?;
            }
            OPT_LIST | OPT_STRUCTURED_REPLY => reply(REP_ERR_INVALID, b"")?,
            OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => {
                // What was set before does not hold any more, also when this is refused.
                if option == OPT_SET_META_CONTEXT {
                    terms.mapped = None;
                }
                let Some((name, asked)) = queries(&data).filter(|_| terms.is_structured) else {
                    reply(REP_ERR_INVALID, b"")?;
                    continue;
                };
                if find(shared, name).is_none() {
                    let why = piece::unknown(&shared.store, name);
                    reply(REP_ERR_UNKNOWN, why.as_bytes())?;
                    continue;
                }
                // A list may be asked for by the beginning of a name, and without one it is of all.
                let is_list = option == OPT_LIST_META_CONTEXT;
                let is_asked =
                    |query: &&[u8]| *query == ALLOCATION || is_list && *query == b"base:";
                if asked.iter().any(is_asked) || is_list && asked.is_empty() {
                    let number = ALLOCATION_ID.to_be_bytes();
                    reply(REP_META_CONTEXT, &[&number, ALLOCATION].concat())?;
                    if !is_list {
                        terms.mapped = Some(name.into());
                    }
                }
                reply(REP_ACK, b"")?;
            }
            OPT_INFO | OPT_GO => match named(&data) {
                None => reply(REP_ERR_INVALID, b"")?,
                Some(name) => match find(shared, name) {
                    None => {
                        let why = piece::unknown(&shared.store, name);
                        reply(REP_ERR_UNKNOWN, why.as_bytes())?;
                    }
                    Some(export) => {
                        let mut info = INFO_EXPORT.to_be_bytes().to_vec();
                        info.extend_from_slice(&export.size.to_be_bytes());
                        info.extend_from_slice(&flags_of(shared, &terms).to_be_bytes());
                        reply(REP_INFO, &info)?;
                        let mut info = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
                        for size in [1, 4096, REQUEST_CAP] {
                            info.extend_from_slice(&size.to_be_bytes());
                        }
                        reply(REP_INFO, &info)?;
                        reply(REP_ACK, b"")?;
                        if option == OPT_GO {
                            return Ok(Some(terms.agreed(name, export)));
                        }
                    }
                },
            },
            _ => reply(REP_ERR_UNSUP, b"")?,
        }
    }
}

impl Terms {
    fn agreed(self, name: &[u8], export: Piece) -> Agreed {
        Agreed {
            export,
            is_structured: self.is_structured,
            maps: self.mapped.is_some_and(|mapped| *mapped == *name),
        }
    }
}

fn find(shared: &Shared, name: &[u8]) -> Option<Piece> {
    Piece::find(&shared.store, name, shared.read_only)
}

fn flags_of(shared: &Shared, terms: &Terms) -> u16 {
    let mut flags =
        HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES | CAN_MULTI_CONN;
    if shared.read_only {
        flags |= READ_ONLY;
    }
    if terms.is_structured {
        flags |= SEND_DF;
    }
    flags
}
