//! What a URL names.

use nix_compat::hash::NarHash;
use nix_compat::nixbase32;
use nix_compat::realisation::DrvOutput;
use nix_compat::store_path::{DIGEST_LEN, StorePath};
use percent_encoding::percent_decode_str;

/// The 20 bytes behind a path's hash part.
pub(crate) type PathDigest = [u8; DIGEST_LEN];

/// Something that may be here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// `/`: what this is, for people.
    Home,
    /// `/find?path=…`: a path that somebody has typed.
    Find(String),
    /// `/nix-cache-info`.
    CacheInfo,
    /// `/<hash>.narinfo`.
    NarInfo(PathDigest),
    /// `/<hash>.ls`.
    Listing(PathDigest),
    /// `/nar/<hash>-<NAR hash>.nar`, or `.nar.zst`.
    ///
    /// The store finds paths by their own hash. That of the NAR is there for a path which was deleted and came back with
    /// other contents: it is not what an older narinfo describes.
    Nar { path: PathDigest, nar_hash: NarHash, zstd: bool },
    /// `/log/<hash>-<name>.drv`.
    Log(StorePath),
    /// `/realisations/sha256:<base 16>!<output>.doi`.
    Realisation(DrvOutput),
    /// `/<hash>-<name>`: a path, for people.
    Page(StorePath),
}

impl Target {
    /// Reads the path of a URL, and what is asked for behind it. `None` for what can be nowhere.
    pub(crate) fn parse(path: &str, query: Option<&str>) -> Option<Self> {
        let decoded = percent_decode_str(path.strip_prefix('/')?).decode_utf8().ok()?;
        let name = &*decoded;
        match name {
            "" => return Some(Self::Home),
            "find" => return Some(Self::Find(form_value(query.unwrap_or_default(), "path")?)),
            "nix-cache-info" => return Some(Self::CacheInfo),
            _ => {}
        }
        if let Some(file) = name.strip_prefix("nar/") {
            return nar(file);
        }
        if let Some(drv) = name.strip_prefix("log/") {
            return StorePath::from_base_name(drv).ok().map(Self::Log);
        }
        if let Some(id) = name.strip_prefix("realisations/") {
            return id.strip_suffix(".doi")?.parse().ok().map(Self::Realisation);
        }
        if let Some(hash) = name.strip_suffix(".narinfo").and_then(path_digest) {
            return Some(Self::NarInfo(hash));
        }
        if let Some(hash) = name.strip_suffix(".ls").and_then(path_digest) {
            return Some(Self::Listing(hash));
        }
        StorePath::from_base_name(name).ok().map(Self::Page)
    }
}

/// Where the NAR of a path is, seen from the cache's root.
pub(crate) fn nar_url(path: &StorePath, nar_hash: &NarHash) -> String {
    format!("nar/{}-{}.nar", path.hash_part(), nixbase32::encode(nar_hash.as_bytes()))
}

fn nar(file: &str) -> Option<Target> {
    let (file, zstd) = match file.strip_suffix(".zst") {
        Some(file) => (file, true),
        None => (file, false),
    };
    let (path, nar_hash) = file.strip_suffix(".nar")?.split_once('-')?;
    let nar_hash = <[u8; 32]>::try_from(nixbase32::decode(nar_hash).ok()?).ok()?;
    Some(Target::Nar { path: path_digest(path)?, nar_hash: nar_hash.into(), zstd })
}

fn path_digest(hash_part: &str) -> Option<PathDigest> {
    nixbase32::decode(hash_part).ok()?.try_into().ok()
}

/// A field of a form, as browsers put it behind the `?`.
fn form_value(query: &str, name: &str) -> Option<String> {
    let value = query.split('&').find_map(|field| field.strip_prefix(name)?.strip_prefix('='))?;
    let value = value.replace('+', " ");
    percent_decode_str(&value).decode_utf8().ok().map(|value| value.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "h6haz8fcxqy67i7c7n03iwh4jx13hhxx";
    const NAR: &str = "1xmr8jicvzszfzpz46g37mlpvbzjl2wpwvl2b05psipssyp1sm8h";

    fn parse(url: &str) -> Option<Target> {
        let (path, query) = url.split_once('?').map_or((url, None), |(path, query)| (path, Some(query)));
        Target::parse(path, query)
    }

    #[test]
    fn what_is_somewhere() {
        let path = StorePath::from_base_name(&format!("{HASH}-f")).unwrap();
        let hash: PathDigest = path.digest();
        assert_eq!(parse("/"), Some(Target::Home));
        assert_eq!(parse("/nix-cache-info?x"), Some(Target::CacheInfo));
        assert_eq!(parse(&format!("/{HASH}.narinfo")), Some(Target::NarInfo(hash)));
        assert_eq!(parse(&format!("/{HASH}.ls")), Some(Target::Listing(hash)));
        assert_eq!(parse(&format!("/{HASH}-f")), Some(Target::Page(path.clone())));
        let named = StorePath::from_base_name(&format!("{HASH}-f.narinfo")).unwrap();
        assert_eq!(parse(&format!("/{HASH}-f.narinfo")), Some(Target::Page(named)));
        assert_eq!(parse(&format!("/log/{HASH}-f")), Some(Target::Log(path.clone())));
        assert_eq!(parse("/find?a=b&path=%2Fnix+x%2B"), Some(Target::Find("/nix x+".into())));
        let nar_hash = NarHash::parse(&format!("sha256:{NAR}")).unwrap();
        let url = nar_url(&path, &nar_hash);
        assert_eq!(url, format!("nar/{HASH}-{NAR}.nar"));
        for (ending, zstd) in [("", false), (".zst", true)] {
            assert_eq!(parse(&format!("/{url}{ending}")), Some(Target::Nar { path: hash, nar_hash, zstd }));
        }
        let id = format!("sha256:{}!out", "ab".repeat(32));
        let expected = Some(Target::Realisation(id.parse().unwrap()));
        assert_eq!(parse(&format!("/realisations/{id}.doi")), expected);
        assert_eq!(parse(&format!("/realisations/{}.doi", id.replace('!', "%21"))), expected);
    }

    #[test]
    fn what_is_nowhere() {
        for url in [
            "",
            "nix-cache-info",
            "//",
            "/..",
            "/%ff",
            "/find",
            "/x.narinfo",
            "/log/../../etc/passwd",
            "/log/",
            "/nar/x.nar",
            &format!("/nar/{NAR}.nar"),
            &format!("/nar/{HASH}-{NAR}.nar.xz"),
            &format!("/nar/{HASH}-{HASH}.nar"),
            &format!("/{}.narinfo", HASH.to_uppercase()),
            &format!("/{HASH}-a/b"),
            &format!("/{HASH}-"),
            &format!("/realisations/{HASH}!out.doi"),
        ] {
            assert_eq!(parse(url), None, "{url}");
        }
    }
}
