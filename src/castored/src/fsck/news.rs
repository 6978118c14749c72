//! What a check tells, on the socket as a line of JSON each.

use serde::{Deserialize, Serialize};

/// What is asked for: the first line on a connection.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    pub(crate) repair: bool,
    /// Base names; all paths when there are none.
    pub(crate) paths: Vec<String>,
}

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Stage {
    Objects,
    Tables,
    Contents,
    Paths,
    Repair,
}

/// One line of what comes back.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum News {
    /// Another stage begins, of about so much work: bytes for objects and contents, else paths.
    Stage { stage: Stage, total: u64 },
    /// So much of the stage has been done.
    Done(u64),
    /// Something is damaged.
    Problem(String),
    /// A path is.
    Affected { path: String, message: String },
    /// What was tried for a path had this to say.
    Log(String),
    /// It is over.
    End(Summary),
    /// It could not be done.
    Failed(String),
}

/// A path that could not be repaired.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Quarantined {
    pub(crate) path: String,
    pub(crate) reason: String,
    /// Whether nothing of it can be read, not only what is damaged.
    pub(crate) withheld: bool,
}

/// How it ended.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Summary {
    pub(crate) objects: u64,
    pub(crate) bytes: u64,
    pub(crate) paths: u64,
    /// Problems that are not about paths: damaged objects, headers, rows of the index.
    pub(crate) found: u64,
    /// Damaged paths.
    pub(crate) affected: u64,
    /// Whether anything was to be repaired.
    pub(crate) repair: bool,
    /// Objects that were saved from damaged blocks.
    pub(crate) salvaged: u64,
    /// Paths whose contents were fetched or built again.
    pub(crate) mended: Vec<String>,
    pub(crate) quarantined: Vec<Quarantined>,
    /// Paths that were in quarantine before and are sound.
    pub(crate) released: Vec<String>,
    /// Rows of the index that could not be put right.
    pub(crate) rows_left: u64,
    /// Ended before everything was seen.
    pub(crate) ended: bool,
}

impl Summary {
    /// How much of what was found is still there.
    pub(crate) fn left(&self) -> u64 {
        if self.repair { self.quarantined.len() as u64 + self.rows_left } else { self.found + self.affected }
    }
}
