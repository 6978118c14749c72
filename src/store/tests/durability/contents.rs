//! The bytes of a file, in pages, so that a file may be long and have little in it.

use std::collections::BTreeMap;
use std::sync::Arc;

/// What a disk writes as a whole: a page is there in its old or in its new form, never half.
pub(crate) const PAGE: u64 = 4096;

type Page = [u8; PAGE as usize];

/// A change to the bytes of a file.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    /// These bytes from there on.
    Write(u64, Arc<[u8]>),
    /// This length.
    Length(u64),
}

/// A file's bytes. What was never written is zero.
#[derive(Clone, Debug, Default)]
pub(crate) struct Contents {
    pages: BTreeMap<u64, Arc<Page>>,
    length: u64,
}

impl Contents {
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    pub(crate) fn pages(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.pages.iter().map(|(number, page)| (number * PAGE, &page[..]))
    }

    pub(crate) fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let end = self.length.min(offset + length as u64);
        let mut bytes = vec![0; end.saturating_sub(offset) as usize];
        for (&number, page) in self.pages.range(offset / PAGE..end.div_ceil(PAGE)) {
            let start = number * PAGE;
            let (from, to) = (start.max(offset), (start + PAGE).min(end));
            if from < to {
                bytes[(from - offset) as usize..(to - offset) as usize]
                    .copy_from_slice(&page[(from - start) as usize..(to - start) as usize]);
            }
        }
        bytes
    }

    pub(crate) fn apply(&mut self, change: &Change) {
        match change {
            Change::Write(offset, bytes) => {
                let end = offset + bytes.len() as u64;
                for number in offset / PAGE..end.div_ceil(PAGE) {
                    self.apply_to_page(number, change);
                }
                self.length = self.length.max(end);
            }
            Change::Length(length) => self.set_length(*length),
        }
    }

    pub(crate) fn set_length(&mut self, length: u64) {
        if length < self.length {
            self.pages.split_off(&length.div_ceil(PAGE));
            self.apply_to_page(length / PAGE, &Change::Length(length));
        }
        self.length = length;
    }

    /// Sets the length of what was put together page by page: nothing that lies behind it stays.
    pub(crate) fn force_length(&mut self, length: u64) {
        self.length = u64::MAX;
        self.set_length(length);
    }

    /// What `change` does to one page, and to nothing else.
    pub(crate) fn apply_to_page(&mut self, number: u64, change: &Change) {
        let start = number * PAGE;
        match change {
            Change::Write(offset, bytes) => {
                let (from, to) = (start.max(*offset), (start + PAGE).min(offset + bytes.len() as u64));
                if from < to {
                    let page = self.pages.entry(number).or_insert_with(|| Arc::new([0; PAGE as usize]));
                    Arc::make_mut(page)[(from - start) as usize..(to - start) as usize]
                        .copy_from_slice(&bytes[(from - offset) as usize..(to - offset) as usize]);
                }
            }
            Change::Length(length) if *length <= start => drop(self.pages.remove(&number)),
            Change::Length(length) if *length < start + PAGE => {
                if let Some(page) = self.pages.get_mut(&number) {
                    Arc::make_mut(page)[(length - start) as usize..].fill(0);
                }
            }
            Change::Length(_) => {}
        }
    }
}
