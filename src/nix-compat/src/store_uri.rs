//! Where a store is: `ssh-ng://user@host?param=value`, `/some/dir`, `daemon`.

use std::collections::BTreeMap;
use std::fmt;

/// Why a text names no store.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A `%` that is not followed by two hexadecimal digits.
    #[error("invalid URI parameter '{0}'")]
    Percent(String),
    /// Parameters that, decoded, are no text.
    #[error("the URI parameter '{0}' is not UTF-8")]
    NotUtf8(String),
    /// No name at all, or one that ssh would take for an option.
    #[error("invalid store URI '{0}'")]
    Authority(String),
}

/// A store's URI in its parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreUri {
    /// What is in front of `://`; empty for a word such as `auto` or a plain path.
    pub scheme: String,
    /// What is between the scheme and the parameters: a host, a path, a word. Not decoded.
    pub authority: String,
    /// The parameters, decoded. Of several with one name the last counts.
    pub params: BTreeMap<String, String>,
}

impl StoreUri {
    /// Parses a URI.
    ///
    /// # Errors
    /// [`Error`].
    pub fn parse(text: &str) -> Result<Self, Error> {
        let (base, query) = text.split_once('?').unwrap_or((text, ""));
        let (scheme, authority) = match base.split_once("://") {
            // Nothing before the colon is no scheme; and what follows would be taken for one when it is written again.
            Some(("", _)) => return Err(Error::Authority(text.to_owned())),
            Some(parts) => parts,
            None if base.is_empty() => return Err(Error::Authority(text.to_owned())),
            None => ("", base),
        };
        let mut params = BTreeMap::new();
        for pair in query.split('&') {
            // Without "=" it is not a parameter, and passed over.
            if let Some((name, value)) = pair.split_once('=') {
                params.insert(name.to_owned(), percent_decode(value)?);
            }
        }
        Ok(Self { scheme: scheme.to_owned(), authority: authority.to_owned(), params })
    }

    /// The value of a parameter.
    pub fn param(&self, name: &str) -> Option<&str> {
        self.params.get(name).map(String::as_str)
    }
}

/// As it would have to be written: what separates parameters is encoded in their values.
impl fmt::Display for StoreUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.scheme.is_empty() {
            write!(f, "{}://", self.scheme)?;
        }
        f.write_str(&self.authority)?;
        let mut separator = '?';
        for (name, value) in &self.params {
            write!(f, "{separator}{name}={}", percent_encode(value))?;
            separator = '&';
        }
        Ok(())
    }
}

fn percent_decode(text: &str) -> Result<String, Error> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let mut digit = || rest.next().and_then(|digit| char::from(digit).to_digit(16));
        bytes.push(match byte {
            b'%' => match (digit(), digit()) {
                // Two digits make less than 256.
                (Some(high), Some(low)) => (high * 16 + low) as u8,
                _ => return Err(Error::Percent(text.to_owned())),
            },
            other => other,
        });
    }
    String::from_utf8(bytes).map_err(|_| Error::NotUtf8(text.to_owned()))
}

fn percent_encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' | b':' | b'@' | b',' | b'=' => {
                encoded.push(char::from(byte));
            }
            other => encoded.push_str(&format!("%{other:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts() {
        let uri = StoreUri::parse("ssh-ng://a@b:22?remote-store=/x?system-features=foo%20bar&compress=true").unwrap();
        assert_eq!((uri.scheme.as_str(), uri.authority.as_str()), ("ssh-ng", "a@b:22"));
        assert_eq!(uri.param("remote-store"), Some("/x?system-features=foo bar"));
        assert_eq!(uri.param("compress"), Some("true"));
        assert_eq!(StoreUri::parse(&uri.to_string()), Ok(uri));
        assert_eq!(StoreUri::parse("auto").unwrap().authority, "auto");
        assert_eq!(StoreUri::parse("unix://").unwrap().scheme, "unix");
    }

    #[test]
    fn what_is_none() {
        assert_eq!(StoreUri::parse("ssh://x?a=%2"), Err(Error::Percent("%2".into())));
        assert_eq!(StoreUri::parse("ssh://x?a=%zz"), Err(Error::Percent("%zz".into())));
        assert_eq!(StoreUri::parse("ssh://x?a=%ff"), Err(Error::NotUtf8("%ff".into())));
        for text in ["?a=b", "", "://", "://host", "://a://b", "://?a=b"] {
            assert_eq!(StoreUri::parse(text), Err(Error::Authority(text.to_owned())), "{text}");
        }
    }
}
