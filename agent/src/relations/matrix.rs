//! The relationship matrix: one row per container.

use super::graph::Graph;
use crate::model::ids::ContainerName;
use serde::Serialize;
use std::fmt;

/// Which relations a container has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Relation {
    /// None.
    #[serde(rename = "independent")]
    Independent,
    /// Others depend on it, or it is correlated; it depends on nobody.
    #[serde(rename = "HAS-A")]
    HasA,
    /// Both.
    #[serde(rename = "HAS-A and IS-A")]
    Both,
    /// It depends on others; nobody depends on it and it is not correlated.
    #[serde(rename = "IS-A")]
    IsA,
}

impl Relation {
    /// Class of the start order (DESIGN.md §4): 1 before 2 before 3.
    #[must_use]
    pub fn class(self) -> u8 {
        match self {
            Self::Independent | Self::HasA => 1,
            Self::Both => 2,
            Self::IsA => 3,
        }
    }
}

impl fmt::Display for Relation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Independent => "independent",
            Self::HasA => "HAS-A",
            Self::Both => "HAS-A and IS-A",
            Self::IsA => "IS-A",
        })
    }
}

/// One container's relations, each list sorted by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// The container.
    pub container: ContainerName,
    /// Which relations it has.
    pub relation: Relation,
    /// Its children and the containers correlated with it.
    pub has_a: Vec<ContainerName>,
    /// Its parents.
    pub is_a: Vec<ContainerName>,
    /// The containers correlated with it; also in `has_a`.
    pub correlated: Vec<ContainerName>,
}

impl Graph {
    pub(super) fn relation(&self, node: u32) -> Relation {
        let has_a = !self.children.of(node).is_empty() || !self.correlated.of(node).is_empty();
        let is_a = !self.parents.of(node).is_empty();
        match (has_a, is_a) {
            (false, false) => Relation::Independent,
            (true, false) => Relation::HasA,
            (true, true) => Relation::Both,
            (false, true) => Relation::IsA,
        }
    }

    /// One row per container, sorted by name.
    #[must_use]
    pub fn matrix(&self) -> Vec<Row> {
        let owned = |nodes: &[u32]| -> Vec<ContainerName> {
            nodes.iter().map(|&node| self.name(node).clone()).collect()
        };
        self.nodes()
            .map(|node| {
                let correlated = self.correlated.of(node);
                let mut has_a = [self.children.of(node), correlated].concat();
                has_a.sort_unstable();
                has_a.dedup();
                Row {
                    container: self.name(node).clone(),
                    relation: self.relation(node),
                    has_a: owned(&has_a),
                    is_a: owned(self.parents.of(node)),
                    correlated: owned(correlated),
                }
            })
            .collect()
    }
}
