//! Groups: which containers must go to the same target.

use super::graph::Graph;
use crate::model::ids::ContainerName;
use serde::Serialize;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::num::NonZeroUsize;

/// Containers that go to one target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Group {
    /// The containers, sorted by name.
    pub containers: Vec<ContainerName>,
    /// Sum of their workloads.
    pub workload: u64,
}

impl Graph {
    /// Splits the containers into at most `targets` groups of about equal workload (any unit, as long
    /// as it is the same for all). Containers that are related, also over others or by correlation,
    /// are never split. Heaviest group first; no group is empty.
    ///
    /// Families of related containers are dealt out heaviest first, each to the lightest group
    /// (Graham's LPT rule: the heaviest group is at most 4/3 of the best possible).
    #[must_use]
    pub fn groups(
        &self,
        targets: NonZeroUsize,
        workload: impl Fn(&ContainerName) -> u64,
    ) -> Vec<Group> {
        let mut families: Vec<(u64, Vec<u32>)> = self
            .families()
            .into_iter()
            .map(|family| {
                let sum = family.iter().fold(0_u64, |sum, &node| {
                    sum.saturating_add(workload(self.name(node)))
                });
                (sum, family)
            })
            .collect();
        families.sort_unstable_by_key(|(sum, family)| (Reverse(*sum), family[0]));

        let count = targets.get().min(families.len());
        let mut bins: Vec<(u64, Vec<u32>)> = vec![(0, Vec::new()); count];
        // Ties go to the emptier bin, so that weightless containers spread too.
        let mut lightest: BinaryHeap<Reverse<(u64, usize, usize)>> =
            (0..count).map(|bin| Reverse((0, 0, bin))).collect();
        for (sum, family) in families {
            let Some(Reverse((load, size, bin))) = lightest.pop() else {
                break;
            };
            let load = load.saturating_add(sum);
            lightest.push(Reverse((load, size + family.len(), bin)));
            bins[bin].0 = load;
            bins[bin].1.extend(family);
        }
        bins.sort_by_key(|(load, _)| Reverse(*load));
        bins.into_iter()
            .map(|(workload, mut nodes)| {
                nodes.sort_unstable();
                Group {
                    containers: nodes
                        .into_iter()
                        .map(|node| self.name(node).clone())
                        .collect(),
                    workload,
                }
            })
            .collect()
    }

    /// Connected components over edges and correlation, members sorted.
    fn families(&self) -> Vec<Vec<u32>> {
        let mut seen = vec![false; self.names.len()];
        let mut families = Vec::new();
        for root in self.nodes() {
            if std::mem::replace(&mut seen[root as usize], true) {
                continue;
            }
            let mut family = vec![root];
            let mut next = 0;
            while let Some(&node) = family.get(next) {
                next += 1;
                for kind in [&self.parents, &self.children, &self.correlated] {
                    for &other in kind.of(node) {
                        if !std::mem::replace(&mut seen[other as usize], true) {
                            family.push(other);
                        }
                    }
                }
            }
            family.sort_unstable();
            families.push(family);
        }
        families
    }
}
