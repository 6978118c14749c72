//! The order in which paths are sent.

use std::collections::{BTreeMap, HashSet};

use nix_compat::path_info::PathInfo;
use nix_compat::store_path::StorePath;

/// Path infos in an order in which each comes after those it refers to.
pub fn references_first(mut infos: BTreeMap<StorePath, PathInfo>) -> Vec<PathInfo> {
    let mut sorted = Vec::with_capacity(infos.len());
    while let Some((path, _)) = infos.first_key_value() {
        // Depth first on a stack of our own: chains of references are long.
        let mut stack = vec![path.clone()];
        let mut under_way = HashSet::from([path.clone()]);
        while let Some(path) = stack.last() {
            let Some(info) = infos.get(path) else {
                stack.pop();
                continue;
            };
            let next = info.references.iter().find(|reference| *reference != path && infos.contains_key(*reference));
            match next {
                // Only damage makes circles; then any order is as good.
                Some(next) if under_way.insert(next.clone()) => stack.push(next.clone()),
                _ => {
                    let path = path.clone();
                    sorted.extend(infos.remove(&path));
                    stack.pop();
                }
            }
        }
    }
    sorted
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use nix_compat::hash::NarHash;

    use super::*;

    fn path(n: u8) -> StorePath {
        StorePath::from_parts([n; 20], "x").unwrap()
    }

    fn info(n: u8, references: &[u8]) -> (StorePath, PathInfo) {
        let info = PathInfo {
            path: path(n),
            deriver: None,
            nar_hash: NarHash::from([0; 32]),
            references: references.iter().copied().map(path).collect(),
            registration_time: 0,
            nar_size: 1,
            ultimate: false,
            signatures: BTreeSet::new(),
            ca: None,
        };
        (path(n), info)
    }

    fn order(infos: &[(StorePath, PathInfo)]) -> Vec<u8> {
        references_first(infos.iter().cloned().collect()).iter().map(|info| info.path.digest()[0]).collect()
    }

    #[test]
    fn what_is_referred_to_comes_first() {
        assert_eq!(order(&[info(1, &[2, 3, 9]), info(2, &[2, 3]), info(3, &[]), info(4, &[1])]), [3, 2, 1, 4]);
        assert_eq!(order(&[]), [] as [u8; 0]);
        assert_eq!(order(&[info(1, &[2]), info(2, &[1])]).len(), 2, "it ends even so");
    }
}
