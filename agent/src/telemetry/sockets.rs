//! Sockets that are older than the agent, from `/proc/PID/net/tcp` and `tcp6`.
//!
//! Non-goals: sockets made since the start; the kernel programs see those. The tables are walked over
//! the whole host's hash table by the kernel, so they are read rarely.

use super::edges::Role;
use procfs::net::{TcpNetEntries, TcpNetEntry, TcpState};
use procfs::{FromReadSI, current_system_info};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// An established connection whose role comes from the listen table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Established {
    /// Side of the socket's owner.
    pub role: Role,
    /// Local end.
    pub local: SocketAddr,
    /// Remote end.
    pub peer: SocketAddr,
    /// Inode of the socket.
    pub inode: u64,
}

/// The TCP sockets of one network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sockets {
    /// Listening: port and inode.
    pub listening: Vec<(u16, u64)>,
    /// Established.
    pub established: Vec<Established>,
}

/// Reads the sockets of a process's network namespace; an absent table has none.
#[must_use]
pub fn read(root: &Path, pid: i32) -> Sockets {
    let tables = ["tcp", "tcp6"].map(|table| {
        let path = root.join(format!("proc/{pid}/net/{table}"));
        TcpNetEntries::from_file(path, current_system_info())
    });
    let entries: Vec<TcpNetEntry> = tables
        .into_iter()
        .flatten()
        .flat_map(|table| table.0)
        .collect();
    sort_out(&entries)
}

/// Who connected and who listened. A socket at a port that somebody listens on is the server's.
fn sort_out(entries: &[TcpNetEntry]) -> Sockets {
    let of = |state: TcpState| entries.iter().filter(move |entry| entry.state == state);
    let listening: Vec<(u16, u64)> = of(TcpState::Listen)
        .map(|entry| (entry.local_address.port(), entry.inode))
        .collect();
    let ports: BTreeSet<u16> = listening.iter().map(|&(port, _)| port).collect();
    let established = of(TcpState::Established)
        .map(|entry| {
            let local = canonical(entry.local_address);
            let role = if ports.contains(&local.port()) {
                Role::Server
            } else {
                Role::Client
            };
            Established {
                role,
                local,
                peer: canonical(entry.remote_address),
                inode: entry.inode,
            }
        })
        .collect();
    Sockets {
        listening,
        established,
    }
}

/// An IPv4 address in IPv6 clothes is an IPv4 address.
fn canonical(address: SocketAddr) -> SocketAddr {
    let ip: IpAddr = address.ip().to_canonical();
    SocketAddr::new(ip, address.port())
}

/// Which of the groups of processes holds each socket, by the socket's inode.
#[must_use]
pub fn holders<T: Clone>(root: &Path, groups: &[(T, Vec<i32>)]) -> BTreeMap<u64, T> {
    let mut holders = BTreeMap::new();
    for (holder, processes) in groups {
        for pid in processes {
            let descriptors = fs::read_dir(root.join(format!("proc/{pid}/fd")));
            for descriptor in descriptors.into_iter().flatten().flatten() {
                let Ok(link) = fs::read_link(descriptor.path()) else {
                    continue;
                };
                let inode = link
                    .to_str()
                    .and_then(|link| link.strip_prefix("socket:[")?.strip_suffix(']'))
                    .and_then(|inode| inode.parse().ok());
                if let Some(inode) = inode {
                    holders.entry(inode).or_insert_with(|| holder.clone());
                }
            }
        }
    }
    holders
}

/// Network namespace of a process, its inode number.
#[must_use]
pub fn netns(root: &Path, pid: &str) -> Option<u64> {
    let namespace = root.join(format!("proc/{pid}/ns/net"));
    fs::metadata(namespace).ok().map(|metadata| metadata.ino())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn the_side_at_a_listening_port_is_the_server() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let service = listener.local_addr().expect("bound");
        let client = TcpStream::connect(service).expect("it listens");
        let (_server, _) = listener.accept().expect("it connected");
        let own = std::process::id() as i32;
        let sockets = read(Path::new("/"), own);
        assert!(
            sockets
                .listening
                .iter()
                .any(|&(port, _)| port == service.port())
        );
        let local = client.local_addr().expect("connected");
        let ours: Vec<&Established> = sockets
            .established
            .iter()
            .filter(|socket| socket.local == local || socket.peer == local)
            .collect();
        assert_eq!(ours.len(), 2, "{ours:?}");
        for socket in ours {
            let expected = if socket.local == service {
                Role::Server
            } else {
                Role::Client
            };
            assert_eq!(socket.role, expected);
        }
        let held = holders(Path::new("/"), &[("me", vec![own])]);
        assert!(
            sockets
                .listening
                .iter()
                .any(|(port, inode)| { *port == service.port() && held.get(inode) == Some(&"me") })
        );
    }

    #[test]
    fn an_absent_table_has_no_sockets() {
        let empty = tempfile::tempdir().expect("a directory");
        assert_eq!(read(empty.path(), 1), Sockets::default());
    }
}
