//! TCP connections: who connected to whom, and what they moved. Nothing is done per packet: the
//! kernel's own counters of a socket are read when it closes and when the agent asks.

use crate::kernel::{Object, add, exchange, layout, load, lost, probe};
use crate::scope::scoped_id;
use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::macros::{btf_tracepoint, map, raw_tracepoint};
use aya_ebpf::maps::{HashMap, RingBuf};
use aya_ebpf::programs::{BtfTracePointContext, RawTracePointContext};
use lifeboat_ebpf::{ListenKey, Open, PortKey, PortStats, REFRESH_BATCH, loss, role};

/// Open connections, by the address of their socket.
#[map]
static OPEN: HashMap<u64, Open> = HashMap::with_max_entries(16_384, 0);

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
const IPPROTO_TCP: u16 = 6;

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
            (_, CLOSE) => closed(sock),
            _ => {}
        }
    }
    0
}

#[inline(always)]
unsafe fn opened(sock: Object, role: u8) {
    // SAFETY: `sock` is the tracepoint's socket.
    unsafe {
        let protocol: u16 = load(sock, layout!(sock_protocol));
        if protocol & 0xff != IPPROTO_TCP && protocol != IPPROTO_TCP {
            return;
        }
        let Some(cgroup) = scoped_id(load(sock, layout!(sock_cgroup))) else {
            return;
        };
        let mut key = PortKey {
            cgroup,
            peer: [0; 16],
            netns: netns(sock),
            local_port: 0,
            peer_port: 0,
            role,
            padding: [0; 7],
        };
        let family: u16 = load(sock, layout!(sock_family));
        if family == AF_INET {
            let address: [u8; 4] = load(sock, layout!(sock_daddr));
            key.peer = [
                0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, address[0], address[1], address[2],
                address[3],
            ];
        } else if family == AF_INET6 {
            key.peer = load(sock, layout!(sock_v6_daddr));
        } else {
            return;
        }
        if role == role::SERVER {
            key.local_port = load(sock, layout!(sock_num));
        } else {
            key.peer_port = u16::from_be(load(sock, layout!(sock_dport)));
        }
        let now = bpf_ktime_get_ns();
        if !count(&key, now) {
            return;
        }
        let open = Open {
            key,
            sent: 0,
            received: 0,
            retransmits: 0,
        };
        if OPEN.insert(&(sock as u64), &open, 0).is_err() {
            lost(loss::OPEN);
        }
    }
}

/// Counts a new connection of this kind; false when the kind has no room.
#[inline(always)]
unsafe fn count(key: &PortKey, now: u64) -> bool {
    // SAFETY: map values live for the whole program run.
    unsafe {
        if let Some(stats) = PORTS.get_ptr_mut(key) {
            add(&raw mut (*stats).connections, 1);
            (*stats).last_ns = now;
            return true;
        }
        let first = PortStats {
            connections: 1,
            sent: 0,
            received: 0,
            retransmits: 0,
            first_ns: now,
            last_ns: now,
            srtt_us: 0,
            padding: 0,
        };
        if PORTS.insert(key, &first, u64::from(BPF_NOEXIST)).is_ok() {
            if FIRST_SEEN.output::<PortKey>(key, 0).is_err() {
                lost(loss::FIRST_SEEN);
            }
            return true;
        }
        // Either another CPU was first or the map is full.
        let Some(stats) = PORTS.get_ptr_mut(key) else {
            lost(loss::PORTS);
            return false;
        };
        add(&raw mut (*stats).connections, 1);
        true
    }
}

#[inline(always)]
unsafe fn closed(sock: Object) {
    let address = sock as u64;
    if let Some(open) = OPEN.get_ptr_mut(&address) {
        account(address, open);
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
        account(address, open);
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
    let (Some(sent), Some(again), Some(received), Some(retransmits), Some(srtt)) = (
        probe::<u64>(sock, layout!(tcp_bytes_sent)),
        probe::<u64>(sock, layout!(tcp_bytes_retrans)),
        probe::<u64>(sock, layout!(tcp_bytes_received)),
        probe::<u32>(sock, layout!(tcp_total_retrans)),
        probe::<u32>(sock, layout!(tcp_srtt_us)),
    ) else {
        return;
    };
    // SAFETY: `open` and the kind are map values, which live for the whole program run.
    unsafe {
        let key = (*open).key;
        let Some(stats) = PORTS.get_ptr_mut(&key) else {
            return;
        };
        let moved = advance(
            &raw mut (*open).sent,
            &raw mut (*stats).sent,
            sent.wrapping_sub(again),
        ) | advance(
            &raw mut (*open).received,
            &raw mut (*stats).received,
            received,
        ) | advance(
            &raw mut (*open).retransmits,
            &raw mut (*stats).retransmits,
            u64::from(retransmits),
        );
        if moved {
            (*stats).last_ns = bpf_ktime_get_ns();
            // The kernel keeps eight times the smoothed value.
            (*stats).srtt_us = srtt >> 3;
        }
    }
}

#[inline(always)]
fn advance(counted: *mut u64, total: *mut u64, value: u64) -> bool {
    let before = exchange(counted, value);
    add(total, value.wrapping_sub(before));
    value != before
}

#[inline(always)]
unsafe fn listens(sock: Object, begins: bool) {
    // SAFETY: `sock` is the tracepoint's socket; the map value lives for the whole program run.
    unsafe {
        let Some(cgroup) = scoped_id(load(sock, layout!(sock_cgroup))) else {
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

#[inline(always)]
unsafe fn netns(sock: Object) -> u32 {
    // SAFETY: the caller passes a tracepoint's socket.
    unsafe {
        let net: Object = load(sock, layout!(sock_net));
        load(net, layout!(net_inum))
    }
}
