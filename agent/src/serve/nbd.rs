//! The files of a served volume as NBD exports: fixed newstyle negotiation, simple replies.
//!
//! The rules are those of the protocol's document (doc/proto.md of the NetworkBlockDevice project).
//! Invariants: a client's lengths are compared with their caps before anything is allocated; requests of a
//! connection are worked on side by side, in bounded number and memory; nobody beyond this host is let in.
//! Non-goals: structured replies, TLS, resizing.

use super::FrontEnd;
use super::piece::{self, NAME_CAP, Piece};
use super::store::Store;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

const MAGIC: u64 = 0x4e42_444d_4147_4943;
const I_HAVE_OPT: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const REPLY: u32 = 0x6744_6698;

const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 2;

const OPT_EXPORT_NAME: u32 = 1;
const OPT_ABORT: u32 = 2;
const OPT_LIST: u32 = 3;
const OPT_INFO: u32 = 6;
const OPT_GO: u32 = 7;

const REP_ACK: u32 = 1;
const REP_SERVER: u32 = 2;
const REP_INFO: u32 = 3;
const REP_ERR_UNSUP: u32 = 0x8000_0001;
const REP_ERR_INVALID: u32 = 0x8000_0003;
const REP_ERR_UNKNOWN: u32 = 0x8000_0006;
const REP_ERR_TOO_BIG: u32 = 0x8000_0009;

const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

const HAS_FLAGS: u16 = 1;
const READ_ONLY: u16 = 1 << 1;
const SEND_FLUSH: u16 = 1 << 2;
const SEND_FUA: u16 = 1 << 3;
const SEND_TRIM: u16 = 1 << 5;
const SEND_WRITE_ZEROES: u16 = 1 << 6;
const CAN_MULTI_CONN: u16 = 1 << 8;

const CMD_FLAG_FUA: u16 = 1;
const CMD_FLAG_NO_HOLE: u16 = 2;

/// Longest option: two names of 4096 bytes and a list of what is asked about them.
const OPTION_CAP: u32 = 16 << 10;
/// Longest request: what a client may send that did not ask for the limit.
const REQUEST_CAP: u32 = 32 << 20;
/// Bytes of the requests of one connection that are worked on: more wait in the socket.
const IN_FLIGHT_CAP: usize = 64 << 20;
/// Requests of one connection that are worked on side by side: each may wait for the source.
const WORKERS: usize = 64;
/// Connections at a time.
const CONNECTIONS_CAP: usize = 16;
/// A client negotiates within this time.
const NEGOTIATION: Duration = Duration::from_secs(10);

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const ENOTSUP: u32 = 95;

/// Where an NBD server listens: a unix socket, or a loopback address.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NbdAddress {
    /// A socket in the file system, for root alone.
    Unix(PathBuf),
    /// A port of this host.
    Loopback(SocketAddr),
}

/// The text names no address that exports may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "an NBD address is `unix:/PATH` or a loopback address with a port (`127.0.0.1:10809`): NBD has no keys, so nobody beyond this host is let in"
)]
pub struct NotAnAddress;

impl std::str::FromStr for NbdAddress {
    type Err = NotAnAddress;

    fn from_str(text: &str) -> Result<Self, NotAnAddress> {
        if let Some(path) = text.strip_prefix("unix:") {
            let path = PathBuf::from(path);
            return path
                .is_absolute()
                .then_some(Self::Unix(path))
                .ok_or(NotAnAddress);
        }
        let addr: SocketAddr = text.parse().map_err(|_| NotAnAddress)?;
        addr.ip()
            .is_loopback()
            .then_some(Self::Loopback(addr))
            .ok_or(NotAnAddress)
    }
}

impl std::fmt::Display for NbdAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Loopback(addr) => write!(f, "{addr}"),
        }
    }
}

/// The exports cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("cannot serve NBD at {address}: {error}; choose another address")]
pub struct NbdError {
    address: NbdAddress,
    error: io::Error,
}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// A socket of either kind.
enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

macro_rules! both {
    ($self:expr, $socket:ident => $act:expr) => {
        match $self {
            Stream::Unix($socket) => $act,
            Stream::Tcp($socket) => $act,
        }
    };
}

impl Stream {
    fn shut(&self) {
        // It may be closed already.
        let _ = both!(self, socket => socket.shutdown(std::net::Shutdown::Both));
    }

    fn patience(&self, time: Option<Duration>) -> io::Result<()> {
        both!(self, socket => socket.set_read_timeout(time))
    }
}

impl Read for &Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        both!(self, socket => (&mut &*socket).read(buffer))
    }
}

impl Write for &Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        both!(self, socket => (&mut &*socket).write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Shared {
    store: Arc<Store>,
    read_only: bool,
    over: AtomicBool,
    clients: Mutex<Vec<Arc<Stream>>>,
}

/// Serves a volume's files until it is dropped.
pub struct NbdServer {
    address: NbdAddress,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Plain values, whole after every statement.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl NbdServer {
    /// Listens at `address`.
    ///
    /// # Errors
    /// The address cannot be had.
    pub fn bind(
        address: &NbdAddress,
        store: Arc<Store>,
        read_only: bool,
    ) -> Result<Self, NbdError> {
        let failed = |error| NbdError {
            address: address.clone(),
            error,
        };
        let (listener, address) = match address {
            NbdAddress::Unix(path) => {
                remove_dead_socket(path).map_err(failed)?;
                let listener = UnixListener::bind(path).map_err(failed)?;
                let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
                std::fs::set_permissions(path, mode).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                (Listener::Unix(listener), address.clone())
            }
            NbdAddress::Loopback(addr) => {
                let listener = TcpListener::bind(addr).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                let bound = listener.local_addr().map_err(failed)?;
                (Listener::Tcp(listener), NbdAddress::Loopback(bound))
            }
        };
        let shared = Arc::new(Shared {
            store,
            read_only,
            over: AtomicBool::new(false),
            clients: Mutex::default(),
        });
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("lifeboat-nbd".to_owned())
            .spawn(move || accept(&listener, &for_thread))
            .map_err(|error| NbdError {
                address: address.clone(),
                error,
            })?;
        Ok(Self {
            address,
            shared,
            thread: Some(thread),
        })
    }
}

impl FrontEnd for NbdServer {
    fn at(&self) -> String {
        match &self.address {
            NbdAddress::Unix(path) => format!("nbd+unix:///?socket={}", path.display()),
            NbdAddress::Loopback(addr) => format!("nbd://{addr}"),
        }
    }
}

/// Removes a socket at which nobody listens any more.
fn remove_dead_socket(path: &std::path::Path) -> io::Result<()> {
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)
        }
        _ => Ok(()),
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Release);
        for client in locked(&self.shared.clients).iter() {
            client.shut();
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the NBD listener panicked; this is a bug");
        }
        if let NbdAddress::Unix(path) = &self.address {
            // It may have been removed by hand.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn accept(listener: &Listener, shared: &Arc<Shared>) {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    while !shared.over.load(Ordering::Acquire) {
        let fd = match listener {
            Listener::Unix(listener) => listener.as_fd(),
            Listener::Tcp(listener) => listener.as_fd(),
        };
        // Looks at `over` between polls; a signal only means looking earlier.
        let _ = poll(
            &mut [PollFd::new(fd, PollFlags::POLLIN)],
            PollTimeout::from(200_u8),
        );
        let accepted = match listener {
            Listener::Unix(listener) => listener.accept().and_then(|(socket, _)| {
                socket.set_nonblocking(false)?;
                Ok(Stream::Unix(socket))
            }),
            Listener::Tcp(listener) => listener.accept().and_then(|(socket, _)| {
                socket.set_nonblocking(false)?;
                socket.set_nodelay(true)?;
                Ok(Stream::Tcp(socket))
            }),
        };
        match accepted {
            Ok(stream) => welcome(shared, &Arc::new(stream)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                tracing::warn!("cannot accept an NBD client: {error}");
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }
}

fn welcome(shared: &Arc<Shared>, stream: &Arc<Stream>) {
    {
        let mut clients = locked(&shared.clients);
        if clients.len() >= CONNECTIONS_CAP {
            tracing::warn!("an NBD client is sent away: {CONNECTIONS_CAP} are connected");
            return;
        }
        clients.push(Arc::clone(stream));
    }
    let (for_thread, client) = (Arc::clone(shared), Arc::clone(stream));
    let spawned = std::thread::Builder::new()
        .name("lifeboat-nbd".to_owned())
        .spawn(move || {
            if let Err(error) = serve(&for_thread, &client) {
                tracing::debug!("NBD client: {error}");
            }
            client.shut();
            locked(&for_thread.clients).retain(|known| !Arc::ptr_eq(known, &client));
        });
    if let Err(error) = spawned {
        tracing::error!("cannot start a thread for an NBD client: {error}");
        locked(&shared.clients).retain(|known| !Arc::ptr_eq(known, stream));
    }
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn array<const N: usize>(stream: &Stream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    let mut stream = stream;
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn serve(shared: &Shared, stream: &Stream) -> io::Result<()> {
    stream.patience(Some(NEGOTIATION))?;
    let Some(export) = negotiate(shared, stream)? else {
        return Ok(());
    };
    // A client may be idle for as long as it likes.
    stream.patience(None)?;
    transmit(shared, stream, &export)
}

/// The export that the client chose; none when it left.
fn negotiate(shared: &Shared, mut stream: &Stream) -> io::Result<Option<Piece>> {
    let mut greeting = MAGIC.to_be_bytes().to_vec();
    greeting.extend_from_slice(&I_HAVE_OPT.to_be_bytes());
    greeting.extend_from_slice(&(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
    stream.write_all(&greeting)?;
    let flags = u32::from_be_bytes(array(stream)?);
    if flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
        return Err(invalid("it wants features that nobody offered"));
    }
    loop {
        if u64::from_be_bytes(array(stream)?) != I_HAVE_OPT {
            return Err(invalid("an option does not begin as one"));
        }
        let option = u32::from_be_bytes(array(stream)?);
        let length = u32::from_be_bytes(array(stream)?);
        if length > OPTION_CAP {
            reply(stream, option, REP_ERR_TOO_BIG, b"")?;
            return Err(invalid("an option is longer than its cap"));
        }
        let mut data = vec![0; length as usize];
        stream.read_exact(&mut data)?;
        match option {
            OPT_EXPORT_NAME => {
                // This option has no way to refuse but to hang up.
                let Some(export) = find(shared, &data) else {
                    return Ok(None);
                };
                let mut answer = export.size.to_be_bytes().to_vec();
                answer.extend_from_slice(&flags_of(shared).to_be_bytes());
                if flags & u32::from(NO_ZEROES) == 0 {
                    answer.resize(10 + 124, 0);
                }
                stream.write_all(&answer)?;
                return Ok(Some(export));
            }
            OPT_ABORT => {
                reply(stream, option, REP_ACK, b"")?;
                return Ok(None);
            }
            OPT_LIST if data.is_empty() => {
                for name in piece::names(&shared.store) {
                    let length = u32::try_from(name.len()).unwrap_or(u32::MAX);
                    let mut entry = length.to_be_bytes().to_vec();
                    entry.extend_from_slice(&name);
                    reply(stream, option, REP_SERVER, &entry)?;
                }
                reply(stream, option, REP_ACK, b"")?;
            }
            OPT_INFO | OPT_GO => match named(&data) {
                None => reply(stream, option, REP_ERR_INVALID, b"")?,
                Some(name) => match find(shared, name) {
                    None => {
                        let why = piece::unknown(&shared.store, name);
                        reply(stream, option, REP_ERR_UNKNOWN, why.as_bytes())?;
                    }
                    Some(export) => {
                        let mut info = INFO_EXPORT.to_be_bytes().to_vec();
                        info.extend_from_slice(&export.size.to_be_bytes());
                        info.extend_from_slice(&flags_of(shared).to_be_bytes());
                        reply(stream, option, REP_INFO, &info)?;
                        let mut info = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
                        for size in [1, 4096, REQUEST_CAP] {
                            info.extend_from_slice(&size.to_be_bytes());
                        }
                        reply(stream, option, REP_INFO, &info)?;
                        reply(stream, option, REP_ACK, b"")?;
                        if option == OPT_GO {
                            return Ok(Some(export));
                        }
                    }
                },
            },
            OPT_LIST => reply(stream, option, REP_ERR_INVALID, b"")?,
            _ => reply(stream, option, REP_ERR_UNSUP, b"")?,
        }
    }
}

fn reply(mut stream: &Stream, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
    let mut bytes = OPTION_REPLY.to_be_bytes().to_vec();
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(data);
    stream.write_all(&bytes)
}

/// The name in the data of `INFO` and `GO`.
fn named(data: &[u8]) -> Option<&[u8]> {
    let (length, rest) = data.split_first_chunk::<4>()?;
    let length = u32::from_be_bytes(*length) as usize;
    let (name, rest) = rest.split_at_checked(length)?;
    let (asked, rest) = rest.split_first_chunk::<2>()?;
    let whole = rest.len() == usize::from(u16::from_be_bytes(*asked)) * 2;
    (whole && length <= NAME_CAP).then_some(name)
}

fn find(shared: &Shared, name: &[u8]) -> Option<Piece> {
    Piece::find(&shared.store, name, shared.read_only)
}

fn flags_of(shared: &Shared) -> u16 {
    let flags = HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES | CAN_MULTI_CONN;
    if shared.read_only {
        flags | READ_ONLY
    } else {
        flags
    }
}

/// A request, with the bytes of a write.
struct Request {
    flags: u16,
    kind: u16,
    cookie: u64,
    offset: u64,
    length: u32,
    data: Vec<u8>,
}

impl Request {
    /// Bytes that it holds while it is worked on.
    fn weight(&self) -> usize {
        match self.kind {
            CMD_READ | CMD_WRITE => self.length as usize,
            _ => 0,
        }
    }
}

const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_DISC: u16 = 2;
const CMD_FLUSH: u16 = 3;
const CMD_TRIM: u16 = 4;
const CMD_WRITE_ZEROES: u16 = 6;

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

fn transmit(shared: &Shared, stream: &Stream, export: &Piece) -> io::Result<()> {
    let budget = Budget::default();
    let (sender, receiver) = sync_channel::<Request>(WORKERS);
    let receiver = Mutex::new(receiver);
    let answers = Mutex::new(());
    std::thread::scope(|scope| {
        let work = || work(shared, stream, export, &receiver, &budget, &answers);
        let mut workers = 0;
        let heard = loop {
            let request = match request(stream, &budget) {
                Ok(Some(request)) => request,
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
            if sender.send(request).is_err() {
                break Ok(());
            }
        };
        drop(sender);
        heard
    })
}

/// The next request; none when the client says good-bye.
fn request(mut stream: &Stream, budget: &Budget) -> io::Result<Option<Request>> {
    if u32::from_be_bytes(array(stream)?) != REQUEST {
        return Err(invalid("a request does not begin as one"));
    }
    let flags = u16::from_be_bytes(array(stream)?);
    let kind = u16::from_be_bytes(array(stream)?);
    let cookie = u64::from_be_bytes(array(stream)?);
    let offset = u64::from_be_bytes(array(stream)?);
    let length = u32::from_be_bytes(array(stream)?);
    if kind == CMD_DISC {
        return Ok(None);
    }
    if matches!(kind, CMD_READ | CMD_WRITE) && length > REQUEST_CAP {
        return Err(invalid("a request is longer than its cap"));
    }
    let mut request = Request {
        flags,
        kind,
        cookie,
        offset,
        length,
        data: Vec::new(),
    };
    budget.take(request.weight());
    if kind == CMD_WRITE {
        request.data.resize(length as usize, 0);
        stream.read_exact(&mut request.data)?;
    }
    Ok(Some(request))
}

fn work(
    shared: &Shared,
    stream: &Stream,
    export: &Piece,
    requests: &Mutex<Receiver<Request>>,
    budget: &Budget,
    answers: &Mutex<()>,
) {
    loop {
        let next = locked(requests).recv();
        let Ok(mut request) = next else {
            return;
        };
        let done = act(shared, export, &mut request);
        let (error, data): (u32, &[u8]) = match (&done, request.kind) {
            (Ok(()), CMD_READ) => (0, &request.data),
            (Ok(()), _) => (0, &[]),
            (Err(error), _) => (*error, &[]),
        };
        let mut head = [0; 16];
        head[..4].copy_from_slice(&REPLY.to_be_bytes());
        head[4..8].copy_from_slice(&error.to_be_bytes());
        head[8..].copy_from_slice(&request.cookie.to_be_bytes());
        let sent = {
            let _turn = locked(answers);
            let mut out = stream;
            out.write_all(&head).and_then(|()| out.write_all(data))
        };
        budget.give_back(request.weight());
        if sent.is_err() {
            // The reading thread notices.
            stream.shut();
        }
    }
}

/// Does what is asked; the error number of the protocol when it cannot be done.
fn act(shared: &Shared, export: &Piece, request: &mut Request) -> Result<(), u32> {
    let &mut Request {
        flags,
        kind,
        offset,
        length,
        ..
    } = request;
    let length = u64::from(length);
    let writes = matches!(kind, CMD_WRITE | CMD_TRIM | CMD_WRITE_ZEROES);
    if writes && shared.read_only {
        return Err(EPERM);
    }
    if kind != CMD_FLUSH
        && offset
            .checked_add(length)
            .is_none_or(|end| end > export.size)
    {
        return Err(if writes { ENOSPC } else { EINVAL });
    }
    let done = match kind {
        CMD_READ => {
            request.data.resize(length as usize, 0);
            export.read(&mut request.data, offset)
        }
        CMD_WRITE => export.write(&request.data, offset),
        CMD_FLUSH => export.sync(),
        CMD_TRIM => export.zero(offset, length, true),
        CMD_WRITE_ZEROES => export.zero(offset, length, flags & CMD_FLAG_NO_HOLE == 0),
        _ => return Err(ENOTSUP),
    };
    done.map_err(|error| error_number(&error))?;
    if writes && flags & CMD_FLAG_FUA != 0 {
        export.sync().map_err(|error| error_number(&error))?;
    }
    Ok(())
}

fn error_number(error: &io::Error) -> u32 {
    match error.raw_os_error().map(nix::errno::Errno::from_raw) {
        Some(nix::errno::Errno::ENOSPC | nix::errno::Errno::EDQUOT) => ENOSPC,
        _ => EIO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_socket_or_on_this_host() {
        let parse = |text: &str| text.parse::<NbdAddress>();
        assert!(matches!(parse("unix:/run/a.sock"), Ok(NbdAddress::Unix(_))));
        assert!(matches!(
            parse("127.0.0.1:10809"),
            Ok(NbdAddress::Loopback(_))
        ));
        assert!(matches!(parse("[::1]:1"), Ok(NbdAddress::Loopback(_))));
        for text in ["10.0.0.1:10809", "unix:relative", "0.0.0.0:1", "nonsense"] {
            assert_eq!(parse(text), Err(NotAnAddress), "{text}");
        }
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
}
