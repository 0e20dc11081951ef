//! How the two sides of a pair know each other: the part of `ft.receive` and `ft.enable` that both have.

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::config::{OptionString, OptionStringError, is_false};
use crate::pair::tls::{Identity, Security, TlsFileError, TlsFiles};

/// Certificates, or none. The default is what the process was started with (`dyad --ft-tls-dir`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelSecurity {
    /// Directory with `ca.pem`, `host.pem` and `host.key`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_dir: Option<PathBuf>,
    /// Instead of `tls_dir`: the CA's certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_ca: Option<PathBuf>,
    /// Instead of `tls_dir`: this host's certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_certificate: Option<PathBuf>,
    /// Instead of `tls_dir`: the private key to the certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_key: Option<PathBuf>,
    /// Neither encrypt nor ask who the other side is.
    #[serde(default, skip_serializing_if = "is_false")]
    pub insecure: bool,
}

/// What an operator has chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChosenSecurity {
    /// Nothing.
    Plain,
    /// Certificates.
    Tls(TlsFiles),
}

impl ChosenSecurity {
    /// Reads the files. Connections are accepted from `allowed` names only, or from any of the CA if there
    /// are none.
    pub fn load(&self, allowed: &[String]) -> Result<Security, TlsFileError> {
        match self {
            Self::Plain => Ok(Security::Plain),
            Self::Tls(files) => {
                let identity = Identity::load(files, allowed)?;
                Ok(Security::Tls(Arc::new(identity)))
            }
        }
    }
}

/// A choice that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SecurityError {
    /// Nothing chosen.
    #[error(
        "the logging channel carries all of the guest's memory, so each host must show a certificate: \
         give 'tls_dir' (a directory with ca.pem, host.pem and host.key) here, or start dyad with \
         --ft-tls-dir DIR. To try it out: 'dyad-remote make-test-ca DIR HOST...' makes a test CA and such a \
         directory for each host. On a network that nobody else reaches: insecure=on, on both sides"
    )]
    None,
    /// Certificates and none.
    #[error("'insecure' and '{0}' exclude each other: choose one")]
    Both(&'static str),
    /// A directory and single files.
    #[error("'tls_dir' and '{0}' exclude each other: give a directory, or the three files")]
    Twice(&'static str),
    /// Some of three.
    #[error(
        "'{0}' is missing: give all of 'tls_ca', 'tls_certificate' and 'tls_key', or 'tls_dir'"
    )]
    Missing(&'static str),
}

impl ChannelSecurity {
    /// The keys of option strings.
    pub const KEYS: [&str; 5] = ["tls_dir", "tls_ca", "tls_certificate", "tls_key", "insecure"];

    /// Plain TCP.
    #[must_use]
    pub fn insecure() -> Self {
        Self { insecure: true, ..Self::default() }
    }

    /// Takes its keys out of an option string.
    pub fn from_options(options: &OptionString) -> Result<Self, OptionStringError> {
        let path = |key| options.text(key).map(PathBuf::from);
        Ok(Self {
            tls_dir: path("tls_dir"),
            tls_ca: path("tls_ca"),
            tls_certificate: path("tls_certificate"),
            tls_key: path("tls_key"),
            insecure: options.toggle("insecure", false)?,
        })
    }

    /// What is meant; `default` is the directory that the process was started with.
    pub fn chosen(&self, default: Option<&PathBuf>) -> Result<ChosenSecurity, SecurityError> {
        let files = [
            ("tls_ca", &self.tls_ca),
            ("tls_certificate", &self.tls_certificate),
            ("tls_key", &self.tls_key),
        ];
        let file = files.iter().find(|(_, path)| path.is_some()).map(|(name, _)| *name);
        let directory = self.tls_dir.as_ref();
        if self.insecure {
            return match directory.map(|_| "tls_dir").or(file) {
                Some(name) => Err(SecurityError::Both(name)),
                None => Ok(ChosenSecurity::Plain),
            };
        }
        if let (Some(_), Some(name)) = (directory, file) {
            return Err(SecurityError::Twice(name));
        }
        let files = match (&self.tls_ca, &self.tls_certificate, &self.tls_key) {
            (None, None, None) => {
                let directory = directory.or(default).ok_or(SecurityError::None)?;
                TlsFiles::in_directory(directory)
            }
            (Some(ca), Some(certificate), Some(key)) => {
                TlsFiles { ca: ca.clone(), certificate: certificate.clone(), key: key.clone() }
            }
            (None, _, _) => return Err(SecurityError::Missing("tls_ca")),
            (_, None, _) => return Err(SecurityError::Missing("tls_certificate")),
            (_, _, None) => return Err(SecurityError::Missing("tls_key")),
        };
        Ok(ChosenSecurity::Tls(files))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(text: &str, default: Option<&str>) -> Result<ChosenSecurity, SecurityError> {
        let options = OptionString::parse(text, &ChannelSecurity::KEYS, &[]).unwrap();
        let security = ChannelSecurity::from_options(&options).unwrap();
        let json = serde_json::to_value(&security).unwrap();
        assert_eq!(serde_json::from_value::<ChannelSecurity>(json).unwrap(), security);
        security.chosen(default.map(PathBuf::from).as_ref())
    }

    fn directory(path: &str) -> Result<ChosenSecurity, SecurityError> {
        Ok(ChosenSecurity::Tls(TlsFiles::in_directory(path.as_ref())))
    }

    #[test]
    fn a_call_decides_before_the_process_does() {
        assert_eq!(chosen("", Some("/default")), directory("/default"));
        assert_eq!(chosen("tls_dir=/a", Some("/default")), directory("/a"));
        assert_eq!(chosen("insecure=on", Some("/default")), Ok(ChosenSecurity::Plain));
        let files = TlsFiles { ca: "/c".into(), certificate: "/h".into(), key: "/k".into() };
        let three = "tls_ca=/c,tls_certificate=/h,tls_key=/k";
        assert_eq!(chosen(three, Some("/default")), Ok(ChosenSecurity::Tls(files)));
    }

    #[test]
    fn what_is_undecided_is_refused_and_explained() {
        let text = chosen("", None).unwrap_err().to_string();
        for word in ["tls_dir", "--ft-tls-dir", "make-test-ca", "insecure=on"] {
            assert!(text.contains(word), "{word}: {text}");
        }
        assert_eq!(chosen("insecure=off", None), Err(SecurityError::None));
        for (text, word) in [
            ("insecure=on,tls_dir=/a", "tls_dir"),
            ("insecure=on,tls_key=/a", "tls_key"),
            ("tls_dir=/a,tls_ca=/b", "tls_ca"),
            ("tls_ca=/a,tls_key=/b", "'tls_certificate' is missing"),
            ("tls_certificate=/a,tls_key=/b", "'tls_ca' is missing"),
            ("tls_ca=/a,tls_certificate=/b", "'tls_key' is missing"),
        ] {
            let error = chosen(text, Some("/default")).unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
