//! Classes of failed requests: what the block layer calls the reason (`blk_errors` of block/blk-core.c).

/// The medium lost the data (BLK_STS_MEDIUM).
pub const MEDIA: usize = 0;
/// No answer in time (BLK_STS_TIMEOUT).
pub const TIMEOUT: usize = 1;
/// The path to the device failed, or the device is gone (BLK_STS_TRANSPORT, BLK_STS_OFFLINE).
pub const TRANSPORT: usize = 2;
/// Integrity data do not match (BLK_STS_PROTECTION).
pub const PROTECTION: usize = 3;
/// The device refused the command (BLK_STS_TARGET).
pub const TARGET: usize = 4;
/// No space left, on thin devices (BLK_STS_NOSPC).
pub const NO_SPACE: usize = 5;
/// Any other I/O error.
pub const OTHER: usize = 6;
/// How many there are.
pub const COUNT: usize = 7;

/// The class of a request's end: a `blk_status_t`, or a negative errno before Linux 5.16 (`blk_errors` of
/// block/blk-core.c has both). None for what says nothing about the device.
/// `offline` is the number of BLK_STS_OFFLINE, see [`crate::Layout::status_offline`].
#[inline(always)]
#[must_use]
pub const fn class(status: i32, offline: i32) -> Option<usize> {
    if status == offline {
        return Some(TRANSPORT);
    }
    match status {
        // An operation that it does not have, one that is to be tried again (also within device mapper), one
        // for which it has no room now, one that nobody could do: NOTSUPP, AGAIN, DM_REQUEUE, DEV_RESOURCE,
        // INVAL; EOPNOTSUPP, EAGAIN, EREMCHG, EBUSY, EINVAL.
        0 | 1 | 12 | 11 | 13 | 19 | -95 | -11 | -78 | -16 | -22 => None,
        // TIMEOUT; ETIMEDOUT, and ETIME of a DURATION_LIMIT.
        2 | -110 | -62 => Some(TIMEOUT),
        // DURATION_LIMIT comes after OFFLINE: the drive gave up in the time that it was given.
        17 | 18 => Some(TIMEOUT),
        // NOSPC; ENOSPC.
        3 | -28 => Some(NO_SPACE),
        // TRANSPORT; ENOLINK, and ENODEV of an OFFLINE.
        4 | -67 | -19 => Some(TRANSPORT),
        // TARGET, and RESV_CONFLICT (once NEXUS): another host holds it; EREMOTEIO, EBADE.
        5 | 6 | -121 | -52 => Some(TARGET),
        // MEDIUM; ENODATA.
        7 | -61 => Some(MEDIA),
        // PROTECTION; EILSEQ.
        8 | -84 => Some(PROTECTION),
        // IOERR, RESOURCE (no memory), and the limits of zones: 14 and 15, and 16 before Linux 6.10.
        _ => Some(OTHER),
    }
}
