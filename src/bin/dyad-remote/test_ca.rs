//! `make-test-ca`: a certificate authority for a pair's hosts and a certificate for each, enough to try
//! protection out on one's own machines. An organisation with an authority of its own uses that instead.
//!
//! Nothing that exists is ever overwritten; keys are for their owner alone.

use std::fs::{DirBuilder, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use time::{Duration, OffsetDateTime};

/// How long the certificates are good.
const VALID: Duration = Duration::days(365);
/// Hosts' clocks may be behind by this.
const CLOCK_TOLERANCE: Duration = Duration::days(1);

/// Makes the authority in `directory`, or extends the one there, and a directory for each host: a name, an
/// address, or several of one host with commas. Returns what to tell the user.
///
/// # Errors
///
/// If a host has its directory already, or a file cannot be written.
pub fn make(directory: &Path, hosts: &[String]) -> Result<Vec<String>> {
    let hosts: Vec<Host> = hosts.iter().map(|text| Host::new(text)).collect::<Result<_>>()?;
    for (index, host) in hosts.iter().enumerate() {
        let path = directory.join(host.name());
        ensure!(
            !path.exists() && hosts[..index].iter().all(|before| before.name() != host.name()),
            "'{}' exists already, and nothing is overwritten: remove it first if it is of no more use",
            path.display()
        );
    }
    private_directory(directory)?;
    let (authority, certificate, mut told) = authority(directory)?;
    for host in &hosts {
        let path = directory.join(host.name());
        private_directory(&path)?;
        let key = KeyPair::generate()?;
        let signed = host.params()?.signed_by(&key, &authority)?;
        write(&path.join("ca.pem"), &certificate, 0o644)?;
        write(&path.join("host.pem"), &signed.pem(), 0o644)?;
        write(&path.join("host.key"), &key.serialize_pem(), 0o600)?;
        told.push(format!("{}: tls_dir for the host {}", path.display(), host.names.join(", ")));
    }
    Ok(told)
}

/// The names of one host, the first of which names its directory.
struct Host {
    names: Vec<String>,
}

impl Host {
    fn new(text: &str) -> Result<Self> {
        let names: Vec<String> = text.split(',').map(|name| name.trim().to_owned()).collect();
        for name in &names {
            let plain = !name.is_empty()
                && !name.starts_with('.')
                && name.chars().all(|c| c.is_ascii_alphanumeric() || ".-_:".contains(c));
            ensure!(plain, "'{name}' is neither a host name nor an IP address");
        }
        ensure!(
            names[0] != "ca.pem" && names[0] != "ca.key",
            "'{}' is the name of one of the authority's files",
            names[0]
        );
        Ok(Self { names })
    }

    fn name(&self) -> &str {
        &self.names[0]
    }

    /// A certificate that serves on both ends of a connection: the host may be primary now and backup later.
    fn params(&self) -> Result<CertificateParams> {
        let mut params = CertificateParams::new(self.names.clone())
            .with_context(|| format!("no certificate can name '{}'", self.names.join(",")))?;
        params.distinguished_name.push(DnType::CommonName, self.name());
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        set_validity(&mut params);
        Ok(params)
    }
}

fn set_validity(params: &mut CertificateParams) {
    let now = OffsetDateTime::now_utc();
    params.not_before = now - CLOCK_TOLERANCE;
    params.not_after = now + VALID;
}

/// The authority of `directory` with its certificate, made if it is not there, and what to tell of it.
fn authority(directory: &Path) -> Result<(Issuer<'static, KeyPair>, String, Vec<String>)> {
    let (certificate, key) = (directory.join("ca.pem"), directory.join("ca.key"));
    if certificate.exists() || key.exists() {
        let read = |path: &Path| {
            let text = std::fs::read_to_string(path);
            text.with_context(|| {
                format!("cannot read '{}', without which no host can be added", path.display())
            })
        };
        let (pem, key_pem) = (read(&certificate)?, read(&key)?);
        let key_pair = KeyPair::from_pem(&key_pem)
            .with_context(|| format!("'{}' holds no private key", key.display()))?;
        let issuer = Issuer::from_ca_cert_pem(&pem, key_pair)
            .with_context(|| format!("'{}' holds no certificate", certificate.display()))?;
        return Ok((issuer, pem, Vec::new()));
    }
    let key_pair = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    // Authorities of one name cannot be told from each other.
    let id: String =
        params.key_identifier(&key_pair).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    params.distinguished_name.push(DnType::CommonName, format!("Dyad test CA {id}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    set_validity(&mut params);
    let pem = params.self_signed(&key_pair)?.pem();
    write(&certificate, &pem, 0o644)?;
    write(&key, &key_pair.serialize_pem(), 0o600)?;
    let told = format!("{}: a new authority; keep its ca.key to yourself", directory.display());
    Ok((Issuer::new(params, key_pair), pem, vec![told]))
}

fn private_directory(path: &Path) -> Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.with_context(|| format!("cannot make the directory '{}'", path.display()))
}

fn write(path: &Path, text: &str, mode: u32) -> Result<()> {
    let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("cannot write '{}'", path.display()))
}
