//! The terminal of a guest: what it printed so far, and what to type.

use anyhow::{Result, bail};
use std::io::{Read, Write};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

#[derive(Default)]
struct Screen {
    bytes: Vec<u8>,
    closed: bool,
}

/// A guest's console, read in the background.
pub struct Console {
    screen: Arc<(Mutex<Screen>, Condvar)>,
    keyboard: Box<dyn Write + Send>,
    /// Where the next [`Self::wait_for`] begins to look.
    seen: usize,
}

impl Console {
    /// Reads `output` to its end on a thread of its own.
    pub fn new(output: impl Read + Send + 'static, input: impl Write + Send + 'static) -> Self {
        let screen = Arc::new((Mutex::new(Screen::default()), Condvar::new()));
        let shared = Arc::clone(&screen);
        std::thread::spawn(move || read_all(output, &shared));
        Self { screen, keyboard: Box::new(input), seen: 0 }
    }

    /// Waits until `text` appears after everything waited for before; returns what was printed up to its end.
    ///
    /// # Errors
    ///
    /// With what the console shows, if it closes or `patience` runs out first.
    pub fn wait_for(&mut self, text: &str, patience: Duration) -> Result<String> {
        let deadline = Instant::now() + patience;
        let (screen, changed) = &*self.screen;
        let mut screen = screen.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let new = &screen.bytes[self.seen..];
            if let Some(at) = new.windows(text.len()).position(|part| part == text.as_bytes()) {
                let up_to = String::from_utf8_lossy(&new[..at + text.len()]).into_owned();
                self.seen += at + text.len();
                return Ok(up_to);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if screen.closed || left.is_zero() {
                let why = if screen.closed { "the console closed" } else { "time ran out" };
                bail!("{why} waiting for {text:?}; since then:\n{}", String::from_utf8_lossy(new));
            }
            screen = changed.wait_timeout(screen, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits for the shell, runs `command` and returns what it printed.
    ///
    /// # Errors
    ///
    /// As [`Self::wait_for`].
    pub fn run(&mut self, command: &str, patience: Duration) -> Result<String> {
        // The terminal echoes the command, so the marks are spelled differently there.
        writeln!(self.keyboard, "echo =be''gin=; {command}; echo =e''nd=")?;
        self.keyboard.flush()?;
        self.wait_for("=begin=", patience)?;
        self.wait_for("\n", patience)?;
        let output = self.wait_for("=end=", patience)?;
        Ok(output.trim_end_matches("=end=").replace('\r', "").trim().to_owned())
    }

    /// Types `text` as it is.
    ///
    /// # Errors
    ///
    /// If the console is closed.
    pub fn type_in(&mut self, text: &str) -> Result<()> {
        self.keyboard.write_all(text.as_bytes())?;
        Ok(self.keyboard.flush()?)
    }

    /// Everything printed so far.
    #[must_use]
    pub fn text(&self) -> String {
        let screen = self.screen.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&screen.bytes).into_owned()
    }
}

fn read_all(mut output: impl Read, shared: &(Mutex<Screen>, Condvar)) {
    let mut buffer = [0; 4096];
    loop {
        let length = output.read(&mut buffer).unwrap_or(0);
        let mut screen = shared.0.lock().unwrap_or_else(PoisonError::into_inner);
        screen.bytes.extend_from_slice(&buffer[..length]);
        screen.closed = length == 0;
        shared.1.notify_all();
        if screen.closed {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    #[test]
    fn text_is_found_once_and_a_closed_console_is_an_error() {
        let mut console = Console::new("boot\n# one # ".as_bytes(), std::io::sink());
        assert_eq!(console.wait_for("# ", PATIENCE).unwrap(), "boot\n# ");
        assert_eq!(console.wait_for("# ", PATIENCE).unwrap(), "one # ");
        assert!(console.wait_for("# ", PATIENCE).unwrap_err().to_string().contains("closed"));
        assert_eq!(console.text(), "boot\n# one # ");
    }

    #[test]
    fn a_command_gives_its_output() {
        let mut shell = std::process::Command::new("sh")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut console = Console::new(shell.stdout.take().unwrap(), shell.stdin.take().unwrap());
        assert_eq!(console.run("echo $((6 * 7))", PATIENCE).unwrap(), "42");
        assert_eq!(console.run("true", PATIENCE).unwrap(), "");
        drop(console);
        shell.wait().unwrap();
    }
}
