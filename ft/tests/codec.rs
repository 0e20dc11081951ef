//! The log's bytes: what is written is read, in whatever pieces it comes; what is damaged is refused.

use ft::codec::{CodecError, MAX_RECORD_BYTES};
use ft::{
    Component, Control, Decoder, Digest, Encoder, Entry, Event, ExecutionPoint, LogPosition,
    OutputNumber, Record,
};
use proptest::collection::vec;
use proptest::prelude::*;

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![vec(any::<u8>(), 0..80), vec(any::<u8>(), 1000..3000)]
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        (any::<u64>(), any::<u64>()).prop_map(|(tsc, rate)| Event::Anchor { tsc, rate }),
        (any::<u8>(), vec(bytes(), 0..5))
            .prop_map(|(device, frames)| Event::Frames { device, frames }),
        (any::<u8>(), any::<u64>(), any::<u8>(), bytes()).prop_map(
            |(device, request, status, data)| Event::DiskCompletion {
                device,
                request,
                status,
                data
            }
        ),
        (any::<u8>(), bytes()).prop_map(|(device, bytes)| Event::ConsoleInput { device, bytes }),
        bytes().prop_map(|bytes| Event::SerialInput { bytes }),
        (any::<u8>(), bytes()).prop_map(|(device, bytes)| Event::Entropy { device, bytes }),
        Just(Event::Control(Control::HandOver)),
    ]
}

fn entry() -> impl Strategy<Value = Entry> {
    prop_oneof![
        event().prop_map(Entry::Event),
        any::<u64>().prop_map(|number| Entry::Output { number: OutputNumber(number) }),
        any::<u64>().prop_map(|through| Entry::Released { through: OutputNumber(through) }),
        vec(("[a-z0-9]{1,12}", any::<u64>()), 0..30).prop_map(|parts| {
            let components =
                parts.into_iter().map(|(name, hash)| Component { name, hash }).collect();
            Entry::Digest(Digest { components })
        }),
        Just(Entry::Mark),
    ]
}

fn records() -> impl Strategy<Value = Vec<Record>> {
    let distance = prop_oneof![0u64..1000, 0u64..1 << 40];
    vec((distance, entry()), 0..30).prop_map(|steps| {
        let mut point = 0;
        let record = |(distance, entry)| {
            point += distance;
            Record { point: ExecutionPoint(point), entry }
        };
        steps.into_iter().map(record).collect()
    })
}

fn encode(records: &[Record]) -> (Vec<u8>, Vec<LogPosition>) {
    let mut encoder = Encoder::new(ExecutionPoint(0));
    let mut bytes = Vec::new();
    let ends = records
        .iter()
        .map(|record| encoder.append(record.point, &record.entry, &mut bytes).expect("fits"))
        .collect();
    assert_eq!(encoder.position().0, bytes.len() as u64);
    (bytes, ends)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_written_is_read_in_any_pieces(records in records(), pieces in vec(1usize..700, 1..50)) {
        let (bytes, ends) = encode(&records);
        let mut decoder = Decoder::new(ExecutionPoint(0));
        let mut read = Vec::new();
        let mut rest = bytes.as_slice();
        let mut pieces = pieces.iter().cycle();
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(rest.len().min(*pieces.next().expect("cycles")));
            rest = after;
            decoder.push(piece.to_vec());
            while let Some(found) = decoder.next_record().expect("a sound log") {
                read.push(found);
            }
        }
        let written: Vec<_> = records.into_iter().zip(ends).collect();
        prop_assert_eq!(read, written);
        prop_assert_eq!(decoder.pending_bytes(), 0);
    }

    #[test]
    fn garbage_never_panics_and_ends_the_log(garbage in vec(any::<u8>(), 0..2000)) {
        let mut decoder = Decoder::new(ExecutionPoint(0));
        decoder.push(garbage);
        while let Ok(Some(_)) = decoder.next_record() {}
        let pending = decoder.pending_bytes();
        if decoder.next_record().is_err() {
            decoder.push(vec![1, 0, 4]);
            prop_assert!(decoder.next_record().is_err(), "a damaged log cannot heal");
            prop_assert_eq!(decoder.pending_bytes(), pending + 3);
        }
    }

    #[test]
    fn a_damaged_log_never_panics(records in records(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let (mut bytes, _) = encode(&records);
        if !bytes.is_empty() {
            let at = at.index(bytes.len());
            bytes[at] ^= 1u8 << bit;
            let mut decoder = Decoder::new(ExecutionPoint(0));
            decoder.push(bytes);
            while let Ok(Some(_)) = decoder.next_record() {}
        }
    }
}

#[test]
fn an_anchor_is_short() {
    // A day of a 1 GHz clock, an instruction of 1000 ticks, ten million instructions since the last.
    let entry = Entry::Event(Event::Anchor { tsc: 86_400_000_000_000, rate: 1000 << 32 });
    let mut encoder = Encoder::new(ExecutionPoint(0));
    let mut bytes = Vec::new();
    encoder.append(ExecutionPoint(10_000_000), &entry, &mut bytes).expect("fits");
    assert!(bytes.len() < 24, "{} bytes", bytes.len());
}

#[test]
fn records_are_appended_and_nothing_else_is_touched() {
    let mut encoder = Encoder::new(ExecutionPoint(5));
    let mut bytes = b"before".to_vec();
    bytes.reserve(100);
    let (capacity, address) = (bytes.capacity(), bytes.as_ptr());
    encoder.append(ExecutionPoint(9), &Entry::Mark, &mut bytes).expect("fits");
    assert!(bytes.starts_with(b"before"));
    assert_eq!((bytes.capacity(), bytes.as_ptr()), (capacity, address));
}

#[test]
fn a_record_too_long_is_refused_and_leaves_no_trace() {
    let mut encoder = Encoder::new(ExecutionPoint(0));
    let mut bytes = vec![1, 2, 3];
    let data = vec![0; MAX_RECORD_BYTES];
    let event = Event::DiskCompletion { device: 0, request: 0, status: 0, data };
    let result = encoder.append(ExecutionPoint(1), &Entry::Event(event), &mut bytes);
    assert!(matches!(result, Err(CodecError::TooLong { .. })));
    assert_eq!((bytes.as_slice(), encoder.position()), ([1, 2, 3].as_slice(), LogPosition(0)));
    assert_eq!(encoder.point(), ExecutionPoint(0));
}

#[test]
fn a_point_that_lies_back_is_refused() {
    let mut encoder = Encoder::new(ExecutionPoint(7));
    let result = encoder.append(ExecutionPoint(6), &Entry::Mark, &mut Vec::new());
    assert_eq!(result, Err(CodecError::PointWentBack { point: 6, last: 7 }));
}

#[test]
fn a_record_of_the_largest_size_passes() {
    let data = vec![7; MAX_RECORD_BYTES - 32];
    let event = Event::DiskCompletion { device: 0, request: 0, status: 0, data };
    let record = Record { point: ExecutionPoint(3), entry: Entry::Event(event) };
    let (bytes, ends) = encode(std::slice::from_ref(&record));
    let mut decoder = Decoder::new(ExecutionPoint(0));
    decoder.push(bytes);
    assert_eq!(decoder.next_record(), Ok(Some((record, ends[0]))));
}

#[test]
fn a_length_out_of_range_is_refused_before_its_bytes_come() {
    for length in [[0x80, 0x80, 0x80, 0x7f], [0xff, 0xff, 0xff, 0xff]] {
        let mut decoder = Decoder::new(ExecutionPoint(0));
        decoder.push(length.to_vec());
        assert_eq!(decoder.next_record(), Err(CodecError::BadLength { at: 0 }));
    }
    let mut decoder = Decoder::new(ExecutionPoint(0));
    decoder.push(vec![0]);
    assert_eq!(decoder.next_record(), Err(CodecError::BadLength { at: 0 }));
}

#[test]
fn many_empty_frames_do_not_fill_memory() {
    // A record that claims a million frames of one byte each on the wire.
    let mut body = vec![0, 0, 1, 0];
    body.extend_from_slice(&[0xc0, 0x84, 0x3d]);
    body.resize(body.len() + 1_000_000, 0);
    let length = body.len() as u32;
    let mut bytes = vec![
        length as u8 | 0x80,
        (length >> 7) as u8 | 0x80,
        (length >> 14) as u8 | 0x80,
        (length >> 21) as u8,
    ];
    bytes.extend_from_slice(&body);
    let mut decoder = Decoder::new(ExecutionPoint(0));
    decoder.push(bytes);
    assert!(matches!(decoder.next_record(), Err(CodecError::BadEntry { .. })));
}
