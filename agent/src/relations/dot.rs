//! The graph in Graphviz's language.

use super::graph::Graph;
use crate::model::ids::ContainerName;
use std::fmt::Write as _;

impl Graph {
    /// A `digraph`: an arrow from each child to its parent, a dashed line between correlated ones.
    #[must_use]
    pub fn dot(&self) -> String {
        let mut text = String::from("digraph relations {\n  rankdir=BT;\n  node [shape=box];\n");
        // Writing to a String cannot fail.
        for name in &self.names {
            let _ = writeln!(text, "  {};", quoted(name));
        }
        for pair in &self.pairs {
            let _ = writeln!(
                text,
                "  {} -> {};",
                quoted(self.name(pair.child)),
                quoted(self.name(pair.parent))
            );
        }
        for node in self.nodes() {
            for &other in self
                .correlated
                .of(node)
                .iter()
                .filter(|&&other| other > node)
            {
                let _ = writeln!(
                    text,
                    "  {} -> {} [dir=both, style=dashed, constraint=false];",
                    quoted(self.name(node)),
                    quoted(self.name(other))
                );
            }
        }
        text.push_str("}\n");
        text
    }
}

fn quoted(name: &ContainerName) -> String {
    format!(
        "\"{}\"",
        name.to_string().replace('\\', "\\\\").replace('"', "\\\"")
    )
}
