//! Printing: text to standard output and standard error, and plain tables.
//!
//! Invariant: no control character of a name reaches the terminal.

use crate::model::ids::visible::{visible, visible_lines};
use std::fmt::Arguments;
use std::io::{ErrorKind, Write as _};

/// Exit code of a program that SIGPIPE ends, as a shell tells it.
const READER_GONE: i32 = 141;

/// Prints `text`, and ends the program when nobody can read it: quietly when the reader has gone away (`| head`).
pub fn put(text: Arguments<'_>) {
    write(&visible_lines(&text.to_string()));
}

/// Clears the terminal, for what is shown again and again.
pub fn clear() {
    write("\x1b[H\x1b[2J");
}

fn write(text: &str) {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(READER_GONE),
        Err(error) => {
            eprintln!("lifeboat: cannot write to standard output: {error}");
            std::process::exit(1);
        }
    }
}

/// Prints `text` to standard error.
pub fn put_error(text: Arguments<'_>) {
    std::eprint!("{}", visible_lines(&text.to_string()));
}

/// Draws a line of standard error's terminal over itself.
pub fn redraw(line: &str) {
    std::eprint!("\r\x1b[K{}", visible(line));
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
    let rows: Vec<[String; N]> = rows
        .iter()
        .map(|row| row.each_ref().map(|cell| visible(cell).into_owned()))
        .collect();
    let lines: Vec<&[String; N]> = std::iter::once(&heading).chain(&rows).collect();
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
