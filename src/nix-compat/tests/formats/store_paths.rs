//! Computed store paths against those of stock Nix.

use std::collections::BTreeSet;

use nix_compat::content_address::{ContentAddress, Method};
use nix_compat::hash::{Algorithm, Hash, sha256};
use nix_compat::store_path::{
    Error, StoreDir, StorePath, content_address_path, fixed_output_path, source_path, text_path,
};

const HELLO: &[u8] = b"hello world";
/// `nix-store --dump` of a file that holds [`HELLO`].
const HELLO_NAR: &[u8] = b"\x0d\0\0\0\0\0\0\0nix-archive-1\0\0\0\x01\0\0\0\0\0\0\0(\0\0\0\0\0\0\0\
    \x04\0\0\0\0\0\0\0type\0\0\0\0\x07\0\0\0\0\0\0\0regular\0\x08\0\0\0\0\0\0\0contents\
    \x0b\0\0\0\0\0\0\0hello world\0\0\0\0\0\x01\0\0\0\0\0\0\0)\0\0\0\0\0\0\0";

fn paths<const N: usize>(base_names: [&str; N]) -> BTreeSet<StorePath> {
    base_names.map(|base_name| base_name.parse().unwrap()).into()
}

/// `builtins.toFile`
#[test]
fn text() {
    let dir = StoreDir::default();
    let hello = text_path(&dir, "hello.txt", HELLO, &BTreeSet::new()).unwrap();
    assert_eq!(hello.base_name(), "m6wswa7yn6x5gi6gdq7x1fqlwmlhfja9-hello.txt");
    let another = text_path(&dir, "another", b"", &BTreeSet::new()).unwrap();
    let contents = format!("hi {} {}", dir.display(&hello), dir.display(&another));
    let with_references = text_path(&dir, "refs.txt", contents.as_bytes(), &[hello, another].into()).unwrap();
    assert_eq!(with_references.base_name(), "mpb5v88xkncmyvjzp9zfy26rk2zbpqrc-refs.txt");
}

/// `nix-store --add`
#[test]
fn source() {
    let nar = include_bytes!("../data/tree.nar");
    let path = source_path(&StoreDir::default(), "tree", &sha256(nar), &BTreeSet::new(), false).unwrap();
    assert_eq!(path.base_name(), "mjk5v0jvc0lrf43rjkr4n3ibbjw9laxz-tree");
}

/// `nix-store --add-fixed [--recursive] ALGORITHM`
#[test]
fn fixed() {
    use Algorithm::{Md5, Sha1, Sha256, Sha512};
    for (method, algorithm, base_name) in [
        (Method::Flat, Md5, "5igxc7n5qc9cqc56jgbgwvadqm6ljrv8-hello.txt"),
        (Method::Nar, Md5, "ia6k2p0x5yrws3zx8kvy02mzp39r2h80-hello.txt"),
        (Method::Flat, Sha1, "s02wda17b0dwh026cy52cs6l24r67y3v-hello.txt"),
        (Method::Nar, Sha1, "x0dqapvjc32182vwjmb9qx337immxsc6-hello.txt"),
        (Method::Flat, Sha256, "9956wx21q0rb63w8s43n6z1bims9sjs0-hello.txt"),
        (Method::Nar, Sha256, "9833pw3cj8paw1plnya839qnikx9jjcd-hello.txt"),
        (Method::Flat, Sha512, "hjavwvc4xvdpsf061gd3fbwcyfyybpci-hello.txt"),
        (Method::Nar, Sha512, "k9am9m0iphjhwyfxcc2gw0svrl5r50q8-hello.txt"),
    ] {
        let hash = Hash::of(algorithm, if method == Method::Nar { HELLO_NAR } else { HELLO });
        let dir = StoreDir::default();
        let path = fixed_output_path(&dir, "hello.txt", method, &hash).unwrap();
        assert_eq!(path.base_name(), base_name, "{method:?} {algorithm}");
        let address = ContentAddress { method, hash };
        assert_eq!(content_address_path(&dir, "hello.txt", &address, &BTreeSet::new(), false), Ok(path));
    }
}

/// `nix store make-content-addressed`, in another store directory
#[test]
fn source_with_references() {
    let dir = StoreDir::new("/tmp/ha/store").unwrap();
    let address = "fixed:r:sha256:07l59mapqy02cm2n6vrl1h1fk1mqb0whhchkr8alqisxx8r9n5hm".parse().unwrap();
    let references = paths(["6xbm4202mi19slk1csgz6n8m2z3mg3wa-hello.txt"]);
    let path = content_address_path(&dir, "self", &address, &references, true).unwrap();
    assert_eq!(path.base_name(), "axb7y00afwjf6nfbabc5jilin803xfcv-self");
}

#[test]
fn what_cannot_have_references() {
    let dir = StoreDir::default();
    let references = paths(["m6wswa7yn6x5gi6gdq7x1fqlwmlhfja9-hello.txt"]);
    let compute = |method, algorithm, references: &BTreeSet<StorePath>, self_reference| {
        let address = ContentAddress { method, hash: Hash::of(algorithm, HELLO) };
        content_address_path(&dir, "x", &address, references, self_reference)
    };
    let refused = Err(Error::References("x".into()));
    assert_eq!(compute(Method::Flat, Algorithm::Sha256, &references, false), refused);
    assert_eq!(compute(Method::Nar, Algorithm::Sha1, &references, false), refused);
    assert_eq!(compute(Method::Flat, Algorithm::Sha256, &BTreeSet::new(), true), refused);
    let refused = Err(Error::SelfReference("x".into()));
    assert_eq!(compute(Method::Text, Algorithm::Sha256, &references, true), refused);
    let refused = Err(Error::TextAlgorithm { name: "x".into(), algorithm: Algorithm::Sha1 });
    assert_eq!(compute(Method::Text, Algorithm::Sha1, &BTreeSet::new(), false), refused);
    assert_eq!(compute(Method::Text, Algorithm::Sha1, &references, false), refused);
    assert!(compute(Method::Text, Algorithm::Sha256, &references, false).is_ok());
    assert!(compute(Method::Nar, Algorithm::Sha256, &references, true).is_ok());
}
