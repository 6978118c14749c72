//! Short texts: store paths, hashes and content addresses, signatures.

use std::collections::BTreeSet;

use nix_compat::content_address::{self, ContentAddress, Method};
use nix_compat::derivation::OutputName;
use nix_compat::hash::{Algorithm, Hash, NarHash};
use nix_compat::nixbase32;
use nix_compat::signature::{PublicKey, SecretKey, Signature};
use nix_compat::store_path::{self, StoreDir, StorePath};
use nix_compat::worker::{DerivedPath, DrvOutput, Features, Protocol};

/// A store path, with and without its directory; what is built on one; a store directory.
pub fn store_path(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let dir = StoreDir::default();
    if let Ok(path) = StorePath::from_base_name(text) {
        assert_eq!(path.base_name(), text);
        assert_eq!(StorePath::from_parts(path.digest(), path.name()), Ok(path.clone()));
        assert_eq!(format!("{}-{}", path.hash_part(), path.name()), text);
        assert_eq!(dir.parse(&dir.display(&path)), Ok(path.clone()));
        assert_eq!(dir.to_store_path(&format!("{}//bin/../lib/", dir.display(&path))), Ok((path, "lib".to_owned())));
    }
    if let Ok(path) = dir.parse(text) {
        assert_eq!(dir.parse(&dir.display(&path)), Ok(path.clone()));
        assert_eq!(dir.to_store_path(text), Ok((path, String::new())));
    }
    if let Ok((path, below)) = dir.to_store_path(text) {
        let canonical = format!("{}/{below}", dir.display(&path));
        assert_eq!(dir.to_store_path(&canonical), Ok((path.clone(), below.clone())));
        assert_eq!(dir.parse(text).is_ok(), below.is_empty());
    }
    if text.starts_with('/') {
        // Detours on the way do not matter.
        for way in [
            format!("/.{text}"),
            format!("/x/..{text}"),
            format!("/{text}"),
            format!("{text}/."),
            text.to_owned() + "/",
        ] {
            assert_eq!(dir.parse(&way).ok(), dir.parse(text).ok());
            assert_eq!(dir.to_store_path(&way).ok(), dir.to_store_path(text).ok());
        }
    }
    if let Ok(other) = StoreDir::new(text) {
        assert_eq!(other.as_str(), text);
        let path = StorePath::from_parts([9; 20], "x").unwrap();
        assert_eq!(other.parse(&other.display(&path)), Ok(path.clone()));
        assert_eq!(other.to_store_path(&other.display(&path)), Ok((path, String::new())));
    }
    let is_name = store_path::validate_name(text).is_ok();
    assert_eq!(StorePath::from_parts([0; 20], text).is_ok(), is_name);
    assert_eq!(OutputName::new(text).is_ok(), is_name);
    assert_eq!(store_path::text_path(&dir, text, input, &BTreeSet::new()).is_ok(), is_name);

    for minor in [29, 30] {
        let protocol = Protocol { minor, features: Features::NONE, store_dir: dir.clone() };
        if let Ok(path) = DerivedPath::parse(text, &protocol) {
            assert_eq!(DerivedPath::parse(&path.print(&protocol), &protocol), Ok(path));
        }
    }
    if let Ok(output) = text.parse::<DrvOutput>() {
        assert_eq!(output.to_string().parse::<DrvOutput>().unwrap(), output);
    }
}

/// A content address, a hash, base 32.
pub fn content_address(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Ok(address) = ContentAddress::parse(text) {
        let printed = address.to_string();
        assert_eq!(ContentAddress::parse(&printed), Ok(address.clone()));
        let method = content_address::method_to_string(address.method, address.hash.algorithm());
        assert!(text.starts_with(&method) && printed.starts_with(&method));
        assert!(content_address::parse_method(text).is_err(), "it is a method, too");
        let dir = StoreDir::default();
        let path = store_path::content_address_path(&dir, "x", &address, &BTreeSet::new(), false);
        assert_eq!(path.is_ok(), address.method != Method::Text || address.hash.algorithm() == Algorithm::Sha256);
    }
    if let Ok((method, algorithm)) = content_address::parse_method(text) {
        assert_eq!(content_address::method_to_string(method, algorithm), text);
    }
    if let Ok((method, algorithm)) = Method::split_prefix(text) {
        assert_eq!(format!("{}{algorithm}", method.prefix()), text);
    }
    for algorithm in
        [None, Some(Algorithm::Md5), Some(Algorithm::Sha1), Some(Algorithm::Sha256), Some(Algorithm::Sha512)]
    {
        let Ok(hash) = Hash::parse(text, algorithm) else { continue };
        assert!(algorithm.is_none_or(|algorithm| algorithm == hash.algorithm()));
        for form in [hash.to_sri(), hash.to_prefixed_base16(), hash.to_prefixed_nix32()] {
            assert_eq!(Hash::parse(&form, None), Ok(hash));
        }
        for form in [hash.to_base16(), hash.to_base64(), hash.to_nix32()] {
            assert_eq!(Hash::parse(&form, Some(hash.algorithm())), Ok(hash));
        }
    }
    if let Ok(hash) = NarHash::parse(text) {
        assert_eq!(NarHash::parse(&hash.to_base16()), Ok(hash));
        assert_eq!(NarHash::parse(&hash.to_string()), Ok(hash));
    }
    if let Ok(bytes) = nixbase32::decode(text) {
        assert_eq!(nixbase32::encode(&bytes), text);
    }
    assert_eq!(nixbase32::decode(&nixbase32::encode(input)).unwrap(), input);
}

/// A key that signs nothing but what the fuzzer thinks up.
const SECRET: &str = "test-1:kIJKbQcB514bK8g43342+EzAPNkDKeftXJMHA7WwBWnaf8frJUvhSB9b+I9LqLy4Y1uB+gnvGFoRO5WdRBlzPA==";

/// A signature or key; and a message that is signed.
pub fn signature(input: &[u8]) {
    let secret = SecretKey::parse(SECRET).unwrap();
    let public = secret.public_key();
    let signature = secret.sign(input);
    assert!(public.verify(input, &signature));
    assert!(!public.verify(&[input, b"x"].concat(), &signature));
    assert_eq!(Signature::parse(&signature.to_string()), Ok(signature.clone()));
    let renamed = Signature::from_parts("other", signature.data()).unwrap();
    assert!(!public.verify(input, &renamed), "the signature of another key is accepted");

    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Ok(parsed) = Signature::parse(text) {
        assert_eq!(Signature::parse(&parsed.to_string()), Ok(parsed.clone()));
        assert_eq!(Signature::from_parts(parsed.name(), parsed.data()), Ok(parsed.clone()));
        assert_eq!(public.verify(b"message", &parsed), parsed == secret.sign(b"message"), "a signature was forged");
    }
    if let Ok(key) = PublicKey::parse(text) {
        assert_eq!(PublicKey::parse(&key.to_string()), Ok(key.clone()));
        assert!(key == public || !key.verify(input, &signature));
    }
    if let Ok(key) = SecretKey::parse(text) {
        let signature = key.sign(input);
        assert!(key.public_key().verify(input, &signature));
        assert_eq!(signature.name(), key.name());
    }
}
