//! What containers are called, so that a rename takes along what is known of them. Pure.
//!
//! Invariants: a name that was given to another container belongs to that; what was known of the one which had it goes
//! with it, and comes back to the name when it is removed, as tools do that replace a container.

use crate::model::container::Container;
use crate::model::ids::ContainerName;
use std::collections::{BTreeMap, BTreeSet};

/// The names of the containers that runtimes have, by id.
#[derive(Debug, Default)]
pub struct Names(BTreeMap<String, Name>);

#[derive(Clone, Debug)]
struct Name {
    now: ContainerName,
    /// What it was called before it was renamed.
    before: Option<ContainerName>,
}

impl Names {
    /// What is called otherwise since the last time.
    pub fn renamed(&mut self, containers: &[Container]) -> BTreeMap<ContainerName, ContainerName> {
        let mut last = std::mem::take(&mut self.0);
        let mut renamed = BTreeMap::new();
        for container in containers.iter().filter(|one| !one.id.is_empty()) {
            let now = container.name.clone();
            let before = match last.remove(&container.id) {
                Some(known) if known.now == now => known.before,
                Some(known) => {
                    renamed.insert(known.now.clone(), now.clone());
                    Some(known.now)
                }
                None => None,
            };
            self.0.insert(container.id.clone(), Name { now, before });
        }
        let names: BTreeSet<&ContainerName> = containers.iter().map(|one| &one.name).collect();
        for gone in last.into_values() {
            if let Some(before) = gone.before
                && names.contains(&before)
                && !names.contains(&gone.now)
            {
                renamed.insert(gone.now, before);
            }
        }
        renamed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is called otherwise after each of these times, on each of which there are (id, name).
    fn renamed(times: &[&[(&str, &str)]]) -> Vec<Vec<(String, String)>> {
        let mut names = Names::default();
        let container = |(id, name): &(&str, &str)| Container {
            id: (*id).to_owned(),
            ..Container::of_cgroup(name, 0, 1)
        };
        let told = times.iter().map(|time| {
            let all: Vec<Container> = time.iter().map(container).collect();
            let renamed = names.renamed(&all).into_iter();
            renamed.map(|(from, to)| (from.0, to.0)).collect()
        });
        told.collect()
    }

    fn one(from: &str, to: &str) -> Vec<(String, String)> {
        vec![(from.to_owned(), to.to_owned())]
    }

    #[test]
    fn a_rename_is_told_once_and_one_that_is_made_anew_is_none() {
        let told = renamed(&[
            &[("1", "db"), ("2", "web"), ("", "/unit")],
            &[("1", "base"), ("2", "web"), ("", "/other")],
            &[("1", "base"), ("3", "web")],
            &[("1", "web"), ("3", "base")],
        ]);
        assert_eq!(told[..3], [vec![], one("db", "base"), vec![]]);
        assert_eq!(told[3], [one("base", "web"), one("web", "base")].concat());
    }

    #[test]
    fn who_replaces_a_container_that_was_renamed_for_it_has_its_name_and_what_is_known_of_it() {
        // The old one makes room, and is removed.
        let told = renamed(&[
            &[("1", "db")],
            &[("1", "db-old")],
            &[("1", "db-old"), ("2", "db")],
            &[("2", "db")],
        ]);
        assert_eq!(
            told[1..],
            [one("db", "db-old"), vec![], one("db-old", "db")]
        );
        // The new one is made beside it.
        let told = renamed(&[
            &[("1", "db")],
            &[("1", "db"), ("2", "2_db")],
            &[("2", "db")],
        ]);
        assert_eq!(told[1..], [vec![], one("2_db", "db")]);
        // Nobody came in its place.
        let told = renamed(&[&[("1", "db")], &[("1", "db-old")], &[]]);
        assert_eq!(told[2], []);
    }
}
