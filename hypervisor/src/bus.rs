//! How a vCPU reaches devices, and how devices reach the interrupt controllers.

/// The devices of a machine as the processor sees them: port and memory-mapped registers.
///
/// Called on the vCPU's thread, in the middle of the instruction that made the access. An address
/// nobody claims reads as all ones and ignores writes; an implementation must never panic on what a
/// guest does. `data` is 1, 2, 4 or 8 bytes long (ports: 1, 2 or 4), little-endian.
pub trait Bus {
    /// IN.
    fn pio_read(&mut self, port: u16, data: &mut [u8], cx: &mut AccessContext<'_>);
    /// OUT.
    fn pio_write(&mut self, port: u16, data: &[u8], cx: &mut AccessContext<'_>);
    /// A load from a guest-physical address that is not RAM.
    fn mmio_read(&mut self, address: u64, data: &mut [u8], cx: &mut AccessContext<'_>);
    /// A store to a guest-physical address that is not RAM.
    fn mmio_write(&mut self, address: u64, data: &[u8], cx: &mut AccessContext<'_>);
}

/// What a device may know and do during an access.
pub struct AccessContext<'a> {
    /// Instructions retired before the one making this access: its execution point.
    pub retired: u64,
    /// The guest's TSC at that point, in ticks of [`crate::clock::TSC_HZ`].
    pub tsc: u64,
    /// Where to raise interrupts.
    pub interrupts: &'a mut dyn InterruptSink,
    /// Set to make [`crate::Vcpu::run`] return [`crate::Exit::Stopped`] once this instruction has retired.
    pub stop: bool,
}

/// A message-signalled interrupt: the memory write that stands for it (Intel SDM vol. 3, 11.11).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Msi {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
}

/// Where interrupts go: the interrupt controllers of a backend.
pub trait InterruptSink {
    /// Delivers a message-signalled interrupt.
    fn signal_msi(&mut self, msi: Msi);
    /// Drives an IOAPIC input (global system interrupt, 0 to 23) high or low.
    fn set_line(&mut self, gsi: u32, high: bool);
}
