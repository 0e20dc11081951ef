//! Queues as front halves use them: descriptor chains parsed and bounded, completions pushed.
//!
//! [`virtio_queue::Queue`] does the ring arithmetic. This wrapper adds what a hostile driver makes
//! necessary: a chain is walked once, with a limit, into a [`Chain`] that says truthfully what it holds;
//! a chain that loops, runs out of its table or mixes its directions is a [`DriverError`]. It also
//! notes which queues got completions, so that the transport raises one interrupt per queue and call.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use crate::front::{DriverError, StateError};

/// VIRTQ_AVAIL_F_NO_INTERRUPT: the driver polls (virtio 1.2, 2.7.7).
const AVAIL_NO_INTERRUPT: u16 = 1;

/// A piece of guest memory named by a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Buffer {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes; never 0.
    pub len: u32,
}

/// A descriptor chain, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Index of its first descriptor: what goes back into the used ring.
    pub head: u16,
    /// What the device reads.
    pub readable: Vec<Buffer>,
    /// What the device writes.
    pub writable: Vec<Buffer>,
}

impl Chain {
    /// Bytes for the device to read.
    #[must_use]
    pub fn readable_len(&self) -> u64 {
        total_len(&self.readable)
    }

    /// Bytes for the device to write.
    #[must_use]
    pub fn writable_len(&self) -> u64 {
        total_len(&self.writable)
    }
}

/// Sum of the lengths. At most a queue's size of buffers, so the sum cannot overflow.
#[must_use]
pub fn total_len(buffers: &[Buffer]) -> u64 {
    buffers.iter().map(|b| u64::from(b.len)).sum()
}

/// The part of `buffers` from byte `start`, `len` bytes long (less if they end before).
#[must_use]
pub fn slice_buffers(buffers: &[Buffer], start: u64, len: u64) -> Vec<Buffer> {
    let (mut skip, mut left) = (start, len);
    let mut out = Vec::new();
    for buffer in buffers {
        let size = u64::from(buffer.len);
        if skip >= size {
            skip -= size;
            continue;
        }
        let take = (size - skip).min(left);
        if take == 0 {
            break;
        }
        // A wrapping address is no memory: the access to it fails.
        out.push(Buffer {
            address: buffer.address.saturating_add(skip),
            len: u32::try_from(take).unwrap_or(u32::MAX),
        });
        left -= take;
        skip = 0;
    }
    out
}

/// Fills `data` from `buffers`, which hold at least as much.
///
/// # Errors
/// [`DriverError::Memory`] if a buffer is not in RAM or the buffers are too short.
pub fn read_buffers<M: GuestMemory>(
    memory: &M,
    buffers: &[Buffer],
    data: &mut [u8],
) -> Result<(), DriverError> {
    let mut done = 0;
    for buffer in buffers {
        if done == data.len() {
            break;
        }
        let take = (buffer.len as usize).min(data.len() - done);
        memory
            .read_slice(&mut data[done..done + take], GuestAddress(buffer.address))
            .map_err(|_| DriverError::Memory { address: buffer.address, len: buffer.len })?;
        done += take;
    }
    if done < data.len() {
        return Err(DriverError::ShortChain);
    }
    Ok(())
}

/// Writes as much of `data` into `buffers` as fits and says how much that was.
///
/// # Errors
/// [`DriverError::Memory`] if a buffer is not in RAM. What came before it has been written.
pub fn write_buffers<M: GuestMemory>(
    memory: &M,
    buffers: &[Buffer],
    data: &[u8],
) -> Result<usize, DriverError> {
    let mut done = 0;
    for buffer in buffers {
        if done == data.len() {
            break;
        }
        let take = (buffer.len as usize).min(data.len() - done);
        memory
            .write_slice(&data[done..done + take], GuestAddress(buffer.address))
            .map_err(|_| DriverError::Memory { address: buffer.address, len: buffer.len })?;
        done += take;
    }
    Ok(done)
}

/// Whether all of `buffers` lies in RAM.
pub fn in_memory<M: GuestMemory>(memory: &M, buffers: &[Buffer], access: Permissions) -> bool {
    buffers.iter().all(|b| memory.check_range(GuestAddress(b.address), b.len as usize, access))
}

/// One queue of a device.
#[derive(Debug)]
pub struct VirtQueue {
    queue: Queue,
    /// Completions were pushed since the transport last asked.
    used_added: bool,
}

impl VirtQueue {
    /// A queue that is not enabled, of at most `max_size` entries: a power of two, up to 32768.
    pub(crate) fn new(max_size: u16) -> Self {
        let queue = Queue::new(max_size).expect("queue sizes of devices are powers of two");
        Self { queue, used_added: false }
    }

    /// The size the driver chose.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the next available chain, if there is one.
    ///
    /// # Errors
    /// A [`DriverError`] if the ring or the chain break the rules of virtio.
    pub fn pop<M: GuestMemory>(&mut self, memory: &M) -> Result<Option<Chain>, DriverError> {
        if !self.queue.ready() {
            return Ok(None);
        }
        let limit = usize::from(self.queue.max_size());
        let mut available = self.queue.iter(memory).map_err(|_| DriverError::AvailableRing)?;
        let Some(descriptors) = available.next() else { return Ok(None) };
        let head = descriptors.head_index();
        let mut chain = Chain { head, readable: Vec::new(), writable: Vec::new() };
        let mut walked = 0;
        let mut ended = false;
        for descriptor in descriptors {
            walked += 1;
            // Virtio 1.2, 2.7.5.3.1: no chain is longer than the queue, indirect or not.
            if walked > limit {
                return Err(DriverError::LongChain { head });
            }
            ended = !descriptor.has_next();
            if descriptor.len() > 0 {
                let buffer = Buffer { address: descriptor.addr().0, len: descriptor.len() };
                if descriptor.is_write_only() {
                    chain.writable.push(buffer);
                } else if chain.writable.is_empty() {
                    chain.readable.push(buffer);
                } else {
                    // 2.7.4.2: all readable descriptors come before the writable ones.
                    return Err(DriverError::MixedChain { head });
                }
            }
        }
        // The iterator stops silently at a loop, a bad index or a bad table.
        if !ended {
            return Err(DriverError::BrokenChain { head });
        }
        Ok(Some(chain))
    }

    /// Puts the last `count` popped chains back.
    pub fn undo_pop(&mut self, count: u16) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(count));
    }

    /// Gives a chain back to the driver, `len` bytes of its writable part written.
    ///
    /// # Errors
    /// [`DriverError::BrokenChain`] if `head` is no descriptor of this queue, [`DriverError::UsedRing`]
    /// if the ring is not in RAM.
    pub fn push_used<M: GuestMemory>(
        &mut self,
        memory: &M,
        head: u16,
        len: u32,
    ) -> Result<(), DriverError> {
        if head >= self.queue.size() {
            return Err(DriverError::BrokenChain { head });
        }
        self.queue.add_used(memory, head, len).map_err(|_| DriverError::UsedRing)?;
        self.used_added = true;
        Ok(())
    }

    /// Asks the driver to notify when it makes the next chain available. With VIRTIO_F_EVENT_IDX it
    /// does not unless asked again each time; without, it always does.
    ///
    /// # Errors
    /// [`DriverError::UsedRing`] if the ring is not in RAM.
    pub fn request_notify<M: GuestMemory>(&mut self, memory: &M) -> Result<(), DriverError> {
        if self.queue.ready() && self.queue.event_idx_enabled() {
            self.queue.enable_notification(memory).map_err(|_| DriverError::UsedRing)?;
        }
        Ok(())
    }

    /// Whether the driver is to be interrupted for the completions pushed since the last call.
    pub(crate) fn take_interrupt<M: GuestMemory>(
        &mut self,
        memory: &M,
    ) -> Result<bool, DriverError> {
        if !std::mem::take(&mut self.used_added) {
            return Ok(false);
        }
        if self.queue.event_idx_enabled() {
            return self.queue.needs_notification(memory).map_err(|_| DriverError::AvailableRing);
        }
        let flags = memory
            .load::<u16>(GuestAddress(self.queue.avail_ring()), Ordering::Acquire)
            .map_err(|_| DriverError::AvailableRing)?;
        Ok(u16::from_le(flags) & AVAIL_NO_INTERRUPT == 0)
    }

    pub(crate) fn max_size(&self) -> u16 {
        self.queue.max_size()
    }

    pub(crate) fn ready(&self) -> bool {
        self.queue.ready()
    }

    pub(crate) fn set_event_idx(&mut self, enabled: bool) {
        self.queue.set_event_idx(enabled);
    }

    /// Starts the queue on the rings at these addresses.
    ///
    /// # Errors
    /// [`DriverError::RingAddress`] if one is misaligned or not in RAM.
    pub(crate) fn enable<M: GuestMemory>(
        &mut self,
        memory: &M,
        rings: &RingAddresses,
    ) -> Result<(), DriverError> {
        let size = u64::from(rings.size);
        // Virtio 1.2, 2.7: 16 bytes a descriptor; 2 and 8 bytes a ring entry, 6 bytes around them.
        let ranges =
            [(rings.desc, 16 * size), (rings.driver, 6 + 2 * size), (rings.device, 6 + 8 * size)];
        for (address, len) in ranges {
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            if address == 0
                || !memory.check_range(GuestAddress(address), len, Permissions::ReadWrite)
            {
                return Err(DriverError::RingAddress { address });
            }
        }
        let queue = &mut self.queue;
        let set = queue
            .try_set_size(rings.size)
            .and_then(|()| queue.try_set_desc_table_address(GuestAddress(rings.desc)))
            .and_then(|()| queue.try_set_avail_ring_address(GuestAddress(rings.driver)))
            .and_then(|()| queue.try_set_used_ring_address(GuestAddress(rings.device)));
        set.map_err(|_| DriverError::RingAddress { address: rings.desc })?;
        queue.set_ready(true);
        Ok(())
    }

    pub(crate) fn reset(&mut self) {
        self.queue.reset();
        self.used_added = false;
    }

    pub(crate) fn save(&self) -> QueueState {
        let s = self.queue.state();
        QueueState {
            max_size: s.max_size,
            size: s.size,
            ready: s.ready,
            event_idx: s.event_idx_enabled,
            next_avail: s.next_avail,
            next_used: s.next_used,
            desc: s.desc_table,
            driver: s.avail_ring,
            device: s.used_ring,
        }
    }

    pub(crate) fn restore(&mut self, state: &QueueState) -> Result<(), StateError> {
        if state.max_size != self.queue.max_size() {
            return Err(StateError::Mismatch { what: "queue size" });
        }
        self.queue = Queue::try_from(virtio_queue::QueueState {
            max_size: state.max_size,
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx_enabled: state.event_idx,
            size: state.size,
            ready: state.ready,
            desc_table: state.desc,
            avail_ring: state.driver,
            used_ring: state.device,
        })
        .map_err(|_| StateError::Invalid { what: "queue" })?;
        self.used_added = false;
        Ok(())
    }
}

/// Where the driver put a queue's three parts, as it wrote them into the registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RingAddresses {
    /// Entries.
    pub size: u16,
    /// Descriptor table.
    pub desc: u64,
    /// Available ring.
    pub driver: u64,
    /// Used ring.
    pub device: u64,
}

/// A saved queue. Between two calls to a device nothing else about a queue is remembered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    max_size: u16,
    size: u16,
    ready: bool,
    event_idx: bool,
    next_avail: u16,
    next_used: u16,
    desc: u64,
    driver: u64,
    device: u64,
}

/// The guest pages `buffers` touch, ascending, without repeats.
#[must_use]
pub fn pages(buffers: &[Buffer]) -> Vec<u64> {
    let mut pages = Vec::new();
    for buffer in buffers {
        let last = buffer.address.saturating_add(u64::from(buffer.len.max(1)) - 1);
        pages.extend(buffer.address >> 12..=last >> 12);
    }
    pages.sort_unstable();
    pages.dedup();
    pages
}
