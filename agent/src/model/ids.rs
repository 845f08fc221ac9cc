//! Names of things. Newtypes, so that one cannot be handed over as another.

pub mod visible;

use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use std::fmt;
use visible::visible;

macro_rules! string_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub String);

        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            /// For people: whoever makes a cgroup or a container chooses its name.
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&visible(&self.0))
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.to_owned())
            }
        }
    };
}

string_id!(
    /// A host known to the fleet.
    DeviceId
);
string_id!(
    /// A container by its runtime name, or, without a runtime, by its cgroup path.
    ContainerName
);
string_id!(
    /// One migration, from event to proof.
    PlanId
);
string_id!(
    /// One lending of a paired device to a source.
    PairingId
);

impl PlanId {
    /// Whether it is made of letters, digits and dashes, as every plan id is: it becomes a file name.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        !self.0.is_empty() && self.0.len() <= 64 && self.0.bytes().all(plain)
    }
}

/// A volume's number within its plan, as it stands in every record's associated data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct VolumeId(pub u32);

impl<'de> Deserialize<'de> for VolumeId {
    /// A number, or one as text: JSON's keys are text, which serde does not undo inside a tagged enum.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Number;

        impl Visitor<'_> for Number {
            type Value = VolumeId;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a volume's number")
            }

            fn visit_u64<E: Error>(self, number: u64) -> Result<VolumeId, E> {
                u32::try_from(number).map(VolumeId).map_err(E::custom)
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<VolumeId, E> {
                text.parse().map(VolumeId).map_err(E::custom)
            }
        }

        deserializer.deserialize_any(Number)
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A numbered point in time of a volume; also its ownership generation.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// BLAKE3 of plain bytes, keyed with the fleet key. Written as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Signature(#[serde(with = "hex::serde")] pub [u8; 32]);

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signature({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn volumes_are_keys_of_maps_in_journals_too() {
        #[derive(Debug, PartialEq, Serialize, Deserialize)]
        #[serde(tag = "event")]
        enum Event {
            Planned { epochs: BTreeMap<VolumeId, Epoch> },
        }
        let epochs = BTreeMap::from([(VolumeId(7), Epoch(3))]);
        let event = Event::Planned { epochs };
        let text = serde_json::to_string(&event).unwrap();
        assert_eq!(serde_json::from_str::<Event>(&text).unwrap(), event);
        assert_eq!(serde_json::from_str::<VolumeId>("7").unwrap(), VolumeId(7));
        assert!(serde_json::from_str::<VolumeId>("4294967296").is_err());
    }
}
