//! The reference graph of all valid paths, compact enough to be held in memory for a collection.
//!
//! A path is a number, an [`Id`]; what it refers to are numbers in one long list. A path takes 56 bytes, the bytes of
//! its name, 4 for each reference, and at most 12 in the table that finds it by its digest: with a name
//! of 30 bytes and six references some 130 bytes, 130 MB for a million paths. What a collection adds to that is a byte
//! a path for each of its marks, and 8 more, and 12 for each path that is deleted, while their order is found out. Lists
//! grow by doubling: while it is read, the graph takes up to twice as much.

use std::hash::{BuildHasher, RandomState};
use std::ops::ControlFlow;

use hashbrown::HashTable;
use nix_compat::store_path::StorePath;

use crate::error::{Error, Result};
use crate::record::Edges;
use crate::store::Store;

/// Digests between two questions whether to go on.
const BREATH: usize = 4096;

/// A path of the graph, or a digest that one refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Id(u32);

impl Id {
    /// None of them.
    const NOBODY: Self = Self(u32::MAX);

    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// What is known of a path.
struct Node {
    digest: [u8; 20],
    /// Its number in the mount; 0 for a digest that is only referred to.
    number: u32,
    /// Where its name begins among the names.
    name: usize,
    /// Where its references begin among the references.
    references: usize,
    reference_count: u32,
    deriver: Id,
    name_length: u8,
}

/// The graph as it was at one moment.
pub(crate) struct Graph {
    nodes: Vec<Node>,
    names: Vec<u8>,
    references: Vec<Id>,
    by_digest: HashTable<Id>,
    seed: RandomState,
}

impl Graph {
    /// Reads the graph. `go_on` is asked now and then.
    ///
    /// # Errors
    /// [`Error::Cancelled`] when it says no, and when the index cannot be read or a record is damaged.
    pub(crate) fn read(store: &Store, go_on: &dyn Fn() -> bool) -> Result<Self> {
        let mut graph = Self::empty();
        let mut failure = None;
        let mut count = 0usize;
        store.index().scan_prefix(&store.tables.paths, &[], &mut |key, value| {
            count += 1;
            let added = if count.is_multiple_of(BREATH) && !go_on() {
                Err(Error::Cancelled)
            } else {
                Edges::decode(key, value).and_then(|edges| graph.add(&edges))
            };
            match added {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    failure = Some(error);
                    ControlFlow::Break(())
                }
            }
        })?;
        graph.nodes.shrink_to_fit();
        graph.names.shrink_to_fit();
        graph.references.shrink_to_fit();
        match failure {
            Some(error) => Err(error),
            None => Ok(graph),
        }
    }

    /// A graph that no store has.
    #[cfg(test)]
    pub(crate) fn made_up(paths: impl Iterator<Item = Edges>) -> Self {
        let mut graph = Self::empty();
        paths.for_each(|edges| graph.add(&edges).unwrap());
        graph
    }

    fn empty() -> Self {
        Self {
            nodes: Vec::new(),
            names: Vec::new(),
            references: Vec::new(),
            by_digest: HashTable::new(),
            seed: RandomState::new(),
        }
    }

    fn add(&mut self, edges: &Edges) -> Result<()> {
        let id = self.intern(edges.digest)?;
        let references = self.references.len();
        for digest in &edges.references {
            let reference = self.intern(*digest)?;
            self.references.push(reference);
        }
        let deriver = match edges.deriver {
            Some(digest) => self.intern(digest)?,
            None => Id::NOBODY,
        };
        let name = self.names.len();
        self.names.extend_from_slice(edges.name.as_bytes());
        let node = &mut self.nodes[id.index()];
        node.number = edges.number;
        node.name = name;
        // Names have at most 211 bytes, and a list of references fits into a record.
        node.name_length = u8::try_from(edges.name.len()).unwrap_or(u8::MAX);
        node.references = references;
        node.reference_count = u32::try_from(edges.references.len()).unwrap_or(u32::MAX);
        node.deriver = deriver;
        Ok(())
    }

    /// The number of a digest, given now if it has none yet.
    fn intern(&mut self, digest: [u8; 20]) -> Result<Id> {
        let Self { nodes, by_digest, seed, .. } = self;
        let entry = by_digest.entry(
            seed.hash_one(digest),
            |id| nodes[id.index()].digest == digest,
            |id| seed.hash_one(nodes[id.index()].digest),
        );
        match entry {
            hashbrown::hash_table::Entry::Occupied(known) => Ok(*known.get()),
            hashbrown::hash_table::Entry::Vacant(room) => {
                let number = u32::try_from(nodes.len()).map_err(|_| Error::NumbersExhausted)?;
                let id = Id(number);
                if id == Id::NOBODY {
                    return Err(Error::NumbersExhausted);
                }
                nodes.push(Node {
                    digest,
                    number: 0,
                    name: 0,
                    references: 0,
                    reference_count: 0,
                    deriver: Id::NOBODY,
                    name_length: 0,
                });
                room.insert(id);
                Ok(id)
            }
        }
    }

    /// How many numbers were given: marks need so many places.
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// All valid paths.
    pub(crate) fn paths(&self) -> impl Iterator<Item = Id> + '_ {
        (0..).map(Id).zip(&self.nodes).filter(|(_, node)| node.number != 0).map(|(id, _)| id)
    }

    /// The valid path of this name.
    pub(crate) fn find(&self, path: &StorePath) -> Option<Id> {
        let id = self.find_digest(&path.digest())?;
        (self.number(id) != 0 && self.name(id) == path.name()).then_some(id)
    }

    /// What has this digest.
    pub(crate) fn find_digest(&self, digest: &[u8; 20]) -> Option<Id> {
        let found = self.by_digest.find(self.seed.hash_one(digest), |id| self.nodes[id.index()].digest == *digest);
        found.copied()
    }

    /// Its digest.
    pub(crate) fn digest(&self, id: Id) -> &[u8; 20] {
        &self.nodes[id.index()].digest
    }

    /// Its number in the mount, or 0 when it is not valid.
    pub(crate) fn number(&self, id: Id) -> u32 {
        self.nodes[id.index()].number
    }

    fn name(&self, id: Id) -> &str {
        let node = &self.nodes[id.index()];
        // Taken from a text in `add`.
        std::str::from_utf8(&self.names[node.name..node.name + usize::from(node.name_length)]).unwrap_or_default()
    }

    /// The path's whole name.
    ///
    /// # Errors
    /// [`Error::Record`] when the index holds one that is none.
    pub(crate) fn path(&self, id: Id) -> Result<StorePath> {
        let digest = self.nodes[id.index()].digest;
        StorePath::from_parts(digest, self.name(id)).map_err(|error| crate::record::damaged(&digest, error.to_string()))
    }

    /// Whether its name is that of a derivation.
    pub(crate) fn is_derivation(&self, id: Id) -> bool {
        self.name(id).ends_with(".drv")
    }

    /// What it refers to, itself included when it does.
    pub(crate) fn references(&self, id: Id) -> &[Id] {
        let node = &self.nodes[id.index()];
        &self.references[node.references..node.references + node.reference_count as usize]
    }

    /// What it was built from, as far as is known; perhaps not valid.
    pub(crate) fn deriver(&self, id: Id) -> Option<Id> {
        Some(self.nodes[id.index()].deriver).filter(|deriver| *deriver != Id::NOBODY)
    }

    /// The paths and all that refer to them, directly or not: a mark for each.
    pub(crate) fn with_referrers(&self, paths: impl Iterator<Item = Id>) -> Vec<bool> {
        // Whom each is referred to by, in one list: first how many, then where.
        let mut ends = vec![0usize; self.nodes.len() + 1];
        for path in self.paths() {
            for reference in self.references(path) {
                ends[reference.index() + 1] += 1;
            }
        }
        for n in 1..ends.len() {
            ends[n] += ends[n - 1];
        }
        let starts = ends.clone();
        let mut referrers = vec![Id::NOBODY; self.references.len()];
        for path in self.paths() {
            for reference in self.references(path) {
                referrers[ends[reference.index()]] = path;
                ends[reference.index()] += 1;
            }
        }
        let mut all = vec![false; self.nodes.len()];
        let mut todo: Vec<Id> = paths.collect();
        while let Some(path) = todo.pop() {
            if !std::mem::replace(&mut all[path.index()], true) {
                todo.extend(&referrers[starts[path.index()]..ends[path.index()]]);
            }
        }
        all
    }

    /// Bytes of memory it takes.
    pub(crate) fn bytes(&self) -> usize {
        size_of::<Node>() * self.nodes.capacity()
            + self.names.capacity()
            + size_of::<Id>() * self.references.capacity()
            + self.by_digest.allocation_size()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of a [`Node`].
    const NODE_BYTES: usize = 56;
    /// Bytes of a path in the table of digests, at most: its number and a byte of the table's, with room for growth.
    const TABLE_BYTES: usize = 12;
    const REFERENCES: usize = 6;
    const NAME: &str = "a-path-with-a-name-1.0.2-dev";

    fn digest(n: usize) -> [u8; 20] {
        nix_compat::hash::sha256(&n.to_le_bytes())[..20].try_into().unwrap()
    }

    fn edges(n: usize, references: Vec<[u8; 20]>) -> Edges {
        let number = u32::try_from(n).unwrap() + 2;
        Edges { digest: digest(n), name: NAME.into(), number, references, deriver: Some(digest(n + 1_000_000)) }
    }

    #[test]
    fn it_takes_as_much_memory_as_is_said() {
        assert_eq!(size_of::<Node>(), NODE_BYTES);
        let mut graph = Graph::empty();
        let count = 20_000;
        for n in 0..count {
            graph
                .add(&Edges {
                    deriver: None,
                    ..edges(n, (1..=REFERENCES).map(|r| digest(n.saturating_sub(r))).collect())
                })
                .unwrap();
        }
        graph.nodes.shrink_to_fit();
        graph.names.shrink_to_fit();
        graph.references.shrink_to_fit();
        let per_path = graph.bytes() as f64 / count as f64;
        println!("{per_path:.1} bytes a path with {REFERENCES} references and a name of {} bytes", NAME.len());
        assert!(per_path <= (NODE_BYTES + TABLE_BYTES + NAME.len() + 4 * REFERENCES) as f64);
    }

    #[test]
    fn what_is_only_referred_to_is_no_path() {
        let mut graph = Graph::empty();
        graph.add(&edges(1, vec![digest(2), digest(1)])).unwrap();
        graph.add(&edges(3, vec![digest(1)])).unwrap();
        let [one, three] = [1, 3].map(|n| graph.find_digest(&digest(n)).unwrap());
        assert_eq!(graph.paths().collect::<Vec<_>>(), [one, three]);
        let path = graph.path(one).unwrap();
        assert_eq!((path.digest(), path.name()), (digest(1), NAME));
        assert_eq!(graph.find(&path), Some(one));
        assert_eq!(graph.find(&StorePath::from_parts(digest(1), "another-name").unwrap()), None);
        assert_eq!(graph.find(&StorePath::from_parts(digest(2), NAME).unwrap()), None, "it is not valid");
        assert_eq!(graph.number(graph.deriver(three).unwrap()), 0);
        let marks = graph.with_referrers([one].into_iter());
        assert!(marks[one.index()] && marks[three.index()]);
        assert_eq!(marks.iter().filter(|mark| **mark).count(), 2);
    }
}
