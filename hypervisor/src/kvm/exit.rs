//! What every reason to leave `KVM_RUN` means.

use kvm_ioctls::VcpuExit;

use super::run_page::RunPage;
use crate::bus::{AccessContext, Bus};
use crate::{Error, Exit};

/// What the run loop does after an exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Enter the guest again: the exit has been dealt with.
    Enter,
    /// Return this to the caller.
    Return(Exit),
}

/// Deals with one exit. Accesses to devices call `bus`; what they leave half done, KVM finishes when entered
/// again.
pub(super) fn handle(
    exit: VcpuExit<'_>,
    page: &RunPage,
    bus: &mut dyn Bus,
    cx: &mut AccessContext<'_>,
) -> Result<Next, Error> {
    match exit {
        // Device accesses. String instructions may bring several elements for one port.
        VcpuExit::IoIn(port, data) => {
            for element in data.chunks_mut(page.port_size()) {
                bus.pio_read(port, element, cx);
            }
            Ok(Next::Enter)
        }
        VcpuExit::IoOut(port, data) => {
            for element in data.chunks(page.port_size()) {
                bus.pio_write(port, element, cx);
            }
            Ok(Next::Enter)
        }
        VcpuExit::MmioRead(address, data) => {
            let mut done = 0;
            while done < data.len() {
                let len = access_len(data.len() - done);
                bus.mmio_read(address.wrapping_add(done as u64), &mut data[done..done + len], cx);
                done += len;
            }
            Ok(Next::Enter)
        }
        VcpuExit::MmioWrite(address, data) => {
            let mut done = 0;
            while done < data.len() {
                let len = access_len(data.len() - done);
                bus.mmio_write(address.wrapping_add(done as u64), &data[done..done + len], cx);
                done += len;
            }
            Ok(Next::Enter)
        }

        // A signal. The run loop looks whether it was a kick before it enters again.
        VcpuExit::Intr => Ok(Next::Enter),
        // With the LAPIC in the kernel HLT waits there, until an interrupt or a kick. Should it come out all
        // the same, the caller waits.
        VcpuExit::Hlt => Ok(Next::Return(Exit::Halted)),
        // A triple fault.
        VcpuExit::Shutdown => Ok(Next::Return(Exit::Shutdown)),
        // For interrupt controllers outside the kernel: ours are inside and need nothing.
        VcpuExit::IrqWindowOpen | VcpuExit::SetTpr | VcpuExit::IoapicEoi(_) => Ok(Next::Enter),
        // The host took a non-maskable interrupt of its own.
        VcpuExit::Nmi => Ok(Next::Enter),

        // The processor or the kernel cannot go on with this guest.
        VcpuExit::FailEntry(reason, cpu) => Err(stopped(format!(
            "the host processor {cpu} refused to enter the guest (hardware reason {reason:#x})"
        ))),
        VcpuExit::InternalError => Err(stopped(page.internal_error())),
        VcpuExit::MemoryFault { flags, gpa, size } => Err(stopped(format!(
            "the host has no memory for guest address {gpa:#x} ({size} bytes, flags {flags:#x})"
        ))),
        VcpuExit::Unknown => Err(stopped("KVM left the guest for an unknown reason".to_owned())),

        // What has to be asked for, and is not.
        VcpuExit::Exception => Err(unasked("exception")),
        VcpuExit::Hypercall(_) => Err(unasked("hypercall")),
        VcpuExit::Debug(_) => Err(unasked("debug")),
        VcpuExit::TprAccess => Err(unasked("TPR access")),
        VcpuExit::SystemEvent(kind, _) => Err(unasked(&format!("system event {kind}"))),
        VcpuExit::Hyperv => Err(unasked("Hyper-V")),
        VcpuExit::X86Rdmsr(exit) => Err(unasked(&format!("RDMSR {:#x}", exit.index))),
        VcpuExit::X86Wrmsr(exit) => Err(unasked(&format!("WRMSR {:#x}", exit.index))),
        VcpuExit::Watchdog => Err(unasked("watchdog")),
        // Numbers kvm-ioctls has no name for: dirty ring full, bus lock, Xen, notify and later ones.
        VcpuExit::Unsupported(number) => Err(unasked(&format!("number {number}"))),

        // Other architectures.
        VcpuExit::S390Sieic
        | VcpuExit::S390Reset
        | VcpuExit::S390Ucontrol
        | VcpuExit::S390Tsch
        | VcpuExit::S390Stsi => Err(unasked("s390")),
        VcpuExit::Dcr | VcpuExit::Osi | VcpuExit::PaprHcall | VcpuExit::Epr => {
            Err(unasked("PowerPC"))
        }
    }
}

fn stopped(reason: String) -> Error {
    Error::Stopped { reason }
}

fn unasked(exit: &str) -> Error {
    stopped(format!("KVM left the guest with an exit nobody asked for ({exit})"))
}

/// The size of the next access of `len` bytes: a device sees powers of two. KVM cuts an access in two where it
/// crosses a page, which can leave any number of bytes.
fn access_len(len: usize) -> usize {
    1 << len.min(8).ilog2()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_are_cut_into_powers_of_two() {
        let cut = |mut len: usize| {
            let mut parts = Vec::new();
            while len > 0 {
                parts.push(access_len(len));
                len -= access_len(len);
            }
            parts
        };
        assert_eq!(cut(8), [8]);
        assert_eq!(cut(7), [4, 2, 1]);
        assert_eq!(cut(3), [2, 1]);
        assert_eq!(cut(1), [1]);
    }
}
