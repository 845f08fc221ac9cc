//! What both sides know of connections: the list of open ones, their kinds, listening sockets.

/// Sockets handed to one run of the `ports_refresh` program: a raw tracepoint's arguments.
pub const REFRESH_BATCH: usize = 12;

/// Side of a connection.
pub mod role {
    /// It connected.
    pub const CLIENT: u8 = 1;
    /// It listened.
    pub const SERVER: u8 = 2;
}

/// Transport of a connection, as IP numbers it.
pub mod protocol {
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
}

/// The sixteen bytes of an IPv6 address in memory; IPv4 is ::ffff:a.b.c.d. In words, because the kernel programs
/// copy and compare those in one instruction.
pub type Address = [u64; 2];

/// A kind of connection: many connections of one client to one service share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct PortKey {
    /// cgroup2 id of the socket.
    pub cgroup: u64,
    /// cgroup2 id of the socket at the other end, when both were seen; else 0.
    pub peer_cgroup: u64,
    /// Peer address as the socket has it; zero for a server whose client was seen.
    pub peer: Address,
    /// Network namespace, its inode number.
    pub netns: u32,
    /// The service's port as this socket has it: local when server, the peer's when client.
    pub port: u16,
    /// The service's port at the other end, when both were seen; translation makes it another one.
    pub service_port: u16,
    /// [`role`].
    pub role: u8,
    /// [`protocol`].
    pub protocol: u8,
    /// Zero.
    pub padding: u16,
    /// Zero.
    pub more_padding: u32,
}

impl PortKey {
    /// Nobody's.
    pub const NONE: Self = Self {
        cgroup: 0,
        peer_cgroup: 0,
        peer: [0; 2],
        netns: 0,
        port: 0,
        service_port: 0,
        role: 0,
        protocol: 0,
        padding: 0,
        more_padding: 0,
    };

    /// Its words in memory, made from the values and not read from there, where they may be on their way in pieces.
    #[inline(always)]
    #[must_use]
    pub const fn words(&self) -> [u64; 6] {
        let places =
            self.netns as u64 | (self.port as u64) << 32 | (self.service_port as u64) << 48;
        let what = self.role as u64 | (self.protocol as u64) << 8;
        let [peer, more_peer] = self.peer;
        [self.cgroup, self.peer_cgroup, peer, more_peer, places, what]
    }
}

/// What the connections of one kind did since the programs were loaded.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct PortStats {
    /// Connections made; for UDP pairs of a socket and a peer.
    pub connections: u64,
    /// Payload bytes sent, without those sent again; TCP only.
    pub sent: u64,
    /// Payload bytes received in order; TCP only.
    pub received: u64,
    /// Segments sent again; TCP only.
    pub retransmits: u64,
    /// First connection, ns of the monotonic clock.
    pub first_ns: u64,
    /// Last time one was opened, known to be open or closed, ns of the monotonic clock.
    pub last_ns: u64,
    /// Smoothed round-trip times of those that had moved something when they were looked at: their sum, µs, and above
    /// [`ROUND_TRIP_BITS`] how many. Only differences between two times mean something, as the sum overflows.
    pub round_trips: u64,
}

/// Bits of the sum in [`PortStats::round_trips`]: 12 days, which connections do not add up to between two sweeps.
pub const ROUND_TRIP_BITS: u32 = 40;

/// Rows of `PORTS`, when the agent does not say otherwise.
pub const PORT_ROWS: u32 = 8_192;

/// Which kind of connections a row of `PORTS` is of, and what they did.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct PortRow {
    /// Which; its `role` is 0 where the row is free.
    pub key: PortKey,
    /// What they did.
    pub stats: PortStats,
}

impl PortRow {
    /// Nobody's.
    pub const FREE: Self = Self {
        key: PortKey::NONE,
        stats: PortStats::EMPTY,
    };
}

/// Open connections are in groups of so many places.
pub const OPEN_GROUP: usize = 16;

/// Groups of open connections, when the agent does not say otherwise.
pub const OPEN_GROUPS: u32 = open_groups(24_576);

/// Groups for so many open connections: with half as many places again hardly any finds its groups full.
#[must_use]
pub const fn open_groups(connections: u32) -> u32 {
    connections
        .saturating_add(connections / 2)
        .div_ceil(OPEN_GROUP as u32)
}

/// The first groups, which are tried first: so short connections always meet in the same few lines of the
/// processor's caches.
const NEAR_GROUPS: u32 = 64;

/// The groups of `groups` in which a connection may be, in the order in which they are tried: one of the first
/// [`NEAR_GROUPS`], then two of the others. The lowest free slot of both is taken, so that they fill alike.
#[inline(always)]
#[must_use]
pub const fn groups_of(identity: u64, groups: u32) -> [[u32; 2]; 2] {
    // Bits from everywhere, by the first steps of MurmurHash3's finalizer.
    let mut mixed = (identity ^ identity >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    mixed ^= mixed >> 33;
    // A few groups are all near.
    let near = if groups > 2 * NEAR_GROUPS {
        NEAR_GROUPS
    } else {
        0
    };
    let far = (groups - near) as u64;
    let one = near + (((mixed >> 32) * far) >> 32) as u32;
    let other = near + (((mixed & 0xffff_ffff) * far) >> 32) as u32;
    if near == 0 {
        return [[one, other]; 2];
    }
    let near = (mixed % NEAR_GROUPS as u64) as u32;
    [[near, near], [one, other]]
}

/// UDP ports that were let go of are kept in groups of so many.
pub const RELEASED_GROUP: usize = 8;

/// Groups of them.
pub const RELEASED_GROUPS: u32 = 1_024;

/// log2 of the nanoseconds in which the time is counted at which a port was let go of: 134 ms, for 18 years.
pub const RELEASED_SHIFT: u32 = 27;

/// In which group a port of a network namespace is that was let go of, and by what it is told from others there: the
/// upper half of its word, of which the lower is the time.
#[inline(always)]
#[must_use]
pub const fn released_at(netns: u32, port: u16) -> (u32, u32) {
    let place = (netns as u64) << 16 | port as u64;
    // As for [`groups_of`].
    let mixed = (place ^ place >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let mixed = mixed ^ mixed >> 33;
    ((mixed >> 32) as u32 % RELEASED_GROUPS, mixed as u32)
}

/// In place of a connection's identity: nobody's, and one that is just being noted. Both are less than any
/// identity.
pub mod place {
    /// Nobody's.
    pub const FREE: u64 = 0;
    /// Being noted.
    pub const TAKEN: u64 = 1;
}

/// A connection's socket, and what of it is already counted in its kind.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct End {
    /// Its address; 0 when it was not seen or is closed.
    pub socket: u64,
    /// Its cgroup2 id; 0 when it was not seen.
    pub cgroup: u64,
    /// The peer's address.
    pub peer: Address,
    /// Network namespace, its inode number.
    pub netns: u32,
    /// The service's port as this socket has it.
    pub port: u16,
    /// Zero.
    pub padding: u16,
    /// Counted of [`PortStats::sent`]; [`End::UNCOUNTED`] before the connection is counted.
    pub sent: u64,
    /// Counted of [`PortStats::received`].
    pub received: u64,
    /// Counted of [`PortStats::retransmits`].
    pub retransmits: u64,
}

impl PortStats {
    /// Nothing counted.
    pub const EMPTY: Self = Self {
        connections: 0,
        sent: 0,
        received: 0,
        retransmits: 0,
        first_ns: 0,
        last_ns: 0,
        round_trips: 0,
    };
}

impl End {
    /// In place of the bytes sent: the connection itself is not counted yet.
    pub const UNCOUNTED: u64 = u64::MAX;

    /// Not seen.
    pub const UNSEEN: Self = Self {
        socket: 0,
        cgroup: 0,
        peer: [0; 2],
        netns: 0,
        port: 0,
        padding: 0,
        sent: Self::UNCOUNTED,
        received: 0,
        retransmits: 0,
    };

    #[inline(always)]
    const fn words(&self) -> [u64; 8] {
        let place = self.netns as u64 | (self.port as u64) << 32;
        let [peer, more_peer] = self.peer;
        [
            self.socket,
            self.cgroup,
            peer,
            more_peer,
            place,
            self.sent,
            self.received,
            self.retransmits,
        ]
    }
}

/// A connection of which an end is open.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Open {
    /// Who connected.
    pub client: End,
    /// Who listened; not known for UDP.
    pub server: End,
    /// When the first end seen was opened, ns of the monotonic clock.
    pub opened_ns: u64,
    /// [`protocol`].
    pub protocol: u64,
}

impl Open {
    /// Its words in memory: client, server and the rest.
    #[inline(always)]
    #[must_use]
    pub const fn words(&self) -> ([u64; 8], [u64; 8], [u64; 2]) {
        let rest = [self.opened_ns, self.protocol];
        (self.client.words(), self.server.words(), rest)
    }

    /// The kind of one end's connection.
    #[inline(always)]
    #[must_use]
    pub const fn key(&self, role: u8) -> PortKey {
        let (own, other) = if role == role::CLIENT {
            (&self.client, &self.server)
        } else {
            (&self.server, &self.client)
        };
        let met = other.cgroup != 0;
        let server = role == role::SERVER;
        PortKey {
            cgroup: own.cgroup,
            peer_cgroup: other.cgroup,
            peer: if met && server { [0; 2] } else { own.peer },
            netns: own.netns,
            port: own.port,
            service_port: if met && !server { other.port } else { 0 },
            role,
            protocol: self.protocol as u8,
            padding: 0,
            more_padding: 0,
        }
    }
}

/// Datagrams between a socket that is not connected and one peer.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct FlowKey {
    /// The kernel's cookie of the socket.
    pub socket: u64,
    /// Peer address.
    pub peer: Address,
    /// Peer port.
    pub port: u64,
}

/// What is remembered of a [`FlowKey`].
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Flow {
    /// Last time it was counted as alive, ns of the monotonic clock.
    pub last_ns: u64,
    /// [`role`] of the socket: who sent first is the client. The programs keep a mark beside it.
    pub role: u64,
}

/// A listening port of a network namespace.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct ListenKey {
    /// cgroup2 id of the socket.
    pub cgroup: u64,
    /// Network namespace, its inode number.
    pub netns: u32,
    /// Port.
    pub port: u16,
    /// Zero.
    pub padding: u16,
}
