//! Twins: what describes a container completely, and making the same one on the target.
//!
//! Invariants: the twin has the source's name and image id; it is made but not started; whatever it has
//! otherwise than the source is returned. Nothing is pulled: the image must have been loaded.

use super::client::{Runtime, RuntimeError, escape};
use super::create;
use super::resources::ResourceError;
use crate::model::container::State;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::path::Path;

/// Everything needed to make a container again, taken from its runtime on the source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TwinSpec {
    /// The runtime's inspect answer; under `Libpod`, what only Podman's own API tells.
    pub inspect: Value,
    /// Inspect answers of the networks it is in.
    pub networks: Vec<Value>,
    /// Inspect answers of the named volumes it mounts.
    pub volumes: Vec<Value>,
    /// Whether the twin must have the source's addresses.
    #[serde(default)]
    pub keep_addresses: bool,
}

impl TwinSpec {
    /// The container's name.
    #[must_use]
    pub fn name(&self) -> &str {
        let name = self.inspect["Name"].as_str().unwrap_or_default();
        name.trim_start_matches('/')
    }

    /// Id of the image it runs.
    #[must_use]
    pub fn image_id(&self) -> &str {
        self.inspect["Image"].as_str().unwrap_or_default()
    }

    /// The image as its maker called it; may be an id.
    #[must_use]
    pub fn image_reference(&self) -> &str {
        self.inspect["Config"]["Image"].as_str().unwrap_or_default()
    }
}

/// A twin that was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Twin {
    /// Its id in the target's runtime.
    pub id: String,
    /// What it has otherwise than its source, for the report; one line each.
    pub not_carried: Vec<String>,
}

/// A twin could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TwinError {
    /// The runtime failed.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// A network or volume could not be provided.
    #[error(transparent)]
    Resource(#[from] ResourceError),
    /// The image has not been loaded.
    #[error("cannot make twin {name}: image {image} is not on this device; load its archive first")]
    NoImage {
        /// The twin.
        name: String,
        /// The image's id.
        image: String,
    },
    /// The name is taken by another container.
    #[error(
        "cannot make twin {name}: this device has a container of that name ({why}); rename or remove it, then try again"
    )]
    NameTaken {
        /// The twin.
        name: String,
        /// Why it is not the twin.
        why: String,
    },
}

impl Runtime {
    /// Describes a container completely, so that a twin can be made of it elsewhere.
    ///
    /// # Errors
    /// When there is no such container or the runtime fails.
    pub async fn describe(&self, container: &str) -> Result<TwinSpec, RuntimeError> {
        let inspect = self.inspect_fully(container).await?;
        let mut networks = Vec::new();
        for (name, _) in create::endpoints(&inspect, false) {
            networks.push(self.network(&name).await?);
        }
        let mut volumes = Vec::new();
        for mount in inspect["Mounts"].as_array().into_iter().flatten() {
            if let (Some("volume"), Some(name)) = (mount["Type"].as_str(), mount["Name"].as_str()) {
                volumes.push(self.volume(name).await?);
            }
        }
        Ok(TwinSpec {
            inspect,
            networks,
            volumes,
            keep_addresses: false,
        })
    }

    /// The compatible inspect answer with ids of other containers replaced by their names (ids differ on
    /// the target) and, from Podman, what the compatible API leaves out.
    async fn inspect_fully(&self, container: &str) -> Result<Value, RuntimeError> {
        let mut inspect = self.inspect(container).await?;
        for key in ["NetworkMode", "IpcMode", "PidMode"] {
            let mode = inspect["HostConfig"][key].as_str().unwrap_or_default();
            if let Some(other) = mode.strip_prefix("container:") {
                let other = self.inspect(other).await?;
                let name = other["Name"].as_str().unwrap_or_default();
                inspect["HostConfig"][key] =
                    json!(format!("container:{}", name.trim_start_matches('/')));
            }
        }
        if self.engine().await?.is_podman() {
            let path = format!("/containers/{}/json", escape(container));
            let mut libpod: Value = self
                .get_libpod(&path, &format!("inspect container {container}"))
                .await?;
            let oci = oci_config(&self.root("read the OCI configuration").await?, &libpod);
            libpod["Sysctls"] = oci["linux"]["sysctl"].clone();
            libpod["Config"]["Umask"] = json!(umask(&libpod, &oci));
            inspect[create::LIBPOD] = libpod;
        }
        Ok(inspect)
    }

    /// Makes the twin, with the networks and volumes it needs, and does not start it. When exactly this
    /// twin was made before and never started, it is taken as it is.
    ///
    /// # Errors
    /// When its image is missing, its name is taken, or the runtime refuses.
    pub async fn create_twin(&self, spec: &TwinSpec) -> Result<Twin, TwinError> {
        let name = spec.name();
        let id = spec.image_id();
        if !self.image_present(id).await? {
            return Err(TwinError::NoImage {
                name: name.to_owned(),
                image: id.to_owned(),
            });
        }
        let mut notes = Vec::new();
        for network in &spec.networks {
            notes.extend(self.ensure_network(network).await?);
        }
        for volume in &spec.volumes {
            self.ensure_volume(volume).await?;
        }
        let made = match self.inspect_fully(name).await {
            Ok(there) => self.adopt(spec, &there)?,
            Err(error) if error.not_found() => self.make(spec).await?,
            Err(error) => return Err(error.into()),
        };
        let twin = self.inspect_fully(&made).await?;
        notes.extend(create::differences(&spec.inspect, &twin));
        Ok(Twin {
            id: made,
            not_carried: notes,
        })
    }

    /// The id of a container of the twin's name, when it is this twin from an attempt before.
    fn adopt(&self, spec: &TwinSpec, there: &Value) -> Result<String, TwinError> {
        let taken = |why: String| TwinError::NameTaken {
            name: spec.name().to_owned(),
            why,
        };
        let state = there["State"]["Status"].as_str().unwrap_or_default();
        if super::inspect::state(state) != State::Created {
            return Err(taken(format!("it is {state}")));
        }
        if there["Image"] != spec.inspect["Image"] {
            return Err(taken("it runs another image".to_owned()));
        }
        Ok(there["Id"].as_str().unwrap_or_default().to_owned())
    }

    async fn make(&self, spec: &TwinSpec) -> Result<String, TwinError> {
        let podman = self.engine().await?.is_podman();
        let name = spec.name();
        let reference = spec.image_reference();
        // The reference only when it still means this image here.
        let image = match self.image_id(reference).await? {
            Some(id) if id == spec.image_id() => reference,
            _ => spec.image_id(),
        };
        let mut body = create::body(&spec.inspect, image, spec.keep_addresses, podman);
        let mut later = Map::new();
        if !podman {
            // Docker takes one network at creation (API 1.41) and the others by connecting.
            let first = create::network_mode(&spec.inspect);
            if let Some(all) = body["NetworkingConfig"]["EndpointsConfig"].as_object_mut() {
                later = std::mem::take(all);
                if let Some(endpoint) = later.remove(&first) {
                    all.insert(first, endpoint);
                }
            }
        }
        let operation = format!("create container {name}");
        let path = format!("/containers/create?name={}", escape(name));
        let answer = self.post(&path, Some(&body), &operation).await?;
        let Some(id) = answer["Id"].as_str() else {
            return Err(self
                .unusable(&operation, "no container id".to_owned())
                .into());
        };
        for (network, endpoint) in later {
            let body = json!({ "Container": id, "EndpointConfig": endpoint });
            let path = format!("/networks/{}/connect", escape(&network));
            let operation = format!("connect container {name} to network {network}");
            self.post(&path, Some(&body), &operation).await?;
        }
        Ok(id.to_owned())
    }
}

/// What Podman handed to the OCI runtime when it last started the container; null when it never did.
/// No API of Podman 4 shows sysctls.
fn oci_config(root: &Path, libpod: &Value) -> Value {
    let file = libpod["OCIConfigPath"].as_str().unwrap_or_default();
    std::fs::read(root.join(file.trim_start_matches('/')))
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .unwrap_or_default()
}

/// The umask the container really gets. Podman shows `0000` for a container made through its compatible
/// API, where none is set and the OCI runtime keeps the service's own, which is 0022.
fn umask(libpod: &Value, oci: &Value) -> String {
    let set = oci["process"]["user"]["umask"].as_u64();
    let shown = libpod["Config"]["Umask"].as_str().unwrap_or_default();
    match (set, oci.is_null(), shown) {
        (Some(umask), _, _) => format!("{umask:04o}"),
        (None, true, shown) if !matches!(shown, "" | "0000") => shown.to_owned(),
        (None, _, _) => "0022".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unset_umask_is_the_services_and_a_set_one_is_kept() {
        let shown = |umask: &str| json!({ "Config": { "Umask": umask } });
        let started = |user: Value| json!({ "process": { "user": user } });
        assert_eq!(umask(&shown("0000"), &started(json!({ "uid": 0 }))), "0022");
        assert_eq!(
            umask(&shown("0000"), &started(json!({ "umask": 0 }))),
            "0000"
        );
        assert_eq!(umask(&shown("0077"), &Value::Null), "0077");
        assert_eq!(umask(&shown("0000"), &Value::Null), "0022");
    }
}
