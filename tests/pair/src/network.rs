//! Two hosts and a switch between them, out of network namespaces.
//!
//! ```text
//!                client 10.77.0.1
//!                      |
//!             [ switch: bridge br0 ]
//!               |                |
//!             veth             veth
//!               |                |
//!      [ host a: bridge ]  [ host b: bridge ]
//!        |           |       |           |
//!       tap0         |       |         tap0      guest 10.77.0.10, on whichever side is live
//!                   ft0 === ft0                  logging channel 10.78.0.1 and 10.78.0.2
//! ```

use crate::namespace::Namespace;
use anyhow::Result;

/// Address of the client in the guests' network.
pub const CLIENT: &str = "10.77.0.1";
/// Address of the guest.
pub const GUEST: &str = "10.77.0.10";
/// Prefix length of the guests' network.
pub const PREFIX: u8 = 24;
/// Name of the TAP device in either host.
pub const TAP: &str = "tap0";

/// One of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The host the guest is booted on.
    A,
    /// The other one.
    B,
}

impl Side {
    /// The other host.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// `a` or `b`.
    #[must_use]
    pub fn letter(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
        }
    }

    /// This host's address on the link between the hosts.
    #[must_use]
    pub fn address(self) -> &'static str {
        match self {
            Self::A => "10.78.0.1",
            Self::B => "10.78.0.2",
        }
    }
}

impl std::fmt::Display for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "host {}", self.letter())
    }
}

/// The namespaces and the cables between them.
pub struct Network {
    /// Where clients run: the switch and the address [`CLIENT`].
    pub switch: Namespace,
    a: Namespace,
    b: Namespace,
}

impl Network {
    /// Makes the three namespaces and connects them.
    ///
    /// # Errors
    ///
    /// If the kernel or `ip` refuses.
    pub fn new() -> Result<Self> {
        let network = Self {
            switch: Namespace::new("switch")?,
            a: Namespace::new("host-a")?,
            b: Namespace::new("host-b")?,
        };
        let switch = &network.switch;
        switch.ip("link add br0 type bridge stp_state 0 forward_delay 0")?;
        switch.ip(&format!("addr add {CLIENT}/{PREFIX} dev br0"))?;
        switch.ip("link set br0 up")?;
        for side in [Side::A, Side::B] {
            let host = network.host(side);
            let inside = host.path().display();
            let port = format!("host-{}", side.letter());
            switch.ip(&format!("link add {port} type veth peer name uplink netns {inside}"))?;
            switch.ip(&format!("link set {port} master br0 up"))?;
            host.ip("link add br0 type bridge stp_state 0 forward_delay 0")?;
            host.ip(&format!("tuntap add dev {TAP} mode tap vnet_hdr"))?;
            host.ip(&format!("link set {TAP} master br0 up"))?;
            host.ip("link set uplink master br0 up")?;
            host.ip("link set br0 up")?;
        }
        let (a, b) = (&network.a, &network.b);
        a.ip(&format!("link add ft0 type veth peer name ft0 netns {}", b.path().display()))?;
        for side in [Side::A, Side::B] {
            let host = network.host(side);
            host.ip(&format!("addr add {}/24 dev ft0", side.address()))?;
            host.ip("link set ft0 up")?;
        }
        Ok(network)
    }

    /// The namespace of one host.
    #[must_use]
    pub fn host(&self, side: Side) -> &Namespace {
        match side {
            Side::A => &self.a,
            Side::B => &self.b,
        }
    }

    /// Gives a host an address in the guests' network, by which it reaches what runs at the switch.
    ///
    /// # Errors
    ///
    /// If `ip` refuses.
    pub fn connect_to_switch(&self, side: Side) -> Result<()> {
        let last = match side {
            Side::A => 2,
            Side::B => 3,
        };
        self.host(side).ip(&format!("addr add 10.77.0.{last}/{PREFIX} dev br0"))
    }

    /// Pulls or plugs the cable between the hosts; both still reach the switch.
    ///
    /// # Errors
    ///
    /// If `ip` refuses.
    pub fn set_link_between_hosts(&self, up: bool) -> Result<()> {
        let state = if up { "up" } else { "down" };
        self.b.ip(&format!("link set ft0 {state}"))
    }

    /// Pulls or plugs both cables of a host: nothing a dying host says gets out.
    ///
    /// # Errors
    ///
    /// If `ip` refuses.
    pub fn set_links(&self, side: Side, up: bool) -> Result<()> {
        let state = if up { "up" } else { "down" };
        self.host(side).ip(&format!("link set uplink {state}"))?;
        self.host(side).ip(&format!("link set ft0 {state}"))
    }

    /// Loses, or no longer loses, every frame that the other host sends to this one over the cable between
    /// them. What this one sends still arrives.
    ///
    /// # Errors
    ///
    /// If `ip` refuses.
    pub fn lose_frames_to(&self, side: Side, lost: bool) -> Result<()> {
        let (sender, address) = (self.host(side.other()), side.address());
        if lost {
            // An address of the link layer that nobody has.
            let nobody = "02:00:00:00:00:99";
            sender.ip(&format!("neigh replace {address} lladdr {nobody} dev ft0 nud permanent"))
        } else {
            sender.ip(&format!("neigh del {address} dev ft0"))
        }
    }

    /// Limits what a host can send on the logging channel, as `10mbit`; `None` lifts the limit.
    ///
    /// # Errors
    ///
    /// If `tc` refuses.
    pub fn limit(&self, side: Side, rate: Option<&str>) -> Result<()> {
        limit(self.host(side), "ft0", rate)
    }

    /// Limits what a host's guests and their clients can send each other, each way, as `1gbit`; `None` lifts the limit.
    ///
    /// # Errors
    ///
    /// If `tc` refuses.
    pub fn limit_guests(&self, side: Side, rate: Option<&str>) -> Result<()> {
        limit(self.host(side), "uplink", rate)?;
        limit(&self.switch, &format!("host-{}", side.letter()), rate)
    }
}

/// Limits what a namespace can send through one of its devices.
fn limit(namespace: &Namespace, device: &str, rate: Option<&str>) -> Result<()> {
    match rate {
        Some(rate) => namespace.tc(&format!(
            "qdisc replace dev {device} root tbf rate {rate} burst 128k latency 100ms"
        )),
        None => namespace.tc(&format!("qdisc del dev {device} root")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn the_hosts_hear_each_other_unless_a_cable_is_dead() -> Result<()> {
        if !crate::requirements::met("network", &[crate::requirements::Need::Root]) {
            return Ok(());
        }
        let network = Network::new()?;
        let listener = network.host(Side::B).run(|| TcpListener::bind("0.0.0.0:7700"))??;
        let address = std::net::SocketAddr::new(Side::B.address().parse()?, 7700);
        let connect = |patience| {
            let patience = std::time::Duration::from_secs(patience);
            network.host(Side::A).run(move || TcpStream::connect_timeout(&address, patience))
        };
        // A link just set up may lose the first packet; TCP sends it again after a second.
        connect(10)??;
        listener.accept()?;
        for (what, cut) in [
            (
                "frames to b are lost",
                &(|cut| network.lose_frames_to(Side::B, cut)) as &dyn Fn(_) -> _,
            ),
            ("frames to a are lost", &|cut| network.lose_frames_to(Side::A, cut)),
            ("cables pulled", &|cut| network.set_links(Side::B, !cut)),
        ] {
            let cut: &dyn Fn(bool) -> Result<()> = cut;
            cut(true)?;
            assert!(connect(1)?.is_err(), "{what}");
            cut(false)?;
            connect(10)?.with_context(|| format!("after {what}"))?;
        }
        Ok(())
    }
}
