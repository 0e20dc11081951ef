# A guest that is as rude to its disk as a driver can be: it overwrites buffers whose requests are under way, reads
# memory that a request may be about to fill, and asks for overlapping writes and reads of the same sectors and into
# the same pages, sixteen at a time. What it saw goes into a checksum; what must hold it checks.
#
# It is entered as a 64-bit Linux kernel is, at 2 MiB, with the first 4 GiB mapped to themselves. It polls: no interrupts.

.section .rodata.disk_guest, "a"
.balign 16
.global disk_guest_start
disk_guest_start:
    cli
    mov esp, 0x600000

    # Find the virtio disk: vendor 1af4, device 1042.
    mov edi, 0
.Lnext_slot:
    inc edi
    cmp edi, 32
    je off
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
.Lnext_capability:
    call config_read
    movzx ebx, ah
    jmp .Lcapability

    # Initialize the device (virtio 1.2, 3.1.1 and 4.1.4.3).
.Lfound:
    mov byte ptr [r8 + 0x14], 0
    mov byte ptr [r8 + 0x14], 1
    mov byte ptr [r8 + 0x14], 3
    mov dword ptr [r8 + 0x08], 0
    mov dword ptr [r8 + 0x0c], 0x200    # VIRTIO_BLK_F_FLUSH
    mov dword ptr [r8 + 0x08], 1
    mov dword ptr [r8 + 0x0c], 1        # VIRTIO_F_VERSION_1
    mov byte ptr [r8 + 0x14], 11
    mov word ptr [r8 + 0x16], 0         # queue 0, of 64 entries
    mov word ptr [r8 + 0x18], 64
    mov dword ptr [r8 + 0x20], 0x400000
    mov dword ptr [r8 + 0x24], 0
    mov dword ptr [r8 + 0x28], 0x401000
    mov dword ptr [r8 + 0x2c], 0
    mov dword ptr [r8 + 0x30], 0x402000
    mov dword ptr [r8 + 0x34], 0
    movzx eax, word ptr [r8 + 0x1e]
    imul eax, r10d
    add r9, rax
    mov word ptr [r8 + 0x1c], 1
    mov byte ptr [r8 + 0x14], 15

    # r14: round, r12: checksum, r13: mismatches, rbx: random; [0x403ff0]: requests that failed.
    xor r14d, r14d
    xor r12d, r12d
    xor r13d, r13d
    mov edx, 0x403ff0
    mov [rdx], r12
    movabs rbx, 0x2545f4914f6cdd1d

.Lround:
    # Request 0 writes a pattern to sector 100, request 1 reads it back.
    call random
    mov edx, 0x403fe0
    mov [rdx], rax              # the pattern
    mov edi, 0x420000
    mov ecx, 128
.Lfill:
    mov [rdi], rax
    add rdi, 8
    dec ecx
    jnz .Lfill
    mov esi, 0
    mov eax, 1
    mov ecx, 100
    mov edx, 0x420000
    mov edi, 1024
    call build
    mov esi, 1
    mov eax, 0
    mov ecx, 100
    mov edx, 0x421000
    mov edi, 1024
    call build
    # Fourteen at random: 1 to 4 of 67 sectors, from or to anywhere in nine pages.
    mov esi, 2
.Lrequest:
    call random
    mov rdx, rax
    shr rdx, 24
    and edx, 63
    shl edx, 9
    add edx, 0x410000
    mov rdi, rax
    shr rdi, 16
    and edi, 3
    inc edi
    shl edi, 9
    mov rcx, rax
    shr rcx, 8
    and ecx, 63
    and eax, 7
    cmp eax, 7
    je .Lflush
    cmp eax, 3
    setb al
    movzx eax, al               # 1 writes, 0 reads
    jmp .Lkind
.Lflush:
    mov eax, 4
.Lkind:
    call build
    inc esi
    cmp esi, 16
    jne .Lrequest

    # All sixteen at once.
    lea eax, [r14 + 1]
    shl eax, 4
    mov edx, 0x401002
    mov [rdx], ax
    mov word ptr [r9], 0

    # The pattern's buffer is overwritten while its request is under way,
    mov edx, 0x403fe0
    mov rax, [rdx]
    not rax
    mov edi, 0x420000
    mov ecx, 128
.Lspoil:
    mov [rdi], rax
    add rdi, 8
    dec ecx
    jnz .Lspoil
    # and so is everything else, here and there, and looked at, until all are done.
.Lwait:
    call random
    mov rdx, rax
    shr rdx, 32
    and edx, 0x7ff8
    add edx, 0x410000
    rol r12, 7
    xor r12, [rdx]
    mov [rdx], rax
    lea eax, [r14 + 1]
    shl eax, 4
    mov edx, 0x402002
    cmp ax, [rdx]
    jne .Lwait

    # Every word of the buffers counts, and every status.
    mov edx, 0x410000
    mov ecx, 0x1200
.Lsum:
    rol r12, 7
    xor r12, [rdx]
    add rdx, 8
    dec ecx
    jnz .Lsum
    mov edx, 0x403010
    mov ecx, 16
.Lstatus:
    movzx eax, byte ptr [rdx]
    rol r12, 7
    xor r12, rax
    test eax, eax
    jz .Lfine
    mov edi, 0x403ff0
    inc dword ptr [rdi]
.Lfine:
    add rdx, 32
    dec ecx
    jnz .Lstatus

    # If neither failed, what was read is what was in the buffer when the write was asked for.
    mov edx, 0x403010
    mov al, [rdx]
    or al, [rdx + 32]
    jnz .Lchecked
    mov edx, 0x403fe0
    mov rax, [rdx]
    mov edi, 0x421000
    mov ecx, 128
.Lcheck:
    cmp rax, [rdi]
    je .Lequal
    inc r13
.Lequal:
    add rdi, 8
    dec ecx
    jnz .Lcheck
.Lchecked:
    inc r14d
    cmp r14d, 100
    jne .Lround

    mov rax, r13
    call print_hex
    mov edx, 0x403ff0
    mov rax, [rdx]
    call print_hex
    mov rax, r12
    call print_hex
off:
    mov edx, 0x604              # ACPI S5
    mov eax, 0x3400
    out dx, ax
.Lrest:
    hlt
    jmp .Lrest

# rax: the next random number.
random:
    mov rax, rbx
    shl rax, 13
    xor rbx, rax
    mov rax, rbx
    shr rax, 7
    xor rbx, rax
    mov rax, rbx
    shl rax, 17
    xor rbx, rax
    mov rax, rbx
    ret

# esi: number, eax: type, ecx: sector, edx: buffer, edi: its length.
build:
    mov r10d, esi
    shl r10d, 5
    add r10d, 0x403000          # header, and 16 bytes on the status
    mov [r10], eax
    mov dword ptr [r10 + 4], 0
    mov [r10 + 8], rcx
    mov byte ptr [r10 + 16], 0xff
    lea ebp, [rsi + rsi * 2]
    mov r11d, ebp
    shl r11d, 4
    add r11d, 0x400000          # three descriptors
    mov [r11], r10
    mov dword ptr [r11 + 8], 16
    mov word ptr [r11 + 12], 1
    inc ebp
    cmp eax, 4
    jne .Lwith_data
    inc ebp                     # a flush has none
.Lwith_data:
    mov [r11 + 14], bp
    mov [r11 + 16], rdx
    mov [r11 + 24], edi
    mov word ptr [r11 + 28], 1
    test eax, eax
    jnz .Ldirection
    mov word ptr [r11 + 28], 3
.Ldirection:
    lea ebp, [rsi + rsi * 2 + 2]
    mov [r11 + 30], bp
    add r10, 16
    mov [r11 + 32], r10
    mov dword ptr [r11 + 40], 1
    mov dword ptr [r11 + 44], 2
    lea r10d, [rsi + rsi * 2]
    mov ebp, r14d
    shl ebp, 4
    add ebp, esi
    and ebp, 63
    add ebp, ebp
    add ebp, 0x401004
    mov [rbp], r10w
    ret

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

# rax: number, 16 digits and a space, to the serial port.
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
    mov al, 32
put:
    push rax
    mov edx, 0x3fd
.Lbusy:
    in al, dx
    test al, 0x20
    jz .Lbusy
    pop rax
    mov edx, 0x3f8
    out dx, al
    ret

.global disk_guest_end
disk_guest_end:
.text
