//! Sockets that are older than the agent, and addresses, from `/proc/PID/net`.
//!
//! Non-goals: sockets made since the start; the kernel programs see those. The tables are walked over
//! the whole host's hash table by the kernel, so they are read rarely.

use super::edges::Role;
use crate::model::edge::Protocol;
use procfs::net::{TcpNetEntries, TcpState, UdpNetEntries, UdpState};
use procfs::{FromReadSI, current_system_info};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A connection that is open, or a UDP socket with a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Established {
    /// Transport.
    pub protocol: Protocol,
    /// Side of the socket's owner: the one at a port that somebody listens on is the server's.
    pub role: Role,
    /// Local end.
    pub local: SocketAddr,
    /// Remote end.
    pub peer: SocketAddr,
    /// Inode of the socket.
    pub inode: u64,
}

/// The sockets of one network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sockets {
    /// Listening (UDP: bound and without a peer): transport, address and port, and inode.
    pub listening: Vec<(Protocol, SocketAddr, u64)>,
    /// With a peer.
    pub established: Vec<Established>,
}

/// Of a socket's line: local end, remote end, inode, whether it listens, whether it has a peer.
type Line = (Protocol, SocketAddr, SocketAddr, u64, bool, bool);

/// Reads the sockets of a process's network namespace; an absent table has none.
#[must_use]
pub fn read(root: &Path, pid: i32) -> Sockets {
    let path = |table| root.join(format!("proc/{pid}/net/{table}"));
    let mut lines: Vec<Line> = Vec::new();
    for table in ["tcp", "tcp6"] {
        let entries = TcpNetEntries::from_file(path(table), current_system_info());
        lines.extend(entries.into_iter().flat_map(|table| table.0).map(|entry| {
            let listens = entry.state == TcpState::Listen;
            let open = entry.state == TcpState::Established;
            let (local, peer) = (entry.local_address, entry.remote_address);
            (Protocol::Tcp, local, peer, entry.inode, listens, open)
        }));
    }
    for table in ["udp", "udp6"] {
        let entries = UdpNetEntries::from_file(path(table), current_system_info());
        lines.extend(entries.into_iter().flat_map(|table| table.0).map(|entry| {
            let open = entry.state == UdpState::Established;
            let (local, peer) = (entry.local_address, entry.remote_address);
            (Protocol::Udp, local, peer, entry.inode, !open, open)
        }));
    }
    sort_out(&lines)
}

/// Where UDP sockets of a process's network namespace are, whoever holds them; none when that cannot be read.
#[must_use]
pub fn udp_ends(root: &Path, pid: i32) -> Option<BTreeSet<SocketAddr>> {
    let ends = |table| {
        let path = root.join(format!("proc/{pid}/net/{table}"));
        let entries = UdpNetEntries::from_file(path, current_system_info()).ok()?;
        Some(
            entries
                .0
                .into_iter()
                .map(|entry| canonical(entry.local_address)),
        )
    };
    let v4 = ends("udp")?;
    // Absent where there is no IPv6.
    Some(v4.chain(ends("udp6").into_iter().flatten()).collect())
}

/// Datagrams that came to a process's network namespace, for a port at which there was no socket; none when that cannot
/// be read.
#[must_use]
pub fn udp_unheard(root: &Path, pid: i32) -> Option<u64> {
    let read = |table| fs::read_to_string(root.join(format!("proc/{pid}/net/{table}"))).ok();
    let v6 = read("snmp6").and_then(|text| unheard_v6(&text));
    Some(unheard_v4(&read("snmp")?)? + v6.unwrap_or(0))
}

/// A line of names and below it a line of numbers, each beginning with `Udp:`.
fn unheard_v4(snmp: &str) -> Option<u64> {
    let mut lines = snmp.lines().filter(|line| line.starts_with("Udp:"));
    let mut columns = lines.next()?.split(' ').zip(lines.next()?.split(' '));
    columns.find(|(name, _)| *name == "NoPorts")?.1.parse().ok()
}

/// Lines of a name and a number.
fn unheard_v6(snmp6: &str) -> Option<u64> {
    let mut lines = snmp6.lines().map(str::split_whitespace);
    let mut line = lines.find_map(|mut line| (line.next()? == "Udp6NoPorts").then_some(line))?;
    line.next()?.parse().ok()
}

fn sort_out(lines: &[Line]) -> Sockets {
    let listening: Vec<(Protocol, SocketAddr, u64)> = lines
        .iter()
        .filter(|(.., listens, _)| *listens)
        .map(|&(protocol, local, _, inode, ..)| (protocol, canonical(local), inode))
        .collect();
    let ports: BTreeSet<(Protocol, u16)> = listening
        .iter()
        .map(|&(protocol, local, _)| (protocol, local.port()))
        .collect();
    let established = lines
        .iter()
        .filter(|(.., open)| *open)
        .map(|&(protocol, local, peer, inode, ..)| Established {
            protocol,
            role: if ports.contains(&(protocol, local.port())) {
                Role::Server
            } else {
                Role::Client
            },
            local: canonical(local),
            peer: canonical(peer),
            inode,
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

/// Addresses of a process's network namespace but loopback and link-local ones.
#[must_use]
pub fn addresses(root: &Path, pid: i32) -> BTreeSet<IpAddr> {
    let read = |table| fs::read_to_string(root.join(format!("proc/{pid}/net/{table}")));
    let mut found: BTreeSet<IpAddr> = v4_addresses(&read("fib_trie").unwrap_or_default()).collect();
    found.extend(v6_addresses(&read("if_inet6").unwrap_or_default()));
    found
}

/// Local addresses of the routing table: `|-- 10.88.0.2` and below it `/32 host LOCAL`.
fn v4_addresses(fib_trie: &str) -> impl Iterator<Item = IpAddr> {
    fib_trie
        .lines()
        .zip(fib_trie.lines().skip(1))
        .filter(|(_, below)| below.trim() == "/32 host LOCAL")
        .filter_map(|(line, _)| line.trim().strip_prefix("|-- ")?.parse::<Ipv4Addr>().ok())
        .filter(|address| !address.is_loopback())
        .map(IpAddr::V4)
}

/// Lines of `if_inet6`: the address in 32 hexadecimal digits first.
fn v6_addresses(if_inet6: &str) -> impl Iterator<Item = IpAddr> {
    if_inet6
        .lines()
        .filter_map(|line| u128::from_str_radix(line.split(' ').next()?, 16).ok())
        .map(Ipv6Addr::from)
        .filter(|address| !address.is_loopback() && !address.is_unicast_link_local())
        .map(IpAddr::V6)
}

/// Which of the groups of processes holds each socket, by the socket's inode.
#[must_use]
pub fn holders<'g, T>(root: &Path, groups: &'g [(T, Vec<i32>)]) -> BTreeMap<u64, &'g T> {
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
                    holders.entry(inode).or_insert(holder);
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
    use std::net::{TcpListener, TcpStream, UdpSocket};

    /// Both sides of one connection, and that the listener is known as held by this process.
    fn check(protocol: Protocol, service: SocketAddr, client: SocketAddr) {
        let own = std::process::id() as i32;
        let sockets = read(Path::new("/"), own);
        let groups = [("me", vec![own])];
        let held = holders(Path::new("/"), &groups);
        assert!(sockets.listening.iter().any(|&(of, at, inode)| {
            of == protocol && at == service && held.get(&inode) == Some(&&"me")
        }));
        let mut ours = sockets.established.iter().filter(|socket| {
            socket.protocol == protocol && (socket.local == client || socket.peer == client)
        });
        assert!(ours.clone().count() >= 1, "{sockets:?}");
        assert!(ours.all(|socket| (socket.role == Role::Server) == (socket.local == service)));
    }

    #[test]
    fn the_side_at_a_listening_port_is_the_server() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let service = listener.local_addr().expect("bound");
        let client = TcpStream::connect(service).expect("it listens");
        let (_server, _) = listener.accept().expect("it connected");
        check(
            Protocol::Tcp,
            service,
            client.local_addr().expect("connected"),
        );
        let service = UdpSocket::bind("127.0.0.1:0").expect("a free port");
        let client = UdpSocket::bind("127.0.0.1:0").expect("a free port");
        let at = service.local_addr().expect("bound");
        client.connect(at).expect("an address");
        check(Protocol::Udp, at, client.local_addr().expect("bound"));
    }

    #[test]
    fn an_absent_table_has_no_sockets() {
        let empty = tempfile::tempdir().expect("a directory");
        assert_eq!(read(empty.path(), 1), Sockets::default());
        assert_eq!(addresses(empty.path(), 1), BTreeSet::new());
    }

    #[test]
    fn a_datagram_to_a_port_where_nobody_is_counts_as_unheard() {
        let (root, own) = (Path::new("/"), std::process::id() as i32);
        let unheard = || udp_unheard(root, own).expect("a count");
        let heard = UdpSocket::bind("127.0.0.1:0").expect("a free port");
        let at = heard.local_addr().expect("bound");
        let there = || udp_ends(root, own).expect("a table").contains(&at);
        assert!(there());
        drop(heard);
        assert!(!there());
        let before = unheard();
        let sender = UdpSocket::bind("127.0.0.1:0").expect("a free port");
        sender.send_to(b"hello", at).expect("it goes");
        assert!(unheard() > before);
        assert_eq!(udp_ends(root, i32::MAX), None);
        assert_eq!(udp_unheard(root, i32::MAX), None);
        let snmp = "Tcp: NoPorts\nTcp: 9\nUdp: InDatagrams NoPorts\nUdp: 7 8\nUdpLite: NoPorts\nUdpLite: 5\n";
        assert_eq!(unheard_v4(snmp), Some(8));
        assert_eq!(
            unheard_v6("Ip6InReceives  \t4\nUdp6NoPorts  \t 6\n"),
            Some(6)
        );
    }

    #[test]
    fn addresses_are_those_that_are_local_and_of_use_to_others() {
        let trie = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 10.88.0.0\n        /16 link UNICAST\nLocal:\n     \
                    |-- 10.88.0.2\n        /32 host LOCAL\n     |-- 10.88.255.255\n        /32 link BROADCAST\n     \
                    |-- 127.0.0.1\n        /32 host LOCAL\n";
        let found: Vec<String> = v4_addresses(trie)
            .map(|address| address.to_string())
            .collect();
        assert_eq!(found, ["10.88.0.2"]);
        let table = "00000000000000000000000000000001 01 80 10 80       lo\n\
                     fe800000000000000c42a1fffe6a8f01 02 40 20 80     eth0\n\
                     fd00005e000000000000000000000002 02 40 00 80     eth0\n";
        let found: Vec<String> = v6_addresses(table)
            .map(|address| address.to_string())
            .collect();
        assert_eq!(found, ["fd00:5e::2"]);
    }
}
