//! Redis on one connection, and its append-only file as a power failure leaves it.

use anyhow::{Context, Result, bail, ensure};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;

/// Port of `start-redis`.
pub const PORT: u16 = 6379;

/// Where the guest's redis keeps its append-only file, on the disk behind `/data`.
pub const APPEND_ONLY_FILE: &str = "/redis/appendonlydir/appendonly.aof.1.incr.aof";

/// Longest string and longest array taken from a server.
const LONGEST: usize = 16 << 20;

/// What redis answers, without its errors, which are errors here too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// A word of status.
    Status(String),
    /// A number.
    Integer(i64),
    /// A string, or none.
    Bulk(Option<String>),
    /// Several.
    Array(Vec<Reply>),
}

/// A connection to redis.
pub struct Redis<S = TcpStream> {
    stream: BufReader<S>,
}

impl<S: Read + Write> Redis<S> {
    /// Speaks to redis on `stream`.
    pub fn new(stream: S) -> Self {
        Self { stream: BufReader::new(stream) }
    }

    /// Sends one command and waits for its answer.
    ///
    /// # Errors
    ///
    /// If the connection breaks, or with what redis complains about.
    pub fn command(&mut self, words: &[&str]) -> Result<Reply> {
        let mut request = format!("*{}\r\n", words.len());
        for word in words {
            request.push_str(&format!("${}\r\n{word}\r\n", word.len()));
        }
        self.stream.get_mut().write_all(request.as_bytes()).context("sending to redis")?;
        read_reply(&mut self.stream).with_context(|| format!("the answer to {words:?}"))
    }

    /// A command that is answered with a number.
    ///
    /// # Errors
    ///
    /// As [`Self::command`]; also if the answer is none.
    pub fn number(&mut self, words: &[&str]) -> Result<i64> {
        match self.command(words)? {
            Reply::Integer(number) => Ok(number),
            other => bail!("{words:?} is answered with {other:?}"),
        }
    }

    /// All of a list.
    ///
    /// # Errors
    ///
    /// As [`Self::command`].
    pub fn list(&mut self, key: &str) -> Result<Vec<String>> {
        let Reply::Array(replies) = self.command(&["LRANGE", key, "0", "-1"])? else {
            bail!("{key} is no list");
        };
        let text = |reply| match reply {
            Reply::Bulk(Some(text)) => Ok(text),
            other => bail!("{key} holds {other:?}"),
        };
        replies.into_iter().map(text).collect()
    }
}

/// The commands in an append-only file. What a crash cut off at its end is left out.
///
/// # Errors
///
/// If it is none.
pub fn commands(file: &[u8]) -> Result<Vec<Vec<String>>> {
    let (mut rest, mut commands) = (file, Vec::new());
    while !rest.is_empty() {
        ensure!(rest[0] == b'*', "after {} commands comes no other", commands.len());
        let Ok(reply) = read_reply(&mut rest) else { break };
        let Reply::Array(words) = reply else { bail!("{reply:?} is no command") };
        let text = |reply| match reply {
            Reply::Bulk(Some(text)) => Ok(text),
            other => bail!("a command holds {other:?}"),
        };
        commands.push(words.into_iter().map(text).collect::<Result<_>>()?);
    }
    Ok(commands)
}

fn read_reply(stream: &mut impl BufRead) -> Result<Reply> {
    let mut line = String::new();
    stream.take(1 << 16).read_line(&mut line)?;
    let line = line.strip_suffix("\r\n").context("the connection ended within an answer")?;
    let (kind, rest) = line.split_at_checked(1).context("an empty answer")?;
    let length = || -> Result<Option<usize>> {
        let length: i64 = rest.parse()?;
        ensure!(length <= LONGEST as i64, "{length} is too long");
        Ok(usize::try_from(length).ok())
    };
    Ok(match kind {
        "+" => Reply::Status(rest.to_owned()),
        ":" => Reply::Integer(rest.parse()?),
        "-" => bail!("redis says: {rest}"),
        "$" => match length()? {
            None => Reply::Bulk(None),
            Some(length) => {
                let mut bytes = vec![0; length + 2];
                stream.read_exact(&mut bytes)?;
                bytes.truncate(length);
                Reply::Bulk(Some(String::from_utf8(bytes)?))
            }
        },
        "*" => {
            let count = length()?.unwrap_or(0);
            Reply::Array((0..count).map(|_| read_reply(stream)).collect::<Result<_>>()?)
        }
        _ => bail!("{line:?} is no answer of redis"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_whole_and_rubbish_is_an_error() {
        let read = |text: &str| read_reply(&mut text.as_bytes());
        assert_eq!(read("+OK\r\n").unwrap(), Reply::Status("OK".to_owned()));
        assert_eq!(read(":-7\r\n").unwrap(), Reply::Integer(-7));
        assert_eq!(read("$-1\r\n").unwrap(), Reply::Bulk(None));
        let list = Reply::Array(vec![Reply::Bulk(Some("a\r\nb".to_owned())), Reply::Integer(1)]);
        assert_eq!(read("*2\r\n$4\r\na\r\nb\r\n:1\r\n").unwrap(), list);
        for wrong in ["", ":1", "?\r\n", ":x\r\n", "-ERR no\r\n", "$5\r\nab", "$99999999999\r\n"] {
            assert!(read(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_file_cut_off_gives_the_commands_before() {
        let one = "*2\r\n$4\r\nINCR\r\n$1\r\na\r\n";
        let incr = vec!["INCR".to_owned(), "a".to_owned()];
        for file in [one.to_owned(), format!("{one}{}", &one[..10])] {
            assert_eq!(commands(file.as_bytes()).unwrap(), std::slice::from_ref(&incr));
        }
        assert!(commands(b"REDIS0011").is_err());
    }
}
