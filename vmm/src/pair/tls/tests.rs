//! Certificates for tests, and what [`Identity::load`] makes of files.

use std::os::unix::fs::PermissionsExt;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tempfile::TempDir;
use time::{Duration, OffsetDateTime};

use super::*;

/// A certificate authority in memory.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// The files of a host, with a certificate as `change` makes it.
    pub(crate) fn host(
        &self,
        name: &str,
        change: impl FnOnce(&mut CertificateParams),
    ) -> (TempDir, TlsFiles) {
        let directory = tempfile::tempdir().unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        change(&mut params);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let files = TlsFiles::in_directory(directory.path());
        std::fs::write(&files.ca, &self.pem).unwrap();
        std::fs::write(&files.certificate, certificate.pem()).unwrap();
        std::fs::write(&files.key, key.serialize_pem()).unwrap();
        let owner_only = std::fs::Permissions::from_mode(0o600);
        std::fs::set_permissions(&files.key, owner_only).unwrap();
        (directory, files)
    }

    /// A host that others of this authority believe.
    pub(crate) fn identity(&self, name: &str) -> Security {
        self.allowing(name, &[])
    }

    /// As [`Self::identity`]; accepts connections from `allowed` only.
    pub(crate) fn allowing(&self, name: &str, allowed: &[&str]) -> Security {
        let (_directory, files) = self.host(name, |_| ());
        let allowed: Vec<String> = allowed.iter().map(|&name| name.to_owned()).collect();
        Security::Tls(Arc::new(Identity::load(&files, &allowed).unwrap()))
    }
}

/// A host that does not see what is wrong with its own certificate, as one with a wrong clock does not.
pub(crate) fn unchecked(files: &TlsFiles) -> Security {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let roots = Arc::new(roots(&files.ca).unwrap());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider));
    let (chain, key) = (certificates(&files.certificate), private_key(&files.key));
    let identity =
        Identity::new(&provider, roots, verifier.build().unwrap(), chain.unwrap(), key.unwrap());
    Security::Tls(Arc::new(identity.unwrap()))
}

/// Makes a certificate one that was good until a while ago.
pub(crate) fn expired(params: &mut CertificateParams) {
    params.not_after = OffsetDateTime::now_utc() - Duration::days(3);
}

/// The error with its cause.
fn refusal(files: &TlsFiles) -> String {
    let error = Identity::load(files, &[]).err().expect("these files cannot be used");
    let cause = std::error::Error::source(&error).map(ToString::to_string);
    format!("{error} {}", cause.unwrap_or_default())
}

#[test]
fn good_files_are_loaded() {
    for name in ["a.example", "10.0.0.1", "fe80::1"] {
        let (_directory, files) = Authority::new().host(name, |_| ());
        Identity::load(&files, &["b".into(), "10.0.0.2".into()]).unwrap();
    }
}

#[test]
fn what_is_wrong_with_files_is_named() {
    let authority = Authority::new();
    let host = || authority.host("a", |_| ());
    let says = |files: &TlsFiles, words: &[&str]| {
        let text = refusal(files);
        for word in words {
            assert!(text.contains(word), "{word}: {text}");
        }
    };

    let (directory, files) = host();
    std::fs::remove_file(&files.key).unwrap();
    says(&files, &["cannot read", "host.key", "No such file"]);
    says(&TlsFiles::in_directory(&directory.path().join("none")), &["none/ca.pem"]);

    let (_directory, files) = host();
    std::fs::write(&files.ca, "").unwrap();
    says(&files, &["ca.pem", "no certificate"]);
    std::fs::write(&files.ca, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        .unwrap();
    says(&files, &["ca.pem", "cannot be used"]);
    std::fs::write(&files.ca, vec![b'x'; 2 << 20]).unwrap();
    says(&files, &["ca.pem", "longer"]);

    let (_directory, files) = host();
    std::fs::copy(&files.certificate, &files.key).unwrap();
    says(&files, &["host.key", "no private key"]);

    let ((_first, files), (_second, other)) = (host(), host());
    std::fs::copy(&other.key, &files.key).unwrap();
    says(&files, &["host.key' is not the private key", "host.pem"]);

    let ((_first, files), (_second, other)) = (host(), Authority::new().host("a", |_| ()));
    std::fs::copy(&other.ca, &files.ca).unwrap();
    says(&files, &["host.pem", "not signed by the CA in", "ca.pem"]);

    let (_directory, files) = authority.host("a", expired);
    says(&files, &["host.pem", "has expired 3 days ago"]);
    let (_directory, files) = authority.host("a", |params| {
        params.not_before = OffsetDateTime::now_utc() + Duration::days(3);
        params.not_after = OffsetDateTime::now_utc() + Duration::days(9);
    });
    says(&files, &["host.pem", "not valid before", "clocks"]);
    let (_directory, files) = authority.host("a", |params| {
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    });
    says(&files, &["host.pem", "client and server authentication"]);
}

#[test]
fn allowed_names_must_be_names() {
    let (_directory, files) = Authority::new().host("a", |_| ());
    let error = Identity::load(&files, &["no name".into()]).err().unwrap();
    assert!(error.to_string().contains("'no name'"), "{error}");
}
