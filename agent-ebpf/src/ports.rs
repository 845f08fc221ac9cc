//! TCP connections: who connected to whom, and what they moved. Nothing is done per packet: the
//! kernel's own counters of a socket are read when it closes and when the agent asks.
//!
//! When both ends of a connection are seen they are matched by their sequence numbers, which no address
//! translation changes; so the kind then names the cgroups of both.

use crate::kernel::{Object, add, exchange, layout, load, lost, now_ns, probe};
use crate::scope::{probed_scoped_id, scoped_id};
use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::macros::{btf_tracepoint, map, raw_tracepoint};
use aya_ebpf::maps::{HashMap, RingBuf};
use aya_ebpf::programs::{BtfTracePointContext, RawTracePointContext};
use lifeboat_ebpf::{ListenKey, Open, PortKey, PortStats, REFRESH_BATCH, loss, protocol, role};

/// Open connections, by the address of their socket.
#[map]
pub static OPEN: HashMap<u64, Open> = HashMap::with_max_entries(32_768, 0);

/// Sockets of clients whose server was not seen (yet), by [`Open::identity`].
#[map]
static HALVES: HashMap<u64, u64> = HashMap::with_max_entries(16_384, 0);

/// Kinds of connections.
#[map]
static PORTS: HashMap<PortKey, PortStats> = HashMap::with_max_entries(8_192, 0);

/// Listening sockets by port; the value is how many share it.
#[map]
static LISTENING: HashMap<ListenKey, u64> = HashMap::with_max_entries(4_096, 0);

/// Kinds of connections seen for the first time.
#[map]
static FIRST_SEEN: RingBuf = RingBuf::with_byte_size(64 * 1024, 0);

const ESTABLISHED: i32 = 1;
const SYN_SENT: i32 = 2;
const SYN_RECV: i32 = 3;
const CLOSE: i32 = 7;
const LISTEN: i32 = 10;
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;

/// A connection younger than this is not looked at: its other end may be about to be seen.
const YOUNG_NS: u64 = 50_000_000;

#[btf_tracepoint(function = "inet_sock_set_state")]
pub fn inet_sock_set_state(ctx: BtfTracePointContext) -> i32 {
    let sock: Object = ctx.arg(0);
    let old: i32 = ctx.arg(1);
    let new: i32 = ctx.arg(2);
    // SAFETY: the tracepoint's arguments are (sock, old state, new state).
    unsafe {
        match (old, new) {
            (SYN_SENT, ESTABLISHED) => opened(sock, role::CLIENT),
            (SYN_RECV, ESTABLISHED) => opened(sock, role::SERVER),
            (_, LISTEN) => listens(sock, true),
            (LISTEN, CLOSE) => listens(sock, false),
            (_, CLOSE) => closed(sock as u64),
            _ => {}
        }
    }
    0
}

#[inline(always)]
unsafe fn opened(sock: Object, role: u8) {
    // SAFETY: `sock` is the tracepoint's socket; map values live for the whole program run.
    unsafe {
        let number: u16 = load(sock, layout!(sock_protocol));
        if number as u8 != protocol::TCP {
            return;
        }
        let Some(cgroup) = sock_cgroup(sock) else {
            return;
        };
        let mut key = PortKey {
            cgroup,
            peer_cgroup: 0,
            peer: [0; 16],
            netns: netns(sock),
            port: 0,
            service_port: 0,
            role,
            protocol: protocol::TCP,
            padding: [0; 6],
        };
        let family: u16 = load(sock, layout!(sock_family));
        if family == AF_INET {
            key.peer = mapped(load(sock, layout!(sock_daddr)));
        } else if family == AF_INET6 {
            key.peer = load(sock, layout!(sock_v6_daddr));
        } else {
            return;
        }
        let address = sock as u64;
        let (Some(unacknowledged), Some(expected)) = (
            probe::<u32>(sock, layout!(tcp_snd_una)),
            probe::<u32>(sock, layout!(tcp_rcv_nxt)),
        ) else {
            return;
        };
        let identity;
        if role == role::CLIENT {
            key.port = u16::from_be(load(sock, layout!(sock_dport)));
            identity = u64::from(unacknowledged) << 32 | u64::from(expected);
        } else {
            key.port = load(sock, layout!(sock_num));
            identity = u64::from(expected) << 32 | u64::from(unacknowledged);
            meet(&mut key, identity);
        }
        let open = Open {
            key,
            identity,
            opened_ns: now_ns(),
            counted: 0,
            sent: 0,
            received: 0,
            retransmits: 0,
        };
        if OPEN.insert(&address, &open, 0).is_err() {
            lost(loss::OPEN);
            // Its bytes will be unknown; that it was is not.
            count(&key, open.opened_ns);
        } else if role == role::CLIENT && HALVES.insert(&identity, &address, 0).is_err() {
            lost(loss::HALVES);
        }
    }
}

/// Joins a server's end with its client's, which is always established first.
#[inline(always)]
unsafe fn meet(server: &mut PortKey, identity: u64) {
    // SAFETY: map values live for the whole program run; the fields written are aligned.
    unsafe {
        let Some(&address) = HALVES.get(&identity) else {
            return;
        };
        let _ = HALVES.remove(&identity);
        let Some(client) = OPEN.get_ptr_mut(&address) else {
            return;
        };
        if (*client).identity != identity {
            return;
        }
        // In this order: whoever reads the cgroup of the other end finds its port too.
        (&raw mut (*client).key.service_port).write_volatile(server.port);
        (&raw mut (*client).key.peer_cgroup).write_volatile(server.cgroup);
        server.peer_cgroup = (*client).key.cgroup;
        server.peer = [0; 16];
    }
}

/// An IPv4 address as the maps have it.
#[inline(always)]
pub fn mapped(address: [u8; 4]) -> [u8; 16] {
    let [a, b, c, d] = address;
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
}

/// Counts a connection of this kind.
#[inline(always)]
pub fn count(key: &PortKey, since_ns: u64) {
    match kind(key, since_ns) {
        // SAFETY: map values live for the whole program run.
        Some(stats) => unsafe {
            add(&raw mut (*stats).connections, 1);
            (*stats).last_ns = now_ns();
        },
        None => lost(loss::PORTS),
    }
}

/// Notes that connections of this kind are alive.
#[inline(always)]
pub fn alive(key: &PortKey, now_ns: u64) {
    if let Some(stats) = PORTS.get_ptr_mut(key) {
        // SAFETY: map values live for the whole program run.
        unsafe { (*stats).last_ns = now_ns };
    }
}

/// The statistics of a kind, made when there are none; none when there is no room.
#[inline(always)]
fn kind(key: &PortKey, since_ns: u64) -> Option<*mut PortStats> {
    if let Some(stats) = PORTS.get_ptr_mut(key) {
        return Some(stats);
    }
    let none = PortStats {
        connections: 0,
        sent: 0,
        received: 0,
        retransmits: 0,
        first_ns: since_ns,
        last_ns: since_ns,
        srtt_us: 0,
        padding: 0,
    };
    if PORTS.insert(key, &none, u64::from(BPF_NOEXIST)).is_ok()
        && FIRST_SEEN.output::<PortKey>(key, 0).is_err()
    {
        lost(loss::FIRST_SEEN);
    }
    // Whoever inserted it; none when the map is full.
    PORTS.get_ptr_mut(key)
}

/// Takes an open connection off the list.
#[inline(always)]
pub fn closed(address: u64) {
    if let Some(open) = OPEN.get_ptr_mut(&address) {
        account(address, open);
        // SAFETY: map values live for the whole program run.
        let (identity, alone) = unsafe { ((*open).identity, (*open).key.peer_cgroup == 0) };
        if identity != 0 && alone {
            let _ = HALVES.remove(&identity);
        }
        let _ = OPEN.remove(&address);
    }
}

/// Run on demand by the agent, which passes the addresses of open sockets as the arguments.
#[raw_tracepoint]
pub fn ports_refresh(ctx: RawTracePointContext) -> i32 {
    // Written out, because the verifier wants each argument at a constant place.
    refresh(ctx.arg(0));
    refresh(ctx.arg(1));
    refresh(ctx.arg(2));
    refresh(ctx.arg(3));
    refresh(ctx.arg(4));
    refresh(ctx.arg(5));
    refresh(ctx.arg(6));
    refresh(ctx.arg(7));
    refresh(ctx.arg(8));
    refresh(ctx.arg(9));
    refresh(ctx.arg(10));
    refresh(ctx.arg(11));
    const { assert!(REFRESH_BATCH == 12) };
    0
}

#[inline(never)]
fn refresh(address: u64) {
    if let Some(open) = OPEN.get_ptr_mut(&address) {
        // SAFETY: map values live for the whole program run.
        let opened_ns = unsafe { (*open).opened_ns };
        if now_ns().saturating_sub(opened_ns) > YOUNG_NS {
            account(address, open);
        }
    }
}

/// Moves what the socket counted since the last look into its kind.
///
/// The socket may close, and another CPU do the same, meanwhile: the exchange below makes the sum of
/// all moves equal to the last counter read, whatever the order. Freed sockets are not unmapped
/// (SLAB_TYPESAFE_BY_RCU), and a bad address reads as none.
#[inline(always)]
fn account(address: u64, open: *mut Open) {
    let sock = address as Object;
    // SAFETY: `open` and the kind are map values, which live for the whole program run.
    unsafe {
        let mut key = (*open).key;
        if key.peer_cgroup == 0 {
            key.service_port = 0;
        }
        let udp = key.protocol == protocol::UDP;
        if udp && !answered(sock) {
            return;
        }
        let stats = kind(&key, (*open).opened_ns);
        if exchange(&raw mut (*open).counted, 1) == 0 {
            match stats {
                Some(stats) => add(&raw mut (*stats).connections, 1),
                None => lost(loss::PORTS),
            }
        }
        let Some(stats) = stats else {
            return;
        };
        (*stats).last_ns = now_ns();
        if udp {
            return;
        }
        let (Some(sent), Some(again), Some(received), Some(retransmits), Some(srtt)) = (
            probe::<u64>(sock, layout!(tcp_bytes_sent)),
            probe::<u64>(sock, layout!(tcp_bytes_retrans)),
            probe::<u64>(sock, layout!(tcp_bytes_received)),
            probe::<u32>(sock, layout!(tcp_total_retrans)),
            probe::<u32>(sock, layout!(tcp_srtt_us)),
        ) else {
            return;
        };
        advance(
            &raw mut (*open).sent,
            &raw mut (*stats).sent,
            sent.wrapping_sub(again),
        );
        advance(
            &raw mut (*open).received,
            &raw mut (*stats).received,
            received,
        );
        advance(
            &raw mut (*open).retransmits,
            &raw mut (*stats).retransmits,
            u64::from(retransmits),
        );
        if srtt != 0 {
            // The kernel keeps eight times the smoothed value.
            (*stats).srtt_us = srtt >> 3;
        }
    }
}

/// Whether a connected UDP socket has ever received: the kernel then notes the CPU that brought it. A
/// connect alone says nothing, because resolvers connect to learn which source address they would have.
#[inline(always)]
fn answered(sock: Object) -> bool {
    probe::<i32>(sock, layout!(sock_incoming_cpu)).is_some_and(|cpu| cpu >= 0)
}

#[inline(always)]
fn advance(counted: *mut u64, total: *mut u64, value: u64) {
    let before = exchange(counted, value);
    if value != before {
        add(total, value.wrapping_sub(before));
    }
}

#[inline(always)]
unsafe fn listens(sock: Object, begins: bool) {
    // SAFETY: `sock` is the tracepoint's socket; the map value lives for the whole program run.
    unsafe {
        let Some(cgroup) = sock_cgroup(sock) else {
            return;
        };
        let key = ListenKey {
            cgroup,
            netns: netns(sock),
            port: load(sock, layout!(sock_num)),
            padding: 0,
        };
        match LISTENING.get_ptr_mut(&key) {
            Some(sockets) if begins => add(sockets, 1),
            Some(sockets) if *sockets > 1 => add(sockets, u64::MAX),
            Some(_) => {
                let _ = LISTENING.remove(&key);
            }
            None if begins => {
                if LISTENING.insert(&key, &1, 0).is_err() {
                    lost(loss::LISTENING);
                }
            }
            None => {}
        }
    }
}

/// The id of a socket's cgroup within the scope; none outside of it.
///
/// # Safety
/// `sock` must be a tracepoint's socket.
#[inline(always)]
unsafe fn sock_cgroup(sock: Object) -> Option<u64> {
    if layout!(sock_cgroup_is_marked) != 0 {
        // Marked: a v1 controller keeps a number there, and the kernel knows no cgroup2 of this socket.
        let word: u64 = probe(sock, layout!(sock_cgroup))?;
        return if word & 3 == 0 {
            probed_scoped_id(word as Object)
        } else {
            None
        };
    }
    // SAFETY: the caller's contract.
    unsafe { scoped_id(load(sock, layout!(sock_cgroup))) }
}

#[inline(always)]
unsafe fn netns(sock: Object) -> u32 {
    // SAFETY: the caller passes a tracepoint's socket.
    unsafe {
        let net: Object = load(sock, layout!(sock_net));
        load(net, layout!(net_inum))
    }
}
