//! Store objects for the tests: archives written out by hand, what is claimed of them, derivations.

use std::collections::{BTreeMap, BTreeSet};

use nix_compat::derivation::{BasicDerivation, Derivation, Output};
use nix_compat::hash::sha256;
use nix_compat::store_path::{StoreDir, StorePath};

use crate::raw::{Claim, Msg, Raw, op};

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A store path that belongs to nothing, by its name.
pub(crate) fn path(name: &str) -> String {
    let digest = sha256(name.as_bytes())[..20].try_into().unwrap();
    StoreDir::default().display(&StorePath::from_parts(digest, name).unwrap())
}

pub(crate) fn base_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap()
}

/// A node of an archive.
pub(crate) fn file_node(contents: impl AsRef<[u8]>) -> Vec<u8> {
    strings(&["(", "type", "regular", "contents"]).text(contents).text(")").0
}

pub(crate) fn symlink_node(target: impl AsRef<[u8]>) -> Vec<u8> {
    strings(&["(", "type", "symlink", "target"]).text(target).text(")").0
}

pub(crate) fn directory_node<N: AsRef<[u8]>>(entries: &[(N, Vec<u8>)]) -> Vec<u8> {
    let entries = entries.iter().fold(strings(&["(", "type", "directory"]), |msg, (name, node)| {
        msg.text("entry").text("(").text("name").text(name).text("node").raw(node).text(")")
    });
    entries.text(")").0
}

fn strings(strings: &[&str]) -> Msg {
    strings.iter().fold(Msg::default(), Msg::text)
}

/// An archive of this node.
pub(crate) fn nar(node: impl AsRef<[u8]>) -> Vec<u8> {
    strings(&["nix-archive-1"]).raw(node).0
}

pub(crate) fn file_nar(contents: impl AsRef<[u8]>) -> Vec<u8> {
    nar(file_node(contents))
}

/// A true claim of this archive, at a path that belongs to nothing.
pub(crate) fn claim(name: &str, nar: &[u8]) -> Claim {
    Claim {
        path: path(name),
        deriver: String::new(),
        nar_hash: hex(&sha256(nar)),
        references: Vec::new(),
        time: 0,
        nar_size: nar.len() as u64,
        ultimate: 0,
        signatures: Vec::new(),
        ca: String::new(),
    }
}

/// AddToStore since 1.25 with its payload.
pub(crate) fn add_to_store(name: &str, method: &str, references: &[String], payload: &[u8]) -> Msg {
    op(7).text(name).text(method).texts(references).word(0).framed(payload)
}

/// AddTextToStore.
pub(crate) fn add_text(name: impl AsRef<[u8]>, text: impl AsRef<[u8]>) -> Msg {
    op(8).text(name).text(text).texts::<&str>([])
}

/// A derivation in the store.
pub(crate) struct Drv {
    pub(crate) path: String,
    pub(crate) outputs: BTreeMap<String, String>,
    pub(crate) hash_modulo: String,
}

/// Adds a derivation with these outputs; with `built` they are valid, as a trusted client says.
pub(crate) fn derivation(client: &mut Raw, name: &str, outputs: &[&str], built: bool) -> Drv {
    let dir = StoreDir::default();
    let basic = BasicDerivation {
        name: name.into(),
        outputs: outputs.iter().map(|output| (output.parse().unwrap(), Output::Deferred)).collect(),
        input_srcs: BTreeSet::new(),
        platform: b"x86_64-linux".to_vec(),
        builder: b"/bin/sh".to_vec(),
        args: Vec::new(),
        env: BTreeMap::new(),
    };
    let mut derivation = Derivation::from(basic);
    derivation.fill_outputs(&dir, &mut |_| None).unwrap();
    let hash_modulo = match derivation.output_hash_modulo(&dir, &mut |_| None).unwrap() {
        nix_compat::derivation::HashModulo::Regular(hash) => hex(&hash),
        other => panic!("{other:?}"),
    };
    client.send(&add_text(format!("{name}.drv"), derivation.to_aterm(&dir)));
    client.done();
    let path = client.text();
    let outputs: BTreeMap<_, _> = derivation
        .basic
        .outputs
        .iter()
        .map(|(name, output)| (name.to_string(), dir.display(output.path().unwrap())))
        .collect();
    if built {
        for output in outputs.values() {
            let nar = file_nar(output);
            client.add(&Claim { path: output.clone(), ..claim("out", &nar) }, &nar).unwrap();
        }
    }
    Drv { path, outputs, hash_modulo }
}
