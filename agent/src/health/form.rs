//! The form of the policy file: keys and kinds of values, each mistake with its place.

use super::policy::{Among, OnTimeout, Severity, Stage};
use super::schema::{ActionName, MetricName, PerName, Span, unknown_fields};
use crate::model::action::Action;
use crate::model::locate::{Fault, parse};
use crate::model::metric::Per;
use schemars::JsonSchema;
use serde::Deserialize;
use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, Visitor};
use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

/// Reads the form of a policy: what is there of it, and every mistake of form.
pub(super) fn read(text: &str) -> (Option<FilePolicy>, Vec<Fault>) {
    // serde would end at the first unknown field, and so hide what else is wrong.
    let unknown = unknown_fields(text);
    match (parse(text), unknown) {
        (Ok(file), Ok(unknown)) => (Some(file), unknown),
        (Err(fault), Ok(unknown)) => (None, without_followers(vec![fault], unknown)),
        (Ok(_), Err(fault)) | (Err(fault), Err(_)) => (None, vec![fault]),
    }
}

/// Mistakes of which those are left out that are told of a mapping as a whole and come from its unknown fields.
pub(super) fn without_followers(mut faults: Vec<Fault>, unknown: Vec<Fault>) -> Vec<Fault> {
    faults.retain(|fault| {
        let mut unknown = unknown.iter().map(|one| one.field.0.split_last());
        !unknown.any(|split| split.is_some_and(|(_, above)| *above == fault.field.0[..]))
    });
    faults.extend(unknown);
    faults
}

/// A degradation policy of Lifeboat.
#[derive(Deserialize, JsonSchema)]
#[serde(expecting = "a policy: `version`, `name`, `thresholds` and `degraded`")]
#[schemars(deny_unknown_fields, rename = "Policy")]
pub(super) struct FilePolicy {
    /// Version of this format: 1.
    #[schemars(range(min = 1, max = 1))]
    pub version: u64,
    /// Stands in verdicts and logs.
    pub name: String,
    /// A value older than this counts as missing; at least 1s. Default: 10s.
    #[serde(default, deserialize_with = "given")]
    #[schemars(with = "Option<Span>")]
    pub stale_after: Option<Scalar>,
    /// Named signals with their limits: a failure is a limit passed for its time.
    #[schemars(with = "BTreeMap<String, FileThreshold>")]
    pub thresholds: Named<FileThreshold>,
    /// Any entry that holds makes the device degraded.
    pub degraded: Vec<FileDegraded>,
    /// The first entry that holds chooses the delegated actions.
    #[serde(default, deserialize_with = "filled")]
    pub delegate: Vec<FileDelegation>,
    /// Brakes.
    #[serde(default, deserialize_with = "filled")]
    pub guards: FileGuards,
}

/// A signal with its limit: one of above, below, count and forecast.
#[derive(Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields, rename = "Threshold")]
pub(super) struct FileThreshold {
    /// What is measured; `lifeboat metrics` lists all.
    #[schemars(with = "MetricName")]
    pub metric: String,
    /// What it is measured on. Default: device.
    #[serde(default, deserialize_with = "given")]
    #[schemars(with = "Option<PerName>")]
    pub per: Option<Per>,
    /// Fails above this; `device-limit - 5C` is relative to the part's own limit.
    #[serde(default, deserialize_with = "given")]
    pub above: Option<Scalar>,
    /// Fails below this.
    #[serde(default, deserialize_with = "given")]
    pub below: Option<Scalar>,
    /// Over at this value or better; for a forecast, when it takes longer than this. Default: the limit.
    #[serde(default, deserialize_with = "given")]
    pub clear: Option<Scalar>,
    /// How long without a break the limit must be passed.
    #[serde(default, rename = "for", deserialize_with = "given")]
    #[schemars(with = "Option<Span>")]
    pub lasting: Option<Scalar>,
    /// Only when the value also rose during `for`.
    #[serde(default)]
    pub rising: bool,
    /// Fails when so many events came within a span.
    #[serde(default, deserialize_with = "given")]
    pub count: Option<FileCount>,
    /// Fails when a straight line through the last samples reaches a value soon.
    #[serde(default, deserialize_with = "given")]
    pub forecast: Option<FileForecast>,
    /// Judge the value divided by a load.
    #[serde(default, deserialize_with = "given")]
    pub relative_to_load: Option<FileLoad>,
    /// Judge how many times the median of its peers the value is; limits are written as 3x.
    #[serde(default, deserialize_with = "given")]
    pub relative_to_peers: Option<FilePeers>,
    /// How bad it is; shown with the evidence.
    #[serde(default)]
    pub severity: Severity,
    /// The device may lack this sensor: missing data then does not make the verdict unknown.
    #[serde(default)]
    pub optional: bool,
}

/// A number of events within a span.
#[derive(Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields, rename = "Count")]
pub(super) struct FileCount {
    /// Events.
    #[schemars(range(min = 1))]
    pub at_least: u64,
    /// Span.
    #[schemars(with = "Span")]
    pub within: Scalar,
}

/// A value that is reached soon if it goes on as it did: one of reaches and falls_to.
#[derive(Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields, rename = "Forecast")]
pub(super) struct FileForecast {
    /// A value above.
    #[serde(default, deserialize_with = "given")]
    pub reaches: Option<Scalar>,
    /// A value below.
    #[serde(default, deserialize_with = "given")]
    pub falls_to: Option<Scalar>,
    /// Fails when it is reached within this time.
    #[schemars(with = "Span")]
    pub within: Scalar,
    /// Span of the samples that the line is drawn through. Default: a quarter of `within`.
    #[serde(default, deserialize_with = "given")]
    #[schemars(with = "Option<Span>")]
    pub over: Option<Scalar>,
}

/// The load that a value is divided by.
#[derive(Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields, rename = "Load")]
pub(super) struct FileLoad {
    /// The load's metric.
    #[schemars(with = "MetricName")]
    pub metric: String,
    /// With less load than this nothing is judged. Default: with none.
    #[serde(default, deserialize_with = "given")]
    pub at_least: Option<Scalar>,
    /// Both are taken over this span. Default: 1m.
    #[serde(default, deserialize_with = "given")]
    #[schemars(with = "Option<Span>")]
    pub over: Option<Scalar>,
}

/// Whom a value is compared with.
#[derive(Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields, rename = "Peers")]
pub(super) struct FilePeers {
    /// The other parts of this host, or the other devices of the fleet. Default: host.
    #[serde(default)]
    pub among: Among,
    /// A smaller value is no failure, however it compares.
    #[serde(default, deserialize_with = "given")]
    pub at_least: Option<Scalar>,
    /// Fewer peers than this say nothing. Default: 2.
    #[serde(default, deserialize_with = "given")]
    pub peers: Option<usize>,
}

/// What must hold: exactly one of failures, any, all and not.
#[derive(Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields, rename = "Condition")]
pub(super) struct FileCondition {
    /// At least so many thresholds fail.
    #[serde(default, deserialize_with = "given")]
    pub failures: Option<usize>,
    /// One of these fails or holds.
    #[serde(default, deserialize_with = "given")]
    pub any: Option<Vec<FileTerm>>,
    /// All of these fail or hold.
    #[serde(default, deserialize_with = "given")]
    pub all: Option<Vec<FileTerm>>,
    /// This is known not to fail or hold.
    #[serde(default, deserialize_with = "given")]
    pub not: Option<Box<FileTerm>>,
}

/// An entry of `degraded`: exactly one of failures, any, all and not, and how far the device is helped.
#[derive(Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields, rename = "Degraded")]
pub(super) struct FileDegraded {
    /// At least so many thresholds fail.
    #[serde(default, deserialize_with = "given")]
    pub failures: Option<usize>,
    /// One of these fails or holds.
    #[serde(default, deserialize_with = "given")]
    pub any: Option<Vec<FileTerm>>,
    /// All of these fail or hold.
    #[serde(default, deserialize_with = "given")]
    pub all: Option<Vec<FileTerm>>,
    /// This is known not to fail or hold.
    #[serde(default, deserialize_with = "given")]
    pub not: Option<Box<FileTerm>>,
    /// `watch` shows the device as degraded; `prepare` also copies the data in advance; `evacuate` moves
    /// the containers.
    #[serde(default)]
    pub stage: Stage,
}

/// The name of a threshold, which holds when it fails, or a condition.
#[derive(JsonSchema)]
#[schemars(untagged, rename = "Term")]
pub(super) enum FileTerm {
    /// A threshold.
    Fails(String),
    /// A condition.
    Holds(FileCondition),
}

impl<'de> Deserialize<'de> for FileTerm {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Term)
    }
}

struct Term;

impl<'de> Visitor<'de> for Term {
    type Value = FileTerm;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a threshold or a condition such as { not: NAME }")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<FileTerm, E> {
        Ok(FileTerm::Fails(name.to_owned()))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<FileTerm, A::Error> {
        let map = de::value::MapAccessDeserializer::new(map);
        FileCondition::deserialize(map).map(FileTerm::Holds)
    }
}

/// Which actions the paired device does.
#[derive(Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields, rename = "Delegation")]
pub(super) struct FileDelegation {
    /// The condition.
    pub when: FileCondition,
    /// The delegated actions.
    #[serde(deserialize_with = "filled")]
    #[schemars(with = "Vec<ActionName>")]
    pub actions: Vec<Action>,
}

/// Brakes.
#[derive(Default, Deserialize, JsonSchema)]
#[schemars(deny_unknown_fields, rename = "Guards")]
pub(super) struct FileGuards {
    /// Least time between two changes into or out of degraded. Default: 10m.
    #[serde(default, deserialize_with = "given")]
    #[schemars(with = "Option<Span>")]
    pub hold: Option<Scalar>,
    /// Share of the fleet that may evacuate by itself at a time, such as 30%.
    #[serde(default, deserialize_with = "given")]
    pub fleet_max_evacuating: Option<Scalar>,
    /// Roles of which each must approve an automatic plan.
    #[serde(default, deserialize_with = "filled")]
    pub approvals: Vec<String>,
    /// How long to wait for them. Default: 15m.
    #[serde(default, deserialize_with = "given")]
    #[schemars(with = "Option<Span>")]
    pub approval_timeout: Option<Scalar>,
    /// What to do then. Default: abort.
    #[serde(default)]
    pub on_timeout: OnTimeout,
    /// Most bytes a second that a copy may read, such as 20MiB. Default: no limit.
    #[serde(default, deserialize_with = "given")]
    pub limit: Option<Scalar>,
}

/// A quantity with its unit, such as 40ms, 3GiB, 85%, 85C, 120/s or a plain number.
// As it is written; YAML would make a number of some.
pub(super) struct Scalar(pub String);

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // YAML scalars may be read as text whatever they look like.
        String::deserialize(deserializer).map(Self)
    }
}

/// What stands behind a key: one without a value is a slip of the pen, and no wish for the default.
fn given<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    filled(deserializer).map(Some)
}

/// The same, of what has a default that is a value.
fn filled<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<T, D::Error> {
    let empty = || de::Error::custom("has no value: write one, or remove the key");
    Option::deserialize(deserializer)?.ok_or_else(empty)
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
