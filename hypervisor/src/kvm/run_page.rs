//! The page a vCPU shares with the kernel, for what kvm-ioctls does not hand out with an exit.

use std::ptr::NonNull;
use std::sync::atomic::AtomicU8;

use kvm_bindings::{KVM_INTERNAL_ERROR_EMULATION, kvm_run};
use kvm_ioctls::VcpuFd;

/// A pointer to the `kvm_run` structure of a vCPU.
///
/// Kept next to the [`VcpuFd`] that owns the mapping, and never longer.
pub(super) struct RunPage(NonNull<kvm_run>);

// SAFETY: the mapping is not tied to a thread. Whoever holds the page also owns the vCPU's descriptor, so only
// one thread uses the two at a time.
unsafe impl Send for RunPage {}

impl RunPage {
    /// The page of `fd`.
    pub(super) fn of(fd: &mut VcpuFd) -> Self {
        Self(NonNull::from(fd.get_kvm_run()))
    }

    /// The flag that makes KVM_RUN finish what is half done and return EINTR.
    pub(super) fn immediate_exit(&self) -> *const AtomicU8 {
        // SAFETY: the mapping is as large as the structure, so the field's address lies within it.
        unsafe { (&raw const (*self.0.as_ptr()).immediate_exit).cast() }
    }

    /// Bytes of one element of the port access that KVM_RUN has just returned with. A string instruction may
    /// come with several.
    pub(super) fn port_size(&self) -> usize {
        // SAFETY: the mapping is valid for reads, and any value is one of the union's plain integers.
        let size = unsafe { (&raw const (*self.0.as_ptr()).__bindgen_anon_1.io.size).read() };
        usize::from(size).max(1)
    }

    /// What KVM says of the internal error that KVM_RUN has just returned with.
    pub(super) fn internal_error(&self) -> String {
        // SAFETY: as in `port_size`; both views of the union consist of plain integers.
        let error = unsafe { (&raw const (*self.0.as_ptr()).__bindgen_anon_1.internal).read() };
        if error.suberror != KVM_INTERNAL_ERROR_EMULATION {
            return format!("KVM reports internal error {}", error.suberror);
        }
        // The first byte of the second datum is the length of the instruction that follows; the first datum
        // says whether it is there.
        let bytes = error.data[1].to_le_bytes().into_iter().chain(error.data[2].to_le_bytes());
        let mut instruction = String::new();
        if error.ndata >= 3 && error.data[0] & 1 != 0 {
            let len = usize::from(error.data[1].to_le_bytes()[0]);
            for byte in bytes.skip(1).take(len) {
                instruction.push_str(&format!(" {byte:02x}"));
            }
        }
        format!(
            "KVM cannot execute an instruction of the guest on this host:{}; use --hypervisor soft",
            if instruction.is_empty() { " (bytes unknown)" } else { &instruction }
        )
    }
}
