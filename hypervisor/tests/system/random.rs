//! Random code: nothing it does may panic, and where the processor is stopped on the way may not matter.
//!
//! Each case is a page of random bytes, rich in system instructions, run at CPL 0 or 3 with random registers; handlers
//! skip a byte of what faults and go on. It runs once in one go and once in pieces, and both must end in the
//! same state and memory. A failure prints the seed; `DYAD_SEED` repeats it.

use crate::guest::*;
use hypervisor::Exit;
use iced_x86::code_asm::*;
use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};

const CASES: u64 = 200;
const INSTRUCTIONS: u64 = 3000;
const SKIP: u64 = KERNEL + 0x5000;
const SKIP_WITH_CODE: u64 = KERNEL + 0x5100;

/// Opcodes to be met more often than chance would have it; what follows them is random.
const OPCODES: &[&[u8]] = &[
    &[0x0f, 0x00],
    &[0x0f, 0x01],
    &[0x0f, 0x02],
    &[0x0f, 0x03],
    &[0x0f, 0x05],
    &[0x48, 0x0f, 0x07],
    &[0x0f, 0x20],
    &[0x0f, 0x21],
    &[0x0f, 0x22],
    &[0x0f, 0x23],
    &[0x0f, 0x30],
    &[0x0f, 0x31],
    &[0x0f, 0x32],
    &[0x0f, 0xa0],
    &[0x0f, 0xa1],
    &[0x0f, 0xa2],
    &[0x0f, 0xae],
    &[0xf3, 0x0f, 0xae],
    &[0x0f, 0xb2],
    &[0x0f, 0xc7],
    &[0x48, 0xcf],
    &[0x48, 0xcb],
    &[0x8c],
    &[0x8e],
    &[0x9c],
    &[0x9d],
    &[0xcc],
    &[0xcd],
    &[0xcf],
    &[0xca],
    &[0xc8],
    &[0xfa],
    &[0xfb],
    &[0xff],
    &[0xf3, 0xa4],
    &[0xf3, 0x48, 0xab],
    &[0xf2, 0xae],
    &[0xf3, 0x6c],
    &[0xf3, 0x6e],
    &[0xe4],
    &[0xe7],
    &[0xef],
];

fn random_code(random: &mut StdRng) -> Vec<u8> {
    let mut code = Vec::new();
    while code.len() < 4000 {
        match random.random_range(0..4) {
            0 => code.extend_from_slice(OPCODES[random.random_range(0..OPCODES.len())]),
            // Registers and memory operands of all kinds.
            1 => code.extend([random.random_range(0x40..0x50), random.random()]),
            _ => {}
        }
        code.extend((0..random.random_range(0..4)).map(|_| random.random::<u8>()));
    }
    code
}

/// An address worth having in a register.
fn random_value(random: &mut StdRng) -> u64 {
    let places = [
        0,
        u64::from(KERNEL_DATA),
        GDT,
        IDT,
        TSS_BASE,
        USER,
        USER_DATA_PAGE + 0xff8,
        USER_STACK,
        LAPIC,
        IOAPIC,
        0xc000_0080,
        0x6e0,
        0x7fff_ffff_fff8,
        0x8000_0000_0000,
        u64::MAX,
    ];
    match random.random_range(0..3) {
        0 => random.next_u64() >> random.random_range(0..64),
        1 => random.random_range(0..RAM_BYTES),
        _ => places[random.random_range(0..places.len())],
    }
}

const RAM_BYTES: u64 = 8 << 20;

fn build(random: &mut StdRng) -> Guest {
    let mut guest = Guest::new();
    for (at, has_code) in [(SKIP, false), (SKIP_WITH_CODE, true)] {
        guest.code(at, |a| {
            if has_code {
                a.add(rsp, 8)?;
            }
            a.inc(qword_ptr(rsp))?;
            a.iretq()?;
            Ok(vec![])
        });
    }
    for vector in 0..32u8 {
        let handler = if matches!(vector, 8 | 10..=14 | 17) { SKIP_WITH_CODE } else { SKIP };
        // Some gates for programs, some on an interrupt stack.
        guest.gate(
            vector,
            handler,
            if vector % 2 == 0 { 0x8e } else { 0xee },
            u64::from(vector == 8),
        );
    }
    let user = random.random_bool(0.5);
    let registers: Vec<u64> = (0..15).map(|_| random_value(random)).collect();
    guest.kernel(|a| {
        if user {
            a.push(i32::from(USER_DATA))?;
            a.push(USER_STACK as i32)?;
            a.push(0x202)?;
            a.push(i32::from(USER_CODE))?;
        } else {
            a.push(i32::from(KERNEL_DATA))?;
            a.push(KERNEL_STACK as i32)?;
            a.push(2)?;
            a.push(i32::from(KERNEL_CODE))?;
        }
        a.push(USER as i32)?;
        let all = [rax, rbx, rcx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r12, r13, r14, r15];
        for (register, value) in all.into_iter().zip(registers) {
            a.mov(register, value)?;
        }
        a.iretq()?;
        Ok(vec![])
    });
    let code = random_code(random);
    guest.write_bytes(USER, &code);
    guest
}

/// Runs to `INSTRUCTIONS`, or until nothing more happens, in pieces that `next` gives the length of.
fn run(guest: &mut Guest, mut next: impl FnMut() -> u64) -> Exit {
    guest.reset();
    let end = guest.vcpu.retired() + INSTRUCTIONS;
    loop {
        let piece = next().min(end - guest.vcpu.retired());
        let exit = guest.go_on(piece);
        if exit != Exit::Until || guest.vcpu.retired() == end {
            return exit;
        }
    }
}

/// The seed asked for, or any.
fn seed() -> u64 {
    std::env::var("DYAD_SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap())
}

#[test]
fn random_code_neither_panics_nor_notices_where_it_is_stopped() {
    let seed = seed();
    for case in 0..CASES {
        println!("DYAD_SEED={seed}, case {case}");
        let random = |stream: u64| StdRng::seed_from_u64(seed ^ (case << 32) ^ stream);
        let mut whole = build(&mut random(0));
        let exit = run(&mut whole, || INSTRUCTIONS);

        let mut pieces = build(&mut random(0));
        let mut lengths = random(1);
        let exit_of_pieces = run(&mut pieces, || lengths.random_range(1..40));
        assert_eq!(exit, exit_of_pieces);
        assert_eq!(whole.vcpu.retired(), pieces.vcpu.retired());
        assert_eq!(whole.vcpu.save().unwrap(), pieces.vcpu.save().unwrap());
        assert!(whole.memory_equals(&pieces), "the same state, but other memory");
    }
}

#[test]
fn damaged_state_is_refused_or_harmless() {
    let seed = seed();
    println!("DYAD_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut guest = build(&mut random);
    run(&mut guest, || 500);
    let state = postcard::to_stdvec(&guest.vcpu.save().unwrap()).unwrap();
    for _ in 0..2000 {
        let mut damaged = state.clone();
        for _ in 0..random.random_range(1..8) {
            let at = random.random_range(0..damaged.len());
            damaged[at] = random.random();
        }
        let Ok(state) = postcard::from_bytes(&damaged) else { continue };
        if guest.vcpu.restore(&state).is_ok() {
            guest.go_on(50);
        }
    }
}
