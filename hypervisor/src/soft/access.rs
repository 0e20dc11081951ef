//! Loads and stores by linear address: the TLB hit in line, everything else out of line.
//!
//! What must hold: an access that fails has no effect. One that crosses a page end checks both pages before it touches
//! either.

use super::cpu::{Cpu, RSP, Trap, TrapKind};
use super::op::{ADDRESS_32, LINEAR_32, Op, SEGMENT_NUMBER, Word};
use super::tlb::{Access, Context, Entry, HAS_CODE, NOT_DIRTY, Slot};
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
        if op.segment & (ADDRESS_32 | LINEAR_32) == 0 {
            self.address_64(op)
        } else {
            self.linear(op, self.effective_offset(op))
        }
    }

    /// The linear address of a memory operand that is not computed in 32 bits.
    #[inline(always)]
    fn address_64(&self, op: &Op) -> u64 {
        self.offset_64(op)
            .wrapping_add(self.segments[usize::from(op.segment & SEGMENT_NUMBER)].base)
    }

    #[inline(always)]
    fn offset_64(&self, op: &Op) -> u64 {
        let base = self.gpr[usize::from(op.base & 31)];
        let index = self.gpr[usize::from(op.index & 31)];
        base.wrapping_add(index << (op.scale & 3)).wrapping_add(op.disp as i64 as u64)
    }

    /// The offset LEA computes: the address without a segment base.
    #[inline(always)]
    pub fn effective_offset(&self, op: &Op) -> u64 {
        let offset = self.offset_64(op);
        if op.segment & ADDRESS_32 == 0 { offset } else { offset & 0xffff_ffff }
    }

    /// The linear address of an offset in the segment of the instruction's memory operand.
    #[inline(always)]
    pub fn linear(&self, op: &Op, offset: u64) -> u64 {
        let base = self.segments[usize::from(op.segment & SEGMENT_NUMBER)].base;
        let linear = base.wrapping_add(offset);
        if op.segment & LINEAR_32 == 0 { linear } else { linear & 0xffff_ffff }
    }

    /// Loads the memory operand and gives it to `f`.
    ///
    /// This and its like are what handlers are made of that do nothing after the access that can fail: the miss is a
    /// function of its own in tail position, so that the hit needs no stack frame. `f` must not
    /// capture anything, for the same reason.
    #[inline(always)]
    pub fn load_operand<T: Word>(
        &mut self,
        op: &Op,
        f: impl FnOnce(&mut Cpu, &Op, T),
    ) -> Result<(), Trap> {
        if op.segment & (ADDRESS_32 | LINEAR_32) == 0 {
            let linear = self.address_64(op);
            if let Some(host) = self.read_hit::<T>(linear) {
                // SAFETY: the TLB has the whole value in a page of guest RAM.
                let value = unsafe { host.read_unaligned() };
                f(self, op, value);
                return Ok(());
            }
        }
        self.load_operand_slow(op, f)
    }

    #[cold]
    #[inline(never)]
    fn load_operand_slow<T: Word>(
        &mut self,
        op: &Op,
        f: impl FnOnce(&mut Cpu, &Op, T),
    ) -> Result<(), Trap> {
        let value = self.load::<T>(self.ea(op))?;
        f(self, op, value);
        Ok(())
    }

    /// Loads from `linear` and gives the value to `f`. See [`Cpu::load_operand`].
    #[inline(always)]
    pub fn load_then<T: Word>(
        &mut self,
        op: &Op,
        linear: u64,
        f: impl FnOnce(&mut Cpu, &Op, T) -> Result<(), Trap>,
    ) -> Result<(), Trap> {
        if let Some(host) = self.read_hit::<T>(linear) {
            // SAFETY: the TLB has the whole value in a page of guest RAM.
            let value = unsafe { host.read_unaligned() };
            return f(self, op, value);
        }
        self.load_then_slow(op, linear, f)
    }

    #[cold]
    #[inline(never)]
    fn load_then_slow<T: Word>(
        &mut self,
        op: &Op,
        linear: u64,
        f: impl FnOnce(&mut Cpu, &Op, T) -> Result<(), Trap>,
    ) -> Result<(), Trap> {
        let value = self.load_slow::<T>(self.data_context, linear)?;
        f(self, op, value)
    }

    /// Stores to the memory operand. See [`Cpu::load_operand`].
    #[inline(always)]
    pub fn store_operand<T: Word>(&mut self, op: &Op, value: T) -> Result<(), Trap> {
        if op.segment & (ADDRESS_32 | LINEAR_32) == 0 {
            let linear = self.address_64(op);
            if let Some(host) = self.write_hit::<T>(linear) {
                // SAFETY: the TLB has room for the whole value in a page of guest RAM.
                unsafe { host.write_unaligned(value) };
                return Ok(());
            }
        }
        self.store_operand_slow(op, value)
    }

    #[cold]
    #[inline(never)]
    fn store_operand_slow<T: Word>(&mut self, op: &Op, value: T) -> Result<(), Trap> {
        self.store::<T>(self.ea(op), value)
    }

    /// Replaces the memory operand by `f` of it. See [`Cpu::load_operand`]; raises what a store would raise.
    #[inline(always)]
    pub fn modify_operand<T: Word>(
        &mut self,
        op: &Op,
        f: impl FnOnce(&mut Cpu, &Op, T) -> T,
    ) -> Result<(), Trap> {
        if op.segment & (ADDRESS_32 | LINEAR_32) == 0 {
            let linear = self.address_64(op);
            if let Some(host) = self.write_hit::<T>(linear) {
                // SAFETY: the TLB has the whole value in a page of guest RAM.
                let old = unsafe { host.read_unaligned() };
                let new = f(self, op, old);
                // SAFETY: as above; `f` cannot unmap guest memory.
                unsafe { host.write_unaligned(new) };
                return Ok(());
            }
        }
        self.modify_operand_slow(op, f)
    }

    #[cold]
    #[inline(never)]
    fn modify_operand_slow<T: Word>(
        &mut self,
        op: &Op,
        f: impl FnOnce(&mut Cpu, &Op, T) -> T,
    ) -> Result<(), Trap> {
        self.modify::<T>(self.ea(op), |cpu, old| f(cpu, op, old))
    }

    /// Pushes 64 bits, then calls `f`. See [`Cpu::load_operand`].
    #[inline(always)]
    pub fn push_then(
        &mut self,
        op: &Op,
        value: u64,
        f: impl FnOnce(&mut Cpu, &Op),
    ) -> Result<(), Trap> {
        let rsp = self.gpr[RSP].wrapping_sub(8);
        if let Some(host) = self.write_hit::<u64>(rsp) {
            // SAFETY: the TLB has room for the whole value in a page of guest RAM.
            unsafe { host.write_unaligned(value) };
            self.gpr[RSP] = rsp;
            f(self, op);
            return Ok(());
        }
        self.push_then_slow(op, value, f)
    }

    #[cold]
    #[inline(never)]
    fn push_then_slow(
        &mut self,
        op: &Op,
        value: u64,
        f: impl FnOnce(&mut Cpu, &Op),
    ) -> Result<(), Trap> {
        self.push(value)?;
        f(self, op);
        Ok(())
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
        self.load_in(Context::SUPERVISOR, linear)
    }

    /// Stores as the supervisor whatever the CPL: exception frames, descriptors' accessed bits.
    pub fn store_system<T: Word>(&mut self, linear: u64, value: T) -> Result<(), Trap> {
        self.store_in(Context::SUPERVISOR, linear, value)
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

    /// Where a load at the current privilege finds its value, if the TLB knows.
    #[inline(always)]
    fn read_hit<T: Word>(&self, linear: u64) -> Option<*const T> {
        hit::<T>(self.tlb.read_entry(self.data_context.slot(linear)), linear)
    }

    /// Where a store at the current privilege goes, if the TLB knows.
    #[inline(always)]
    fn write_hit<T: Word>(&self, linear: u64) -> Option<*mut T> {
        let entry = self.tlb.write_entry(self.data_context.slot(linear));
        hit::<T>(entry, linear).map(<*const T>::cast_mut)
    }

    #[inline(always)]
    fn load_in<T: Word>(&mut self, context: Context, linear: u64) -> Result<T, Trap> {
        let entry = self.tlb.read_entry(context.slot(linear));
        match hit::<T>(entry, linear) {
            // SAFETY: the TLB has the whole value in a page of guest RAM.
            Some(host) => Ok(unsafe { host.read_unaligned() }),
            None => self.load_slow(context, linear),
        }
    }

    #[inline(always)]
    fn store_in<T: Word>(&mut self, context: Context, linear: u64, value: T) -> Result<(), Trap> {
        let entry = self.tlb.write_entry(context.slot(linear));
        match hit::<T>(entry, linear) {
            Some(host) => {
                // SAFETY: the TLB has room for the whole value in a page of guest RAM.
                unsafe { host.cast_mut().write_unaligned(value) };
                Ok(())
            }
            None => self.store_slow(context, linear, value),
        }
    }

    /// Replaces a value in memory by `f` of it. Raises what a store would raise, before `f` is called.
    #[inline(always)]
    pub fn modify<T: Word>(
        &mut self,
        linear: u64,
        f: impl FnOnce(&mut Cpu, T) -> T,
    ) -> Result<(), Trap> {
        if let Some(host) = self.write_hit::<T>(linear) {
            // SAFETY: the TLB has the whole value in a page of guest RAM.
            let old = unsafe { host.read_unaligned() };
            let new = f(self, old);
            // SAFETY: as above; `f` cannot unmap guest memory.
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
    fn load_slow<T: Word>(&mut self, context: Context, linear: u64) -> Result<T, Trap> {
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
    fn store_slow<T: Word>(&mut self, context: Context, linear: u64, value: T) -> Result<(), Trap> {
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

    fn probe_write_in(&mut self, context: Context, linear: u64, len: usize) -> Result<(), Trap> {
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
    fn readable(&mut self, context: Context, linear: u64) -> Result<Place, Trap> {
        let slot = context.slot(linear);
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
    fn writable(&mut self, context: Context, linear: u64) -> Result<Place, Trap> {
        let slot = context.slot(linear);
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
    fn write_flagged(&mut self, slot: Slot, host: usize) -> Result<(), Trap> {
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

/// The host address of `linear` if all of a `T` there lies in the page that `entry` maps.
///
/// A tag without flags equals the page of the value's last byte, and the entry's slot is that of its first byte's
/// page; two pages that follow each other have different slots, so both bytes are on the page the entry maps. Entries map
/// whole pages of guest RAM, which stays mapped as long as [`Cpu::ram`].
#[inline(always)]
fn hit<T: Word>(entry: Entry, linear: u64) -> Option<*const T> {
    if entry.tag == linear.wrapping_add(T::BYTES as u64 - 1) & PAGE_MASK {
        let host = linear.wrapping_add(entry.target) as usize;
        Some(std::ptr::with_exposed_provenance::<T>(host))
    } else {
        None
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
