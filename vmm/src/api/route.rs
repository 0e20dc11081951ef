//! The endpoint table: which call a request means, if any.

use serde::de::DeserializeOwned;

use super::ft::{FtEnableConfig, FtReceiveConfig};
use super::http::{Method, Request, Response};
use super::types::{RestoreConfig, SnapshotConfig};
use crate::config::VmConfig;

/// Where all endpoints live but one.
const BASE: &str = "/api/v1/";
/// Where Prometheus looks by custom.
const METRICS: &str = "/metrics";

/// What a client asks for, with its body parsed.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "one variant per endpoint, described in the trait Control")]
pub enum Call {
    Ping,
    VmmShutdown,
    Info,
    Counters,
    Metrics,
    Create(Box<VmConfig>),
    Delete,
    Boot,
    Shutdown,
    Reboot,
    Pause,
    Resume,
    PowerButton,
    Snapshot(SnapshotConfig),
    Restore(Box<RestoreConfig>),
    FtReceive(Box<FtReceiveConfig>),
    FtEnable(Box<FtEnableConfig>),
    FtStatus,
    FtFailover,
    FtDisable,
    /// An endpoint of Cloud Hypervisor that Dyad has nothing behind yet.
    Unsupported {
        name: &'static str,
        what: &'static str,
    },
}

/// Endpoints of Cloud Hypervisor that take a body and that Dyad does not support yet.
const UNSUPPORTED: &[(&str, &str)] = &[
    ("vm.resize", "changing the number of CPUs or the memory of a VM"),
    ("vm.resize-disk", "changing the size of a disk"),
    ("vm.resize-zone", "memory zones"),
    ("vm.add-disk", "adding devices"),
    ("vm.add-net", "adding devices"),
    ("vm.add-fs", "shared file systems"),
    ("vm.add-pmem", "persistent memory"),
    ("vm.add-vsock", "the socket device"),
    ("vm.add-vdpa", "vDPA devices"),
    ("vm.add-device", "VFIO devices"),
    ("vm.add-user-device", "vfio-user devices"),
    ("vm.add-generic-vhost-user", "vhost-user devices"),
    ("vm.remove-device", "removing devices"),
    ("vm.receive-migration", "migration (to protect a VM, use ft.receive)"),
    ("vm.send-migration", "migration (to protect a VM, use ft.enable)"),
];

/// Finds the call, or the answer that says why there is none.
pub fn route(request: &Request) -> Result<Call, Response> {
    let not_found = || Response::error(404, ["Not Found"]);
    let get = |call| match request.method {
        Method::Get => Ok(call),
        _ => Err(bad_request()),
    };
    if request.path == METRICS {
        return get(Call::Metrics);
    }
    let name = request.path.strip_prefix(BASE).ok_or_else(not_found)?;
    let action = |call| match request.method {
        Method::Put if request.body.is_empty() => Ok(call),
        Method::Put | Method::Get => Err(bad_request()),
        Method::Patch | Method::Delete => Err(Response::empty(400)),
    };
    match name {
        // A body on these, if any, is ignored.
        "vmm.ping" => get(Call::Ping),
        "vm.info" => get(Call::Info),
        "vm.counters" => get(Call::Counters),
        "ft.status" => get(Call::FtStatus),
        "vmm.shutdown" => match request.method {
            Method::Put => Ok(Call::VmmShutdown),
            _ => Err(bad_request()),
        },
        "vm.create" => match request.method {
            Method::Put if request.body.is_empty() => Err(Response::empty(400)),
            Method::Put => json(&request.body).map(|config| Call::Create(Box::new(config))),
            _ => Err(bad_request()),
        },
        "vm.delete" => action(Call::Delete),
        "vm.boot" => action(Call::Boot),
        "vm.shutdown" => action(Call::Shutdown),
        "vm.reboot" => action(Call::Reboot),
        "vm.pause" => action(Call::Pause),
        "vm.resume" => action(Call::Resume),
        "vm.power-button" => action(Call::PowerButton),
        "vm.nmi" => action(Call::Unsupported { name: "vm.nmi", what: "non-maskable interrupts" }),
        "ft.failover" => action(Call::FtFailover),
        "ft.disable" => action(Call::FtDisable),
        "vm.snapshot" => body(request).map(Call::Snapshot),
        "vm.restore" => restore(request),
        "ft.receive" => {
            let config: FtReceiveConfig = body(request)?;
            config.validate().map_err(|error| {
                let what = "No VM can be received like this";
                Response::error(400, [what, &error.to_string()])
            })?;
            Ok(Call::FtReceive(Box::new(config)))
        }
        "ft.enable" => {
            let config: FtEnableConfig = body(request)?;
            match config.validate() {
                Ok(()) => Ok(Call::FtEnable(Box::new(config))),
                Err(error) => Err(Response::error(
                    400,
                    ["The VM cannot be protected like this", &error.to_string()],
                )),
            }
        }
        name => {
            let &(name, what) =
                UNSUPPORTED.iter().find(|(known, _)| *known == name).ok_or_else(not_found)?;
            // What is no JSON is no request for a feature.
            let _: serde_json::Value = body(request)?;
            Ok(Call::Unsupported { name, what })
        }
    }
}

fn bad_request() -> Response {
    Response::error(400, ["Bad Request"])
}

/// The body of a PUT that needs one.
fn body<T: DeserializeOwned>(request: &Request) -> Result<T, Response> {
    match request.method {
        Method::Put if !request.body.is_empty() => json(&request.body),
        Method::Put | Method::Get => Err(bad_request()),
        Method::Patch | Method::Delete => Err(Response::empty(400)),
    }
}

fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, Response> {
    serde_json::from_slice(body).map_err(|error| {
        Response::error(
            400,
            ["The body of the request is not the JSON expected", &error.to_string()],
        )
    })
}

fn restore(request: &Request) -> Result<Call, Response> {
    let config: RestoreConfig = body(request)?;
    config.validate().map_err(|error| {
        let what = "The VM cannot be restored like this";
        Response::error(error.status(), [what, &error.to_string()])
    })?;
    Ok(Call::Restore(Box::new(config)))
}
