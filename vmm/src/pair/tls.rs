//! Who may be the other end of the logging channel: certificates, and the errors about them.
//!
//! Each host has a certificate of the pair's own CA and shows it to the other; TLS 1.3 only. The primary
//! checks that the backup's certificate names the host it has connected to, the backup that the primary's
//! is of the CA and, if told, that it carries one of certain names. Files are read and checked when an
//! operator gives them, so that what is wrong with them is said to the operator and not to the peer.

use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::client::verify_server_name;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName,
    Error, RootCertStore, ServerConfig, SignatureScheme,
};

/// No certificate or key file is longer.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// The files a host needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificates of the CA that has signed both hosts' certificates.
    pub ca: PathBuf,
    /// This host's certificate, and intermediate ones after it.
    pub certificate: PathBuf,
    /// The private key to it.
    pub key: PathBuf,
}

impl TlsFiles {
    /// As `dyad-remote make-test-ca` names them.
    #[must_use]
    pub fn in_directory(directory: &Path) -> Self {
        Self {
            ca: directory.join("ca.pem"),
            certificate: directory.join("host.pem"),
            key: directory.join("host.key"),
        }
    }
}

/// Why files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsFileError {
    /// Not there, or not for us.
    #[error("cannot read '{}'", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Larger than any certificate.
    #[error("'{}' is longer than {MAX_FILE_BYTES} bytes: it holds no certificate or key", .0.display())]
    TooLong(PathBuf),
    /// Something else than its name says.
    #[error("'{}' holds no {what} in PEM form", path.display())]
    Without {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
    },
    /// Damaged or of an unknown kind.
    #[error("'{}' cannot be used: {reason}", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A pair that is none.
    #[error("'{}' is not the private key to the certificate in '{}'", key.display(), certificate.display())]
    NotTheKey {
        /// File of the key.
        key: PathBuf,
        /// File of the certificate.
        certificate: PathBuf,
    },
    /// A certificate that no peer with the same CA could accept.
    #[error("the certificate in '{}' {reason}", path.display())]
    Certificate {
        /// Its file.
        path: PathBuf,
        /// What is wrong with it, as a predicate.
        reason: String,
    },
    /// A name that cannot be in a certificate.
    #[error("'{0}' in 'allowed_peers' is neither a host name nor an IP address")]
    Name(String),
}

/// How a side of the logging channel knows the other.
#[derive(Clone)]
pub enum Security {
    /// By nothing: anybody who reaches the port is believed.
    Plain,
    /// By certificates.
    Tls(Arc<Identity>),
}

impl std::fmt::Debug for Security {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Plain => "plain",
            Self::Tls(_) => "TLS",
        })
    }
}

/// This host's certificate, and what it asks of the other.
pub struct Identity {
    pub(super) connecting: Arc<ClientConfig>,
    pub(super) accepting: Arc<ServerConfig>,
}

impl Identity {
    /// Reads and checks the files. Connections are accepted from hosts with one of the names `allowed`, or
    /// from any of the CA if that is empty.
    pub fn load(files: &TlsFiles, allowed: &[String]) -> Result<Self, TlsFileError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let roots = Arc::new(roots(&files.ca)?);
        let chain = certificates(&files.certificate)?;
        let key = private_key(&files.key)?;
        let names = names(allowed)?;
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
                .build()
                .map_err(|error| unusable(&files.ca, &error))?;
        check_own(&chain, &*verifier, files)?;
        let verifier = Allowing { inner: verifier, names };
        Self::new(&provider, roots, Arc::new(verifier), chain, key)
            .map_err(|error| key_error(files, &error))
    }

    fn new(
        provider: &Arc<CryptoProvider>,
        roots: Arc<RootCertStore>,
        verifier: Arc<dyn ClientCertVerifier>,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<Self, Error> {
        // The newest version alone: both sides are Dyads of one protocol version. Connections are rare and
        // long: a full handshake each, by which a certificate that has expired or was replaced is noticed.
        let mut connecting = ClientConfig::builder_with_provider(Arc::clone(provider))
            .with_protocol_versions(&[&TLS13])?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain.clone(), key.clone_key())?;
        connecting.resumption = Resumption::disabled();
        let mut accepting = ServerConfig::builder_with_provider(Arc::clone(provider))
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)?;
        accepting.send_tls13_tickets = 0;
        Ok(Self { connecting: Arc::new(connecting), accepting: Arc::new(accepting) })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsFileError> {
    let unreadable = |source| TlsFileError::Unreadable { path: path.to_owned(), source };
    let length = std::fs::metadata(path).map_err(unreadable)?.len();
    if length > MAX_FILE_BYTES {
        return Err(TlsFileError::TooLong(path.to_owned()));
    }
    std::fs::read(path).map_err(unreadable)
}

fn unusable(path: &Path, error: &dyn std::error::Error) -> TlsFileError {
    TlsFileError::Unusable { path: path.to_owned(), reason: error.to_string() }
}

/// At least one.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsFileError> {
    let text = read(path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    let found = found.map_err(|error| unusable(path, &error))?;
    if found.is_empty() {
        return Err(TlsFileError::Without { path: path.to_owned(), what: "certificate" });
    }
    Ok(found)
}

fn roots(path: &Path) -> Result<RootCertStore, TlsFileError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|error| unusable(path, &error))?;
    }
    Ok(roots)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsFileError> {
    let text = read(path)?;
    let mode = std::fs::metadata(path).map_or(0, |metadata| metadata.mode());
    if mode & 0o077 != 0 {
        log::warn!("'{}' can be read by others than its owner: chmod 600 it", path.display());
    }
    PrivateKeyDer::from_pem_slice(&text).map_err(|error| match error {
        rustls::pki_types::pem::Error::NoItemsFound => {
            TlsFileError::Without { path: path.to_owned(), what: "private key" }
        }
        other => unusable(path, &other),
    })
}

fn key_error(files: &TlsFiles, error: &Error) -> TlsFileError {
    match error {
        Error::InconsistentKeys(_) => TlsFileError::NotTheKey {
            key: files.key.clone(),
            certificate: files.certificate.clone(),
        },
        _ => unusable(&files.key, error),
    }
}

/// Judges our own certificate as a peer with the same CA will.
fn check_own(
    chain: &[CertificateDer<'static>],
    verifier: &dyn ClientCertVerifier,
    files: &TlsFiles,
) -> Result<(), TlsFileError> {
    let Some((end_entity, intermediates)) = chain.split_first() else { return Ok(()) };
    let result = verifier.verify_client_cert(end_entity, intermediates, UnixTime::now());
    let reason = match result {
        Ok(_) => return Ok(()),
        // The latter if the CA given has the same name as another.
        Err(Error::InvalidCertificate(
            CertificateError::UnknownIssuer | CertificateError::BadSignature,
        )) => {
            format!("is not signed by the CA in '{}'", files.ca.display())
        }
        Err(Error::InvalidCertificate(error)) => certificate_fault(&error),
        Err(error) => format!("cannot be used: {error}"),
    };
    Err(TlsFileError::Certificate { path: files.certificate.clone(), reason })
}

fn names(allowed: &[String]) -> Result<Vec<ServerName<'static>>, TlsFileError> {
    let name = |text: &String| host_name(text).ok_or_else(|| TlsFileError::Name(text.clone()));
    allowed.iter().map(name).collect()
}

/// `text` as certificates have it: an address or a DNS name.
pub(super) fn host_name(text: &str) -> Option<ServerName<'static>> {
    match text.parse::<IpAddr>() {
        Ok(address) => Some(ServerName::IpAddress(address.into())),
        Err(_) => ServerName::try_from(text.to_owned()).ok(),
    }
}

/// Accepts what the CA has signed, and of that only certain names if there are any.
#[derive(Debug)]
struct Allowing {
    inner: Arc<dyn ClientCertVerifier>,
    names: Vec<ServerName<'static>>,
}

impl ClientCertVerifier for Allowing {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.inner.verify_client_cert(end_entity, intermediates, now)?;
        let certificate = ParsedCertificate::try_from(end_entity)?;
        let named = |name| verify_server_name(&certificate, name).is_ok();
        if self.names.is_empty() || self.names.iter().any(named) {
            return Ok(verified);
        }
        Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// What is wrong with a certificate, to follow "the certificate".
fn certificate_fault(error: &CertificateError) -> String {
    match error {
        CertificateError::Expired => "has expired".into(),
        CertificateError::ExpiredContext { time, not_after } => {
            format!("has expired {} ago", span(time, not_after))
        }
        CertificateError::NotValidYet => "is not valid yet: do the hosts' clocks agree?".into(),
        CertificateError::NotValidYetContext { time, not_before } => format!(
            "is not valid before {} from now: do the hosts' clocks agree?",
            span(not_before, time)
        ),
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "is not signed by the CA that this side was given".into()
        }
        CertificateError::NotValidForName => "does not name the host connected to".into(),
        CertificateError::NotValidForNameContext { expected, presented } => {
            let presented =
                if presented.is_empty() { "no host".to_owned() } else { presented.join(", ") };
            let expected = expected.to_str();
            format!("names {presented}, and this side has connected to '{expected}'")
        }
        CertificateError::ApplicationVerificationFailure => {
            "has none of the names in 'allowed_peers'".into()
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "is not made for this use: it needs client and server authentication".into()
        }
        other => format!("is refused: {other}"),
    }
}

fn span(later: &UnixTime, earlier: &UnixTime) -> String {
    let seconds = later.as_secs().saturating_sub(earlier.as_secs());
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} minutes", seconds / 60),
        7200..172_800 => format!("{} hours", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

/// What went wrong with a peer, for the operator.
pub(super) fn explain(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(error) => format!("the peer's certificate {}", certificate_fault(error)),
        Error::NoCertificatesPresented => "the peer has no certificate to show".into(),
        Error::AlertReceived(alert) => match alert {
            AlertDescription::UnknownCA | AlertDescription::DecryptError => {
                "the peer refuses this host's certificate: it is not signed by the CA that the peer was given".into()
            }
            AlertDescription::CertificateExpired => {
                "the peer refuses this host's certificate: it has expired, by the peer's clock".into()
            }
            AlertDescription::AccessDenied => {
                "the peer refuses this host: its certificate has none of the names in the peer's 'allowed_peers'".into()
            }
            AlertDescription::CertificateRequired => "the peer wants a certificate of this host".into(),
            AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::CertificateRevoked => {
                format!("the peer refuses this host's certificate ({alert:?})")
            }
            other => format!("the peer ended TLS with an alert ({other:?})"),
        },
        other => format!("TLS failed: {other}"),
    }
}

#[cfg(test)]
pub(super) mod tests;
