//! TCP connections: who connected to whom, and what they moved. Nothing is done per packet: the
//! kernel's own counters of a socket are read when it closes and when the agent asks.
//!
//! Both ends of a connection find the same place by its sequence numbers, which no address translation
//! changes; so the kind then names the cgroups of both.

use crate::kernel::{Object, add, compare_exchange, exchange, layout, load, lost, now_ns, probe};
use crate::scope::{place_by_hash, probed_scoped_id, scoped_id};
use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_NOEXIST};
use aya_ebpf::helpers::bpf_skc_to_tcp_sock;
use aya_ebpf::macros::{btf_tracepoint, map, raw_tracepoint};
use aya_ebpf::maps::{Array, HashMap, Queue, RingBuf};
use aya_ebpf::programs::{BtfTracePointContext, RawTracePointContext};
use lifeboat_ebpf::{
    Address, End, ListenKey, OPEN_GROUP, OPEN_GROUPS, Open, PORT_ROWS, PortKey, PortRow, PortStats,
    REFRESH_BATCH, groups_of, loss, place, protocol, role,
};

// As for the other families, the common path looks up arrays only.

/// Whose each place of [`OPEN`] is: TCP by [`Begin::identity`], UDP by the address of the socket; or
/// [`place::FREE`], [`place::TAKEN`]. A connection is in one of its two groups. The agent sets the sizes of this
/// map and all below but the last two.
#[map]
static OPEN_KEYS: Array<[u64; OPEN_GROUP]> = Array::with_max_entries(OPEN_GROUPS, BPF_F_MMAPABLE);

/// Open connections.
#[map]
static OPEN: Array<Open> = Array::with_max_entries(OPEN_GROUPS * OPEN_GROUP as u32, 0);

/// Kinds of connections by row.
#[map]
static PORTS: Array<PortRow> = Array::with_max_entries(PORT_ROWS, BPF_F_MMAPABLE);

/// Row by kind.
#[map]
static PORT_ROW: HashMap<PortKey, u32> = HashMap::with_max_entries(PORT_ROWS, 0);

/// Rows of no kind: filled by the agent, which also gives back those of kinds that it forgets.
#[map]
static FREE_PORT_ROWS: Queue<u32> = Queue::with_max_entries(PORT_ROWS, 0);

/// The rows looked up last, each in the place of its kind's hash. Which kind a row is of stands in the row itself.
#[map]
static KNOWN_PORT_ROWS: Array<u32> = Array::with_max_entries(1 << KNOWN_BITS, 0);

const KNOWN_BITS: u32 = 12;

/// No place, and no row.
const NOWHERE: u32 = u32::MAX;

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

/// A connection younger than this is not looked at, and of one whose client closed at once the place is
/// kept: the other end may be about to be seen.
const YOUNG_NS: u64 = 50_000_000;

/// Ports from here on are mostly those that the kernel gives to clients.
const EPHEMERAL: u16 = 32_768;

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

/// Where it stands whose a place is.
#[inline(always)]
fn key_at(place: u32) -> Option<*mut u64> {
    let group = OPEN_KEYS.get_ptr_mut(place / OPEN_GROUP as u32)?;
    // SAFETY: the slot is less than a group has.
    Some(unsafe { group.cast::<u64>().add(place as usize % OPEN_GROUP) })
}

/// The place of a connection; [`NOWHERE`] when it is not on the list.
#[inline(never)]
fn find(identity: u64) -> u32 {
    let [near, others] = groups_of(identity, layout!(open_groups));
    let place = find_in(identity, near);
    if place != NOWHERE {
        return place;
    }
    find_in(identity, others)
}

#[inline(always)]
fn find_in(identity: u64, [one, other]: [u32; 2]) -> u32 {
    let (Some(first), Some(second)) = (OPEN_KEYS.get_ptr(one), OPEN_KEYS.get_ptr(other)) else {
        return NOWHERE;
    };
    for slot in 0..OPEN_GROUP {
        // SAFETY: map values live for the whole program run; each word is aligned.
        unsafe {
            if (*first)[slot] == identity {
                return one * OPEN_GROUP as u32 + slot as u32;
            }
            if (*second)[slot] == identity {
                return other * OPEN_GROUP as u32 + slot as u32;
            }
        }
    }
    NOWHERE
}

/// Takes a place for a connection; [`NOWHERE`] when all of its groups are full.
#[inline(never)]
fn take(identity: u64) -> u32 {
    let [near, others] = groups_of(identity, layout!(open_groups));
    let place = take_in(near);
    if place != NOWHERE {
        return place;
    }
    take_in(others)
}

/// Takes the lowest free place of two groups, so that they fill alike.
#[inline(always)]
fn take_in([one, other]: [u32; 2]) -> u32 {
    let (Some(first), Some(second)) = (OPEN_KEYS.get_ptr_mut(one), OPEN_KEYS.get_ptr_mut(other))
    else {
        return NOWHERE;
    };
    for slot in 0..OPEN_GROUP {
        // SAFETY: as for `find_in`.
        unsafe {
            if take_at(&raw mut (*first)[slot]) {
                return one * OPEN_GROUP as u32 + slot as u32;
            }
            if take_at(&raw mut (*second)[slot]) {
                return other * OPEN_GROUP as u32 + slot as u32;
            }
        }
    }
    NOWHERE
}

/// # Safety
/// `key` must point into a map value.
#[inline(always)]
unsafe fn take_at(key: *mut u64) -> bool {
    // SAFETY: the caller's contract.
    unsafe { *key == place::FREE && compare_exchange(key, place::FREE, place::TAKEN) }
}

/// Takes a connection off the list. Another one may have done so before, and its place be a third one's by now.
#[inline(always)]
fn leave(place: u32, identity: u64) {
    if let Some(key) = key_at(place) {
        compare_exchange(key, identity, place::FREE);
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
    if let Some(stats) = known(key).or_else(|| stats(row_of(key))) {
        // SAFETY: map values live for the whole program run.
        unsafe { (*stats).last_ns = now_ns };
    }
}

/// The statistics of a kind, made when there are none; none when there is no room.
#[inline(always)]
fn kind(key: &PortKey, since_ns: u64) -> Option<*mut PortStats> {
    known(key).or_else(|| {
        // A copy, so that the common path needs none in memory.
        let key = *key;
        let row = look_up(&key, since_ns);
        if let Some(known) = KNOWN_PORT_ROWS.get_ptr_mut(place_of(&key)) {
            // SAFETY: one aligned word of a map.
            unsafe { *known = row };
        }
        stats(row)
    })
}

#[inline(always)]
fn stats(row: u32) -> Option<*mut PortStats> {
    // SAFETY: the pointer is to a map value, of which this is a field.
    PORTS
        .get_ptr_mut(row)
        .map(|row| unsafe { &raw mut (*row).stats })
}

/// Where [`KNOWN_PORT_ROWS`] has a kind.
#[inline(always)]
fn place_of(key: &PortKey) -> u32 {
    let mut mixed = 0u64;
    for (index, word) in key.words().into_iter().enumerate() {
        // An odd multiplier for each word, so that what differs in two words does not cancel out.
        let odd = 0x9e37_79b9_7f4a_7c15u64.rotate_left(9 * index as u32) | 1;
        mixed = mixed.wrapping_add(word.wrapping_mul(odd));
    }
    place_by_hash(mixed ^ mixed >> 32, KNOWN_BITS)
}

/// The statistics of a kind, when its row is known without the hash map.
#[inline(always)]
fn known(key: &PortKey) -> Option<*mut PortStats> {
    // SAFETY: map values live for the whole program run; a known row is one aligned word.
    unsafe {
        let row = *KNOWN_PORT_ROWS.get_ptr(place_of(key))?;
        let known = PORTS.get_ptr_mut(row)?;
        let whose = (&raw const (*known).key).cast::<u64>();
        let mut differ = 0;
        for (index, word) in key.words().into_iter().enumerate() {
            differ |= whose.add(index).read() ^ word;
        }
        (differ == 0).then_some(&raw mut (*known).stats)
    }
}

/// The row of a kind, by the hash map; [`NOWHERE`] when it has none.
#[inline(always)]
fn row_of(key: &PortKey) -> u32 {
    // SAFETY: the value is one word, which is written once.
    unsafe { PORT_ROW.get(key).copied().unwrap_or(NOWHERE) }
}

/// The row of a kind, by the hash map, made when it has none; [`NOWHERE`] when there is no room.
#[inline(never)]
fn look_up(key: &PortKey, since_ns: u64) -> u32 {
    let row = row_of(key);
    if row != NOWHERE {
        return row;
    }
    new_row(key, since_ns)
}

/// Makes a row for a kind that has none; [`NOWHERE`] when there is no room.
#[inline(always)]
fn new_row(key: &PortKey, since_ns: u64) -> u32 {
    let Ok(Some(row)) = FREE_PORT_ROWS.pop() else {
        return NOWHERE;
    };
    let Some(new) = PORTS.get_ptr_mut(row) else {
        return NOWHERE;
    };
    // SAFETY: the pointer is to a map value, which nobody else has: the row was free.
    unsafe {
        (*new).stats.first_ns = since_ns;
        (*new).stats.last_ns = since_ns;
        (*new).key = *key;
    }
    if PORT_ROW.insert(key, &row, u64::from(BPF_NOEXIST)).is_ok() {
        if FIRST_SEEN.output::<PortKey>(key, 0).is_err() {
            lost(loss::FIRST_SEEN);
        }
        return row;
    }
    // Another CPU was faster.
    // SAFETY: as above.
    unsafe { *new = PortRow::FREE };
    let _ = FREE_PORT_ROWS.push(row, 0);
    row_of(key)
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
            received: load(tcp, layout!(tcp_bytes_received)),
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
        let (Some(sent), Some(again), Some(retransmits), Some(srtt)) = (
            probe::<u64>(sock, layout!(tcp_bytes_sent)),
            probe::<u64>(sock, layout!(tcp_bytes_retrans)),
            probe::<u32>(sock, layout!(tcp_total_retrans)),
            probe::<u32>(sock, layout!(tcp_srtt_us)),
        ) else {
            break;
        };
        let counters = Counters {
            sent: sent.wrapping_sub(again),
            received,
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
        advance(
            &raw mut (*own).received,
            &raw mut (*stats).received,
            counters.received,
        );
        advance(
            &raw mut (*own).retransmits,
            &raw mut (*stats).retransmits,
            counters.retransmits,
        );
        if counters.srtt != 0 {
            (*stats).srtt_us = counters.srtt >> 3;
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
    // SAFETY: every caller passes a field of a map value, which lives for the whole program run.
    if unsafe { *counted } == value {
        return;
    }
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
