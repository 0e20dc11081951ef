//! A software x86-64 processor that counts instructions exactly.
//!
//! What must hold: everything the guest can observe is a function of its memory, its devices' answers and
//! the events applied at instruction counts. Nothing here reads a host clock, host randomness or the
//! host's CPUID, and what is cached (blocks, translations) is either invisible to the guest or itself
//! such a function.

mod access;
mod cpu;
mod cpuid;
mod descriptor;
mod exception;
mod flags;
mod fpu;
mod irqchip;
mod msr;
mod op;
mod ops;
mod paging;
mod ram;
mod tlb;
mod x87;

use serde::{Deserialize, Serialize};

/// Everything the guest can observe of the processor and its interrupt controllers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SoftState {}
