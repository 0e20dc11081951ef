//! The machine's part of `vm.info`: which devices there are, and where.

use virtio_devices::pci::BAR_SIZE;

use super::{Kind, Machine, layout};
use crate::device_tree::{DeviceNode, DeviceTree, PciBarType, Resource};
use crate::pci;

fn node(id: &str, resources: Vec<Resource>) -> DeviceNode {
    DeviceNode { id: id.to_owned(), resources, ..DeviceNode::default() }
}

impl Machine {
    /// The devices and what they occupy, as `vm.info` shows them.
    #[must_use]
    pub fn device_tree(&self) -> DeviceTree {
        let mut tree = DeviceTree::new();
        let mut add = |node: DeviceNode| tree.insert(node.id.clone(), node);
        add(node(
            "__ioapic",
            vec![Resource::MmioAddressRange { base: layout::IOAPIC, size: 0x20 }],
        ));
        if self.serial.is_some() {
            let ports = Resource::PioAddressRange { base: layout::COM1, size: 8 };
            let irq = Resource::LegacyIrq(u32::from(layout::COM1_IRQ));
            add(node("__serial", vec![irq, ports]));
        }
        for device in &self.placed {
            let transport = format!("_virtio-pci-{}", device.id);
            // Where the guest has put it, or while it is disabled where it was at power-on.
            let moved = self.pci.device(device.slot).and_then(|device| device.bar_range());
            let base = moved.map_or(u64::from(pci::bar_address(device.slot)), |range| range.start);
            let bar = Resource::PciBar {
                index: 0,
                base,
                size: BAR_SIZE,
                type_: PciBarType::Mmio32,
                prefetchable: false,
            };
            let mac = match device.kind {
                Kind::Net { index } => self.macs.get(index).cloned().flatten(),
                Kind::Console | Kind::Disk { .. } | Kind::Rng => None,
            };
            let mac = mac.map(Resource::MacAddress).into_iter().collect();
            add(DeviceNode {
                children: vec![device.id.clone()],
                pci_bdf: Some(format!("0000:00:{:02x}.0", device.slot)),
                ..node(&transport, vec![bar])
            });
            add(DeviceNode { parent: Some(transport), ..node(&device.id, mac) });
        }
        tree
    }
}
