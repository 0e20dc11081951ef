//! The command line of `dyad`.

use std::fmt;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser};
use hypervisor::Choice;
use vmm::config::VmOptions;

const EXAMPLES: &str = "\
Examples:
  Boot Linux on the software CPU, with its console on this terminal:
    dyad --hypervisor soft --kernel vmlinuz --initramfs initrd.img --cmdline console=ttyS0 \\
         --serial tty --console off

  The same with a disk, a network device and an API:
    dyad --api-socket /tmp/a.sock --kernel vmlinuz --cmdline 'console=ttyS0 root=/dev/vda' \\
         --memory size=1G --disk path=root.img,image_type=raw --net tap=tap0 \\
         --serial tty --console off

  Protect it: give each host a certificate (on a host called b, /etc/dyad/b is what it needs), wait for the
  VM on the other host, then tell it where:
    dyad-remote make-test-ca /etc/dyad a b
    dyad --api-socket /tmp/b.sock
    dyad-remote --api-socket /tmp/b.sock ft-receive listen_url=tcp:0.0.0.0:7700,tls_dir=/etc/dyad/b
    dyad-remote --api-socket /tmp/a.sock ft-enable \\
         backup_url=tcp:b:7700,arbiter_url=file:/shared,tls_dir=/etc/dyad/a

Values are key=value pairs, separated by commas; put double quotes around a value that holds commas.
Sizes take the suffixes K, M and G. When the guest switches itself off, dyad ends.";

/// A virtual machine whose guest survives the death of its host
#[derive(Debug, Parser)]
#[command(name = "dyad", version, after_help = EXAMPLES, arg_required_else_help = true, max_term_width = 100)]
pub struct Options {
    /// Serve the REST API on a Unix socket: PATH, path=PATH, or fd=N for a socket that listens already
    #[arg(long, value_name = "PATH")]
    pub api_socket: Option<ApiSocketOption>,

    /// What executes the guest: KVM, the software CPU, or KVM only where hardware stands behind it. Only
    /// the software CPU can be protected in lockstep
    #[arg(long, value_name = "auto|soft|kvm", default_value = "auto", hide_default_value = true,
        hide_possible_values = true,
        value_parser = hypervisor_parser())]
    pub hypervisor: Choice,

    /// Start from a snapshot: source_url=file:///DIR[,resume=on]
    #[arg(long, value_name = "OPTIONS")]
    pub restore: Option<String>,

    /// Go on when the guest switches itself off, so that it can be booted again through the API
    #[arg(long)]
    pub no_shutdown: bool,

    /// Write events, one JSON object after the other, to a file or FIFO: path=PATH, or fd=N for a descriptor
    /// that is open already
    #[arg(long, value_name = "path=PATH|fd=N")]
    pub event_monitor: Option<EventMonitorOption>,

    /// Certificates for protecting VMs: a directory with ca.pem, host.pem and host.key. Calls that name no
    /// others use these, and so does a VM that has moved here and looks for a new backup
    #[arg(long, value_name = "DIR")]
    pub ft_tls_dir: Option<PathBuf>,

    /// Append the log to a file instead of standard error
    #[arg(long, value_name = "PATH")]
    pub log_file: Option<PathBuf>,

    /// Log more: -v what happens, -vv every API call, -vvv everything
    #[arg(short, action = clap::ArgAction::Count)]
    pub verbose: u8,

    #[command(flatten)]
    pub vm: Vm,
}

/// Options that describe the VM.
#[derive(Debug, Args)]
#[command(next_help_heading = "Virtual machine")]
pub struct Vm {
    /// Linux to boot: a bzImage or an ELF vmlinux
    #[arg(long, value_name = "PATH")]
    kernel: Option<PathBuf>,

    /// Firmware to boot instead of a kernel (not supported yet)
    #[arg(long, value_name = "PATH", hide = true)]
    firmware: Option<PathBuf>,

    /// Initial RAM file system
    #[arg(long, value_name = "PATH")]
    initramfs: Option<PathBuf>,

    /// Kernel command line
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    cmdline: Option<String>,

    /// Virtual processors: boot=1
    #[arg(long, value_name = "OPTIONS")]
    cpus: Option<String>,

    /// Memory: size=512M
    #[arg(long, value_name = "OPTIONS")]
    memory: Option<String>,

    /// Disks: path=IMAGE[,readonly=on][,direct=on][,image_type=raw][,serial=TEXT][,id=NAME]. The image is
    /// locked against other VMs. direct=on bypasses the host's page cache
    #[arg(long, value_name = "OPTIONS", num_args = 1..)]
    disk: Vec<String>,

    /// Network devices: [tap=NAME][,mac=MAC][,ip=ADDRESS,mask=MASK][,mtu=N][,id=NAME]
    /// [,offload_csum=off][,offload_tso=off][,offload_ufo=off]. Checksums, TCP segmentation and UDP
    /// fragmentation are left to the host unless switched off; a backup's TAP must be able to do the same
    #[arg(long, value_name = "OPTIONS", num_args = 1..)]
    net: Vec<String>,

    /// Entropy: src=/dev/urandom
    #[arg(long, value_name = "OPTIONS")]
    rng: Option<String>,

    /// Serial port: off, null (default), tty, pty, file=PATH or socket=PATH
    #[arg(long, value_name = "OPTIONS")]
    serial: Option<String>,

    /// Virtio console: off, null, tty (default), pty, file=PATH or socket=PATH
    #[arg(long, value_name = "OPTIONS")]
    console: Option<String>,
}

impl Vm {
    /// As the configuration takes them.
    pub fn options(&self) -> VmOptions {
        VmOptions {
            kernel: self.kernel.clone(),
            initramfs: self.initramfs.clone(),
            firmware: self.firmware.clone(),
            cmdline: self.cmdline.clone(),
            cpus: self.cpus.clone(),
            memory: self.memory.clone(),
            disk: self.disk.clone(),
            net: self.net.clone(),
            rng: self.rng.clone(),
            serial: self.serial.clone(),
            console: self.console.clone(),
        }
    }
}

impl Options {
    /// Checks what options mean together.
    pub fn check(&self) -> Result<(), clap::Error> {
        let usage = |kind, text: &str| Err(Self::command().error(kind, text));
        let vm = self.vm.options();
        let payload = self.vm.kernel.is_some() || self.vm.firmware.is_some();
        if !vm.is_empty() && self.restore.is_some() {
            return usage(
                ErrorKind::ArgumentConflict,
                "--restore brings its own configuration: leave out the options that describe a VM",
            );
        }
        if !vm.is_empty() && !payload {
            return usage(
                ErrorKind::MissingRequiredArgument,
                "options describe a VM, but there is nothing to boot: add --kernel PATH",
            );
        }
        if let (
            Some(ApiSocketOption::Descriptor(socket)),
            Some(EventMonitorOption::Descriptor(events)),
        ) = (&self.api_socket, &self.event_monitor)
            && socket == events
        {
            return usage(
                ErrorKind::ArgumentConflict,
                "--api-socket and --event-monitor name the same descriptor: give each its own",
            );
        }
        if vm.is_empty() && self.restore.is_none() && self.api_socket.is_none() {
            return usage(
                ErrorKind::MissingRequiredArgument,
                "there is nothing to do: add --kernel PATH to boot a VM, or --api-socket PATH to wait for one",
            );
        }
        Ok(())
    }
}

/// Where the API is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ApiSocketOption {
    /// On this path.
    Path(PathBuf),
    /// On a listening socket that this process was given.
    Descriptor(RawFd),
}

impl fmt::Display for ApiSocketOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Descriptor(fd) => write!(f, "descriptor {fd}"),
        }
    }
}

impl FromStr for ApiSocketOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let path = match text.split_once('=') {
            Some(("fd", number)) => {
                let number = number.parse().map_err(|_| "fd=N needs a number".to_owned())?;
                return Ok(Self::Descriptor(number));
            }
            Some(("path", path)) => path,
            _ => text,
        };
        if path.is_empty() {
            return Err("the path is empty".to_owned());
        }
        Ok(Self::Path(PathBuf::from(path)))
    }
}

/// Where events are written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EventMonitorOption {
    /// To this file.
    Path(PathBuf),
    /// To this descriptor, which the process was given.
    Descriptor(RawFd),
}

impl FromStr for EventMonitorOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('=') {
            Some(("fd", number)) => {
                // Standard input, output and error are not for this.
                let number = number.parse().ok().filter(|fd| *fd > 2);
                number.map(Self::Descriptor).ok_or("fd=N needs a number above 2".to_owned())
            }
            Some(("path", path)) if !path.is_empty() => Ok(Self::Path(PathBuf::from(path))),
            _ => Err("expected path=PATH or fd=N".to_owned()),
        }
    }
}

fn hypervisor_parser() -> impl TypedValueParser<Value = Choice> {
    PossibleValuesParser::new(["auto", "soft", "kvm"]).try_map(|name| name.parse())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Options, clap::Error> {
        let options = Options::try_parse_from(["dyad"].iter().chain(arguments))?;
        options.check().map(|()| options)
    }

    #[test]
    fn the_command_line_is_consistent() {
        Options::command().debug_assert();
    }

    #[test]
    fn repeated_options_and_lists_are_the_same() {
        let kernel = ["--kernel", "/k"];
        let a =
            parse(&[&kernel[..], &["--disk", "path=/a", "--disk", "path=/b"]].concat()).unwrap();
        let b = parse(&[&kernel[..], &["--disk", "path=/a", "path=/b"]].concat()).unwrap();
        assert_eq!(a.vm.options(), b.vm.options());
        assert_eq!(a.vm.disk, ["path=/a", "path=/b"]);
    }

    #[test]
    fn api_sockets_have_three_forms() {
        let socket = |text: &str| parse(&["--api-socket", text]).map(|options| options.api_socket);
        let path = Some(ApiSocketOption::Path("/a".into()));
        assert_eq!(socket("/a").unwrap(), path);
        assert_eq!(socket("path=/a").unwrap(), path);
        assert_eq!(socket("fd=3").unwrap(), Some(ApiSocketOption::Descriptor(3)));
        assert!(socket("fd=x").is_err());
        assert!(socket("path=").is_err());
    }

    #[test]
    fn event_monitors_have_two_forms() {
        let option = |text: &str| text.parse::<EventMonitorOption>();
        assert_eq!(option("path=/e"), Ok(EventMonitorOption::Path("/e".into())));
        assert_eq!(option("fd=3"), Ok(EventMonitorOption::Descriptor(3)));
        for text in ["/e", "path=", "fd=x", "fd=-1", "fd=1", ""] {
            assert!(option(text).is_err(), "{text}");
        }
    }

    #[test]
    fn wrong_usage_is_told() {
        for (arguments, word) in [
            (&["--memory", "size=1G", "--api-socket", "/a"][..], "--kernel"),
            (&["-v"], "--api-socket"),
            (&["--kernel", "/k", "--restore", "source_url=file:///s"], "--restore"),
            (&["--api-socket", "/a", "--hypervisor", "qemu"], "soft"),
            (&["--no-such-option"], "--no-such-option"),
            (&["--api-socket", "fd=3", "--event-monitor", "fd=3"], "the same descriptor"),
        ] {
            let error = parse(arguments).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(word), "{error}");
        }
        assert_eq!(parse(&[]).unwrap_err().exit_code(), 2);
    }
}
