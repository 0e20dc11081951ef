//! Connections that send `append ID SEQUENCE` and remember every answer.
//!
//! What holds for an error-free load: on each connection every request got exactly one answer, in
//! order; the line numbers given are strictly increasing, and with one connection consecutive.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use thiserror::Error;

/// What load to put on the service.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where the service listens.
    pub address: SocketAddr,
    /// Connections kept open, each with one request under way at a time.
    pub connections: usize,
    /// First word of every line, so that loads one after another can be told apart in the ledger.
    pub id: String,
    /// Bytes of padding in every line.
    pub padding: usize,
    /// Time between an answer and the next request on the same connection.
    pub pause: Duration,
    /// Longest wait for a connection or an answer. A failover is well within it.
    pub timeout: Duration,
    /// Requests per connection; `None` until [`Load::stop`].
    pub requests: Option<u64>,
}

impl Options {
    /// One connection, no padding, no pause, a minute's patience, no end.
    #[must_use]
    pub fn new(address: SocketAddr, id: &str) -> Self {
        Self {
            address,
            connections: 1,
            id: id.to_owned(),
            padding: 0,
            pause: Duration::ZERO,
            timeout: Duration::from_secs(60),
            requests: None,
        }
    }
}

/// What a client must never see.
#[derive(Clone, Debug, Error)]
pub enum LoadError {
    /// The service does not answer to connect.
    #[error("no connection to {address}: {reason}")]
    Connect {
        /// Where it was tried.
        address: SocketAddr,
        /// What the system said.
        reason: String,
    },
    /// An open connection ended or stayed silent.
    #[error("connection {connection} broke after {answered} answers: {reason}")]
    Broken {
        /// Index of the connection.
        connection: usize,
        /// Answers it had got before.
        answered: u64,
        /// What the system said.
        reason: String,
    },
    /// An answer that is not the next one due.
    #[error("connection {connection}, request {sequence}: answer {answer:?} after line {last}")]
    Answer {
        /// Index of the connection.
        connection: usize,
        /// Number of the request on its connection, from 1.
        sequence: u64,
        /// The answer as received.
        answer: String,
        /// Line number the answer before it gave.
        last: u64,
    },
}

/// One acknowledged request.
#[derive(Clone, Debug)]
pub struct Acknowledged {
    /// The text as sent, which is what the ledger must hold.
    pub text: String,
    /// The line number the answer gave.
    pub number: u64,
    /// When the request was written to the socket.
    pub sent: Instant,
    /// When its answer had been read.
    pub answered: Instant,
}

#[derive(Default)]
struct Shared {
    acknowledged: Mutex<Progress>,
    changed: Condvar,
    stop: AtomicBool,
}

#[derive(Default)]
struct Progress {
    answers: Vec<Acknowledged>,
    failure: Option<LoadError>,
}

impl Shared {
    /// Entries are pushed whole, so a thread that panicked has left nothing half done.
    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.acknowledged.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running load.
pub struct Load {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Load {
    /// Connects in the calling thread, so in its network namespace, and starts sending.
    ///
    /// # Errors
    ///
    /// [`LoadError::Connect`].
    pub fn start(options: &Options) -> Result<Self, LoadError> {
        let connect = |reason: std::io::Error| LoadError::Connect {
            address: options.address,
            reason: reason.to_string(),
        };
        let mut streams = Vec::new();
        for _ in 0..options.connections {
            let stream = TcpStream::connect_timeout(&options.address, options.timeout)
                .and_then(|stream| {
                    stream.set_nodelay(true)?;
                    stream.set_read_timeout(Some(options.timeout))?;
                    stream.set_write_timeout(Some(options.timeout))?;
                    Ok(stream)
                })
                .map_err(connect)?;
            streams.push(stream);
        }
        let shared = Arc::new(Shared::default());
        let run = |(connection, stream): (usize, TcpStream)| {
            let shared = Arc::clone(&shared);
            let options = options.clone();
            std::thread::spawn(move || {
                if let Err(error) = connection_loop(connection, stream, &options, &shared) {
                    shared.progress().failure.get_or_insert(error);
                }
                shared.changed.notify_all();
            })
        };
        let threads = streams.into_iter().enumerate().map(run).collect();
        Ok(Self { shared, threads })
    }

    /// Requests answered so far.
    #[must_use]
    pub fn answered(&self) -> usize {
        self.shared.progress().answers.len()
    }

    /// Waits until `count` requests have been answered in all.
    ///
    /// # Errors
    ///
    /// The load's failure, if it failed before; a load that falls silent fails by its own timeout.
    pub fn wait_for_answers(&self, count: usize) -> Result<(), LoadError> {
        self.wait(|answers| (answers.len() >= count).then_some(()))
    }

    /// Waits for the first answer to a request that was sent after `at` and returns when it came.
    ///
    /// An answer that the dead primary had put on the wire belongs to a request sent before the kill,
    /// so this one is certainly the new primary's.
    ///
    /// # Errors
    ///
    /// As [`Self::wait_for_answers`].
    pub fn first_answer_after(&self, at: Instant) -> Result<Instant, LoadError> {
        self.wait(|answers| {
            let late = answers.iter().rev().take_while(|answer| answer.answered > at);
            late.filter(|answer| answer.sent > at).map(|answer| answer.answered).min()
        })
    }

    fn wait<T>(&self, found: impl Fn(&[Acknowledged]) -> Option<T>) -> Result<T, LoadError> {
        let mut progress = self.shared.progress();
        loop {
            if let Some(error) = &progress.failure {
                return Err(error.clone());
            }
            if let Some(value) = found(&progress.answers) {
                return Ok(value);
            }
            progress = self.shared.changed.wait(progress).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets every request under way be answered, closes the connections and returns all answers.
    ///
    /// # Errors
    ///
    /// The first failure of any connection.
    pub fn stop(self) -> Result<Vec<Acknowledged>, LoadError> {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.finish()
    }

    /// Stops at once and returns the answers so far: for a service that has died for good.
    #[must_use]
    pub fn abandon(self) -> Vec<Acknowledged> {
        std::mem::take(&mut self.shared.progress().answers)
    }

    /// Waits until every connection has sent its [`Options::requests`] and returns all answers.
    ///
    /// # Errors
    ///
    /// The first failure of any connection.
    pub fn finish(mut self) -> Result<Vec<Acknowledged>, LoadError> {
        for thread in std::mem::take(&mut self.threads) {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
        let mut progress = self.shared.progress();
        match progress.failure.take() {
            Some(error) => Err(error),
            None => Ok(std::mem::take(&mut progress.answers)),
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

fn connection_loop(
    connection: usize,
    stream: TcpStream,
    options: &Options,
    shared: &Shared,
) -> Result<(), LoadError> {
    let padding = "x".repeat(options.padding);
    let mut answers = BufReader::new(stream);
    let mut last = 0;
    for sequence in 1.. {
        if shared.stop.load(Ordering::Relaxed)
            || options.requests.is_some_and(|requests| sequence > requests)
        {
            break;
        }
        let text = format!("{}-{connection} {sequence} {padding}", options.id);
        let mut answer = String::new();
        let sent = Instant::now();
        answers
            .get_mut()
            .write_all(format!("append {text}\n").as_bytes())
            .and_then(|()| answers.read_line(&mut answer))
            .and_then(|length| match length {
                0 => Err(std::io::ErrorKind::UnexpectedEof.into()),
                _ => Ok(()),
            })
            .map_err(|error| LoadError::Broken {
                connection,
                answered: sequence - 1,
                reason: error.to_string(),
            })?;
        let answered = Instant::now();
        let alone = options.connections == 1;
        let number = line_number(&answer)
            .filter(|&number| number > last && (!alone || last == 0 || number == last + 1))
            .ok_or(LoadError::Answer { connection, sequence, answer, last })?;
        last = number;
        shared.progress().answers.push(Acknowledged { text, number, sent, answered });
        shared.changed.notify_all();
        std::thread::sleep(options.pause);
    }
    Ok(())
}

/// The line number of a well-formed `ok NUMBER TOTAL`.
fn line_number(answer: &str) -> Option<u64> {
    let (number, total) = answer.strip_prefix("ok ")?.strip_suffix('\n')?.split_once(' ')?;
    let (number, total): (u64, u64) = (number.parse().ok()?, total.parse().ok()?);
    (number > 0 && total >= number).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// A server that gives `answers`, one to each request, then closes.
    fn scripted(answers: &'static [&'static str]) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let mut requests = BufReader::new(stream);
            for answer in answers {
                requests.read_line(&mut String::new()).unwrap();
                requests.get_mut().write_all(answer.as_bytes()).unwrap();
            }
        });
        address
    }

    fn run(
        requests: u64,
        answers: &'static [&'static str],
    ) -> Result<Vec<Acknowledged>, LoadError> {
        let mut options = Options::new(scripted(answers), "t");
        options.requests = Some(requests);
        Load::start(&options).unwrap().finish()
    }

    #[test]
    fn good_answers_are_remembered() {
        let answers = run(2, &["ok 5 5\n", "ok 6 7\n"]).unwrap();
        assert_eq!(answers.iter().map(|answer| answer.number).collect::<Vec<_>>(), [5, 6]);
        assert_eq!(answers[1].text, "t-0 2 ");
    }

    #[test]
    fn a_gap_a_repeat_an_error_and_nonsense_are_noticed() {
        for second in ["ok 7 7\n", "ok 5 5\n", "ok 4 9\n", "error disk\n", "ok 6 5\n", "ok 6\n"] {
            let script: &'static [&'static str] = Vec::leak(vec!["ok 5 5\n", second]);
            match run(2, script) {
                Err(LoadError::Answer { sequence: 2, last: 5, .. }) => {}
                other => panic!("{second:?} gave {other:?}"),
            }
        }
    }

    #[test]
    fn a_closed_connection_is_noticed() {
        match run(3, &["ok 1 1\n"]) {
            Err(LoadError::Broken { answered: 1, .. }) => {}
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn waiting_ends_when_the_load_fails() {
        let load = Load::start(&Options::new(scripted(&["ok 1 1\n"]), "t")).unwrap();
        assert!(load.wait_for_answers(100).is_err());
        assert!(load.first_answer_after(Instant::now()).is_err());
    }
}
