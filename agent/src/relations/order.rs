//! The start order (DESIGN.md §4).

use super::graph::Graph;
use super::matrix::Relation;
use crate::model::ids::ContainerName;
use serde::ser::{Serialize, Serializer};

/// Containers that start after every earlier step is ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The containers; sorted by name, or in the order in which a cycle starts.
    pub containers: Vec<ContainerName>,
    /// Whether they depend on each other in a circle and start one after another, in this order;
    /// else they may start side by side.
    pub sequential: bool,
}

/// Steps in the order in which they run. As JSON: a list of lists of names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StartOrder(pub Vec<Step>);

impl StartOrder {
    /// The names alone, step by step.
    #[must_use]
    pub fn names(&self) -> Vec<Vec<&str>> {
        self.0
            .iter()
            .map(|step| step.containers.iter().map(ContainerName::as_str).collect())
            .collect()
    }
}

impl Serialize for StartOrder {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(|step| &step.containers))
    }
}

impl Graph {
    /// The start order.
    ///
    /// 1. containers that are independent or have only HAS-A relations: one step;
    /// 2. containers with both HAS-A and IS-A: one step for each level, a container's level being one
    ///    more than the highest of its parents of this class; a cycle is a step of its own, after the
    ///    other containers of its level, and is started one after another by evidence weight;
    /// 3. containers with only IS-A: one step.
    ///
    /// Never a child before its parent, unless both are in one cycle. Correlation alone never delays:
    /// it is HAS-A both ways, and nobody's IS-A. Evidence weight inside a cycle: the containers on
    /// which the others depend most come first; for each container, edges inside the cycle count
    /// (certain roles, then connections, then bytes) as a parent minus the same as a child; ties by
    /// name.
    #[must_use]
    pub fn order(&self) -> StartOrder {
        let components = self.components();
        let mut first = Vec::new();
        let mut last = Vec::new();
        // Levels of class 2: the plain containers, and the cycles by component number.
        let mut middle: Vec<(Vec<u32>, Vec<u32>)> = Vec::new();
        let mut level_of = vec![0_usize; components.members.len()];
        for (number, members) in components.members.iter().enumerate() {
            match self.relation(members[0]) {
                Relation::Independent | Relation::HasA => first.push(members[0]),
                Relation::IsA => last.push(members[0]),
                Relation::Both => {
                    let level = members
                        .iter()
                        .flat_map(|&member| self.parents.of(member))
                        .filter(|&&parent| components.of[parent as usize] as usize != number)
                        .filter(|&&parent| self.relation(parent) == Relation::Both)
                        .map(|&parent| level_of[components.of[parent as usize] as usize] + 1)
                        .max()
                        .unwrap_or(0);
                    level_of[number] = level;
                    if middle.len() <= level {
                        middle.resize_with(level + 1, Default::default);
                    }
                    if let [only] = members[..] {
                        middle[level].0.push(only);
                    } else {
                        middle[level].1.push(number as u32);
                    }
                }
            }
        }

        let mut steps = Vec::new();
        self.side_by_side(&mut steps, first);
        for (plain, mut cycles) in middle {
            self.side_by_side(&mut steps, plain);
            cycles.sort_unstable_by_key(|&number| components.members[number as usize].iter().min());
            for number in cycles {
                steps.push(Step {
                    containers: components.members[number as usize]
                        .iter()
                        .map(|&node| self.name(node).clone())
                        .collect(),
                    sequential: true,
                });
            }
        }
        self.side_by_side(&mut steps, last);
        StartOrder(steps)
    }

    fn side_by_side(&self, steps: &mut Vec<Step>, mut nodes: Vec<u32>) {
        if nodes.is_empty() {
            return;
        }
        nodes.sort_unstable();
        steps.push(Step {
            containers: nodes
                .into_iter()
                .map(|node| self.name(node).clone())
                .collect(),
            sequential: false,
        });
    }
}
