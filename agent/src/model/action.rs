//! The three actions of a migration and the set that is delegated.

use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

/// A part of the migration's work that exactly one device does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Seal blocks for the target.
    Encrypt,
    /// Carry sealed blocks to the target.
    Transfer,
    /// Answer requests for the data while it moves.
    Serve,
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Encrypt => "encrypt",
            Self::Transfer => "transfer",
            Self::Serve => "serve",
        })
    }
}

/// The text is not one of `encrypt`, `transfer`, `serve`.
#[derive(Debug, thiserror::Error)]
#[error("unknown action `{0}`: the actions are encrypt, transfer and serve")]
pub struct UnknownAction(String);

impl FromStr for Action {
    type Err = UnknownAction;
    fn from_str(text: &str) -> Result<Self, UnknownAction> {
        match text {
            "encrypt" => Ok(Self::Encrypt),
            "transfer" => Ok(Self::Transfer),
            "serve" => Ok(Self::Serve),
            other => Err(UnknownAction(other.to_owned())),
        }
    }
}

/// A set of actions, for instance the delegated ones.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Actions(pub BTreeSet<Action>);

impl Actions {
    /// Whether the set holds `action`.
    #[must_use]
    pub fn contains(&self, action: Action) -> bool {
        self.0.contains(&action)
    }

    /// Whether nothing is delegated.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<Action> for Actions {
    fn from_iter<I: IntoIterator<Item = Action>>(actions: I) -> Self {
        Self(actions.into_iter().collect())
    }
}

impl fmt::Display for Actions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("nothing");
        }
        let names: Vec<String> = self.0.iter().map(ToString::to_string).collect();
        f.write_str(&names.join(", "))
    }
}
