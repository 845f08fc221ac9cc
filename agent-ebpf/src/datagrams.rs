//! UDP: who sends to whom. A connected socket costs nothing per datagram; one that is not costs a
//! lookup, because the kernel keeps nothing about its peers. Bytes are not counted.
//!
//! Of a socket and a peer, whoever sent first is the client: the other end has received before it sends. Servers may
//! answer from another socket than the one that was asked (TFTP, DTLS, QUIC), so who asked whom is noted as well; and
//! who asked many at once (mDNS, SSDP), because each that answers is a peer it never sent to.

use crate::kernel::{Object, layout, lost, now_ns, probe};
use crate::kinds::{alive, count};
use crate::ports::{EPHEMERAL, MAPPED, address, mapped, note, udp_closed};
use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::{bpf_get_current_cgroup_id, bpf_get_socket_cookie};
use aya_ebpf::macros::{cgroup_sock, cgroup_sock_addr, map};
use aya_ebpf::maps::{Array, LruHashMap};
use aya_ebpf::programs::{SockAddrContext, SockContext};
use lifeboat_ebpf::{
    Address, End, Flow, FlowKey, Open, PortKey, RELEASED_GROUP, RELEASED_GROUPS, RELEASED_SHIFT,
    loss, protocol, released_at, role,
};

/// Flows of sockets that are not connected; also whom a socket asked (port 0; [`MANY`]), and who asked a container
/// ([`asked_from`]).
#[map]
static FLOWS: LruHashMap<FlowKey, Flow> = LruHashMap::with_max_entries(8_192, 0);

/// Which ports were let go of last, and when ([`released_at`]); in each group the oldest makes room. Whoever has one
/// still is in the socket tables, so that both together tell whether somebody was there to hear a datagram.
#[map]
static RELEASED: Array<[u64; RELEASED_GROUP]> = Array::with_max_entries(RELEASED_GROUPS, 0);

/// How often a flow tells its kind that it is alive.
const AGAIN_NS: u64 = 1_000_000_000;

/// Beside the role of a flow: a server that has answered from the socket that was asked.
const ANSWERED: u64 = 1 << 8;

/// In place of the one whom a socket asked.
const MANY: Address = [0; 2];

const ALLOW: i32 = 1;
const SOCK_DGRAM: u32 = 2;

#[cgroup_sock_addr(connect4)]
pub fn udp_connect4(ctx: SockAddrContext) -> i32 {
    if is_udp(&ctx) {
        connected(&ctx, v4(&ctx));
    }
    ALLOW
}

#[cgroup_sock_addr(connect6)]
pub fn udp_connect6(ctx: SockAddrContext) -> i32 {
    if is_udp(&ctx) {
        connected(&ctx, v6(&ctx));
    }
    ALLOW
}

#[cgroup_sock_addr(sendmsg4)]
pub fn udp_sendmsg4(ctx: SockAddrContext) -> i32 {
    flow(&ctx, v4(&ctx), role::CLIENT);
    ALLOW
}

#[cgroup_sock_addr(sendmsg6)]
pub fn udp_sendmsg6(ctx: SockAddrContext) -> i32 {
    flow(&ctx, v6(&ctx), role::CLIENT);
    ALLOW
}

#[cgroup_sock_addr(recvmsg4)]
pub fn udp_recvmsg4(ctx: SockAddrContext) -> i32 {
    flow(&ctx, v4(&ctx), role::SERVER);
    ALLOW
}

#[cgroup_sock_addr(recvmsg6)]
pub fn udp_recvmsg6(ctx: SockAddrContext) -> i32 {
    flow(&ctx, v6(&ctx), role::SERVER);
    ALLOW
}

#[cgroup_sock(sock_release)]
pub fn udp_release(ctx: SockContext) -> i32 {
    // SAFETY: the verifier checks the access to the context.
    if unsafe { (*ctx.sock).type_ } == SOCK_DGRAM
        && let Some(sock) = address_of(ctx.sock.cast())
    {
        udp_closed(sock as u64);
        released(sock);
    }
    ALLOW
}

#[inline(always)]
fn released(sock: Object) {
    let Some(port @ 1..) = probe::<u16>(sock, layout!(sock_num)) else {
        return;
    };
    let net = probe::<Object>(sock, layout!(sock_net));
    let Some(netns) = net.and_then(|net| probe::<u32>(net, layout!(net_inum))) else {
        return;
    };
    let (group, tag) = released_at(netns, port);
    let Some(group) = RELEASED.get_ptr_mut(group) else {
        return;
    };
    let words = group.cast::<u64>();
    let (mut place, mut oldest) = (words, u32::MAX);
    for slot in 0..RELEASED_GROUP {
        // SAFETY: map values live for the whole program run, and the slot is less than a group has.
        unsafe {
            let at = words.add(slot);
            let word = at.read_volatile();
            // Its own place before all others.
            let time = if (word >> 32) as u32 == tag {
                0
            } else {
                word as u32
            };
            if time < oldest {
                (place, oldest) = (at, time);
            }
        }
    }
    let time = (now_ns() >> RELEASED_SHIFT) as u32;
    // SAFETY: as above.
    unsafe { place.write_volatile(u64::from(tag) << 32 | u64::from(time)) };
}

#[inline(always)]
fn is_udp(ctx: &SockAddrContext) -> bool {
    // SAFETY: the verifier checks the access to the context.
    unsafe { (*ctx.sock_addr).protocol == u32::from(protocol::UDP) }
}

#[inline(always)]
fn v4(ctx: &SockAddrContext) -> Address {
    // SAFETY: the verifier checks the access to the context; volatile keeps it one load of four bytes.
    mapped(unsafe { core::ptr::read_volatile(&raw const (*ctx.sock_addr).user_ip4) })
}

#[inline(always)]
fn v6(ctx: &SockAddrContext) -> Address {
    // SAFETY: as for `v4`, four times.
    unsafe {
        let words = (&raw const (*ctx.sock_addr).user_ip6).cast::<u32>();
        address(core::array::from_fn(|word| {
            core::ptr::read_volatile(words.add(word))
        }))
    }
}

#[inline(always)]
fn port(ctx: &SockAddrContext) -> u16 {
    // SAFETY: as for `v4`. The field holds a port in network order in its first two bytes.
    let port = unsafe { core::ptr::read_volatile(&raw const (*ctx.sock_addr).user_port) };
    u16::from_be(port as u16)
}

#[inline(always)]
fn socket(ctx: &SockAddrContext) -> Option<Object> {
    // SAFETY: as for `v4`.
    let sock = unsafe { core::ptr::read_volatile(&raw const (*ctx.sock_addr).__bindgen_anon_1.sk) };
    address_of(sock.cast())
}

/// The verifier knows what the pointer is and forbids arithmetic with it; a copy is a mere number to it.
#[inline(always)]
fn address_of(sock: Object) -> Option<Object> {
    probe::<Object>((&raw const sock).cast(), 0)
}

/// Many at once are nobody in particular: multicast and IPv4 broadcast.
#[inline(always)]
fn is_many([first, last]: Address) -> bool {
    first as u8 == 0xff || (first == 0 && last as u32 == MAPPED && (last >> 32) as u8 >= 224)
}

#[inline(always)]
fn key(sock: Object, peer: Address, port: u16, role: u8) -> Option<PortKey> {
    let net: Object = probe(sock, layout!(sock_net))?;
    Some(PortKey {
        // SAFETY: the helper takes nothing.
        cgroup: unsafe { bpf_get_current_cgroup_id() },
        peer_cgroup: 0,
        peer,
        netns: probe(net, layout!(net_inum))?,
        port,
        service_port: 0,
        role,
        protocol: protocol::UDP,
        padding: 0,
        more_padding: 0,
    })
}

/// Where is noted that a container was asked from this place.
#[inline(always)]
fn asked_from(cgroup: u64, peer: Address, port: u16) -> FlowKey {
    FlowKey {
        // No socket's cookie: those are counted from 1.
        socket: !cgroup,
        peer,
        port: port.into(),
    }
}

/// Whether what a container sends there is an answer. Low ports may be those of services that have asked: there it is
/// one until the socket that was asked has answered itself ([`ANSWERED`]).
#[inline(always)]
fn is_answer(cgroup: u64, peer: Address, port: u16) -> bool {
    FLOWS.get_ptr(&asked_from(cgroup, peer, port)).is_some()
}

#[inline(always)]
fn connected(ctx: &SockAddrContext, peer: Address) {
    let Some(sock) = socket(ctx) else {
        return;
    };
    let port = port(ctx);
    if port == 0 || is_many(peer) {
        return;
    }
    // Connected anew: what it did with the peer before is counted first.
    udp_closed(sock as u64);
    let Some(key) = key(sock, peer, port, role::CLIENT) else {
        return;
    };
    if is_answer(key.cgroup, peer, port) {
        return;
    }
    let open = Open {
        client: End {
            socket: sock as u64,
            cgroup: key.cgroup,
            peer,
            netns: key.netns,
            port,
            ..End::UNSEEN
        },
        server: End::UNSEEN,
        opened_ns: now_ns(),
        protocol: u64::from(protocol::UDP),
    };
    note(sock as u64, &open, role::CLIENT);
}

#[inline(always)]
fn many(socket: u64) -> FlowKey {
    FlowKey {
        socket,
        peer: MANY,
        port: 0,
    }
}

/// Notes that a socket sent to nobody in particular.
#[inline(always)]
fn asked_many(socket: u64, now: u64) {
    let key = many(socket);
    if FLOWS.get_ptr(&key).is_none() {
        let new = Flow {
            last_ns: now,
            role: u64::from(role::CLIENT),
        };
        let _ = FLOWS.insert(&key, &new, 0);
    }
}

#[inline(always)]
fn flow(ctx: &SockAddrContext, peer: Address, first: u8) {
    // SAFETY: the helper takes the program's context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let now = now_ns();
    if is_many(peer) {
        asked_many(cookie, now);
        return;
    }
    let flow = FlowKey {
        socket: cookie,
        peer,
        port: port(ctx).into(),
    };
    let known = FLOWS.get_ptr_mut(&flow);
    let mut role = first;
    if let Some(known) = known {
        // SAFETY: map values live for the whole program run.
        unsafe {
            if first == role::CLIENT && (*known).role == u64::from(role::SERVER) {
                (*known).role |= ANSWERED;
                if (flow.port as u16) < EPHEMERAL {
                    // SAFETY: the helper takes nothing.
                    let cgroup = bpf_get_current_cgroup_id();
                    let _ = FLOWS.remove(&asked_from(cgroup, peer, flow.port as u16));
                }
            }
            if now.saturating_sub((*known).last_ns) < AGAIN_NS {
                return;
            }
            (*known).last_ns = now;
            role = (*known).role as u8;
        }
    }
    let Some(sock) = socket(ctx) else {
        return;
    };
    let port = if role == role::CLIENT {
        flow.port as u16
    } else {
        probe(sock, layout!(sock_num)).unwrap_or(0)
    };
    let Some(key) = key(sock, peer, port, role) else {
        return;
    };
    if known.is_some() {
        alive(&key, now);
        return;
    }
    let new = Flow {
        last_ns: now,
        role: u64::from(role),
    };
    // The oldest flow makes room.
    let _ = FLOWS.insert(&flow, &new, 0);
    let asked = FlowKey { port: 0, ..flow };
    let from = asked_from(key.cgroup, peer, flow.port as u16);
    let (answer, note) = if role == role::CLIENT {
        (is_answer(key.cgroup, peer, flow.port as u16), asked)
    } else {
        let asked = FLOWS.get_ptr(&asked).is_some() || FLOWS.get_ptr(&many(cookie)).is_some();
        (asked, from)
    };
    if !answer {
        let _ = FLOWS.insert(&note, &new, 0);
        count(&key, now);
    }
}
