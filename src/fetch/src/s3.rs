//! Buckets of S3: where their objects are, and whose key signs requests for them.
//!
//! URLs are stock's: `s3://BUCKET[/PREFIX]` with the parameters `region`, `endpoint`, `scheme`, `profile` and
//! `addressing-style`. Requests are signed in their query (AWS Signature Version 4), by `rusty-s3`.

use std::path::PathBuf;
use std::time::Duration;

use rusty_s3::{Bucket, Credentials, S3Action, UrlStyle, actions::GetObject};
use url::Url;

use crate::download::read;

/// Stock's default for the parameter `region`.
const REGION: &str = "us-east-1";
/// Largest file of keys, in bytes.
const MAX_CREDENTIALS: u64 = 1 << 20;
/// How long a signed request may be on its way.
const SIGNED_FOR: Duration = Duration::from_secs(300);

/// Why a URL names no bucket.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum S3Error {
    /// The name of a bucket is missing, or cannot be one.
    #[error("'{bucket}' cannot be a bucket at '{endpoint}'")]
    Bucket {
        /// What was given for its name.
        bucket: String,
        /// The server.
        endpoint: String,
    },
    /// A parameter's value.
    #[error("'{value}' is no value for the parameter '{name}' of an S3 bucket")]
    Parameter {
        /// The parameter.
        name: &'static str,
        /// What it has.
        value: String,
    },
}

/// A bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct S3Bucket {
    bucket: Bucket,
    base: Url,
    profile: Option<String>,
}

impl S3Bucket {
    /// Takes what follows `s3://`, and its parameters.
    ///
    /// # Errors
    /// [`S3Error`].
    pub fn parse(place: &str, parameter: &dyn Fn(&str) -> Option<String>) -> Result<Self, S3Error> {
        let parameter = |name| parameter(name).filter(|value| !value.is_empty());
        let (name, prefix) = place.split_once('/').unwrap_or((place, ""));
        let region = parameter("region").unwrap_or_else(|| REGION.to_owned());
        let scheme = parameter("scheme").unwrap_or_else(|| "https".to_owned());
        if !matches!(scheme.as_str(), "http" | "https") {
            return Err(S3Error::Parameter { name: "scheme", value: scheme });
        }
        let endpoint = parameter("endpoint");
        // As stock has it: servers that are not Amazon's seldom have a name for each bucket. Nor has TLS, where the bucket's
        // name has a dot in it.
        let by_path = match parameter("addressing-style").as_deref() {
            None | Some("auto") => endpoint.is_some() || name.contains('.'),
            Some("path") => true,
            Some("virtual") => false,
            Some(other) => return Err(S3Error::Parameter { name: "addressing-style", value: other.to_owned() }),
        };
        let server = match &endpoint {
            Some(server) if server.contains("://") => server.clone(),
            Some(server) => format!("{scheme}://{server}"),
            None => format!("{scheme}://s3.{region}.amazonaws.com"),
        };
        let wrong = || S3Error::Bucket { bucket: name.to_owned(), endpoint: server.clone() };
        let url = Url::parse(&server).map_err(|_| S3Error::Parameter { name: "endpoint", value: server.clone() })?;
        if name.is_empty() {
            return Err(wrong());
        }
        let style = if by_path { UrlStyle::Path } else { UrlStyle::VirtualHost };
        let bucket = Bucket::new(url, style, name.to_owned(), region).map_err(|_| wrong())?;
        let mut base = bucket.base_url().clone();
        let prefix = prefix.trim_matches('/');
        if !prefix.is_empty() {
            base.set_path(&format!("{}{prefix}/", base.path()));
        }
        Ok(Self { bucket, base, profile: parameter("profile") })
    }

    /// The URL below which its objects are; ends in a slash.
    pub fn base(&self) -> &Url {
        &self.base
    }

    /// The same bucket, with the key that signs requests for it. Without a key they are not signed, as for a bucket that
    /// everybody may read. Blocks.
    ///
    /// The key is that of `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` and `AWS_SESSION_TOKEN`, unless the URL names a
    /// profile; else that of a profile in `AWS_SHARED_CREDENTIALS_FILE`, by default `~/.aws/credentials`.
    pub fn with_key(&self, variable: &dyn Fn(&str) -> Option<String>) -> SignedBucket {
        let variable = |name| variable(name).filter(|value| !value.is_empty());
        let own = || {
            let (key, secret) = (variable("AWS_ACCESS_KEY_ID")?, variable("AWS_SECRET_ACCESS_KEY")?);
            Some(credentials(key, secret, variable("AWS_SESSION_TOKEN")))
        };
        let of_file = || {
            let named = variable("AWS_SHARED_CREDENTIALS_FILE").map(PathBuf::from);
            let file = named.or_else(|| Some(PathBuf::from(variable("HOME")?).join(".aws/credentials")))?;
            let profile = self.profile.clone().or_else(|| variable("AWS_PROFILE"));
            of_profile(&read(&file, MAX_CREDENTIALS), profile.as_deref().unwrap_or("default"))
        };
        let credentials = if self.profile.is_some() { of_file() } else { own().or_else(of_file) };
        SignedBucket { bucket: self.bucket.clone(), credentials }
    }
}

/// A bucket, and the key that signs requests for it.
#[derive(Debug)]
pub struct SignedBucket {
    bucket: Bucket,
    credentials: Option<Credentials>,
}

impl SignedBucket {
    /// The URL to ask in place of `url`; `None` when that is none of the bucket's, or nobody signs.
    pub(crate) fn sign(&self, url: &Url) -> Option<Url> {
        let base = self.bucket.base_url();
        let credentials = self.credentials.as_ref()?;
        let key = url.path().strip_prefix(base.path()).filter(|_| url.origin() == base.origin())?;
        let key = percent_encoding::percent_decode_str(key).decode_utf8().ok()?;
        Some(GetObject::new(&self.bucket, Some(credentials), &key).sign(SIGNED_FOR))
    }
}

fn credentials(key: String, secret: String, token: Option<String>) -> Credentials {
    match token {
        Some(token) => Credentials::new_with_token(key, secret, token),
        None => Credentials::new(key, secret),
    }
}

/// The key of a profile: a section of lines `name = value`.
fn of_profile(text: &str, profile: &str) -> Option<Credentials> {
    let (mut key, mut secret, mut token) = (None, None, None);
    let mut inside = false;
    for line in text.lines().map(str::trim) {
        if let Some(section) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            inside = section.trim() == profile;
        } else if let Some((name, value)) = line.split_once('=').filter(|_| inside) {
            let value = Some(value.trim().to_owned());
            match name.trim() {
                "aws_access_key_id" => key = value,
                "aws_secret_access_key" => secret = value,
                "aws_session_token" => token = value,
                _ => {}
            }
        }
    }
    Some(credentials(key?, secret?, token))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket(place: &str, parameters: &[(&str, &str)]) -> Result<S3Bucket, S3Error> {
        let parameters = parameters.to_vec();
        S3Bucket::parse(place, &|wanted| {
            parameters.iter().find(|(name, _)| *name == wanted).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn where_buckets_are() {
        for (place, parameters, url) in [
            ("cache", &[][..], "https://cache.s3.us-east-1.amazonaws.com/"),
            ("cache", &[("region", "eu-west-1"), ("scheme", "http")], "http://cache.s3.eu-west-1.amazonaws.com/"),
            ("a.b", &[], "https://s3.us-east-1.amazonaws.com/a.b/"),
            ("cache/below/it/", &[("endpoint", "host:3900")], "https://host:3900/cache/below/it/"),
            ("cache", &[("endpoint", "http://host:3900")], "http://host:3900/cache/"),
            ("cache", &[("endpoint", "host"), ("addressing-style", "virtual")], "https://cache.host/"),
            ("cache", &[("addressing-style", "path")], "https://s3.us-east-1.amazonaws.com/cache/"),
        ] {
            assert_eq!(bucket(place, parameters).unwrap().base().as_str(), url);
        }
        assert!(bucket("", &[]).is_err());
        for wrong in [("scheme", "gopher"), ("addressing-style", "x"), ("endpoint", "http://")] {
            assert!(matches!(bucket("cache", &[wrong]), Err(S3Error::Parameter { name, .. }) if name == wrong.0));
        }
    }

    #[test]
    fn keys_of_profiles_and_of_the_environment() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("credentials");
        let text = "[default]\naws_access_key_id = one\naws_secret_access_key=1\n# more\n[ci]\n\
                    aws_secret_access_key = a=b\naws_access_key_id = two\naws_session_token = t\n[half]\n\
                    aws_access_key_id = three\n";
        std::fs::write(&file, text).unwrap();
        let key = |parameters: &[(&str, &str)], environment: &[(&str, &str)]| {
            let variable = |wanted: &str| match wanted {
                "AWS_SHARED_CREDENTIALS_FILE" => Some(file.to_str().unwrap().to_owned()),
                _ => environment.iter().find(|(name, _)| *name == wanted).map(|(_, value)| (*value).to_owned()),
            };
            let found = bucket("cache", parameters).unwrap().with_key(&variable).credentials?;
            Some([found.key(), found.secret(), found.token().unwrap_or_default()].map(str::to_owned))
        };
        let three = |key: &str, secret: &str, token: &str| Some([key, secret, token].map(str::to_owned));
        let own = [("AWS_ACCESS_KEY_ID", "own"), ("AWS_SECRET_ACCESS_KEY", "s")];
        assert_eq!(key(&[], &[]), three("one", "1", ""));
        assert_eq!(key(&[], &own), three("own", "s", ""));
        assert_eq!(key(&[("profile", "ci")], &own), three("two", "a=b", "t"));
        assert_eq!(key(&[], &[("AWS_PROFILE", "ci")]), three("two", "a=b", "t"));
        assert_eq!(key(&[("profile", "half")], &own), None);
        assert_eq!(key(&[("profile", "none")], &own), None);
    }

    #[test]
    fn only_the_buckets_own_urls_are_signed() {
        let bucket = bucket("cache", &[("endpoint", "http://host")]).unwrap();
        let variable = |name: &str| name.starts_with("AWS_").then(|| "x".to_owned());
        let signed = bucket.with_key(&variable);
        let sign = |url: &str| signed.sign(&Url::parse(url).unwrap());
        assert!(sign("http://host/cache/nix-cache-info").unwrap().query().unwrap().contains("X-Amz-Signature="));
        for other in ["https://host/cache/x", "http://other/cache/x", "http://host/other/x", "http://host:1/cache/x"] {
            assert_eq!(sign(other), None, "{other}");
        }
    }
}
