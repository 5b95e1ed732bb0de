//! What is printed: tables for people, JSON for programs, one line for errors.
//! A reader that has seen enough (`| head`) is no error; what would print for ever ends
//! then ([`unread`]).

use std::{
    io::{self, Write as _},
    time::Duration,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::Value;
use tokio::time::sleep;

/// How often it is looked whether anybody reads.
const LOOK: Duration = Duration::from_millis(500);

/// How results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// A table for people.
    Table,
    /// JSON: snake_case, ids as hex strings, times in milliseconds.
    Json,
}

/// Writes text to stdout at once.
pub(crate) fn text(text: &str) -> io::Result<()> {
    bytes(text.as_bytes())
}

/// Writes bytes to stdout at once.
pub(crate) fn bytes(bytes: &[u8]) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

/// Resolves when nobody can read stdout any more; never if it is no pipe.
pub(crate) async fn unread() {
    let at_once = Timespec::default();
    loop {
        let stdout = io::stdout();
        let mut polled = [PollFd::new(&stdout, PollFlags::empty())];
        if poll(&mut polled, Some(&at_once)).is_ok() && polled[0].revents().contains(PollFlags::ERR)
        {
            return;
        }
        sleep(LOOK).await;
    }
}

/// Writes one line of JSON to stdout.
pub(crate) fn json(value: &Value) -> io::Result<()> {
    text(&format!("{value}\n"))
}

/// Writes a table to stdout, its columns as wide as they must be.
pub(crate) fn table(header: &[&str], rows: &[Vec<String>]) -> io::Result<()> {
    text(&render(header, rows))
}

/// Tells people on stderr what went wrong.
pub(crate) fn complain(message: &str) {
    complain_verbatim(&format!("conclave: {message}\n"));
}

/// Writes to stderr. If even that fails, there is nobody left to tell.
pub(crate) fn complain_verbatim(text: &str) {
    drop(io::stderr().lock().write_all(text.as_bytes()));
}

/// An id as people see it.
pub(crate) fn hex(id: u64) -> String {
    format!("{id:x}")
}

/// A session id as people see it; `-` where a key has no session.
pub(crate) fn session_hex(id: i64) -> String {
    if id == 0 {
        "-".to_owned()
    } else {
        format!("{id:x}")
    }
}

/// The same for programs, to which it is null.
pub(crate) fn session_value(id: i64) -> Value {
    match id {
        0 => Value::Null,
        id => session_hex(id).into(),
    }
}

/// A name or value may hold anything; a terminal must not obey it.
pub(crate) fn plain(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

fn render(header: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = header.iter().map(|title| title.len()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    let header: Vec<String> = header.iter().map(|title| (*title).to_owned()).collect();
    for row in std::iter::once(&header).chain(rows) {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let cell = plain(cell);
            line.push_str(&format!("{cell:<width$}  "));
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_control_characters_shown() {
        let rows = vec![
            vec!["deploy".to_owned(), "7".to_owned()],
            vec!["a\x1b[2J".to_owned(), "12".to_owned()],
        ];
        let expected = "LOCK    TOKEN\ndeploy  7\na\u{fffd}[2J   12\n";
        assert_eq!(render(&["LOCK", "TOKEN"], &rows), expected);
    }
}
