//! The paths that both daemons know, and requests about them, ready to be sent.

use std::sync::OnceLock;

use compat_tests::Result;
use compat_tests::load::{self, Offer};
use compat_tests::nar::Tree;

use crate::sides::Side;

/// How many paths there are.
pub(crate) const PATHS: usize = 20_000;
/// References of each path, as many as a usual path has.
const REFERENCES: usize = 5;

/// What both daemons know.
pub(crate) struct Known {
    pub(crate) paths: Vec<String>,
    /// A QueryPathInfo for each, in an order that is not that of the paths.
    pub(crate) queries: Vec<Vec<u8>>,
    /// The lengths of the replies, which are the same for both.
    lengths: OnceLock<Vec<usize>>,
}

impl Known {
    pub(crate) fn new() -> Self {
        let paths: Vec<String> =
            (0..PATHS).map(|n| load::made_up_path(&format!("known {n}"), "a-known-path-1.0")).collect();
        // A step that shares no divisor with the number of paths meets each once.
        let queries = (0..PATHS).map(|n| load::path_info(&paths[n * 7_919 % PATHS])).collect();
        Self { paths, queries, lengths: OnceLock::new() }
    }

    /// The path with a deriver, a signature and references to paths before it.
    fn offer(&self, n: usize) -> Offer {
        let mut references: Vec<String> =
            (1..=REFERENCES).filter_map(|r| Some(self.paths[n.checked_sub(r * r)?].clone())).collect();
        references.sort();
        Offer {
            path: self.paths[n].clone(),
            references,
            deriver: load::made_up_path(&format!("deriver {n}"), "a-known-path-1.0.drv"),
            signatures: vec![format!("cache.example.org-1:{}", data_encoding::BASE64.encode(&[n as u8; 64]))],
            archive: Tree::File(format!("the contents of path {n}\n").into_bytes()).archive(),
        }
    }

    /// Adds all of them.
    pub(crate) fn add_to(&self, side: &Side) -> Result<()> {
        side.connect()?.call(&load::add_multiple((0..PATHS).map(|n| self.offer(n))))
    }

    /// The length of the reply to each query, found out by asking once.
    pub(crate) fn reply_lengths(&self, side: &Side) -> Result<&[usize]> {
        if let Some(lengths) = self.lengths.get() {
            return Ok(lengths);
        }
        let mut connection = side.connect()?;
        let lengths =
            self.queries.iter().map(|query| Ok(connection.path_info(query)?.length)).collect::<Result<Vec<_>>>()?;
        Ok(self.lengths.get_or_init(|| lengths))
    }
}
