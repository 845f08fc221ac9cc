//! SMART of ATA drives without smartctl: ATA commands through the SCSI layer's pass-through (SAT, ATA
//! PASS-THROUGH (16); ATA8-ACS, SMART feature set; SFF-8035i for the tables of attributes).
//!
//! What a drive's raw counts mean beyond the common attributes is each maker's secret, which smartctl has a book
//! of: wear and bytes written are told with smartctl only.

use super::{Answer, Health};
use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

const SECTOR: usize = 512;
const TIMEOUT_MS: u32 = 20_000;

/// `struct sg_io_hdr` (include/scsi/sg.h).
#[repr(C)]
struct SgIo {
    interface: i32,
    direction: i32,
    command_length: u8,
    sense_length: u8,
    segments: u16,
    data_length: u32,
    data: *mut u8,
    command: *const u8,
    sense: *mut u8,
    timeout_ms: u32,
    flags: u32,
    pack: i32,
    user: *mut u8,
    status: u8,
    masked_status: u8,
    message_status: u8,
    sense_written: u8,
    host_status: u16,
    driver_status: u16,
    residual: i32,
    duration_ms: u32,
    info: u32,
}

const SG_IO: libc::Ioctl = 0x2285;
const FROM_DEVICE: i32 = -3;
const NO_DATA: i32 = -1;
const SENSE: usize = 32;
/// SAM status CHECK CONDITION: the sense data hold the answer's registers, or an error.
const CHECK_CONDITION: u8 = 2;

const SMART: u8 = 0xb0;
const READ_DATA: u8 = 0xd0;
const READ_THRESHOLDS: u8 = 0xd1;
const RETURN_STATUS: u8 = 0xda;
const CHECK_POWER_MODE: u8 = 0xe5;
/// What a SMART command has in the middle and high LBA registers, and a healthy drive answers with.
const HEALTHY: (u8, u8) = (0x4f, 0xc2);
/// What a drive answers with that by its own judgement fails.
const FAILING: (u8, u8) = (0xf4, 0x2c);

/// Registers that a command ends with.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Registers {
    error: u8,
    status: u8,
    count: u8,
    lba_mid: u8,
    lba_high: u8,
}

/// Asks one drive, unless it sleeps.
pub fn ask(device: &Path) -> Result<Answer, String> {
    let shown = device.display();
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(device)
        .map_err(|error| format!("cannot open {shown}: {error}"))?;
    let told = |result: Result<_, String>| {
        result.map_err(|why| {
            format!(
                "{shown} takes no ATA commands ({why}); install smartmontools to see its health"
            )
        })
    };
    let power = told(run(&file, CHECK_POWER_MODE, 0, None))?;
    if power.is_some_and(|power| is_standby(power.count)) {
        return Ok(Answer::Sleeps);
    }
    let (mut data, mut thresholds) = ([0; SECTOR], [0; SECTOR]);
    told(run(&file, SMART, READ_DATA, Some(&mut data)))?;
    told(run(&file, SMART, READ_THRESHOLDS, Some(&mut thresholds)))?;
    let status = told(run(&file, SMART, RETURN_STATUS, None))?;
    let mut health = decode(&data, &thresholds).map_err(|why| format!("{shown}: {why}"))?;
    health.failed = status.and_then(|status| match (status.lba_mid, status.lba_high) {
        HEALTHY => Some(false),
        FAILING => Some(true),
        _ => None,
    });
    Ok(Answer::Told(Box::new(health)))
}

/// Whether a power mode is standby (ACS-4, CHECK POWER MODE: 00h, and 01h for Standby_y); in every other one a drive
/// answers without spinning up.
fn is_standby(mode: u8) -> bool {
    matches!(mode, 0 | 1)
}

/// Runs a command: one that reads a sector, or one whose answer are its registers.
fn run(
    file: &impl AsRawFd,
    command: u8,
    feature: u8,
    sector: Option<&mut [u8; SECTOR]>,
) -> Result<Option<Registers>, String> {
    let reads = sector.is_some();
    let mut cdb = [0; 16];
    cdb[0] = 0x85;
    // Protocol PIO data-in, or no data.
    cdb[1] = if reads { 4 << 1 } else { 3 << 1 };
    // T_DIR from the device, BYT_BLOK, T_LENGTH in the count; or CK_COND, which asks for the registers.
    cdb[2] = if reads { 0x0e } else { 0x20 };
    cdb[4] = feature;
    cdb[6] = u8::from(reads);
    if command == SMART {
        (cdb[10], cdb[12]) = HEALTHY;
    }
    cdb[14] = command;
    let mut sense = [0; SENSE];
    let mut request = SgIo {
        interface: i32::from(b'S'),
        direction: if reads { FROM_DEVICE } else { NO_DATA },
        command_length: 16,
        sense_length: SENSE as u8,
        segments: 0,
        data_length: if reads { SECTOR as u32 } else { 0 },
        data: sector.map_or(std::ptr::null_mut(), |sector| sector.as_mut_ptr()),
        command: cdb.as_ptr(),
        sense: sense.as_mut_ptr(),
        timeout_ms: TIMEOUT_MS,
        flags: 0,
        pack: 0,
        user: std::ptr::null_mut(),
        status: 0,
        masked_status: 0,
        message_status: 0,
        sense_written: 0,
        host_status: 0,
        driver_status: 0,
        residual: 0,
        duration_ms: 0,
        info: 0,
    };
    // SAFETY: the request names buffers with their lengths that live until the call returns.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), SG_IO, &raw mut request) };
    if done < 0 {
        return Err(io::Error::last_os_error().to_string());
    }
    if request.host_status != 0 {
        return Err(format!("host status {:#x}", request.host_status));
    }
    let answer = registers(&sense);
    match request.status {
        0 => Ok(answer),
        CHECK_CONDITION => match answer {
            Some(answer) if answer.status & 1 == 0 => Ok(Some(answer)),
            Some(answer) => Err(format!("ATA error {:#04x}", answer.error)),
            None => Err(format!("sense key {:#x}", sense_key(&sense))),
        },
        status => Err(format!("SCSI status {status:#x}")),
    }
}

fn sense_key(sense: &[u8; SENSE]) -> u8 {
    let at = if sense[0] & 0x7f >= 0x72 { 1 } else { 2 };
    sense[at] & 0x0f
}

/// The registers in sense data: the ATA Status Return descriptor (SAT, 12.2.2.6), or the same in the fixed
/// format (SAT, 12.2.2.7); there only under "ATA pass through information available" (00h/1Dh).
fn registers(sense: &[u8; SENSE]) -> Option<Registers> {
    match sense[0] & 0x7f {
        0x72 if sense[8] == 0x09 => Some(Registers {
            error: sense[11],
            count: sense[13],
            lba_mid: sense[17],
            lba_high: sense[19],
            status: sense[21],
        }),
        0x70 if (sense[12], sense[13]) == (0x00, 0x1d) => Some(Registers {
            error: sense[3],
            status: sense[4],
            count: sense[6],
            lba_mid: sense[10],
            lba_high: sense[11],
        }),
        _ => None,
    }
}

/// One attribute: its id, its normalised value and its raw count.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Attribute {
    id: u8,
    value: u8,
    raw: u64,
}

/// Both tables have 30 entries of 12 bytes from byte 2 on.
fn entries(sector: &[u8; SECTOR]) -> impl Iterator<Item = &[u8; 12]> {
    let (entries, _) = sector[2..362].as_chunks::<12>();
    entries.iter().filter(|entry| entry[0] != 0)
}

/// Takes the attributes and their thresholds apart.
pub fn decode(data: &[u8; SECTOR], thresholds: &[u8; SECTOR]) -> Result<Health, String> {
    for (what, sector) in [("attributes", data), ("thresholds", thresholds)] {
        if sector
            .iter()
            .fold(0_u8, |sum, byte| sum.wrapping_add(*byte))
            != 0
        {
            return Err(format!("the checksum of its SMART {what} is wrong"));
        }
    }
    let attributes: Vec<Attribute> = entries(data)
        .map(|entry| {
            let mut raw = [0; 8];
            raw[..6].copy_from_slice(&entry[5..11]);
            Attribute {
                id: entry[0],
                value: entry[3],
                raw: u64::from_le_bytes(raw),
            }
        })
        .collect();
    let threshold = |id: u8| {
        entries(thresholds)
            .find(|entry| entry[0] == id)
            .map(|entry| entry[1])
    };
    let fails =
        |one: &&Attribute| threshold(one.id).is_some_and(|limit| one.value <= limit && limit > 0);
    // Some makers keep other counts in the upper half.
    let raw = |id: u8| {
        let of = attributes.iter().find(|attribute| attribute.id == id)?;
        Some(of.raw & 0xffff_ffff)
    };
    // Airflow only where there is no other; the upper bytes hold the lowest and highest so far.
    let celsius = raw(194).or_else(|| raw(190)).map(|raw| raw & 0xff);
    Ok(Health {
        attributes_failing: Some(attributes.iter().filter(fails).count() as u64),
        reallocated: raw(5),
        pending: raw(197),
        media_errors: raw(187).or_else(|| raw(198)),
        power_on_hours: raw(9).map(|hours| hours as f64),
        celsius: celsius
            .filter(|celsius| (1..=120).contains(celsius))
            .map(|one| one as f64),
        ..Health::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sector(entries: &[[u8; 12]]) -> [u8; SECTOR] {
        let mut sector = [0; SECTOR];
        sector[0] = 0x10;
        for (place, entry) in entries.iter().enumerate() {
            sector[2 + 12 * place..14 + 12 * place].copy_from_slice(entry);
        }
        let sum = sector
            .iter()
            .fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        sector[SECTOR - 1] = 0_u8.wrapping_sub(sum);
        sector
    }

    /// As drives lay them out: id, flags, value, worst, six raw bytes, one that is reserved.
    const ATTRIBUTES: [[u8; 12]; 6] = [
        [5, 0x33, 0, 4, 4, 0xb7, 0x07, 0, 0, 0, 0, 0],
        [9, 0x32, 0, 26, 26, 0x38, 0x00, 0x01, 0, 0xaa, 0x12, 0],
        [187, 0x32, 0, 98, 98, 2, 0, 0, 0, 0, 0, 0],
        [194, 0x22, 0, 25, 45, 25, 0, 0, 0, 12, 0, 0],
        [197, 0x12, 0, 100, 100, 8, 0, 0, 0, 0, 0, 0],
        [198, 0x10, 0, 100, 100, 9, 0, 0, 0, 0, 0, 0],
    ];

    #[test]
    fn attributes_are_held_against_the_drives_own_thresholds() {
        assert_eq!(size_of::<SgIo>(), 88);
        let limit = |id: u8, limit: u8| [id, limit, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let thresholds = sector(&[limit(5, 36), limit(9, 0), limit(187, 0), limit(197, 10)]);
        let health = decode(&sector(&ATTRIBUTES), &thresholds).expect("well-formed");
        let expected = Health {
            attributes_failing: Some(1),
            reallocated: Some(1975),
            pending: Some(8),
            media_errors: Some(2),
            power_on_hours: Some(65_592.0),
            celsius: Some(25.0),
            ..Health::default()
        };
        assert_eq!(health, expected);
        let mut broken = sector(&ATTRIBUTES);
        broken[40] ^= 1;
        assert!(decode(&broken, &thresholds).is_err_and(|why| why.contains("checksum")));
    }

    #[test]
    fn the_registers_are_found_in_both_forms_of_sense_data() {
        let mut descriptor = [0; SENSE];
        descriptor[..22].copy_from_slice(&[
            0x72, 1, 0, 0x1d, 0, 0, 0, 14, 9, 12, 0, 0, 0, 0xff, 0, 0, 0, 0xf4, 0, 0x2c, 0, 0x50,
        ]);
        let expected = Registers {
            error: 0,
            status: 0x50,
            count: 0xff,
            lba_mid: 0xf4,
            lba_high: 0x2c,
        };
        assert_eq!(registers(&descriptor), Some(expected));
        let mut fixed = [0; SENSE];
        fixed[..14].copy_from_slice(&[0x70, 0, 1, 0, 0x50, 0, 0xff, 10, 0, 0, 0xf4, 0x2c, 0, 0x1d]);
        assert_eq!(registers(&fixed), Some(expected));
        let mut refused = [0; SENSE];
        refused[..3].copy_from_slice(&[0x70, 0, 5]);
        assert_eq!((registers(&refused), sense_key(&refused)), (None, 5));
    }

    #[test]
    fn a_drive_in_either_standby_is_left_asleep_and_one_that_idles_is_asked() {
        assert!([0x00, 0x01].into_iter().all(is_standby));
        assert!(![0x40, 0x80, 0x83, 0xff].into_iter().any(is_standby));
    }

    #[test]
    fn a_device_that_takes_no_ata_commands_says_so_and_names_the_next_step() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let Err(error) = ask(file.path()) else {
            panic!("a file is no drive");
        };
        assert!(error.contains("takes no ATA commands"), "{error}");
        assert!(error.contains("smartmontools"), "{error}");
    }
}
