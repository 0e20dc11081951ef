//! Parsing, reading back and validating configurations.

use serde_json::{Value, json};

use super::*;

fn parse(json: &str) -> Result<VmConfig, serde_json::Error> {
    serde_json::from_str(json)
}

fn from(json: Value) -> VmConfig {
    serde_json::from_value(json).unwrap()
}

/// A configuration that is fit to boot, changed by `change`.
fn bootable(change: impl FnOnce(&mut Value)) -> VmConfig {
    let mut json = json!({"payload": {"kernel": "/vmlinuz"}});
    change(&mut json);
    from(json)
}

fn refusal(change: impl FnOnce(&mut Value)) -> ValidationError {
    bootable(change).validate().unwrap_err()
}

#[test]
fn empty_object_reads_back_with_all_defaults() {
    let expected = concat!(
        r#"{"cpus":{"boot_vcpus":1,"max_vcpus":1,"kvm_hyperv":false,"max_phys_bits":46,"#,
        r#""features":{"amx":false},"nested":true,"core_scheduling":"Vm","profile":"Host"},"#,
        r#""memory":{"size":536870912,"mergeable":false,"hotplug_method":"Acpi","shared":false,"#,
        r#""hugepages":false,"prefault":false,"reserve":false,"thp":true},"#,
        r#""rng":{"pci_segment":0,"src":"/dev/urandom"},"serial":{"mode":"Null"},"#,
        r#""console":{"mode":"Tty","pci_segment":0},"#,
        r#""debug_console":{"mode":"Off","iobase":233},"pvpanic":false,"iommu":false,"#,
        r#""watchdog":false,"landlock_enable":false}"#,
    );
    let config = parse("{}").unwrap();
    assert_eq!(config, VmConfig::default());
    assert_eq!(serde_json::to_string(&config).unwrap(), expected);
    assert_eq!(parse(expected).unwrap(), config);
}

#[test]
fn devices_read_back_with_their_defaults() {
    let config = from(json!({
        "disks": [{"path": "/disk", "id": "root"}],
        "net": [{"tap": "t0", "mac": "2E:00:00:00:00:0A", "fds": [3, 4]}],
    }));
    let back = serde_json::to_value(&config).unwrap();
    assert_eq!(
        back["disks"][0],
        json!({"id": "root", "pci_segment": 0, "path": "/disk", "readonly": false, "direct": false,
            "num_queues": 1, "queue_size": 128, "vhost_user": false, "backing_files": false,
            "sparse": true, "image_type": "Unknown", "lock_granularity": "ByteRange",
            "disable_io_uring": false, "disable_aio": false})
    );
    assert_eq!(
        back["net"][0],
        json!({"pci_segment": 0, "tap": "t0", "mac": "2e:00:00:00:00:0a", "num_queues": 2,
            "queue_size": 256, "vhost_user": false, "vhost_mode": "Client", "fds": [-1, -1],
            "offload_tso": true, "offload_ufo": true, "offload_csum": true})
    );
    assert_eq!(from(back), config);
}

#[test]
fn unknown_keys_are_ignored_except_in_rate_limits() {
    assert_eq!(parse(r#"{"no_such_thing": [1]}"#).unwrap(), VmConfig::default());
    let disk = parse(r#"{"disks": [{"path": "/d", "colour": "red"}]}"#).unwrap();
    assert_eq!(disk.disks()[0].path, Some("/d".into()));
    let limit = |inner: &str| {
        parse(&format!(r#"{{"disks": [{{"path": "/d", "rate_limiter_config": {inner}}}]}}"#))
    };
    assert!(limit(r#"{"bandwidth": null}"#).is_ok());
    assert!(limit(r#"{"bandwith": null}"#).is_err());
    let back = serde_json::to_value(limit("{}").unwrap()).unwrap();
    assert_eq!(back["disks"][0]["rate_limiter_config"], json!({"bandwidth": null, "ops": null}));
}

#[test]
fn keys_given_twice_are_errors() {
    for text in [
        r#"{"iommu": false, "iommu": false}"#,
        r#"{"payload": {"kernel": "/a", "kernel": "/b"}}"#,
        r#"{"disks": [{"path": "/a", "path": "/b"}]}"#,
        r#"{"disks": [{"path": "/a", "id": "x", "id": "y"}]}"#,
        r#"{"net": [{"pci_segment": 0, "tap": "t", "pci_segment": 0}]}"#,
        r#"{"platform": {"uuid": "a", "system_uuid": "b"}}"#,
    ] {
        assert!(parse(text).unwrap_err().to_string().contains("duplicate field"), "{text}");
    }
}

#[test]
fn null_is_taken_for_optional_fields_only() {
    let config = parse(
        r#"{"payload": null, "disks": null, "net": null, "balloon": null, "platform": null,
            "numa": null, "memory": {"size": 4096, "zones": null, "hotplug_size": null}}"#,
    )
    .unwrap();
    assert!(config.disks.is_none() && config.payload.is_none());
    assert!(parse(r#"{"disks": [{"path": null, "id": null}]}"#).is_ok());
    for text in [
        r#"{"iommu": null}"#,
        r#"{"watchdog": null}"#,
        r#"{"disks": [{"readonly": null}]}"#,
        r#"{"disks": [{"queue_size": null}]}"#,
        r#"{"disks": [{"pci_segment": null}]}"#,
        r#"{"cpus": {"boot_vcpus": null, "max_vcpus": 1}}"#,
    ] {
        assert!(parse(text).is_err(), "{text}");
    }
}

#[test]
fn wrong_shapes_and_types_are_errors() {
    for text in [
        "",
        "{",
        "[]",
        "{} x",
        r#"{"cpus": {"boot_vcpus": 1}}"#,
        r#"{"cpus": {"boot_vcpus": -1, "max_vcpus": 1}}"#,
        r#"{"cpus": {"boot_vcpus": 1.5, "max_vcpus": 1}}"#,
        r#"{"memory": {}}"#,
        r#"{"memory": {"size": "512M"}}"#,
        r#"{"serial": {"mode": "tty"}}"#,
        r#"{"console": {}}"#,
        r#"{"rng": {}}"#,
        r#"{"disks": {"path": "/d"}}"#,
        r#"{"disks": [{"queue_size": 65536}]}"#,
        r#"{"disks": [{"image_type": "raw"}]}"#,
        r#"{"net": [{"mac": "2e:00:00:00:00"}]}"#,
        r#"{"net": [{"mac": "2e:00:00:00:00:0g"}]}"#,
        r#"{"net": [{"mac": "2e:00:00:00:00:00:00"}]}"#,
        r#"{"net": [{"mac": "+e:00:00:00:00:00"}]}"#,
        r#"{"net": [{"ip": "1.2.3"}]}"#,
    ] {
        assert!(parse(text).is_err(), "{text}");
    }
}

#[test]
fn what_cloud_hypervisor_has_parses_and_is_refused_by_name() {
    let pci = json!({"id": "x"});
    for (key, value, named) in [
        ("balloon", json!({"size": 1}), "balloon"),
        (
            "generic_vhost_user",
            json!([{"socket": "/s", "queue_sizes": [1], "device_type": 26}]),
            "generic_vhost_user",
        ),
        ("fs", json!([{"tag": "t", "socket": "/s"}]), "fs"),
        ("pmem", json!([{"file": "/f"}]), "pmem"),
        ("devices", json!([{"path": "/sys/x"}]), "VFIO"),
        ("user_devices", json!([{"socket": "/s"}]), "vfio-user"),
        ("vdpa", json!([{"path": "/dev/v"}]), "vDPA"),
        ("vsock", json!({"cid": 3, "socket": "/s"}), "vsock"),
        ("pvpanic", json!(true), "pvpanic"),
        ("iommu", json!(true), "iommu"),
        ("numa", json!([{"guest_numa_id": 0}]), "numa"),
        ("watchdog", json!(true), "watchdog"),
        ("rtc", pci, "rtc"),
        ("pci_segments", json!([{"pci_segment": 1}]), "pci_segments"),
        ("platform", json!({"uuid": "u"}), "platform"),
        ("tpm", json!({"socket": "/s"}), "tpm"),
        ("landlock_enable", json!(true), "landlock"),
        ("debug_console", json!({"mode": "Null"}), "debug_console"),
        ("rate_limit_groups", json!([{"id": "g", "rate_limiter_config": {}}]), "rate_limit_groups"),
        ("disks", json!([{"path": "/d", "queue_size": 256}]), "queue_size"),
        ("disks", json!([{"path": "/d", "image_type": "Qcow2"}]), "Qcow2"),
        ("disks", json!([{"vhost_user": true, "vhost_socket": "/s"}]), "vhost_user"),
        ("disks", json!([{"path": "/d", "iommu": true}]), "iommu"),
        ("disks", json!([{"path": "/d", "pci_segment": 1}]), "pci_segment"),
        ("net", json!([{"vhost_user": true}]), "vhost_user"),
        ("net", json!([{"fds": [1]}]), "fds"),
        ("net", json!([{"host_mac": "2e:00:00:00:00:01"}]), "host_mac"),
        ("memory", json!({"size": 1 << 30, "hotplug_size": 4096}), "hotplug_size"),
        ("memory", json!({"size": 0, "zones": [{"id": "z", "size": 4096}]}), "zones"),
        ("memory", json!({"size": 4096, "hugepages": true}), "hugepages"),
        ("payload", json!({"firmware": "/fw"}), "firmware"),
    ] {
        let config = bootable(|json| json[key] = value.clone());
        let back = serde_json::to_value(&config).unwrap();
        assert_eq!(from(back), config, "{key} reads back unchanged");
        let error = config.validate().unwrap_err();
        assert!(matches!(error, ValidationError::Unsupported { .. }), "{key}: {error:?}");
        assert!(error.to_string().to_lowercase().contains(&named.to_lowercase()), "{key}: {error}");
        assert_eq!(error.status(), 400);
    }
}

#[test]
fn more_than_one_vcpu_is_refused() {
    let cpus = |boot: u32, max: u32| {
        refusal(|json| json["cpus"] = json!({"boot_vcpus": boot, "max_vcpus": max}))
    };
    assert_eq!(cpus(2, 2), ValidationError::TooManyVcpus { count: 2 });
    assert_eq!(cpus(1, 4), ValidationError::TooManyVcpus { count: 4 });
    assert_eq!(cpus(0, 1), ValidationError::VcpuCount { boot: 0, max: 1 });
    assert_eq!(cpus(2, 1), ValidationError::VcpuCount { boot: 2, max: 1 });
}

#[test]
fn wrong_values_are_refused() {
    assert_eq!(from(json!({})).validate(), Err(ValidationError::NoKernel));
    assert_eq!(from(json!({"payload": {}})).validate(), Err(ValidationError::NoKernel));
    assert_eq!(
        refusal(|json| json["payload"]["firmware"] = json!("/fw")),
        ValidationError::KernelAndFirmware
    );
    assert_eq!(
        refusal(|json| json["memory"] = json!({"size": 4097})),
        ValidationError::MemorySize { size: 4097 }
    );
    assert_eq!(
        refusal(|json| json["memory"] = json!({"size": 1_u64 << 63})),
        ValidationError::MemorySize { size: 1 << 63 }
    );
    for (key, value, field) in [
        ("disks", json!([{}]), "path"),
        ("serial", json!({"mode": "File"}), "file"),
        ("console", json!({"mode": "Socket"}), "socket"),
        ("net", json!([{"ip": "10.0.0.1"}]), "mask"),
    ] {
        let error = refusal(|json| json[key] = value);
        assert!(
            matches!(error, ValidationError::Missing { field: named, .. } if named == field),
            "{error:?}"
        );
    }
    for (key, value, field) in [
        ("disks", json!([{"path": "/d", "queue_size": 100}]), "queue_size"),
        ("disks", json!([{"path": "/d", "num_queues": 2}]), "num_queues"),
        ("disks", json!([{"path": "/d", "serial": "123456789012345678901"}]), "serial"),
        ("disks", json!([{"path": "/d", "pci_device_id": 0}]), "pci_device_id"),
        ("disks", json!([{"path": "/d", "pci_device_id": 32}]), "pci_device_id"),
        ("net", json!([{"tap": "a-name-that-is-too-long"}]), "tap"),
        ("net", json!([{"tap": "a/b"}]), "tap"),
        ("net", json!([{"num_queues": 4}]), "num_queues"),
        ("net", json!([{"mtu": 1279}]), "mtu"),
        ("net", json!([{"ip": "fe80::1", "mask": "255.0.0.0"}]), "ip"),
        ("net", json!([{"mac": "01:00:00:00:00:00"}]), "mac"),
    ] {
        let error = refusal(|json| json[key] = value.clone());
        assert!(
            matches!(error, ValidationError::Value { field: named, .. } if named == field),
            "{value}: {error:?}"
        );
    }
}

#[test]
fn names_and_resources_are_not_shared() {
    let twice = refusal(|json| {
        json["disks"] = json!([{"path": "/a", "id": "x"}]);
        json["net"] = json!([{"id": "x"}]);
    });
    assert_eq!(twice, ValidationError::DuplicateId("x".into()));
    assert_eq!(twice.status(), 409);
    let reserved = refusal(|json| json["net"] = json!([{"id": "__x"}]));
    assert_eq!(reserved, ValidationError::ReservedId("__x".into()));
    let taps = refusal(|json| json["net"] = json!([{"tap": "t"}, {"tap": "t"}]));
    assert_eq!(taps, ValidationError::DuplicateTap("t".into()));
    let images = |readonly: bool| {
        bootable(|json| {
            json["disks"] =
                json!([{"path": "/a", "readonly": readonly}, {"path": "/a", "readonly": true}]);
        })
        .validate()
    };
    assert_eq!(images(true), Ok(()));
    assert_eq!(images(false), Err(ValidationError::DuplicateImage("/a".into())));
}

#[test]
fn completing_fills_ids_from_one_counter_and_macs() {
    let mut config = from(json!({
        "disks": [{"path": "/a"}, {"path": "/b", "id": "_disk1"}, {"path": "/c"}],
        "net": [{}, {"mac": "2e:00:00:00:00:01"}],
    }));
    config.complete(|| [1, 2, 3, 4, 5]);
    let ids: Vec<_> = config.disks().iter().map(|disk| disk.pci.id.as_deref().unwrap()).collect();
    // `_disk1` is taken by the user, so the counter goes past it.
    assert_eq!(ids, ["_disk0", "_disk1", "_disk2"]);
    let ids: Vec<_> = config.net().iter().map(|net| net.pci.id.as_deref().unwrap()).collect();
    assert_eq!(ids, ["_net3", "_net4"]);
    assert_eq!(config.net()[0].mac.unwrap().to_string(), "2e:01:02:03:04:05");
    assert_eq!(config.net()[1].mac.unwrap().to_string(), "2e:00:00:00:00:01");
    let completed = config.clone();
    config.complete(|| unreachable!("nothing is left to fill in"));
    assert_eq!(config, completed);
}

#[test]
fn devices_without_number_are_refused_at_once() {
    let disks = |count: usize| {
        bootable(|json| {
            let disk = |index| json!({"path": format!("/disk{index}")});
            json["disks"] = (0..count).map(disk).collect();
        })
    };
    // Console and entropy have a slot each.
    assert_eq!(disks(29).validate(), Ok(()));
    for count in [30, 200_000] {
        let mut config = disks(count);
        config.complete(|| [0; 5]);
        let last = config.disks().last().and_then(|disk| disk.pci.id.clone());
        assert_eq!(last, Some(format!("_disk{}", count - 1)));
        let error = config.validate().unwrap_err();
        assert_eq!(error, ValidationError::TooManyDevices);
        assert_eq!(error.to_string(), "the VM has more than 31 PCI devices: remove some");
    }
}
