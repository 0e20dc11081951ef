//! A console on a real terminal: raw while it runs, as before when it ends.
//!
//! The test runs itself a second time, in a session whose terminal is a pseudo-terminal.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::sync::mpsc;

use nix::pty::openpty;
use nix::sys::termios::{LocalFlags, tcgetattr};
use virtio_devices::console::back::{ConsoleBack, ConsoleMode};

const CHILD: &str = "VIRTIO_DEVICES_TEST_TERMINAL_CHILD";
const TEST: &str = "the_terminal_is_raw_while_the_console_runs_and_restored_after";

/// What the second run does: says that it runs, and ends when it is told to.
fn child() {
    let back = ConsoleBack::open(ConsoleMode::Tty).unwrap();
    let (sender, receiver) = mpsc::channel();
    back.start(Box::new(move |bytes| drop(sender.send(bytes)))).unwrap();
    back.output(b"READY");
    // Not a line: only a raw terminal hands out a single key.
    assert_eq!(receiver.recv().unwrap(), b"q");
    back.stop();
}

#[test]
fn the_terminal_is_raw_while_the_console_runs_and_restored_after() {
    if std::env::var_os(CHILD).is_some() {
        return child();
    }
    let pty = openpty(None, None).unwrap();
    let before = tcgetattr(&pty.slave).unwrap();
    assert!(before.local_flags.contains(LocalFlags::ICANON | LocalFlags::ECHO));
    let stdio = || Stdio::from(pty.slave.try_clone().unwrap());
    // setsid --ctty makes the pseudo-terminal the session's own.
    let spawned = Command::new("setsid")
        .args(["--ctty", "--wait"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", TEST, "--nocapture"])
        .env(CHILD, "1")
        .stdin(stdio())
        .stdout(stdio())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => {
            let mut terminal = std::io::stderr();
            writeln!(terminal, "SKIPPED {TEST}: it needs the program setsid: {error}").unwrap();
            return;
        }
    };
    // With only the child on the other side, its death is an end of file and not a wait for ever.
    drop(pty.slave);
    let mut master = std::fs::File::from(pty.master);
    let mut seen = Vec::new();
    while !seen.ends_with(b"READY") {
        let mut byte = [0];
        master.read_exact(&mut byte).unwrap();
        seen.extend(byte);
    }
    let raw = tcgetattr(&master).unwrap();
    assert!(!raw.local_flags.intersects(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG));
    master.write_all(b"q").unwrap();
    let status = child.wait().unwrap();
    let mut complaint = String::new();
    child.stderr.take().unwrap().read_to_string(&mut complaint).unwrap();
    assert!(status.success(), "{complaint}");
    assert_eq!(tcgetattr(&master).unwrap(), before);
}
