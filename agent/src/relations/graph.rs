//! The graph itself: containers interned as indices, edges as sorted index pairs with their weight.

use crate::model::edge::{Correlated, Edge, Learnt};
use crate::model::ids::ContainerName;
use serde::{Deserialize, Serialize};
use std::cmp::Ordering;
use std::collections::HashMap;

/// Everything the graph is made of, as a daemon answers it and as an operator writes it by hand.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evidence {
    /// All containers, also those without a relation.
    pub containers: Vec<ContainerName>,
    /// Who depends on whom.
    #[serde(default)]
    pub edges: Vec<Edge>,
    /// Who shares a registration id with whom.
    #[serde(default)]
    pub correlated: Vec<Correlated>,
}

impl Evidence {
    /// The graph of this evidence.
    #[must_use]
    pub fn graph(&self) -> Graph {
        Graph::new(self.containers.clone(), &self.edges, &self.correlated)
    }
}

/// How much evidence there is for one child's dependence on one parent. Compared field by field: an
/// edge whose role is certain outweighs any number of inferred ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Weight {
    /// 1 when an edge of the pair was observed or declared, 0 when all were inferred.
    pub certain: i128,
    /// Connections over all its edges.
    pub connections: i128,
    /// Bytes both ways over all its edges.
    pub bytes: i128,
}

impl Weight {
    fn of(edge: &Edge) -> Self {
        Self {
            certain: i128::from(edge.learnt != Learnt::Inferred),
            connections: edge.connections.into(),
            bytes: [edge.bytes_to_parent, edge.bytes_to_child]
                .into_iter()
                .flatten()
                .map(|bytes| i128::from(bytes.0))
                .sum(),
        }
    }

    pub(super) fn add(&mut self, other: Self) {
        self.certain += other.certain;
        self.connections += other.connections;
        self.bytes += other.bytes;
    }

    pub(super) fn subtract(&mut self, other: Self) {
        self.certain -= other.certain;
        self.connections -= other.connections;
        self.bytes -= other.bytes;
    }

    pub(super) fn cmp(self, other: Self) -> Ordering {
        (self.certain, self.connections, self.bytes).cmp(&(
            other.certain,
            other.connections,
            other.bytes,
        ))
    }
}

/// One child's dependence on one parent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pair {
    pub child: u32,
    pub parent: u32,
    pub weight: Weight,
}

/// Neighbours of every container, as one array cut by offsets.
#[derive(Clone, Debug)]
pub(super) struct Neighbours {
    offsets: Vec<u32>,
    to: Vec<u32>,
}

impl Neighbours {
    /// `pairs` sorted by (from, to) without repetition.
    fn new(nodes: usize, pairs: &[(u32, u32)]) -> Self {
        let mut offsets = vec![0_u32; nodes + 1];
        for &(from, _) in pairs {
            offsets[from as usize + 1] += 1;
        }
        for node in 0..nodes {
            offsets[node + 1] += offsets[node];
        }
        Self {
            offsets,
            to: pairs.iter().map(|&(_, to)| to).collect(),
        }
    }

    pub(super) fn of(&self, node: u32) -> &[u32] {
        let node = node as usize;
        &self.to[self.offsets[node] as usize..self.offsets[node + 1] as usize]
    }
}

/// Containers and the relations between them. A child IS-A dependent of its parent, a parent HAS-A
/// child; correlated containers HAS-A each other.
#[derive(Clone, Debug)]
pub struct Graph {
    /// Sorted, each once; a container's index is its place here.
    pub(super) names: Vec<ContainerName>,
    pub(super) pairs: Vec<Pair>,
    pub(super) parents: Neighbours,
    pub(super) children: Neighbours,
    pub(super) correlated: Neighbours,
    left_out: usize,
}

impl Graph {
    /// Builds the graph of `containers`.
    ///
    /// Evidence with an end that is not among `containers` says nothing about how these start, so it
    /// is left out and counted ([`Self::left_out`]); the same rule makes the graph of a chosen few.
    /// A container's evidence about itself is no relation and is ignored.
    ///
    /// # Panics
    /// With 2³² or more containers or edges.
    #[must_use]
    pub fn new(
        containers: impl IntoIterator<Item = ContainerName>,
        edges: &[Edge],
        correlated: &[Correlated],
    ) -> Self {
        let mut names: Vec<ContainerName> = containers.into_iter().collect();
        names.sort_unstable();
        names.dedup();
        let index: HashMap<&str, u32> = names.iter().map(ContainerName::as_str).zip(0..).collect();
        let mut left_out = 0;
        let mut ends = |one: &ContainerName, other: &ContainerName| match (
            index.get(one.as_str()),
            index.get(other.as_str()),
        ) {
            (Some(&one), Some(&other)) => (one != other).then_some((one, other)),
            _ => {
                left_out += 1;
                None
            }
        };

        let mut pairs: Vec<Pair> = edges
            .iter()
            .filter_map(|edge| {
                ends(&edge.child, &edge.parent).map(|(child, parent)| Pair {
                    child,
                    parent,
                    weight: Weight::of(edge),
                })
            })
            .collect();
        pairs.sort_unstable_by_key(|pair| (pair.child, pair.parent));
        pairs.dedup_by(|next, kept| {
            let same = (next.child, next.parent) == (kept.child, kept.parent);
            if same {
                kept.weight.add(next.weight);
                kept.weight.certain = kept.weight.certain.min(1);
            }
            same
        });
        let upward: Vec<(u32, u32)> = pairs.iter().map(|p| (p.child, p.parent)).collect();
        let mut downward: Vec<(u32, u32)> = pairs.iter().map(|p| (p.parent, p.child)).collect();
        downward.sort_unstable();
        let mut sideways: Vec<(u32, u32)> = correlated
            .iter()
            .filter_map(|Correlated(one, other)| ends(one, other))
            .flat_map(|(one, other)| [(one, other), (other, one)])
            .collect();
        sideways.sort_unstable();
        sideways.dedup();

        let nodes = names.len();
        Self {
            names,
            parents: Neighbours::new(nodes, &upward),
            children: Neighbours::new(nodes, &downward),
            correlated: Neighbours::new(nodes, &sideways),
            pairs,
            left_out,
        }
    }

    /// The containers, sorted by name.
    #[must_use]
    pub fn containers(&self) -> &[ContainerName] {
        &self.names
    }

    /// How many edges and correlated pairs had an end outside the graph.
    #[must_use]
    pub fn left_out(&self) -> usize {
        self.left_out
    }

    /// The containers that `container` depends on; empty for an unknown one.
    #[must_use]
    pub fn parents_of(&self, container: &ContainerName) -> Vec<&ContainerName> {
        self.neighbours(&self.parents, container)
    }

    /// The containers that depend on `container`; empty for an unknown one.
    #[must_use]
    pub fn children_of(&self, container: &ContainerName) -> Vec<&ContainerName> {
        self.neighbours(&self.children, container)
    }

    fn neighbours(&self, kind: &Neighbours, container: &ContainerName) -> Vec<&ContainerName> {
        self.names
            .binary_search(container)
            .map_or_else(|_| Vec::new(), |node| self.names_of(kind.of(node as u32)))
    }

    pub(super) fn name(&self, node: u32) -> &ContainerName {
        &self.names[node as usize]
    }

    pub(super) fn names_of(&self, nodes: &[u32]) -> Vec<&ContainerName> {
        nodes.iter().map(|&node| self.name(node)).collect()
    }

    pub(super) fn nodes(&self) -> std::ops::Range<u32> {
        0..self.names.len() as u32
    }
}
