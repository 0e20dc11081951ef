# A guest that sends frames. EBP says whether it sleeps after each, until its timer wakes it, or works on.
#
# It is entered as a 64-bit Linux kernel is, at 2 MiB, with the first 4 GiB mapped to themselves. It knows where this
# machine's virtio devices have their registers.

.section .rodata.sender, "a"
.balign 16
.global sender_start
sender_start:
    cli
    mov esp, 0x600000

    # The timer's interrupt, vector 0x40; LAPIC on, timer in single shots of its own clock.
    lea rax, [rip + tick]
    mov edx, 0x500400
    mov [rdx], ax
    mov word ptr [rdx + 2], 0x10
    mov word ptr [rdx + 4], 0x8e00
    shr rax, 16
    mov [rdx + 6], ax
    mov dword ptr [rdx + 8], 0
    lidt [rip + idt_register]
    mov edx, 0xfee00000
    mov dword ptr [rdx + 0xf0], 0x1ff
    mov dword ptr [rdx + 0x320], 0x40
    mov dword ptr [rdx + 0x3e0], 0xb

    # Find the virtio network card: vendor 1af4, device 1041.
    mov edi, 0
.Lnext_slot:
    inc edi
    cmp edi, 32
    je off
    xor ebx, ebx
    call config_select
    in eax, dx
    cmp eax, 0x10411af4
    jne .Lnext_slot
    mov ebx, 4                  # memory space, bus master
    call config_select
    in eax, dx
    or eax, 6
    out dx, eax
    mov ebx, 0x10
    call config_select
    in eax, dx
    and eax, 0xfffffff0
    mov r8d, eax                # r8: common configuration

    # Initialize the device (virtio 1.2, 3.1.1 and 4.1.4.3).
    mov byte ptr [r8 + 0x14], 0
    mov byte ptr [r8 + 0x14], 1
    mov byte ptr [r8 + 0x14], 3
    mov dword ptr [r8 + 0x08], 1
    mov dword ptr [r8 + 0x0c], 1        # VIRTIO_F_VERSION_1 and nothing else
    mov byte ptr [r8 + 0x14], 11
    mov word ptr [r8 + 0x16], 1         # queue 1 sends; 8 entries
    mov word ptr [r8 + 0x18], 8
    mov dword ptr [r8 + 0x20], 0x400000
    mov dword ptr [r8 + 0x24], 0
    mov dword ptr [r8 + 0x28], 0x401000
    mov dword ptr [r8 + 0x2c], 0
    mov dword ptr [r8 + 0x30], 0x402000
    mov dword ptr [r8 + 0x34], 0
    movzx eax, word ptr [r8 + 0x1e]
    lea r9, [r8 + rax * 4 + 0x3000]     # r9: its notification
    mov word ptr [r8 + 0x1c], 1
    mov byte ptr [r8 + 0x14], 15

    # One descriptor, in every entry of the ring: a header and a short frame, all zeroes.
    mov edx, 0x400000
    mov dword ptr [rdx], 0x403000
    mov dword ptr [rdx + 8], 72
    mov edx, 0x401000
    mov word ptr [rdx], 1       # no interrupts

    mov r14d, 2000
.Lsend:
    mov edx, 0x401002
    inc word ptr [rdx]
    mov word ptr [r9], 1
    mov ecx, 50
.Lwork:
    dec ecx
    jnz .Lwork
    test ebp, ebp
    jz .Lsent
    mov edx, 0xfee00380         # 200 microseconds of a crystal of 25 MHz
    mov dword ptr [rdx], 5000
    sti
    hlt
    cli
.Lsent:
    dec r14d
    jnz .Lsend
off:
    mov edx, 0x604              # ACPI S5
    mov eax, 0x3400
    out dx, ax
.Lrest:
    hlt
    jmp .Lrest

.balign 16
tick:
    push rdx
    mov edx, 0xfee000b0
    mov dword ptr [rdx], 0
    pop rdx
    iretq

idt_register:
    .word 0xfff
    .quad 0x500000

# edi: slot, ebx: register; edx: the port to read or write it.
config_select:
    mov eax, edi
    shl eax, 11
    or eax, ebx
    or eax, 0x80000000
    mov edx, 0xcf8
    out dx, eax
    mov edx, 0xcfc
    ret
.global sender_end
sender_end:
.text
