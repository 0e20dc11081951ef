//! What is drawn, as a function of what was seen.

use std::path::{Path, PathBuf};

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Gauge, Paragraph, Sparkline, Wrap};
use vmm::api::FtStatus;
use vmm::api::ft::{ClonePhase, StandbyError};

use super::history::{CURVES, Curve, History};

/// Columns of the text left of a sparkline.
const LABEL_COLUMNS: u16 = 46;

/// Everything that is on the screen.
pub struct Screen {
    socket: PathBuf,
    history: History,
    /// The last answer, or why there was none.
    pub look: Result<FtStatus, String>,
    /// The last answer there was.
    known: FtStatus,
}

impl Screen {
    /// Nothing seen yet.
    pub fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
            history: History::default(),
            look: Ok(FtStatus::default()),
            known: FtStatus::default(),
        }
    }

    /// Takes the last look into the curves.
    pub fn remember(&mut self) {
        if let Ok(status) = &self.look {
            self.history.add(status);
            self.known = status.clone();
        }
    }

    /// Draws it.
    pub fn draw(&self, frame: &mut Frame) {
        let title = format!(" {} ", self.socket.display());
        let block = Block::bordered().title(title).title_bottom(" q: end ");
        let inside = block.inner(frame.area());
        frame.render_widget(block, frame.area());
        let head = self.head();
        let copying = self.copying();
        let mut bottom_lines = search(&self.known);
        bottom_lines.extend(timeline(&self.known));
        let [top, curves, copy, bottom] = Layout::vertical([
            Constraint::Length(head.len() as u16 + 1),
            Constraint::Length(2 * CURVES.len() as u16),
            Constraint::Length(if copying.is_some() { 2 } else { 0 }),
            Constraint::Min(0),
        ])
        .areas(inside);
        frame.render_widget(Paragraph::new(head).wrap(Wrap { trim: false }), top);
        let rows = Layout::vertical([Constraint::Length(2); CURVES.len()]).split(curves);
        for (curve, row) in CURVES.into_iter().zip(rows.iter()) {
            self.draw_curve(frame, curve, *row);
        }
        if let Some((ratio, label)) = copying {
            let gauge = Gauge::default().ratio(ratio).label(label);
            frame.render_widget(gauge, Rect { height: copy.height.min(1), ..copy });
        }
        frame.render_widget(Paragraph::new(bottom_lines).wrap(Wrap { trim: false }), bottom);
    }

    fn head(&self) -> Vec<Line<'static>> {
        let status = &self.known;
        let state = match &self.look {
            Ok(_) => Span::styled(status.state.clone(), state_style(&status.state)),
            Err(error) => Span::styled(format!("no answer: {error}"), bad()),
        };
        let mut lines = vec![Line::from(vec![
            Span::styled(format!("{} ", status.role), Style::new().add_modifier(Modifier::BOLD)),
            state,
            Span::raw(format!("  generation {}", status.generation)),
        ])];
        for (name, value) in [
            ("pair", &status.pair),
            ("peer", &status.peer),
            ("arbiter", &status.arbiter_url),
            ("reason", &status.reason),
        ] {
            if let Some(value) = value {
                lines.push(Line::raw(format!("{name:8} {value}")));
            }
        }
        if status.digests_unequal > 0 {
            let what = status.last_unequal.as_ref().map_or("?".into(), ToString::to_string);
            let text = format!("{} digests differed, last in {what}", status.digests_unequal);
            lines.push(Line::styled(text, bad()));
        }
        lines
    }

    fn draw_curve(&self, frame: &mut Frame, curve: Curve, row: Rect) {
        let [label, line] =
            Layout::horizontal([Constraint::Length(LABEL_COLUMNS), Constraint::Min(0)]).areas(row);
        frame.render_widget(Paragraph::new(curve_text(curve, &self.known)), label);
        let values: Vec<u64> = self.history.last(curve, line.width.into()).collect();
        // Scaled to its own maximum; a curve of zeroes stays flat.
        let most = values.iter().copied().max().unwrap_or(0).max(1);
        frame.render_widget(Sparkline::default().data(values).max(most), line);
    }

    fn copying(&self) -> Option<(f64, String)> {
        let clone = self.known.clone.filter(|clone| clone.pause_us.is_none())?;
        let mib = |bytes: u64| bytes >> 20;
        if clone.phase == ClonePhase::Disks {
            let (compared, total) = (clone.disk_compared_bytes, clone.disk_total_bytes.max(1));
            let ratio = (compared as f64 / total as f64).min(1.0);
            let (done, copied) = (mib(compared), mib(clone.disk_copied_bytes));
            let label = format!("disks: {done} of {} MiB compared, {copied} copied", mib(total));
            return Some((ratio, label));
        }
        let total = clone.total_bytes.max(1);
        // Later rounds send pages again.
        let ratio = (clone.sent_bytes as f64 / total as f64).min(1.0);
        let [sent, total] = [clone.sent_bytes, total].map(mib);
        Some((ratio, format!("copying: {sent} of {total} MiB, round {}", clone.rounds)))
    }
}

fn curve_text(curve: Curve, status: &FtStatus) -> String {
    let FtStatus { lag, output_delay, .. } = status;
    match curve {
        Curve::Lag => {
            let [p50, p99] = [lag.p50_us, lag.p99_us].map(ms);
            format!("lag      {:>10}  p50 {p50}, p99 {p99}", ms(status.lag_us))
        }
        Curve::LogRate => format!("log      {:>10.3} Mbit/s", status.log.mbit_per_s),
        Curve::OutputDelay => {
            let [p50, p99] = [output_delay.p50_us, output_delay.p99_us].map(ms);
            format!("outputs  {:>10}  held, p50 {p50}, p99 {p99}", status.held_outputs)
        }
        Curve::Throttle => {
            let stalled = if status.stalled { ", stalled" } else { "" };
            format!("throttle {:>9.1}%  {} stalls{stalled}", status.throttle * 100.0, status.stalls)
        }
        Curve::Digests => format!("digests  {:>10}  equal", status.digests_compared),
    }
}

/// Who is asked for a backup, and why those that were have none; nothing while there is one.
fn search(status: &FtStatus) -> Vec<Line<'static>> {
    let Some(search) = status.reprotection.as_ref().filter(|search| search.state != "protected")
    else {
        return Vec::new();
    };
    let whom = search.standby.as_ref().map_or(String::new(), |standby| format!(": {standby}"));
    let due = match search.next_attempt_ms {
        Some(left) => format!(" in {:.1} s", left as f64 / 1e3),
        None => String::new(),
    };
    let mut lines =
        vec![Line::raw(format!("{}{whom}{due} (attempts: {})", search.state, search.attempts))];
    for StandbyError { standby, error } in &search.errors {
        lines.push(Line::raw(format!("  {standby}: {error}")));
    }
    lines
}

fn timeline(status: &FtStatus) -> Vec<Line<'static>> {
    let Some(failover) = &status.last_failover else {
        return vec![Line::raw("no failover yet")];
    };
    let steps = [
        ("suspected", Some(failover.suspected_us)),
        ("log executed", failover.drained_us),
        ("lease over", failover.lease_over_us),
        ("claim asked", failover.asked_us),
        ("claim won", failover.claimed_us),
        ("live", failover.live_us),
    ];
    let steps: Vec<String> =
        steps.into_iter().filter_map(|(name, us)| Some(format!("{name} {}", ms(us?)))).collect();
    vec![
        Line::raw(format!("last failover: {}", failover.cause)),
        Line::raw(format!("  {}", steps.join(" > "))),
    ]
}

/// One look in one line, for pipes.
pub fn line(look: &Result<FtStatus, String>) -> String {
    let status = match look {
        Ok(status) => status,
        Err(error) => return format!("no answer: {error}"),
    };
    format!(
        "{} {} generation={} lag_us={} log_mbit_per_s={:.3} output_delay_p99_us={} throttle={:.3} digests={} unequal={}",
        status.role,
        status.state,
        status.generation,
        status.lag_us,
        status.log.mbit_per_s,
        status.output_delay.p99_us,
        status.throttle,
        status.digests_compared,
        status.digests_unequal,
    )
}

fn ms(us: u64) -> String {
    format!("{:.1} ms", us as f64 / 1e3)
}

fn state_style(state: &str) -> Style {
    match state {
        "protected" | "replaying" => Style::new().fg(Color::Green),
        "halted" | "discarded" | "diverged" => bad(),
        _ => Style::new().fg(Color::Yellow),
    }
}

fn bad() -> Style {
    Style::new().fg(Color::Red).add_modifier(Modifier::BOLD)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use vmm::api::ft::{Failover, Reprotection};

    fn shown(screen: &Screen, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| screen.draw(frame)).unwrap();
        terminal.backend().to_string()
    }

    fn protected() -> FtStatus {
        FtStatus {
            role: "primary".into(),
            state: "protected".into(),
            generation: 3,
            peer: Some("host-b/77".into()),
            lag_us: 1_400,
            digests_compared: 12,
            last_failover: Some(Failover {
                cause: "the peer was silent".into(),
                suspected_us: 300_000,
                live_us: Some(331_000),
                ..Failover::default()
            }),
            ..FtStatus::default()
        }
    }

    #[test]
    fn the_screen_shows_who_is_asked_and_why_the_others_have_no_backup() {
        let mut screen = Screen::new(Path::new("/run/a.sock"));
        let refusal = StandbyError { standby: "tcp:b:1".into(), error: "no room".into() };
        let mut search = Reprotection {
            state: "searching".into(),
            standby: Some("tcp:c:1".into()),
            attempts: 4,
            next_attempt_ms: Some(1_250),
            errors: vec![refusal],
            ..Reprotection::default()
        };
        let mut look = |search: &Reprotection| {
            screen.look =
                Ok(FtStatus { reprotection: Some(search.clone()), ..FtStatus::default() });
            screen.remember();
            shown(&screen, 80, 24)
        };
        let text = look(&search);
        for part in ["searching: tcp:c:1 in 1.2 s (attempts: 4)", "tcp:b:1: no room"] {
            assert!(text.contains(part), "{part:?} is not on\n{text}");
        }
        search.state = "protected".into();
        assert!(!look(&search).contains("tcp:c:1"));
    }

    #[test]
    fn the_screen_shows_state_curves_and_the_last_failover() {
        let mut screen = Screen::new(Path::new("/run/a.sock"));
        for lag_us in [0, 350, 1_400] {
            screen.look = Ok(FtStatus { lag_us, ..protected() });
            screen.remember();
        }
        let text = shown(&screen, 100, 30);
        for part in [
            "/run/a.sock",
            "primary protected  generation 3",
            "host-b/77",
            "1.4 ms",
            "▄",
            "█",
            "throttle       0.0%",
            "last failover: the peer was silent",
            "suspected 300.0 ms > live 331.0 ms",
        ] {
            assert!(text.contains(part), "{part:?} is not on\n{text}");
        }
    }

    #[test]
    fn silence_and_difference_are_shown() {
        let mut screen = Screen::new(Path::new("/s"));
        screen.look = Ok(FtStatus { digests_unequal: 1, ..protected() });
        screen.remember();
        screen.look = Err("nobody listens".into());
        screen.remember();
        let text = shown(&screen, 100, 30);
        assert!(text.contains("no answer: nobody listens"), "{text}");
        assert!(text.contains("1 digests differed"), "{text}");
        assert!(text.contains("host-b/77"), "what was known stays: {text}");
    }

    #[test]
    fn a_copy_has_a_bar() {
        let clone = vmm::api::ft::CloneStatus {
            total_bytes: 1 << 30,
            sent_bytes: 1 << 29,
            rounds: 1,
            ..Default::default()
        };
        let mut screen = Screen::new(Path::new("/s"));
        screen.look = Ok(FtStatus { clone: Some(clone), ..protected() });
        screen.remember();
        assert!(shown(&screen, 100, 30).contains("copying: 512 of 1024 MiB, round 1"));
    }

    #[test]
    fn no_terminal_is_too_small() {
        let mut screen = Screen::new(Path::new("/s"));
        screen.look = Ok(protected());
        screen.remember();
        for (width, height) in [(1, 1), (2, 40), (10, 5), (300, 3)] {
            shown(&screen, width, height);
        }
    }

    #[test]
    fn a_line_has_all_numbers() {
        let line = line(&Ok(protected()));
        assert!(line.starts_with("primary protected generation=3 lag_us=1400 "), "{line}");
        assert!(line.ends_with("digests=12 unequal=0"), "{line}");
    }
}
