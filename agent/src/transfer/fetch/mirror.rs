//! The mirror's connection: the target sends the changes of a served tree, the source keeps them in a log.
//!
//! Invariants: records are sealed for their own direction; the source appends only the record that is next, so that
//! one that is sent again changes nothing; it says durable only of what it wrote back to its disk. Non-goals: when
//! the target sends, and what the log is written over.

use super::connect::{Connected, connect};
use super::plan::FetchPlan;
use super::wire::Fetch;
use crate::model::ids::{Epoch, VolumeId};
use crate::transfer::Options;
use crate::transfer::connection::{Incoming, Receiver, Transmitter};
use crate::transfer::frame::{DATA_CAP, FrameKind, HEADER_LEN, Header};
use crate::transfer::message::Message;
use crate::transfer::queue::lock;
use crate::transfer::seal::{Salt, Sealer};
use crate::transfer::spent::Clock;
use crate::volume::codec::Reader;
use crate::volume::mirror::{Change, Log, LogId, Record};
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

/// Bytes of records that are sent together.
pub const BATCH: usize = DATA_CAP / 2;

/// The target's sending half.
pub struct MirrorSender {
    transmitter: Transmitter,
    socket: Arc<TcpStream>,
    sealer: Sealer,
    volume: VolumeId,
    number: u64,
    record: Vec<u8>,
}

/// The target's receiving half.
pub struct MirrorReceiver(Receiver);

/// Connects to the source; gives also the number of the last record that is durable there.
///
/// # Errors
/// What failed, or why the source refuses.
pub fn mirror_to(
    plan: &FetchPlan,
    options: &Options,
    log: LogId,
) -> Result<(MirrorSender, MirrorReceiver, u64), String> {
    let grant = (plan.admit)()?;
    let key = grant.data_key.as_ref();
    let key = key.ok_or("the source let this device in without a key to seal with")?;
    let salt: Salt = crate::transfer::seal::random().map_err(|error| error.to_string())?;
    let open = Fetch::Mirror { log, salt };
    let Connected {
        socket,
        receiver,
        transmitter,
        answer,
    } = connect(plan, &grant, options, open)?;
    match answer {
        Fetch::Mirrored(durable) => {
            let sender = MirrorSender {
                transmitter,
                socket,
                sealer: Sealer::to_source(&plan.plan, key, &salt),
                volume: plan.volume,
                number: 0,
                record: Vec::new(),
            };
            Ok((sender, MirrorReceiver(receiver), durable))
        }
        Fetch::Refused(why) => Err(format!("the source refuses to keep changes: {why}")),
        _ => Err("the source answered out of order".to_owned()),
    }
}

impl MirrorSender {
    /// Sends whole records.
    ///
    /// # Errors
    /// The connection broke.
    pub fn send(&mut self, records: &[u8]) -> std::io::Result<()> {
        self.record.clear();
        self.record.resize(HEADER_LEN, 0);
        self.record.extend_from_slice(records);
        let header = Header {
            kind: FrameKind::Sealed,
            barrier: false,
            length: 0,
            volume: self.volume,
            epoch: Epoch(0),
            number: self.number,
            first_block: 0,
        };
        self.number += 1;
        self.sealer.seal(&header, &mut self.record);
        self.transmitter.record(&self.record)
    }

    /// Asks for all that was sent to be made durable; the answer goes to the receiving half.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn sync(&mut self) -> std::io::Result<()> {
        self.say(&Message::Fetch(Fetch::Sync))
    }

    /// A sign of life.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn ping(&mut self) -> std::io::Result<()> {
        self.say(&Message::Ping)
    }

    fn say(&mut self, message: &Message) -> std::io::Result<()> {
        self.transmitter.message(self.volume, Epoch(0), message)
    }

    /// Ends both halves when it is called or dropped.
    #[must_use]
    pub fn socket(&self) -> Arc<TcpStream> {
        Arc::clone(&self.socket)
    }
}

impl Drop for MirrorSender {
    fn drop(&mut self) {
        // It may be closed already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

impl MirrorReceiver {
    /// Number of the last record that is durable at the source, when that is said next.
    ///
    /// # Errors
    /// The connection broke, or why the source keeps no more.
    pub fn durable(&mut self) -> Result<u64, String> {
        loop {
            let next = self.0.next(Vec::new()).map_err(|error| error.to_string())?;
            match next {
                Incoming::Message(_, _, Message::Ping) => {}
                Incoming::Message(_, _, Message::Fetch(Fetch::Mirrored(durable))) => {
                    return Ok(durable);
                }
                Incoming::Message(_, _, Message::Fetch(Fetch::Refused(why))) => {
                    return Err(format!("the source keeps no more changes: {why}"));
                }
                _ => return Err("the source answered out of order".to_owned()),
            }
        }
    }
}

/// Opens the log of a volume in `directory`, which is made.
pub(super) fn open_log(directory: &Path, id: LogId) -> Result<Log, String> {
    let failed = |error: std::io::Error| format!("its log in {}: {error}", directory.display());
    std::fs::create_dir_all(directory).map_err(failed)?;
    Log::open(&directory.join("log"), || Ok(id)).map_err(failed)
}

/// The source's side of one connection, from the message that opened it to its end.
pub(super) fn keep(
    log: &Mutex<Log>,
    id: LogId,
    sealer: &Sealer,
    volume: VolumeId,
    (receiver, transmitter): (&mut Receiver, &mut Transmitter),
    mut clock: Clock<'_>,
) -> Result<(), String> {
    let mut say = |message: Message| {
        let said = transmitter.message(volume, Epoch(0), &message);
        said.map_err(|error| error.to_string())
    };
    let durable = {
        let mut log = lock(log);
        if log.id() == id {
            // It was made durable when it was opened, and since then by who asked for it.
            log.sync()
        } else {
            Err(std::io::Error::other("it keeps the log of another copy"))
        }
    };
    match durable {
        Ok(durable) => say(Message::Fetch(Fetch::Mirrored(durable)))?,
        Err(error) => return say(Message::Fetch(Fetch::Refused(error.to_string()))),
    }
    let mut buffer = Vec::new();
    loop {
        clock.note();
        let next = receiver.next(std::mem::take(&mut buffer));
        match next.map_err(|error| error.to_string())? {
            Incoming::Message(_, _, Message::Ping) => say(Message::Ping)?,
            Incoming::Message(_, _, Message::Fetch(Fetch::Sync)) => {
                let synced = lock(log).sync();
                match synced {
                    Ok(last) => say(Message::Fetch(Fetch::Mirrored(last)))?,
                    Err(error) => return say(Message::Fetch(Fetch::Refused(error.to_string()))),
                }
            }
            Incoming::Record(header, bytes) => {
                buffer = bytes;
                let plain = sealer
                    .open(&header, &mut buffer[HEADER_LEN..])
                    .map_err(|error| error.to_string())?;
                if let Err(error) = append(&mut lock(log), plain)? {
                    return say(Message::Fetch(Fetch::Refused(error.to_string())));
                }
            }
            Incoming::Message(..) => return Err("a message came out of order".to_owned()),
        }
    }
}

/// Appends the records that are next; an error of the disk is the inner one.
fn append(log: &mut Log, records: &[u8]) -> Result<std::io::Result<()>, String> {
    let mut reader = Reader::new(records);
    while !reader.is_empty() {
        let record = Record::decode(&mut reader).map_err(|error| error.to_string())?;
        if record.number <= log.last() {
            continue;
        }
        if record.number != log.last() + 1 {
            return Err("a mirrored change was left out".to_owned());
        }
        Change::decode(record.content).map_err(|error| error.to_string())?;
        if let Err(error) = log.append(record.content) {
            return Ok(Err(error));
        }
    }
    Ok(Ok(()))
}
