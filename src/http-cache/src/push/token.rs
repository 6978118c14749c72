//! Who may push.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use data_encoding::BASE64;
use hyper::{HeaderMap, header};

use crate::limits::MAX_TOKEN_FILE;

/// A file of tokens is of no use.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// It cannot be read.
    #[error("cannot read the push tokens in {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// There is no token in it.
    #[error("there is no push token in {}: one on a line of its own is wanted", .0.display())]
    Empty(PathBuf),
}

/// Tokens, each of which makes its bearer trusted. Only their hashes are kept.
#[derive(Clone)]
pub struct Tokens(Vec<blake3::Hash>);

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tokens({})", self.0.len())
    }
}

impl Tokens {
    /// Reads a file with a token on each line, so that a new one can be given out before an old one is withdrawn.
    ///
    /// # Errors
    /// [`TokenError`], also for a file without any.
    pub fn read(path: &Path) -> Result<Self, TokenError> {
        let failed = |source| TokenError::Read { path: path.to_owned(), source };
        let mut text = String::new();
        File::open(path).and_then(|file| file.take(MAX_TOKEN_FILE).read_to_string(&mut text)).map_err(failed)?;
        let tokens: Vec<_> = text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .map(|line| blake3::hash(line.as_bytes()))
            .collect();
        if tokens.is_empty() { Err(TokenError::Empty(path.to_owned())) } else { Ok(Self(tokens)) }
    }

    /// Whether a request shows one: as the password of HTTP's Basic authentication, which is what stock clients send from
    /// their netrc file, with any user; or as a Bearer token.
    pub(crate) fn admit(&self, headers: &HeaderMap) -> bool {
        let mut admitted = false;
        for value in headers.get_all(header::AUTHORIZATION) {
            if let Some(token) = token(value.as_bytes()) {
                let shown = blake3::hash(&token);
                // Hashes are compared in constant time, and all of them: how long it takes says nothing of any token.
                admitted |= self.0.iter().fold(false, |found, known| found | (*known == shown));
            }
        }
        admitted
    }
}

fn token(authorization: &[u8]) -> Option<Vec<u8>> {
    let space = authorization.iter().position(|byte| *byte == b' ')?;
    let (scheme, rest) = (&authorization[..space], authorization[space..].trim_ascii());
    if scheme.eq_ignore_ascii_case(b"bearer") {
        return Some(rest.to_vec());
    }
    if !scheme.eq_ignore_ascii_case(b"basic") {
        return None;
    }
    let decoded = BASE64.decode(rest).ok()?;
    let colon = decoded.iter().position(|byte| *byte == b':')?;
    Some(decoded[colon + 1..].to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_knows_a_token_is_admitted() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tokens");
        std::fs::write(&file, "one\n\n  two:three \n").unwrap();
        let tokens = Tokens::read(&file).unwrap();
        let admits = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, value.parse().unwrap());
            tokens.admit(&headers)
        };
        let basic = |text: &str| format!("Basic {}", BASE64.encode(text.as_bytes()));
        for right in ["Bearer one", "bearer  two:three", &basic("anybody:one"), &basic(":two:three")] {
            assert!(admits(right), "{right}");
        }
        for wrong in [
            "",
            "one",
            "Bearer",
            "Bearer on",
            "Bearer one two",
            "Digest one",
            "Basic one",
            &basic("one"),
            &basic("one:"),
        ] {
            assert!(!admits(wrong), "{wrong}");
        }
        assert!(!tokens.admit(&HeaderMap::new()));
    }

    #[test]
    fn an_empty_file_admits_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("tokens");
        assert!(matches!(Tokens::read(&file), Err(TokenError::Read { .. })));
        std::fs::write(&file, " \n\n").unwrap();
        assert!(matches!(Tokens::read(&file), Err(TokenError::Empty(_))));
    }
}
