//! The machine around the processor: all devices, reached through [`hypervisor::Bus`].
//!
//! A [`Machine`] is part of the deterministic state machine that a guest is. What it does is a
//! function of its configuration, of [`HostFacts`], and of the accesses and events it is given with
//! their execution points; it reads no host clock, randomness, file or descriptor (but for
//! [`Machine::load`], which reads the kernel before the guest's first instruction). What it wants done in
//! the world it queues as [`MachineEffect`]s, which the run loop collects.
//!
//! Devices are known to events and effects by a number, `device`: their slot on the PCI bus.

mod bus;
pub mod facts;
pub mod layout;
mod state;
mod tree;

use ft::{Control, Event};
use hypervisor::{AccessContext, GuestMemory, LongModeEntry, Msi};
use serde::{Deserialize, Serialize};
use virtio_devices::{
    BlockCompletion, BlockConfig, BlockFront, BlockRequest, BlockStatus, ConsoleFront, DeviceEvent,
    Effect, Effects, Front, FrontError, NetFront, RngFront, net::Offloads,
};

use crate::acpi;
use crate::api::Counters;
use crate::boot::{self, LoadError};
use crate::config::{ConsoleMode, VmConfig};
use crate::legacy::{Power, Rtc, SerialPort};
use crate::pci::{self, PciBus, PciError};

pub use state::{MachineState, RestoreError};

/// What a machine takes over from the host that creates it, once. A backup gets the primary's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// Wall time (nanoseconds since 1970) when the guest's TSC is zero.
    pub boot_wall_ns: u64,
    /// Size of each disk of the configuration, in sectors of 512 bytes.
    pub disk_sectors: Vec<u64>,
}

/// Something the machine wants done in the world.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MachineEffect {
    /// A disk request, to be answered by [`Event::DiskCompletion`].
    Block {
        /// The disk.
        device: u8,
        /// What to do.
        request: BlockRequest,
    },
    /// Frames to send.
    Frames {
        /// The network device.
        device: u8,
        /// The frames, each behind its virtio_net_hdr.
        frames: Vec<Vec<u8>>,
    },
    /// What the guest takes undone in received frames from now on.
    Offloads {
        /// The network device.
        device: u8,
        /// The set.
        offloads: Offloads,
    },
    /// Bytes written to a virtio console.
    Console {
        /// The console.
        device: u8,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// Bytes written to the serial port.
    Serial {
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// The guest wants random bytes, to be answered by [`Event::Entropy`].
    EntropyWanted {
        /// The entropy device.
        device: u8,
        /// How many at most.
        len: u32,
    },
    /// The guest turned the machine off.
    PowerOff,
    /// The guest, or an operator, reset the machine.
    Reset,
}

/// Why a machine cannot be built or cannot take an event.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The PCI devices cannot be placed.
    #[error("cannot place the PCI devices")]
    Pci(#[from] PciError),
    /// The sizes of the disks are not those of the configuration.
    #[error("the VM has {disks} disks, but the sizes of {sizes} are known")]
    DiskSizes {
        /// Disks configured.
        disks: usize,
        /// Sizes given.
        sizes: usize,
    },
    /// An event for a device that does not exist.
    #[error("an event names device {device}, which this VM does not have")]
    NoSuchDevice {
        /// The number in the event.
        device: u8,
    },
    /// An event that a device cannot have.
    #[error("device {device} cannot take an event")]
    Event {
        /// The device.
        device: u8,
        /// Why.
        #[source]
        source: FrontError,
    },
    /// An event that is the run loop's business.
    #[error("the event is not for the machine: {event}")]
    NotForMachine {
        /// Its kind.
        event: &'static str,
    },
}

/// What kind of device sits in a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Console,
    Disk { index: usize },
    Net { index: usize },
    Rng,
}

/// A PCI device of a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Placed {
    /// Name in the device tree.
    pub id: String,
    pub kind: Kind,
    /// Slot on the bus, and the number of the device in events and effects.
    pub slot: u8,
}

/// The PCI devices of `config` with their slots, in the order they are created.
pub(crate) fn place(config: &VmConfig) -> Result<Vec<Placed>, PciError> {
    let mut devices = Vec::new();
    if config.console.mode != ConsoleMode::Off {
        let id = config.console.pci.id.clone().unwrap_or_else(|| "__console".to_owned());
        devices.push((id, Kind::Console, config.console.pci.pci_device_id));
    }
    for (index, disk) in config.disks().iter().enumerate() {
        let id = disk.pci.id.clone().unwrap_or_else(|| format!("_disk{index}"));
        devices.push((id, Kind::Disk { index }, disk.pci.pci_device_id));
    }
    for (index, net) in config.net().iter().enumerate() {
        let id = net.pci.id.clone().unwrap_or_else(|| format!("_net{index}"));
        devices.push((id, Kind::Net { index }, net.pci.pci_device_id));
    }
    let id = config.rng.pci.id.clone().unwrap_or_else(|| "__rng".to_owned());
    devices.push((id, Kind::Rng, config.rng.pci.pci_device_id));

    let wanted: Vec<_> = devices.iter().map(|(_, _, slot)| *slot).collect();
    let slots = pci::assign_slots(&wanted)?;
    Ok(devices
        .into_iter()
        .zip(slots)
        .map(|((id, kind, _), slot)| Placed { id, kind, slot })
        .collect())
}

fn front(
    kind: Kind,
    config: &VmConfig,
    host: &HostFacts,
) -> Result<Box<dyn Front<GuestMemory>>, MachineError> {
    Ok(match kind {
        Kind::Console => Box::new(ConsoleFront::new(&virtio_devices::ConsoleConfig::default())),
        Kind::Disk { index } => {
            let sizes = MachineError::DiskSizes {
                disks: config.disks().len(),
                sizes: host.disk_sectors.len(),
            };
            let disk = &config.disks()[index];
            Box::new(BlockFront::new(&BlockConfig {
                sectors: *host.disk_sectors.get(index).ok_or(sizes)?,
                read_only: disk.readonly,
                serial: disk.serial.clone().unwrap_or_default(),
            }))
        }
        Kind::Net { index } => {
            let net = &config.net()[index];
            // `VmConfig::complete` has filled in an address where the user gave none.
            let mac = net.mac.map_or([0x2e, 0, 0, 0, 0, index as u8], |mac| mac.0);
            let (mtu, offloads) = (net.mtu, net.offloads());
            Box::new(NetFront::new(&virtio_devices::NetConfig { mac, mtu, offloads }))
        }
        Kind::Rng => Box::new(RngFront::new()),
    })
}

/// All devices of a VM.
pub struct Machine {
    memory: GuestMemory,
    placed: Vec<Placed>,
    pci: PciBus,
    serial: Option<SerialPort>,
    power: Power,
    rtc: Rtc,
    macs: Vec<Option<String>>,
    effects: Vec<MachineEffect>,
    /// See [`Machine::stop_at_once`].
    stops_at_once: bool,
}

impl Machine {
    /// A machine just powered on, with `memory` as its RAM. `config` must be complete
    /// ([`VmConfig::complete`]).
    pub fn new(
        config: &VmConfig,
        memory: GuestMemory,
        host: &HostFacts,
    ) -> Result<Self, MachineError> {
        let (disks, sizes) = (config.disks().len(), host.disk_sectors.len());
        if disks != sizes {
            return Err(MachineError::DiskSizes { disks, sizes });
        }
        let placed = place(config)?;
        let fronts = placed
            .iter()
            .map(|device| Ok((device.slot, front(device.kind, config, host)?)))
            .collect::<Result<_, MachineError>>()?;
        Ok(Self {
            memory,
            placed,
            pci: PciBus::new(fronts),
            serial: (config.serial.mode != ConsoleMode::Off).then(SerialPort::new),
            power: Power::default(),
            rtc: Rtc::new(host.boot_wall_ns),
            macs: config.net().iter().map(|net| net.mac.map(|mac| mac.to_string())).collect(),
            effects: Vec::new(),
            stops_at_once: false,
        })
    }

    /// From now on also stops the guest where it would have the run loop look at it at its next stop: at console and
    /// serial output, and where a device has room again for what waits outside. For a processor that may run on for as
    /// long as it likes otherwise.
    pub fn stop_at_once(&mut self) {
        self.stops_at_once = true;
    }

    /// Puts kernel, initramfs, command line and ACPI tables into memory; the result is where the
    /// processor starts.
    pub fn load(&mut self, payload: &boot::Payload) -> Result<LongModeEntry, LoadError> {
        let entry = boot::load(&self.memory, payload)?;
        acpi::write(&self.memory, self.serial.is_some()).map_err(LoadError::Memory)?;
        Ok(entry)
    }

    /// Lets an event happen, at the execution point `cx` says. Not for [`Event::Anchor`] and the control
    /// operations that are about the run loop.
    pub fn apply(&mut self, event: &Event, cx: &mut AccessContext<'_>) -> Result<(), MachineError> {
        let (device, event) = match event {
            Event::Frames { device, frames } => (*device, DeviceEvent::Frames(frames.clone())),
            Event::DiskCompletion { device, request, status, data } => {
                let status = BlockStatus::from_byte(*status);
                let completion = BlockCompletion { id: *request, status, data: data.clone() };
                (*device, DeviceEvent::BlockCompletion(completion))
            }
            Event::ConsoleInput { device, bytes } => {
                (*device, DeviceEvent::ConsoleInput(bytes.clone()))
            }
            Event::Entropy { device, bytes } => (*device, DeviceEvent::Entropy(bytes.clone())),
            Event::SerialInput { bytes } => {
                if let Some(serial) = &mut self.serial {
                    serial.input(bytes);
                }
                self.after_serial(cx);
                return Ok(());
            }
            Event::Control(control) => return self.control(*control, cx),
            Event::Anchor { .. } => return Err(MachineError::NotForMachine { event: "anchor" }),
        };
        let mut effects = Effects::new();
        let function = self.pci.device_mut(device).ok_or(MachineError::NoSuchDevice { device })?;
        let result = function.apply(event, &self.memory, &mut effects);
        self.route(device, effects, cx);
        result.map_err(|source| MachineError::Event { device, source })
    }

    fn control(
        &mut self,
        control: Control,
        cx: &mut AccessContext<'_>,
    ) -> Result<(), MachineError> {
        match control {
            Control::PowerButton => {
                self.power.press_button();
                self.drive_sci(cx);
            }
            Control::PowerOff => self.push(MachineEffect::PowerOff, cx),
            Control::Reset => self.push(MachineEffect::Reset, cx),
            Control::Pause | Control::Resume | Control::Disable | Control::HandOver => {
                return Err(MachineError::NotForMachine {
                    event: "control operation of the run loop",
                });
            }
        }
        Ok(())
    }

    /// What the machine wants done, in order. The run loop takes everything out after each run of the
    /// processor and each [`Machine::apply`].
    pub fn effects(&mut self) -> &mut Vec<MachineEffect> {
        &mut self.effects
    }

    /// Disk requests handed out whose completions have not come, in order per device. A side that goes
    /// live submits them again.
    #[must_use]
    pub fn outstanding(&self) -> Vec<(u8, BlockRequest)> {
        let requests = |(slot, device): (u8, &virtio_devices::VirtioPci<GuestMemory>)| {
            device.outstanding().into_iter().filter_map(move |effect| match effect {
                Effect::Block(request) => Some((slot, request)),
                _ => None,
            })
        };
        self.pci.devices().flat_map(requests).collect()
    }

    /// Requests for random bytes that have not been answered, in order per device.
    #[must_use]
    pub fn entropy_wanted(&self) -> Vec<(u8, u32)> {
        let requests = |(slot, device): (u8, &virtio_devices::VirtioPci<GuestMemory>)| {
            device.outstanding().into_iter().filter_map(move |effect| match effect {
                Effect::EntropyWanted { len } => Some((slot, len)),
                _ => None,
            })
        };
        self.pci.devices().flat_map(requests).collect()
    }

    /// What each network device's driver takes undone in received frames. A side that goes live tells its
    /// host.
    #[must_use]
    pub fn offloads(&self) -> Vec<(u8, Offloads)> {
        let agreed = |(slot, device): (u8, &virtio_devices::VirtioPci<GuestMemory>)| {
            device.outstanding().into_iter().filter_map(move |effect| match effect {
                Effect::Offloads(offloads) => Some((slot, offloads)),
                _ => None,
            })
        };
        self.pci.devices().flat_map(agreed).collect()
    }

    /// Whether the guest has yet to take what this device received. See
    /// [`virtio_devices::Front::backlogged`].
    #[must_use]
    pub fn backlogged(&self, device: u8) -> bool {
        self.pci.device(device).is_some_and(|device| device.front().backlogged())
    }

    /// As [`Machine::backlogged`], of the serial port.
    #[must_use]
    pub fn serial_backlogged(&self) -> bool {
        self.serial.as_ref().is_some_and(SerialPort::backlogged)
    }

    /// What the devices have done so far, by device id: part of the state, so it outlives a change of
    /// host. [`crate::backends::Backends::counters`] adds latencies.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let counted =
            |placed: &&Placed| matches!(placed.kind, Kind::Disk { .. } | Kind::Net { .. });
        let values = |placed: &Placed| {
            let counters = self.pci.device(placed.slot).map(|device| device.counters());
            let counters = counters.unwrap_or_default();
            counters.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
        };
        let devices = self.placed.iter().filter(counted);
        devices.map(|placed| (placed.id.clone(), values(placed))).collect()
    }

    /// A reset of the whole machine: every device as at power-on, except that the clock keeps its time
    /// and that disk requests under way still complete.
    pub fn reset(&mut self) {
        self.pci.reset();
        if let Some(serial) = &mut self.serial {
            *serial = SerialPort::new();
        }
        self.power = Power::default();
        self.rtc.reset();
    }

    fn push(&mut self, effect: MachineEffect, cx: &mut AccessContext<'_>) {
        self.effects.push(effect);
        cx.stop = true;
    }

    /// Console output waits for the next stop if one is certain to come: a stop for each byte would slow the guest
    /// down.
    fn push_output(&mut self, effect: MachineEffect, cx: &mut AccessContext<'_>) {
        cx.stop |= self.stops_at_once;
        match (self.effects.last_mut(), effect) {
            (Some(MachineEffect::Serial { bytes }), MachineEffect::Serial { bytes: more }) => {
                bytes.extend(more);
            }
            (
                Some(MachineEffect::Console { device, bytes }),
                MachineEffect::Console { device: same, bytes: more },
            ) if *device == same => bytes.extend(more),
            (_, effect) => self.effects.push(effect),
        }
    }

    /// Raises the interrupts among `effects` and queues the rest.
    fn route(&mut self, device: u8, effects: Effects, cx: &mut AccessContext<'_>) {
        for effect in effects {
            match effect {
                Effect::Interrupt { address, data } => {
                    cx.interrupts.signal_msi(Msi { address, data })
                }
                Effect::Block(request) => self.push(MachineEffect::Block { device, request }, cx),
                Effect::Frames(frames) => self.push(MachineEffect::Frames { device, frames }, cx),
                Effect::Offloads(offloads) => {
                    self.push(MachineEffect::Offloads { device, offloads }, cx);
                }
                Effect::ConsoleOutput(bytes) => {
                    self.push_output(MachineEffect::Console { device, bytes }, cx);
                }
                Effect::EntropyWanted { len } => {
                    self.push(MachineEffect::EntropyWanted { device, len }, cx);
                }
            }
        }
    }

    /// Collects what an access to the serial port, or input on it, led to.
    fn after_serial(&mut self, cx: &mut AccessContext<'_>) {
        let Some(serial) = &mut self.serial else { return };
        if serial.take_interrupt() {
            // ISA interrupts are edge-triggered.
            cx.interrupts.set_line(u32::from(layout::COM1_IRQ), true);
            cx.interrupts.set_line(u32::from(layout::COM1_IRQ), false);
        }
        let bytes = serial.take_output();
        if !bytes.is_empty() {
            self.push_output(MachineEffect::Serial { bytes }, cx);
        }
    }

    fn drive_sci(&mut self, cx: &mut AccessContext<'_>) {
        cx.interrupts.set_line(u32::from(layout::SCI_IRQ), self.power.sci());
    }
}

#[cfg(test)]
mod tests;
