//! The software processor against the one this test runs on, instruction by instruction.
//!
//! Every user-mode instruction that the software processor's CPUID announces is encoded with random operands, taken
//! from the decoder's own tables, and executed from the same register image and memory on both; then
//! registers, flags, memory and faults are compared. `DYAD_DIFFERENTIAL_SEED` repeats a run,
//! `DYAD_DIFFERENTIAL_COUNT` makes it longer or shorter, `DYAD_DIFFERENTIAL_CASE` picks one case of it,
//! `DYAD_DIFFERENTIAL_CODE` the cases of instructions whose name contains a text.

mod compare;
mod forms;
mod guest;
mod layout;
mod native;
mod scope;
mod values;

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use iced_x86::{Code, Mnemonic, OpKind};

use crate::compare::{Image, describe, difference, leeway};
use crate::forms::{Form, RAX, RCX, RDX, is_scratch};
use crate::guest::Guest;
use crate::layout::*;
use crate::native::Native;
use crate::values::Random;

/// Register images tried with each encoding.
const IMAGES: u64 = 4;
/// Instructions whose difference is reported in full; all are named.
const MAX_REPORTS: usize = 20;

/// Whether a page of the region is mapped, in the guest and here.
fn is_mapped(address: u64) -> bool {
    let offset = address.wrapping_sub(BASE);
    (offset < CODE + CODE_BYTES as u64 - BASE)
        || (SCRATCH..SCRATCH + SCRATCH_BYTES as u64).contains(&address)
        || (offset >= TABLES - BASE && offset < REGION_BYTES as u64)
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    Some(parsed.unwrap_or_else(|_| panic!("{variable}={text} is not a number")))
}

/// Both processors and what happened so far.
struct Bench {
    seed: u64,
    native: Native,
    guest: Guest,
    instances: u64,
    /// Instances of each instruction that ended without an exception, and with one.
    outcomes: BTreeMap<Code, (u64, u64)>,
    /// One report for each instruction that differs.
    reports: Vec<String>,
    /// Cases that differ, by instruction.
    differing: BTreeMap<Code, u64>,
}

impl Bench {
    /// Runs one case: an encoding with several images.
    fn case(&mut self, number: u64, code: Code) {
        let mut random = Random::new(self.seed, number);
        let Some(form) = (0..1000).find_map(|_| forms::form(code, &mut random)) else {
            self.reports.push(format!("{code:?}: the test makes no encoding of it"));
            return;
        };
        self.place(&form);
        let scratch: Vec<u8> =
            (0..SCRATCH_BYTES / 16).flat_map(|_| random.vector().to_le_bytes()).collect();
        self.native.bytes(SCRATCH, SCRATCH_BYTES).copy_from_slice(&scratch);
        self.guest.bytes(SCRATCH, SCRATCH_BYTES).copy_from_slice(&scratch);
        for _ in 0..IMAGES {
            for (at, bytes) in &form.patches {
                self.native.bytes(*at, bytes.len()).copy_from_slice(bytes);
                self.guest.bytes(*at, bytes.len()).copy_from_slice(bytes);
            }
            let input = self.input(&form, &mut random);
            if let Some(what) = self.instance(&form, &input) {
                *self.differing.entry(code).or_default() += 1;
                if self.differing[&code] == 1 {
                    self.report(number, &form, &input, &what);
                }
                return;
            }
        }
    }

    /// Puts the instruction and what follows it into the code pages.
    fn place(&mut self, form: &Form) {
        let mut code = form.bytes.clone();
        code.extend(Native::landing(false));
        self.native.bytes(form.address, code.len()).copy_from_slice(&code);
        let landing = Native::landing(true);
        self.native.bytes(form.target, landing.len()).copy_from_slice(&landing);
        place_in_guest(&mut self.guest, form);
    }

    /// A random register image that suits the instruction.
    fn input(&mut self, form: &Form, random: &mut Random) -> Image {
        let mut registers: [u64; 16] = std::array::from_fn(|_| random.integer());
        self.suit(form, random, &mut registers);
        for (register, value) in &form.fixed {
            registers[*register] = *value;
        }
        let mut input = [0; image::BYTES];
        for (n, value) in registers.into_iter().enumerate() {
            input[8 * n..8 * n + 8].copy_from_slice(&value.to_le_bytes());
        }
        // Arithmetic flags and DF at random, IF as user mode has it.
        let flags = random.next() & 0xcd5 | 0x202;
        input[image::FLAGS..][..8].copy_from_slice(&flags.to_le_bytes());
        input[image::RIP..][..8].copy_from_slice(&form.address.to_le_bytes());
        input[image::GS_BASE..][..8].copy_from_slice(&form.gs_base.to_le_bytes());
        input[image::FX..].copy_from_slice(&random.fx_image());
        suit_x87(form, &mut input[image::FX..]);
        input
    }

    /// Makes likely what would hardly ever happen: comparisons that find equality, divisions that do not fault.
    fn suit(&mut self, form: &Form, random: &mut Random, registers: &mut [u64; 16]) {
        match form.instruction.mnemonic() {
            Mnemonic::Div | Mnemonic::Idiv if random.percent(70) => {
                registers[RDX] =
                    if random.percent(50) { 0 } else { ((registers[RAX] as i64) >> 63) as u64 };
                if random.percent(30) {
                    registers[RAX] &= 0xff;
                }
            }
            Mnemonic::Cmpxchg | Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b
                if random.percent(60) =>
            {
                if let Some(at) = form.mapped_memory(16) {
                    let bytes = self.guest.bytes(at, 16);
                    let half =
                        if form.instruction.mnemonic() == Mnemonic::Cmpxchg8b { 4 } else { 8 };
                    let load = |from: usize| {
                        let mut word = [0; 8];
                        word[..half].copy_from_slice(&bytes[from..from + half]);
                        u64::from_le_bytes(word)
                    };
                    (registers[RAX], registers[RDX]) = (load(0), load(half));
                }
            }
            Mnemonic::Pcmpestri
            | Mnemonic::Pcmpestrm
            | Mnemonic::Pcmpestri64
            | Mnemonic::Pcmpestrm64
                if random.percent(70) =>
            {
                registers[RAX] = random.below(40).wrapping_sub(20);
                registers[RDX] = random.below(40).wrapping_sub(20);
            }
            Mnemonic::Loop
            | Mnemonic::Loope
            | Mnemonic::Loopne
            | Mnemonic::Jrcxz
            | Mnemonic::Jecxz => registers[RCX] = random.pick(&[0, 1, 2, 1 << 32, registers[RCX]]),
            // 16-bit operands shifted by more than their size are undefined.
            Mnemonic::Shld | Mnemonic::Shrd => {
                let bits = match form.instruction.op0_kind() {
                    OpKind::Register => form.instruction.op0_register().size(),
                    _ => form.instruction.memory_size().size(),
                } * 8;
                if bits == 16 {
                    registers[RCX] = registers[RCX] & !0x1f | random.below(17);
                }
            }
            _ => {}
        }
    }

    /// Runs both and compares.
    fn instance(&mut self, form: &Form, input: &Image) -> Option<String> {
        if compare::undefined(&form.instruction, input) {
            return None;
        }
        self.instances += 1;
        self.native.bytes(INPUT, input.len()).copy_from_slice(input);
        self.guest.bytes(INPUT, input.len()).copy_from_slice(input);
        self.native.run();
        if let Err(problem) = self.guest.run() {
            panic!("{problem}\n{}", self.command(form));
        }
        let host: Image = self.native.bytes(OUTPUT, image::BYTES).try_into().unwrap();
        let guest: Image = self.guest.bytes(OUTPUT, image::BYTES).try_into().unwrap();
        let outcome = self.outcomes.entry(form.instruction.code()).or_default();
        if compare::word(&host, image::VECTOR) >= FELL_THROUGH {
            outcome.0 += 1;
        } else {
            outcome.1 += 1;
        }
        let leeway = leeway(&form.instruction, input);
        difference(&host, &guest, leeway).or_else(|| {
            if leeway.partial_store(&host) {
                let bytes = self.native.bytes(SCRATCH, SCRATCH_BYTES).to_vec();
                self.guest.bytes(SCRATCH, SCRATCH_BYTES).copy_from_slice(&bytes);
            }
            self.memory_difference(form)
        })
    }

    fn memory_difference(&mut self, form: &Form) -> Option<String> {
        for (start, end) in compare::unshared_memory(form.instruction.code()) {
            if let Some(at) = form.memory.map(|at| at + start) {
                let len = (end - start) as usize;
                if is_scratch(at, len) {
                    let bytes = self.native.bytes(at, len).to_vec();
                    self.guest.bytes(at, len).copy_from_slice(&bytes);
                }
            }
        }
        let host = self.native.bytes(SCRATCH, SCRATCH_BYTES);
        let guest = self.guest.bytes(SCRATCH, SCRATCH_BYTES);
        if host == guest {
            return None;
        }
        let at = host.iter().zip(guest.iter()).position(|(a, b)| a != b)?;
        let end = (at + 16).min(SCRATCH_BYTES);
        Some(format!(
            "memory at {:#x}: {:02x?} on the host, {:02x?} in the guest",
            SCRATCH + at as u64,
            &host[at..end],
            &guest[at..end]
        ))
    }

    fn command(&self, form: &Form) -> String {
        format!("instruction {} ({:02x?})", form.instruction, form.bytes)
    }

    fn report(&mut self, number: u64, form: &Form, input: &Image, what: &str) {
        let host: Image = self.native.bytes(OUTPUT, image::BYTES).try_into().unwrap();
        let guest: Image = self.guest.bytes(OUTPUT, image::BYTES).try_into().unwrap();
        let report = format!(
            "{:?}: {} at {:#x} ({:02x?}), memory operand at {:x?}\n{what}\nrepeat with: \
             DYAD_DIFFERENTIAL_SEED={:#x} DYAD_DIFFERENTIAL_CASE={number} cargo test --release -p hypervisor \
             --test differential\nbefore:\n{}host:\n{}guest:\n{}",
            form.instruction.code(),
            form.instruction,
            form.address,
            form.bytes,
            form.memory,
            self.seed,
            describe(input),
            describe(&host),
            describe(&guest)
        );
        self.reports.push(report);
    }
}

/// Puts an instruction into the guest alone, with what follows it.
fn place_in_guest(guest: &mut Guest, form: &Form) {
    guest.write_code(form.address, &form.bytes);
    guest.write_code(form.address + form.bytes.len() as u64, &[0xcd, FELL_THROUGH as u8]);
    guest.write_code(form.target, &[0xcd, BRANCHED as u8]);
}

/// Brings ST(0) into the range in which the manual defines F2XM1 and FYL2XP1.
fn suit_x87(form: &Form, fx: &mut [u8]) {
    let limit = match form.instruction.mnemonic() {
        Mnemonic::F2xm1 => 0x3ffe,
        Mnemonic::Fyl2xp1 => 0x3ffc,
        _ => return,
    };
    let sign_exponent = u16::from_le_bytes([fx[40], fx[41]]);
    let exponent = sign_exponent & 0x7fff;
    if exponent > limit && exponent != 0x7fff {
        let inside = sign_exponent & 0x8000 | (limit - exponent % 64);
        fx[40..42].copy_from_slice(&inside.to_le_bytes());
    }
}

#[test]
fn every_user_instruction_does_what_the_host_does() {
    let seed = number("DYAD_DIFFERENTIAL_SEED").unwrap_or_else(|| {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_nanos() as u64)
    });
    let count = number("DYAD_DIFFERENTIAL_COUNT").unwrap_or(1_200_000);
    let filter = std::env::var("DYAD_DIFFERENTIAL_CODE").unwrap_or_default().to_lowercase();
    println!("DYAD_DIFFERENTIAL_SEED={seed:#x} DYAD_DIFFERENTIAL_COUNT={count}");

    if let Some(missing) = native::missing() {
        println!("SKIPPED: this host's processor has no {missing}, nothing to compare with");
        return;
    }
    let codes: Vec<Code> = Code::values()
        .filter(|code| *code != Code::INVALID && scope::is_advertised(*code))
        .filter(|code| scope::exclusion(*code).is_none())
        .collect();
    let mut bench = Bench {
        seed,
        native: Native::new(),
        guest: Guest::new(),
        instances: 0,
        outcomes: BTreeMap::new(),
        reports: Vec::new(),
        differing: BTreeMap::new(),
    };
    let only = number("DYAD_DIFFERENTIAL_CASE");
    let whole = only.is_none() && filter.is_empty();
    let cases = match only {
        Some(case) => case..case + 1,
        None => 0..count.div_ceil(IMAGES).max(codes.len() as u64),
    };
    for case in cases {
        let code = codes[(case % codes.len() as u64) as usize];
        if format!("{code:?}").to_lowercase().contains(&filter) {
            bench.case(case, code);
        }
    }
    println!("{} instances of {} instructions", bench.instances, bench.outcomes.len());
    if std::env::var_os("DYAD_DIFFERENTIAL_OUTCOMES").is_some() {
        for (code, (completed, faulted)) in &bench.outcomes {
            println!("{code:?}: {completed} completed, {faulted} faulted");
        }
    }
    for report in bench.reports.iter().take(MAX_REPORTS) {
        println!("{report}");
    }
    let differing: Vec<String> =
        bench.differing.iter().map(|(code, times)| format!("{code:?} ({times})")).collect();
    assert!(bench.reports.is_empty(), "instructions that differ: {}", differing.join(", "));
    if whole {
        // Each completed at least once, but for those that user mode must not execute.
        let untested: Vec<Code> = codes
            .into_iter()
            .filter(|code| {
                let (completed, faulted) = bench.outcomes.get(code).copied().unwrap_or_default();
                let faults =
                    scope::always_faults(*code) || compare::is_hint(*code) && completed == 0;
                if faults { faulted == 0 } else { completed == 0 }
            })
            .collect();
        assert!(untested.is_empty(), "instructions not tested: {untested:?}");
    }
}

#[test]
fn instructions_that_are_not_announced_raise_undefined_opcode() {
    let mut guest = Guest::new();
    let mut random = Random::new(1, 1);
    let mut tried = 0;
    let mut wrong = Vec::new();
    let codes = Code::values().filter(|code| {
        *code != Code::INVALID
            && code.op_code().mode64()
            && code.op_code().is_instruction()
            && !scope::is_advertised(*code)
            && !scope::means_another(*code)
    });
    for code in codes {
        let Some(form) = (0..50).find_map(|_| forms::form(code, &mut random)) else {
            continue;
        };
        place_in_guest(&mut guest, &form);
        let input = guest.bytes(INPUT, image::BYTES);
        input.fill(0);
        input[image::FLAGS..][..8].copy_from_slice(&0x202u64.to_le_bytes());
        input[image::RIP..][..8].copy_from_slice(&form.address.to_le_bytes());
        input[image::FX + 24..][..4].copy_from_slice(&0x1f80u32.to_le_bytes());
        guest.run().unwrap();
        let vector = compare::word(guest.bytes(OUTPUT, image::BYTES), image::VECTOR);
        tried += 1;
        if vector != 6 {
            wrong.push(format!("{code:?} ({:02x?}): {vector}", form.bytes));
        }
    }
    assert!(tried > 500, "only {tried} could be encoded");
    assert!(wrong.is_empty(), "no #UD from: {wrong:#?}");
}
