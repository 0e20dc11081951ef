# The micro-guest: computes in user mode, then, in kernel mode, drives a virtio disk and prints both results.
#
# It must run wherever KVM exists, so it keeps to what KVM's instruction emulator knows in kernel mode: plain
# integer instructions. User mode may use SSE; nothing here uses SYSCALL, INT n, CPUID or RDTSC. The host has
# written GDT, IDT, TSS and page tables (all of the first 4 GiB mapped to itself, for user mode too).

.section .rodata.micro_guest, "a"
.balign 16
.global micro_guest_start
micro_guest_start:
    lidt [rip + idt_register]
    mov eax, 0x28
    ltr ax
    mov rax, cr4
    or eax, 0x600               # OSFXSAVE, OSXMMEXCPT
    mov cr4, rax
    push 0x1b                   # user SS
    push 0x28000                # user stack
    push 2                      # RFLAGS: interrupts off
    push 0x23                   # user CS
    lea rax, [rip + payload]
    push rax
    iretq

idt_register:
    .word 0xfff
    .quad 0x5000

# User mode: a pseudo-random walk over 64 pages, an integer and a floating-point sum.
payload:
    movabs rbx, 0x2545f4914f6cdd1d
    xor r12d, r12d
    xorps xmm0, xmm0
    mov ecx, 400000
.Lwalk:
    mov rax, rbx
    shl rax, 13
    xor rbx, rax
    mov rax, rbx
    shr rax, 7
    xor rbx, rax
    mov rax, rbx
    shl rax, 17
    xor rbx, rax
    rol r12, 5
    add r12, rbx
    mov eax, ebx
    and eax, 0x3fff8
    add r12, [rax + 0x100000]
    mov [rax + 0x100000], r12
    mov rax, rbx
    shr rax, 20
    cvtsi2sd xmm1, rax
    sqrtsd xmm1, xmm1
    addsd xmm0, xmm1
    test ecx, 0xffff
    jnz .Lno_checkpoint
    out 0x80, al                # checkpoint
.Lno_checkpoint:
    dec ecx
    jnz .Lwalk
    mov rax, r12
    xor edx, edx
    mov r8d, 1000003
    div r8
    xor r12, rdx
    movq r13, xmm0
    int3

# Kernel mode again, for good: the breakpoint's handler.
.balign 16
.global micro_guest_breakpoint
micro_guest_breakpoint:
    lea rsi, [rip + text_compute]
    call print
    mov rax, r12
    call print_hex
    mov al, 32
    call put
    mov rax, r13
    call print_hex
    call newline

    # Find the virtio disk: vendor 1af4, device 1042.
    mov edi, 0
.Lnext_slot:
    inc edi
    cmp edi, 32
    je no_disk
    xor ebx, ebx
    call config_read
    cmp eax, 0x10421af4
    jne .Lnext_slot
    mov ebx, 4                  # memory space, bus master
    call config_read
    or eax, 6
    call config_write
    mov ebx, 0x10
    call config_read
    and eax, 0xfffffff0
    mov r15d, eax               # r15: the BAR
    mov ebx, 0x34
    call config_read
    movzx ebx, al
.Lcapability:
    test ebx, ebx
    jz .Lfound
    call config_read
    mov ebp, eax                # ebp: id, next, length, type of the capability
    cmp al, 0x11
    je .Lmsix
    cmp al, 9
    jne .Lnext_capability
    add ebx, 8
    call config_read
    mov esi, eax                # esi: offset in the BAR
    shr ebp, 24
    cmp ebp, 1
    jne .Lnot_common
    lea r8, [r15 + rsi]         # r8: common configuration
.Lnot_common:
    cmp ebp, 2
    jne .Lback
    lea r9, [r15 + rsi]         # r9: notification
    add ebx, 8
    call config_read
    mov r10d, eax               # r10: its multiplier
    sub ebx, 8
.Lback:
    sub ebx, 8
    jmp .Lnext_capability
.Lmsix:
    or eax, 0x80000000          # MSI-X on
    call config_write
    add ebx, 4
    call config_read
    and eax, 0xfffffff8
    lea r11, [r15 + rax]        # r11: MSI-X table
    sub ebx, 4
.Lnext_capability:
    call config_read
    movzx ebx, ah
    jmp .Lcapability

    # Vector 0x40 to this processor; LAPIC on.
.Lfound:
    mov eax, 0xfee00000
    mov [r11], eax
    xor eax, eax
    mov [r11 + 4], eax
    mov eax, 0x40
    mov [r11 + 8], eax
    xor eax, eax
    mov [r11 + 12], eax
    mov edx, 0xfee000f0
    mov eax, [rdx]
    or eax, 0x1ff
    mov [rdx], eax

    # Initialize the device (virtio 1.2, 3.1.1 and 4.1.4.3).
    mov al, 0
    mov [r8 + 0x14], al
    mov al, 1
    mov [r8 + 0x14], al
    mov al, 3
    mov [r8 + 0x14], al
    mov eax, 1                  # VIRTIO_F_VERSION_1 and nothing else
    mov [r8 + 0x08], eax
    mov [r8 + 0x0c], eax
    mov al, 11
    mov [r8 + 0x14], al
    mov al, [r8 + 0x14]
    test al, 8
    jz no_disk
    xor eax, eax
    mov [r8 + 0x16], ax         # queue 0
    mov [r8 + 0x1a], ax         # MSI-X vector 0
    mov eax, 8
    mov [r8 + 0x18], ax         # 8 entries
    mov eax, 0x30000
    mov [r8 + 0x20], eax
    mov eax, 0x31000
    mov [r8 + 0x28], eax
    mov eax, 0x32000
    mov [r8 + 0x30], eax
    xor eax, eax
    mov [r8 + 0x24], eax
    mov [r8 + 0x2c], eax
    mov [r8 + 0x34], eax
    movzx eax, word ptr [r8 + 0x1e]
    imul eax, r10d
    add r9, rax
    mov eax, 1
    mov [r8 + 0x1c], ax
    mov al, 15
    mov [r8 + 0x14], al

    # Descriptors: header, data, status.
    mov edx, 0x30000
    mov eax, 0x33000
    mov [rdx], rax
    movabs rax, 0x0001000100000010
    mov [rdx + 8], rax
    mov eax, 0x34000
    mov [rdx + 16], rax
    movabs rax, 0x0002000300000800
    mov [rdx + 24], rax
    mov eax, 0x33010
    mov [rdx + 32], rax
    movabs rax, 0x0000000200000001
    mov [rdx + 40], rax

    # Six reads of 2 KiB, one after the other.
    xor r14d, r14d
    xor r12d, r12d
.Lread:
    mov edx, 0x33000
    xor eax, eax
    mov [rdx], rax
    mov eax, r14d
    shl eax, 4
    add eax, 3
    mov [rdx + 8], rax          # sector
    mov al, 0xff
    mov [rdx + 16], al
    mov edx, 0x31000
    mov eax, r14d
    inc eax
    mov [rdx + 2], ax
    xor eax, eax
    mov [r9], ax
.Lwait:
    cli
    mov edx, 0x35000
    mov eax, [rdx]
    cmp eax, r14d
    ja .Lcomplete
    sti
    hlt
    jmp .Lwait
.Lcomplete:
    mov edx, 0x33010
    movzx eax, byte ptr [rdx]
    add r12, rax
    mov edx, 0x34000
    mov ecx, 256
.Lsum:
    rol r12, 7
    xor r12, [rdx]
    add rdx, 8
    dec ecx
    jnz .Lsum
    inc r14d
    cmp r14d, 6
    jne .Lread

    lea rsi, [rip + text_disk]
    call print
    mov rax, r12
    call print_hex
    call newline
off:
    mov edx, 0x604              # ACPI S5
    mov eax, 0x3400
    out dx, ax
.Lrest:
    cli
    hlt
    jmp .Lrest

no_disk:
    lea rsi, [rip + text_no_disk]
    call print
    jmp off

# The disk's interrupt: count it, end it.
.balign 16
.global micro_guest_interrupt
micro_guest_interrupt:
    push rax
    mov eax, 0x35000
    inc dword ptr [rax]
    mov eax, 0xfee000b0
    mov dword ptr [rax], 0
    pop rax
    iretq

# Exceptions nobody expects, 16 bytes apart.
.balign 16
.global micro_guest_faults
micro_guest_faults:
.set vector, 0
.rept 32
    .balign 16
    push vector
    jmp fault
    .set vector, vector + 1
.endr
fault:
    lea rsi, [rip + text_fault]
    call print
    pop rax
    call print_hex
    jmp off

# edi: slot, ebx: register; eax: value.
config_read:
    call config_select
    mov edx, 0xcfc
    in eax, dx
    ret
config_write:
    push rax
    call config_select
    pop rax
    mov edx, 0xcfc
    out dx, eax
    ret
config_select:
    mov eax, edi
    shl eax, 11
    or eax, ebx
    or eax, 0x80000000
    mov edx, 0xcf8
    out dx, eax
    ret

# al: character.
put:
    push rdx
    push rax
    mov edx, 0x3fd
.Lbusy:
    in al, dx
    test al, 0x20
    jz .Lbusy
    pop rax
    mov edx, 0x3f8
    out dx, al
    pop rdx
    ret
newline:
    mov al, 10
    jmp put
# rsi: text, ended by a zero.
print:
    mov al, [rsi]
    test al, al
    jz .Lprinted
    call put
    inc rsi
    jmp print
.Lprinted:
    ret
# rax: number, 16 digits.
print_hex:
    mov rbx, rax
    mov ecx, 16
.Ldigit:
    rol rbx, 4
    mov eax, ebx
    and eax, 15
    cmp al, 10
    jb .Ldecimal
    add al, 39
.Ldecimal:
    add al, 48
    call put
    dec ecx
    jnz .Ldigit
    ret

text_compute: .asciz "compute "
text_disk: .asciz "disk "
text_no_disk: .asciz "no disk\n"
text_fault: .asciz "fault "
.global micro_guest_end
micro_guest_end:
.text
