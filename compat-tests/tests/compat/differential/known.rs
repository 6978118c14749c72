//! Where castored answers differently from stock, and why.

use compat_tests::Who;

use super::{Difference, Place};

/// What stock counts among the paths of a collection although it is no store object: files that it leaves beside
/// objects. Castored leaves none.
pub(super) const NO_OBJECTS: &[&str] = &[".lock", ".chroot", ".check"];

/// Why a difference stands.
#[derive(Debug, Clone, Copy)]
#[allow(dead_code, reason = "for the reader of a failure")]
pub(super) enum Why {
    /// Stock is wrong: it dies, loses step, or says what is not so.
    StockIsWrong(&'static str),
    /// Both are right.
    Choice(&'static str),
    /// Castored cannot do it yet, and says so.
    NotYet(&'static str),
}

/// A listed difference. It must occur in each case that it concerns.
#[derive(Debug)]
pub(super) struct Known {
    /// Names of cases; `*` at the end stands for anything.
    pub cases: &'static [&'static str],
    /// The fields, in the same way.
    pub fields: &'static [&'static str],
    /// The minors, first and last.
    pub minors: (u64, u64),
    /// For whom, if not for all.
    pub who: Option<Who>,
    /// Why.
    #[allow(dead_code, reason = "for the reader of a failure")]
    pub why: Why,
}

impl Known {
    /// Whether it is about this case.
    pub(super) fn concerns(&self, (minor, who, case): &Place) -> bool {
        (self.minors.0..=self.minors.1).contains(minor)
            && self.who.is_none_or(|w| w == *who)
            && self.cases.iter().any(|pattern| matches(pattern, case))
    }

    /// Whether it is this difference.
    pub(super) fn explains(&self, difference: &Difference) -> bool {
        self.concerns(&difference.place) && self.fields.iter().any(|pattern| matches(pattern, &difference.field))
    }
}

fn matches(pattern: &str, text: &str) -> bool {
    pattern.strip_suffix('*').map_or(pattern == text, |start| text.starts_with(start))
}

/// All of them.
pub(super) const LIST: &[Known] = &[];
