//! Path infos and their signatures.

use nix_compat::content_address::ContentAddress;
use nix_compat::hash::NarHash;
use nix_compat::path_info::PathInfo;
use nix_compat::signature::{Error, PublicKey, SecretKey, Signature};
use nix_compat::store_path::StoreDir;

/// `nix key generate-secret --key-name test-1`, for these tests only
const SECRET: &str = "test-1:kIJKbQcB514bK8g43342+EzAPNkDKeftXJMHA7WwBWnaf8frJUvhSB9b+I9LqLy4Y1uB+gnvGFoRO5WdRBlzPA==";
/// `nix key convert-secret-to-public`
const PUBLIC: &str = "test-1:2n/H6yVL4UgfW/iPS6i8uGNbgfoJ7xhaETuVnUQZczw=";
/// `nix store sign`, of what [`built`] describes
const SIGNATURE: &str =
    "test-1:+i6aEt4CI+N/kNqVRi+U7cPGLLuIlxd8Xn8vxE44zN1tWtCGTCp5jBkxrBX680ZzJcUMh7D7uKGD6s3KjH8rCg==";

fn dir() -> StoreDir {
    StoreDir::new("/tmp/ha/store").unwrap()
}

/// `nix path-info --json` of a build's output that refers to itself and another path
fn built() -> PathInfo {
    let path = |base_name: &str| base_name.parse().unwrap();
    PathInfo {
        path: path("p69x93svcvqrbg9gqh8i9m3mkp16f4v8-self"),
        deriver: Some(path("0h1dwnvvfm74414bzf5f1d6gwq8vqgqy-self.drv")),
        nar_hash: NarHash::parse("sha256-chx+tP3j4w99L1cnRy/UbeYk6GoX/db/AwfTnBMA2/E=").unwrap(),
        nar_size: 232,
        references: [path("0c6gfxrnlaf8w5075hyhr24qdzbrs0fk-hello.txt"), path("p69x93svcvqrbg9gqh8i9m3mkp16f4v8-self")]
            .into(),
        registration_time: 1_795_368_401,
        signatures: [SIGNATURE.parse().unwrap()].into(),
        ultimate: true,
        ca: None,
    }
}

#[test]
fn signs_as_stock_nix_does() {
    let secret = SecretKey::parse(SECRET).unwrap();
    assert_eq!(secret.public_key().to_string(), PUBLIC);
    assert_eq!(secret.sign(built().fingerprint(&dir()).as_bytes()).to_string(), SIGNATURE);
}

#[test]
fn checks_signatures() {
    let keys = [PublicKey::parse(PUBLIC).unwrap()];
    let info = built();
    assert!(info.is_signed_by(&dir(), &keys));
    assert!(!info.is_signed_by(&dir(), &[]));
    assert!(!info.is_signed_by(&StoreDir::default(), &keys));
    let renamed = [PublicKey::parse(&PUBLIC.replace("test-1", "test-2")).unwrap()];
    assert!(!info.is_signed_by(&dir(), &renamed));
    // Everything that is signed matters; the deriver is not.
    assert!(!PathInfo { nar_size: 0, ..info.clone() }.is_signed_by(&dir(), &keys));
    assert!(!PathInfo { nar_size: 240, ..info.clone() }.is_signed_by(&dir(), &keys));
    assert!(!PathInfo { references: Default::default(), ..info.clone() }.is_signed_by(&dir(), &keys));
    assert!(!PathInfo { nar_hash: [0; 32].into(), ..info.clone() }.is_signed_by(&dir(), &keys));
    assert!(PathInfo { deriver: None, ..info.clone() }.is_signed_by(&dir(), &keys));
    let short = Signature::from_parts("test-1", &[1; 63]).unwrap();
    assert!(!PathInfo { signatures: [short].into(), ..info }.is_signed_by(&dir(), &keys));
}

#[test]
fn knows_content_addressed_paths() {
    let mut info = built();
    assert!(!info.is_content_addressed(&dir()));
    // what `nix store make-content-addressed` made of it
    info.path = "axb7y00afwjf6nfbabc5jilin803xfcv-self".parse().unwrap();
    info.references = ["6xbm4202mi19slk1csgz6n8m2z3mg3wa-hello.txt", info.path.base_name()]
        .map(|base_name| base_name.parse().unwrap())
        .into();
    info.ca = ContentAddress::parse("fixed:r:sha256:07l59mapqy02cm2n6vrl1h1fk1mqb0whhchkr8alqisxx8r9n5hm").ok();
    assert!(info.is_content_addressed(&dir()));
    assert!(!info.is_content_addressed(&StoreDir::default()));
    info.references.pop_first();
    assert!(!info.is_content_addressed(&dir()));
}

#[test]
fn texts_of_keys_and_signatures() {
    for corrupt in ["", "x", "x:", ":eA==", "x:!", "x:=", "x:e"] {
        assert_eq!(Signature::parse(corrupt), Err(Error::Signature(corrupt.into())));
    }
    assert_eq!(Signature::parse("a:eHh4").unwrap().data(), b"xxx");
    assert!(Signature::from_parts("a:b", b"x").is_err());
    assert!(PublicKey::parse("test-1:eHh4").is_err());
    assert!(SecretKey::parse(PUBLIC).is_err());
    // A public half that does not belong to the seed.
    assert!(SecretKey::parse(&SECRET.replace("naf8frJ", "naf8frK")).is_err());
    assert!(SecretKey::parse(&format!("{SECRET}\n")).is_ok());
    assert!(!format!("{:?}", SecretKey::parse(SECRET).unwrap()).contains("kIJK"));
}
