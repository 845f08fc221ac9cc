//! Unix sockets between containers, from the kernel's socket diagnostics (`sock_diag(7)`).
//!
//! The kernel shows no unix connection being made, so the tables are polled: what lives for two looks is
//! seen. A path may lead from one network namespace into another (a shared volume), so the tables of all
//! are joined. Non-goal: connections that live shorter.

use super::book::EdgeBook;
use super::edges::{Kind, Role};
use super::listeners::{entrances, processes};
use super::sockets;
use crate::model::container::Container;
use crate::model::edge::{Learnt, Protocol};
use crate::model::ids::ContainerName;
use crate::model::units::UnixMillis;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// How often a network namespace is looked at.
const AGAIN: Duration = Duration::from_secs(5);

/// Looks at the holders of a pair after which it is given up: they are in no container.
const PATIENCE: u32 = 3;

/// A unix socket with a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Socket {
    inode: u32,
    peer: u32,
    /// Whether it is bound, or was accepted by one that is.
    named: bool,
}

/// What the tables say.
#[derive(Default)]
pub struct UnixSockets {
    namespaces: BTreeMap<u64, (Instant, Vec<Socket>)>,
    /// Client's and server's inode.
    pairs: BTreeMap<(u32, u32), Pair>,
}

#[derive(Default)]
struct Pair {
    looks: u32,
    /// Client and server.
    between: Option<(ContainerName, ContainerName)>,
}

impl UnixSockets {
    /// Looks at a part of the namespaces, each every five seconds, and puts what is connected into the book.
    pub fn read(
        &mut self,
        root: &Path,
        scope: &Path,
        containers: &[Container],
        netns: &BTreeMap<ContainerName, u64>,
        now: UnixMillis,
        book: &mut EdgeBook,
    ) {
        let mut due = entrances(containers, netns);
        self.namespaces.retain(|known, _| due.contains_key(known));
        due.retain(|namespace, _| {
            let known = self.namespaces.get(namespace);
            known.is_none_or(|(read, _)| read.elapsed() >= AGAIN)
        });
        if !due.is_empty() {
            for (namespace, read) in tables(root, due) {
                self.namespaces.insert(namespace, (Instant::now(), read));
            }
            let all = self.namespaces.values().flat_map(|(_, sockets)| sockets);
            let connected = connected(all.copied());
            self.pairs.retain(|pair, _| connected.contains(pair));
            for pair in connected {
                self.pairs.entry(pair).or_default().looks += 1;
            }
            self.find_holders(root, scope, containers);
        }
        let mut kinds: BTreeMap<(&ContainerName, &ContainerName), u64> = BTreeMap::new();
        for (client, server) in self.pairs.values().filter_map(|pair| pair.between.as_ref()) {
            *kinds.entry((client, server)).or_default() += 1;
        }
        for ((client, server), connections) in kinds {
            let kind = Kind {
                owner: client.clone(),
                netns: 0,
                protocol: Protocol::Unix,
                role: Role::Client,
                port: 0,
                peer: None,
                other: Some((server.clone(), 0)),
                learnt: Learnt::Inferred,
            };
            book.found([(kind, connections)].into(), false, now);
        }
    }

    /// Calls containers otherwise from now on.
    pub fn rename(&mut self, named: &BTreeMap<ContainerName, ContainerName>) {
        let pairs = self
            .pairs
            .values_mut()
            .filter_map(|pair| pair.between.as_mut());
        for name in pairs.flat_map(|(client, server)| [client, server]) {
            if let Some(now) = named.get(name) {
                *name = now.clone();
            }
        }
    }

    /// Finds out who holds the sockets of pairs that live for two looks.
    fn find_holders(&mut self, root: &Path, scope: &Path, containers: &[Container]) {
        let wanted =
            |pair: &Pair| pair.between.is_none() && (2..2 + PATIENCE).contains(&pair.looks);
        if !self.pairs.values().any(wanted) {
            return;
        }
        let running: Vec<&Container> = containers.iter().filter(|c| c.pid > 0).collect();
        let processes = processes(scope, &running);
        let holders = sockets::holders(root, &processes);
        let holder = |inode: u32| holders.get(&u64::from(inode));
        for (&(client, server), pair) in self.pairs.iter_mut().filter(|(_, pair)| wanted(pair)) {
            if let (Some(client), Some(server)) = (holder(client), holder(server)) {
                pair.between = Some(((*client).clone(), (*server).clone()));
            }
        }
    }
}

/// (client, server) of everything that is connected: the server's socket has a name and the client's has
/// none, or only the client's names its peer (datagrams).
fn connected(sockets: impl Iterator<Item = Socket>) -> BTreeSet<(u32, u32)> {
    let by_inode: BTreeMap<u32, Socket> = sockets.map(|socket| (socket.inode, socket)).collect();
    let pairs = by_inode.values().filter_map(|client| {
        let server = by_inode.get(&client.peer)?;
        let calls = server.named && (!client.named || server.peer != client.inode);
        calls.then_some((client.inode, server.inode))
    });
    pairs.collect()
}

/// The unix sockets of network namespaces that are entered through a process each; none of one that cannot be entered
/// any more, for it has ended.
fn tables(root: &Path, due: BTreeMap<u64, i32>) -> BTreeMap<u64, Vec<Socket>> {
    let root = root.to_owned();
    // A thread enters them one after the other and ends in the last; this one never leaves its own.
    let look = move || {
        let read = due
            .into_iter()
            .map(|(namespace, pid)| (namespace, table(&root, pid).unwrap_or_default()));
        read.collect()
    };
    let thread = thread::Builder::new().name("unix-sockets".into());
    let looked = thread.spawn(look).map(thread::JoinHandle::join);
    looked.ok().and_then(Result::ok).unwrap_or_default()
}

/// Enters the network namespace of a process for good, and reads its unix sockets.
fn table(root: &Path, pid: i32) -> io::Result<Vec<Socket>> {
    let namespace = File::open(root.join(format!("proc/{pid}/ns/net")))?;
    nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
    ask()
}

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST_DUMP: u16 = 0x301;
const UDIAG_SHOW_NAME: u32 = 1;
const UDIAG_SHOW_PEER: u32 = 4;
const UNIX_DIAG_NAME: u16 = 0;
const UNIX_DIAG_PEER: u16 = 2;
/// All but listening ones (state 10).
const STATES: u32 = !(1 << 10);
const HEADER: usize = 16;
const MESSAGE: usize = 16;

/// Dumps the unix sockets of this thread's network namespace.
fn ask() -> io::Result<Vec<Socket>> {
    // SAFETY: a plain system call; its result is checked before use.
    let raw = unsafe {
        libc::socket(
            libc::AF_NETLINK,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            libc::NETLINK_SOCK_DIAG,
        )
    };
    if raw < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `raw` is a new descriptor that nobody else owns.
    let socket = unsafe { OwnedFd::from_raw_fd(raw) };
    // struct nlmsghdr and struct unix_diag_req.
    let mut request = Vec::with_capacity(HEADER + 24);
    request.extend((HEADER as u32 + 24).to_ne_bytes());
    request.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend(NLM_F_REQUEST_DUMP.to_ne_bytes());
    request.extend([0; 8]);
    request.extend([libc::AF_UNIX as u8, 0, 0, 0]);
    request.extend(STATES.to_ne_bytes());
    request.extend(0u32.to_ne_bytes());
    request.extend((UDIAG_SHOW_NAME | UDIAG_SHOW_PEER).to_ne_bytes());
    request.extend([0; 8]);
    nix::sys::socket::send(
        socket.as_raw_fd(),
        &request,
        nix::sys::socket::MsgFlags::empty(),
    )?;
    let mut sockets = Vec::new();
    let mut buffer = vec![0; 32 * 1024];
    loop {
        let length = nix::unistd::read(&socket, &mut buffer)?;
        if read_answer(&buffer[..length], &mut sockets)? || length == 0 {
            return Ok(sockets);
        }
    }
}

/// Takes the messages of one datagram; true after the last.
fn read_answer(mut rest: &[u8], sockets: &mut Vec<Socket>) -> io::Result<bool> {
    while let Some((length, kind)) = u32_at(rest, 0).zip(u16_at(rest, 4)) {
        let message = rest
            .get(HEADER..length as usize)
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
        match kind {
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR => {
                let code = u32_at(message, 0).unwrap_or(0) as i32;
                return Err(io::Error::from_raw_os_error(-code));
            }
            _ => sockets.extend(read_socket(message)),
        }
        rest = rest.get(aligned(length as usize)..).unwrap_or_default();
    }
    Ok(false)
}

/// struct unix_diag_msg and its attributes; none without a peer and without a name.
fn read_socket(message: &[u8]) -> Option<Socket> {
    let mut socket = Socket {
        inode: u32_at(message, 4)?,
        peer: 0,
        named: false,
    };
    let mut rest = message.get(MESSAGE..)?;
    while let Some((length, kind)) = u16_at(rest, 0).zip(u16_at(rest, 2)) {
        let value = rest.get(4..usize::from(length))?;
        match kind {
            UNIX_DIAG_NAME => socket.named = !value.is_empty(),
            UNIX_DIAG_PEER => socket.peer = u32_at(value, 0)?,
            _ => {}
        }
        rest = rest.get(aligned(usize::from(length))..).unwrap_or_default();
    }
    (socket.peer != 0 || socket.named).then_some(socket)
}

fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + 4)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at + 2)?;
    Some(u16::from_ne_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::{UnixListener, UnixStream};

    fn inode(socket: &impl AsRawFd) -> u32 {
        let link = format!("/proc/self/fd/{}", socket.as_raw_fd());
        std::fs::metadata(link).expect("an open socket").ino() as u32
    }

    #[test]
    fn the_side_with_the_listeners_name_is_the_server() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).expect("a new path");
        let client = UnixStream::connect(&path).expect("it listens");
        let (server, _) = listener.accept().expect("it connected");
        let (one, other) = UnixStream::pair().expect("a pair");
        let found = connected(ask().expect("socket diagnostics").into_iter());
        assert!(found.contains(&(inode(&client), inode(&server))));
        assert!(!found.contains(&(inode(&server), inode(&client))));
        // A pair without a name has no server.
        assert!(!found.contains(&(inode(&one), inode(&other))));
        assert!(!found.contains(&(inode(&other), inode(&one))));
    }

    #[test]
    fn datagrams_go_from_the_side_that_names_its_peer() {
        let client = Socket {
            inode: 1,
            peer: 2,
            named: true,
        };
        let server = Socket {
            inode: 2,
            peer: 0,
            named: true,
        };
        assert_eq!(connected([client, server].into_iter()), [(1, 2)].into());
    }

    #[test]
    fn a_cut_off_answer_is_an_error_and_not_a_crash() {
        let mut sockets = Vec::new();
        assert!(read_answer(&[200, 0, 0, 0, 20, 0, 0, 0], &mut sockets).is_err());
        assert!(!read_answer(&[1, 2], &mut sockets).expect("nothing in it"));
        assert_eq!(sockets, []);
    }
}
