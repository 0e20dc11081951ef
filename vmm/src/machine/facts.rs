//! What a guest sees of its devices before it uses them, for two hosts to compare.
//!
//! Primary and backup build their machines from one configuration. Should they be different programs, or
//! hosts with different abilities, the backup's guest would find other devices than it knows: that must
//! come to light before anything is copied, and by name.

use serde::{Deserialize, Serialize};

use super::{HostFacts, MachineError, front, place};
use crate::config::VmConfig;

/// Bytes of device configuration compared: more than any device of ours has.
const CONFIG_BYTES: usize = 64;

/// One device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceFacts {
    /// Its name in the configuration.
    pub id: String,
    /// Its slot on the bus.
    pub slot: u8,
    /// Its kind: the virtio device ID.
    pub kind: u16,
    /// Feature bits it offers.
    pub features: u64,
    /// Its queues and their sizes.
    pub queue_sizes: Vec<u16>,
    /// The beginning of its configuration.
    pub config: Vec<u8>,
}

/// The devices of a machine, in the order of their slots.
pub fn facts(config: &VmConfig, host: &HostFacts) -> Result<Vec<DeviceFacts>, MachineError> {
    let describe = |placed: super::Placed| {
        let front = front(placed.kind, config, host)?;
        let mut bytes = vec![0; CONFIG_BYTES];
        front.read_config(0, &mut bytes);
        Ok(DeviceFacts {
            id: placed.id,
            slot: placed.slot,
            kind: front.device_id(),
            features: front.features(),
            queue_sizes: front.queue_sizes().to_vec(),
            config: bytes,
        })
    };
    place(config)?.into_iter().map(describe).collect()
}

/// Where the backup's devices differ from the primary's, each difference in words.
#[must_use]
pub fn differences(primary: &[DeviceFacts], backup: &[DeviceFacts]) -> Vec<String> {
    let find = |all: &[DeviceFacts], id: &str| all.iter().find(|device| device.id == id).cloned();
    let mut found = Vec::new();
    for device in primary {
        let id = &device.id;
        let Some(ours) = find(backup, id) else {
            found.push(format!("the device '{id}' is on the primary only"));
            continue;
        };
        let mut differ = |what: &str, theirs: String, ours: String| {
            if theirs != ours {
                found.push(format!(
                    "the device '{id}' has {what} {theirs} on the primary, {ours} on the backup"
                ));
            }
        };
        differ("kind", device.kind.to_string(), ours.kind.to_string());
        differ("slot", device.slot.to_string(), ours.slot.to_string());
        differ("features", format!("{:#x}", device.features), format!("{:#x}", ours.features));
        let sizes = |sizes: &[u16]| format!("{sizes:?}");
        differ("queues", sizes(&device.queue_sizes), sizes(&ours.queue_sizes));
        differ("configuration", hex(&device.config), hex(&ours.config));
    }
    for device in backup.iter().filter(|device| find(primary, &device.id).is_none()) {
        found.push(format!("the device '{}' is on the backup only", device.id));
    }
    found
}

/// The sizes of a VM's disks, as they are in one place.
#[derive(Debug, Clone, Copy)]
pub struct DiskSizes<'a> {
    /// Which place, as a difference names it: `on the primary`.
    pub place: &'a str,
    /// In sectors, in the order of the configuration.
    pub sectors: &'a [u64],
}

/// Where the images in one place differ in size from those in the other, each difference in words.
#[must_use]
pub fn disk_differences(
    config: &VmConfig,
    there: DiskSizes<'_>,
    here: DiskSizes<'_>,
) -> Vec<String> {
    let (theirs, ours) = (there.sectors.len(), here.sectors.len());
    if theirs != ours {
        return vec![format!("there are {theirs} disks {}, {ours} {}", there.place, here.place)];
    }
    let sizes = there.sectors.iter().zip(here.sectors);
    let mut found = Vec::new();
    for (disk, (theirs, ours)) in config.disks().iter().zip(sizes) {
        if theirs != ours {
            let id = disk.pci.id.as_deref().unwrap_or("without a name");
            found.push(format!(
                "the disk '{id}' has {theirs} sectors {}, {ours} {}",
                there.place, here.place
            ));
        }
    }
    found
}

/// Without the zeroes at its end.
fn hex(bytes: &[u8]) -> String {
    let end = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    bytes[..end].iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn machine() -> (VmConfig, Vec<DeviceFacts>) {
        let config = json!({
            "payload": {"kernel": "/k"},
            "disks": [{"path": "/a"}, {"path": "/b", "readonly": true}],
            "net": [{"mac": "2e:64:79:61:64:01"}],
        });
        let mut config: VmConfig = serde_json::from_value(config).unwrap();
        config.complete(|| [0; 5]);
        let host = HostFacts { boot_wall_ns: 0, disk_sectors: vec![2048, 4096] };
        let facts = facts(&config, &host).unwrap();
        (config, facts)
    }

    #[test]
    fn equal_machines_have_no_differences() {
        let (_, devices) = machine();
        assert_eq!(devices.len(), 5, "console, two disks, network, entropy");
        assert!(differences(&devices, &machine().1).is_empty());
    }

    #[test]
    fn every_difference_is_named() {
        let (_, devices) = machine();
        let differs = |change: &dyn Fn(&mut Vec<DeviceFacts>), words: &[&str]| {
            let mut other = devices.clone();
            change(&mut other);
            let found = differences(&devices, &other);
            assert_eq!(found.len(), 1, "{found:?}");
            for word in words {
                assert!(found[0].contains(word), "{word}: {found:?}");
            }
        };
        let id = |index: usize| format!("'{}'", devices[index].id);
        differs(&|other| other[1].features ^= 1 << 9, &[&id(1), "features"]);
        differs(&|other| other[2].kind = 99, &[&id(2), "kind", "99"]);
        differs(&|other| other[3].slot += 1, &[&id(3), "slot"]);
        differs(&|other| other[0].queue_sizes.push(2), &[&id(0), "queues"]);
        differs(&|other| other[1].config[0] ^= 1, &[&id(1), "configuration"]);
        differs(&|other| drop(other.remove(4)), &[&id(4), "on the primary only"]);
        let more = DeviceFacts { id: "_new".into(), ..devices[0].clone() };
        differs(&|other| other.push(more.clone()), &["'_new'", "on the backup only"]);
    }

    #[test]
    fn a_disk_of_another_size_is_named() {
        let (config, _) = machine();
        let differences = |primary: &[u64], backup: &[u64]| {
            let there = DiskSizes { place: "on the primary", sectors: primary };
            disk_differences(&config, there, DiskSizes { place: "on the backup", sectors: backup })
        };
        assert!(differences(&[2048, 4096], &[2048, 4096]).is_empty());
        let found = differences(&[2048, 4096], &[2048, 8]);
        let id = config.disks()[1].pci.id.clone().unwrap();
        assert_eq!(
            found,
            [format!("the disk '{id}' has 4096 sectors on the primary, 8 on the backup")]
        );
        let found = differences(&[2048], &[]);
        assert_eq!(found, ["there are 1 disks on the primary, 0 on the backup"]);
    }
}
