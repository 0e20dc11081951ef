//! Makes encodings of an instruction with random operands, and says what its operands must hold.

use iced_x86::{
    Code, Decoder, DecoderOptions, Encoder, Instruction, Mnemonic, OpCodeOperandKind, OpKind,
    Register,
};

use crate::layout::*;
use crate::values::Random;

/// Numbers of general registers in the image.
pub const RAX: usize = 0;
pub const RCX: usize = 1;
pub const RDX: usize = 2;
pub const RBX: usize = 3;
pub const RSP: usize = 4;
pub const RBP: usize = 5;
pub const RSI: usize = 6;
pub const RDI: usize = 7;

/// An instruction ready to run.
pub struct Form {
    /// As decoded from `bytes`.
    pub instruction: Instruction,
    /// Its encoding.
    pub bytes: Vec<u8>,
    /// Where it is put.
    pub address: u64,
    /// Where its branch goes, if it is one.
    pub target: u64,
    /// The GS base.
    pub gs_base: u64,
    /// General registers that must have a certain value.
    pub fixed: Vec<(usize, u64)>,
    /// Memory that must have certain contents.
    pub patches: Vec<(u64, Vec<u8>)>,
    /// Address of the explicit memory operand.
    pub memory: Option<u64>,
}

impl Form {
    /// The memory operand's address if `len` bytes there are mapped.
    pub fn mapped_memory(&self, len: usize) -> Option<u64> {
        self.memory.filter(|at| is_scratch(*at, len))
    }
}

/// Whether all of an operand lies in the scratch pages.
pub fn is_scratch(address: u64, len: usize) -> bool {
    address >= SCRATCH && address + len as u64 <= SCRATCH + SCRATCH_BYTES as u64
}

/// A form of `code`; `None` if the random choices do not go together.
pub fn form(code: Code, random: &mut Random) -> Option<Form> {
    let mut builder = Builder::new(code, random);
    for operand in 0..code.op_code().op_count() {
        builder.operand(operand)?;
    }
    builder.implicit()?;
    builder.finish()
}

struct Builder<'a> {
    code: Code,
    instruction: Instruction,
    random: &'a mut Random,
    address: u64,
    target: u64,
    gs_base: u64,
    fixed: Vec<(usize, u64)>,
    patches: Vec<(u64, Vec<u8>)>,
    memory: Option<u64>,
}

impl<'a> Builder<'a> {
    fn new(code: Code, random: &'a mut Random) -> Self {
        let mut instruction = Instruction::default();
        instruction.set_code(code);
        // Sometimes across the two code pages.
        let address = if random.percent(6) {
            CODE + 0x1000 - random.below(15)
        } else {
            CODE + 0x400 + random.below(64)
        };
        // Ahead or behind, near enough for eight bits, apart from the instruction.
        let target = if random.percent(50) {
            address + 40 + random.below(60)
        } else {
            address - 20 - random.below(60)
        };
        let gs_base = random.pick(&[0, 0x1000, 0x7fff_1234_5678, SCRATCH, SCRATCH + 0x777]);
        Self {
            code,
            instruction,
            random,
            address,
            target,
            gs_base,
            fixed: Vec::new(),
            patches: Vec::new(),
            memory: None,
        }
    }

    fn register(&mut self, operand: u32, register: Register) {
        self.instruction.set_op_kind(operand, OpKind::Register);
        self.instruction.set_op_register(operand, register);
    }

    fn immediate(&mut self, operand: u32, kind: OpKind, value: u64) -> Option<()> {
        self.instruction.set_op_kind(operand, kind);
        self.instruction.try_set_immediate_u64(operand, value).ok()
    }

    fn general(&mut self, operand: u32, bytes: usize) {
        let number = self.random.below(16) as usize;
        let register = match bytes {
            1 if self.random.percent(20) => {
                self.random.pick(&[Register::AH, Register::CH, Register::DH, Register::BH])
            }
            1 => {
                const LOW: [Register; 16] = [
                    Register::AL,
                    Register::CL,
                    Register::DL,
                    Register::BL,
                    Register::SPL,
                    Register::BPL,
                    Register::SIL,
                    Register::DIL,
                    Register::R8L,
                    Register::R9L,
                    Register::R10L,
                    Register::R11L,
                    Register::R12L,
                    Register::R13L,
                    Register::R14L,
                    Register::R15L,
                ];
                LOW[number]
            }
            2 => Register::AX + number as u32,
            4 => Register::EAX + number as u32,
            _ => Register::RAX + number as u32,
        };
        self.register(operand, register);
    }

    fn simd(&mut self, operand: u32, first: Register, count: u64) {
        let register = first + self.random.below(count) as u32;
        self.register(operand, register);
    }

    fn operand(&mut self, operand: u32) -> Option<()> {
        use OpCodeOperandKind as K;
        let kind = self.code.op_code().op_kind(operand);
        let or_memory = self.random.percent(60);
        match kind {
            K::mem => self.memory_operand(operand)?,
            K::r8_or_mem
            | K::r16_or_mem
            | K::r32_or_mem
            | K::r64_or_mem
            | K::mm_or_mem
            | K::xmm_or_mem
                if or_memory =>
            {
                self.memory_operand(operand)?;
            }
            K::r8_or_mem | K::r8_reg | K::r8_opcode => self.general(operand, 1),
            K::r16_or_mem | K::r16_reg | K::r16_opcode | K::r16_rm => self.general(operand, 2),
            K::r32_or_mem | K::r32_reg | K::r32_opcode | K::r32_rm => self.general(operand, 4),
            K::r64_or_mem | K::r64_reg | K::r64_opcode | K::r64_rm => self.general(operand, 8),
            K::mm_or_mem | K::mm_reg | K::mm_rm => self.simd(operand, Register::MM0, 8),
            K::xmm_or_mem | K::xmm_reg | K::xmm_rm => self.simd(operand, Register::XMM0, 16),
            K::st0 => self.register(operand, Register::ST0),
            K::sti_opcode => self.simd(operand, Register::ST0, 8),
            K::al => self.register(operand, Register::AL),
            K::cl => self.register(operand, Register::CL),
            K::ax => self.register(operand, Register::AX),
            K::dx => self.register(operand, Register::DX),
            K::eax => self.register(operand, Register::EAX),
            K::rax => self.register(operand, Register::RAX),
            K::cr_reg => {
                let register = self.random.pick(&[0, 2, 3, 4, 8]);
                self.register(operand, Register::CR0 + register);
            }
            K::dr_reg => {
                let register = self.random.pick(&[0, 1, 2, 3, 6, 7]);
                self.register(operand, Register::DR0 + register);
            }
            K::imm8 => {
                let value = self.immediate_byte(operand);
                let kind = if operand > 0 && self.code.op_code().op_kind(operand - 1) == K::imm16 {
                    OpKind::Immediate8_2nd
                } else {
                    OpKind::Immediate8
                };
                self.immediate(operand, kind, value)?;
            }
            K::imm8_const_1 => self.immediate(operand, OpKind::Immediate8, 1)?,
            K::imm8sex16 => {
                let value = self.random.integer() as i8 as u64;
                self.immediate(operand, OpKind::Immediate8to16, value)?;
            }
            K::imm8sex32 => {
                let value = self.random.integer() as i8 as u64;
                self.immediate(operand, OpKind::Immediate8to32, value)?;
            }
            K::imm8sex64 => {
                let value = self.random.integer() as i8 as u64;
                self.immediate(operand, OpKind::Immediate8to64, value)?;
            }
            K::imm16 => {
                // ENTER and RET: so many bytes of stack.
                let small = matches!(self.code.mnemonic(), Mnemonic::Enter | Mnemonic::Ret);
                let value = self.random.integer() & if small { 0xff } else { 0xffff };
                self.immediate(operand, OpKind::Immediate16, value)?;
            }
            K::imm32 => {
                let value = self.random.integer() as u32 as u64;
                self.immediate(operand, OpKind::Immediate32, value)?;
            }
            K::imm32sex64 => {
                let value = self.random.integer() as i32 as u64;
                self.immediate(operand, OpKind::Immediate32to64, value)?;
            }
            K::imm64 => {
                let value = self.random.integer();
                self.immediate(operand, OpKind::Immediate64, value)?;
            }
            K::br64_1 | K::br64_4 => {
                self.instruction.set_op_kind(operand, OpKind::NearBranch64);
                self.instruction.set_near_branch64(self.target);
            }
            K::mem_offs => {
                let at = self.place(8)?;
                self.memory = Some(at);
                self.instruction.set_op_kind(operand, OpKind::Memory);
                self.instruction.set_memory_displ_size(8);
                self.instruction.set_memory_displacement64(at);
            }
            K::seg_rSI | K::es_rDI | K::seg_rDI => self.string_operand(operand, kind),
            K::seg_rBX_al => {
                let at = SCRATCH + 0x200 + self.random.below(0x1c00);
                self.instruction.set_op_kind(operand, OpKind::Memory);
                self.instruction.set_memory_base(Register::RBX);
                self.instruction.set_memory_index(Register::AL);
                self.fixed.push((RBX, at - 0x100));
            }
            // An operand of an extension that this processor does not have.
            _ => return None,
        }
        Some(())
    }

    fn immediate_byte(&mut self, operand: u32) -> u64 {
        match self.code.mnemonic() {
            // More than the operand's size is undefined.
            Mnemonic::Shld | Mnemonic::Shrd
                if self.code.op_code().op_kind(0) == OpCodeOperandKind::r16_or_mem =>
            {
                self.random.below(17) | self.random.next() & 0xe0
            }
            // Nesting levels.
            Mnemonic::Enter if operand == 1 => self.random.below(40),
            _ => self.random.integer() & 0xff,
        }
    }

    /// An address for an operand of `len` bytes: usually mapped.
    fn place(&mut self, len: usize) -> Option<u64> {
        let len = len as u64;
        let end = SCRATCH + SCRATCH_BYTES as u64;
        let aligned = len >= 16 && !self.random.percent(8);
        let at = match self.random.below(100) {
            // Across the page boundary in the middle.
            0..12 => SCRATCH + 0x1000 - self.random.below(len.max(2)),
            // Across an end of what is mapped, or beyond it.
            12..15 => end - self.random.below(len.max(1)),
            15 => SCRATCH - 1 - self.random.below(len.max(1)),
            16..18 => end + self.random.below(0x100),
            _ => SCRATCH + self.random.below(SCRATCH_BYTES as u64 - len),
        };
        Some(if aligned { at & !15 } else { at })
    }

    fn memory_operand(&mut self, operand: u32) -> Option<()> {
        let mut probe = self.instruction;
        probe.set_op_kind(operand, OpKind::Memory);
        let size = match self.code.mnemonic() {
            // Not a size the tables give.
            Mnemonic::Fxsave | Mnemonic::Fxrstor | Mnemonic::Fxsave64 | Mnemonic::Fxrstor64 => 512,
            _ => probe.memory_size().size(),
        };
        let at = self.place(size)?;
        self.memory = Some(at);
        self.instruction.set_op_kind(operand, OpKind::Memory);
        let mut offset = at;
        if self.random.percent(6) {
            self.instruction.set_segment_prefix(Register::GS);
            offset = at.wrapping_sub(self.gs_base);
        } else if self.random.percent(4) {
            let ignored =
                self.random.pick(&[Register::ES, Register::CS, Register::DS, Register::SS]);
            self.instruction.set_segment_prefix(ignored);
        }
        let displacement = match self.random.below(4) {
            0 => 0,
            1 => self.random.next() as i8 as i64,
            2 => self.random.next() as i16 as i64,
            _ => self.random.next() as i32 as i64,
        };
        match self.random.below(16) {
            0 => self.rip_relative(offset),
            1 => self.absolute(offset),
            2 | 3 => self.based::<true>(offset, displacement),
            _ => self.based::<false>(offset, displacement),
        }
    }

    fn rip_relative(&mut self, offset: u64) -> Option<()> {
        let distance = offset.wrapping_sub(self.address) as i64;
        if i64::from(distance as i32).abs_diff(distance) > 0 || distance.abs() > 0x7fff_f000 {
            return None;
        }
        self.instruction.set_memory_base(Register::RIP);
        self.instruction.set_memory_displ_size(8);
        self.instruction.set_memory_displacement64(offset);
        Some(())
    }

    fn absolute(&mut self, offset: u64) -> Option<()> {
        if offset > 0x7fff_ffff {
            return None;
        }
        self.instruction.set_memory_displ_size(8);
        self.instruction.set_memory_displacement64(offset);
        Some(())
    }

    /// Base register, perhaps index, displacement; `SHORT`: with 32-bit registers.
    fn based<const SHORT: bool>(&mut self, offset: u64, displacement: i64) -> Option<()> {
        let base = self.random.below(16) as usize;
        let first = if SHORT { Register::EAX } else { Register::RAX };
        let index = self.random.below(16) as usize;
        let with_index = self.random.percent(40) && index != RSP && index != base;
        // Not the same number as another operand's count or offset register.
        if self.is_taken(base) || with_index && self.is_taken(index) {
            return None;
        }
        let mut value = offset.wrapping_sub(displacement as u64);
        self.instruction.set_memory_base(first + base as u32);
        if with_index {
            let scale = self.random.below(4);
            let contents = match self.random.below(3) {
                0 => self.random.below(64),
                1 => self.random.below(64).wrapping_neg(),
                _ => self.random.integer(),
            };
            self.instruction.set_memory_index(first + index as u32);
            self.instruction.set_memory_index_scale(1 << scale);
            self.fixed.push((index, contents));
            value = value.wrapping_sub(contents << scale);
        }
        if SHORT {
            // The upper half of the register does not count.
            value = value & 0xffff_ffff | self.random.next() << 32;
            if offset >> 32 != 0 {
                return None;
            }
            self.instruction.set_memory_displ_size(4);
            self.instruction.set_memory_displacement64(displacement as u32 as u64);
        } else {
            // Now and then an address that is not canonical.
            if self.random.percent(1) {
                value ^= 1 << 62;
                self.memory = None;
            }
            self.instruction.set_memory_displ_size(8);
            self.instruction.set_memory_displacement64(displacement as u64);
        }
        if displacement == i64::from(displacement as i8) {
            self.instruction.set_memory_displ_size(1);
        }
        if displacement == 0 && base & 7 != RBP {
            self.instruction.set_memory_displ_size(0);
        }
        self.fixed.push((base, value));
        Some(())
    }

    fn is_taken(&self, register: usize) -> bool {
        self.fixed.iter().any(|(taken, _)| *taken == register)
    }

    /// A string operand, with room for forty elements either way most of the time.
    fn string_operand(&mut self, operand: u32, kind: OpCodeOperandKind) {
        // What a masked store does with an unmapped page whose bytes are masked out is left to the processor.
        // Of two operands only one may fault: their order is the processor's own.
        let near_end = kind != OpCodeOperandKind::seg_rDI && operand == 0 && self.random.percent(8);
        let at = if near_end {
            SCRATCH + SCRATCH_BYTES as u64 - 0x40 + self.random.below(0x60)
        } else {
            SCRATCH + 0x400 + self.random.below(0x1800)
        };
        let short = self.random.percent(10)
            || self.instruction.op0_kind() == OpKind::MemoryESEDI
            || self.instruction.op0_kind() == OpKind::MemorySegESI;
        let upper = if short { self.random.next() << 32 } else { 0 };
        let (register, op_kind) = match (kind, short) {
            (OpCodeOperandKind::seg_rSI, false) => (RSI, OpKind::MemorySegRSI),
            (OpCodeOperandKind::seg_rSI, true) => (RSI, OpKind::MemorySegESI),
            (OpCodeOperandKind::es_rDI, false) => (RDI, OpKind::MemoryESRDI),
            (OpCodeOperandKind::es_rDI, true) => (RDI, OpKind::MemoryESEDI),
            (_, false) => (RDI, OpKind::MemorySegRDI),
            (_, true) => (RDI, OpKind::MemorySegEDI),
        };
        self.instruction.set_op_kind(operand, op_kind);
        self.fixed.push((register, at | upper));
        if register == RDI && kind == OpCodeOperandKind::seg_rDI {
            self.memory = Some(at);
        }
    }

    /// Registers, memory and prefixes that the operands do not name.
    fn implicit(&mut self) -> Option<()> {
        use Mnemonic as M;
        let description = self.code.op_code();
        let mnemonic = self.code.mnemonic();
        if description.can_use_lock_prefix()
            && self.instruction.op0_kind() == OpKind::Memory
            && self.random.percent(25)
        {
            self.instruction.set_has_lock_prefix(true);
        }
        if self.instruction.is_string_instruction() && !description.is_privileged() {
            self.repeat();
        }
        let stack = SCRATCH + 0x800 + 8 * self.random.below(0x200);
        let stack = if self.random.percent(10) { stack + self.random.below(8) } else { stack };
        let address_uses = [self.instruction.memory_base(), self.instruction.memory_index()];
        if !self.is_taken(RSP) {
            self.fixed.push((RSP, stack));
        }
        match mnemonic {
            M::Enter | M::Leave if !self.is_taken(RBP) => {
                let frame = SCRATCH + 0x800 + self.random.below(0x1000);
                self.fixed.push((RBP, frame));
            }
            M::Bt | M::Bts | M::Btr | M::Btc
                if self.memory.is_some() && self.instruction.op1_kind() == OpKind::Register =>
            {
                let offset = self.instruction.op1_register().full_register();
                let number = offset.number();
                if address_uses.iter().any(|register| register.full_register() == offset) {
                    return None;
                }
                // Bits near the operand, on either side, in the width of the register.
                let bits = self.random.below(1600) as i64 - 800;
                self.fixed.retain(|(register, _)| *register != number);
                self.fixed.push((number, bits as u64));
            }
            M::Popfq => {
                // Arithmetic flags and DF, ID. TF would trap, AC make the host check alignment.
                let flags = self.random.next() & 0x0020_4ed7;
                self.patch_stack(flags)?;
            }
            M::Popf => {
                let flags = self.random.next() & 0x4ed7;
                self.patch_stack(flags)?;
            }
            M::Ret => self.patch_stack(self.target)?,
            M::Call | M::Jmp => self.indirect_target()?,
            M::Ldmxcsr if self.random.percent(80) => {
                let value = self.random.mxcsr();
                self.patch_memory(0, value.to_le_bytes().to_vec());
            }
            M::Fldcw if self.random.percent(80) => {
                let value = self.random.x87_control();
                self.patch_memory(0, value.to_le_bytes().to_vec());
            }
            M::Fxrstor | M::Fxrstor64 if self.random.percent(90) => {
                let image = self.random.fx_image();
                self.patch_memory(0, image.to_vec());
            }
            M::Fbld => {
                // Digits only: others are undefined.
                let digits = self.random.next();
                let packed = (0..18)
                    .fold(0u128, |packed, n| packed << 4 | u128::from((digits >> (3 * n)) % 10));
                let sign = if self.random.percent(50) { 0x80u128 << 72 } else { 0 };
                self.patch_memory(0, (packed | sign).to_le_bytes()[..10].to_vec());
            }
            _ => {}
        }
        Some(())
    }

    fn repeat(&mut self) {
        let mnemonic = self.code.mnemonic();
        let compares = matches!(
            mnemonic,
            Mnemonic::Cmpsb
                | Mnemonic::Cmpsw
                | Mnemonic::Cmpsd
                | Mnemonic::Cmpsq
                | Mnemonic::Scasb
                | Mnemonic::Scasw
                | Mnemonic::Scasd
                | Mnemonic::Scasq
        );
        match self.random.below(3) {
            0 => return,
            1 if compares => self.instruction.set_has_repne_prefix(true),
            _ => self.instruction.set_has_rep_prefix(true),
        }
        let count = self.random.below(40);
        let short = (0..2).any(|operand| {
            operand < self.instruction.op_count()
                && matches!(
                    self.instruction.op_kind(operand),
                    OpKind::MemorySegESI | OpKind::MemoryESEDI
                )
        });
        let upper = if short { self.random.next() << 32 } else { 0 };
        self.fixed.push((RCX, count | upper));
    }

    fn patch_memory(&mut self, offset: u64, bytes: Vec<u8>) {
        if let Some(at) = self.memory
            && is_scratch(at + offset, bytes.len())
        {
            self.patches.push((at + offset, bytes));
        }
    }

    fn patch_stack(&mut self, value: u64) -> Option<()> {
        let (_, stack) = self.fixed.iter().find(|(register, _)| *register == RSP)?;
        let stack = *stack;
        if !is_scratch(stack, 8) {
            return None;
        }
        self.patches.push((stack, value.to_le_bytes().to_vec()));
        Some(())
    }

    /// Makes an indirect branch go to the target.
    fn indirect_target(&mut self) -> Option<()> {
        match self.instruction.op0_kind() {
            OpKind::Register => {
                let number = self.instruction.op0_register().full_register().number();
                self.fixed.retain(|(register, _)| *register != number);
                self.fixed.push((number, self.target));
            }
            OpKind::Memory => {
                // A pointer that is mapped, or a fault for certain.
                let at = self.memory?;
                if is_scratch(at, 8) {
                    self.patches.push((at, self.target.to_le_bytes().to_vec()));
                }
            }
            _ => {}
        }
        Some(())
    }

    /// Whether a stack access lands in or around the scratch pages: RSP may be a base register too, far away
    /// from the operand, or hold a branch target.
    fn keeps_to_scratch(&self, instruction: &Instruction) -> bool {
        if !instruction.is_stack_instruction() {
            return true;
        }
        let around = SCRATCH - 0x200..SCRATCH + SCRATCH_BYTES as u64 + 0x200;
        self.fixed
            .iter()
            .filter(|(register, _)| *register == RSP)
            .all(|(_, value)| around.contains(value))
    }

    fn finish(self) -> Option<Form> {
        let mut encoder = Encoder::new(64);
        encoder.encode(&self.instruction, self.address).ok()?;
        let bytes = encoder.take_buffer();
        let mut decoder = Decoder::with_ip(64, &bytes, self.address, DecoderOptions::NONE);
        let instruction = decoder.decode();
        if instruction.code() != self.code || instruction.len() != bytes.len() {
            return None;
        }
        if !self.keeps_to_scratch(&instruction) {
            return None;
        }
        Some(Form {
            instruction,
            bytes,
            address: self.address,
            target: self.target,
            gs_base: self.gs_base,
            fixed: self.fixed,
            patches: self.patches,
            memory: self.memory,
        })
    }
}
