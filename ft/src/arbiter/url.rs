//! Where claims are made, as operators write it and as the two sides of a pair tell each other.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An operator who lists more members of an etcd cluster has mistaken something.
const MAX_ENDPOINTS: usize = 16;

/// An arbiter: `file:DIR`, or `etcd:HOST:PORT,HOST:PORT,...`, the list also in brackets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ArbiterUrl {
    /// Claims are files in this directory, which both hosts share.
    File(PathBuf),
    /// Claims are transactions of an etcd cluster with these members.
    Etcd(Vec<Endpoint>),
}

/// Where one member of an etcd cluster answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Name or address, without brackets.
    pub host: String,
    /// Port.
    pub port: u16,
}

/// An arbiter's URL that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadArbiter {
    /// No known kind.
    #[error(
        "arbiter_url {url:?} is of no known kind: use file:DIR with a directory that both hosts share, or etcd:HOST:PORT,HOST:PORT,..."
    )]
    Unknown {
        /// The URL.
        url: String,
    },
    /// Not an absolute path.
    #[error("arbiter_url {url:?} must name an absolute directory, as file:/shared/dyad")]
    NotAbsolute {
        /// The URL.
        url: String,
    },
    /// A member of the etcd cluster that cannot be one.
    #[error(
        "arbiter_url names {endpoint:?} as a member of an etcd cluster; use HOST:PORT, as in etcd:10.0.0.1:2379,10.0.0.2:2379,10.0.0.3:2379"
    )]
    BadEndpoint {
        /// What stands there.
        endpoint: String,
    },
    /// Too many members.
    #[error("arbiter_url names {count} members of an etcd cluster; name up to {MAX_ENDPOINTS}")]
    TooManyEndpoints {
        /// How many.
        count: usize,
    },
}

impl FromStr for ArbiterUrl {
    type Err = BadArbiter;

    fn from_str(url: &str) -> Result<Self, BadArbiter> {
        match url.split_once(':') {
            Some(("file", path)) => {
                let path = path.strip_prefix("//").unwrap_or(path);
                if path.starts_with('/') {
                    Ok(Self::File(path.into()))
                } else {
                    Err(BadArbiter::NotAbsolute { url: clip(url) })
                }
            }
            Some(("etcd", list)) => {
                let list = list.strip_prefix("//").unwrap_or(list);
                // An IPv6 address in brackets has its port after them.
                let bracketed = list.strip_prefix('[').and_then(|list| list.strip_suffix(']'));
                let endpoints: Result<Vec<_>, _> =
                    bracketed.unwrap_or(list).split(',').map(|text| text.trim().parse()).collect();
                let endpoints = endpoints?;
                if endpoints.len() > MAX_ENDPOINTS {
                    return Err(BadArbiter::TooManyEndpoints { count: endpoints.len() });
                }
                Ok(Self::Etcd(endpoints))
            }
            _ => Err(BadArbiter::Unknown { url: clip(url) }),
        }
    }
}

impl fmt::Display for ArbiterUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(directory) => write!(f, "file:{}", directory.display()),
            Self::Etcd(endpoints) => {
                f.write_str("etcd:")?;
                for (index, endpoint) in endpoints.iter().enumerate() {
                    let comma = if index == 0 { "" } else { "," };
                    write!(f, "{comma}{endpoint}")?;
                }
                Ok(())
            }
        }
    }
}

impl TryFrom<String> for ArbiterUrl {
    type Error = BadArbiter;
    fn try_from(url: String) -> Result<Self, BadArbiter> {
        url.parse()
    }
}

impl From<ArbiterUrl> for String {
    fn from(url: ArbiterUrl) -> Self {
        url.to_string()
    }
}

impl FromStr for Endpoint {
    type Err = BadArbiter;

    fn from_str(text: &str) -> Result<Self, BadArbiter> {
        let bad = || BadArbiter::BadEndpoint { endpoint: clip(text) };
        let (host, port) = text.rsplit_once(':').ok_or_else(bad)?;
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let fits = match address {
            Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
            None => !host.is_empty() && host.len() <= 253 && host.chars().all(plain),
        };
        let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(bad)?;
        if !fits {
            return Err(bad());
        }
        Ok(Self { host: address.unwrap_or(host).to_owned(), port })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port } = self;
        if host.contains(':') { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
    }
}

fn clip(text: &str) -> String {
    text.chars().take(200).collect()
}
