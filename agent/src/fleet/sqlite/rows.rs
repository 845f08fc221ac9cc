//! Rows of the registry's tables, and what they mean.

use super::Stop;
use crate::fleet::identity::Fingerprint;
use crate::fleet::registry::{Lending, RegistryError};
use crate::model::fleet::{Device, DutyOutcome, PairingRecord, Role, Trust};
use crate::model::ids::{DeviceId, PairingId};
use crate::model::units::{Bytes, UnixMillis};
use rusqlite::types::Type;
use rusqlite::{OptionalExtension, Row, Transaction};
use serde::Serialize;
use serde::de::DeserializeOwned;

const PAIRING: &str =
    "SELECT id, plan, source, device, role, actions, quantity, created_ms, outcome FROM pairings";

pub(super) fn devices(db: &Transaction<'_>) -> rusqlite::Result<Vec<Device>> {
    let count = "SELECT COUNT(*) FROM pairings WHERE pairings.device = devices.id AND outcome";
    let mut statement = db.prepare(&format!(
        "SELECT id, address, configuration, utilisation, version, uptime_s, last_seen_ms,
         ({count} = ?1), ({count} = ?2), ({count} IS NULL) FROM devices ORDER BY id"
    ))?;
    let rows = statement.query_map(
        [json(&DutyOutcome::Done)?, json(&DutyOutcome::Failed)?],
        |row| {
            let (completed, failed, uptime_seconds) = (row.get(7)?, row.get(8)?, natural(row, 5)?);
            let version: String = row.get(4)?;
            let same_version = version == env!("CARGO_PKG_VERSION");
            Ok(Device {
                id: DeviceId(row.get(0)?),
                address: row
                    .get::<_, String>(1)?
                    .parse()
                    .map_err(|error| unreadable(1, error))?,
                configuration: optional(row, 2)?,
                utilisation: optional(row, 3)?,
                version,
                uptime_seconds,
                last_seen: row
                    .get::<_, Option<i64>>(6)?
                    .map(|ms| UnixMillis(ms.unsigned_abs())),
                completed,
                failed,
                lent: row.get(9)?,
                trust: Trust::of(completed, failed, uptime_seconds, same_version),
            })
        },
    )?;
    rows.collect()
}

pub(super) fn pairing(db: &Transaction<'_>, id: &PairingId) -> Result<PairingRecord, Stop> {
    db.query_row(&format!("{PAIRING} WHERE id = ?"), [id.as_str()], record)
        .optional()?
        .ok_or_else(|| RegistryError::PairingUnknown(id.clone()).into())
}

pub(super) fn open_pairings(db: &Transaction<'_>) -> rusqlite::Result<Vec<PairingRecord>> {
    let mut statement = db.prepare(&format!("{PAIRING} WHERE outcome IS NULL"))?;
    statement.query_map([], record)?.collect()
}

pub(super) fn record(row: &Row<'_>) -> rusqlite::Result<PairingRecord> {
    Ok(PairingRecord {
        id: PairingId(row.get(0)?),
        plan: row.get::<_, String>(1)?.as_str().into(),
        source: DeviceId(row.get(2)?),
        device: DeviceId(row.get(3)?),
        role: parsed::<Role>(row, 4)?,
        actions: parsed(row, 5)?,
        quantity: Bytes(natural(row, 6)?),
        created: UnixMillis(natural(row, 7)?),
        outcome: optional(row, 8)?,
    })
}

pub(super) fn lending(db: &Transaction<'_>, id: &PairingId) -> Result<Lending, Stop> {
    let pairing = pairing(db, id)?;
    Ok(db.query_row(
        "SELECT p.volumes, p.expires_ms, p.secret, d.address, d.fingerprint
         FROM pairings p JOIN devices d ON d.id = p.device WHERE p.id = ?",
        [id.as_str()],
        |row| {
            Ok(Lending {
                pairing,
                volumes: parsed(row, 0)?,
                expires: UnixMillis(natural(row, 1)?),
                secret: parsed(row, 2)?,
                address: row
                    .get::<_, String>(3)?
                    .parse()
                    .map_err(|error| unreadable(3, error))?,
                fingerprint: fingerprint(row, 4)?,
            })
        },
    )?)
}

pub(super) fn end(
    db: &Transaction<'_>,
    id: &PairingId,
    outcome: DutyOutcome,
) -> rusqlite::Result<()> {
    db.execute(
        "UPDATE pairings SET outcome = ? WHERE id = ?",
        [json(&outcome)?.as_str(), id.as_str()],
    )?;
    Ok(())
}

pub(super) fn json<T: Serialize>(value: &T) -> rusqlite::Result<String> {
    serde_json::to_string(value)
        .map_err(|error| rusqlite::Error::ToSqlConversionFailure(Box::new(error)))
}

pub(super) fn unreadable(
    column: usize,
    error: impl std::error::Error + Send + Sync + 'static,
) -> rusqlite::Error {
    rusqlite::Error::FromSqlConversionFailure(column, Type::Text, Box::new(error))
}

pub(super) fn parsed<T: DeserializeOwned>(row: &Row<'_>, column: usize) -> rusqlite::Result<T> {
    serde_json::from_str(&row.get::<_, String>(column)?).map_err(|error| unreadable(column, error))
}

pub(super) fn optional<T: DeserializeOwned>(
    row: &Row<'_>,
    column: usize,
) -> rusqlite::Result<Option<T>> {
    row.get::<_, Option<String>>(column)?
        .map(|text| serde_json::from_str(&text).map_err(|error| unreadable(column, error)))
        .transpose()
}

pub(super) fn fingerprint(row: &Row<'_>, column: usize) -> rusqlite::Result<Fingerprint> {
    let mut bytes = [0; 32];
    hex::decode_to_slice(row.get::<_, String>(column)?, &mut bytes)
        .map_err(|error| unreadable(column, error))?;
    Ok(Fingerprint(bytes))
}

/// SQLite's integers are signed: what does not fit is held at the largest.
pub(super) fn integer(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

pub(super) fn natural(row: &Row<'_>, column: usize) -> rusqlite::Result<u64> {
    Ok(u64::try_from(row.get::<_, i64>(column)?).unwrap_or(0))
}
