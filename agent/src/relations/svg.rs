//! The graph as a picture (SVG): parents above their children, one row a level.
//!
//! Invariants: complete in itself, no network, no script; a child stands below its parents, but in a cycle,
//! whose members stand side by side. Non-goal: the fewest crossings; rows are ordered by the middle of
//! their neighbours, three times down and up (Sugiyama's method with barycentres).

use super::graph::Graph;
use super::matrix::Relation;
use std::fmt::Write as _;

const ROW: f64 = 90.0;
const BOX: f64 = 34.0;
const GAP: f64 = 28.0;
const MARGIN: f64 = 24.0;
/// Width of a letter of the 13 px type, on average.
const LETTER: f64 = 7.6;
/// Widest row before a level of containers without children below is broken into several.
const WIDEST: usize = 12;

impl Graph {
    /// The picture.
    #[must_use]
    pub fn svg(&self) -> String {
        let rows = self.rows();
        let width = |node: u32| self.name(node).to_string().chars().count() as f64 * LETTER + 24.0;
        let row_width = |row: &[u32]| row.iter().map(|&node| width(node) + GAP).sum::<f64>() - GAP;
        let widest = rows.iter().map(|row| row_width(row)).fold(160.0, f64::max);
        let mut at = vec![(0.0, 0.0); self.names.len()];
        for (number, row) in rows.iter().enumerate() {
            let mut x = MARGIN + (widest - row_width(row)) / 2.0;
            for &node in row {
                at[node as usize] = (x + width(node) / 2.0, MARGIN + number as f64 * ROW);
                x += width(node) + GAP;
            }
        }

        let (right, bottom) = (
            widest + 2.0 * MARGIN,
            rows.len().max(1) as f64 * ROW - ROW + BOX + 2.0 * MARGIN,
        );
        // Writing to a String cannot fail.
        let mut text = String::new();
        let _ = writeln!(
            text,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{right:.0}\" height=\"{bottom:.0}\" \
             viewBox=\"0 0 {right:.0} {bottom:.0}\" font-family=\"sans-serif\" font-size=\"13\">\n\
             <title>Relations: each arrow leads from a container to one that it depends on</title>\n\
             <defs><marker id=\"a\" viewBox=\"0 0 8 8\" refX=\"8\" refY=\"4\" markerWidth=\"8\" \
             markerHeight=\"8\" orient=\"auto\"><path d=\"M0 0 8 4 0 8z\" fill=\"#555\"/></marker></defs>\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>"
        );
        for pair in &self.pairs {
            let path = curve(at[pair.child as usize], at[pair.parent as usize]);
            let _ = writeln!(
                text,
                "<path d=\"{path}\" fill=\"none\" stroke=\"#555\" marker-end=\"url(#a)\"/>"
            );
        }
        for node in self.nodes() {
            let others = self.correlated.of(node).iter();
            for &other in others.filter(|&&other| other > node) {
                let path = curve(at[node as usize], at[other as usize]);
                let _ = writeln!(
                    text,
                    "<path d=\"{path}\" fill=\"none\" stroke=\"#888\" stroke-dasharray=\"5 4\"/>"
                );
            }
        }
        for node in self.nodes() {
            let (x, y) = at[node as usize];
            let fill = match self.relation(node) {
                Relation::Independent => "#f4f4f4",
                Relation::HasA => "#dcefe0",
                Relation::Both => "#fdf0cf",
                Relation::IsA => "#dde8f8",
            };
            let _ = writeln!(
                text,
                "<g><title>{name}: {relation}</title><rect x=\"{:.1}\" y=\"{y:.1}\" width=\"{:.1}\" \
                 height=\"{BOX}\" rx=\"6\" fill=\"{fill}\" stroke=\"#555\"/><text x=\"{x:.1}\" y=\"{:.1}\" \
                 text-anchor=\"middle\">{name}</text></g>",
                x - width(node) / 2.0,
                width(node),
                y + BOX / 2.0 + 4.5,
                name = escaped(&self.name(node).to_string()),
                relation = self.relation(node),
            );
        }
        text.push_str("</svg>\n");
        text
    }

    /// Containers by row, each row from left to right.
    fn rows(&self) -> Vec<Vec<u32>> {
        let components = self.components();
        let mut level = vec![0_usize; components.members.len()];
        let mut rows: Vec<Vec<u32>> = Vec::new();
        // Every component comes after those that it depends on.
        for (number, members) in components.members.iter().enumerate() {
            let parents = members.iter().flat_map(|&member| self.parents.of(member));
            let above = parents.map(|&parent| components.of[parent as usize] as usize);
            level[number] = above
                .filter(|&parent| parent != number)
                .map(|parent| level[parent] + 1)
                .max()
                .unwrap_or(0);
            if rows.len() <= level[number] {
                rows.resize_with(level[number] + 1, Vec::new);
            }
            rows[level[number]].extend(members);
        }
        for row in &mut rows {
            row.sort_unstable();
        }
        let mut place = vec![0.0; self.names.len()];
        for pass in 0..6 {
            for number in 0..rows.len() {
                let number = if pass % 2 == 0 {
                    number
                } else {
                    rows.len() - 1 - number
                };
                let row = &mut rows[number];
                let count = row.len() as f64;
                for (index, &node) in row.iter().enumerate() {
                    place[node as usize] = (index as f64 + 0.5) / count;
                }
                let middle = |node: u32| {
                    let to = if pass % 2 == 0 {
                        &self.parents
                    } else {
                        &self.children
                    };
                    let near = to.of(node).iter().chain(self.correlated.of(node));
                    let (sum, many) = near.fold((0.0, 0.0), |(sum, many), &other| {
                        (sum + place[other as usize], many + 1.0)
                    });
                    if many == 0.0 {
                        place[node as usize]
                    } else {
                        sum / many
                    }
                };
                let mut ordered: Vec<(f64, u32)> =
                    row.iter().map(|&node| (middle(node), node)).collect();
                ordered.sort_by(|one, other| one.0.total_cmp(&other.0).then(one.1.cmp(&other.1)));
                *row = ordered.into_iter().map(|(_, node)| node).collect();
                for (index, &node) in row.iter().enumerate() {
                    place[node as usize] = (index as f64 + 0.5) / count;
                }
            }
        }
        // A row of a hundred is no picture: it goes on below.
        rows.iter()
            .flat_map(|row| row.chunks(WIDEST).map(<[u32]>::to_vec))
            .collect()
    }
}

/// From the upper side of the lower box to the lower side of the upper one; an arc below boxes side by side.
fn curve(from: (f64, f64), to: (f64, f64)) -> String {
    let (x, y) = from;
    let (end_x, end_y) = to;
    if (y - end_y).abs() < 1.0 {
        let low = y + BOX + 26.0;
        return format!(
            "M{x:.1} {:.1}C{x:.1} {low:.1} {end_x:.1} {low:.1} {end_x:.1} {:.1}",
            y + BOX,
            end_y + BOX
        );
    }
    let (y, end_y) = if y > end_y {
        (y, end_y + BOX)
    } else {
        (y + BOX, end_y)
    };
    let middle = f64::midpoint(y, end_y);
    format!("M{x:.1} {y:.1}C{x:.1} {middle:.1} {end_x:.1} {middle:.1} {end_x:.1} {end_y:.1}")
}

/// A name as XML has it, which allows no control characters.
fn escaped(name: &str) -> String {
    name.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}
