//! TCP connections: who connected to whom, and what they moved. Nothing is done per packet: the
//! kernel's own counters of a socket are read when it closes and when the agent asks.
//!
//! Both ends of a connection find the same place by its sequence numbers, which no address translation
//! changes; so the kind then names the cgroups of both.

use crate::kernel::{Object, add, exchange, layout, load, lost, now_ns, probe};
use crate::kinds::{count, kind};
use crate::open::{NOWHERE, OPEN, find, key_at, leave, take};
use crate::scope::{probed_scoped_id, scoped_id};
use aya_ebpf::helpers::bpf_skc_to_tcp_sock;
use aya_ebpf::macros::{btf_tracepoint, map, raw_tracepoint};
use aya_ebpf::maps::HashMap;
use aya_ebpf::programs::{BtfTracePointContext, RawTracePointContext};
use lifeboat_ebpf::{
    Address, End, ListenKey, Open, REFRESH_BATCH, ROUND_TRIP_BITS, loss, place, protocol, role,
};

/// Listening sockets by port; the value is how many share it.
#[map]
static LISTENING: HashMap<ListenKey, u64> = HashMap::with_max_entries(4_096, 0);

const ESTABLISHED: i32 = 1;
const SYN_SENT: i32 = 2;
const SYN_RECV: i32 = 3;
const CLOSE: i32 = 7;
const LISTEN: i32 = 10;
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;

/// A connection younger than this is not looked at, and of one whose client closed at once the place is
/// kept: the other end may be about to be seen.
const YOUNG_NS: u64 = 50_000_000;

/// Ports from here on are mostly those that the kernel gives to clients.
pub const EPHEMERAL: u16 = 32_768;

#[btf_tracepoint(function = "inet_sock_set_state")]
pub fn inet_sock_set_state(ctx: BtfTracePointContext) -> i32 {
    let old: i32 = ctx.arg(1);
    let new: i32 = ctx.arg(2);
    // SAFETY: the tracepoint's arguments are (sock, old state, new state).
    unsafe {
        // Three of five changes in the life of an end say nothing and must cost nothing.
        match (old, new) {
            (SYN_SENT, ESTABLISHED) => opened(ctx.arg(0), role::CLIENT),
            (SYN_RECV, ESTABLISHED) => opened(ctx.arg(0), role::SERVER),
            (_, LISTEN) => listens(ctx.arg(0), true),
            (LISTEN, CLOSE) => listens(ctx.arg(0), false),
            (SYN_SENT | SYN_RECV | CLOSE, CLOSE) => {}
            (_, CLOSE) => closed(ctx.arg(0)),
            _ => {}
        }
    }
    0
}

/// Where the numbering of a TCP socket's bytes began on either side.
#[derive(Clone, Copy)]
struct Begin {
    own: u32,
    peer: u32,
}

impl Begin {
    /// # Safety
    /// As for [`load`], of a `tcp_sock`.
    #[inline(always)]
    unsafe fn of(tcp: Object) -> Self {
        // SAFETY: the caller's contract. The kernel advances each of the numbers and its count by the same.
        unsafe {
            Self {
                own: load::<u32>(tcp, layout!(tcp_snd_una))
                    .wrapping_sub(load::<u64>(tcp, layout!(tcp_bytes_acked)) as u32),
                peer: load::<u32>(tcp, layout!(tcp_rcv_nxt))
                    .wrapping_sub(load::<u64>(tcp, layout!(tcp_bytes_received)) as u32),
            }
        }
    }

    /// What the two ends of a connection have in common: the sequence numbers (client's, server's) after
    /// the handshake.
    #[inline(always)]
    fn identity(self, role: u8) -> u64 {
        if role == role::CLIENT {
            // Of a client the kernel counts the acknowledged SYN as a byte.
            u64::from(self.own.wrapping_add(1)) << 32 | u64::from(self.peer)
        } else {
            u64::from(self.peer) << 32 | u64::from(self.own)
        }
    }
}

/// The same socket with the type that has TCP's fields; none when it is not TCP.
#[inline(always)]
fn tcp(sock: Object) -> Option<Object> {
    // SAFETY: the helper takes any socket and checks it.
    let tcp: Object = unsafe { bpf_skc_to_tcp_sock(sock.cast_mut().cast()) }.cast();
    (!tcp.is_null()).then_some(tcp)
}

/// When a TCP socket last got or sent a packet: as good as the clock here, and costs nothing.
///
/// # Safety
/// As for [`load`], of a `tcp_sock`.
#[inline(always)]
unsafe fn last_packet_ns(tcp: Object) -> u64 {
    // SAFETY: the caller's contract. The kernel keeps µs of the monotonic clock.
    unsafe { load::<u64>(tcp, layout!(tcp_mstamp)) * 1_000 }
}

/// Puts an established end on the list, in the place of the other end if that is there.
///
/// # Safety
/// `sock` must be the tracepoint's socket.
#[inline(always)]
unsafe fn opened(sock: Object, role: u8) {
    // SAFETY: `sock` is the tracepoint's socket; map values live for the whole program run.
    unsafe {
        let Some(cgroup) = sock_cgroup(sock) else {
            return;
        };
        let Some(tcp) = tcp(sock) else {
            return;
        };
        let family: u16 = load(sock, layout!(sock_family));
        let peer = if family == AF_INET {
            mapped(load(sock, layout!(sock_daddr)))
        } else if family == AF_INET6 {
            let words: [u32; 4] =
                core::array::from_fn(|word| load(sock, layout!(sock_v6_daddr) + 4 * word as u32));
            address(words)
        } else {
            return;
        };
        let end = End {
            socket: sock as u64,
            cgroup,
            peer,
            netns: netns(sock),
            port: if role == role::CLIENT {
                u16::from_be(load(sock, layout!(sock_dport)))
            } else {
                load(sock, layout!(sock_num))
            },
            ..End::UNSEEN
        };
        let identity = Begin::of(tcp).identity(role);
        // The client's end is always established first.
        if role == role::SERVER
            && let Some(open) = OPEN.get_ptr_mut(find(identity))
        {
            join(&raw mut (*open).server, &end);
            return;
        }
        let mut open = Open {
            client: End::UNSEEN,
            server: End::UNSEEN,
            opened_ns: last_packet_ns(tcp),
            protocol: u64::from(protocol::TCP),
        };
        if role == role::CLIENT {
            open.client = end;
        } else {
            open.server = end;
        }
        note(identity, &open, role);
    }
}

/// Fills in an end of a connection that others may be looking at.
///
/// # Safety
/// `place` must be a field of a map value.
#[inline(always)]
unsafe fn join(place: *mut End, end: &End) {
    // SAFETY: the caller passes a map value, which lives for the whole program run; the fields are aligned.
    unsafe {
        (*place).peer = end.peer;
        (*place).netns = end.netns;
        // In this order: whoever reads the cgroup of the other end finds its port too.
        (&raw mut (*place).port).write_volatile(end.port);
        (&raw mut (*place).cgroup).write_volatile(end.cgroup);
        (&raw mut (*place).socket).write_volatile(end.socket);
    }
}

/// Puts a connection on the list.
#[inline(always)]
pub fn note(identity: u64, open: &Open, role: u8) {
    let place = take(identity);
    if let (Some(at), Some(key)) = (OPEN.get_ptr_mut(place), key_at(place)) {
        // SAFETY: map values live for the whole program run, and the place is taken by this one.
        unsafe {
            let (client, server, rest) = open.words();
            store((&raw mut (*at).client).cast(), client);
            store((&raw mut (*at).server).cast(), server);
            store((&raw mut (*at).opened_ns).cast(), rest);
            // Last, and so whoever finds the place finds what is there.
            key.write_volatile(identity);
        }
        return;
    }
    lost(loss::OPEN);
    // Its bytes will be unknown; that it was is not. A UDP socket may never get an answer.
    if open.protocol as u8 == protocol::TCP {
        count(&open.key(role), open.opened_ns);
    }
}

/// Writes words one by one: what the compiler makes of zeros side by side is a call that writes bytes.
///
/// # Safety
/// All of them must lie in a map value, aligned.
#[inline(always)]
unsafe fn store<const N: usize>(at: *mut u64, words: [u64; N]) {
    for (index, word) in words.into_iter().enumerate() {
        // SAFETY: the caller's contract.
        unsafe { at.add(index).write_volatile(word) };
    }
}

/// An IPv4 address as the maps have it.
#[inline(always)]
pub fn mapped(v4: u32) -> Address {
    address([0, 0, MAPPED, v4])
}

/// The third of the four words of an address that is an IPv4 one.
pub const MAPPED: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);

/// An address from its words in memory.
#[inline(always)]
pub fn address([a, b, c, d]: [u32; 4]) -> Address {
    let pair = |low: u32, high: u32| u64::from(high) << 32 | u64::from(low);
    [pair(a, b), pair(c, d)]
}

/// Takes an end of a connection off the list, and the connection with its last one.
///
/// # Safety
/// `sock` must be the tracepoint's socket.
#[inline(always)]
unsafe fn closed(sock: Object) {
    // SAFETY: the caller's contract; map values live for the whole program run.
    unsafe {
        if sock_cgroup(sock).is_none() {
            return;
        }
        let Some(tcp) = tcp(sock) else {
            return;
        };
        let begin = Begin::of(tcp);
        // A guess, which saves a look-up.
        let mut role = role::CLIENT;
        if u16::from_be(load(sock, layout!(sock_dport))) >= EPHEMERAL {
            role = role::SERVER;
        }
        let mut identity = begin.identity(role);
        let mut place = find(identity);
        if place == NOWHERE {
            role ^= role::CLIENT ^ role::SERVER;
            identity = begin.identity(role);
            place = find(identity);
        }
        let Some(open) = OPEN.get_ptr_mut(place) else {
            return;
        };
        let (own, other) = ends(open, role);
        if (*own).socket != sock as u64 {
            return;
        }
        let now = last_packet_ns(tcp);
        let counters = Counters {
            sent: load::<u64>(tcp, layout!(tcp_bytes_sent))
                .wrapping_sub(load(tcp, layout!(tcp_bytes_retrans))),
            received: payload(
                load(tcp, layout!(tcp_bytes_received)),
                load(sock, layout!(sock_flags)),
            ),
            retransmits: load::<u32>(tcp, layout!(tcp_total_retrans)).into(),
            srtt: load(tcp, layout!(tcp_srtt_us)),
        };
        account(open, role, &counters, now);
        // Last, and with a barrier: of two ends that close at once, one sees that both are done.
        exchange(&raw mut (*own).socket, 0);
        let seen = (&raw const (*other).cgroup).read_volatile() != 0;
        let done = (&raw const (*other).socket).read_volatile() == 0;
        let may_come =
            !seen && role == role::CLIENT && now.saturating_sub((*open).opened_ns) < YOUNG_NS;
        if done && !may_come {
            leave(place, identity);
        }
    }
}

/// An end and the other one.
#[inline(always)]
fn ends(open: *mut Open, role: u8) -> (*mut End, *mut End) {
    // SAFETY: every caller passes a map value.
    let (client, server) = unsafe { (&raw mut (*open).client, &raw mut (*open).server) };
    if role == role::CLIENT {
        (client, server)
    } else {
        (server, client)
    }
}

/// Takes a UDP socket with a peer off the list.
#[inline(always)]
pub fn udp_closed(socket: u64) {
    let place = find(socket);
    if let Some(open) = OPEN.get_ptr_mut(place) {
        refresh_udp(open);
        leave(place, socket);
    }
}

/// Run on demand by the agent, which passes the places of open connections as the arguments.
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
fn refresh(place: u64) {
    let place = place as u32;
    let (Some(open), Some(key)) = (OPEN.get_ptr_mut(place), key_at(place)) else {
        return;
    };
    // SAFETY: map values live for the whole program run.
    unsafe {
        let identity = key.read_volatile();
        if identity <= place::TAKEN {
            return;
        }
        let now = now_ns();
        if now.saturating_sub((*open).opened_ns) < YOUNG_NS {
            return;
        }
        if (*open).protocol as u8 == protocol::UDP {
            refresh_udp(open);
            return;
        }
        refresh_end(open, role::CLIENT, identity as u32, now);
        refresh_end(open, role::SERVER, (identity >> 32) as u32, now);
        if (*open).client.socket == 0 && (*open).server.socket == 0 {
            leave(place, identity);
        }
    }
}

/// Counts what an open end moved. `begin` is where the numbering of the bytes it receives began: a socket
/// of which the close was not seen may be another one by now, whose counters are none of ours.
///
/// Freed sockets are not unmapped (SLAB_TYPESAFE_BY_RCU), and a bad address reads as none.
#[inline(never)]
fn refresh_end(open: *mut Open, role: u8, begin: u32, now: u64) {
    let (own, _) = ends(open, role);
    // SAFETY: every caller passes a map value, which lives for the whole program run.
    let sock = unsafe { (*own).socket } as Object;
    if sock.is_null() {
        return;
    }
    // The two numbers are not read at once: a segment may come between.
    for _ in 0..3 {
        let (Some(next), Some(received)) = (
            probe::<u32>(sock, layout!(tcp_rcv_nxt)),
            probe::<u64>(sock, layout!(tcp_bytes_received)),
        ) else {
            break;
        };
        if next.wrapping_sub(received as u32) != begin {
            continue;
        }
        let (Some(flags), Some(sent), Some(again), Some(retransmits), Some(srtt)) = (
            probe::<u64>(sock, layout!(sock_flags)),
            probe::<u64>(sock, layout!(tcp_bytes_sent)),
            probe::<u64>(sock, layout!(tcp_bytes_retrans)),
            probe::<u32>(sock, layout!(tcp_total_retrans)),
            probe::<u32>(sock, layout!(tcp_srtt_us)),
        ) else {
            break;
        };
        let counters = Counters {
            sent: sent.wrapping_sub(again),
            received: payload(received, flags),
            retransmits: retransmits.into(),
            srtt,
        };
        account(open, role, &counters, now);
        return;
    }
    // SAFETY: as above.
    unsafe {
        if (*own).sent == End::UNCOUNTED {
            account(open, role, &Counters::NONE, now);
        }
        exchange(&raw mut (*own).socket, 0);
    }
}

#[inline(always)]
fn refresh_udp(open: *mut Open) {
    // SAFETY: every caller passes a map value, which lives for the whole program run.
    let sock = unsafe { (*open).client.socket } as Object;
    if answered(sock) {
        account(open, role::CLIENT, &Counters::NONE, now_ns());
    }
}

/// Bytes received without the peer's FIN, which the kernel counts as one.
#[inline(always)]
fn payload(received: u64, sock_flags: u64) -> u64 {
    // `SOCK_DONE` of the kernel's `enum sock_flags`: TCP sets it when a FIN comes, and never otherwise.
    const DONE: u64 = 1 << 1;
    received.saturating_sub(u64::from(sock_flags & DONE != 0))
}

/// What a socket says that it did.
struct Counters {
    sent: u64,
    received: u64,
    retransmits: u64,
    /// Eight times the smoothed round-trip time, µs, as the kernel keeps it.
    srtt: u32,
}

impl Counters {
    const NONE: Self = Self {
        sent: 0,
        received: 0,
        retransmits: 0,
        srtt: 0,
    };
}

/// Moves what an end counted since the last look into its kind.
///
/// The socket may close, and another CPU do the same, meanwhile: the exchanges make the sum of all moves
/// equal to the last counter read, whatever the order.
#[inline(always)]
fn account(open: *mut Open, role: u8, counters: &Counters, now: u64) {
    let (own, _) = ends(open, role);
    // SAFETY: `open` and the kind are map values, which live for the whole program run.
    unsafe {
        let key = (*open).key(role);
        let stats = kind(&key, (*open).opened_ns);
        let mut sent = exchange(&raw mut (*own).sent, counters.sent);
        let new = sent == End::UNCOUNTED;
        let mut moved = sent != counters.sent;
        let Some(stats) = stats else {
            if new {
                lost(loss::PORTS);
            }
            return;
        };
        if (*stats).last_ns < now {
            (*stats).last_ns = now;
        }
        if new {
            sent = 0;
            add(&raw mut (*stats).connections, 1);
        }
        if sent != counters.sent {
            add(&raw mut (*stats).sent, counters.sent.wrapping_sub(sent));
        }
        moved |= advance(
            &raw mut (*own).received,
            &raw mut (*stats).received,
            counters.received,
        );
        advance(
            &raw mut (*own).retransmits,
            &raw mut (*stats).retransmits,
            counters.retransmits,
        );
        // That of a connection at rest is of the past.
        if moved && counters.srtt != 0 {
            let once = 1 << ROUND_TRIP_BITS | u64::from(counters.srtt >> 3);
            add(&raw mut (*stats).round_trips, once);
        }
    }
}

/// Whether a connected UDP socket has ever received: the kernel then notes the CPU that brought it. A
/// connect alone says nothing, because resolvers connect to learn which source address they would have.
#[inline(always)]
fn answered(sock: Object) -> bool {
    probe::<i32>(sock, layout!(sock_incoming_cpu)).is_some_and(|cpu| cpu >= 0)
}

/// Whether there was something to move.
#[inline(always)]
fn advance(counted: *mut u64, total: *mut u64, value: u64) -> bool {
    // SAFETY: every caller passes a field of a map value, which lives for the whole program run.
    if unsafe { *counted } == value {
        return false;
    }
    let before = exchange(counted, value);
    if value != before {
        add(total, value.wrapping_sub(before));
    }
    value != before
}

/// Counts a socket that begins or ends to listen on its port.
///
/// # Safety
/// `sock` must be the tracepoint's socket.
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

/// The number of a socket's network namespace.
///
/// # Safety
/// `sock` must be a tracepoint's socket.
#[inline(always)]
unsafe fn netns(sock: Object) -> u32 {
    // SAFETY: the caller passes a tracepoint's socket.
    unsafe {
        let net: Object = load(sock, layout!(sock_net));
        load(net, layout!(net_inum))
    }
}
