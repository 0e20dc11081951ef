//! The grammar of option values on the command line: `key=value,key=value`.
//!
//! Double quotes protect commas and brackets and are stripped; `""` inside quotes is one quote. Brackets
//! hold lists, whose commas do not separate pairs. An empty value is the same as an absent one. A key that
//! an option does not know is an error: a misspelt `readonly` must not give a writable disk.

use std::fmt;
use std::str::FromStr;

/// Why an option value cannot be used. The texts do not name the option, whoever parses it does.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionStringError {
    /// A pair without `=`.
    #[error("'{0}' is no key=value pair; a value that holds commas stands in brackets or quotes")]
    NoValue(String),
    /// A key the option does not have.
    #[error("there is no key '{key}'; the keys are {known}")]
    UnknownKey {
        /// The key found.
        key: String,
        /// The keys there are.
        known: String,
    },
    /// A key given twice.
    #[error("'{0}' is given twice")]
    Repeated(String),
    /// A quote or bracket that is not closed, or closed without being open.
    #[error("quotes or brackets do not match")]
    Unbalanced,
    /// A value of the wrong form.
    #[error("'{key}' is '{value}'; it must be {expected}")]
    Value {
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// What would do.
        expected: String,
    },
    /// A key without which the option means nothing.
    #[error("'{0}=...' is needed")]
    Missing(&'static str),
    /// A key of Cloud Hypervisor that Dyad has nothing behind.
    #[error("Dyad does not support '{0}' yet")]
    Unsupported(String),
}

/// The pairs of one option value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OptionString {
    pairs: Vec<(String, String)>,
}

impl OptionString {
    /// Takes `text` apart. `known` are the keys with a meaning, `unsupported` those that are refused with a
    /// text of their own.
    pub fn parse(
        text: &str,
        known: &[&str],
        unsupported: &[&str],
    ) -> Result<Self, OptionStringError> {
        let mut pairs: Vec<(String, String)> = Vec::new();
        for item in split(text)? {
            if item.is_empty() {
                continue;
            }
            let (key, value) =
                item.split_once('=').ok_or_else(|| OptionStringError::NoValue(item.clone()))?;
            let key = key.trim();
            if unsupported.contains(&key) {
                return Err(OptionStringError::Unsupported(key.to_owned()));
            }
            if !known.contains(&key) {
                let known = known.join(", ");
                return Err(OptionStringError::UnknownKey { key: key.to_owned(), known });
            }
            if pairs.iter().any(|(before, _)| before == key) {
                return Err(OptionStringError::Repeated(key.to_owned()));
            }
            pairs.push((key.to_owned(), value.to_owned()));
        }
        Ok(Self { pairs })
    }

    /// The text of `key`, if it is there and not empty.
    pub fn text(&self, key: &str) -> Option<&str> {
        let (_, value) = self.pairs.iter().find(|(found, _)| found == key)?;
        if value.is_empty() { None } else { Some(value) }
    }

    /// The value of `key`, read as `T`. `expected` completes "it must be".
    pub fn value<T: FromStr>(
        &self,
        key: &str,
        expected: &str,
    ) -> Result<Option<T>, OptionStringError> {
        self.with(key, expected, |text| text.parse().ok())
    }

    /// The value of `key`, read by `read`.
    pub fn with<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&str) -> Option<T>,
    ) -> Result<Option<T>, OptionStringError> {
        let Some(text) = self.text(key) else { return Ok(None) };
        match read(text) {
            Some(value) => Ok(Some(value)),
            None => Err(OptionStringError::Value {
                key: key.to_owned(),
                value: text.to_owned(),
                expected: expected.to_owned(),
            }),
        }
    }

    /// `on` or `off`.
    pub fn toggle(&self, key: &str, default: bool) -> Result<bool, OptionStringError> {
        Ok(self.value(key, "on or off")?.map_or(default, |Toggle(on)| on))
    }

    /// A list in brackets, `[a,b]`.
    pub fn list<T: FromStr>(
        &self,
        key: &str,
        expected: &str,
    ) -> Result<Option<Vec<T>>, OptionStringError> {
        self.with(key, expected, |text| {
            let items = text.strip_prefix('[')?.strip_suffix(']')?;
            items.split(',').map(|item| item.trim().parse().ok()).collect()
        })
    }

    /// A number of bytes.
    pub fn size(&self, key: &str) -> Result<Option<u64>, OptionStringError> {
        self.with(key, "a number of bytes, or one with suffix K, M or G", parse_size)
    }

    /// One of a few words.
    pub fn choice<T: Copy>(
        &self,
        key: &str,
        choices: &[(&str, T)],
    ) -> Result<Option<T>, OptionStringError> {
        let words: Vec<_> = choices.iter().map(|(word, _)| *word).collect();
        self.with(key, &format!("one of {}", words.join(", ")), |text| {
            choices.iter().find(|(word, _)| *word == text).map(|(_, value)| *value)
        })
    }
}

/// Cuts at commas outside of quotes and brackets, and strips quotes.
fn split(text: &str) -> Result<Vec<String>, OptionStringError> {
    let mut items = vec![String::new()];
    let mut quoted = false;
    let mut depth = 0usize;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let keep = match c {
            '"' if quoted && chars.peek() == Some(&'"') => {
                chars.next();
                true
            }
            '"' => {
                quoted = !quoted;
                false
            }
            _ if quoted => true,
            '[' => {
                depth += 1;
                true
            }
            ']' => {
                depth = depth.checked_sub(1).ok_or(OptionStringError::Unbalanced)?;
                true
            }
            ',' if depth == 0 => {
                items.push(String::new());
                false
            }
            _ => true,
        };
        if keep && let Some(item) = items.last_mut() {
            item.push(c);
        }
    }
    if quoted || depth > 0 { Err(OptionStringError::Unbalanced) } else { Ok(items) }
}

/// `on`, `off`, `true` or `false` in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Toggle(pub bool);

impl FromStr for Toggle {
    type Err = fmt::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.to_ascii_lowercase().as_str() {
            "on" | "true" => Ok(Self(true)),
            "off" | "false" => Ok(Self(false)),
            _ => Err(fmt::Error),
        }
    }
}

/// Decimal bytes, or with the suffix `K`, `M` or `G` for powers of 1024.
pub fn parse_size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' => (&text[..text.len() - 1], 10),
        b'M' => (&text[..text.len() - 1], 20),
        b'G' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    if !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<OptionString, OptionStringError> {
        OptionString::parse(text, &["path", "readonly", "size", "list"], &["vhost"])
    }

    #[test]
    fn quotes_and_brackets_protect_commas() {
        let text = |text: &str, key: &str| parse(text).unwrap().text(key).map(str::to_owned);
        assert_eq!(text("path=/a,readonly=on", "path").unwrap(), "/a");
        assert_eq!(text("path=\"/a,b\",readonly=on", "path").unwrap(), "/a,b");
        assert_eq!(text("\"path=/a,b\"", "path").unwrap(), "/a,b");
        assert_eq!(text("path=\"/a\"\"b\"", "path").unwrap(), "/a\"b");
        assert_eq!(text("path=/a=b", "path").unwrap(), "/a=b");
        assert_eq!(text("list=[1,2-4],path=/a", "list").unwrap(), "[1,2-4]");
        assert_eq!(text("path=\"/a]\"", "path").unwrap(), "/a]");
        assert_eq!(text("path=,readonly=on", "path"), None);
        assert_eq!(text("", "path"), None);
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(parse("/a"), Err(OptionStringError::NoValue("/a".into())));
        assert_eq!(parse("path=/a,path=/b"), Err(OptionStringError::Repeated("path".into())));
        assert_eq!(parse("vhost=on"), Err(OptionStringError::Unsupported("vhost".into())));
        for text in ["path=\"/a", "list=[1", "list=1]", "list=[[1]"] {
            assert_eq!(parse(text), Err(OptionStringError::Unbalanced), "{text}");
        }
        let error = parse("readnoly=on").unwrap_err().to_string();
        assert!(error.contains("'readnoly'") && error.contains("readonly"), "{error}");
        let error = parse("readonly=yes").unwrap().toggle("readonly", false).unwrap_err();
        assert!(error.to_string().contains("on or off"), "{error}");
    }

    #[test]
    fn sizes_have_binary_suffixes() {
        assert_eq!(parse_size("4096"), Some(4096));
        assert_eq!(parse_size("4K"), Some(4096));
        assert_eq!(parse_size("2G"), Some(2 << 30));
        for text in ["", "K", "1k", "-1", "+1", "1.5G", "0x10", "1GB", "17179869184G", "1é"] {
            assert_eq!(parse_size(text), None, "{text}");
        }
    }
}
