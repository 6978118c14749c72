//! Finding references: which store paths' hash parts occur in a stream of bytes.
//!
//! A hash part is 32 characters of the Nix32 alphabet. The scanner looks at every 32nd byte first: when that
//! byte is not of the alphabet, no hash part can cover it, and 32 positions are skipped at once. In binary
//! data nearly every look is such a skip.

use std::collections::{BTreeSet, HashMap};

use nix_compat::store_path::StorePath;

/// Characters of a hash part.
pub(crate) const HASH_PART: usize = 32;

/// Which bytes are Nix32 digits (all digits and lower-case letters but e, o, u, t).
static IS_DIGIT: [bool; 256] = {
    let mut table = [false; 256];
    let alphabet = b"0123456789abcdfghijklmnpqrsvwxyz";
    let mut i = 0;
    while i < alphabet.len() {
        table[alphabet[i] as usize] = true;
        i += 1;
    }
    table
};

/// Calls `each` with every place at which a hash part could stand, and what stands there.
pub(crate) fn windows_of_digits(bytes: &[u8], each: &mut dyn FnMut(usize, &[u8])) {
    let mut start = 0;
    while start + HASH_PART <= bytes.len() {
        // The last byte of the window that is no digit tells where the next window may begin.
        let window = &bytes[start..start + HASH_PART];
        match window.iter().rposition(|b| !IS_DIGIT[*b as usize]) {
            Some(at) => start += at + 1,
            None => {
                each(start, window);
                start += 1;
            }
        }
    }
}

/// Collects the candidates whose hash part occurs in the bytes fed to it, whatever the pieces they come in.
#[derive(Debug)]
pub struct ReferenceScanner {
    /// Candidates not seen yet, by hash part.
    wanted: HashMap<[u8; HASH_PART], StorePath>,
    found: BTreeSet<StorePath>,
    /// The last bytes of the previous pieces: a hash part may begin in one piece and end in the next.
    tail: Vec<u8>,
}

impl ReferenceScanner {
    /// Looks for the hash parts of `candidates`.
    pub fn new<'a>(candidates: impl IntoIterator<Item = &'a StorePath>) -> Self {
        let wanted = candidates
            .into_iter()
            .filter_map(|path| Some((path.hash_part().as_bytes().try_into().ok()?, path.clone())))
            .collect();
        Self { wanted, found: BTreeSet::new(), tail: Vec::with_capacity(2 * HASH_PART) }
    }

    /// Scans the next piece of the stream.
    pub fn feed(&mut self, piece: &[u8]) {
        if self.wanted.is_empty() || piece.is_empty() {
            return;
        }
        let head = &piece[..piece.len().min(HASH_PART - 1)];
        let mut seam = std::mem::take(&mut self.tail);
        seam.extend_from_slice(head);
        self.scan(&seam);
        self.scan(piece);
        if piece.len() >= HASH_PART - 1 {
            seam.clear();
            seam.extend_from_slice(&piece[piece.len() - (HASH_PART - 1)..]);
        } else {
            // The piece is shorter than a hash part: what precedes it may still count.
            let surplus = seam.len().saturating_sub(HASH_PART - 1);
            seam.drain(..surplus);
        }
        self.tail = seam;
    }

    fn scan(&mut self, bytes: &[u8]) {
        windows_of_digits(bytes, &mut |_, window| {
            if let Some(path) = self.wanted.remove(window) {
                self.found.insert(path);
            }
        });
    }

    /// The candidates found so far.
    pub fn into_found(self) -> BTreeSet<StorePath> {
        self.found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn path(seed: u8) -> StorePath {
        StorePath::from_parts([seed; 20], "x").unwrap()
    }

    fn found(pieces: &[&[u8]], candidates: &[StorePath]) -> BTreeSet<StorePath> {
        let mut scanner = ReferenceScanner::new(candidates);
        for piece in pieces {
            scanner.feed(piece);
        }
        scanner.into_found()
    }

    #[test]
    fn finds_what_is_there_and_nothing_else() {
        let (a, b) = (path(7), path(200));
        let text = format!("see /nix/store/{}-x, and more", a.hash_part());
        assert_eq!(found(&[text.as_bytes()], &[a.clone(), b]), BTreeSet::from([a]));
    }

    #[test]
    fn digits_around_a_hash_part_do_not_hide_it() {
        let a = path(9);
        let text = format!("0123abcd{}xyz", a.hash_part());
        assert_eq!(found(&[text.as_bytes()], std::slice::from_ref(&a)), BTreeSet::from([a]));
    }

    proptest! {
        #[test]
        fn the_cutting_into_pieces_does_not_matter(
            before in proptest::collection::vec(any::<u8>(), 0..80),
            after in proptest::collection::vec(any::<u8>(), 0..80),
            cuts in proptest::collection::vec(1usize..40, 0..12),
        ) {
            let a = path(33);
            let mut text = before;
            text.extend_from_slice(a.hash_part().as_bytes());
            text.extend_from_slice(&after);
            let mut pieces = Vec::new();
            let mut rest = &text[..];
            for cut in cuts {
                let (piece, tail) = rest.split_at(cut.min(rest.len()));
                pieces.push(piece);
                rest = tail;
            }
            pieces.push(rest);
            prop_assert_eq!(found(&pieces, std::slice::from_ref(&a)), BTreeSet::from([a]));
        }
    }
}
