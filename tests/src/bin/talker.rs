//! What containers run when it must be known who talks to whom, how, and how much: a server of anything,
//! and a client for each way to connect. Both stay until they are killed.

use std::env;
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::{self, sleep};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, listen,
    sendto, setsockopt, socket, sockopt,
};

const USAGE: &str = "talker serve (tcp|udp|udp-elsewhere|udp-group|udp-once|unix|sink)=WHERE… | call (tcp|brief|sendfile|splice|uring|fastopen|udp|udp-low|udp-connected|unix)=WHERE… | (storm|visit|ask) TIMES=WHERE";
const REQUEST: [u8; 1_000] = [1; 1_000];
const RESPONSE: [u8; 5_000] = [2; 5_000];
const FILE: u64 = 1 << 20;

fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let (verb, rest) = arguments.split_first().context(USAGE)?;
    for word in rest {
        let (how, place) = word.split_once('=').context(USAGE)?;
        let (how, place) = (how.to_owned(), place.to_owned());
        match verb.as_str() {
            "serve" => {
                thread::spawn(move || serve(&how, &place).expect("served"));
            }
            "call" => call(&how, &place)?,
            "storm" | "visit" | "ask" => {
                let (times, address) = (how.parse()?, place.parse()?);
                let made = match verb.as_str() {
                    "ask" => ask(times, address)?,
                    _ => storm(times, address, verb == "visit")?,
                };
                println!("{made}");
                return Ok(());
            }
            _ => bail!(USAGE),
        }
    }
    println!("ready");
    loop {
        sleep(Duration::from_secs(3600));
    }
}

fn serve(how: &str, place: &str) -> Result<()> {
    match how {
        "tcp" => {
            let address: SocketAddr = place.parse()?;
            let listener = TcpListener::bind(address)?;
            for connection in listener.incoming() {
                let connection = connection?;
                thread::spawn(move || answer(connection));
            }
        }
        "sink" => {
            let address: SocketAddr = place.parse()?;
            let socket = tcp_socket(address)?;
            setsockopt(&socket, sockopt::ReuseAddr, &true)?;
            nix::sys::socket::bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
            // A full queue would cost a caller a second.
            listen(&socket, Backlog::MAXALLOWABLE)?;
            let listener = TcpListener::from(socket);
            loop {
                drop(listener.accept());
            }
        }
        "unix" => {
            let listener = UnixListener::bind(place)?;
            for connection in listener.incoming() {
                let connection = connection?;
                thread::spawn(move || answer(connection));
            }
        }
        // Whoever does not ask from where, and is gone with what it heard.
        "udp-once" => {
            let address: SocketAddr = place.parse()?;
            UdpSocket::bind(address)?.recv(&mut [0; 2_000])?;
        }
        "udp" | "udp-elsewhere" | "udp-group" => {
            let socket = match (how, place.parse()?) {
                ("udp-group", SocketAddr::V4(group)) => {
                    let socket = UdpSocket::bind(("0.0.0.0", group.port()))?;
                    socket.join_multicast_v4(group.ip(), &Ipv4Addr::UNSPECIFIED)?;
                    socket
                }
                (_, address) => UdpSocket::bind(address)?,
            };
            let mut request = [0; 2_000];
            loop {
                let (_, from) = socket.recv_from(&mut request)?;
                if how != "udp-elsewhere" {
                    socket.send_to(&RESPONSE[..500], from)?;
                    continue;
                }
                // As TFTP does: each client is answered from a socket of its own, and goes on with that.
                let own = UdpSocket::bind((socket.local_addr()?.ip(), 0))?;
                own.send_to(&RESPONSE[..500], from)?;
            }
        }
        _ => bail!(USAGE),
    }
    Ok(())
}

/// One response for the first bytes that come; whatever comes later is swallowed.
fn answer(mut connection: impl Read + Write) {
    let mut buffer = [0; 16 * 1024];
    let mut first = true;
    while let Ok(1..) = connection.read(&mut buffer) {
        if std::mem::take(&mut first) && connection.write_all(&RESPONSE).is_err() {
            return;
        }
    }
}

fn call(how: &str, place: &str) -> Result<()> {
    match how {
        "unix" => std::mem::forget(exchange(patiently(|| UnixStream::connect(place))?)?),
        "tcp" => std::mem::forget(exchange(connect(place)?)?),
        "brief" => {
            for _ in 0..100 {
                exchange(connect(place)?)?;
            }
        }
        "sendfile" | "splice" => {
            let connection = exchange(connect(place)?)?;
            let file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(true)
                .open("/tmp/file")?;
            file.set_len(FILE)?;
            if how == "sendfile" {
                sendfile(&connection, &file)?;
            } else {
                splice(&connection, &file)?;
            }
            std::mem::forget(connection);
        }
        "uring" => std::mem::forget(exchange(uring(place.parse()?)?)?),
        "fastopen" => {
            // The first fetches the cookie; later ones send data with the SYN.
            for _ in 0..3 {
                let connection = fast_open(place.parse()?)?;
                std::mem::forget(listen_for_answer(connection)?);
            }
        }
        "udp" | "udp-low" | "udp-connected" => {
            let address: SocketAddr = place.parse()?;
            let socket = UdpSocket::bind(match (how, address.is_ipv6()) {
                ("udp-low", _) => "0.0.0.0:1123",
                (_, true) => "[::]:0",
                (_, false) => "0.0.0.0:0",
            })?;
            socket.set_read_timeout(Some(Duration::from_millis(300)))?;
            if how == "udp-connected" {
                socket.connect(address)?;
            }
            let mut response = [0; 2_000];
            patiently(|| {
                if how == "udp-connected" {
                    socket.send(&REQUEST)?;
                    return socket.recv(&mut response);
                }
                socket.send_to(&REQUEST, address)?;
                socket.recv_from(&mut response).map(|(length, _)| length)
            })?;
        }
        _ => bail!(USAGE),
    }
    Ok(())
}

/// Tries until it works: the other container may start later.
fn patiently<T>(mut what: impl FnMut() -> io::Result<T>) -> Result<T> {
    let mut last = None;
    for _ in 0..100 {
        match what() {
            Ok(done) => return Ok(done),
            Err(error) => last = Some(error),
        }
        sleep(Duration::from_millis(100));
    }
    Err(last.context("tried")?.into())
}

fn connect(place: &str) -> Result<TcpStream> {
    let address: SocketAddr = place.parse()?;
    patiently(|| TcpStream::connect(address))
}

fn exchange<T: Read + Write>(mut connection: T) -> Result<T> {
    connection.write_all(&REQUEST)?;
    listen_for_answer(connection)
}

fn listen_for_answer<T: Read>(mut connection: T) -> Result<T> {
    connection.read_exact(&mut [0; RESPONSE.len()])?;
    Ok(connection)
}

fn sendfile(connection: &TcpStream, file: &File) -> Result<()> {
    let mut sent = 0;
    while sent < FILE {
        let now = nix::sys::sendfile::sendfile64(connection, file, None, (FILE - sent) as usize)?;
        sent += now as u64;
    }
    Ok(())
}

fn splice(connection: &TcpStream, file: &File) -> Result<()> {
    use nix::fcntl::{SpliceFFlags, splice};
    let (read, write) = nix::unistd::pipe()?;
    let mut sent = 0;
    while sent < FILE {
        let mut left = splice(file, None, &write, None, 1 << 16, SpliceFFlags::empty())?;
        while left > 0 {
            let now = splice(&read, None, connection, None, left, SpliceFFlags::empty())?;
            left -= now;
            sent += now as u64;
        }
    }
    Ok(())
}

fn tcp_socket(address: SocketAddr) -> Result<OwnedFd> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::Inet,
        SocketAddr::V6(_) => AddressFamily::Inet6,
    };
    Ok(socket(
        family,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::Tcp,
    )?)
}

/// Connects without the `connect` system call: by a submission to io_uring.
fn uring(address: SocketAddr) -> Result<TcpStream> {
    let mut ring = io_uring::IoUring::new(2)?;
    patiently(|| {
        let socket = tcp_socket(address).map_err(io::Error::other)?;
        let storage = SockaddrStorage::from(address);
        use nix::sys::socket::SockaddrLike as _;
        let entry = io_uring::opcode::Connect::new(
            io_uring::types::Fd(socket.as_raw_fd()),
            storage.as_ptr(),
            storage.len(),
        )
        .build();
        submit(&mut ring, &entry)?;
        Ok(TcpStream::from(socket))
    })
}

fn submit(ring: &mut io_uring::IoUring, entry: &io_uring::squeue::Entry) -> io::Result<()> {
    // SAFETY: the caller's socket and address live until `submit_and_wait` has seen it completed.
    unsafe { ring.submission().push(entry) }.map_err(io::Error::other)?;
    ring.submit_and_wait(1)?;
    let done = ring.completion().next().ok_or(ErrorKind::WouldBlock)?;
    match done.result() {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(-error)),
    }
}

/// Connects without the `connect` system call: by a `sendto` with MSG_FASTOPEN.
fn fast_open(address: SocketAddr) -> Result<TcpStream> {
    let to = SockaddrStorage::from(address);
    patiently(|| {
        let socket = tcp_socket(address).map_err(io::Error::other)?;
        let flag = MsgFlags::from_bits_retain(0x2000_0000);
        sendto(socket.as_raw_fd(), &REQUEST, &to, flag)?;
        Ok(TcpStream::from(socket))
    })
}

/// Asks by UDP, each time from two new sockets: one names the server with each datagram, one once.
fn ask(times: u64, address: SocketAddr) -> Result<u64> {
    let mut response = [0; 2_000];
    let local = if address.is_ipv6() {
        "[::]:0"
    } else {
        "0.0.0.0:0"
    };
    for _ in 0..times {
        let socket = UdpSocket::bind(local)?;
        socket.set_read_timeout(Some(Duration::from_millis(300)))?;
        socket.send_to(&REQUEST, address)?;
        // What is lost is lost: this makes events, it does not count them.
        let _ = socket.recv_from(&mut response);
        socket.connect(address)?;
        socket.send(&REQUEST)?;
        let _ = socket.recv(&mut response);
    }
    Ok(times)
}

/// Connects and hangs up, as fast as it can, with two threads; a visitor waits until the server has hung up.
fn storm(connections: u64, address: SocketAddr, visits: bool) -> Result<u64> {
    let half = move || -> Result<u64> {
        let mut made = 0;
        while made < connections / 2 {
            let socket = tcp_socket(address)?;
            // A reset at once leaves no port in TIME_WAIT.
            let linger = nix::libc::linger {
                l_onoff: 1,
                l_linger: 0,
            };
            if !visits {
                setsockopt(&socket, sockopt::Linger, &linger)?;
            }
            match nix::sys::socket::connect(socket.as_raw_fd(), &SockaddrStorage::from(address)) {
                Ok(()) => made += 1,
                Err(error) => {
                    eprintln!("not connected: {error}");
                    continue;
                }
            }
            if visits {
                TcpStream::from(socket).read_to_end(&mut Vec::new())?;
            }
        }
        Ok(made)
    };
    let other = thread::spawn(half);
    let made = half()?;
    Ok(made
        + other
            .join()
            .map_err(|_| io::Error::other("a thread failed"))??)
}
