//! The order in which paths are deleted: whoever refers goes before what it refers to, and a circle goes at once.

use super::graph::{Graph, Id};

/// No place in the order yet.
const UNSEEN: u32 = u32::MAX;

/// Paths in groups, each a circle or a single path; none comes before one that refers to it.
pub(super) struct Order {
    paths: Vec<Id>,
    /// Where the groups end, the last one first.
    ends: Vec<u32>,
    /// How many have been taken.
    taken: usize,
}

impl Order {
    /// Orders those that are marked.
    pub(super) fn new(graph: &Graph, doomed: &[bool]) -> Self {
        // Tarjan's way to find the strongly connected components, on a stack of our own: chains are long. It gives what is
        // referred to first, so all is turned around.
        let mut walk = Walk {
            graph,
            doomed,
            seen: vec![UNSEEN; graph.len()],
            low: vec![0; graph.len()],
            open: Vec::new(),
            paths: Vec::new(),
            ends: Vec::new(),
            next: 0,
        };
        for path in graph.paths().filter(|path| doomed[path.index()]) {
            if walk.seen[path.index()] == UNSEEN {
                walk.from(path);
            }
        }
        let Walk { mut paths, ends, .. } = walk;
        paths.reverse();
        let count = paths.len() as u32;
        // A group that ended at `end` begins there now; it ends where the one before it began.
        let mut turned: Vec<u32> = ends.iter().map(|end| count - end).collect();
        turned.insert(0, count);
        turned.pop();
        Self { paths, ends: turned, taken: 0 }
    }

    /// The next group: a path by itself, or all that are in a circle with it.
    pub(super) fn next_group(&mut self) -> Option<&[Id]> {
        let end = self.ends.pop()? as usize;
        let begin = std::mem::replace(&mut self.taken, end);
        Some(&self.paths[begin..end])
    }
}

struct Walk<'a> {
    graph: &'a Graph,
    doomed: &'a [bool],
    /// When each was come to.
    seen: Vec<u32>,
    /// The earliest that is open and can be come to from each; its own time once its group is closed.
    low: Vec<u32>,
    open: Vec<Id>,
    paths: Vec<Id>,
    ends: Vec<u32>,
    next: u32,
}

impl Walk<'_> {
    /// Marks a closed group's members: nothing can be lower.
    const CLOSED: u32 = u32::MAX;

    fn from(&mut self, path: Id) {
        self.enter(path);
        let mut stack = vec![(path, 0usize)];
        while let Some((path, at)) = stack.last_mut() {
            let path = *path;
            if let Some(&reference) = self.graph.references(path).get(*at) {
                *at += 1;
                if !self.doomed[reference.index()] {
                    continue;
                }
                if self.seen[reference.index()] == UNSEEN {
                    self.enter(reference);
                    stack.push((reference, 0));
                } else if self.low[reference.index()] != Self::CLOSED {
                    self.lower(path, self.seen[reference.index()]);
                }
                continue;
            }
            stack.pop();
            let low = self.low[path.index()];
            if low == self.seen[path.index()] {
                self.close(path);
            }
            if let Some((parent, _)) = stack.last()
                && low < self.seen[path.index()]
            {
                self.lower(*parent, low);
            }
        }
    }

    fn enter(&mut self, path: Id) {
        self.seen[path.index()] = self.next;
        self.low[path.index()] = self.next;
        self.next += 1;
        self.open.push(path);
    }

    fn lower(&mut self, path: Id, to: u32) {
        let low = &mut self.low[path.index()];
        *low = to.min(*low);
    }

    fn close(&mut self, first: Id) {
        while let Some(path) = self.open.pop() {
            self.low[path.index()] = Self::CLOSED;
            self.paths.push(path);
            if path == first {
                break;
            }
        }
        self.ends.push(self.paths.len() as u32);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::record::Edges;

    fn graph(references: &[BTreeSet<usize>]) -> Graph {
        let digest = |n: usize| -> [u8; 20] { nix_compat::hash::sha256(&n.to_le_bytes())[..20].try_into().unwrap() };
        Graph::made_up(references.iter().enumerate().map(|(n, references)| Edges {
            digest: digest(n),
            name: "x".into(),
            number: n as u32 + 2,
            references: references.iter().map(|r| digest(*r)).collect(),
            deriver: None,
        }))
    }

    /// Whether each can be come to from each.
    fn reach(references: &[BTreeSet<usize>], doomed: &[bool]) -> Vec<BTreeSet<usize>> {
        let walk = |from: usize| {
            let (mut reached, mut todo) = (BTreeSet::new(), vec![from]);
            while let Some(at) = todo.pop() {
                todo.extend(references[at].iter().filter(|to| doomed[**to] && reached.insert(**to)));
            }
            reached
        };
        (0..references.len()).map(walk).collect()
    }

    fn cases() -> impl Strategy<Value = (Vec<BTreeSet<usize>>, Vec<bool>)> {
        (1usize..30).prop_flat_map(|count| {
            let references = prop::collection::btree_set(0..count, 0..4);
            (prop::collection::vec(references, count), prop::collection::vec(prop::bool::weighted(0.8), count))
        })
    }

    proptest! {
        #[test]
        fn referrers_come_first_and_circles_together((references, doomed) in cases()) {
            let graph = graph(&references);
            // Numbers of the graph are given as digests are met; ours are those of the paths.
            let ours = |id: Id| graph.number(id) as usize - 2;
            let mut marks = vec![false; graph.len()];
            graph.paths().for_each(|id| marks[id.index()] = doomed[ours(id)]);
            let mut order = Order::new(&graph, &marks);
            let mut groups: Vec<BTreeSet<usize>> = Vec::new();
            while let Some(group) = order.next_group() {
                groups.push(group.iter().map(|id| ours(*id)).collect());
            }
            let wanted: BTreeSet<usize> = (0..doomed.len()).filter(|n| doomed[*n]).collect();
            prop_assert_eq!(groups.iter().map(BTreeSet::len).sum::<usize>(), wanted.len());
            prop_assert_eq!(groups.iter().flatten().copied().collect::<BTreeSet<_>>(), wanted);
            let reach = reach(&references, &doomed);
            for (place, group) in groups.iter().enumerate() {
                for path in group {
                    for other in groups.iter().flatten() {
                        let together = path == other || (reach[*path].contains(other) && reach[*other].contains(path));
                        prop_assert_eq!(group.contains(other), together);
                    }
                    // Nobody later refers to it.
                    for later in groups[place + 1..].iter().flatten() {
                        prop_assert!(!references[*later].contains(path));
                    }
                }
            }
        }
    }
}
