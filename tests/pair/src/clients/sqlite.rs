//! The sqlite shell on one connection: a statement is acknowledged when its answer has been read.

use anyhow::{Context, Result, ensure};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;

/// Port of `start-sqlite`.
pub const PORT: u16 = 7100;

/// A connection to a sqlite shell.
pub struct Sqlite<S = TcpStream> {
    stream: BufReader<S>,
    answered: u64,
}

impl<S: Read + Write> Sqlite<S> {
    /// Speaks to the shell on `stream`.
    pub fn new(stream: S) -> Self {
        Self { stream: BufReader::new(stream), answered: 0 }
    }

    /// Runs statements and returns the rows they give. Outside a transaction, a statement that changes something has
    /// been committed when this returns.
    ///
    /// # Errors
    ///
    /// If the connection breaks, or with what sqlite complains about.
    pub fn run(&mut self, statements: &str) -> Result<Vec<String>> {
        self.answered += 1;
        // The shell says nothing on success; this row is the sign that it has come so far.
        let end = format!("-- answer {}", self.answered);
        let request = format!("{statements}\n.print '{end}'\n");
        self.stream.get_mut().write_all(request.as_bytes()).context("sending to sqlite")?;
        let mut rows = Vec::new();
        loop {
            let mut row = String::new();
            let length = (&mut self.stream).take(1 << 16).read_line(&mut row)?;
            ensure!(length > 0, "the connection ended within the answer to {statements:?}");
            let row = row.trim_end();
            ensure!(!row.contains("error"), "{statements:?}: {row}");
            if row == end {
                return Ok(rows);
            }
            rows.push(row.to_owned());
        }
    }
}
