//! A file of a served volume as a block device, by ublk (Documentation/block/ublk.rst).
//!
//! One queue, whose thread hands requests to a pool: each may wait for the source, and holds up no other. Data are
//! copied by reading and writing the character device (Linux 6.5). Invariants: a request is answered within the
//! store's patience; the device ends with its front-end or with the agent's process, and what then uses it gets
//! errors; requests in flight are bounded in number and size. Non-goals: resizing, zoned disks, keeping a device
//! over the agent's death.

mod abi;
mod ring;

use self::abi::{DeviceInfo, Operation, Request};
use self::ring::{Control, Event, Queue};
use super::FrontEnd;
use super::piece::{self, Piece};
use super::pool::Pool;
use super::store::Store;
use nix::errno::Errno;
use nix::sys::stat::stat;
use std::fs::File;
use std::io::{self, PipeWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Requests of a device that are worked on side by side: at 512 KiB each, at most 32 MiB.
const DEPTH: u16 = 64;

/// A file cannot be served as a block device.
#[derive(Debug, thiserror::Error)]
pub enum UblkError {
    /// No ublk.
    #[error(
        "/dev/ublk-control is not there: the kernel has no ublk (CONFIG_BLK_DEV_UBLK), or its module is not loaded (`modprobe ublk_drv`); without it, use --nbd"
    )]
    Missing,
    /// An old one.
    #[error("this kernel's ublk has no UBLK_F_USER_COPY, which Linux 6.5 has; use --nbd")]
    Old,
    /// No such file.
    #[error("{0}; --ublk=FILE serves one of the volume's files as a block device")]
    Unknown(String),
    /// No whole number of sectors.
    #[error(
        "the file has {0} bytes, and a block device has whole sectors of 512 bytes; use --nbd or --mount"
    )]
    Size(u64),
    /// Its first block, in which the kernel looks for partitions, is not to be had.
    #[error(
        "the file's first block did not come: {0}; see that its source is there, and try again"
    )]
    Absent(io::Error),
    /// The system refuses.
    #[error("cannot {doing}: {error}; --nbd takes no driver of the kernel's")]
    System {
        /// What.
        doing: &'static str,
        /// Cause.
        error: io::Error,
    },
}

fn failed(doing: &'static str) -> impl FnOnce(io::Error) -> UblkError {
    move |error| UblkError::System { doing, error }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Plain values, whole after every statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A block device; dropped, it ends, also under those who use it.
pub struct UblkDevice {
    number: u32,
    control: Control,
    queue: Option<JoinHandle<()>>,
}

impl UblkDevice {
    /// Whether there is ublk here. Deletes the devices of earlier lives of the agent that keeps its state in
    /// `owner`.
    ///
    /// # Errors
    /// There is none, or it is too old.
    pub fn check(owner: &Path) -> Result<(), UblkError> {
        let mut control = open()?;
        let mark = mark(owner).map_err(failed("look at the agent's state"))?;
        let class = Path::new("/sys/class/ublk-char");
        for entry in class.read_dir().into_iter().flatten().flatten() {
            let name = entry.file_name();
            let number = name.to_str().and_then(|name| name.strip_prefix("ublkc"));
            let Some(number) = number.and_then(|number| number.parse().ok()) else {
                continue;
            };
            let mut info = DeviceInfo([0; 64]);
            // It may be gone by now.
            let known = control.command(abi::GET_DEV_INFO, number, 0, &mut info.0);
            if known.is_ok() && info.mark() == mark && info.is_dead() {
                tracing::info!(
                    device = number,
                    "deletes the ublk device of an earlier agent"
                );
                delete(&mut control, number);
            }
        }
        Ok(())
    }

    /// Serves a file of the store, or the only one; `owner` is where the agent keeps its state.
    ///
    /// # Errors
    /// [`UblkError`].
    pub fn start(
        owner: &Path,
        file: Option<&str>,
        store: &Arc<Store>,
        read_only: bool,
    ) -> Result<Self, UblkError> {
        let name = file.unwrap_or_default().as_bytes();
        let piece = Piece::find(store, name, read_only)
            .ok_or_else(|| UblkError::Unknown(piece::unknown(store, name)))?;
        if piece.size == 0 || !piece.size.is_multiple_of(abi::SECTOR) {
            return Err(UblkError::Size(piece.size));
        }
        // The kernel reads it while the device starts; nobody could be told then that the source is away.
        piece
            .read(&mut [0; abi::SECTOR as usize], 0)
            .map_err(UblkError::Absent)?;
        let mut control = open()?;
        let mark = mark(owner).map_err(failed("look at the agent's state"))?;
        let mut info = DeviceInfo::new(DEPTH, mark);
        let added = control.command(abi::ADD_DEV, u32::MAX, 0, &mut info.0);
        added.map_err(failed("add a ublk device"))?;
        let mut device = Self {
            number: info.number(),
            control,
            queue: None,
        };
        let mut parameters = abi::parameters(piece.size, read_only);
        device
            .command(abi::SET_PARAMS, 0, &mut parameters)
            .map_err(failed("set up a ublk device"))?;
        let path = format!("/dev/ublkc{}", device.number);
        let file = File::options().read(true).write(true).open(path);
        let file = file.map_err(failed("open a ublk device"))?;
        let (ready, fetches) = sync_channel(1);
        let thread = std::thread::Builder::new()
            .name("lifeboat-ublk".to_owned())
            .spawn(move || serve(&Arc::new(Served { piece, file }), &ready))
            .map_err(failed("start a thread for a ublk device"))?;
        device.queue = Some(thread);
        let fetches = fetches.recv();
        fetches
            .unwrap_or_else(|_| Err(Errno::EPIPE.into()))
            .map_err(failed("fetch the requests of a ublk device"))?;
        device
            .command(abi::START_DEV, std::process::id().into(), &mut [])
            .map_err(failed("start a ublk device"))?;
        Ok(device)
    }

    fn command(&mut self, operation: u32, data: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.control.command(operation, self.number, data, buffer)
    }
}

impl FrontEnd for UblkDevice {
    fn at(&self) -> String {
        format!("/dev/ublkb{}", self.number)
    }
}

impl Drop for UblkDevice {
    fn drop(&mut self) {
        // File systems on it write back and shut down; the thread answers until it has stopped.
        match self.command(abi::STOP_DEV, 0, &mut []) {
            Ok(()) => {}
            // Deleted by hand.
            Err(error) if error.raw_os_error() == Some(Errno::ENODEV as i32) => {}
            Err(error) => {
                tracing::error!(device = self.number, "cannot stop a ublk device: {error}");
                return;
            }
        }
        if let Some(queue) = self.queue.take()
            && queue.join().is_err()
        {
            tracing::error!("the thread of a ublk device panicked; this is a bug");
        }
        delete(&mut self.control, self.number);
    }
}

/// The control device of a ublk that is new enough.
fn open() -> Result<Control, UblkError> {
    let mut control = Control::open().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => UblkError::Missing,
        _ => failed("use /dev/ublk-control by io_uring")(error),
    })?;
    let mut features = [0; 8];
    let asked = control.command(abi::GET_FEATURES, u32::MAX, 0, &mut features);
    if asked.is_err() || u64::from_ne_bytes(features) & abi::F_USER_COPY == 0 {
        return Err(UblkError::Old);
    }
    Ok(control)
}

/// Deletes a device that has stopped; who has it open keeps a dead one, and is not waited for.
fn delete(control: &mut Control, number: u32) {
    match control.command(abi::DEL_DEV_ASYNC, number, 0, &mut []) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(Errno::ENODEV as i32) => {}
        Err(error) => tracing::warn!(
            device = number,
            "cannot delete a ublk device (Linux 6.9 can): {error}"
        ),
    }
}

/// What tells the devices of the agent that keeps its state in `owner` from those of others.
fn mark(owner: &Path) -> io::Result<u64> {
    let stat = stat(owner)?;
    let mut hasher = blake3::Hasher::new_derive_key("lifeboat ublk owner");
    hasher.update(&stat.st_dev.to_ne_bytes());
    hasher.update(&stat.st_ino.to_ne_bytes());
    let mut bytes = [0; 8];
    hasher.finalize_xof().fill(&mut bytes);
    Ok(u64::from_ne_bytes(bytes))
}

/// What a device serves, and its character device.
struct Served {
    piece: Piece,
    file: File,
}

/// Requests that were worked on, for the thread of the queue.
struct Done {
    results: Mutex<Vec<(u16, i32)>>,
    wake: PipeWriter,
}

impl Done {
    fn add(&self, tag: u16, result: i32) {
        let first = {
            let mut results = locked(&self.results);
            results.push((tag, result));
            results.len() == 1
        };
        // Otherwise the thread is told already.
        if first && let Err(error) = (&self.wake).write_all(&[0]) {
            tracing::error!("cannot wake the thread of a ublk device: {error}");
        }
    }
}

/// The thread of the queue, until the device has stopped; says once whether it fetches requests.
fn serve(served: &Arc<Served>, ready: &SyncSender<io::Result<()>>) {
    let opened = io::pipe().and_then(|(awake, wake)| {
        let queue = Queue::open(&served.file, DEPTH)?;
        let results = Mutex::default();
        Ok((queue, awake, Arc::new(Done { results, wake })))
    });
    let (mut queue, mut awake, done) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            // Whoever started it waits for that.
            let _ = ready.send(Err(error));
            return;
        }
    };
    let _ = ready.send(Ok(()));
    let pool = Pool::default();
    queue.watch(&awake);
    let mut events = Vec::new();
    let mut alive = DEPTH;
    while alive > 0 {
        if let Err(error) = queue.wait(&mut events) {
            tracing::error!("io_uring cannot be waited for: {error}; a ublk device ends");
            return;
        }
        for event in events.drain(..) {
            match event {
                Event::Request(tag, request) => {
                    let (served, done) = (Arc::clone(served), Arc::clone(&done));
                    pool.run(move || {
                        let result = act(&served, tag, request);
                        done.add(tag, result.unwrap_or_else(|error| error_number(&error)));
                    });
                }
                Event::Over => alive -= 1,
                Event::Readable => {
                    // One byte is all that may be there.
                    if let Err(error) = awake.read(&mut [0]) {
                        tracing::error!("cannot look who woke a ublk device: {error}");
                    }
                    queue.watch(&awake);
                    for (tag, result) in std::mem::take(&mut *locked(&done.results)) {
                        queue.commit(tag, result);
                    }
                }
            }
        }
    }
}

/// Does what is asked: bytes read or written, 0 for the rest.
fn act(served: &Served, tag: u16, request: Request) -> io::Result<i32> {
    let Served { piece, file } = served;
    let Request { offset, length, .. } = request;
    let count = i32::try_from(length).map_err(io::Error::other)?;
    let zero = |hole, durable| {
        piece.zero(offset, length.into(), hole)?;
        if durable { piece.sync() } else { Ok(()) }
    };
    match request.operation {
        Operation::Read => {
            let mut bytes = vec![0; length as usize];
            piece.read(&mut bytes, offset)?;
            file.write_all_at(&bytes, abi::place(tag))?;
            return Ok(count);
        }
        Operation::Write { durable } => {
            let mut bytes = vec![0; length as usize];
            file.read_exact_at(&mut bytes, abi::place(tag))?;
            piece.write(&bytes, offset)?;
            if durable {
                piece.sync()?;
            }
            return Ok(count);
        }
        Operation::Flush => piece.sync()?,
        Operation::Discard => zero(true, false)?,
        Operation::WriteZeroes { hole, durable } => zero(hole, durable)?,
        Operation::Unknown => return Err(Errno::EOPNOTSUPP.into()),
    }
    Ok(0)
}

/// As the driver takes it.
fn error_number(error: &io::Error) -> i32 {
    let number = match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOSPC | Errno::EDQUOT) => Errno::ENOSPC,
        Some(Errno::EOPNOTSUPP) => Errno::EOPNOTSUPP,
        _ => Errno::EIO,
    };
    -(number as i32)
}
