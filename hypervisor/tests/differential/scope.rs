//! Which instructions are tested, and which are not for what reason.

use iced_x86::{Code, CpuidFeature, DecoderOptions, EncodingKind, Mnemonic, OpCodeOperandKind};

/// The features the software processor's CPUID announces, as the decoder's tables name them.
const FEATURES: [CpuidFeature; 33] = [
    CpuidFeature::INTEL8086,
    CpuidFeature::INTEL8086_ONLY,
    CpuidFeature::INTEL186,
    CpuidFeature::INTEL286,
    CpuidFeature::INTEL386,
    CpuidFeature::INTEL486,
    CpuidFeature::X64,
    CpuidFeature::CMOV,
    CpuidFeature::FPU,
    CpuidFeature::FPU287,
    CpuidFeature::FPU387,
    CpuidFeature::MMX,
    CpuidFeature::SSE,
    CpuidFeature::SSE2,
    CpuidFeature::SSE3,
    CpuidFeature::SSSE3,
    CpuidFeature::SSE4_1,
    CpuidFeature::SSE4_2,
    CpuidFeature::POPCNT,
    CpuidFeature::CX8,
    CpuidFeature::CMPXCHG16B,
    CpuidFeature::FXSR,
    CpuidFeature::CLFSH,
    CpuidFeature::SYSCALL,
    CpuidFeature::FSGSBASE,
    CpuidFeature::RDTSCP,
    CpuidFeature::SMAP,
    CpuidFeature::MULTIBYTENOP,
    CpuidFeature::PAUSE,
    CpuidFeature::MSR,
    CpuidFeature::TSC,
    CpuidFeature::CPUID,
    CpuidFeature::RDPMC,
];

/// Whether the software processor claims to execute this in 64-bit mode.
pub fn is_advertised(code: Code) -> bool {
    let description = code.op_code();
    description.encoding() == EncodingKind::Legacy
        && description.is_instruction()
        && description.mode64()
        && description.intel_decoder64()
        && description.decoder_option() == DecoderOptions::NONE
        // The decoder gives WAIT and the instruction behind it as two.
        && !description.fwait()
        && code.cpuid_features().iter().all(|feature| FEATURES.contains(feature))
}

/// Why an advertised instruction is not compared with the host; `None` if it is.
pub fn exclusion(code: Code) -> Option<&'static str> {
    use Mnemonic as M;
    if matches!(code, Code::Retnw | Code::Retnw_imm16 | Code::Call_rm16 | Code::Jmp_rm16) {
        return Some("goes to an address below 64 KiB, where nothing is mapped");
    }
    Some(match code.mnemonic() {
        M::Cpuid => "answers for the processor, and the two are different ones",
        M::Rdtsc | M::Rdtscp | M::Rdpmc => "reads a clock or counter",
        M::Syscall | M::Sysenter | M::Int | M::Int1 | M::Int3 => {
            "enters the kernel, which is not the same one; directed tests cover it"
        }
        M::Iret | M::Iretd | M::Iretq | M::Retf => {
            "loads segment registers; directed tests cover it"
        }
        M::Lfs | M::Lgs | M::Lss | M::Lar | M::Lsl | M::Verr | M::Verw => {
            "depends on descriptor tables, which are not the same; directed tests cover it"
        }
        M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw => {
            "shows system registers, or is emulated by the host's kernel (UMIP)"
        }
        M::Rdfsbase | M::Wrfsbase => "FS holds the thread pointer of this test",
        M::Mov if code.op_code().op_kinds().iter().any(|kind| is_segment(*kind)) => {
            "moves selectors, which are not the same; directed tests cover it"
        }
        M::Push | M::Pop if code.op_code().op_kinds().iter().any(|kind| is_segment(*kind)) => {
            "moves selectors, which are not the same; directed tests cover it"
        }
        M::Call | M::Jmp if code.is_call_far_indirect() || code.is_jmp_far_indirect() => {
            "loads CS; directed tests cover it"
        }
        _ => return None,
    })
}

/// Whether the encoding of an instruction that is not announced means an older one to a processor without it: a
/// hint, or a prefix that is ignored.
pub fn means_another(code: Code) -> bool {
    use Mnemonic as M;
    matches!(
        code.mnemonic(),
        // BSF and BSR with a prefix.
        M::Tzcnt | M::Lzcnt
        // NOPs of the hint space.
            | M::Prefetch
            | M::Prefetchw
            | M::Prefetchwt1
            | M::Prefetchit0
            | M::Prefetchit1
            | M::Cldemote
            | M::Endbr32
            | M::Endbr64
            | M::Rdsspd
            | M::Rdsspq
    )
}

/// Whether user mode gets an exception for it, whatever its operands.
pub fn always_faults(code: Code) -> bool {
    let description = code.op_code();
    description.is_privileged()
        || !description.cpl3()
        || matches!(code.mnemonic(), Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2)
}

fn is_segment(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind as K;
    matches!(kind, K::seg_reg | K::es | K::cs | K::ss | K::ds | K::fs | K::gs)
}
