//! The ledger of acknowledged writes, and the check of it in full against the databases of a host.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::lab::Host;
use crate::process::{output, output_with_input};

/// One acknowledged write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Unique id of the write.
    pub id: String,
    /// What was written.
    pub payload: String,
    /// When the request was sent, Unix time in ms.
    pub sent_ms: u64,
    /// When the acknowledgement had arrived, Unix time in ms.
    pub acked_ms: u64,
}

/// All acknowledged writes of a run, in the order of their acknowledgements.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    entries: Vec<Entry>,
}

/// The longest time without an acknowledgement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Gap {
    /// Acknowledgement before the gap, Unix time in ms.
    pub start_ms: u64,
    /// Length in ms.
    pub length_ms: u64,
}

/// What the databases hold of the ledger.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Proof {
    /// Writes in the ledger.
    pub acknowledged: usize,
    /// Ids of acknowledged writes that PostgreSQL does not have.
    pub missing_in_postgres: Vec<String>,
    /// Ids of acknowledged writes that Redis does not have.
    pub missing_in_redis: Vec<String>,
    /// Ids whose payload is another than what was written, in either database.
    pub mismatched: Vec<String>,
}

impl Proof {
    /// True when every acknowledged write is in both databases as it was written. An empty ledger proves
    /// nothing.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.acknowledged > 0
            && self.missing_in_postgres.is_empty()
            && self.missing_in_redis.is_empty()
            && self.mismatched.is_empty()
    }
}

impl Ledger {
    /// Reads the file of a load. A last line that is still being written is left out.
    ///
    /// # Errors
    /// The file cannot be read or holds something else; a file that is not there yet is empty.
    pub fn read(path: &Path) -> Result<Self> {
        if !path.exists() {
            return Ok(Self::default());
        }
        let text = fs::read_to_string(path)
            .with_context(|| format!("cannot read the ledger {}", path.display()))?;
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let mut entries = whole
            .lines()
            .map(serde_json::from_str::<Entry>)
            .collect::<Result<Vec<_>, _>>()
            .with_context(|| format!("the ledger {} is damaged", path.display()))?;
        entries.sort_by_key(|entry| entry.acked_ms);
        Ok(Self { entries })
    }

    /// The acknowledged writes.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The longest time between two acknowledgements that follow each other.
    #[must_use]
    pub fn longest_gap(&self) -> Gap {
        self.entries
            .windows(2)
            .map(|pair| Gap {
                start_ms: pair[0].acked_ms,
                length_ms: pair[1].acked_ms - pair[0].acked_ms,
            })
            .max_by_key(|gap| gap.length_ms)
            .unwrap_or_default()
    }

    /// Reads every acknowledged write back from the databases in the containers `db` and `cache` of
    /// `host`.
    ///
    /// # Errors
    /// A database could not be asked. A write that is missing is no error but part of the proof.
    pub fn check(&self, host: &Host) -> Result<Proof> {
        let rows = output(&mut host.command([
            "podman", "--log-level", "error", "exec", "db", "sh", "-c",
            "exec /usr/lib/postgresql/*/bin/psql --host=/tmp --username=postgres --quiet --no-psqlrc \
             --command='COPY writes (id, payload) TO STDOUT'",
        ]))
        .context("cannot read the twins' PostgreSQL")?;
        let postgres: BTreeMap<&str, &str> = rows
            .lines()
            .filter_map(|row| row.split_once('\t'))
            .collect();

        let mut questions = String::new();
        for entry in &self.entries {
            questions.push_str(&format!("GET write:{}\n", entry.id));
        }
        let mut command = host.command(["podman", "--log-level", "error", "exec", "--interactive"]);
        command.args(["cache", "redis-cli"]);
        let answers = output_with_input(&mut command, questions.as_bytes())
            .context("cannot read the twins' Redis")?;
        // An answer that is not there is an empty line; the last ones may have been trimmed.
        let mut redis: Vec<&str> = answers.split('\n').collect();
        redis.resize(redis.len().max(self.entries.len()), "");
        ensure!(
            self.entries.is_empty() || redis.len() == self.entries.len(),
            "Redis gave {} answers to {} questions",
            redis.len(),
            self.entries.len()
        );
        Ok(compare(&self.entries, &postgres, &redis))
    }
}

/// `redis` holds one answer for each entry, in order, empty when there is none.
fn compare(entries: &[Entry], postgres: &BTreeMap<&str, &str>, redis: &[&str]) -> Proof {
    let mut proof = Proof {
        acknowledged: entries.len(),
        ..Proof::default()
    };
    for (entry, cached) in entries.iter().zip(redis) {
        let stored = postgres.get(entry.id.as_str());
        if stored.is_none() {
            proof.missing_in_postgres.push(entry.id.clone());
        }
        if cached.is_empty() {
            proof.missing_in_redis.push(entry.id.clone());
        }
        if stored.is_some_and(|stored| *stored != entry.payload)
            || (!cached.is_empty() && *cached != entry.payload)
        {
            proof.mismatched.push(entry.id.clone());
        }
    }
    proof
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(id: &str, acked_ms: u64) -> Entry {
        Entry {
            id: id.into(),
            payload: format!("payload of {id}"),
            sent_ms: acked_ms,
            acked_ms,
        }
    }

    #[test]
    fn a_write_that_is_missing_or_changed_in_either_database_breaks_the_proof() {
        let entries = [entry("a", 1), entry("b", 2), entry("c", 3), entry("d", 4)];
        let whole: BTreeMap<_, _> = entries
            .iter()
            .map(|entry| (entry.id.as_str(), entry.payload.as_str()))
            .collect();
        let answers: Vec<_> = entries.iter().map(|entry| entry.payload.as_str()).collect();
        assert!(compare(&entries, &whole, &answers).holds());

        let mut postgres = whole.clone();
        postgres.remove("a");
        postgres.insert("b", "something else");
        let mut redis = answers.clone();
        redis[2] = "";
        let proof = compare(&entries, &postgres, &redis);
        assert!(!proof.holds());
        assert_eq!(proof.missing_in_postgres, ["a"]);
        assert_eq!(proof.missing_in_redis, ["c"]);
        assert_eq!(proof.mismatched, ["b"]);
        assert!(
            !compare(&[], &whole, &[]).holds(),
            "an empty ledger proves nothing"
        );
    }

    #[test]
    fn the_longest_gap_is_found_with_its_start() {
        let ledger = Ledger {
            entries: vec![
                entry("a", 10),
                entry("b", 20),
                entry("c", 900),
                entry("d", 910),
            ],
        };
        assert_eq!(
            ledger.longest_gap(),
            Gap {
                start_ms: 20,
                length_ms: 880
            }
        );
        assert_eq!(Ledger::default().longest_gap().length_ms, 0);
    }
}
