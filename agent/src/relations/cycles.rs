//! Strongly connected components: which containers depend on each other in a circle.

use super::graph::{Graph, Weight};

/// Components of the child → parent graph. Every component comes after all components it depends on
/// (Tarjan's algorithm yields them in that order).
pub(super) struct Components {
    /// Members of each component. A cycle's members stand in the order in which they start.
    pub members: Vec<Vec<u32>>,
    /// Component of each container.
    pub of: Vec<u32>,
}

impl Graph {
    /// Tarjan's algorithm with its stack on the heap, then [`Self::order_cycle`] for each cycle.
    pub(super) fn components(&self) -> Components {
        const NONE: u32 = u32::MAX;
        let count = self.names.len();
        let (mut seen, mut low, mut of) = (vec![NONE; count], vec![0; count], vec![NONE; count]);
        let mut members: Vec<Vec<u32>> = Vec::new();
        let mut open: Vec<u32> = Vec::new();
        let mut path: Vec<(u32, usize)> = Vec::new();
        let mut clock = 0;
        for root in self.nodes() {
            if seen[root as usize] != NONE {
                continue;
            }
            path.push((root, 0));
            while let Some((node, next)) = path.last_mut() {
                let here = *node as usize;
                if *next == 0 {
                    seen[here] = clock;
                    low[here] = clock;
                    clock += 1;
                    open.push(*node);
                }
                if let Some(&parent) = self.parents.of(*node).get(*next) {
                    *next += 1;
                    let there = parent as usize;
                    if seen[there] == NONE {
                        path.push((parent, 0));
                    } else if of[there] == NONE {
                        low[here] = low[here].min(seen[there]);
                    }
                    continue;
                }
                path.pop();
                if let Some(&(below, _)) = path.last() {
                    low[below as usize] = low[below as usize].min(low[here]);
                }
                if low[here] == seen[here] {
                    let number = members.len() as u32;
                    let start = open
                        .iter()
                        .rposition(|&member| member as usize == here)
                        .unwrap_or(0);
                    let component = open.split_off(start);
                    for &member in &component {
                        of[member as usize] = number;
                    }
                    members.push(component);
                }
            }
        }
        self.order_cycles(&mut members, &of);
        Components { members, of }
    }

    /// Orders each cycle by evidence weight: first the container on which the others depend most and
    /// which depends least on them. A container's weight is the sum, over the edges inside the cycle,
    /// of (certain, connections, bytes) as a parent minus the same as a child, compared in that
    /// order; equal ones by name.
    fn order_cycles(&self, members: &mut [Vec<u32>], of: &[u32]) {
        let mut weights = vec![Weight::default(); self.names.len()];
        for pair in &self.pairs {
            if of[pair.child as usize] == of[pair.parent as usize] {
                weights[pair.parent as usize].add(pair.weight);
                weights[pair.child as usize].subtract(pair.weight);
            }
        }
        for cycle in members.iter_mut().filter(|cycle| cycle.len() > 1) {
            cycle.sort_unstable_by(|&one, &other| {
                weights[other as usize]
                    .cmp(weights[one as usize])
                    .then(one.cmp(&other))
            });
        }
    }
}
