//! What is said to the ublk driver and by it (include/uapi/linux/ublk_cmd.h), as bytes.
//!
//! Commands are in the `ioctl` encoding (`UBLK_F_CMD_IOCTL_ENCODE`) and data go by `pread` and `pwrite` of the
//! character device (`UBLK_F_USER_COPY`): both are in Linux 6.5 and later.

/// `struct ublksrv_ctrl_cmd`, `struct ublksrv_io_cmd`: only their sizes matter here.
type ControlCommand = [u64; 4];
type QueueCommand = [u64; 2];

pub(super) const GET_DEV_INFO: u32 = libc::_IOR::<ControlCommand>(UBLK, 0x02) as u32;
pub(super) const ADD_DEV: u32 = libc::_IOWR::<ControlCommand>(UBLK, 0x04) as u32;
pub(super) const START_DEV: u32 = libc::_IOWR::<ControlCommand>(UBLK, 0x06) as u32;
pub(super) const STOP_DEV: u32 = libc::_IOWR::<ControlCommand>(UBLK, 0x07) as u32;
pub(super) const SET_PARAMS: u32 = libc::_IOWR::<ControlCommand>(UBLK, 0x08) as u32;
pub(super) const GET_FEATURES: u32 = libc::_IOR::<ControlCommand>(UBLK, 0x13) as u32;
pub(super) const DEL_DEV_ASYNC: u32 = libc::_IOR::<ControlCommand>(UBLK, 0x14) as u32;

pub(super) const FETCH_REQ: u32 = libc::_IOWR::<QueueCommand>(UBLK, 0x20) as u32;
pub(super) const COMMIT_AND_FETCH_REQ: u32 = libc::_IOWR::<QueueCommand>(UBLK, 0x21) as u32;

const UBLK: u32 = b'u' as u32;

const F_CMD_IOCTL_ENCODE: u64 = 1 << 6;
pub(super) const F_USER_COPY: u64 = 1 << 7;

/// Bytes of a sector.
pub(super) const SECTOR: u64 = 512;
/// Most bytes of a request.
const REQUEST_CAP: u32 = 512 << 10;
/// Most sectors that are discarded or zeroed by one request.
const ZERO_CAP: u32 = (64 << 20) / SECTOR as u32;

/// A command to the control device (`struct ublksrv_ctrl_cmd`), with its buffer in this process.
pub(super) fn control(id: u32, data: u64, buffer: u64, length: u16) -> [u8; 80] {
    let mut bytes = [0; 80];
    put(&mut bytes, 0, &id.to_ne_bytes());
    // Of no queue.
    put(&mut bytes, 4, &u16::MAX.to_ne_bytes());
    put(&mut bytes, 6, &length.to_ne_bytes());
    put(&mut bytes, 8, &buffer.to_ne_bytes());
    put(&mut bytes, 16, &data.to_ne_bytes());
    bytes
}

/// A command of the only queue (`struct ublksrv_io_cmd`).
pub(super) fn queue(tag: u16, result: i32) -> [u8; 16] {
    let mut bytes = [0; 16];
    put(&mut bytes, 2, &tag.to_ne_bytes());
    put(&mut bytes, 4, &result.to_ne_bytes());
    bytes
}

/// Where the data of a request of the only queue lie in the character device.
pub(super) fn place(tag: u16) -> u64 {
    0x8000_0000 + (u64::from(tag) << 25)
}

/// `struct ublksrv_ctrl_dev_info`.
pub(super) struct DeviceInfo(pub(super) [u8; 64]);

impl DeviceInfo {
    /// Asks for a device with one queue, which bears `mark`.
    pub(super) fn new(depth: u16, mark: u64) -> Self {
        let mut bytes = [0; 64];
        put(&mut bytes, 0, &1_u16.to_ne_bytes());
        put(&mut bytes, 2, &depth.to_ne_bytes());
        put(&mut bytes, 8, &REQUEST_CAP.to_ne_bytes());
        // The driver chooses a number.
        put(&mut bytes, 12, &u32::MAX.to_ne_bytes());
        let flags = F_CMD_IOCTL_ENCODE | F_USER_COPY;
        put(&mut bytes, 24, &flags.to_ne_bytes());
        put(&mut bytes, 32, &mark.to_ne_bytes());
        Self(bytes)
    }

    pub(super) fn number(&self) -> u32 {
        u32::from_ne_bytes(get(&self.0, 12))
    }

    /// Whether it was never started, or has been stopped.
    pub(super) fn is_dead(&self) -> bool {
        u16::from_ne_bytes(get(&self.0, 4)) == 0
    }

    /// What its maker wrote there: the driver leaves it alone.
    pub(super) fn mark(&self) -> u64 {
        u64::from_ne_bytes(get(&self.0, 32))
    }
}

/// `struct ublk_params` of a disk with a volatile cache.
pub(super) fn parameters(bytes: u64, read_only: bool) -> [u8; 60] {
    const BASIC_AND_DISCARD: u32 = 0b11;
    const VOLATILE_CACHE_AND_FUA: u32 = 0b1100;
    let mut parameters = [0; 60];
    put(&mut parameters, 0, &60_u32.to_ne_bytes());
    put(&mut parameters, 4, &BASIC_AND_DISCARD.to_ne_bytes());
    let attributes = VOLATILE_CACHE_AND_FUA | u32::from(read_only);
    put(&mut parameters, 8, &attributes.to_ne_bytes());
    // Logical block 512 bytes, for images that have such; physical 4 KiB: less makes a write wait for the rest of
    // its page. Best read in blocks of 64 KiB, which is what is fetched.
    put(&mut parameters, 12, &[9, 12, 16, 12]);
    let sectors = REQUEST_CAP / SECTOR as u32;
    put(&mut parameters, 16, &sectors.to_ne_bytes());
    put(&mut parameters, 24, &(bytes / SECTOR).to_ne_bytes());
    put(&mut parameters, 44, &4096_u32.to_ne_bytes());
    put(&mut parameters, 48, &ZERO_CAP.to_ne_bytes());
    put(&mut parameters, 52, &ZERO_CAP.to_ne_bytes());
    put(&mut parameters, 56, &1_u16.to_ne_bytes());
    parameters
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Read,
    Write { durable: bool },
    Flush,
    Discard,
    WriteZeroes { hole: bool, durable: bool },
    Unknown,
}

/// A request (`struct ublksrv_io_desc`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) operation: Operation,
    /// In bytes.
    pub(super) offset: u64,
    /// In bytes.
    pub(super) length: u32,
}

/// Bytes of a request's description.
pub(super) const DESCRIPTION: usize = 24;

impl Request {
    pub(super) fn decode(bytes: &[u8; DESCRIPTION]) -> Self {
        let flags = u32::from_ne_bytes(get(bytes, 0));
        let durable = flags & 1 << 13 != 0;
        let operation = match flags & 0xff {
            0 => Operation::Read,
            1 => Operation::Write { durable },
            2 => Operation::Flush,
            3 => Operation::Discard,
            5 => Operation::WriteZeroes {
                hole: flags & 1 << 15 == 0,
                durable,
            },
            _ => Operation::Unknown,
        };
        let sector = u64::from_ne_bytes(get(bytes, 8));
        let sectors = u32::from_ne_bytes(get(bytes, 4));
        Self {
            operation,
            // A flush is of no sector: all bits are set.
            offset: sector.saturating_mul(SECTOR),
            length: sectors.saturating_mul(SECTOR as u32),
        }
    }
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn get<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    std::array::from_fn(|index| bytes[at + index])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    fn commands_have_the_numbers_of_the_drivers_header() {
        assert_eq!(ADD_DEV, 0xc020_7504);
        assert_eq!(GET_DEV_INFO, 0x8020_7502);
        assert_eq!(DEL_DEV_ASYNC, 0x8020_7514);
        assert_eq!(FETCH_REQ, 0xc010_7520);
    }

    #[test]
    fn a_request_is_read_from_the_drivers_words() {
        let description = |flags: u32, sectors: u32, start: u64| {
            let mut bytes = [0; DESCRIPTION];
            put(&mut bytes, 0, &flags.to_ne_bytes());
            put(&mut bytes, 4, &sectors.to_ne_bytes());
            put(&mut bytes, 8, &start.to_ne_bytes());
            Request::decode(&bytes)
        };
        let write = description(1 | 1 << 13 | 1 << 11, 8, 1 << 33);
        let expected = Request {
            operation: Operation::Write { durable: true },
            offset: 1 << 42,
            length: 4096,
        };
        assert_eq!(write, expected);
        let zeroes = |flags: u32| description(5 | flags, 1, 0).operation;
        let (hole, durable) = (true, false);
        assert_eq!(zeroes(0), Operation::WriteZeroes { hole, durable });
        let hole = false;
        assert_eq!(zeroes(1 << 15), Operation::WriteZeroes { hole, durable });
        assert_eq!(description(13, 1, 0).operation, Operation::Unknown);
        let flush = description(2, 0, u64::MAX);
        assert_eq!((flush.operation, flush.length), (Operation::Flush, 0));
    }
}
