//! Segment descriptors and the GDT and LDT they come from (Intel SDM vol. 3, 3.4.5 and 5.2).

use super::cpu::{Cpu, SEGMENT_BIG, SEGMENT_LONG, SEGMENT_PRESENT, Segment, Trap};

/// The privilege bits of a selector.
pub(super) const SELECTOR_RPL: u16 = 3;
/// The table bit of a selector: LDT instead of GDT.
pub(super) const SELECTOR_LDT: u16 = 4;

/// [`Segment::attributes`]: not a system segment.
const CODE_OR_DATA: u16 = 1 << 4;
/// [`Segment::attributes`]: code.
const CODE: u16 = 1 << 3;
/// [`Segment::attributes`] of code: conforming.
const CONFORMING: u16 = 1 << 2;
/// [`Segment::attributes`] of code: readable. Of data: writable.
const READABLE_OR_WRITABLE: u16 = 1 << 1;
/// [`Segment::attributes`]: loaded at least once.
const ACCESSED: u16 = 1;
/// [`Segment::attributes`]: limit in units of 4 KiB.
const GRANULARITY: u16 = 1 << 15;

/// An 8-byte descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Descriptor(pub(super) u64);

impl Descriptor {
    pub(super) fn attributes(self) -> u16 {
        (self.0 >> 40) as u16 & 0xf0ff
    }

    fn has(self, bits: u16) -> bool {
        self.attributes() & bits == bits
    }

    pub(super) fn dpl(self) -> u8 {
        (self.attributes() >> 5 & 3) as u8
    }

    pub(super) fn is_present(self) -> bool {
        self.has(SEGMENT_PRESENT)
    }

    pub(super) fn is_code(self) -> bool {
        self.has(CODE_OR_DATA | CODE)
    }

    /// 64-bit code. L together with D is reserved.
    pub(super) fn is_long_code(self) -> bool {
        self.is_code() && self.attributes() & (SEGMENT_LONG | SEGMENT_BIG) == SEGMENT_LONG
    }

    /// Code for compatibility mode.
    pub(super) fn is_compatibility_code(self) -> bool {
        self.is_code() && !self.has(SEGMENT_LONG)
    }

    pub(super) fn is_conforming(self) -> bool {
        self.is_code() && self.has(CONFORMING)
    }

    pub(super) fn is_writable(self) -> bool {
        self.has(CODE_OR_DATA | READABLE_OR_WRITABLE) && !self.has(CODE)
    }

    pub(super) fn is_readable(self) -> bool {
        self.has(CODE_OR_DATA) && (!self.has(CODE) || self.has(READABLE_OR_WRITABLE))
    }

    /// The type of a system descriptor, `None` for code and data.
    pub(super) fn system_kind(self) -> Option<u8> {
        (!self.has(CODE_OR_DATA)).then_some((self.attributes() & 0xf) as u8)
    }

    pub(super) fn base(self) -> u64 {
        (self.0 >> 16) & 0xff_ffff | (self.0 >> 32) & 0xff00_0000
    }

    /// In bytes.
    pub(super) fn limit(self) -> u32 {
        let limit = (self.0 & 0xffff | (self.0 >> 32) & 0xf_0000) as u32;
        if self.has(GRANULARITY) { limit << 12 | 0xfff } else { limit }
    }

    /// The segment register loaded from this descriptor.
    pub(super) fn segment(self, selector: u16) -> Segment {
        Segment { base: self.base(), limit: self.limit(), selector, attributes: self.attributes() }
    }
}

impl Cpu {
    /// The linear address of the descriptor `selector` names, if its table has it.
    fn descriptor_address(&self, selector: u16, bytes: u64) -> Option<u64> {
        let (base, limit) = if selector & SELECTOR_LDT == 0 {
            (self.gdtr.base, u64::from(self.gdtr.limit))
        } else if self.ldtr.attributes & SEGMENT_PRESENT != 0 {
            (self.ldtr.base, u64::from(self.ldtr.limit))
        } else {
            return None;
        };
        let offset = u64::from(selector & !7);
        (offset + bytes - 1 <= limit).then(|| base.wrapping_add(offset))
    }

    /// Reads a descriptor; `None` if the selector is beyond its table. The selector is not null.
    pub(super) fn find_descriptor(&mut self, selector: u16) -> Result<Option<Descriptor>, Trap> {
        match self.descriptor_address(selector, 8) {
            Some(address) => Ok(Some(Descriptor(self.load_system::<u64>(address)?))),
            None => Ok(None),
        }
    }

    /// Reads a 16-byte system descriptor (TSS, LDT) and its 64-bit base.
    pub(super) fn find_system_descriptor(
        &mut self,
        selector: u16,
    ) -> Result<Option<(Descriptor, u64)>, Trap> {
        let Some(address) = self.descriptor_address(selector, 16) else {
            return Ok(None);
        };
        let low = Descriptor(self.load_system::<u64>(address)?);
        let high = self.load_system::<u64>(address.wrapping_add(8))?;
        Ok(Some((low, low.base() | high << 32)))
    }

    /// Sets the accessed bit of a code or data descriptor, here and in memory.
    pub(super) fn mark_accessed(
        &mut self,
        selector: u16,
        descriptor: Descriptor,
    ) -> Result<Descriptor, Trap> {
        self.set_type_bits(selector, descriptor, ACCESSED)
    }

    /// Sets bits of a descriptor's type, here and in memory.
    pub(super) fn set_type_bits(
        &mut self,
        selector: u16,
        descriptor: Descriptor,
        bits: u16,
    ) -> Result<Descriptor, Trap> {
        let changed = Descriptor(descriptor.0 | u64::from(bits) << 40);
        if changed != descriptor
            && let Some(address) = self.descriptor_address(selector, 8)
        {
            self.store_system::<u8>(address.wrapping_add(5), changed.attributes() as u8)?;
        }
        Ok(changed)
    }
}
