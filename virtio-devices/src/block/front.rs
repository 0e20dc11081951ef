//! The guest-visible half of a disk.
//!
//! Data to write is copied out of guest memory at the notify, data read is copied in when its
//! completion is applied. Requests whose order matters are handed out one after the other
//! ([`super::overlap`]). A request stays in the state until its completion, so that a machine which
//! goes live can issue it again.

use std::collections::HashSet;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use super::overlap::Footprint;
use super::state::{BlockCounters, BlockState, Pending, Reply};
use crate::effect::{
    BlockCompletion, BlockOp, BlockRequest, BlockStatus, DeviceEvent, Effect, SECTOR_SIZE,
};
use crate::front::{DriverError, Front, FrontError, FrontState, Io, StateError, copy_config};
use crate::queue::{
    Buffer, Chain, in_memory, pages, read_buffers, slice_buffers, total_len, write_buffers,
};

/// Bytes of the serial number (virtio 1.2, 5.2.6: VIRTIO_BLK_T_GET_ID).
pub const SERIAL_SIZE: usize = 20;

/// Data of one request at most; more is answered with an I/O error. A driver that keeps to the offered
/// segment limits cannot get there.
pub const MAX_REQUEST_BYTES: u32 = 4 << 20;

const QUEUE_SIZE: u16 = 128;
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;
const SEGMENT_SIZE_MAX: u32 = 32 << 10;
/// Requests and data taken from the queue and not completed. Beyond, chains stay in the queue.
const OUTSTANDING_MAX: usize = 2 * QUEUE_SIZE as usize;
const OUTSTANDING_BYTES_MAX: u64 = 16 << 20;
const DISCARD_SECTORS_MAX: u32 = 1 << 22;
/// Smaller: a host file system that cannot zero a range has the zeroes written out.
const WRITE_ZEROES_SECTORS_MAX: u32 = 1 << 16;

/// Feature bits (virtio 1.2, 5.2.3).
const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// Request types (virtio 1.2, 5.2.6).
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const HEADER_SIZE: u64 = 16;
const SEGMENT_SIZE: u64 = 16;
const SEGMENT_UNMAP: u32 = 1;

/// What a disk is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockConfig {
    /// Size in sectors of 512 bytes.
    pub sectors: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// Serial number; at most [`SERIAL_SIZE`] bytes of it count.
    pub serial: String,
}

/// The front half.
#[derive(Debug)]
pub struct BlockFront {
    state: BlockState,
}

/// What a request turned out to be.
enum Parsed {
    /// Answered at once, with so many bytes of data written.
    Done { status: BlockStatus, written: u32 },
    /// Needs the disk. `data` is where read data goes.
    Disk { op: BlockOp, data: Vec<Buffer>, pages: Vec<u64> },
}

impl Parsed {
    fn failed(status: BlockStatus) -> Self {
        Self::Done { status, written: 0 }
    }
}

impl BlockFront {
    /// A disk just powered on.
    #[must_use]
    pub fn new(config: &BlockConfig) -> Self {
        let mut serial = config.serial.clone().into_bytes();
        serial.resize(SERIAL_SIZE, 0);
        let state = BlockState {
            sectors: config.sectors,
            read_only: config.read_only,
            serial,
            features: 0,
            next_id: 0,
            requests: Vec::new(),
            counters: BlockCounters::default(),
        };
        Self { state }
    }

    fn configuration(&self) -> [u8; 60] {
        let mut c = [0; 60];
        let mut put = |at: usize, value: u32| c[at..at + 4].copy_from_slice(&value.to_le_bytes());
        put(0, self.state.sectors as u32);
        put(4, (self.state.sectors >> 32) as u32);
        put(8, SEGMENT_SIZE_MAX);
        put(12, SEGMENTS_MAX);
        put(20, SECTOR_SIZE as u32);
        put(36, DISCARD_SECTORS_MAX);
        put(40, 1);
        put(44, 1);
        put(48, WRITE_ZEROES_SECTORS_MAX);
        put(52, 1);
        put(56, 1);
        c
    }

    fn has_room(&self) -> bool {
        let bytes: u64 = self.state.requests.iter().map(|p| data_len(&p.request.op)).sum();
        self.state.requests.len() < OUTSTANDING_MAX && bytes < OUTSTANDING_BYTES_MAX
    }

    /// Takes requests from the queue while there is room, and hands out what may go.
    fn take_requests<M: GuestMemory>(&mut self, io: &mut Io<'_, M>) -> Result<(), DriverError> {
        while io.live && self.has_room() {
            let Some(chain) = io.queues[0].pop(io.memory)? else {
                io.queues[0].request_notify(io.memory)?;
                break;
            };
            self.take_request(&chain, io)?;
        }
        Ok(())
    }

    fn take_request<M: GuestMemory>(
        &mut self,
        chain: &Chain,
        io: &mut Io<'_, M>,
    ) -> Result<(), DriverError> {
        // The status is the last byte of the writable part, whatever the framing (5.2.6, 2.7.4.3).
        let data_len = chain.writable_len().checked_sub(1).ok_or(DriverError::ShortChain)?;
        let status = slice_buffers(&chain.writable, data_len, 1)[0].address;
        let target = slice_buffers(&chain.writable, 0, data_len);
        match self.parse(chain, target, io.memory)? {
            Parsed::Done { status: code, written } => {
                let reply = Reply { head: chain.head, status, data: Vec::new() };
                self.answer(&reply, code, written, io)
            }
            Parsed::Disk { op, data, pages } => {
                let footprint = footprint(&op, pages);
                let id = self.next_id();
                self.state.requests.push(Pending {
                    request: BlockRequest { id, op },
                    footprint,
                    issued: false,
                    reply: Some(Reply { head: chain.head, status, data }),
                });
                let last = self.state.requests.len() - 1;
                self.issue_if_free(last, io);
                Ok(())
            }
        }
    }

    fn next_id(&mut self) -> u64 {
        let id = self.state.next_id;
        self.state.next_id += 1;
        id
    }

    /// `target` is the writable part without the status byte.
    fn parse<M: GuestMemory>(
        &self,
        chain: &Chain,
        target: Vec<Buffer>,
        memory: &M,
    ) -> Result<Parsed, DriverError> {
        let mut header = [0; HEADER_SIZE as usize];
        read_buffers(memory, &chain.readable, &mut header)?;
        let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let sector = le64(&header[8..]);
        let source_len = chain.readable_len() - HEADER_SIZE;
        let source = slice_buffers(&chain.readable, HEADER_SIZE, source_len);
        Ok(match kind {
            T_IN => self.parse_read(sector, target, memory),
            T_OUT => self.parse_write(sector, &source, memory),
            T_FLUSH => Parsed::Disk { op: BlockOp::Flush, data: Vec::new(), pages: Vec::new() },
            T_GET_ID => match write_buffers(memory, &target, &self.state.serial) {
                Ok(written) => Parsed::Done { status: BlockStatus::Ok, written: written as u32 },
                Err(_) => Parsed::failed(BlockStatus::IoError),
            },
            T_DISCARD | T_WRITE_ZEROES => self.parse_range(kind == T_WRITE_ZEROES, &source, memory),
            _ => Parsed::failed(BlockStatus::Unsupported),
        })
    }

    fn parse_read<M: GuestMemory>(&self, sector: u64, data: Vec<Buffer>, memory: &M) -> Parsed {
        let len = total_len(&data);
        if !self.proper_transfer(sector, len) || !in_memory(memory, &data, Permissions::Write) {
            return Parsed::failed(BlockStatus::IoError);
        }
        let pages = pages(&data);
        Parsed::Disk { op: BlockOp::Read { sector, len: len as u32 }, data, pages }
    }

    fn parse_write<M: GuestMemory>(&self, sector: u64, source: &[Buffer], memory: &M) -> Parsed {
        let len = total_len(source);
        if self.state.read_only || !self.proper_transfer(sector, len) {
            return Parsed::failed(BlockStatus::IoError);
        }
        let mut data = vec![0; len as usize];
        if read_buffers(memory, source, &mut data).is_err() {
            return Parsed::failed(BlockStatus::IoError);
        }
        let op = BlockOp::Write { sector, data: Arc::from(data) };
        Parsed::Disk { op, data: Vec::new(), pages: pages(source) }
    }

    /// Discard and write zeroes: one segment of sector, count and flags (5.2.6).
    fn parse_range<M: GuestMemory>(&self, zeroes: bool, source: &[Buffer], memory: &M) -> Parsed {
        let mut segment = [0; SEGMENT_SIZE as usize];
        if self.state.read_only
            || total_len(source) != SEGMENT_SIZE
            || read_buffers(memory, source, &mut segment).is_err()
        {
            return Parsed::failed(BlockStatus::IoError);
        }
        let sector = le64(&segment);
        let tail = le64(&segment[8..]);
        let (count, flags) = (tail as u32, (tail >> 32) as u32);
        let (limit, allowed) = if zeroes {
            (WRITE_ZEROES_SECTORS_MAX, SEGMENT_UNMAP)
        } else {
            (DISCARD_SECTORS_MAX, 0)
        };
        if flags & !allowed != 0 {
            return Parsed::failed(BlockStatus::Unsupported);
        }
        let sectors = u64::from(count);
        if !self.proper_range(sector, sectors, limit) {
            return Parsed::failed(BlockStatus::IoError);
        }
        let op = if zeroes {
            BlockOp::WriteZeroes { sector, sectors, unmap: flags & SEGMENT_UNMAP != 0 }
        } else {
            BlockOp::Discard { sector, sectors }
        };
        Parsed::Disk { op, data: Vec::new(), pages: Vec::new() }
    }

    fn proper_transfer(&self, sector: u64, len: u64) -> bool {
        len > 0
            && len <= u64::from(MAX_REQUEST_BYTES)
            && len.is_multiple_of(SECTOR_SIZE)
            && self.on_disk(sector, len / SECTOR_SIZE)
    }

    /// Whether so many sectors, `limit` at most, may be discarded or zeroed at once.
    fn proper_range(&self, sector: u64, sectors: u64, limit: u32) -> bool {
        (1..=u64::from(limit)).contains(&sectors) && self.on_disk(sector, sectors)
    }

    fn on_disk(&self, sector: u64, sectors: u64) -> bool {
        sector.checked_add(sectors).is_some_and(|end| end <= self.state.sectors)
    }

    /// Whether the requests of `state`, a disk like this one's, can have come from a driver.
    fn could_have_taken(&self, state: &BlockState) -> bool {
        let requests = &state.requests;
        let bytes: u64 = requests.iter().map(|p| data_len(&p.request.op)).sum();
        let mut ids = HashSet::new();
        requests.len() <= OUTSTANDING_MAX
            // The last one may have been taken when there was a byte of room.
            && bytes < OUTSTANDING_BYTES_MAX + u64::from(MAX_REQUEST_BYTES)
            && requests.iter().all(|pending| {
                let id = pending.request.id;
                id < state.next_id && ids.insert(id) && self.proper_pending(pending)
            })
    }

    /// Whether a request is one that [`Self::parse`] lets through, with the footprint and the reply that go with it.
    fn proper_pending(&self, pending: &Pending) -> bool {
        let (op, touched) = (&pending.request.op, &pending.footprint);
        let proper_op = match *op {
            BlockOp::Read { sector, len } => self.proper_transfer(sector, len.into()),
            BlockOp::Write { sector, ref data } => self.proper_transfer(sector, data.len() as u64),
            BlockOp::Flush => true,
            BlockOp::Discard { sector, sectors } => {
                self.proper_range(sector, sectors, DISCARD_SECTORS_MAX)
            }
            BlockOp::WriteZeroes { sector, sectors, .. } => {
                self.proper_range(sector, sectors, WRITE_ZEROES_SECTORS_MAX)
            }
        };
        // A flush may follow a write in the same request, whose footprint stays.
        let proper_footprint = if *op == BlockOp::Flush {
            self.on_disk(touched.sector, touched.sectors) && !touched.writes_pages
        } else {
            *touched == footprint(op, touched.pages.clone())
        };
        let wanted = if let BlockOp::Read { len, .. } = *op { u64::from(len) } else { 0 };
        proper_op
            && proper_footprint
            && !(self.state.read_only && touched.writes_disk)
            && pending.reply.as_ref().is_none_or(|reply| total_len(&reply.data) == wanted)
    }

    /// Hands the request at `index` out unless an earlier one is in its way.
    fn issue_if_free<M: GuestMemory>(&mut self, index: usize, io: &mut Io<'_, M>) {
        let (earlier, rest) = self.state.requests.split_at_mut(index);
        let request = &mut rest[0];
        if earlier.iter().any(|other| other.footprint.conflicts_with(&request.footprint)) {
            return;
        }
        request.issued = true;
        io.effects.push(Effect::Block(request.request.clone()));
    }

    fn answer<M: GuestMemory>(
        &mut self,
        reply: &Reply,
        status: BlockStatus,
        written: u32,
        io: &mut Io<'_, M>,
    ) -> Result<(), DriverError> {
        if status != BlockStatus::Ok {
            self.state.counters.errors += 1;
        }
        io.memory
            .write_obj(status.byte(), GuestAddress(reply.status))
            .map_err(|_| DriverError::Memory { address: reply.status, len: 1 })?;
        io.queues[0].push_used(io.memory, reply.head, written + 1)
    }

    fn complete<M: GuestMemory>(
        &mut self,
        completion: BlockCompletion,
        io: &mut Io<'_, M>,
    ) -> Result<(), FrontError> {
        let id = completion.id;
        let found = self.state.requests.iter().position(|p| p.issued && p.request.id == id);
        let index = found.ok_or(FrontError::UnknownRequest { id })?;
        if self.must_flush_after(index, completion.status) {
            let id = self.next_id();
            let pending = &mut self.state.requests[index];
            self.state.counters.count(&pending.request.op);
            pending.request = BlockRequest { id, op: BlockOp::Flush };
            io.effects.push(Effect::Block(pending.request.clone()));
            return Ok(());
        }
        let pending = self.state.requests.remove(index);
        let mut outcome = Ok(());
        if let Some(reply) = &pending.reply
            && io.live
        {
            outcome = self.finish(&pending, reply, completion, io);
        }
        for index in index..self.state.requests.len() {
            if !self.state.requests[index].issued {
                self.issue_if_free(index, io);
            }
        }
        outcome?;
        Ok(self.take_requests(io)?)
    }

    /// Without VIRTIO_BLK_F_FLUSH the driver takes a completed write for durable (5.2.6.2).
    fn must_flush_after(&self, index: usize, status: BlockStatus) -> bool {
        let pending = &self.state.requests[index];
        let writes = pending.footprint.writes_disk && pending.request.op != BlockOp::Flush;
        let write_through = self.state.features & F_FLUSH == 0;
        writes && write_through && status == BlockStatus::Ok && pending.reply.is_some()
    }

    fn finish<M: GuestMemory>(
        &mut self,
        pending: &Pending,
        reply: &Reply,
        completion: BlockCompletion,
        io: &mut Io<'_, M>,
    ) -> Result<(), DriverError> {
        let mut status = completion.status;
        let mut written = 0;
        if let BlockOp::Read { len, .. } = &pending.request.op
            && status == BlockStatus::Ok
        {
            // A completion that is short would leave the guest with stale memory.
            if completion.data.len() == *len as usize {
                written = write_buffers(io.memory, &reply.data, &completion.data)? as u32;
            } else {
                status = BlockStatus::IoError;
            }
        }
        if status == BlockStatus::Ok {
            self.state.counters.count(&pending.request.op);
        }
        self.answer(reply, status, written, io)
    }
}

impl<M: GuestMemory> Front<M> for BlockFront {
    fn device_id(&self) -> u16 {
        2
    }

    fn features(&self) -> u64 {
        let common = F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH;
        common | if self.state.read_only { F_RO } else { F_DISCARD | F_WRITE_ZEROES }
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        copy_config(&self.configuration(), offset, data);
    }

    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    fn activate(&mut self, features: u64, _effects: &mut crate::effect::Effects) {
        self.state.features = features;
    }

    fn reset(&mut self) {
        self.state.features = 0;
        // What waits has had no effect. What was handed out is beyond recall.
        self.state.requests.retain(|p| p.issued);
        for pending in &mut self.state.requests {
            pending.reply = None;
        }
    }

    fn notify(&mut self, _queue: usize, io: &mut Io<'_, M>) -> Result<(), DriverError> {
        self.take_requests(io)
    }

    fn event(&mut self, event: DeviceEvent, io: &mut Io<'_, M>) -> Result<(), FrontError> {
        match event {
            DeviceEvent::BlockCompletion(completion) => self.complete(completion, io),
            other => Err(FrontError::WrongDevice { event: other.name(), device_id: 2 }),
        }
    }

    fn outstanding(&self) -> Vec<Effect> {
        let issued = self.state.requests.iter().filter(|p| p.issued);
        issued.map(|p| Effect::Block(p.request.clone())).collect()
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let c = &self.state.counters;
        vec![
            ("read_bytes", c.read_bytes),
            ("read_ops", c.read_ops),
            ("write_bytes", c.write_bytes),
            ("write_ops", c.write_ops),
            ("flush_ops", c.flush_ops),
            ("errors", c.errors),
        ]
    }

    fn save(&self) -> FrontState {
        FrontState::Block(self.state.clone())
    }

    fn restore(&mut self, state: &FrontState) -> Result<(), StateError> {
        let FrontState::Block(state) = state else {
            return Err(StateError::Mismatch { what: "device type" });
        };
        if state.serial.len() != SERIAL_SIZE {
            return Err(StateError::Invalid { what: "serial number" });
        }
        if state.sectors != self.state.sectors {
            return Err(StateError::Mismatch { what: "disk size" });
        }
        if state.read_only != self.state.read_only {
            return Err(StateError::Mismatch { what: "read-only setting" });
        }
        if !self.could_have_taken(state) {
            return Err(StateError::Invalid { what: "disk request" });
        }
        self.state = state.clone();
        Ok(())
    }
}

fn le64(bytes: &[u8]) -> u64 {
    bytes.iter().take(8).rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

/// Bytes a request keeps or will bring.
fn data_len(op: &BlockOp) -> u64 {
    match op {
        BlockOp::Read { len, .. } => u64::from(*len),
        BlockOp::Write { data, .. } => data.len() as u64,
        BlockOp::Flush | BlockOp::Discard { .. } | BlockOp::WriteZeroes { .. } => 0,
    }
}

fn footprint(op: &BlockOp, pages: Vec<u64>) -> Footprint {
    let (sector, sectors, writes_disk) = match op {
        BlockOp::Read { sector, len } => (*sector, u64::from(*len) / SECTOR_SIZE, false),
        BlockOp::Write { sector, data } => (*sector, data.len() as u64 / SECTOR_SIZE, true),
        BlockOp::Flush => (0, 0, false),
        BlockOp::Discard { sector, sectors } | BlockOp::WriteZeroes { sector, sectors, .. } => {
            (*sector, *sectors, true)
        }
    };
    let writes_pages = matches!(op, BlockOp::Read { .. });
    Footprint { sector, sectors, writes_disk, pages, writes_pages }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::*;

    const SECTORS: u64 = 1 << 23;

    fn disk(read_only: bool) -> BlockFront {
        BlockFront::new(&BlockConfig { sectors: SECTORS, read_only, serial: String::new() })
    }

    fn pending(id: u64, op: BlockOp) -> Pending {
        let len = if let BlockOp::Read { len, .. } = op { len } else { 0 };
        let data = if len > 0 { vec![Buffer { address: 0x1000, len }] } else { Vec::new() };
        let footprint = footprint(&op, pages(&data));
        let reply = Some(Reply { head: 0, status: 0, data });
        Pending { request: BlockRequest { id, op }, footprint, issued: true, reply }
    }

    fn write(sector: u64, len: usize) -> BlockOp {
        BlockOp::Write { sector, data: Arc::from(vec![0; len]) }
    }

    /// What a disk says that is to go on with these requests under way.
    fn restored(read_only: bool, requests: Vec<Pending>) -> Result<(), StateError> {
        let mut state = disk(read_only).state;
        state.next_id = 1000;
        state.requests = requests;
        Front::<GuestMemoryMmap<()>>::restore(&mut disk(read_only), &FrontState::Block(state))
    }

    #[test]
    fn requests_that_a_driver_can_have_made_are_restored() {
        let mut flushing = pending(4, write(8, 512));
        flushing.request.op = BlockOp::Flush;
        let mut forgotten = pending(5, BlockOp::Read { sector: 0, len: 512 });
        forgotten.reply = None;
        let requests = vec![
            pending(0, BlockOp::Read { sector: SECTORS - 1, len: 512 }),
            pending(1, write(0, MAX_REQUEST_BYTES as usize)),
            pending(2, BlockOp::Discard { sector: 0, sectors: DISCARD_SECTORS_MAX.into() }),
            pending(999, BlockOp::WriteZeroes { sector: 1, sectors: 1, unmap: true }),
            pending(3, BlockOp::Flush),
            flushing,
            forgotten,
        ];
        assert_eq!(restored(false, requests), Ok(()));
        let full = |id| pending(id, write(0, MAX_REQUEST_BYTES as usize));
        let mut requests: Vec<_> = (0..3).map(full).collect();
        requests.push(pending(3, write(0, MAX_REQUEST_BYTES as usize - 512)));
        requests.push(full(4));
        assert_eq!(restored(false, requests), Ok(()));
        let flushes = |count| (0..count).map(|id| pending(id, BlockOp::Flush)).collect();
        assert_eq!(restored(true, flushes(OUTSTANDING_MAX as u64)), Ok(()));
    }

    #[test]
    fn requests_that_no_driver_can_have_made_are_refused() {
        let impossible = Err(StateError::Invalid { what: "disk request" });
        let zeroes = |sector, sectors| BlockOp::WriteZeroes { sector, sectors, unmap: false };
        let ops = [
            BlockOp::Read { sector: SECTORS, len: 512 },
            BlockOp::Read { sector: u64::MAX, len: 512 },
            BlockOp::Read { sector: 0, len: 0 },
            BlockOp::Read { sector: 0, len: 513 },
            BlockOp::Read { sector: 0, len: u32::MAX - 511 },
            write(SECTORS - 1, 1024),
            write(0, 0),
            write(0, 511),
            write(0, MAX_REQUEST_BYTES as usize + 512),
            BlockOp::Discard { sector: SECTORS - 1, sectors: 2 },
            BlockOp::Discard { sector: 0, sectors: u64::from(DISCARD_SECTORS_MAX) + 1 },
            zeroes(u64::MAX, 1),
            zeroes(0, 0),
            zeroes(0, u64::from(WRITE_ZEROES_SECTORS_MAX) + 1),
        ];
        for op in ops {
            assert_eq!(restored(false, vec![pending(0, op.clone())]), impossible, "{op:?}");
        }
        for op in [write(0, 512), BlockOp::Discard { sector: 0, sectors: 1 }, zeroes(0, 1)] {
            assert_eq!(restored(true, vec![pending(0, op.clone())]), impossible, "{op:?}");
        }
        let flush = |id| pending(id, BlockOp::Flush);
        assert_eq!(restored(false, vec![flush(1000)]), impossible);
        assert_eq!(restored(false, vec![flush(7), flush(7)]), impossible);
        let many = (0..=OUTSTANDING_MAX as u64).map(flush).collect();
        assert_eq!(restored(false, many), impossible);
        let full = |id| pending(id, write(0, MAX_REQUEST_BYTES as usize));
        assert_eq!(restored(false, (0..5).map(full).collect()), impossible);
        let read = || pending(0, BlockOp::Read { sector: 0, len: 512 });
        let mut short = read();
        short.reply = Some(Reply { head: 0, status: 0, data: Vec::new() });
        assert_eq!(restored(false, vec![short]), impossible);
        let mut elsewhere = read();
        elsewhere.footprint.sector = 1;
        assert_eq!(restored(false, vec![elsewhere]), impossible);
    }
}
