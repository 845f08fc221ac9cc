//! The embedded registry engine: one SQLite database beside the duplicator.
//!
//! Invariants: WAL with `synchronous=FULL`, so that what was answered is durable; every method is one
//! IMMEDIATE transaction, so that two duplicators (or a command beside one) on one file take turns; all
//! calls run on blocking threads.

mod rows;

use super::allocate::{Admission, Candidate, Choice, Cost, Demand, Need, Rules, admit, choose};
use super::identity::Fingerprint;
use super::registry::{
    ActionCost, Allocation, Ask, Enrolment, Heartbeat, Invitation, Registry, RegistryError,
};
use super::secret::Secret;
use crate::model::action::Action;
use crate::model::fleet::{Device, DutyOutcome, PairingRecord};
use crate::model::ids::{DeviceId, PairingId, PlanId};
use crate::model::units::UnixMillis;
use rows::{
    devices, end, fingerprint, integer, json, lending, natural, open_pairings, pairing, parsed,
};
use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior, params};
use std::collections::{BTreeMap, HashMap};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS devices (
  id TEXT PRIMARY KEY, address TEXT NOT NULL, fingerprint TEXT NOT NULL, joined_ms INTEGER NOT NULL,
  configuration TEXT, utilisation TEXT, version TEXT NOT NULL DEFAULT '',
  uptime_s INTEGER NOT NULL DEFAULT 0, last_seen_ms INTEGER) STRICT;
CREATE TABLE IF NOT EXISTS invitations (
  secret_hash TEXT PRIMARY KEY, device TEXT, expires_ms INTEGER NOT NULL, used_by TEXT) STRICT;
CREATE TABLE IF NOT EXISTS pairings (
  id TEXT PRIMARY KEY, plan TEXT NOT NULL, source TEXT NOT NULL, device TEXT NOT NULL,
  role TEXT NOT NULL, actions TEXT NOT NULL, volumes TEXT NOT NULL, quantity INTEGER NOT NULL,
  core_nanos INTEGER NOT NULL, storage INTEGER NOT NULL, secret TEXT NOT NULL,
  explanation TEXT NOT NULL, created_ms INTEGER NOT NULL, expires_ms INTEGER NOT NULL,
  outcome TEXT) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS one_open_pairing_per_role
  ON pairings (source, plan, role) WHERE outcome IS NULL;
CREATE TABLE IF NOT EXISTS evacuations (
  source TEXT PRIMARY KEY, plan TEXT NOT NULL, since_ms INTEGER NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS duties (
  pairing TEXT NOT NULL, device TEXT NOT NULL, action TEXT NOT NULL, bytes INTEGER NOT NULL,
  core_nanos INTEGER NOT NULL) STRICT;
";

/// The registry in one SQLite file.
#[derive(Clone)]
pub struct SqliteRegistry {
    path: PathBuf,
    connection: Arc<Mutex<Connection>>,
}

impl SqliteRegistry {
    /// The registry's file in the duplicator's directory.
    #[must_use]
    pub fn path(dir: &Path) -> PathBuf {
        dir.join("registry.sqlite")
    }

    /// Opens the registry at `path`, making it (0600) when it is not there. Blocks.
    ///
    /// # Errors
    /// [`RegistryError::Engine`].
    pub fn open(path: &Path) -> Result<Self, RegistryError> {
        let engine = |reason: String| RegistryError::Engine {
            place: path.display().to_string(),
            reason,
        };
        // Made here and not by SQLite, so that it never was readable by others: it holds pairing
        // secrets, and SQLite gives its -wal and -shm files the same mode.
        std::fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(path)
            .map_err(|error| engine(error.to_string()))?;
        let open = || {
            let connection = Connection::open(path)?;
            connection.busy_timeout(Duration::from_secs(10))?;
            connection.pragma_update(None, "journal_mode", "WAL")?;
            connection.pragma_update(None, "synchronous", "FULL")?;
            connection.execute_batch(SCHEMA)?;
            Ok(connection)
        };
        let connection: rusqlite::Result<Connection> = open();
        Ok(Self {
            connection: Arc::new(Mutex::new(
                connection.map_err(|error| engine(error.to_string()))?,
            )),
            path: path.to_owned(),
        })
    }

    async fn transaction<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Transaction<'_>) -> Result<T, Stop> + Send + 'static,
    ) -> Result<T, RegistryError> {
        let connection = self.connection.clone();
        let done = tokio::task::spawn_blocking(move || {
            // A panic in another transaction rolled that one back; the connection is sound.
            let mut connection = connection.lock().unwrap_or_else(PoisonError::into_inner);
            let transaction =
                connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let done = work(&transaction)?;
            transaction.commit()?;
            Ok(done)
        });
        let engine = |reason: String| RegistryError::Engine {
            place: self.path.display().to_string(),
            reason,
        };
        match done.await {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(Stop::Refused(error))) => Err(error),
            Ok(Err(Stop::Sqlite(error))) => Err(engine(error.to_string())),
            Err(error) => Err(engine(error.to_string())),
        }
    }
}

/// Why a transaction is rolled back.
enum Stop {
    Refused(RegistryError),
    Sqlite(rusqlite::Error),
}

impl From<rusqlite::Error> for Stop {
    fn from(error: rusqlite::Error) -> Self {
        Self::Sqlite(error)
    }
}

impl From<RegistryError> for Stop {
    fn from(error: RegistryError) -> Self {
        Self::Refused(error)
    }
}

impl Registry for SqliteRegistry {
    async fn invite(&self, invitation: Invitation) -> Result<(), RegistryError> {
        self.transaction(move |db| {
            db.execute(
                "INSERT INTO invitations (secret_hash, device, expires_ms) VALUES (?, ?, ?)",
                params![
                    hex::encode(invitation.secret_hash),
                    invitation.device.as_ref().map(DeviceId::as_str),
                    integer(invitation.expires.0),
                ],
            )?;
            Ok(())
        })
        .await
    }

    async fn enrol(
        &self,
        secret_hash: [u8; 32],
        enrolment: Enrolment,
        now: UnixMillis,
    ) -> Result<(), RegistryError> {
        self.transaction(move |db| {
            let hash = hex::encode(secret_hash);
            let invitation = db
                .query_row(
                    "SELECT device, expires_ms, used_by FROM invitations WHERE secret_hash = ?",
                    [&hash],
                    |row| {
                        Ok((
                            row.get::<_, Option<String>>(0)?,
                            natural(row, 1)?,
                            row.get::<_, Option<String>>(2)?,
                        ))
                    },
                )
                .optional()?;
            let (named, expires, used_by) = invitation.ok_or(RegistryError::InvitationUnknown)?;
            if let Some(by) = used_by {
                return Err(RegistryError::InvitationUsed(DeviceId(by)).into());
            }
            if expires <= now.0 {
                return Err(RegistryError::InvitationExpired.into());
            }
            let exists = db
                .query_row(
                    "SELECT 1 FROM devices WHERE id = ?",
                    [enrolment.device.as_str()],
                    |_| Ok(()),
                )
                .optional()?
                .is_some();
            match named {
                Some(named) if named != enrolment.device.as_str() => {
                    return Err(RegistryError::InvitationForAnother(DeviceId(named)).into());
                }
                None if exists => {
                    return Err(RegistryError::DeviceExists(enrolment.device).into());
                }
                _ => {}
            }
            db.execute(
                "UPDATE invitations SET used_by = ? WHERE secret_hash = ?",
                [enrolment.device.as_str(), &hash],
            )?;
            db.execute(
                "INSERT INTO devices (id, address, fingerprint, joined_ms) VALUES (?1, ?2, ?3, ?4)
                 ON CONFLICT (id) DO UPDATE SET address = ?2, fingerprint = ?3, joined_ms = ?4",
                params![
                    enrolment.device.as_str(),
                    enrolment.address.to_string(),
                    enrolment.fingerprint.to_string(),
                    integer(now.0),
                ],
            )?;
            Ok(())
        })
        .await
    }

    async fn fingerprint(&self, device: DeviceId) -> Result<Fingerprint, RegistryError> {
        self.transaction(move |db| {
            db.query_row(
                "SELECT fingerprint FROM devices WHERE id = ?",
                [device.as_str()],
                |row| fingerprint(row, 0),
            )
            .optional()?
            .ok_or_else(|| RegistryError::DeviceUnknown(device).into())
        })
        .await
    }

    async fn heartbeat(
        &self,
        device: DeviceId,
        heartbeat: Heartbeat,
        abandoned_before: UnixMillis,
        now: UnixMillis,
    ) -> Result<Vec<PairingId>, RegistryError> {
        self.transaction(move |db| {
            let known = db.execute(
                "UPDATE devices SET address = ?2, configuration = ?3, utilisation = ?4, version = ?5,
                 uptime_s = ?6, last_seen_ms = ?7 WHERE id = ?1",
                params![
                    device.as_str(),
                    heartbeat.address.to_string(),
                    json(&heartbeat.configuration)?,
                    json(&heartbeat.utilisation)?,
                    heartbeat.version,
                    integer(heartbeat.uptime_seconds),
                    integer(now.0),
                ],
            )?;
            if known == 0 {
                return Err(RegistryError::DeviceUnknown(device).into());
            }
            let plans: Vec<&str> = heartbeat.plans.iter().map(PlanId::as_str).collect();
            db.execute(
                "DELETE FROM evacuations WHERE source = ? AND since_ms < ?
                 AND plan NOT IN (SELECT value FROM json_each(?))",
                params![device.as_str(), integer(abandoned_before.0), json(&plans)?],
            )?;
            let mut ended = Vec::new();
            for pairing in open_pairings(db)? {
                if pairing.source == device
                    && pairing.created < abandoned_before
                    && !heartbeat.plans.contains(&pairing.plan)
                {
                    end(db, &pairing.id, DutyOutcome::Abandoned)?;
                    ended.push(pairing.id);
                }
            }
            Ok(ended)
        })
        .await
    }

    async fn devices(&self) -> Result<Vec<Device>, RegistryError> {
        self.transaction(|db| Ok(devices(db)?)).await
    }

    async fn allocate(
        &self,
        ask: Ask,
        rules: Rules,
        now: UnixMillis,
    ) -> Result<Allocation, RegistryError> {
        self.transaction(move |db| allocate(db, &ask, &rules, now))
            .await
    }

    async fn consider(
        &self,
        need: Need,
        rules: Rules,
        now: UnixMillis,
    ) -> Result<Choice, RegistryError> {
        self.transaction(move |db| {
            end_expired(db, now)?;
            Ok(choose(&need, &candidates(db)?, &rules, now))
        })
        .await
    }

    async fn admit(
        &self,
        source: DeviceId,
        plan: PlanId,
        max_percent: Option<f64>,
        rules: Rules,
        now: UnixMillis,
    ) -> Result<Admission, RegistryError> {
        self.transaction(move |db| {
            let live_since = now.0.saturating_sub(rules.live_within.as_millis() as u64);
            let live = "last_seen_ms >= ?1";
            let count: i64 = db.query_row(
                &format!("SELECT COUNT(*) FROM devices WHERE {live}"),
                [integer(live_since)],
                |row| row.get(0),
            )?;
            // A device that is not live any more loads nobody.
            let mut statement = db.prepare(&format!(
                "SELECT source FROM evacuations JOIN devices ON devices.id = source
                 WHERE {live} AND source != ?2 ORDER BY source"
            ))?;
            let others = statement
                .query_map(params![integer(live_since), source.as_str()], |row| {
                    Ok(DeviceId(row.get(0)?))
                })?
                .collect::<rusqlite::Result<Vec<_>>>()?;
            let admission = match max_percent {
                Some(most) => admit(most, usize::try_from(count).unwrap_or(0), others),
                None => Admission::Admitted,
            };
            if admission == Admission::Admitted {
                db.execute(
                    "INSERT INTO evacuations (source, plan, since_ms) VALUES (?1, ?2, ?3)
                     ON CONFLICT (source) DO UPDATE SET plan = ?2, since_ms = ?3",
                    params![source.as_str(), plan.as_str(), integer(now.0)],
                )?;
            }
            Ok(admission)
        })
        .await
    }

    async fn pairing(&self, id: PairingId) -> Result<PairingRecord, RegistryError> {
        self.transaction(move |db| pairing(db, &id)).await
    }

    async fn release(
        &self,
        id: PairingId,
        outcome: DutyOutcome,
        costs: Vec<ActionCost>,
        _now: UnixMillis,
    ) -> Result<PairingRecord, RegistryError> {
        self.transaction(move |db| {
            let before = pairing(db, &id)?;
            if before.outcome.is_some() {
                return Ok(before);
            }
            end(db, &id, outcome)?;
            if outcome == DutyOutcome::Done {
                for cost in &costs {
                    db.execute(
                        "INSERT INTO duties (pairing, device, action, bytes, core_nanos) VALUES (?, ?, ?, ?, ?)",
                        params![
                            id.as_str(),
                            before.device.as_str(),
                            json(&cost.action)?,
                            integer(cost.bytes.0),
                            integer(cost.core_nanos),
                        ],
                    )?;
                }
            }
            pairing(db, &id)
        })
        .await
    }
}

fn allocate(
    db: &Transaction<'_>,
    ask: &Ask,
    rules: &Rules,
    now: UnixMillis,
) -> Result<Allocation, Stop> {
    end_expired(db, now)?;
    let need = &ask.need;
    let open = db
        .query_row(
            "SELECT id, explanation, device FROM pairings
             WHERE outcome IS NULL AND source = ? AND plan = ? AND role = ?",
            params![need.source.as_str(), ask.plan.as_str(), json(&need.role)?],
            |row| {
                Ok((
                    PairingId(row.get(0)?),
                    parsed(row, 1)?,
                    DeviceId(row.get(2)?),
                ))
            },
        )
        .optional()?;
    if let Some((id, explanation, device)) = open {
        let same = pairing(db, &id)?;
        let wanted = same.actions == need.actions && same.quantity >= need.quantity;
        if wanted && !need.exclude.contains_key(&device) {
            return Ok(Allocation {
                lending: Some(lending(db, &id)?),
                explanation,
            });
        }
        end(db, &id, DutyOutcome::Abandoned)?;
    }
    let mut need = need.clone();
    for other in open_pairings(db)? {
        if other.source == need.source && other.plan == ask.plan {
            need.exclude.insert(
                other.device,
                format!("it is this plan's {} already", other.role),
            );
        }
    }
    let candidates = candidates(db)?;
    let choice = choose(&need, &candidates, rules, now);
    let Some((device, demand)) = choice.chosen else {
        return Ok(Allocation {
            lending: None,
            explanation: choice.explanation,
        });
    };
    let id = PairingId(format!("pr-{:016x}", rand::random::<u64>()));
    db.execute(
        "INSERT INTO pairings (id, plan, source, device, role, actions, volumes, quantity, core_nanos,
         storage, secret, explanation, created_ms, expires_ms)
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        params![
            id.as_str(),
            ask.plan.as_str(),
            need.source.as_str(),
            device.as_str(),
            json(&need.role)?,
            json(&need.actions)?,
            json(&ask.volumes)?,
            integer(need.quantity.0),
            integer(demand.core_nanos),
            integer(demand.storage.0),
            json(&Secret::random())?,
            json(&choice.explanation)?,
            integer(now.0),
            integer(ask.expires.0),
        ],
    )?;
    Ok(Allocation {
        lending: Some(lending(db, &id)?),
        explanation: choice.explanation,
    })
}

/// A pairing that ended by itself lends nothing any more.
fn end_expired(db: &Transaction<'_>, now: UnixMillis) -> Result<(), Stop> {
    db.execute(
        "UPDATE pairings SET outcome = ? WHERE outcome IS NULL AND expires_ms <= ?",
        params![json(&DutyOutcome::Abandoned)?, integer(now.0)],
    )?;
    Ok(())
}

fn candidates(db: &Transaction<'_>) -> Result<Vec<Candidate>, Stop> {
    let mut taken: HashMap<DeviceId, Demand> = HashMap::new();
    let mut statement =
        db.prepare("SELECT device, core_nanos, storage FROM pairings WHERE outcome IS NULL")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let demand = taken.entry(DeviceId(row.get(0)?)).or_default();
        demand.core_nanos = demand.core_nanos.saturating_add(natural(row, 1)?);
        demand.storage.0 = demand.storage.0.saturating_add(natural(row, 2)?);
    }
    let mut history: HashMap<DeviceId, BTreeMap<Action, Cost>> = HashMap::new();
    let mut statement =
        db.prepare("SELECT device, action, TOTAL(bytes), TOTAL(core_nanos) FROM duties GROUP BY device, action")?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        let cost = Cost {
            bytes: row.get::<_, f64>(2)? as u64,
            core_nanos: row.get::<_, f64>(3)? as u64,
        };
        history
            .entry(DeviceId(row.get(0)?))
            .or_default()
            .insert(parsed(row, 1)?, cost);
    }
    let devices = devices(db)?.into_iter();
    Ok(devices
        .map(|device| Candidate {
            taken: taken.get(&device.id).copied().unwrap_or_default(),
            history: history.remove(&device.id).unwrap_or_default(),
            device,
        })
        .collect())
}
