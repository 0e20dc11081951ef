//! The TCP side: one request a line, one answer a line, many requests on a connection.
//!
//! | request | answer |
//! | --- | --- |
//! | `append TEXT` | `ok N TOTAL`: TEXT is line N on the disk, which now holds TOTAL lines |
//! | `total` | `total TOTAL` |
//! | `digest` | `digest HEX TOTAL` |
//! | `ping` | `pong` |
//!
//! Anything else is answered `error WHY`. Appends of all connections are numbered in one sequence.

use crate::ledger::{Ledger, MAX_TEXT};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Connections served at a time; one more is closed at once.
const MAX_CONNECTIONS: usize = 64;

/// Longest request accepted, with its newline.
const MAX_REQUEST: u64 = MAX_TEXT as u64 + 16;

/// Serves connections to `listener` for ever.
pub fn serve(listener: &TcpListener, ledger: Ledger) {
    let ledger = Arc::new(Mutex::new(ledger));
    let open = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                eprintln!("ledger-service: a connection was not accepted: {error}");
                continue;
            }
        };
        if open.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
            open.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let ledger = Arc::clone(&ledger);
        let open = Arc::clone(&open);
        std::thread::spawn(move || {
            if let Err(error) = connection(&stream, &ledger) {
                eprintln!("ledger-service: a connection ended: {error}");
            }
            open.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

/// Answers the requests of one connection until the peer closes it.
fn connection(stream: &TcpStream, ledger: &Mutex<Ledger>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut requests = BufReader::new(stream);
    let mut request = Vec::new();
    loop {
        request.clear();
        if (&mut requests).take(MAX_REQUEST).read_until(b'\n', &mut request)? == 0 {
            return Ok(());
        }
        if request.pop() != Some(b'\n') {
            // Either the peer closed in mid-line or the line is too long to find its end.
            return (&*stream).write_all(b"error the request is too long or has no newline\n");
        }
        let mut reply = answer(&String::from_utf8_lossy(&request), ledger);
        reply.push('\n');
        (&*stream).write_all(reply.as_bytes())?;
    }
}

fn answer(request: &str, ledger: &Mutex<Ledger>) -> String {
    let (word, rest) = request.split_once(' ').unwrap_or((request, ""));
    match word {
        "append" if rest.len() > MAX_TEXT => format!("error more than {MAX_TEXT} bytes of text"),
        "append" => {
            let mut ledger = locked(ledger);
            match ledger.append(rest) {
                Ok(number) => format!("ok {number} {}", ledger.total()),
                Err(error) => format!("error {error}"),
            }
        }
        "total" => format!("total {}", locked(ledger).total()),
        "digest" => {
            let ledger = locked(ledger);
            format!("digest {} {}", ledger.digest(), ledger.total())
        }
        "ping" => "pong".to_owned(),
        _ => "error unknown request: append TEXT, total, digest or ping".to_owned(),
    }
}

/// A ledger is consistent between any two of its calls, so a thread that died holding it did no harm.
fn locked(ledger: &Mutex<Ledger>) -> MutexGuard<'_, Ledger> {
    ledger.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service() -> (std::net::SocketAddr, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(&dir.path().join("ledger")).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || serve(&listener, ledger));
        (address, dir)
    }

    fn ask(stream: &mut BufReader<TcpStream>, request: &str) -> String {
        stream.get_mut().write_all(request.as_bytes()).unwrap();
        let mut line = String::new();
        stream.read_line(&mut line).unwrap();
        line
    }

    #[test]
    fn requests_are_answered_in_order_and_reach_the_file() {
        let (address, dir) = service();
        let mut stream = BufReader::new(TcpStream::connect(address).unwrap());
        assert_eq!(ask(&mut stream, "ping\n"), "pong\n");
        assert_eq!(ask(&mut stream, "total\n"), "total 0\n");
        // Two requests in one segment: two answers.
        assert_eq!(ask(&mut stream, "append one two\nappend three\n"), "ok 1 1\n");
        assert_eq!(ask(&mut stream, ""), "ok 2 2\n");
        let written = std::fs::read(dir.path().join("ledger")).unwrap();
        assert_eq!(written, b"1 one two\n2 three\n");
        let digest = crate::ledger::Digest::EMPTY.extended(&written);
        assert_eq!(ask(&mut stream, "digest\n"), format!("digest {digest} 2\n"));
    }

    #[test]
    fn bad_requests_get_an_error_and_write_nothing() {
        let (address, dir) = service();
        let mut stream = BufReader::new(TcpStream::connect(address).unwrap());
        assert!(ask(&mut stream, "\n").starts_with("error "));
        assert!(ask(&mut stream, "delete 1\n").starts_with("error "));
        let longest = format!("append {}\n", "x".repeat(MAX_TEXT + 1));
        assert!(ask(&mut stream, &longest).starts_with("error "));
        let endless = "y".repeat(MAX_REQUEST as usize);
        assert!(ask(&mut stream, &endless).starts_with("error "));
        let mut rest = Vec::new();
        assert_eq!(stream.read_to_end(&mut rest).unwrap(), 0, "the connection is closed after it");
        assert_eq!(std::fs::read(dir.path().join("ledger")).unwrap(), b"");
    }

    #[test]
    fn connections_share_one_numbering() {
        let (address, dir) = service();
        let clients: Vec<_> = (0..4)
            .map(|id| {
                std::thread::spawn(move || {
                    let mut stream = BufReader::new(TcpStream::connect(address).unwrap());
                    let mut last = 0;
                    for n in 0..25 {
                        let reply = ask(&mut stream, &format!("append {id}-{n}\n"));
                        let number: u64 = reply.split(' ').nth(1).unwrap().parse().unwrap();
                        assert!(number > last, "{reply}");
                        last = number;
                    }
                })
            })
            .collect();
        for client in clients {
            client.join().unwrap();
        }
        let file = std::fs::File::open(dir.path().join("ledger")).unwrap();
        let mut texts = crate::ledger::scan(file).unwrap().texts;
        texts.sort();
        texts.dedup();
        assert_eq!(texts.len(), 100);
    }
}
