//! Relations between containers: matrix, tree, start order and groups.
//!
//! Purpose: turn evidence ([`Edge`]s and [`Correlated`] pairs) into the answers the migration needs.
//! Invariants: pure; the answers are derived on request and never stored; they depend on the set of
//! containers and evidence alone, never on the order in which these come in. Every algorithm is
//! linear or n·log n in containers and edges, and none recurses, so that 100,000 containers with
//! 1,000,000 edges stay well under a second.
//! Non-goals: whether evidence is still true (telemetry decides what it reports).
//!
//! [`Edge`]: crate::model::edge::Edge
//! [`Correlated`]: crate::model::edge::Correlated

mod cycles;
mod dot;
mod graph;
mod groups;
mod matrix;
mod order;
mod svg;
mod tree;

#[cfg(test)]
mod properties;

pub use graph::{Evidence, Graph};
pub use groups::Group;
pub use matrix::{Relation, Row};
pub use order::{StartOrder, Step};
pub use tree::{Branch, Tree};
