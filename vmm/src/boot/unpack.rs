//! Unpacks the payload of a bzImage on the host.
//!
//! The kernel's own unpacker would run for seconds on a software CPU, and would draw random numbers
//! for the kernel's address. The formats are those of the kernel's build (`scripts/Makefile.lib`);
//! all but gzip are followed by the unpacked size in four bytes, which must be left unread.

use std::io::Read;

/// Why a payload cannot be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The payload begins with no known magic number.
    #[error("the kernel is compressed in an unknown way (payload begins with {magic:02x?})")]
    UnknownFormat {
        /// The first bytes.
        magic: Vec<u8>,
    },
    /// A format that kernels can have and this unpacker has not.
    #[error(
        "the kernel is compressed with {format}; use one compressed with gzip, xz, lzma, lz4 or zstd"
    )]
    UnsupportedFormat {
        /// Its name.
        format: &'static str,
    },
    /// The data is damaged or cut short.
    #[error("the {format}-compressed kernel is damaged")]
    Damaged {
        /// Format found.
        format: &'static str,
        /// What the decoder says.
        #[source]
        source: std::io::Error,
    },
    /// The unpacked kernel is too large.
    #[error("the unpacked kernel exceeds {limit} bytes; give the VM more memory")]
    TooLarge {
        /// The most allowed.
        limit: u64,
    },
}

/// Memory a decoder may take; kernels are built with dictionaries up to 128 MiB.
const DECODER_MEMORY: u64 = 256 << 20;
/// Blocks of the legacy LZ4 frame unpack to this size at most (LZ4 frame format, "Legacy frame").
const LZ4_BLOCK: usize = 8 << 20;

/// Unpacks `payload`, found by its magic number; the result has `limit` bytes at most.
pub fn unpack(payload: &[u8], limit: u64) -> Result<Vec<u8>, UnpackError> {
    match payload {
        [0x7f, b'E', b'L', b'F', ..] => Ok(payload.to_vec()),
        [0x1f, 0x8b, ..] => read("gzip", flate2::read::GzDecoder::new(payload), limit),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
            let stream = liblzma::stream::Stream::new_stream_decoder(DECODER_MEMORY, 0)
                .map_err(|e| damaged("xz", e.into()))?;
            read("xz", liblzma::read::XzDecoder::new_stream(payload, stream), limit)
        }
        [0x5d, 0, 0, ..] => {
            let stream = liblzma::stream::Stream::new_lzma_decoder(DECODER_MEMORY)
                .map_err(|e| damaged("lzma", e.into()))?;
            read("lzma", liblzma::read::XzDecoder::new_stream(payload, stream), limit)
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let mut decoder = zstd::Decoder::new(payload).map_err(|e| damaged("zstd", e))?;
            decoder.window_log_max(27).map_err(|e| damaged("zstd", e))?;
            read("zstd", decoder.single_frame(), limit)
        }
        [0x02, 0x21, 0x4c, 0x18, blocks @ ..] => unpack_lz4(blocks, limit),
        [b'B', b'Z', b'h', ..] => Err(UnpackError::UnsupportedFormat { format: "bzip2" }),
        [0x89, b'L', b'Z', b'O', ..] => Err(UnpackError::UnsupportedFormat { format: "lzo" }),
        _ => Err(UnpackError::UnknownFormat { magic: payload.iter().copied().take(6).collect() }),
    }
}

fn damaged(format: &'static str, source: std::io::Error) -> UnpackError {
    UnpackError::Damaged { format, source }
}

fn read(format: &'static str, decoder: impl Read, limit: u64) -> Result<Vec<u8>, UnpackError> {
    let mut unpacked = Vec::new();
    decoder
        .take(limit.saturating_add(1))
        .read_to_end(&mut unpacked)
        .map_err(|source| damaged(format, source))?;
    if unpacked.len() as u64 > limit {
        return Err(UnpackError::TooLarge { limit });
    }
    Ok(unpacked)
}

/// Blocks, each after its packed size. A frame ends with its data, so the unpacked size that the
/// kernel's build appends looks like one more block's size: it is what remains when four bytes are left.
fn unpack_lz4(mut rest: &[u8], limit: u64) -> Result<Vec<u8>, UnpackError> {
    let invalid =
        |what: String| damaged("lz4", std::io::Error::new(std::io::ErrorKind::InvalidData, what));
    let mut unpacked = Vec::new();
    let mut block = vec![0; LZ4_BLOCK];
    while let Some((size, after)) = rest.split_first_chunk::<4>() {
        if after.is_empty() {
            break;
        }
        let size = u32::from_le_bytes(*size) as usize;
        let Some((packed, after)) = after.split_at_checked(size) else {
            return Err(invalid(format!("a block of {size} bytes with only {} left", after.len())));
        };
        let len = lz4_flex::block::decompress_into(packed, &mut block)
            .map_err(|e| invalid(e.to_string()))?;
        unpacked.extend_from_slice(&block[..len]);
        if unpacked.len() as u64 > limit {
            return Err(UnpackError::TooLarge { limit });
        }
        rest = after;
    }
    Ok(unpacked)
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Write;

    use super::*;

    /// `data` packed as the kernel's build does it, size appended where it appends it.
    pub fn pack(format: &str, data: &[u8]) -> Vec<u8> {
        let mut packed = match format {
            "none" => return data.to_vec(),
            "gzip" => {
                let mut encoder =
                    flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
                encoder.write_all(data).unwrap();
                return encoder.finish().unwrap();
            }
            "xz" => {
                let mut filters = liblzma::stream::Filters::new();
                filters.x86();
                filters.lzma2(&liblzma::stream::LzmaOptions::new_preset(6).unwrap());
                let stream = liblzma::stream::Stream::new_stream_encoder(
                    &filters,
                    liblzma::stream::Check::Crc32,
                )
                .unwrap();
                let mut encoder = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
                encoder.write_all(data).unwrap();
                encoder.finish().unwrap()
            }
            "lzma" => {
                let options = liblzma::stream::LzmaOptions::new_preset(6).unwrap();
                let stream = liblzma::stream::Stream::new_lzma_encoder(&options).unwrap();
                let mut encoder = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
                encoder.write_all(data).unwrap();
                encoder.finish().unwrap()
            }
            "zstd" => zstd::encode_all(data, 19).unwrap(),
            "lz4" => {
                let mut frame = vec![0x02, 0x21, 0x4c, 0x18];
                for chunk in data.chunks(LZ4_BLOCK) {
                    let block = lz4_flex::block::compress(chunk);
                    frame.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
                    frame.extend(block);
                }
                frame
            }
            other => panic!("no packer for {other}"),
        };
        packed.extend(u32::try_from(data.len()).unwrap().to_le_bytes());
        packed
    }

    /// Something that compresses, but not to nothing, and longer than one LZ4 block.
    fn sample() -> Vec<u8> {
        (0u32..(9 << 20) / 4)
            .flat_map(|n| (n / 3).wrapping_mul(0x9e37_79b9).to_le_bytes())
            .collect()
    }

    #[test]
    fn each_format_unpacks_to_what_was_packed() {
        let data = sample();
        for format in ["gzip", "xz", "lzma", "zstd", "lz4"] {
            let packed = pack(format, &data);
            assert!(unpack(&packed, data.len() as u64).unwrap() == data, "{format}");
            assert!(
                matches!(unpack(&packed, data.len() as u64 - 1), Err(UnpackError::TooLarge { .. })),
                "{format}"
            );
        }
    }

    #[test]
    fn a_payload_cut_short_is_an_error() {
        let data = sample();
        for format in ["gzip", "xz", "zstd", "lz4"] {
            let packed = pack(format, &data);
            let error = unpack(&packed[..packed.len() / 2], 1 << 30).unwrap_err();
            assert!(matches!(error, UnpackError::Damaged { .. }), "{format}: {error}");
        }
    }

    #[test]
    fn other_formats_are_named() {
        assert!(matches!(
            unpack(b"BZh91AY", 1 << 20),
            Err(UnpackError::UnsupportedFormat { format: "bzip2" })
        ));
        assert!(matches!(
            unpack(b"\x89LZO\0", 1 << 20),
            Err(UnpackError::UnsupportedFormat { format: "lzo" })
        ));
        assert!(matches!(unpack(b"hello", 1 << 20), Err(UnpackError::UnknownFormat { .. })));
        assert!(matches!(unpack(b"", 1 << 20), Err(UnpackError::UnknownFormat { .. })));
    }
}
