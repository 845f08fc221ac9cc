//! The tree: parents above their children, for people to read.

use super::graph::Graph;
use crate::model::ids::ContainerName;
use serde::Serialize;
use std::fmt;

/// One line of the tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Branch {
    /// The container.
    pub container: ContainerName,
    /// Parents above it; 0 for a root.
    pub depth: u32,
    /// Whether its children are not repeated here because an earlier line shows them.
    pub shown_above: bool,
    /// The containers correlated with it.
    pub correlated: Vec<ContainerName>,
}

/// Lines from the roots down: each child below its parent, each parent–child pair once. Roots are the
/// containers that depend on nobody, and the first to start of each cycle that depends on nobody.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Tree(pub Vec<Branch>);

impl Graph {
    /// The tree of the graph.
    #[must_use]
    pub fn tree(&self) -> Tree {
        let components = self.components();
        let mut roots: Vec<u32> = components
            .members
            .iter()
            .enumerate()
            .filter(|(number, members)| {
                members
                    .iter()
                    .flat_map(|&member| self.parents.of(member))
                    .all(|&parent| components.of[parent as usize] as usize == *number)
            })
            .map(|(_, members)| members[0])
            .collect();
        roots.sort_unstable_by(|one, other| other.cmp(one));

        let mut shown = vec![false; self.names.len()];
        let mut lines = Vec::new();
        let mut open: Vec<(u32, u32)> = roots.into_iter().map(|root| (root, 0)).collect();
        while let Some((node, depth)) = open.pop() {
            let again = shown[node as usize];
            shown[node as usize] = true;
            let children = self.children.of(node);
            lines.push(Branch {
                container: self.name(node).clone(),
                depth,
                shown_above: again && !children.is_empty(),
                correlated: self
                    .names_of(self.correlated.of(node))
                    .into_iter()
                    .cloned()
                    .collect(),
            });
            if !again {
                open.extend(children.iter().rev().map(|&child| (child, depth + 1)));
            }
        }
        Tree(lines)
    }
}

impl fmt::Display for Tree {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for branch in &self.0 {
            if branch.depth > 0 {
                write!(f, "{}└─ ", "   ".repeat(branch.depth as usize - 1))?;
            }
            write!(f, "{}", branch.container)?;
            for (place, other) in branch.correlated.iter().enumerate() {
                let before = if place == 0 { "  ⇄ " } else { ", " };
                write!(f, "{before}{other}")?;
            }
            if branch.shown_above {
                f.write_str("  (children above)")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}
