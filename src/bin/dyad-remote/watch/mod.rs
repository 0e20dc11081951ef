//! `ft-watch`: how protection is doing, live.
//!
//! Asks for `ft.status` at an interval. On a terminal it draws; into a pipe or a file it writes a line each time. A
//! VMM that stops answering, as it does when its host dies, is shown as such and asked again.

mod history;
mod view;

use std::io::{IsTerminal, Write, stdout};
use std::path::Path;
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use api_client::{Client, Error};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::{DefaultTerminal, TerminalOptions, Viewport};
use vmm::api::FtStatus;

use view::Screen;

/// A VMM that has not answered by then counts as silent.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// While an answer is waited for, it is looked for this often.
const TICK: Duration = Duration::from_millis(20);

/// How to watch.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Milliseconds between two looks
    #[arg(long, value_name = "MS", default_value_t = 500, value_parser = clap::value_parser!(u64).range(20..=3_600_000))]
    interval_ms: u64,

    /// End after this many looks [default: on q, Escape or Ctrl-C]
    #[arg(long, value_name = "N")]
    count: Option<u64>,

    /// Write a line for each look instead of drawing; done by itself where the output is no terminal
    #[arg(long)]
    lines: bool,
}

/// Watches the VMM behind `socket` until the user has seen enough.
pub fn watch(socket: &Path, options: &Options) -> anyhow::Result<()> {
    let client = Client::new(socket).with_timeout(ANSWER_TIMEOUT);
    // A wrong path should be told, not watched.
    let first = match client.get("ft.status") {
        Err(error @ Error::Silent { .. }) => Err(error.to_string()),
        result => Ok(result?),
    };
    let interval = Duration::from_millis(options.interval_ms);
    let mut watcher =
        Watcher { client, interval, left: options.count, screen: Screen::new(socket) };
    watcher.screen.look = first;
    if options.lines || !stdout().is_terminal() {
        return watcher.write_lines().context("cannot write");
    }
    let viewport = TerminalOptions { viewport: Viewport::Fullscreen };
    let mut terminal = ratatui::try_init_with_options(viewport).context("cannot draw")?;
    let result = watcher.draw(&mut terminal).context("cannot draw");
    ratatui::restore();
    result
}

/// An answer, or why there is none.
type Look = Result<FtStatus, String>;

/// What cannot be.
const LOST: &str = "the thread that asks has ended";

struct Watcher {
    client: Client,
    interval: Duration,
    /// Looks still to be taken.
    left: Option<u64>,
    screen: Screen,
}

impl Watcher {
    /// Asks, on a thread of its own: whoever draws does not wait.
    fn look(&self) -> Receiver<Look> {
        let (client, (sender, receiver)) = (self.client.clone(), mpsc::channel());
        thread::spawn(move || {
            let look = client.get::<FtStatus>("ft.status").map_err(|error| error.to_string());
            // The user may have seen enough.
            let _ = sender.send(look);
        });
        receiver
    }

    /// Counts a look; false after the last.
    fn goes_on(&mut self) -> bool {
        self.left = self.left.map(|left| left.saturating_sub(1));
        self.left != Some(0)
    }

    fn write_lines(&mut self) -> std::io::Result<()> {
        let mut out = stdout().lock();
        loop {
            writeln!(out, "{}", view::line(&self.screen.look))?;
            out.flush()?;
            if !self.goes_on() {
                return Ok(());
            }
            thread::sleep(self.interval);
            self.screen.look = self.look().recv().unwrap_or_else(|_| Err(LOST.to_owned()));
        }
    }

    fn draw(&mut self, terminal: &mut DefaultTerminal) -> std::io::Result<()> {
        loop {
            self.screen.remember();
            let next = Instant::now() + self.interval;
            loop {
                terminal.draw(|frame| self.screen.draw(frame))?;
                let left = next.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                if ended(left)? {
                    return Ok(());
                }
            }
            if !self.goes_on() {
                return Ok(());
            }
            let looking = self.look();
            self.screen.look = loop {
                match looking.try_recv() {
                    Ok(look) => break look,
                    Err(TryRecvError::Disconnected) => break Err(LOST.to_owned()),
                    Err(TryRecvError::Empty) => {}
                }
                if ended(TICK)? {
                    return Ok(());
                }
                terminal.draw(|frame| self.screen.draw(frame))?;
            };
        }
    }
}

/// Waits for the user, at most for `timeout`; whether it is enough.
fn ended(timeout: Duration) -> std::io::Result<bool> {
    Ok(event::poll(timeout)? && ends(&event::read()?))
}

fn ends(event: &Event) -> bool {
    let Event::Key(key) = event else { return false };
    let interrupt = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
    key.kind == KeyEventKind::Press
        && (interrupt || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc))
}
