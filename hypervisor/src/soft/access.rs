//! Loads and stores by linear address: the TLB hit in line, everything else out of line.
//!
//! What must hold: an access that fails has no effect. One that crosses a page end checks both pages before it touches
//! either.

use super::cpu::{Cpu, RSP, Trap, TrapKind};
use super::op::{ADDRESS_32, LINEAR_32, Op, SEGMENT_NUMBER, Word};
use super::tlb::{self, Access, HAS_CODE, NOT_DIRTY, SUPERVISOR};
use crate::memory::{CODE, PAGE_SIZE};

const PAGE_MASK: u64 = !(PAGE_SIZE as u64 - 1);

/// Where an access of one or two pages ends up.
struct Places {
    /// Bytes on the first page.
    first: usize,
    low: Place,
    high: Option<Place>,
}

/// Where an access ends up.
#[derive(Clone, Copy)]
enum Place {
    /// Host address.
    Ram(usize),
    /// Guest-physical address of a device.
    Device(u64),
}

impl Cpu {
    /// The linear address of the memory operand. Whether it is canonical is checked by the access.
    #[inline(always)]
    pub fn ea(&self, op: &Op) -> u64 {
        let base = self.gpr[usize::from(op.base & 31)];
        let index = self.gpr[usize::from(op.index & 31)];
        let address =
            base.wrapping_add(index << (op.scale & 3)).wrapping_add(op.disp as i64 as u64);
        if op.segment == 0 { address } else { self.segmented(op, address) }
    }

    /// The offset LEA computes: the address without a segment base.
    #[inline(always)]
    pub fn effective_offset(&self, op: &Op) -> u64 {
        let base = self.gpr[usize::from(op.base & 31)];
        let index = self.gpr[usize::from(op.index & 31)];
        let address =
            base.wrapping_add(index << (op.scale & 3)).wrapping_add(op.disp as i64 as u64);
        if op.segment & ADDRESS_32 == 0 { address } else { address & 0xffff_ffff }
    }

    #[inline(never)]
    fn segmented(&self, op: &Op, address: u64) -> u64 {
        let address = if op.segment & ADDRESS_32 == 0 { address } else { address & 0xffff_ffff };
        self.linear(op, address)
    }

    /// The linear address of an offset in the segment of the instruction's memory operand.
    #[inline]
    pub fn linear(&self, op: &Op, offset: u64) -> u64 {
        let number = usize::from(op.segment & SEGMENT_NUMBER);
        let linear = match number.checked_sub(1).and_then(|number| self.segments.get(number)) {
            Some(segment) => segment.base.wrapping_add(offset),
            None => offset,
        };
        if op.segment & LINEAR_32 == 0 { linear } else { linear & 0xffff_ffff }
    }

    /// Loads from a linear address at the current privilege.
    #[inline(always)]
    pub fn load<T: Word>(&mut self, linear: u64) -> Result<T, Trap> {
        self.load_in(self.data_context, linear)
    }

    /// Stores to a linear address at the current privilege.
    #[inline(always)]
    pub fn store<T: Word>(&mut self, linear: u64, value: T) -> Result<(), Trap> {
        self.store_in(self.data_context, linear, value)
    }

    /// Loads as the supervisor whatever the CPL: descriptor tables, the TSS.
    pub fn load_system<T: Word>(&mut self, linear: u64) -> Result<T, Trap> {
        self.load_in(SUPERVISOR, linear)
    }

    /// Stores as the supervisor whatever the CPL: exception frames, descriptors' accessed bits.
    pub fn store_system<T: Word>(&mut self, linear: u64, value: T) -> Result<(), Trap> {
        self.store_in(SUPERVISOR, linear, value)
    }

    /// Raises what a store of `len` bytes would raise, without storing.
    pub fn probe_write(&mut self, linear: u64, len: usize) -> Result<(), Trap> {
        self.probe_write_in(self.data_context, linear, len)
    }

    /// Pushes 64 bits. RSP is unchanged if that fails.
    #[inline(always)]
    pub fn push(&mut self, value: u64) -> Result<(), Trap> {
        let rsp = self.gpr[RSP].wrapping_sub(8);
        self.store::<u64>(rsp, value)?;
        self.gpr[RSP] = rsp;
        Ok(())
    }

    /// Pops 64 bits. RSP is unchanged if that fails.
    #[inline(always)]
    pub fn pop(&mut self) -> Result<u64, Trap> {
        let value = self.load::<u64>(self.gpr[RSP])?;
        self.gpr[RSP] = self.gpr[RSP].wrapping_add(8);
        Ok(value)
    }

    #[inline(always)]
    fn load_in<T: Word>(&mut self, context: usize, linear: u64) -> Result<T, Trap> {
        let entry = self.tlb.read_entry(tlb::slot(context, linear));
        if entry.tag == linear.wrapping_add(T::BYTES as u64 - 1) & PAGE_MASK {
            let host = linear.wrapping_add(entry.target) as usize;
            // SAFETY: a tag without flags equals the page of the access's last byte, and its slot is that of the first
            // byte's page, so both are the page the entry maps; entries map whole pages of guest RAM, which stays
            // mapped as long as `self.ram`.
            Ok(unsafe { std::ptr::with_exposed_provenance::<T>(host).read_unaligned() })
        } else {
            self.load_slow(context, linear)
        }
    }

    #[inline(always)]
    fn store_in<T: Word>(&mut self, context: usize, linear: u64, value: T) -> Result<(), Trap> {
        let entry = self.tlb.write_entry(tlb::slot(context, linear));
        if entry.tag == linear.wrapping_add(T::BYTES as u64 - 1) & PAGE_MASK {
            let host = linear.wrapping_add(entry.target) as usize;
            // SAFETY: as in `load_in`.
            unsafe { std::ptr::with_exposed_provenance_mut::<T>(host).write_unaligned(value) };
            Ok(())
        } else {
            self.store_slow(context, linear, value)
        }
    }

    /// Replaces a value in memory by `f` of it. Raises what a store would raise, before `f` is called.
    #[inline(always)]
    pub fn modify<T: Word>(
        &mut self,
        linear: u64,
        f: impl FnOnce(&mut Cpu, T) -> T,
    ) -> Result<(), Trap> {
        let entry = self.tlb.write_entry(tlb::slot(self.data_context, linear));
        if entry.tag == linear.wrapping_add(T::BYTES as u64 - 1) & PAGE_MASK {
            let host = linear.wrapping_add(entry.target) as usize;
            let host = std::ptr::with_exposed_provenance_mut::<T>(host);
            // SAFETY: as in `load_in`.
            let old = unsafe { host.read_unaligned() };
            let new = f(self, old);
            // SAFETY: as in `load_in`; `f` cannot unmap guest memory.
            unsafe { host.write_unaligned(new) };
            Ok(())
        } else {
            let places = self.modify_slow(linear, T::BYTES)?;
            let mut bytes = [0; 16];
            self.read_places(&places, &mut bytes[..T::BYTES]);
            let new = f(self, T::from_bytes(bytes)).to_bytes();
            self.write_places(&places, &new[..T::BYTES]);
            Ok(())
        }
    }

    #[cold]
    #[inline(never)]
    fn modify_slow(&mut self, linear: u64, len: usize) -> Result<Places, Trap> {
        let first = len.min(PAGE_SIZE - (linear as usize & (PAGE_SIZE - 1)));
        let low = self.writable(self.data_context, linear)?;
        let high = if first < len {
            Some(self.writable(self.data_context, linear.wrapping_add(first as u64))?)
        } else {
            None
        };
        Ok(Places { first, low, high })
    }

    #[cold]
    #[inline(never)]
    fn read_places(&mut self, places: &Places, bytes: &mut [u8]) {
        let (low, high) = bytes.split_at_mut(places.first);
        self.read_place(places.low, low);
        if let Some(place) = places.high {
            self.read_place(place, high);
        }
    }

    #[cold]
    #[inline(never)]
    fn write_places(&mut self, places: &Places, bytes: &[u8]) {
        let (low, high) = bytes.split_at(places.first);
        self.write_place(places.low, low);
        if let Some(place) = places.high {
            self.write_place(place, high);
        }
    }

    /// The host address of `linear` if a load there reads RAM; for string instructions, which go on to the page's end.
    pub(super) fn readable_ram(&mut self, linear: u64) -> Result<Option<usize>, Trap> {
        Ok(match self.readable(self.data_context, linear)? {
            Place::Ram(host) => Some(host),
            Place::Device(_) => None,
        })
    }

    /// The same for a store.
    pub(super) fn writable_ram(&mut self, linear: u64) -> Result<Option<usize>, Trap> {
        Ok(match self.writable(self.data_context, linear)? {
            Place::Ram(host) => Some(host),
            Place::Device(_) => None,
        })
    }

    #[cold]
    #[inline(never)]
    fn load_slow<T: Word>(&mut self, context: usize, linear: u64) -> Result<T, Trap> {
        let mut bytes = [0; 16];
        let first = PAGE_SIZE - (linear as usize & (PAGE_SIZE - 1));
        if first >= T::BYTES {
            let place = self.readable(context, linear)?;
            self.read_place(place, &mut bytes[..T::BYTES]);
        } else {
            let low = self.readable(context, linear)?;
            let high = self.readable(context, linear.wrapping_add(first as u64))?;
            self.read_place(low, &mut bytes[..first]);
            self.read_place(high, &mut bytes[first..T::BYTES]);
        }
        Ok(T::from_bytes(bytes))
    }

    #[cold]
    #[inline(never)]
    fn store_slow<T: Word>(&mut self, context: usize, linear: u64, value: T) -> Result<(), Trap> {
        let bytes = value.to_bytes();
        let first = PAGE_SIZE - (linear as usize & (PAGE_SIZE - 1));
        if first >= T::BYTES {
            let place = self.writable(context, linear)?;
            self.write_place(place, &bytes[..T::BYTES]);
        } else {
            let low = self.writable(context, linear)?;
            let high = self.writable(context, linear.wrapping_add(first as u64))?;
            self.write_place(low, &bytes[..first]);
            self.write_place(high, &bytes[first..T::BYTES]);
        }
        Ok(())
    }

    fn probe_write_in(&mut self, context: usize, linear: u64, len: usize) -> Result<(), Trap> {
        let mut address = linear;
        let mut left = len;
        while left > 0 {
            self.writable(context, address)?;
            let step = left.min(PAGE_SIZE - (address as usize & (PAGE_SIZE - 1)));
            address = address.wrapping_add(step as u64);
            left -= step;
        }
        Ok(())
    }

    /// Where a load at `linear` reads from.
    fn readable(&mut self, context: usize, linear: u64) -> Result<Place, Trap> {
        let slot = tlb::slot(context, linear);
        let entry = self.tlb.read_entry(slot);
        if entry.tag == linear & PAGE_MASK {
            return Ok(Place::Ram(linear.wrapping_add(entry.target) as usize));
        }
        let found = self.walk(linear, Access::Read, context)?;
        let Some(host) = self.ram.host_page(found.physical) else {
            return self.device(found.physical);
        };
        let page = linear & PAGE_MASK;
        let target = (host as u64).wrapping_sub(page);
        self.tlb.fill(Access::Read, slot, page, target, 0, found.kind);
        Ok(Place::Ram(linear.wrapping_add(target) as usize))
    }

    /// Where a store to `linear` writes to. The page is marked dirty; decoded code on it is dropped.
    fn writable(&mut self, context: usize, linear: u64) -> Result<Place, Trap> {
        let slot = tlb::slot(context, linear);
        let page = linear & PAGE_MASK;
        let mut entry = self.tlb.write_entry(slot);
        if entry.tag & !(NOT_DIRTY | HAS_CODE) != page {
            let found = self.walk(linear, Access::Write, context)?;
            let Some(host) = self.ram.host_page(found.physical) else {
                return self.device(found.physical);
            };
            let target = (host as u64).wrapping_sub(page);
            self.tlb.fill(Access::Write, slot, page, target, NOT_DIRTY | HAS_CODE, found.kind);
            entry = self.tlb.write_entry(slot);
        }
        let host = linear.wrapping_add(entry.target) as usize;
        if entry.tag & (NOT_DIRTY | HAS_CODE) != 0 {
            self.write_flagged(slot, host)?;
        }
        Ok(Place::Ram(host))
    }

    /// A store to a page that may not be in the dirty set, or may hold decoded code.
    fn write_flagged(&mut self, slot: usize, host: usize) -> Result<(), Trap> {
        if let Some((physical, tracker, number)) = self.ram.tracker_of_host(host) {
            if tracker.flags(number) & CODE != 0 {
                // The code may be that of the running block.
                if !self.single_step {
                    self.trap = TrapKind::SingleStep;
                    return Err(Trap);
                }
                tracker.clear_code(number);
                self.overwritten.push(physical);
            }
            tracker.set_dirty(number);
        }
        self.tlb.clear_write_flags(slot, NOT_DIRTY | HAS_CODE);
        Ok(())
    }

    fn device(&mut self, physical: u64) -> Result<Place, Trap> {
        if self.single_step {
            Ok(Place::Device(physical))
        } else {
            self.trap = TrapKind::SingleStep;
            Err(Trap)
        }
    }

    fn read_place(&mut self, place: Place, bytes: &mut [u8]) {
        match place {
            Place::Ram(host) => {
                let from = std::ptr::with_exposed_provenance::<u8>(host);
                // SAFETY: `readable` found this host address in a page of guest RAM, and the caller asks for no
                // byte beyond that page.
                unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
            }
            Place::Device(physical) => {
                for (start, len) in device_pieces(physical, bytes.len()) {
                    let piece = &mut bytes[start..start + len];
                    self.device_read(physical + start as u64, piece);
                }
            }
        }
    }

    fn write_place(&mut self, place: Place, bytes: &[u8]) {
        match place {
            Place::Ram(host) => {
                let to = std::ptr::with_exposed_provenance_mut::<u8>(host);
                // SAFETY: as in `read_place`.
                unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
            }
            Place::Device(physical) => {
                for (start, len) in device_pieces(physical, bytes.len()) {
                    self.device_write(physical + start as u64, &bytes[start..start + len]);
                }
            }
        }
    }

    fn device_read(&mut self, physical: u64, data: &mut [u8]) {
        self.attention = true;
        let tsc = self.anchor.tsc_at(self.retired);
        if !self.irqchip.mmio_read(physical, data, tsc) {
            data.fill(0xff);
            self.with_bus(|bus, cx| bus.mmio_read(physical, data, cx));
        }
    }

    fn device_write(&mut self, physical: u64, data: &[u8]) {
        self.attention = true;
        let tsc = self.anchor.tsc_at(self.retired);
        if !self.irqchip.mmio_write(physical, data, tsc) {
            self.with_bus(|bus, cx| bus.mmio_write(physical, data, cx));
        }
    }
}

/// Cuts an access into pieces a device understands: 1, 2, 4 or 8 bytes.
fn device_pieces(_physical: u64, len: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut start = 0;
    std::iter::from_fn(move || {
        let left = len - start;
        let piece = [8, 4, 2, 1].into_iter().find(|piece| *piece <= left)?;
        start += piece;
        Some((start - piece, piece))
    })
}
