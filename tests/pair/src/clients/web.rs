//! HTTP on one connection that is kept.

use anyhow::{Context, Result, ensure};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;

/// Port of `start-nginx`.
pub const PORT: u16 = 80;

/// A connection to a web server.
pub struct Web<S = TcpStream> {
    stream: BufReader<S>,
}

impl<S: Read + Write> Web<S> {
    /// Speaks HTTP on `stream`.
    pub fn new(stream: S) -> Self {
        Self { stream: BufReader::with_capacity(1 << 16, stream) }
    }

    /// Fetches `path`; `take` gets the body piece by piece.
    ///
    /// # Errors
    ///
    /// If the connection breaks, the answer is not 200, its length is not given, or `take` fails.
    pub fn get(&mut self, path: &str, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<u64> {
        let request = format!("GET {path} HTTP/1.1\r\nHost: guest\r\n\r\n");
        self.stream.get_mut().write_all(request.as_bytes()).context("sending a request")?;
        let status = self.line()?;
        ensure!(status.starts_with("HTTP/1.1 200"), "GET {path}: {status}");
        let mut length = None;
        loop {
            let header = self.line()?;
            if header.is_empty() {
                break;
            }
            if let Some((name, value)) = header.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = Some(value.trim().parse::<u64>()?);
            }
        }
        let length = length.with_context(|| format!("GET {path}: no length"))?;
        let mut left = length;
        while left > 0 {
            let piece = self.stream.fill_buf()?;
            ensure!(
                !piece.is_empty(),
                "the connection ended {left} bytes before the end of {path}"
            );
            let used = piece.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            take(&piece[..used])?;
            self.stream.consume(used);
            left -= used as u64;
        }
        Ok(length)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        (&mut self.stream).take(1 << 14).read_line(&mut line)?;
        let line = line.strip_suffix("\r\n").context("the connection ended within a header")?;
        Ok(line.to_owned())
    }
}

/// Compares what arrives with the numbers 1, 2, 3 and so on, a line each, which is what `/large` holds.
#[derive(Default)]
pub struct Numbers {
    last: u64,
    expected: Vec<u8>,
    seen: u64,
}

impl Numbers {
    /// Takes the next bytes.
    ///
    /// # Errors
    ///
    /// If they are others, with where.
    pub fn take(&mut self, bytes: &[u8]) -> Result<()> {
        while self.expected.len() < bytes.len() {
            self.last += 1;
            self.expected.extend_from_slice(format!("{}\n", self.last).as_bytes());
        }
        let wrong = self.expected.iter().zip(bytes).position(|(expected, byte)| expected != byte);
        if let Some(wrong) = wrong {
            anyhow::bail!("byte {} is not the one that was written", self.seen + wrong as u64);
        }
        self.expected.drain(..bytes.len());
        self.seen += bytes.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_wrong_byte_is_found() {
        let text: String = (1..=2000).map(|number| format!("{number}\n")).collect();
        let take = |bytes: &[u8]| {
            let mut numbers = Numbers::default();
            bytes.chunks(97).try_for_each(|chunk| numbers.take(chunk))
        };
        take(text.as_bytes()).unwrap();
        let mut wrong = text.into_bytes();
        wrong[5000] ^= 1;
        assert_eq!(
            take(&wrong).unwrap_err().to_string(),
            "byte 5000 is not the one that was written"
        );
        wrong.remove(5000);
        assert!(take(&wrong).is_err());
    }
}
