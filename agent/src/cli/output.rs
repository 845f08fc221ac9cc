//! Printing: text to standard output, and plain tables.

use std::fmt::Arguments;
use std::io::{ErrorKind, Write as _};

/// Exit code of a program that SIGPIPE ends, as a shell tells it.
const READER_GONE: i32 = 141;

/// Prints `text`, and ends the program when nobody can read it: quietly when the reader has gone away (`| head`).
pub fn put(text: Arguments<'_>) {
    let mut out = std::io::stdout().lock();
    match out.write_fmt(text).and_then(|()| out.flush()) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(READER_GONE),
        Err(error) => {
            eprintln!("lifeboat: cannot write to standard output: {error}");
            std::process::exit(1);
        }
    }
}

/// Prints `text` as whole lines.
pub fn say(text: &str) {
    let end = if text.ends_with('\n') { "" } else { "\n" };
    put(format_args!("{text}{end}"));
}

/// Rows under a heading, columns as wide as their widest cell.
#[must_use]
pub fn table<const N: usize>(heading: [&str; N], rows: &[[String; N]]) -> String {
    let heading = heading.map(str::to_owned);
    let lines: Vec<&[String; N]> = std::iter::once(&heading).chain(rows).collect();
    let widths: [usize; N] = std::array::from_fn(|column| {
        lines
            .iter()
            .map(|line| line[column].chars().count())
            .max()
            .unwrap_or(0)
    });
    let mut text = String::new();
    for line in lines {
        let cells: Vec<String> = line
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}
