//! The log's bytes.
//!
//! A record is a length (LEB128, at most four bytes, padding allowed), the distance in instructions from
//! the record before (LEB128) and the entry (postcard). The length allows a record to be skipped or
//! refused without understanding it; the distance makes a time anchor about 20 bytes.
//!
//! The encoder appends to the caller's buffer and allocates nothing else. The decoder reads what a
//! peer or a file holds: it never panics, and holds at most what it was given and
//! [`MAX_RECORD_BYTES`] more.

use std::collections::VecDeque;

use crate::{Entry, ExecutionPoint, LogPosition, Record};

/// The longest record, without its length prefix. An encoder refuses to write a longer one, a decoder
/// to read it.
pub const MAX_RECORD_BYTES: usize = 8 << 20;

/// Payload up to which a one-byte length is tried first: the fixed fields of an entry never need the
/// other bytes.
const SHORT_PAYLOAD: usize = 64;

/// Why a record could not be written or read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CodecError {
    /// The record to be written is too long.
    #[error("a log record of {bytes} bytes exceeds the limit of {MAX_RECORD_BYTES}")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// The record to be written lies before the one written last.
    #[error("a log record at point {point} follows one at point {last}")]
    PointWentBack {
        /// Its point.
        point: u64,
        /// The last record's point.
        last: u64,
    },
    /// A length in the stream is out of range.
    #[error("the log is damaged at byte {at}: bad record length")]
    BadLength {
        /// Log position of the record.
        at: u64,
    },
    /// A distance in the stream leads past the end of the count.
    #[error("the log is damaged at byte {at}: bad execution point")]
    BadPoint {
        /// Log position of the record.
        at: u64,
    },
    /// An entry in the stream is none that this version knows.
    #[error("the log is damaged at byte {at}: bad entry")]
    BadEntry {
        /// Log position of the record.
        at: u64,
        /// What postcard found.
        #[source]
        source: postcard::Error,
    },
    /// The entry serializer failed.
    #[error("a log record cannot be encoded")]
    Encode(#[source] postcard::Error),
}

/// Appends to the caller's vector, so that encoding costs no allocation but the vector's own growth.
pub(crate) struct Append<'a>(pub &'a mut Vec<u8>);

impl postcard::ser_flavors::Flavor for Append<'_> {
    type Output = ();
    fn try_push(&mut self, byte: u8) -> postcard::Result<()> {
        self.0.push(byte);
        Ok(())
    }
    fn try_extend(&mut self, bytes: &[u8]) -> postcard::Result<()> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }
    fn finalize(self) -> postcard::Result<()> {
        Ok(())
    }
}

/// Writes a log.
#[derive(Clone, Debug)]
pub struct Encoder {
    point: ExecutionPoint,
    position: LogPosition,
}

impl Encoder {
    /// A log that starts at `point`, where the clone's state was taken, at position 0.
    pub fn new(point: ExecutionPoint) -> Self {
        Self { point, position: LogPosition(0) }
    }

    /// Where the log ends now.
    pub fn position(&self) -> LogPosition {
        self.position
    }

    /// The point of the last record.
    pub fn point(&self) -> ExecutionPoint {
        self.point
    }

    /// Appends a record to `out` and returns the position at which it ends. On an error `out` and
    /// the log are as before.
    pub fn append(
        &mut self,
        point: ExecutionPoint,
        entry: &Entry,
        out: &mut Vec<u8>,
    ) -> Result<LogPosition, CodecError> {
        let distance = point
            .0
            .checked_sub(self.point.0)
            .ok_or(CodecError::PointWentBack { point: point.0, last: self.point.0 })?;
        let payload = payload_bytes(entry);
        if payload > MAX_RECORD_BYTES {
            return Err(CodecError::TooLong { bytes: payload });
        }
        let start = out.len();
        let prefix = if payload <= SHORT_PAYLOAD { 1 } else { 4 };
        out.resize(start + prefix, 0);
        put_leb128(distance, out);
        let encoded = postcard::serialize_with_flavor(entry, Append(out));
        let length = out.len() - start - prefix;
        if let Err(error) = encoded {
            out.truncate(start);
            return Err(CodecError::Encode(error));
        }
        if length > MAX_RECORD_BYTES {
            out.truncate(start);
            return Err(CodecError::TooLong { bytes: length });
        }
        if prefix == 1 && length < 0x80 {
            out[start] = length as u8;
        } else {
            if prefix == 1 {
                out.splice(start..start, [0; 3]);
            }
            out[start..start + 4].copy_from_slice(&padded_leb128(length as u32));
        }
        self.point = point;
        self.position.0 += (out.len() - start) as u64;
        Ok(self.position)
    }
}

fn payload_bytes(entry: &Entry) -> usize {
    match entry {
        Entry::Event(event) => event.payload_bytes(),
        Entry::Digest(digest) => digest.components.iter().map(|part| part.name.len() + 12).sum(),
        Entry::Output { .. } | Entry::Released { .. } | Entry::Mark => 0,
    }
}

fn put_leb128(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// `value` (below 2^28) in exactly four bytes.
fn padded_leb128(value: u32) -> [u8; 4] {
    [
        value as u8 | 0x80,
        (value >> 7) as u8 | 0x80,
        (value >> 14) as u8 | 0x80,
        (value >> 21) as u8 & 0x7f,
    ]
}

/// Reads a LEB128 number of at most `max` bytes: `Ok(None)` if it is cut off, `Err` if it is longer or
/// exceeds 64 bits.
fn take_leb128(bytes: &[u8], max: usize) -> Result<Option<(u64, usize)>, ()> {
    let mut value = 0u64;
    for (index, byte) in bytes.iter().take(max).enumerate() {
        let bits = u64::from(byte & 0x7f);
        let shift = 7 * index as u32;
        if bits != 0 && (shift >= 64 || bits << shift >> shift != bits) {
            return Err(());
        }
        if shift < 64 {
            value |= bits << shift;
        }
        if byte & 0x80 == 0 {
            return Ok(Some((value, index + 1)));
        }
    }
    if bytes.len() >= max { Err(()) } else { Ok(None) }
}

/// Reads a log that arrives in pieces.
#[derive(Clone, Debug)]
pub struct Decoder {
    point: ExecutionPoint,
    position: LogPosition,
    /// As they came, so that a long log that waits is not moved again and again.
    pieces: VecDeque<Vec<u8>>,
    /// How much of the first piece has been read.
    read: usize,
    failed: bool,
}

impl Decoder {
    /// A log that starts at `point`, at position 0.
    pub fn new(point: ExecutionPoint) -> Self {
        Self { point, position: LogPosition(0), pieces: VecDeque::new(), read: 0, failed: false }
    }

    /// Adds bytes. Whoever pushes bounds what is held.
    pub fn push(&mut self, piece: Vec<u8>) {
        self.pieces.push_back(piece);
    }

    /// Where the record returned last ends.
    pub fn position(&self) -> LogPosition {
        self.position
    }

    /// Bytes held that no record was made of yet. Senders cut the log at ends of records, so 0 when
    /// [`Decoder::next_record`] has returned `None`, unless the sender is damaged.
    pub fn pending_bytes(&self) -> usize {
        self.pieces.iter().map(Vec::len).sum::<usize>() - self.read
    }

    /// The next whole record and the position at which it ends. After an error nothing more can be
    /// read.
    pub fn next_record(&mut self) -> Result<Option<(Record, LogPosition)>, CodecError> {
        if self.failed {
            return Err(CodecError::BadLength { at: self.position.0 });
        }
        let result = self.decode();
        self.failed = result.is_err();
        result
    }

    fn decode(&mut self) -> Result<Option<(Record, LogPosition)>, CodecError> {
        while let Some(first) = self.pieces.front_mut() {
            if let Some((distance, entry, length)) =
                take_record(&first[self.read..], self.position)?
            {
                let at = self.position.0;
                let point = self.point.0.checked_add(distance);
                self.point = ExecutionPoint(point.ok_or(CodecError::BadPoint { at })?);
                self.read += length;
                self.position.0 += length as u64;
                return Ok(Some((Record { point: self.point, entry }, self.position)));
            }
            first.drain(..self.read);
            self.read = 0;
            if first.is_empty() {
                self.pieces.pop_front();
                continue;
            }
            // A record that was cut in two.
            let Some(mut second) = self.pieces.remove(1) else { return Ok(None) };
            self.pieces[0].append(&mut second);
        }
        Ok(None)
    }
}

/// The distance from the point before, the entry and the length of the record with which `bytes` begin; `None` if it is
/// not whole.
fn take_record(
    bytes: &[u8],
    position: LogPosition,
) -> Result<Option<(u64, Entry, usize)>, CodecError> {
    let at = position.0;
    let Some((length, prefix)) =
        take_leb128(bytes, 4).map_err(|()| CodecError::BadLength { at })?
    else {
        return Ok(None);
    };
    let length = length as usize;
    if length == 0 || length > MAX_RECORD_BYTES {
        return Err(CodecError::BadLength { at });
    }
    let Some(body) = bytes.get(prefix..prefix + length) else { return Ok(None) };
    let (distance, used) = match take_leb128(body, 10) {
        Ok(Some(found)) => found,
        Ok(None) | Err(()) => return Err(CodecError::BadPoint { at }),
    };
    let (entry, left) = postcard::take_from_bytes::<Entry>(&body[used..])
        .map_err(|source| CodecError::BadEntry { at, source })?;
    if !left.is_empty() {
        return Err(CodecError::BadLength { at });
    }
    Ok(Some((distance, entry, prefix + length)))
}
