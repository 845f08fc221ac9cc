//! Text of others (names of cgroups, containers, files, labels) made fit for a terminal, a log and a picture: control
//! characters would move the cursor, colour what follows or begin a line that looks like ours.

use std::borrow::Cow;
use std::fmt::Write as _;

/// `text` on one line: control characters, and what turns the direction of writing round, as `\x1b`, `\n`, `\u202e`.
#[must_use]
pub fn visible(text: &str) -> Cow<'_, str> {
    escaped(text, false)
}

/// As [`visible`], but ends of lines stay. JSON stays JSON and means the same.
#[must_use]
pub fn visible_lines(text: &str) -> Cow<'_, str> {
    escaped(text, true)
}

fn escaped(text: &str, lines: bool) -> Cow<'_, str> {
    let hidden = |c: char| is_hidden(c) && !(lines && c == '\n');
    if !text.contains(hidden) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        // Writing to a String cannot fail.
        let _ = match c {
            c if !hidden(c) => shown.write_char(c),
            '\n' => shown.write_str("\\n"),
            '\r' => shown.write_str("\\r"),
            '\t' => shown.write_str("\\t"),
            // JSON never holds one of these as it is, and may hold the others.
            c if c < ' ' => write!(shown, "\\x{:02x}", u32::from(c)),
            c => write!(shown, "\\u{:04x}", u32::from(c)),
        };
    }
    Cow::Owned(shown)
}

fn is_hidden(c: char) -> bool {
    // Unicode's bidirectional controls (UAX #9) and its own ends of lines.
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_name_can_neither_speak_to_the_terminal_nor_begin_a_line() {
        assert_eq!(
            visible("a\x1b[2J\nb\r\t\u{7f}\u{9b}1m\u{202e}"),
            "a\\x1b[2J\\nb\\r\\t\\u007f\\u009b1m\\u202e"
        );
        assert_eq!(visible_lines("a\x07\nb\n"), "a\\x07\nb\n");
        assert!(matches!(visible("größe-🚣/x"), Cow::Borrowed(_)));
    }

    proptest! {
        #[test]
        fn json_means_the_same_afterwards(text in any::<String>()) {
            let text = format!("{text}\u{9b}\x7f\x1b");
            let json = serde_json::to_string_pretty(&[&text]).unwrap();
            let shown = visible_lines(&json);
            prop_assert!(shown.chars().all(|c| c == '\n' || !c.is_control()));
            prop_assert_eq!(serde_json::from_str::<Vec<String>>(&shown).unwrap(), vec![text]);
        }
    }
}
