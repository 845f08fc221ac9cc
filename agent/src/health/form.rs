//! The form of the policy file: keys and kinds of values, each mistake with its place.

use super::policy::{OnTimeout, Severity};
use crate::model::action::Action;
use crate::model::locate::{Fault, parse};
use crate::model::metric::Per;
use crate::model::nearest::hint;
use serde::Deserialize;
use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, Visitor};
use std::fmt;
use std::marker::PhantomData;

/// Keys that the design has and this version does not.
const LATER: &[&str] = &[
    "rising",
    "falling",
    "forecast",
    "not",
    "relative_to_load",
    "relative_to_peers",
];

/// Reads the form of a policy.
pub(super) fn read(text: &str) -> Result<FilePolicy, Fault> {
    parse(text).map_err(explained)
}

/// serde's message for an unknown field, in our words.
fn explained(mut fault: Fault) -> Fault {
    let unknown = fault
        .message
        .strip_prefix("unknown field `")
        .and_then(|rest| rest.split_once('`'))
        .map(|(key, rest)| (key.to_owned(), rest.to_owned()));
    if let Some((key, rest)) = unknown {
        let known: Vec<&str> = rest.split('`').skip(1).step_by(2).collect();
        fault.message = if LATER.contains(&key.as_str()) || key.starts_with("relative_") {
            format!(
                "`{key}` is not supported in this version: remove it, the rest of the entry works without"
            )
        } else {
            format!("unknown field{}", hint(&key, known))
        };
    }
    fault
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FilePolicy {
    pub version: u64,
    pub name: String,
    #[serde(default)]
    pub stale_after: Option<Scalar>,
    pub thresholds: Named<FileThreshold>,
    pub degraded: Vec<FileCondition>,
    #[serde(default)]
    pub delegate: Vec<FileDelegation>,
    #[serde(default)]
    pub guards: FileGuards,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileThreshold {
    pub metric: String,
    #[serde(default)]
    pub per: Option<Per>,
    #[serde(default)]
    pub above: Option<Scalar>,
    #[serde(default)]
    pub below: Option<Scalar>,
    #[serde(default)]
    pub clear: Option<Scalar>,
    #[serde(default, rename = "for")]
    pub lasting: Option<Scalar>,
    #[serde(default)]
    pub count: Option<FileCount>,
    #[serde(default)]
    pub severity: Severity,
    #[serde(default)]
    pub optional: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileCount {
    pub at_least: u64,
    pub within: Scalar,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileCondition {
    #[serde(default)]
    pub failures: Option<usize>,
    #[serde(default)]
    pub any: Option<Vec<String>>,
    #[serde(default)]
    pub all: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileDelegation {
    pub when: FileCondition,
    pub actions: Vec<Action>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileGuards {
    #[serde(default)]
    pub hold: Option<Scalar>,
    #[serde(default)]
    pub fleet_max_evacuating: Option<Scalar>,
    #[serde(default)]
    pub approvals: Vec<String>,
    #[serde(default)]
    pub approval_timeout: Option<Scalar>,
    #[serde(default)]
    pub on_timeout: OnTimeout,
}

/// A scalar as it is written; YAML would make a number of some.
pub(super) struct Scalar(pub String);

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // YAML scalars may be read as text whatever they look like.
        String::deserialize(deserializer).map(Self)
    }
}

/// A mapping in the file's order in which no key may stand twice.
pub(super) struct Named<T>(pub Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Named<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Entries(PhantomData))
    }
}

struct Entries<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
    type Value = Named<T>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a mapping of names")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Named<T>, A::Error> {
        let mut entries: Vec<(String, T)> = Vec::new();
        while let Some(name) = map.next_key_seed(NewName(&entries))? {
            entries.push((name, map.next_value()?));
        }
        Ok(Named(entries))
    }
}

/// A key that must not be among the entries; refused while it is read, so that the parser tells the
/// place of the second one.
struct NewName<'a, T>(&'a [(String, T)]);

impl<'de, T> DeserializeSeed<'de> for NewName<'_, T> {
    type Value = String;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<T> Visitor<'_> for NewName<'_, T> {
    type Value = String;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<String, E> {
        if self.0.iter().any(|(known, _)| known == name) {
            return Err(E::custom(format!(
                "duplicate name `{name}`: rename one of the two"
            )));
        }
        Ok(name.to_owned())
    }
}
