//! The log of the program: to standard error or a file, by a thread of its own.
//!
//! What must hold: nobody who logs waits for whoever reads the log. A terminal that is held with Ctrl-S, a pipe that nobody
//! reads or a slow disk would else keep an ft thread from its heartbeats, and the other side would take over.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::path::Path;

use anyhow::Context;
use env_logger::{Target, WriteStyle};
use log::LevelFilter;
use vmm::non_blocking::{Format, NonBlocking, Writer};

/// Writes the log as long as it lives. What is logged later is lost.
pub struct Logging(Writer<Vec<u8>>);

impl Logging {
    /// Starts to log what `verbose` asks for, or the environment (`RUST_LOG`).
    pub fn start(verbose: u8, path: Option<&Path>) -> anyhow::Result<Self> {
        let level = match verbose {
            0 => LevelFilter::Warn,
            1 => LevelFilter::Info,
            2 => LevelFilter::Debug,
            _ => LevelFilter::Trace,
        };
        let file = match path {
            None => File::from(io::stderr().as_fd().try_clone_to_owned()?),
            Some(path) => OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)
                .with_context(|| format!("cannot open the log file '{}'", path.display()))?,
        };
        let colours = file.is_terminal() && std::env::var_os("NO_COLOR").is_none();
        let style = if colours { WriteStyle::Always } else { WriteStyle::Never };
        let writer = Writer::start("log", file, Lines).context("cannot start the log's thread")?;
        env_logger::Builder::new()
            .filter_level(level)
            .write_style(style)
            .parse_default_env()
            .format_timestamp_micros()
            .target(Target::Pipe(Box::new(Line(writer.sender()))))
            .init();
        Ok(Self(writer))
    }

    /// For those who end the process and have logged why.
    pub fn sender(&self) -> NonBlocking<Vec<u8>> {
        self.0.sender()
    }
}

/// Where the logger writes, one line at a time.
struct Line(NonBlocking<Vec<u8>>);

impl Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.send(line.to_vec());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Lines;

impl Format<Vec<u8>> for Lines {
    fn text(&mut self, line: Vec<u8>) -> Vec<u8> {
        line
    }

    fn dropped(&mut self, count: u64) -> Vec<u8> {
        format!("[{count} lines of the log were dropped here: nobody read it]\n").into_bytes()
    }

    /// A full disk may have room again.
    fn failed(&mut self, _: &io::Error) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}
