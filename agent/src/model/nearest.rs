//! "Did you mean": the known names nearest to a mistyped one.

/// Up to three of `known` that are nearest to `name` in single-character edits, nearest first; none
/// when even the nearest differs in more than a third of its characters.
#[must_use]
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let mut ranked: Vec<(usize, &str)> = known
        .into_iter()
        .map(|candidate| (edits(name, candidate), candidate))
        .filter(|(edits, candidate)| *edits <= candidate.chars().count().div_ceil(3))
        .collect();
    ranked.sort_unstable();
    ranked.into_iter().take(3).map(|(_, name)| name).collect()
}

/// `; did you mean a, b or c?`, or `; known: …` when nothing is near, as the tail of a message.
#[must_use]
pub fn hint<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    let known: Vec<&str> = known.into_iter().collect();
    let near = nearest(name, known.iter().copied());
    match (&near[..], &known[..]) {
        ([], []) => String::new(),
        ([], known) if known.len() <= 40 => format!("; known: {}", known.join(", ")),
        ([], known) => format!("; none of the {} known is near", known.len()),
        ([only], _) => format!("; did you mean {only}?"),
        ([most @ .., last], _) => format!("; did you mean {} or {last}?", most.join(", ")),
    }
}

/// Levenshtein distance.
fn edits(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.chars().collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (place, a) in one.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = place + 1;
        for (column, &b) in other.iter().enumerate() {
            let substituted = diagonal + usize::from(a != b);
            diagonal = row[column + 1];
            row[column + 1] = substituted.min(row[column] + 1).min(diagonal + 1);
        }
    }
    row[other.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_typing_error_finds_the_name_that_was_meant() {
        let known = ["block.errors", "cpu.used", "disk.used", "block.iops"];
        assert_eq!(nearest("block.erors", known)[0], "block.errors");
        assert_eq!(hint("cpu.usd", ["cpu.used"]), "; did you mean cpu.used?");
        assert!(nearest("zzzzzzzzzzzz", known).is_empty());
    }
}
