//! Which backend a VM gets: what `--hypervisor` says, or what this host is good for.
//!
//! KVM alone is no sign of speed: its module `kvm_pvm`, which needs no processor support, interprets most of
//! a guest kernel, and slower than [`crate::soft`] does. So `auto` wants to see the hardware.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use crate::kvm::KvmHypervisor;
use crate::soft::SoftHypervisor;
use crate::{Error, Hypervisor};

/// What the user asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Choice {
    /// KVM where hardware virtualisation stands behind it, else the software processor.
    #[default]
    Auto,
    /// The software processor: the only one that can be protected.
    Soft,
    /// KVM wherever `/dev/kvm` opens.
    Kvm,
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Choice::Auto => "auto",
            Choice::Soft => "soft",
            Choice::Kvm => "kvm",
        })
    }
}

impl FromStr for Choice {
    type Err = UnknownChoice;

    fn from_str(name: &str) -> Result<Self, UnknownChoice> {
        match name {
            "auto" => Ok(Choice::Auto),
            "soft" => Ok(Choice::Soft),
            "kvm" => Ok(Choice::Kvm),
            _ => Err(UnknownChoice(name.to_owned())),
        }
    }
}

/// No backend has this name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no hypervisor {0:?}: give auto, soft or kvm")]
pub struct UnknownChoice(String);

/// Makes the backend of `choice`. The sentence says which it is and why, for the log.
pub fn choose(choice: Choice) -> Result<(Arc<dyn Hypervisor>, String), Error> {
    match choice {
        Choice::Soft => Ok((Arc::new(SoftHypervisor), "using soft, as asked".to_owned())),
        Choice::Kvm => {
            let kvm = KvmHypervisor::open()?;
            let behind = match Hardware::of_host().missing() {
                None => String::new(),
                Some(missing) => format!(", although {missing}: expect it to be slow"),
            };
            Ok((Arc::new(kvm), format!("using kvm, as asked{behind}")))
        }
        Choice::Auto => {
            if let Some(missing) = Hardware::of_host().missing() {
                return Ok((Arc::new(SoftHypervisor), format!("using soft, because {missing}")));
            }
            Ok(match KvmHypervisor::open() {
                Ok(kvm) => (
                    Arc::new(kvm),
                    "using kvm, because this host has hardware virtualisation".to_owned(),
                ),
                Err(error) => {
                    let cause = std::error::Error::source(&error)
                        .map_or_else(|| error.to_string(), ToString::to_string);
                    let reason = format!("using soft, because /dev/kvm cannot be used ({cause})");
                    (Arc::new(SoftHypervisor), reason)
                }
            })
        }
    }
}

/// What stands behind `/dev/kvm`.
#[derive(Debug, Clone, Copy)]
struct Hardware {
    /// The processor has VMX or SVM and lets this system use it.
    processor: bool,
    /// KVM's module for one of the two is loaded or built in.
    module: bool,
}

impl Hardware {
    fn of_host() -> Self {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let module = |name| Path::new("/sys/module").join(name).is_dir();
        Self {
            processor: has_virtualisation(&cpuinfo),
            module: module("kvm_intel") || module("kvm_amd"),
        }
    }

    /// Why a guest would not run at the processor's speed, if so.
    fn missing(self) -> Option<&'static str> {
        match (self.processor, self.module) {
            (false, _) => {
                Some("this host's processor offers no hardware virtualisation (VMX, SVM)")
            }
            (true, false) => Some("neither kvm_intel nor kvm_amd is loaded"),
            (true, true) => None,
        }
    }
}

/// Whether the first processor's flags in `/proc/cpuinfo` name VMX or SVM. The kernel leaves them out when
/// firmware has switched them off, which CPUID would not tell.
fn has_virtualisation(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().find_map(|line| {
        let (name, flags) = line.split_once(':')?;
        (name.trim_end() == "flags").then_some(flags)
    });
    flags.unwrap_or_default().split_whitespace().any(|flag| matches!(flag, "vmx" | "svm"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_is_a_flag_of_its_own_in_the_line_of_flags() {
        assert!(has_virtualisation("model name\t: x\nflags\t\t: fpu svm sse\n"));
        assert!(has_virtualisation("flags\t\t: fpu vmx\nbugs\t\t: none\n"));
        assert!(!has_virtualisation("flags\t\t: fpu svm_lock sse\n"));
        assert!(!has_virtualisation("vmx flags\t: ept\nflags\t\t: fpu\nbugs\t\t: vmx\n"));
        assert!(!has_virtualisation(""));
    }

    #[test]
    fn both_processor_and_module_are_needed() {
        for (processor, module, enough) in
            [(true, true, true), (true, false, false), (false, true, false), (false, false, false)]
        {
            assert_eq!(Hardware { processor, module }.missing().is_none(), enough);
        }
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for choice in [Choice::Auto, Choice::Soft, Choice::Kvm] {
            assert_eq!(choice.to_string().parse(), Ok(choice));
        }
        assert!("hyperv".parse::<Choice>().unwrap_err().to_string().contains("hyperv"));
    }

    #[test]
    fn auto_always_finds_something_and_says_what() {
        let (hypervisor, reason) = choose(Choice::Auto).unwrap();
        assert!(reason.contains(hypervisor.name()), "{reason}");
        assert!(reason.contains("because"), "{reason}");
        let (hypervisor, reason) = choose(Choice::Soft).unwrap();
        assert_eq!(hypervisor.name(), "soft");
        assert!(reason.contains("as asked"), "{reason}");
    }
}
