//! What a client asks of its export, and the answers: structured ones where it understands them, so that holes
//! need not travel.
//!
//! Invariant: requests of a connection are worked on side by side, in bounded number and memory.

use super::negotiation::Agreed;
use super::wire::{
    ALLOCATION_ID, CMD_BLOCK_STATUS, CMD_DISC, CMD_FLAG_DF, CMD_FLAG_FUA, CMD_FLAG_NO_HOLE,
    CMD_FLAG_REQ_ONE, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, EINVAL, EIO,
    ENOSPC, ENOTSUP, EPERM, REPLY_BLOCK_STATUS, REPLY_ERROR, REPLY_NONE, REPLY_OFFSET_DATA,
    REPLY_OFFSET_HOLE, Request, STATE_HOLE_ZERO, chunk, simple,
};
use super::{Shared, Stream, array, invalid, locked};
use crate::serve::store::Extent;
use std::io::{self, Read as _, Write as _};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Condvar, Mutex, PoisonError};

/// Bytes of the requests of one connection that are worked on: more wait in the socket.
const IN_FLIGHT_CAP: usize = 64 << 20;
/// Requests of one connection that are worked on side by side: each may wait for the source.
const WORKERS: usize = 64;
/// Parts of a range that one answer tells; a client asks again for the rest.
const EXTENTS_CAP: usize = 4096;

/// A request, with the bytes of a write.
struct Job {
    request: Request,
    data: Vec<u8>,
}

/// Bytes that a request holds while it is worked on.
fn weight(request: &Request) -> usize {
    if request.carries() {
        request.length as usize
    } else {
        0
    }
}

/// The memory of requests that are worked on.
#[derive(Default)]
struct Budget {
    used: Mutex<usize>,
    freed: Condvar,
}

impl Budget {
    fn take(&self, bytes: usize) {
        let mut used = locked(&self.used);
        while *used > 0 && *used + bytes > IN_FLIGHT_CAP {
            used = self
                .freed
                .wait(used)
                .unwrap_or_else(PoisonError::into_inner);
        }
        *used += bytes;
    }

    fn give_back(&self, bytes: usize) {
        *locked(&self.used) -= bytes;
        self.freed.notify_all();
    }
}

/// Works for a client until it says good-bye.
pub(super) fn transmit(shared: &Shared, stream: &Stream, agreed: &Agreed) -> io::Result<()> {
    let budget = Budget::default();
    let (sender, receiver) = sync_channel::<Job>(WORKERS);
    let receiver = Mutex::new(receiver);
    let answers = Mutex::new(());
    std::thread::scope(|scope| {
        let work = || work(shared, stream, agreed, &receiver, &budget, &answers);
        let mut workers = 0;
        let heard = loop {
            let job = match next(stream, &budget) {
                Ok(Some(job)) => job,
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            };
            // As many as a client keeps busy, and no more.
            if workers < WORKERS {
                std::thread::Builder::new()
                    .name("lifeboat-nbd".to_owned())
                    .spawn_scoped(scope, work)?;
                workers += 1;
            }
            if sender.send(job).is_err() {
                break Ok(());
            }
        };
        drop(sender);
        heard
    })
}

/// The next request; none when the client says good-bye.
fn next(mut stream: &Stream, budget: &Budget) -> io::Result<Option<Job>> {
    let request = Request::decode(&array(stream)?).map_err(invalid)?;
    if request.kind == CMD_DISC {
        return Ok(None);
    }
    budget.take(weight(&request));
    let mut data = Vec::new();
    if request.kind == CMD_WRITE {
        data.resize(request.length as usize, 0);
        stream.read_exact(&mut data)?;
    }
    Ok(Some(Job { request, data }))
}

fn work(
    shared: &Shared,
    stream: &Stream,
    agreed: &Agreed,
    jobs: &Mutex<Receiver<Job>>,
    budget: &Budget,
    answers: &Mutex<()>,
) {
    loop {
        let next = locked(jobs).recv();
        let Ok(job) = next else {
            return;
        };
        let (request, done) = (job.request, act(shared, agreed, job));
        let sent = {
            let _turn = locked(answers);
            answer(stream, agreed, &request, done)
        };
        budget.give_back(weight(&request));
        if sent.is_err() {
            // The reading thread notices.
            stream.shut();
        }
    }
}

/// What came of a request.
enum Done {
    /// There is nothing to tell.
    Acted,
    /// Bytes were read; a hole's are zeros.
    Read(Vec<u8>, Vec<Extent>),
    /// What the range consists of.
    Mapped(Vec<Extent>),
}

/// Why a request was not done: the error number of the protocol, and for people.
struct Failed(u32, String);

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        use nix::errno::Errno;
        let number = match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ENOSPC | Errno::EDQUOT) => ENOSPC,
            _ => EIO,
        };
        Self(number, error.to_string())
    }
}

/// Does what is asked.
fn act(shared: &Shared, agreed: &Agreed, job: Job) -> Result<Done, Failed> {
    let Job { request, mut data } = job;
    let Request {
        flags,
        kind,
        offset,
        ..
    } = request;
    let export = &agreed.export;
    let length = u64::from(request.length);
    let refused = |number, why: &str| Err(Failed(number, why.to_owned()));
    let writes = matches!(kind, CMD_WRITE | CMD_TRIM | CMD_WRITE_ZEROES);
    if writes && shared.read_only {
        return refused(EPERM, "the export is read-only");
    }
    if kind != CMD_FLUSH
        && offset
            .checked_add(length)
            .is_none_or(|end| end > export.size)
    {
        let number = if writes { ENOSPC } else { EINVAL };
        return refused(number, "the export ends before that");
    }
    match kind {
        CMD_READ => {
            data.resize(length as usize, 0);
            let whole = !agreed.is_structured || flags & CMD_FLAG_DF != 0;
            let parts = if whole {
                export.read(&mut data, offset)?;
                vec![Extent {
                    length,
                    is_hole: false,
                }]
            } else {
                export.read_parts(&mut data, offset)?
            };
            return Ok(Done::Read(data, parts));
        }
        CMD_BLOCK_STATUS if !agreed.maps => {
            return refused(EINVAL, "no metadata context was set for this export");
        }
        CMD_BLOCK_STATUS if length == 0 => return refused(EINVAL, "it asks about nothing"),
        CMD_BLOCK_STATUS => {
            let cap = if flags & CMD_FLAG_REQ_ONE != 0 {
                1
            } else {
                EXTENTS_CAP
            };
            return Ok(Done::Mapped(export.map(offset, length, cap)?));
        }
        CMD_WRITE => export.write(&data, offset)?,
        CMD_FLUSH => export.sync()?,
        CMD_TRIM => export.zero(offset, length, true)?,
        CMD_WRITE_ZEROES => export.zero(offset, length, flags & CMD_FLAG_NO_HOLE == 0)?,
        _ => return refused(ENOTSUP, "there is no such command here"),
    }
    if writes && flags & CMD_FLAG_FUA != 0 {
        export.sync()?;
    }
    Ok(Done::Acted)
}

fn answer(
    mut stream: &Stream,
    agreed: &Agreed,
    request: &Request,
    done: Result<Done, Failed>,
) -> io::Result<()> {
    let cookie = request.cookie;
    match done {
        Ok(Done::Acted) => stream.write_all(&simple(0, cookie)),
        Ok(Done::Read(data, _)) if !agreed.is_structured => {
            stream.write_all(&simple(0, cookie))?;
            stream.write_all(&data)
        }
        Ok(Done::Read(data, parts)) => {
            let (mut at, end) = (0, data.len());
            if end == 0 {
                return stream.write_all(&chunk(true, REPLY_NONE, cookie, b"", 0));
            }
            for part in parts {
                let bytes = &data[at..at + part.length as usize];
                let offset = (request.offset + at as u64).to_be_bytes();
                at += bytes.len();
                if part.is_hole {
                    // No longer than a request.
                    let length = (part.length as u32).to_be_bytes();
                    let hole = [&offset[..], &length].concat();
                    let hole = chunk(at == end, REPLY_OFFSET_HOLE, cookie, &hole, 0);
                    stream.write_all(&hole)?;
                } else {
                    let kind = REPLY_OFFSET_DATA;
                    stream.write_all(&chunk(at == end, kind, cookie, &offset, bytes.len()))?;
                    stream.write_all(bytes)?;
                }
            }
            Ok(())
        }
        Ok(Done::Mapped(extents)) => {
            let mut content = ALLOCATION_ID.to_be_bytes().to_vec();
            for extent in extents {
                let state = if extent.is_hole { STATE_HOLE_ZERO } else { 0 };
                // No longer than a request.
                content.extend_from_slice(&(extent.length as u32).to_be_bytes());
                content.extend_from_slice(&state.to_be_bytes());
            }
            stream.write_all(&chunk(true, REPLY_BLOCK_STATUS, cookie, &content, 0))
        }
        Err(Failed(number, why)) if agreed.is_structured => {
            let length = u16::try_from(why.len()).unwrap_or(0);
            let mut content = number.to_be_bytes().to_vec();
            content.extend_from_slice(&length.to_be_bytes());
            content.extend_from_slice(&why.as_bytes()[..usize::from(length)]);
            stream.write_all(&chunk(true, REPLY_ERROR, cookie, &content, 0))
        }
        Err(Failed(number, _)) => stream.write_all(&simple(number, cookie)),
    }
}
