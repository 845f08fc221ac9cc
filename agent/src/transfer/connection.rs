//! One data connection after its greeting: frames in, frames out, a time limit on every step.

use super::engine::{Engine, EngineChoice, NoEngine, engine};
use super::frame::{FrameKind, HEADER_LEN, Header};
use super::message::{Message, MessageError, MessageSeal};
use crate::model::ids::{Epoch, VolumeId};
use crate::volume::aligned::Aligned;
use crate::volume::codec::Malformed;
use nix::sys::socket::{setsockopt, sockopt};
use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::Duration;

/// A connection broke or its peer misbehaved. Reconnecting can help.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The socket failed, the peer left or fell silent.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// A frame was not understood.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// A message was not authentic.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// io_uring was demanded.
    #[error(transparent)]
    Engine(#[from] NoEngine),
}

/// A frame that arrived.
#[derive(Debug)]
pub(super) enum Incoming {
    Message(VolumeId, Epoch, Message),
    /// A record with its header at its front.
    Record(Header, Vec<u8>),
}

/// Receiving half.
pub(super) struct Receiver {
    socket: Arc<TcpStream>,
    engine: Box<dyn Engine>,
    seal: MessageSeal,
    patience: Duration,
}

/// Sending half.
pub(super) struct Transmitter {
    socket: Arc<TcpStream>,
    engine: Box<dyn Engine>,
    seal: MessageSeal,
    patience: Duration,
}

/// What a data connection carries, and how the network may treat it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// The copy, and what nobody waits for yet: less than best effort, RFC 8622 (LE, 000001).
    Background,
    /// What a program waits for: low-latency data, RFC 4594 (AF21, 010010).
    Demand,
}

impl Class {
    /// The traffic class octet: the differentiated services field above two bits of congestion notification.
    fn octet(self) -> i32 {
        match self {
            Self::Background => 0b00_0001 << 2,
            Self::Demand => 0b01_0010 << 2,
        }
    }
}

/// Marks what a socket sends with its class.
pub(super) fn mark(socket: &TcpStream, class: Class) -> io::Result<()> {
    let octet = class.octet();
    match socket.local_addr()? {
        SocketAddr::V4(_) => setsockopt(socket, sockopt::Ipv4Tos, &octet)?,
        SocketAddr::V6(_) => setsockopt(socket, sockopt::Ipv6TClass, &octet)?,
    }
    Ok(())
}

/// The congestion control that data sockets ask for: one that takes no lost packet for a full network.
const CONGESTION: &str = "bbr";

/// Sets what every data socket needs: no delay for small messages, the kernel's own notice of a
/// dead peer while data waits to be acknowledged, and a congestion control for far and lossy networks.
pub(super) fn tune(socket: &TcpStream, patience: Duration) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let limit = u32::try_from(patience.as_millis()).unwrap_or(u32::MAX);
    setsockopt(socket, sockopt::TcpUserTimeout, &limit)?;
    setsockopt(socket, sockopt::KeepAlive, &true)?;
    // Where the kernel does not have it, or keeps it from this process, its own choice is as good as it gets.
    let _ = setsockopt(socket, sockopt::TcpCongestion, &CONGESTION.into());
    Ok(())
}

/// Both halves of an agreed connection. `caller` tells which side this is.
pub(super) fn split(
    socket: &Arc<TcpStream>,
    connection_key: &[u8; 32],
    caller: bool,
    choice: EngineChoice,
    patience: Duration,
) -> Result<(Receiver, Transmitter), NoEngine> {
    let receiver = Receiver {
        socket: Arc::clone(socket),
        engine: engine(choice)?,
        seal: MessageSeal::new(connection_key, !caller),
        patience,
    };
    let transmitter = Transmitter {
        socket: Arc::clone(socket),
        engine: engine(choice)?,
        seal: MessageSeal::new(connection_key, caller),
        patience,
    };
    Ok((receiver, transmitter))
}

impl Receiver {
    fn head(&mut self) -> Result<Header, ConnectionError> {
        let mut head = [0; HEADER_LEN];
        let socket = self.socket.as_fd();
        self.engine.receive(socket, &mut head, self.patience)?;
        Ok(Header::decode(&head)?)
    }

    fn body(&mut self, body: &mut [u8]) -> io::Result<()> {
        let socket = self.socket.as_fd();
        self.engine.receive(socket, body, self.patience)
    }

    /// The next record's header, with its body in `plain`, where it can be opened and written from. Messages
    /// are passed over.
    pub(super) fn next_record(&mut self, plain: &mut Aligned) -> Result<Header, ConnectionError> {
        loop {
            let header = self.head()?;
            let body = plain.space(header.length as usize);
            self.body(body)?;
            if header.kind != FrameKind::Control {
                return Ok(header);
            }
            self.seal
                .open(&header, plain.space(header.length as usize))?;
        }
    }

    /// The next frame; `buffer` gives its memory to a record.
    pub(super) fn next(&mut self, mut buffer: Vec<u8>) -> Result<Incoming, ConnectionError> {
        let header = self.head()?;
        buffer.resize(HEADER_LEN + header.length as usize, 0);
        buffer[..HEADER_LEN].copy_from_slice(&header.encode());
        self.body(&mut buffer[HEADER_LEN..])?;
        if header.kind == FrameKind::Control {
            let message = self.seal.open(&header, &buffer[HEADER_LEN..])?;
            return Ok(Incoming::Message(header.volume, header.epoch, message));
        }
        Ok(Incoming::Record(header, buffer))
    }
}

impl Receiver {
    /// Reads and drops what still comes until the peer leaves, for as long as patience lasts: closing
    /// a socket with unread bytes resets it, and the peer would lose our last words.
    pub(super) fn discard(&mut self) {
        let until = std::time::Instant::now() + self.patience;
        let mut byte = [0; 1];
        let mut heap = vec![0; 256 << 10];
        while std::time::Instant::now() < until {
            // One byte at least, then whatever is there.
            let socket = self.socket.as_fd();
            if self
                .engine
                .receive(socket, &mut byte, self.patience)
                .is_err()
            {
                return;
            }
            let flags = nix::sys::socket::MsgFlags::MSG_DONTWAIT;
            let _ = nix::sys::socket::recv(socket.as_raw_fd(), &mut heap, flags);
        }
    }
}

impl Transmitter {
    /// Sends a message.
    pub(super) fn message(
        &mut self,
        volume: VolumeId,
        epoch: Epoch,
        message: &Message,
    ) -> io::Result<()> {
        let frame = self.seal.frame(volume, epoch, message);
        self.record(&frame)
    }

    /// Sends a finished frame.
    pub(super) fn record(&mut self, frame: &[u8]) -> io::Result<()> {
        self.engine.send(self.socket.as_fd(), frame, self.patience)
    }

    /// Ends the connection for both halves.
    pub(super) fn shut(&self) {
        // It may be closed already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::getsockopt;
    use std::net::TcpListener;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn a_data_socket_has_bbr_where_the_kernel_gives_it() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        tune(&socket, Duration::from_secs(1)).unwrap();
        let file = "/proc/sys/net/ipv4/tcp_available_congestion_control";
        let names = std::fs::read_to_string(file).unwrap();
        let is_there = names.split_whitespace().any(|name| name == CONGESTION);
        let now = getsockopt(&socket, sockopt::TcpCongestion).unwrap();
        assert!(
            !is_there || now.as_bytes().starts_with(CONGESTION.as_bytes()),
            "{now:?}"
        );
    }

    #[test]
    fn a_connection_bears_its_class_and_can_change_it() {
        let (background, demand) = (Class::Background, Class::Demand);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        for (class, octet) in [(background, 0x04), (demand, 0x48), (background, 0x04)] {
            mark(&socket, class).unwrap();
            assert_eq!(getsockopt(&socket, sockopt::Ipv4Tos).unwrap(), octet);
        }
        let listener = TcpListener::bind("[::1]:0").unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        mark(&socket, demand).unwrap();
        assert_eq!(getsockopt(&socket, sockopt::Ipv6TClass).unwrap(), 0x48);
    }
}
