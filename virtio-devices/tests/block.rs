//! The disk seen by a driver, with a host half that answers when and how the test says.

mod common;

use common::{DATA, EVENT_IDX, Guest, HOLE, INDIRECT, MEMORY_END, Memory, NEEDS_RESET};
use proptest::prelude::*;
use virtio_devices::{
    BlockCompletion, BlockConfig, BlockFront, BlockOp, BlockRequest, BlockStatus, DeviceEvent,
    Effect, Front, FrontError,
};

const SECTORS: u64 = 1000;
const FLUSH: u64 = 1 << 9;

fn disk() -> Box<dyn Front<Memory>> {
    let config = BlockConfig { sectors: SECTORS, read_only: false, serial: "ledger-0".into() };
    Box::new(BlockFront::new(&config))
}

fn read_only_disk() -> Box<dyn Front<Memory>> {
    let serial = "a serial number that is too long".into();
    Box::new(BlockFront::new(&BlockConfig { sectors: SECTORS, read_only: true, serial }))
}

/// A request as the driver sees it.
#[derive(Clone, Copy)]
struct Sent {
    head: u16,
    status: u64,
}

/// Header, data, status byte: the framing Linux uses. The status is 0xff until written.
fn send(guest: &mut Guest, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> Sent {
    let header = guest.allocate(17);
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes.push(0xff);
    guest.write(header, &bytes);
    let mut pieces = vec![(header, 16, false)];
    pieces.extend(data);
    pieces.push((header + 16, 1, true));
    let head = guest.add(0, &pieces);
    guest.kick(0);
    Sent { head, status: header + 16 }
}

fn read(guest: &mut Guest, sector: u64, address: u64, len: u32) -> Sent {
    send(guest, 0, sector, &[(address, len, true)])
}

fn write(guest: &mut Guest, sector: u64, address: u64, len: u32) -> Sent {
    send(guest, 1, sector, &[(address, len, false)])
}

fn status(guest: &Guest, sent: Sent) -> u8 {
    guest.read(sent.status, 1)[0]
}

fn requests(guest: &mut Guest) -> Vec<BlockRequest> {
    let request = |effect| match effect {
        Effect::Block(request) => request,
        other => panic!("{other:?}"),
    };
    guest.take_effects().into_iter().map(request).collect()
}

fn ids(guest: &mut Guest) -> Vec<u64> {
    requests(guest).iter().map(|r| r.id).collect()
}

fn complete(guest: &mut Guest, id: u64, data: Vec<u8>) {
    let completion = BlockCompletion { id, status: BlockStatus::Ok, data };
    guest.apply(&DeviceEvent::BlockCompletion(completion)).unwrap();
}

#[test]
fn configuration_says_what_the_disk_can_do() {
    let mut guest = Guest::cold(disk);
    guest.probe();
    assert_eq!(guest.device_config(0, 8), SECTORS);
    assert_eq!(guest.device_config(12, 4), 126, "segments in a request");
    assert_eq!(guest.device_config(20, 4), 512);
    let features = guest.offered();
    for bit in [1, 2, 6, 9, 13, 14] {
        assert_ne!(features & 1 << bit, 0, "feature {bit}");
    }
    let mut guest = Guest::cold(read_only_disk);
    guest.probe();
    assert_eq!(guest.offered() & (1 << 5 | 1 << 13 | 1 << 14), 1 << 5);
}

#[test]
fn data_is_copied_out_at_the_notify_and_in_at_the_completion() {
    let mut guest = Guest::start(disk, FLUSH | INDIRECT);
    let buffer = guest.allocate(1024);
    guest.write(buffer, &[0xaa; 1024]);
    let written = write(&mut guest, 7, buffer, 1024);
    // Scribbled over while the write is under way: that must not matter.
    guest.write(buffer, &[0xbb; 1024]);
    let issued = requests(&mut guest);
    let BlockOp::Write { sector: 7, data } = &issued[0].op else { panic!("{issued:?}") };
    assert_eq!(data[..], [0xaa; 1024]);
    assert!(guest.take_used(0).is_empty());
    guest.transplant();
    assert_eq!(guest.device().outstanding(), [Effect::Block(issued[0].clone())]);
    complete(&mut guest, 0, Vec::new());
    assert_eq!(guest.take_used(0), [(written.head, 1)]);
    assert_eq!(status(&guest, written), 0);
    assert_eq!(guest.take_interrupts(), [(1, 1)].into());

    let loaded = read(&mut guest, 7, buffer, 1024);
    assert_eq!(
        requests(&mut guest),
        [BlockRequest { id: 1, op: BlockOp::Read { sector: 7, len: 1024 } }]
    );
    guest.transplant();
    assert_eq!(guest.read(buffer, 1024), [0xbb; 1024], "nothing arrives before the completion");
    complete(&mut guest, 1, vec![0xcc; 1024]);
    assert_eq!(guest.read(buffer, 1024), [0xcc; 1024]);
    assert_eq!(guest.take_used(0), [(loaded.head, 1025)]);
    assert!(guest.device().outstanding().is_empty());
    guest.check();
}

#[test]
fn framing_does_not_matter() {
    let mut guest = Guest::start(disk, FLUSH | INDIRECT);
    let area = guest.allocate(0x1000);
    let mut header = vec![0; 16];
    header[8] = 3;
    guest.write(area, &header);
    guest.write(area + 0x700, &[0xff]);
    // Header in two, data across odd borders, the status at the end of a data buffer.
    let pieces = [
        (area, 5, false),
        (area + 5, 11, false),
        (area + 0x100, 100, true),
        (area + 0x500, 412 + 1, true),
    ];
    guest.add_indirect(0, &pieces);
    guest.kick(0);
    assert_eq!(
        requests(&mut guest),
        [BlockRequest { id: 0, op: BlockOp::Read { sector: 3, len: 512 } }]
    );
    let data: Vec<u8> = (0..512).map(|i| (i % 253) as u8).collect();
    complete(&mut guest, 0, data.clone());
    assert_eq!(guest.read(area + 0x100, 100), data[..100]);
    assert_eq!(guest.read(area + 0x500, 412), data[100..]);
    assert_eq!(guest.read(area + 0x500 + 412, 1), [0]);
    guest.check();
}

#[test]
fn overlapping_requests_go_one_after_the_other() {
    let mut guest = Guest::start(disk, FLUSH);
    let page = |n: u64| DATA + 0x8000 + n * 0x1000;
    write(&mut guest, 10, page(0), 1024);
    read(&mut guest, 11, page(1), 512); // reads what 0 writes
    write(&mut guest, 11, page(2), 512); // over both
    read(&mut guest, 20, page(3), 512); // free
    read(&mut guest, 30, page(3) + 512, 512); // same page as 3
    read(&mut guest, 20, page(4), 512); // same sector as 3, but both only read
    send(&mut guest, 4, 0, &[]); // a flush concerns completed writes only
    assert_eq!(ids(&mut guest), [0, 3, 5, 6]);
    guest.transplant();
    complete(&mut guest, 3, vec![3; 512]);
    assert_eq!(ids(&mut guest), [4]);
    complete(&mut guest, 0, Vec::new());
    assert_eq!(ids(&mut guest), [1]);
    guest.transplant();
    // What waits has not been issued and cannot be completed.
    let early = BlockCompletion { id: 2, status: BlockStatus::Ok, data: Vec::new() };
    let refused = guest.apply(&DeviceEvent::BlockCompletion(early));
    assert_eq!(refused, Err(FrontError::UnknownRequest { id: 2 }));
    complete(&mut guest, 1, vec![1; 512]);
    assert_eq!(ids(&mut guest), [2]);
    complete(&mut guest, 2, Vec::new());
    complete(&mut guest, 6, Vec::new());
    complete(&mut guest, 5, vec![5; 512]);
    complete(&mut guest, 4, vec![4; 512]);
    assert_eq!(guest.take_used(0).len(), 7);
    assert_eq!(guest.read(page(3), 1024), [vec![3; 512], vec![4; 512]].concat());
    guest.check();
}

#[test]
fn bad_requests_get_an_error_status_and_do_no_harm() {
    let mut guest = Guest::start(disk, FLUSH);
    let buffer = guest.allocate(0x2000);
    let ioerr = [
        read(&mut guest, SECTORS, buffer, 512),
        read(&mut guest, SECTORS - 1, buffer, 1024),
        read(&mut guest, u64::MAX, buffer, 512),
        read(&mut guest, 0, buffer, 511),
        read(&mut guest, 0, HOLE - 512, 1024),
        read(&mut guest, 0, u64::MAX - 100, 512),
        read(&mut guest, 0, MEMORY_END, 512),
        write(&mut guest, 0, HOLE, 512),
        write(&mut guest, 0, u64::MAX - 100, 512),
        send(&mut guest, 0, 0, &[(buffer, 0xf000_0000, true)]),
        send(&mut guest, 1, 0, &[(buffer, 0xf000_0000, false)]),
        send(&mut guest, 0, 0, &[]),
        send(&mut guest, 1, 0, &[]),
        send(&mut guest, 11, 0, &[(buffer, 15, false)]),
    ];
    let unsupported = [send(&mut guest, 2, 0, &[]), send(&mut guest, 0x8000_0000, 0, &[])];
    assert!(guest.take_effects().is_empty());
    assert_eq!(guest.take_used(0).len(), ioerr.len() + unsupported.len());
    assert!(ioerr.iter().all(|&sent| status(&guest, sent) == 1));
    assert!(unsupported.iter().all(|&sent| status(&guest, sent) == 2));
    assert_eq!(guest.status() & NEEDS_RESET, 0);
    read(&mut guest, SECTORS - 1, buffer, 512);
    assert_eq!(ids(&mut guest), [0], "and it goes on working");
    guest.check();
}

#[test]
fn requests_without_header_or_status_ask_for_a_reset() {
    for pieces in [
        vec![(DATA, 16, false)],
        vec![(DATA, 15, false), (DATA + 64, 1, true)],
        vec![(DATA, 513, true)],
        vec![(HOLE, 16, false), (DATA, 1, true)],
        vec![(DATA, 16, false), (HOLE, 1, true)],
    ] {
        let mut guest = Guest::start(disk, FLUSH);
        // An unknown type, so that the answer comes at once.
        guest.write(DATA, &[0xff; 16]);
        guest.add(0, &pieces);
        guest.kick(0);
        assert_eq!(guest.status() & NEEDS_RESET, NEEDS_RESET, "{pieces:?}");
        guest.check();
    }
}

#[test]
fn discard_and_write_zeroes() {
    let segment = |sector: u64, count: u32, flags: u32| {
        [sector.to_le_bytes().to_vec(), count.to_le_bytes().to_vec(), flags.to_le_bytes().to_vec()]
            .concat()
    };
    let mut guest = Guest::start(disk, FLUSH);
    let mut range = |kind, bytes: Vec<u8>| {
        let at = guest.allocate(64);
        guest.write(at, &bytes);
        let sent = send(&mut guest, kind, 0, &[(at, bytes.len() as u32, false)]);
        (requests(&mut guest).pop().map(|r| r.op), status(&guest, sent))
    };
    let discard = BlockOp::Discard { sector: 8, sectors: 16 };
    assert_eq!(range(11, segment(8, 16, 0)), (Some(discard), 0xff));
    for (at, flags, unmap) in [(100, 0, false), (200, 1, true)] {
        let zeroes = BlockOp::WriteZeroes { sector: at, sectors: 4, unmap };
        assert_eq!(range(13, segment(at, 4, flags)), (Some(zeroes), 0xff));
    }
    assert_eq!(range(11, segment(8, 16, 1)), (None, 2), "discard has no flag");
    assert_eq!(range(13, segment(8, 16, 2)), (None, 2), "reserved flag");
    assert_eq!(range(11, segment(SECTORS - 1, 2, 0)), (None, 1));
    assert_eq!(range(11, segment(u64::MAX, 2, 0)), (None, 1));
    assert_eq!(range(13, segment(0, 0, 0)), (None, 1));
    assert_eq!(range(13, segment(0, u32::MAX, 0)), (None, 1));
    assert_eq!(range(11, [segment(0, 1, 0), segment(4, 1, 0)].concat()), (None, 1));
}

#[test]
fn the_serial_number_is_told() {
    let mut guest = Guest::start(read_only_disk, FLUSH);
    let buffer = guest.allocate(64);
    let sent = send(&mut guest, 8, 0, &[(buffer, 20, true)]);
    assert_eq!(guest.take_used(0), [(sent.head, 21)]);
    assert_eq!(guest.read(buffer, 20), b"a serial number that");
    let short = send(&mut guest, 8, 0, &[(buffer, 5, true)]);
    assert_eq!(guest.take_used(0), [(short.head, 6)]);
}

#[test]
fn a_read_only_disk_refuses_every_change() {
    let mut guest = Guest::start(read_only_disk, FLUSH);
    let buffer = guest.allocate(512);
    guest.write(buffer, &[0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    let refused = [
        write(&mut guest, 0, buffer, 512),
        send(&mut guest, 11, 0, &[(buffer, 16, false)]),
        send(&mut guest, 13, 0, &[(buffer, 16, false)]),
    ];
    assert!(refused.iter().all(|&sent| status(&guest, sent) == 1));
    assert!(guest.take_effects().is_empty());
}

#[test]
fn host_errors_and_short_answers_are_io_errors() {
    let mut guest = Guest::start(disk, FLUSH);
    let buffer = guest.allocate(512);
    let mut answer = |status_code, len| {
        let sent = read(&mut guest, 0, buffer, 512);
        let id = ids(&mut guest)[0];
        let completion = BlockCompletion { id, status: status_code, data: vec![1; len] };
        guest.apply(&DeviceEvent::BlockCompletion(completion)).unwrap();
        (status(&guest, sent), guest.take_used(0)[0].1)
    };
    assert_eq!(answer(BlockStatus::IoError, 0), (1, 1));
    assert_eq!(answer(BlockStatus::Ok, 511), (1, 1));
    assert_eq!(answer(BlockStatus::Ok, 513), (1, 1));
    assert_eq!(answer(BlockStatus::Unsupported, 0), (2, 1));
    assert_eq!(answer(BlockStatus::Ok, 512), (0, 513));
    guest.check();
}

#[test]
fn without_the_flush_feature_a_write_is_durable_when_it_completes() {
    let mut guest = Guest::start(disk, 0);
    let buffer = guest.allocate(512);
    let sent = write(&mut guest, 0, buffer, 512);
    assert_eq!(ids(&mut guest), [0]);
    complete(&mut guest, 0, Vec::new());
    assert_eq!(requests(&mut guest), [BlockRequest { id: 1, op: BlockOp::Flush }]);
    assert_eq!(status(&guest, sent), 0xff);
    guest.transplant();
    complete(&mut guest, 1, Vec::new());
    assert_eq!(status(&guest, sent), 0);
    assert_eq!(guest.device().counters()[3], ("write_ops", 1));
    guest.check();
}

#[test]
fn after_a_reset_old_writes_still_keep_new_ones_waiting() {
    let mut guest = Guest::start(disk, FLUSH);
    let buffer = guest.allocate(512);
    write(&mut guest, 5, buffer, 512);
    write(&mut guest, 5, buffer, 512);
    let old = requests(&mut guest);
    assert_eq!(old.len(), 1, "the second waits");
    guest.reset_machine();
    assert_eq!(guest.device().outstanding(), [Effect::Block(old[0].clone())]);
    guest.probe();
    guest.initialise(FLUSH);
    let new = write(&mut guest, 5, buffer, 512);
    assert!(guest.take_effects().is_empty(), "the new write waits for the old one");
    guest.transplant();
    complete(&mut guest, old[0].id, Vec::new());
    assert!(guest.take_used(0).is_empty(), "nobody is told of the old one");
    let issued = ids(&mut guest);
    assert_eq!(issued, [2], "ids are never used again");
    complete(&mut guest, 2, Vec::new());
    assert_eq!((guest.take_used(0), status(&guest, new)), (vec![(new.head, 1)], 0));
    guest.check();
}

#[test]
fn what_is_taken_from_the_queue_is_bounded() {
    let mut guest = Guest::start(disk, FLUSH);
    // Drivers that keep resetting leave old requests behind, but not without end.
    for _ in 0..10 {
        guest.initialise(FLUSH);
        let header = guest.allocate(17);
        guest.write(header, &[0; 16]);
        let page = guest.allocate(512);
        let head = guest.add(0, &[(header, 16, false), (page, 512, true), (header + 16, 1, true)]);
        // One head, available many times: no honest driver does that.
        for _ in 1..128 {
            guest.add_head(0, head);
        }
        guest.notify(0);
        assert!(guest.device().outstanding().len() <= 256);
        assert!(guest.state_size() < 100_000);
    }
    guest.check();
}

#[derive(Debug, Clone)]
enum Step {
    Read {
        sector: u64,
        sectors: u32,
        page: u64,
    },
    Write {
        sector: u64,
        sectors: u32,
        page: u64,
        byte: u8,
    },
    Flush,
    /// Complete the n-th of those issued.
    Complete(prop::sample::Index),
    Transplant,
}

fn step() -> impl Strategy<Value = Step> {
    let place = || (0..20u64, 1..8u32, 0..12u64);
    prop_oneof![
        3 => place().prop_map(|(sector, sectors, page)| Step::Read { sector, sectors, page }),
        3 => (place(), any::<u8>()).prop_map(|((sector, sectors, page), byte)| Step::Write {
            sector, sectors, page, byte
        }),
        1 => Just(Step::Flush),
        5 => any::<prop::sample::Index>().prop_map(Step::Complete),
        1 => Just(Step::Transplant),
    ]
}

fn perform(image: &mut [u8], op: &BlockOp) -> Vec<u8> {
    match op {
        BlockOp::Read { sector, len } => {
            let start = *sector as usize * 512;
            image[start..start + *len as usize].to_vec()
        }
        BlockOp::Write { sector, data } => {
            let start = *sector as usize * 512;
            image[start..start + data.len()].copy_from_slice(data);
            Vec::new()
        }
        _ => Vec::new(),
    }
}

proptest! {
    /// However the host reorders what it was given, disk and memory end as if every request had been
    /// done at once when it was submitted.
    #[test]
    fn any_order_of_the_host_gives_the_result_of_submission_order(
        steps in prop::collection::vec(step(), 1..120), event_idx in any::<bool>(),
    ) {
        let mut guest = Guest::start(disk, FLUSH | if event_idx { EVENT_IDX } else { 0 });
        let base = DATA + 0x20000;
        let mut image = vec![0u8; 64 * 512];
        let mut expected_image = image.clone();
        let mut expected_memory = vec![0u8; 0x10000];
        let mut issued: Vec<BlockRequest> = Vec::new();
        let (mut sent, mut used) = (0, 0);
        for step in steps {
            match step {
                // More would overrun the driver's descriptors.
                Step::Read { .. } | Step::Write { .. } | Step::Flush if sent - used >= 40 => {}
                Step::Read { sector, sectors, page } => {
                    let (at, len) = (page as usize * 4096, sectors as usize * 512);
                    let from = sector as usize * 512;
                    expected_memory[at..at + len]
                        .copy_from_slice(&expected_image[from..from + len]);
                    submit(&mut guest, 0, sector, (base + at as u64, len as u32, true), sent);
                    sent += 1;
                }
                Step::Write { sector, sectors, page, byte } => {
                    // Its own source, so that what the driver writes there is no race.
                    let source = base + 0x10000 + page * 4096;
                    let len = sectors as usize * 512;
                    guest.write(source, &vec![byte; len]);
                    let to = sector as usize * 512;
                    expected_image[to..to + len].fill(byte);
                    submit(&mut guest, 1, sector, (source, len as u32, false), sent);
                    sent += 1;
                }
                Step::Flush => {
                    submit(&mut guest, 4, 0, (0, 0, false), sent);
                    sent += 1;
                }
                Step::Complete(index) if !issued.is_empty() => {
                    let request = issued.remove(index.index(issued.len()));
                    let data = perform(&mut image, &request.op);
                    complete(&mut guest, request.id, data);
                }
                Step::Complete(_) => {}
                Step::Transplant => guest.transplant(),
            }
            issued.extend(requests(&mut guest));
            used += guest.take_used(0).len();
        }
        while let Some(request) = issued.pop() {
            let data = perform(&mut image, &request.op);
            complete(&mut guest, request.id, data);
            issued.extend(requests(&mut guest));
            used += guest.take_used(0).len();
        }
        prop_assert_eq!(sent, used);
        prop_assert!(image == expected_image, "the disk differs");
        prop_assert!(guest.read(base, 0x10000) == expected_memory, "the memory differs");
        guest.check();
    }
}

/// Like [`send`], with the header in one of 64 slots below the data.
fn submit(guest: &mut Guest, kind: u32, sector: u64, data: (u64, u32, bool), slot: usize) {
    let header = DATA + 64 * (slot % 64) as u64;
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    guest.write(header, &bytes);
    let mut pieces = vec![(header, 16, false), (header + 16, 1, true)];
    if data.1 > 0 {
        pieces.insert(1, data);
    }
    guest.add(0, &pieces);
    guest.kick(0);
}
