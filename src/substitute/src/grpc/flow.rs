//! From steps of the walk to bytes: contents that are here, and contents that were asked for a while before.

use std::collections::{HashSet, VecDeque};

use bytes::Bytes;
use castore::engine::Engine;
use castore::{BlobService as _, Digest};
use quick_cache::sync::Cache;
use rpc_client::{Ahead, ClientError, Coming, MAX_PIECE};

use super::ByLength;
use super::walk::{Step, Walk};

/// Steps that the walk is ahead of what is asked for. A large file among them is asked for its chunks.
const STEPS: usize = 256;
/// Parts that are ahead of what is written.
const PARTS: usize = 1024;
/// Blobs and chunks asked for at once, of one transfer.
const CALLS: usize = 64;
/// Files up to this size are fetched whole, since castored does not cut them; in bytes.
pub(super) const WHOLE: u64 = 64 * 1024;

/// A part of what is written.
pub(super) enum Part {
    /// A step that has no contents, or a file's beginning.
    Step(Step),
    /// A blob or chunk that is here: the bytes of `blob` from `offset` on.
    Here {
        digest: Digest,
        size: u64,
        blob: Digest,
        offset: u64,
    },
    /// Contents that came.
    Bytes(Bytes),
    /// A blob or chunk that is too large to be fetched whole.
    Large(Digest),
    EndOfFile,
}

/// A part that may have to be waited for.
enum Begun {
    Ready(Part),
    Coming {
        digest: Digest,
        size: u64,
        coming: Coming<Bytes>,
    },
    /// Has been asked for already, a few parts before.
    Again {
        digest: Digest,
        size: u64,
    },
}

/// Where a file's contents are from.
enum Contents {
    Here,
    Whole,
    Chunks(Coming<Vec<(Digest, u64)>>),
}

/// A large file that is being asked for.
struct Cutting {
    blob: Digest,
    chunks: std::vec::IntoIter<(Digest, u64)>,
    offset: u64,
}

/// The way of a tree's parts to who writes them.
pub(super) struct Flow<'a> {
    walk: Walk<'a>,
    here: &'a Engine,
    ahead: &'a Ahead,
    recent: &'a Cache<Digest, Bytes, ByLength>,
    planned: VecDeque<(Step, Option<Contents>)>,
    walked: bool,
    cutting: Option<Cutting>,
    begun: VecDeque<Begun>,
    /// What was asked for and has not been taken.
    asked: HashSet<Digest>,
    asked_bytes: u64,
}

impl<'a> Flow<'a> {
    pub(super) fn new(
        walk: Walk<'a>,
        here: &'a Engine,
        ahead: &'a Ahead,
        recent: &'a Cache<Digest, Bytes, ByLength>,
    ) -> Self {
        Self {
            walk,
            here,
            ahead,
            recent,
            planned: VecDeque::new(),
            walked: false,
            cutting: None,
            begun: VecDeque::new(),
            asked: HashSet::new(),
            asked_bytes: 0,
        }
    }

    /// The next part; none at the end. So many bytes may be under way.
    pub(super) fn next(&mut self, bytes: u64, wanted: &dyn Fn() -> bool) -> Result<Option<Part>, ClientError> {
        self.plan()?;
        self.begin(bytes, wanted)?;
        let Some(begun) = self.begun.pop_front() else { return Ok(None) };
        let bytes = match begun {
            Begun::Ready(part) => return Ok(Some(part)),
            Begun::Coming { digest, size, coming } => {
                let bytes = coming.wait(wanted)?;
                self.asked.remove(&digest);
                self.asked_bytes -= size;
                self.recent.insert(digest, bytes.clone());
                bytes
            }
            Begun::Again { digest, size } => match self.recent.get(&digest) {
                Some(bytes) => bytes,
                None => self.ahead.piece(digest, size).wait(wanted)?,
            },
        };
        Ok(Some(Part::Bytes(bytes)))
    }

    /// Walks ahead.
    fn plan(&mut self) -> Result<(), ClientError> {
        while !self.walked && self.planned.len() < STEPS {
            let Some(step) = self.walk.next()? else {
                self.walked = true;
                break;
            };
            let contents = match &step {
                Step::File { size: 0, .. } => None,
                Step::File { digest, size, .. } => Some(if self.is_here(digest, *size) {
                    Contents::Here
                } else if *size <= WHOLE {
                    Contents::Whole
                } else {
                    Contents::Chunks(self.ahead.chunks(*digest, *size))
                }),
                _ => None,
            };
            self.planned.push_back((step, contents));
        }
        Ok(())
    }

    fn is_here(&self, digest: &Digest, size: u64) -> bool {
        matches!(self.here.stat(digest), Ok(Some(stat)) if stat.size == size)
    }

    /// Asks for contents.
    fn begin(&mut self, bytes: u64, wanted: &dyn Fn() -> bool) -> Result<(), ClientError> {
        while self.asked_bytes < bytes && self.asked.len() < CALLS && self.begun.len() < PARTS {
            if let Some(cutting) = &mut self.cutting {
                match cutting.chunks.next() {
                    Some((digest, size)) => {
                        let (blob, offset) = (cutting.blob, cutting.offset);
                        cutting.offset += size;
                        self.begin_piece(digest, size, blob, offset);
                    }
                    None => {
                        self.cutting = None;
                        self.ready(Part::EndOfFile);
                    }
                }
                continue;
            }
            // Nobody has to wait for chunks as long as there is something else to do.
            match self.planned.front() {
                None => break,
                Some((_, Some(Contents::Chunks(coming)))) if !coming.is_ready() && !self.begun.is_empty() => break,
                Some(_) => {}
            }
            let Some((step, contents)) = self.planned.pop_front() else { break };
            let Step::File { digest, size, .. } = step else {
                self.ready(Part::Step(step));
                continue;
            };
            self.ready(Part::Step(step));
            match contents {
                None => {}
                Some(Contents::Here) => self.ready(Part::Here { digest, size, blob: digest, offset: 0 }),
                Some(Contents::Whole) => self.begin_piece(digest, size, digest, 0),
                Some(Contents::Chunks(coming)) => {
                    let chunks = coming.wait(wanted)?.into_iter();
                    self.cutting = Some(Cutting { blob: digest, chunks, offset: 0 });
                    continue;
                }
            }
            self.ready(Part::EndOfFile);
        }
        Ok(())
    }

    fn ready(&mut self, part: Part) {
        self.begun.push_back(Begun::Ready(part));
    }

    fn begin_piece(&mut self, digest: Digest, size: u64, blob: Digest, offset: u64) {
        let begun = if self.is_here(&digest, size) {
            Begun::Ready(Part::Here { digest, size, blob, offset })
        } else if size > MAX_PIECE {
            Begun::Ready(Part::Large(digest))
        } else if self.asked.contains(&digest) || self.recent.peek(&digest).is_some() {
            Begun::Again { digest, size }
        } else {
            self.asked.insert(digest);
            self.asked_bytes += size;
            Begun::Coming { digest, size, coming: self.ahead.piece(digest, size) }
        };
        self.begun.push_back(begun);
    }
}
