//! The health log of NVMe drives (NVM Express Base Specification, Get Log Page, log identifier 02h).

use super::Health;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

/// Bytes of one data unit: a thousand blocks of 512.
pub const DATA_UNIT: f64 = 512_000.0;
const LOG: usize = 512;
const KELVIN: f64 = 273.0;

/// `struct nvme_admin_cmd` (include/uapi/linux/nvme_ioctl.h).
#[repr(C)]
#[derive(Default)]
struct AdminCommand {
    opcode: u8,
    flags: u8,
    reserved: u16,
    namespace: u32,
    command_2: u32,
    command_3: u32,
    metadata: u64,
    address: u64,
    metadata_length: u32,
    data_length: u32,
    command_10: u32,
    command_11: u32,
    command_12: u32,
    command_13: u32,
    command_14: u32,
    command_15: u32,
    timeout_ms: u32,
    result: u32,
}

const GET_LOG_PAGE: u8 = 0x02;
const HEALTH: u32 = 0x02;
const ALL_NAMESPACES: u32 = 0xffff_ffff;
const TIMEOUT_MS: u32 = 10_000;

/// Reads the log from the drive.
pub fn health_log(device: &Path) -> Result<[u8; LOG], String> {
    let shown = device.display();
    let file = File::open(device).map_err(|error| format!("cannot open {shown}: {error}"))?;
    let mut log = [0; LOG];
    let mut command = AdminCommand {
        opcode: GET_LOG_PAGE,
        namespace: ALL_NAMESPACES,
        address: log.as_mut_ptr() as u64,
        data_length: LOG as u32,
        // Number of dwords, counted from zero, above the log's identifier.
        command_10: ((LOG as u32 / 4 - 1) << 16) | HEALTH,
        timeout_ms: TIMEOUT_MS,
        ..AdminCommand::default()
    };
    // NVME_IOCTL_ADMIN_CMD
    let request = libc::_IOWR::<AdminCommand>(u32::from(b'N'), 0x41);
    // SAFETY: the command names a buffer of `data_length` bytes that lives until the call returns.
    let status = unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut command) };
    match status {
        0 => Ok(log),
        status if status > 0 => Err(format!(
            "{shown} refuses its health log (status {status:#x})"
        )),
        _ => match io::Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM)) => {
                Err(format!("{shown} tells its health only with CAP_SYS_ADMIN"))
            }
            error => Err(format!("{shown} tells no health: {error}")),
        },
    }
}

/// Takes the log apart; its numbers are little-endian.
pub fn decode(log: &[u8; LOG]) -> Health {
    let wide = |at: usize| {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&log[at..at + 16]);
        u128::from_le_bytes(bytes)
    };
    let kelvin = f64::from(u16::from_le_bytes([log[1], log[2]]));
    Health {
        failed: Some(log[0] != 0),
        celsius: (kelvin > 0.0).then_some(kelvin - KELVIN),
        spare_margin_percent: Some(f64::from(log[3]) - f64::from(log[4])),
        wear_percent: Some(f64::from(log[5])),
        bytes_written: Some(wide(48) as f64 * DATA_UNIT),
        power_on_hours: Some(wide(128) as f64),
        media_errors: u64::try_from(wide(160)).ok(),
        ..Health::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_health_log_is_read_by_the_specifications_offsets() {
        assert_eq!(size_of::<AdminCommand>(), 72);
        let mut log = [0; LOG];
        log[0] = 0b101; // spare below threshold, reliability degraded
        log[1..3].copy_from_slice(&316_u16.to_le_bytes());
        (log[3], log[4], log[5]) = (8, 10, 104);
        log[48..64].copy_from_slice(&7_773_431_u128.to_le_bytes());
        log[128..144].copy_from_slice(&2401_u128.to_le_bytes());
        log[160..176].copy_from_slice(&3_u128.to_le_bytes());
        let expected = Health {
            failed: Some(true),
            wear_percent: Some(104.0),
            spare_margin_percent: Some(-2.0),
            media_errors: Some(3),
            bytes_written: Some(7_773_431.0 * 512_000.0),
            power_on_hours: Some(2401.0),
            celsius: Some(43.0),
            ..Health::default()
        };
        assert_eq!(decode(&log), expected);
    }

    #[test]
    fn a_file_that_is_no_drive_says_so() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let error = health_log(file.path()).expect_err("no drive");
        assert!(error.contains("tells no health"), "{error}");
        assert!(
            health_log(Path::new("/no-such-drive")).is_err_and(|why| why.contains("cannot open"))
        );
    }
}
