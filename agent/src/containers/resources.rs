//! Networks and volumes that a twin needs.
//!
//! Invariants: asking twice changes nothing; a network or volume that was there before is never altered,
//! and one that is something else under the same name is an error.

use super::client::{Runtime, RuntimeError, escape};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Networks every runtime has by itself.
const PREDEFINED: [&str; 5] = ["bridge", "host", "none", "podman", "default"];

/// A network or volume could not be provided.
#[derive(Debug, thiserror::Error)]
pub enum ResourceError {
    /// The runtime failed.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The description lacks what is needed to make it.
    #[error(
        "the description of a {kind} has no {field}: take it from the runtime's inspect answer"
    )]
    Incomplete {
        /// `network` or `volume`.
        kind: &'static str,
        /// The missing field.
        field: &'static str,
    },
    /// The name is taken by something else.
    #[error(
        "{what} exists at {} and is another one: {difference}; rename or remove it first",
        socket.display()
    )]
    Different {
        /// `network X` or `volume X`.
        what: String,
        /// Socket of the runtime that has it.
        socket: PathBuf,
        /// The field and its two values.
        difference: String,
    },
}

impl Runtime {
    /// Description of a network, as [`Runtime::ensure_network`] takes it.
    ///
    /// # Errors
    /// When there is none of this name or the runtime fails.
    pub async fn network(&self, name: &str) -> Result<Value, RuntimeError> {
        self.get(
            &format!("/networks/{}", escape(name)),
            &format!("inspect network {name}"),
        )
        .await
    }

    /// Description of a volume: `Name`, `Driver`, `Labels`, `Options`, `Mountpoint`.
    ///
    /// # Errors
    /// When there is none of this name or the runtime fails.
    pub async fn volume(&self, name: &str) -> Result<Value, RuntimeError> {
        self.get(
            &format!("/volumes/{}", escape(name)),
            &format!("inspect volume {name}"),
        )
        .await
    }

    /// Makes a network like the one described, unless it is there. Returns what is not as on the source:
    /// when its subnets are taken on this device, it gets others.
    ///
    /// # Errors
    /// When a network of this name has another driver or reach, or the runtime fails.
    pub async fn ensure_network(&self, like: &Value) -> Result<Vec<String>, ResourceError> {
        let name = required(like, "network", "Name")?;
        if PREDEFINED.contains(&name) {
            return Ok(Vec::new());
        }
        match self.network(name).await {
            Ok(there) => {
                for field in ["Driver", "Internal"] {
                    self.same("network", name, field, &there, like)?;
                }
                Ok(subnet_note(name, &there, like).into_iter().collect())
            }
            Err(error) if error.not_found() => self.make_network(name, like).await,
            Err(error) => Err(error.into()),
        }
    }

    async fn make_network(&self, name: &str, like: &Value) -> Result<Vec<String>, ResourceError> {
        let config: Vec<Value> = like["IPAM"]["Config"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|range| without_empty(range, &["Subnet", "Gateway", "IPRange"]))
            .collect();
        let mut body = json!({
            "Name": name,
            "CheckDuplicate": true,
            "Driver": like["Driver"],
            "EnableIPv6": like["EnableIPv6"].as_bool().unwrap_or(false),
            "Internal": like["Internal"].as_bool().unwrap_or(false),
            "IPAM": { "Driver": "default", "Config": config },
            "Options": like["Options"],
            "Labels": like["Labels"],
        });
        let operation = format!("create network {name}");
        match self.post("/networks/create", Some(&body), &operation).await {
            Ok(_) => return Ok(Vec::new()),
            // Runtimes give out the same first subnets everywhere, so a conflict is the normal case on a
            // device with networks of its own. No status tells it apart from other refusals.
            Err(RuntimeError::Refused { .. }) if !config.is_empty() => {}
            Err(error) => return Err(error.into()),
        }
        body["IPAM"]["Config"] = json!([]);
        self.post("/networks/create", Some(&body), &operation)
            .await?;
        let made = self.network(name).await?;
        Ok(subnet_note(name, &made, like).into_iter().collect())
    }

    /// Removes a volume with its data; one that is not there is no error.
    ///
    /// # Errors
    /// When a container uses it, or the runtime fails.
    pub async fn remove_volume(&self, name: &str) -> Result<(), RuntimeError> {
        let path = format!("/volumes/{}", escape(name));
        match self.delete(&path, &format!("remove volume {name}")).await {
            Err(error) if error.not_found() => Ok(()),
            result => result,
        }
    }

    /// Removes a network; one that is not there is no error.
    ///
    /// # Errors
    /// When a container is in it, or the runtime fails.
    pub async fn remove_network(&self, name: &str) -> Result<(), RuntimeError> {
        let path = format!("/networks/{}", escape(name));
        match self.delete(&path, &format!("remove network {name}")).await {
            Err(error) if error.not_found() => Ok(()),
            result => result,
        }
    }

    /// Makes a volume unless it is there; returns the directory its data lies in.
    ///
    /// # Errors
    /// When a volume of this name has another driver or other driver options, or the runtime fails.
    pub async fn ensure_volume(&self, like: &Value) -> Result<PathBuf, ResourceError> {
        let name = required(like, "volume", "Name")?;
        let volume = match self.volume(name).await {
            Ok(there) => {
                for field in ["Driver", "Options"] {
                    self.same("volume", name, field, &there, like)?;
                }
                there
            }
            Err(error) if error.not_found() => {
                let body = json!({
                    "Name": name,
                    "Driver": like["Driver"],
                    "DriverOpts": like["Options"],
                    "Labels": like["Labels"],
                });
                self.post(
                    "/volumes/create",
                    Some(&body),
                    &format!("create volume {name}"),
                )
                .await?
            }
            Err(error) => return Err(error.into()),
        };
        required(&volume, "volume", "Mountpoint").map(|path| Path::new(path).to_owned())
    }

    fn same(
        &self,
        kind: &'static str,
        name: &str,
        field: &'static str,
        there: &Value,
        wanted: &Value,
    ) -> Result<(), ResourceError> {
        let (there, wanted) = (&there[field], &wanted[field]);
        if there == wanted || (is_empty(there) && is_empty(wanted)) {
            return Ok(());
        }
        Err(ResourceError::Different {
            what: format!("{kind} {name}"),
            socket: self.socket().to_owned(),
            difference: format!("its {field} is {there}, the source's is {wanted}"),
        })
    }
}

fn required<'a>(
    value: &'a Value,
    kind: &'static str,
    field: &'static str,
) -> Result<&'a str, ResourceError> {
    value[field]
        .as_str()
        .ok_or(ResourceError::Incomplete { kind, field })
}

/// Null, false, zero, and empty text, list and object all mean "not set" in the API.
pub(super) fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(on) => !on,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
    }
}

fn without_empty(object: &Value, keep: &[&str]) -> Value {
    keep.iter()
        .filter(|key| !is_empty(&object[**key]))
        .map(|key| ((*key).to_owned(), object[*key].clone()))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

fn subnet_note(name: &str, here: &Value, source: &Value) -> Option<String> {
    let subnets = |network: &Value| -> BTreeSet<String> {
        network["IPAM"]["Config"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|range| range["Subnet"].as_str().map(str::to_owned))
            .collect()
    };
    let (here, source) = (subnets(here), subnets(source));
    (here != source).then(|| {
        let list = |set: BTreeSet<String>| set.into_iter().collect::<Vec<_>>().join(", ");
        format!(
            "network {name}: subnets {} instead of {}",
            list(here),
            list(source)
        )
    })
}
