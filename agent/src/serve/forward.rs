//! Forwards TCP connections to a port of the source on to the twin.
//!
//! Invariants: a connection that was accepted is carried or closed, never kept waiting without bound;
//! each direction ends by itself (half-close); a slow reader slows its sender and nothing else; memory a
//! connection is two fixed buffers.
//! Non-goals: UDP; showing the twin the client's address.

use nix::sys::socket::{setsockopt, sockopt};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

/// How long the port may still be held: a runtime needs a moment after a container's death.
const BIND_TIME: Duration = Duration::from_secs(10);
/// How long an accepted connection waits for a twin that is only just starting.
const CONNECT_TIME: Duration = Duration::from_secs(15);
/// Between two tries of either.
const RETRY: Duration = Duration::from_millis(50);
/// Buffer of each direction of a connection: what one `splice` of a default pipe would carry.
const BUFFER: usize = 64 << 10;
/// Connections the kernel queues while we accept.
const BACKLOG: u32 = 1024;

/// A port could not be forwarded.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// The port cannot be listened on.
    #[error("cannot forward {listen} to {to}: {source}; see who holds the port (`ss -ltnp`)")]
    Listen {
        /// The port of the source.
        listen: SocketAddr,
        /// The twin's.
        to: SocketAddr,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// What was carried since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Connections accepted.
    pub accepted: u64,
    /// Connections open now.
    pub open: u64,
    /// Connections for which the twin could not be reached.
    pub failed: u64,
    /// Bytes from clients to the twin.
    pub to_twin: u64,
    /// Bytes from the twin to clients.
    pub from_twin: u64,
}

#[derive(Debug, Default)]
struct Counters {
    accepted: AtomicU64,
    open: AtomicU64,
    failed: AtomicU64,
    to_twin: AtomicU64,
    from_twin: AtomicU64,
}

/// A port being forwarded; stops when dropped.
#[derive(Debug)]
pub struct Forwarder {
    listen: SocketAddr,
    to: SocketAddr,
    counters: Arc<Counters>,
    task: JoinHandle<()>,
}

impl Forwarder {
    /// Listens on `listen` and carries every connection to `to`. An unspecified IPv6 address listens for
    /// IPv6 only, so that IPv4 can have a forwarder of its own. While somebody still holds the port it
    /// tries again, for at most 10 s.
    ///
    /// # Errors
    /// When the port cannot be listened on.
    pub async fn start(listen: SocketAddr, to: SocketAddr) -> Result<Self, ForwardError> {
        let since = Instant::now();
        let listener = loop {
            match bind(listen) {
                Ok(listener) => break listener,
                Err(error)
                    if error.kind() == io::ErrorKind::AddrInUse && since.elapsed() < BIND_TIME =>
                {
                    tokio::time::sleep(RETRY).await;
                }
                Err(source) => return Err(ForwardError::Listen { listen, to, source }),
            }
        };
        let listen = listener.local_addr().unwrap_or(listen);
        let counters = Arc::new(Counters::default());
        let task = tokio::spawn(accept(listener, to, counters.clone()));
        Ok(Self {
            listen,
            to,
            counters,
            task,
        })
    }

    /// The address that is listened on.
    #[must_use]
    pub fn listen(&self) -> SocketAddr {
        self.listen
    }

    /// The address connections are carried to.
    #[must_use]
    pub fn to(&self) -> SocketAddr {
        self.to
    }

    /// What was carried until now.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Traffic {
            accepted: read(&self.counters.accepted),
            open: read(&self.counters.open),
            failed: read(&self.counters.failed),
            to_twin: read(&self.counters.to_twin),
            from_twin: read(&self.counters.from_twin),
        }
    }

    /// Stops listening and closes every connection; the port is free when this returns.
    pub async fn stop(mut self) {
        self.task.abort();
        // The only error is the cancellation asked for.
        let _ = (&mut self.task).await;
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn bind(listen: SocketAddr) -> io::Result<TcpListener> {
    let socket = if listen.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        let socket = TcpSocket::new_v6()?;
        setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
        socket
    };
    socket.set_reuseaddr(true)?; // connections of the dead container linger in TIME_WAIT
    socket.bind(listen)?;
    socket.listen(BACKLOG)
}

async fn accept(listener: TcpListener, to: SocketAddr, counters: Arc<Counters>) {
    // Dropped with this task, and with it every connection.
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((client, _)) => {
                    counters.accepted.fetch_add(1, Ordering::Relaxed);
                    connections.spawn(carry(client, to, counters.clone()));
                }
                // Out of descriptors, or the client has gone already: neither is a reason to end, and
                // the first must not spin.
                Err(error) => {
                    tracing::warn!(%to, %error, "a connection to forward was not accepted");
                    tokio::time::sleep(RETRY).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

/// Counts a connection as open as long as it lives, also when its task is cancelled.
struct Open<'a>(&'a AtomicU64);

impl<'a> Open<'a> {
    fn new(open: &'a AtomicU64) -> Self {
        open.fetch_add(1, Ordering::Relaxed);
        Self(open)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn carry(mut client: TcpStream, to: SocketAddr, counters: Arc<Counters>) {
    let _open = Open::new(&counters.open);
    let mut twin = match connect(to).await {
        Ok(twin) => twin,
        Err(error) => {
            counters.failed.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(%to, %error, "the twin cannot be reached; a forwarded connection is closed");
            return;
        }
    };
    // Small requests must not wait for a full segment on either side.
    let _ = client.set_nodelay(true);
    let _ = twin.set_nodelay(true);
    let (client_read, client_write) = client.split();
    let (twin_read, twin_write) = twin.split();
    // An error of one direction ends both: the peer is gone.
    let _ = tokio::try_join!(
        pump(client_read, twin_write, &counters.to_twin),
        pump(twin_read, client_write, &counters.from_twin),
    );
}

async fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let since = Instant::now();
    loop {
        let left = CONNECT_TIME.saturating_sub(since.elapsed());
        match tokio::time::timeout(left, TcpStream::connect(to)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) if since.elapsed() + RETRY >= CONNECT_TIME => return Err(error),
            Ok(Err(_)) => tokio::time::sleep(RETRY).await,
            Err(_) => return Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

/// Carries one direction to its end and passes the end on.
async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    carried: &AtomicU64,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let length = from.read(&mut buffer).await?;
        if length == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..length]).await?;
        carried.fetch_add(length as u64, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(ip: &str) -> SocketAddr {
        SocketAddr::new(ip.parse().unwrap(), 0)
    }

    /// Answers each connection, after its end, with what it read.
    async fn echo_after_end(ip: &str) -> SocketAddr {
        let listener = TcpListener::bind(any(ip)).await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                tokio::spawn(async move {
                    let mut all = Vec::new();
                    stream.read_to_end(&mut all).await.unwrap();
                    stream.write_all(&all).await.unwrap();
                });
            }
        });
        address
    }

    async fn ask(address: SocketAddr, words: &[u8]) -> Vec<u8> {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(words).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn a_half_closed_connection_still_gets_its_answer() {
        let twin = echo_after_end("127.0.0.1").await;
        let forwarder = Forwarder::start(any("127.0.0.1"), twin).await.unwrap();
        assert_eq!(
            ask(forwarder.listen(), b"acknowledged").await,
            b"acknowledged"
        );
        let traffic = forwarder.traffic();
        assert_eq!((traffic.accepted, traffic.failed), (1, 0));
        assert_eq!((traffic.to_twin, traffic.from_twin), (12, 12));
    }

    #[tokio::test]
    async fn many_connections_are_carried_side_by_side() {
        let twin = echo_after_end("127.0.0.1").await;
        let forwarder = Forwarder::start(any("127.0.0.1"), twin).await.unwrap();
        let mut asks = JoinSet::new();
        for number in 0..200_u32 {
            let words = vec![number as u8; 100_000];
            let address = forwarder.listen();
            asks.spawn(async move { ask(address, &words).await == words });
        }
        let answers = asks.join_all().await;
        assert_eq!(answers.iter().filter(|right| **right).count(), 200);
        assert_eq!(forwarder.traffic().to_twin, 200 * 100_000);
    }

    #[tokio::test]
    async fn ipv6_clients_reach_a_twin_on_ipv4_and_the_port_stays_free_for_ipv4() {
        if TcpListener::bind(any("::1")).await.is_err() {
            println!("IPv6 is off on this machine: nothing was forwarded from it");
            return;
        }
        let twin = echo_after_end("127.0.0.1").await;
        let six = Forwarder::start(any("::"), twin).await.unwrap();
        let port = six.listen().port();
        let four = Forwarder::start(SocketAddr::new("0.0.0.0".parse().unwrap(), port), twin)
            .await
            .unwrap();
        assert_eq!(
            ask(SocketAddr::new("::1".parse().unwrap(), port), b"6").await,
            b"6"
        );
        assert_eq!(
            ask(SocketAddr::new("127.0.0.1".parse().unwrap(), port), b"4").await,
            b"4"
        );
        assert_eq!((six.traffic().accepted, four.traffic().accepted), (1, 1));
    }

    #[tokio::test]
    async fn a_connection_waits_for_a_twin_that_is_still_starting() {
        let place = TcpListener::bind(any("127.0.0.1")).await.unwrap();
        let twin = place.local_addr().unwrap();
        drop(place);
        let forwarder = Forwarder::start(any("127.0.0.1"), twin).await.unwrap();
        let asking = tokio::spawn(ask(forwarder.listen(), b"early"));
        tokio::time::sleep(RETRY * 4).await;
        let listener = bind(twin).unwrap();
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut words = Vec::new();
        stream.read_to_end(&mut words).await.unwrap();
        stream.write_all(b"late").await.unwrap();
        drop(stream);
        assert_eq!(
            (words.as_slice(), asking.await.unwrap().as_slice()),
            (&b"early"[..], &b"late"[..])
        );
    }

    #[tokio::test]
    async fn a_slow_reader_holds_its_sender_back_and_loses_nothing() {
        const SENT: usize = 32 << 20;
        let listener = TcpListener::bind(any("127.0.0.1")).await.unwrap();
        let forwarder = Forwarder::start(any("127.0.0.1"), listener.local_addr().unwrap())
            .await
            .unwrap();
        let mut client = TcpStream::connect(forwarder.listen()).await.unwrap();
        let sending = tokio::spawn(async move {
            client.write_all(&vec![7; SENT]).await.unwrap();
        });
        let (mut twin, _) = listener.accept().await.unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(
            forwarder.traffic().to_twin < SENT as u64,
            "nothing held the sender back"
        );
        let mut all = Vec::new();
        twin.read_to_end(&mut all).await.unwrap();
        sending.await.unwrap();
        assert_eq!(all.len(), SENT);
    }

    #[tokio::test]
    async fn stopping_frees_the_port_and_closes_connections() {
        let twin = echo_after_end("127.0.0.1").await;
        let forwarder = Forwarder::start(any("127.0.0.1"), twin).await.unwrap();
        let address = forwarder.listen();
        let mut client = TcpStream::connect(address).await.unwrap();
        while forwarder.traffic().open == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        forwarder.stop().await;
        bind(address).unwrap();
        // Closed or reset, but not silent.
        assert!(matches!(client.read(&mut [0; 1]).await, Ok(0) | Err(_)));
    }

    #[tokio::test]
    async fn a_port_that_is_held_for_a_moment_is_taken_when_it_is_let_go() {
        let holder = TcpListener::bind(any("127.0.0.1")).await.unwrap();
        let address = holder.local_addr().unwrap();
        let starting = tokio::spawn(Forwarder::start(address, any("127.0.0.1")));
        tokio::time::sleep(RETRY * 3).await;
        assert!(!starting.is_finished());
        drop(holder);
        assert_eq!(starting.await.unwrap().unwrap().listen(), address);
    }
}
