//! TAP interfaces: the ioctls that attach to one and set it up.

use std::fs::{File, OpenOptions};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::back::TapOptions;
use super::offload::{HEADER_SIZE, Offloads};

/// What can go wrong with a TAP interface.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name is no interface name.
    #[error(
        "'{name}' is no name for a network interface: it must have 1 to 15 bytes, no '/' and no blanks"
    )]
    Name {
        /// As given.
        name: String,
    },
    /// The kernel's TAP device cannot be opened.
    #[error(
        "cannot open /dev/net/tun; the tun module must be loaded and this program may need CAP_NET_ADMIN"
    )]
    Device {
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The interface is attached to another process.
    #[error("TAP interface '{name}' is in use by another process")]
    Busy {
        /// Interface.
        name: String,
    },
    /// It may not be made or attached to.
    #[error(
        "no permission for TAP interface '{name}'; run with CAP_NET_ADMIN, \
         or make it beforehand with 'ip tuntap add {name} mode tap user USER'"
    )]
    Permission {
        /// Interface.
        name: String,
    },
    /// A step of the set-up failed.
    #[error("cannot {step} of TAP interface '{name}'")]
    Setup {
        /// Interface.
        name: String,
        /// What was attempted.
        step: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The host lacks an offload that the guest was, or is to be, promised.
    #[error(
        "this host's TAP interface '{name}' cannot do the offloads that the network device is configured \
         with; switch them off there with offload_tso=off,offload_ufo=off or with offload_csum=off"
    )]
    Offload {
        /// Interface.
        name: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// No thread for it.
    #[error("cannot start the thread of TAP interface '{name}'")]
    Thread {
        /// Interface.
        name: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Attaches to the interface and brings it up; returns its descriptor, not blocking, and its name.
pub(super) fn attach(options: &TapOptions) -> Result<(File, String), TapError> {
    let wanted = options.name.clone().unwrap_or_default();
    let mut request = interface_request(&wanted)?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .map_err(|source| TapError::Device { source })?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    let tap = Control { fd: file.as_raw_fd(), name: wanted };
    match tap.call(libc::TUNSETIFF, &mut request, "attach") {
        Ok(()) => {}
        Err(TapError::Setup { name, source, .. }) if source.raw_os_error() == Some(libc::EBUSY) => {
            return Err(TapError::Busy { name });
        }
        Err(TapError::Setup { name, source, .. })
            if source.kind() == io::ErrorKind::PermissionDenied =>
        {
            return Err(TapError::Permission { name });
        }
        Err(error) => return Err(error),
    }
    let tap = Control { name: interface_name(&request), ..tap };
    let mut size = HEADER_SIZE as libc::c_int;
    tap.call(libc::TUNSETVNETHDRSZ, &mut size, "set the header size")?;
    // Asked for now, since a backup must refuse here what it could not do when it goes live. No driver has
    // agreed to anything yet: until one does, the kernel segments and checksums whatever it hands out.
    tap.set_offloads(options.offloads)?;
    tap.set_offloads(Offloads::default())?;
    configure(&tap.name, options)?;
    Ok((file, tap.name))
}

/// Lets the kernel leave these undone in the frames it hands out.
pub(super) fn set_offloads(file: &File, name: &str, offloads: Offloads) -> Result<(), TapError> {
    Control { fd: file.as_raw_fd(), name: name.into() }.set_offloads(offloads)
}

/// Address, MTU and the way up, through the usual interface ioctls.
fn configure(name: &str, options: &TapOptions) -> Result<(), TapError> {
    let no_socket = |error: nix::Error| TapError::Setup {
        name: name.into(),
        step: "open a socket for the set-up",
        source: error.into(),
    };
    // Not bound: a namespace may have no address yet to bind it to.
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
        .map_err(no_socket)?;
    let net = Control { fd: socket.as_raw_fd(), name: name.into() };
    if let Some(ip) = options.ip {
        let mut request = interface_request(name)?;
        request.ifr_ifru.ifru_addr = socket_address(ip);
        net.call(libc::SIOCSIFADDR, &mut request, "set the address")?;
        if let Some(mask) = options.mask {
            let mut request = interface_request(name)?;
            request.ifr_ifru.ifru_netmask = socket_address(mask);
            net.call(libc::SIOCSIFNETMASK, &mut request, "set the network mask")?;
        }
    }
    if let Some(mtu) = options.mtu {
        let mut request = interface_request(name)?;
        request.ifr_ifru.ifru_mtu = libc::c_int::from(mtu);
        net.call(libc::SIOCSIFMTU, &mut request, "set the MTU")?;
    }
    let mut request = interface_request(name)?;
    net.call(libc::SIOCGIFFLAGS, &mut request, "read the flags")?;
    // SAFETY: the kernel has filled in the flags, and any bits are a valid value of them.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    let up = libc::IFF_UP as libc::c_short;
    if flags & up == 0 {
        request.ifr_ifru.ifru_flags = flags | up;
        net.call(libc::SIOCSIFFLAGS, &mut request, "bring up the link")?;
    }
    Ok(())
}

/// A descriptor that takes ioctls for an interface.
struct Control {
    fd: RawFd,
    name: String,
}

impl Control {
    /// Makes an ioctl whose argument points to a `T`: an `ifreq`, or an int.
    fn call<T>(
        &self,
        request: libc::Ioctl,
        argument: &mut T,
        step: &'static str,
    ) -> Result<(), TapError> {
        // SAFETY: every request this module makes takes a pointer to the `T` it is called with, reads
        // and writes no more than it, and keeps no pointer.
        let result = unsafe { libc::ioctl(self.fd, request, std::ptr::from_mut(argument)) };
        self.check(result, step)
    }

    fn set_offloads(&self, offloads: Offloads) -> Result<(), TapError> {
        let Offloads { csum, tso4, tso6, ecn, ufo } = offloads;
        let bits = [
            (csum, libc::TUN_F_CSUM),
            (tso4, libc::TUN_F_TSO4),
            (tso6, libc::TUN_F_TSO6),
            (ecn, libc::TUN_F_TSO_ECN),
            (ufo, libc::TUN_F_UFO),
        ];
        let flags: libc::c_uint = bits.iter().filter(|(on, _)| *on).map(|(_, bit)| bit).sum();
        // SAFETY: TUNSETOFFLOAD takes a number, no pointer.
        let result =
            unsafe { libc::ioctl(self.fd, libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) };
        self.check(result, "set the offloads").map_err(|error| match error {
            TapError::Setup { name, source, .. } if source.raw_os_error() == Some(libc::EINVAL) => {
                TapError::Offload { name, source }
            }
            error => error,
        })
    }

    fn check(&self, result: libc::c_int, step: &'static str) -> Result<(), TapError> {
        if result < 0 {
            let source = io::Error::last_os_error();
            return Err(TapError::Setup { name: self.name.clone(), step, source });
        }
        Ok(())
    }
}

/// An empty request for the interface `name`; an empty name lets the kernel choose.
fn interface_request(name: &str) -> Result<libc::ifreq, TapError> {
    let bad = |b: u8| b == b'/' || b == 0 || b.is_ascii_whitespace();
    if name.len() >= libc::IFNAMSIZ || name.bytes().any(bad) || name == "." || name == ".." {
        return Err(TapError::Name { name: name.into() });
    }
    // SAFETY: an ifreq is integers, arrays of them and a union of such; all zero is a value of it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

fn interface_name(request: &libc::ifreq) -> String {
    let bytes: Vec<u8> =
        request.ifr_name.iter().take_while(|&&c| c != 0).map(|&c| c as u8).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The address as a `sockaddr_in` in the shape an `ifreq` holds.
fn socket_address(ip: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0 as libc::c_char; 14];
    // Two bytes of port, then the address.
    for (to, from) in data[2..6].iter_mut().zip(ip.octets()) {
        *to = from as libc::c_char;
    }
    libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: data }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_no_interface_names_are_refused() {
        for name in ["a/b", "has blank", "sixteen_bytes_xx", "..", "nul\0"] {
            let result = interface_request(name).map(|_| ());
            assert!(matches!(result, Err(TapError::Name { .. })), "{name:?}");
        }
        assert_eq!(interface_name(&interface_request("tap0").unwrap()), "tap0");
    }
}
