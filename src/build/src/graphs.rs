//! `exportReferencesGraph`: telling a builder the closures of store paths.

use std::collections::{BTreeMap, BTreeSet};

use nix_compat::path_info::PathInfo;
use nix_compat::store_path::StorePath;
use serde_json::{Map, Value, json};
use store::Store;

use crate::attributes::Attributes;
use crate::failure::Failure;
use crate::run::Job;

/// What a builder is told.
#[derive(Clone, Debug, Default)]
pub(crate) struct Exported {
    /// Files for the build directory, by name: of plain attributes.
    pub(crate) files: Vec<(String, Vec<u8>)>,
    /// Structured attributes, by name.
    pub(crate) attributes: Map<String, Value>,
}

/// Collects what a derivation wants to be told of its `inputs`, a closure. Blocks.
pub(crate) fn export(
    job: &Job,
    attributes: &Attributes<'_>,
    inputs: &BTreeSet<StorePath>,
) -> Result<Exported, Failure> {
    let graphs = attributes.exported_graphs().map_err(|e| Failure::attributes(&job.name(), &e))?;
    let mut exported = Exported::default();
    for (name, paths) in graphs {
        let mut roots = BTreeSet::new();
        for text in paths {
            let store_path = job.store.store_dir().to_store_path(&text).map(|(path, _)| path).map_err(|_| {
                let text = format!("'{text}' in 'exportReferencesGraph' of '{}' is not in the store", job.name());
                Failure::rejected(text)
            })?;
            if !inputs.contains(&store_path) {
                let text = format!(
                    "cannot export references of path '{}' because it is not in the input closure of the derivation",
                    job.store.store_dir().display(&store_path)
                );
                return Err(Failure::rejected(text));
            }
            roots.insert(store_path);
        }
        let infos = infos(&job.store, &roots)?;
        if attributes.structured().is_some() {
            exported.attributes.insert(name, as_json(&job.store, &infos));
        } else {
            exported.files.push((name, as_text(&job.store, &infos).into_bytes()));
        }
    }
    Ok(exported)
}

/// The closure of `roots`. Of derivations in it, the closures of their valid outputs as well: so a builder can be told
/// everything that is needed to build something.
fn infos(store: &Store, roots: &BTreeSet<StorePath>) -> Result<BTreeMap<StorePath, PathInfo>, Failure> {
    let mut closure = store.closure(roots)?;
    let mut outputs = Vec::new();
    for drv in closure.iter().filter(|path| path.is_derivation()) {
        for output in store.output_map(drv)?.into_values().flatten() {
            if store.is_valid(&output)? {
                outputs.push(output);
            }
        }
    }
    closure.extend(store.closure(&outputs)?);
    let mut infos = BTreeMap::new();
    for path in closure {
        if let Some(info) = store.path_info(&path)? {
            infos.insert(path, info);
        }
    }
    Ok(infos)
}

/// The form that `nix-store --register-validity` reads: for each path its name, an empty deriver, and its references
/// after their number, a line each.
fn as_text(store: &Store, infos: &BTreeMap<StorePath, PathInfo>) -> String {
    let dir = store.store_dir();
    let mut text = String::new();
    for (path, info) in infos {
        text.push_str(&format!("{}\n\n{}\n", dir.display(path), info.references.len()));
        for reference in &info.references {
            text.push_str(&dir.display(reference));
            text.push('\n');
        }
    }
    text
}

fn as_json(store: &Store, infos: &BTreeMap<StorePath, PathInfo>) -> Value {
    let dir = store.store_dir();
    let each = |(path, info): (&StorePath, &PathInfo)| {
        let references: Vec<String> = info.references.iter().map(|path| dir.display(path)).collect();
        json!({
            "ca": info.ca.as_ref().map(ToString::to_string),
            "closureSize": closure_size(path, infos),
            "narHash": info.nar_hash.to_prefixed_nix32(),
            "narSize": info.nar_size,
            "path": dir.display(path),
            "references": references,
            "valid": true,
        })
    };
    infos.iter().map(each).collect()
}

/// The sum of the NAR sizes of a path's closure, in bytes.
fn closure_size(path: &StorePath, infos: &BTreeMap<StorePath, PathInfo>) -> u64 {
    let mut seen = BTreeSet::from([path]);
    let mut todo = vec![path];
    let mut size = 0u64;
    while let Some(info) = todo.pop().and_then(|path| infos.get(path)) {
        size = size.saturating_add(info.nar_size);
        todo.extend(info.references.iter().filter(|reference| seen.insert(*reference)));
    }
    size
}
