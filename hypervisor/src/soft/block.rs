//! Cached blocks: decoded code by guest-physical address.
//!
//! What must hold: no block outlives a change of the bytes it was decoded from. Pages with blocks carry the
//! `CODE` flag; a store there, by the processor or a device, ends in [`Blocks::drop_page`] before the next
//! block runs. Nothing the guest can observe depends on what is cached.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use super::cpu::Cpu;
use super::decode::{self, Decoded};
use super::op::Op;
use super::tlb::HAS_CODE;
use crate::memory::{CODE, PAGE_SIZE};

/// A decoded block.
#[repr(align(64))]
pub(super) struct Block {
    /// What it was decoded from: see [`key`]. [`DEAD`] if dropped.
    pub(super) key: u64,
    /// One for each instruction, and one more if the last two are fused: see [`Decoded`].
    pub(super) ops: Box<[Op]>,
    /// Instructions.
    pub(super) count: u16,
    /// Instructions before the one (fused: the two) that ends the block by its nature.
    pub(super) body: u16,
    /// Bytes of all instructions.
    pub(super) size: u16,
    /// The last instruction ends the block by its nature.
    pub(super) ends: bool,
    /// Where control went from here lately: to the instruction after the block, and elsewhere. A link is a guess,
    /// good if the block it names has the key looked for.
    links: [u32; 2],
}

const DEAD: u64 = u64::MAX;
/// Blocks kept at most: with more, everything is dropped and decoded anew as needed.
const MAX_BLOCKS: usize = 1 << 18;
/// Entries of the jump cache, a power of two.
const JUMPS: usize = 1 << 15;

/// The block at a guest-physical address, decoded in a mode.
#[inline(always)]
pub(super) fn key(physical: u64, mode: u64) -> u64 {
    (physical << 2) | mode
}

/// All blocks. Number 0 is always dead: the guess of those who do not know.
pub(super) struct Blocks {
    blocks: Vec<Block>,
    free: Vec<u32>,
    /// Guesses by hash of the key.
    jumps: Box<[u32; JUMPS]>,
    by_key: HashMap<u64, u32, BuildHasherDefault<KeyHasher>>,
    by_page: HashMap<u64, Vec<u32>, BuildHasherDefault<KeyHasher>>,
}

/// Spreads keys that differ in few bits. (Nothing the guest can observe depends on it.)
#[derive(Default)]
struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    }
}

#[inline(always)]
fn jump_slot(key: u64) -> usize {
    ((key >> 2) ^ (key >> 15)) as usize & (JUMPS - 1)
}

impl Blocks {
    pub(super) fn new() -> Blocks {
        let mut blocks = Blocks {
            blocks: Vec::new(),
            free: Vec::new(),
            jumps: Box::new([0; JUMPS]),
            by_key: HashMap::default(),
            by_page: HashMap::default(),
        };
        blocks.blocks.push(dead());
        blocks
    }

    #[inline(always)]
    pub(super) fn get(&self, number: u32) -> &Block {
        &self.blocks[number as usize]
    }

    /// The block with `key` if the link of block `from` leads there.
    #[inline(always)]
    pub(super) fn linked(&self, from: u32, link: usize, key: u64) -> Option<u32> {
        let number = self.blocks[from as usize].links[link & 1];
        (self.blocks[number as usize].key == key).then_some(number)
    }

    /// The block with `key`, decoded now if need be, and linked to `from`. `None` if its first instruction
    /// crosses the page's end.
    pub(super) fn find(&mut self, cpu: &mut Cpu, from: u32, link: usize, key: u64) -> Option<u32> {
        let slot = jump_slot(key);
        let mut number = self.jumps[slot];
        if self.blocks[number as usize].key != key {
            number = match self.by_key.get(&key) {
                Some(number) => *number,
                None => self.decode(cpu, key)?,
            };
            self.jumps[slot] = number;
        }
        // Not `from` alone: a decode may have dropped everything.
        if let Some(from) = self.blocks.get_mut(from as usize) {
            from.links[link & 1] = number;
        }
        Some(number)
    }

    fn decode(&mut self, cpu: &mut Cpu, key: u64) -> Option<u32> {
        let physical = key >> 2;
        let offset = physical as usize & (PAGE_SIZE - 1);
        let page = physical - offset as u64;
        let host = cpu.ram.host_page(page)?;
        let mut bytes = [0; PAGE_SIZE];
        let bytes = &mut bytes[offset..];
        let from = std::ptr::with_exposed_provenance::<u8>(host + offset);
        // SAFETY: `host` is a page of guest RAM, which stays mapped as long as `cpu.ram`, and the slice ends with the
        // page; only this thread accesses guest memory while the processor runs.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
        let Decoded { ops, count, fused, ends, size } =
            decode::block(bytes, cpu.rip, cpu.bitness(), usize::MAX);
        if ops.is_empty() {
            return None;
        }
        if self.blocks.len() >= MAX_BLOCKS && self.free.is_empty() {
            self.clear(cpu);
        }
        if let Some((tracker, number)) = cpu.ram.tracker(page)
            && tracker.flags(number) & CODE == 0
        {
            tracker.set_code(number);
            cpu.tlb.flag_writes(|written| if written == host { HAS_CODE } else { 0 });
        }
        let tail = if ends { 1 + usize::from(fused) } else { 0 };
        let block = Block {
            key,
            ops: ops.into_boxed_slice(),
            count: count as u16,
            body: (count - tail) as u16,
            size: size as u16,
            ends,
            links: [0; 2],
        };
        let number = match self.free.pop() {
            Some(number) => {
                self.blocks[number as usize] = block;
                number
            }
            None => {
                self.blocks.push(block);
                (self.blocks.len() - 1) as u32
            }
        };
        self.by_key.insert(key, number);
        self.by_page.entry(page).or_default().push(number);
        Some(number)
    }

    /// Drops the blocks of the page at a guest-physical address.
    pub(super) fn drop_page(&mut self, page: u64) {
        for number in self.by_page.remove(&page).unwrap_or_default() {
            self.by_key.remove(&self.blocks[number as usize].key);
            self.blocks[number as usize] = dead();
            self.free.push(number);
        }
    }

    /// Drops everything.
    pub(super) fn clear(&mut self, cpu: &Cpu) {
        for page in self.by_page.keys() {
            if let Some((tracker, number)) = cpu.ram.tracker(*page) {
                tracker.clear_code(number);
            }
        }
        *self = Blocks::new();
    }
}

fn dead() -> Block {
    Block { key: DEAD, ops: Box::default(), count: 0, body: 0, size: 0, ends: false, links: [0; 2] }
}
