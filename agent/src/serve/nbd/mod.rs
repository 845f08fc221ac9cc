//! The files of a served volume as NBD exports: who listens, and who is let in.
//!
//! The rules are those of the protocol's document (doc/proto.md of the NetworkBlockDevice project).
//! Invariants: a client's lengths are compared with their caps before anything is allocated; nobody beyond this host
//! is let in. Non-goals: TLS, resizing.

mod commands;
mod negotiation;
pub mod wire;

use super::FrontEnd;
use super::store::Store;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Connections at a time.
const CONNECTIONS_CAP: usize = 16;
/// A client negotiates within this time.
const NEGOTIATION: Duration = Duration::from_secs(10);

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
    // Anything else that lies there refuses too.
    let is_socket =
        std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    match UnixStream::connect(path) {
        Err(error) if is_socket && error.kind() == io::ErrorKind::ConnectionRefused => {
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

fn array<const N: usize>(mut stream: &Stream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn serve(shared: &Shared, stream: &Stream) -> io::Result<()> {
    stream.patience(Some(NEGOTIATION))?;
    let Some(agreed) = negotiation::negotiate(shared, stream)? else {
        return Ok(());
    };
    // A client may be idle for as long as it likes.
    stream.patience(None)?;
    commands::transmit(shared, stream, &agreed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_socket_at_which_nobody_listens_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        std::fs::write(at("file"), "disk").unwrap();
        drop(UnixListener::bind(at("dead")).unwrap());
        let _live = UnixListener::bind(at("live")).unwrap();
        std::os::unix::fs::symlink(at("file"), at("link")).unwrap();
        for name in ["file", "dead", "live", "link", "none"] {
            remove_dead_socket(&at(name)).unwrap();
        }
        assert_eq!(std::fs::read(at("file")).unwrap(), b"disk");
        assert!(at("live").exists() && at("link").exists());
        assert!(!at("dead").exists());
    }

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
}
