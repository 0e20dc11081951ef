//! What a test needs of the machine, and how it says aloud that it skips.

use std::io::Write;

/// Something a test cannot do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Root, for network namespaces.
    Root,
    /// `/dev/net/tun`, for the guest's network.
    Tap,
    /// The kernel's token bucket filter, for a slow network.
    SlowNetwork,
    /// Loop devices, for file systems that hang or fail.
    LoopDevice,
}

impl Need {
    /// What is missing, if it is.
    fn missing(self) -> Option<&'static str> {
        let opens = |path| std::fs::File::options().read(true).write(true).open(path).is_ok();
        let there = match self {
            Self::Root => nix::unistd::geteuid().is_root(),
            Self::Tap => opens("/dev/net/tun"),
            Self::SlowNetwork => slow_network(),
            Self::LoopDevice => opens("/dev/loop-control"),
        };
        let what = match self {
            Self::Root => "root (network namespaces)",
            Self::Tap => "/dev/net/tun",
            Self::SlowNetwork => "token bucket filter (tc and the kernel's sch_tbf)",
            Self::LoopDevice => "loop devices (/dev/loop-control)",
        };
        (!there).then_some(what)
    }
}

/// Tries it on a network that ends with the trial.
fn slow_network() -> bool {
    let limit = "tc qdisc add dev lo root tbf rate 10mbit burst 32k latency 100ms";
    let trial = std::process::Command::new("unshare").arg("--net").args(limit.split(' ')).output();
    trial.is_ok_and(|output| output.status.success())
}

/// Whether everything in `needs` is there. If not, says on standard error that `test` skips and why,
/// past the test runner's capture: a skipped test must not look like a passed one.
#[must_use]
pub fn met(test: &str, needs: &[Need]) -> bool {
    let missing: Vec<&str> = needs.iter().filter_map(|need| need.missing()).collect();
    if missing.is_empty() {
        return true;
    }
    let message = format!("\nSKIPPED {test}: this machine has no {}\n", missing.join(", no "));
    // Without standard error there is nobody to tell.
    let _ = std::io::stderr().write_all(message.as_bytes());
    false
}
