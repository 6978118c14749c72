//! What is expected of each test: a list that people write and read, and that a run may bring up to date.
//!
//! A line is a state, the test's name and, unless it passes, a reason; `#` begins a comment, which stays where it is.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;

use super::runner::{Outcome, Verdict};
use crate::error::{Error, Result};

/// The reason of a test that failed and that nobody has looked at.
const UNKNOWN: &str = "?";

/// What a test is expected to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Expected {
    /// It passes.
    Pass,
    /// The suite skips it, saying this.
    Skip(String),
    /// It fails with any daemon that owns its store, for this reason.
    Inapplicable(String),
    /// It fails with stock's daemon as well, for this reason.
    Stock(String),
    /// It fails, because this is not built yet.
    Missing(String),
    /// The list does not have it.
    Unlisted,
}

impl Expected {
    /// What is wrong with a test that did this, if anything.
    pub(crate) fn objection(&self, verdict: &Verdict) -> Option<String> {
        match (self, verdict) {
            (Self::Unlisted, _) => Some("it is not in the list".into()),
            (Self::Pass, Verdict::Passed) => None,
            (Self::Skip(expected), Verdict::Skipped(reason)) if expected == reason => None,
            (Self::Inapplicable(_) | Self::Stock(_) | Self::Missing(_), Verdict::Failed | Verdict::TimedOut) => None,
            (_, verdict) => Some(format!("{}, but the list says '{}'", verdict.phrase(), self.state())),
        }
    }

    fn state(&self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Skip(_) => "skip",
            Self::Inapplicable(_) => "inapplicable",
            Self::Stock(_) => "stock-fails",
            Self::Missing(_) => "missing",
            Self::Unlisted => "unlisted",
        }
    }

    fn reason(&self) -> &str {
        match self {
            Self::Pass | Self::Unlisted => "",
            Self::Skip(reason) | Self::Inapplicable(reason) | Self::Stock(reason) | Self::Missing(reason) => reason,
        }
    }

    /// The expectation of a line's state and reason.
    fn parse(state: &str, reason: &str) -> Option<Self> {
        let text = reason.to_owned();
        match (state, reason.is_empty()) {
            ("pass", true) => Some(Self::Pass),
            ("skip", false) => Some(Self::Skip(text)),
            ("inapplicable", false) => Some(Self::Inapplicable(text)),
            ("stock-fails", false) => Some(Self::Stock(text)),
            ("missing", false) => Some(Self::Missing(text)),
            _ => None,
        }
    }

    /// What is expected once a test has done this; what was said of a failure stays.
    fn blessed(&self, verdict: &Verdict) -> Self {
        match verdict {
            Verdict::Passed => Self::Pass,
            Verdict::Skipped(reason) => Self::Skip(reason.clone()),
            Verdict::Failed | Verdict::TimedOut => match self {
                Self::Inapplicable(_) | Self::Stock(_) | Self::Missing(_) => self.clone(),
                Self::Pass | Self::Skip(_) | Self::Unlisted => Self::Missing(UNKNOWN.into()),
            },
        }
    }
}

/// A line of a list.
#[derive(Debug)]
enum Line {
    Comment(String),
    Test(String, Expected),
}

/// A list.
#[derive(Debug, Default)]
pub(crate) struct List(Vec<Line>);

impl List {
    /// Reads a list; one that is not there is empty.
    pub(crate) fn read(file: &Path) -> Result<Self> {
        if !file.exists() {
            return Ok(Self::default());
        }
        let text = fs::read_to_string(file)
            .map_err(|source| Error::Io { action: format!("reading {}", file.display()), source })?;
        Self::parse(&text).map_err(|line| Error::Wrong(format!("{}: cannot read '{line}'", file.display())))
    }

    fn parse(text: &str) -> Result<Self, String> {
        let lines = text.lines().map(|line| {
            if line.trim().is_empty() || line.starts_with('#') {
                return Ok(Line::Comment(line.to_owned()));
            }
            let (state, rest) = line.split_once(' ').ok_or(line)?;
            let (name, reason) = rest.trim().split_once(' ').unwrap_or((rest.trim(), ""));
            let expected = Expected::parse(state, reason.trim()).ok_or(line)?;
            Ok(Line::Test(name.to_owned(), expected))
        });
        lines.collect::<Result<_, &str>>().map(Self).map_err(str::to_owned)
    }

    /// What is expected of a test.
    pub(crate) fn get(&self, name: &str) -> &Expected {
        let found = self.0.iter().find_map(|line| match line {
            Line::Test(test, expected) if test == name => Some(expected),
            _ => None,
        });
        found.unwrap_or(&Expected::Unlisted)
    }

    /// Tests of the list that are not among these.
    pub(crate) fn strangers<'a>(&'a self, names: &'a [String]) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter_map(|line| match line {
            Line::Test(test, _) if !names.contains(test) => Some(test.as_str()),
            _ => None,
        })
    }

    /// Brings the list up to date with what happened. New tests go to the end.
    pub(crate) fn bless(&mut self, outcomes: &BTreeMap<String, Outcome>) {
        for line in &mut self.0 {
            if let Line::Test(test, expected) = line
                && let Some(outcome) = outcomes.get(test)
            {
                *expected = expected.blessed(&outcome.verdict);
            }
        }
        for (name, outcome) in outcomes {
            if *self.get(name) == Expected::Unlisted {
                self.0.push(Line::Test(name.clone(), Expected::Unlisted.blessed(&outcome.verdict)));
            }
        }
    }
}

impl fmt::Display for List {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.0 {
            match line {
                Line::Comment(text) => writeln!(f, "{text}")?,
                Line::Test(name, expected) => {
                    let text = format!("{:<12} {name:<46} {}", expected.state(), expected.reason());
                    writeln!(f, "{}", text.trim_end())?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "# A comment.\n\
                        pass         main/add\n\
                        skip         main/timeout                                   Can't run (see #4813)\n\
                        missing      main/gc                                        the collector\n";

    fn outcome(verdict: Verdict) -> Outcome {
        Outcome { verdict, seconds: 0.0 }
    }

    #[test]
    fn a_list_is_written_as_it_was_read() {
        assert_eq!(List::parse(LIST).unwrap_or_default().to_string(), LIST);
        for wrong in ["pass", "pass a reason", "missing a", "perhaps a b"] {
            assert!(List::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn only_what_the_list_says_is_right() {
        let list = List::parse(LIST).unwrap_or_default();
        let skipped = |reason: &str| Verdict::Skipped(reason.into());
        let wrong = |name, verdict| list.get(name).objection(&verdict).is_some();
        assert!(!wrong("main/add", Verdict::Passed));
        assert!(wrong("main/add", Verdict::Failed));
        assert!(wrong("main/add", skipped("x")));
        assert!(!wrong("main/timeout", skipped("Can't run (see #4813)")));
        assert!(wrong("main/timeout", skipped("Daemon is too old")));
        assert!(!wrong("main/gc", Verdict::TimedOut));
        assert!(wrong("main/gc", Verdict::Passed), "the list has to be brought up to date");
        assert!(wrong("main/new", Verdict::Passed));
        assert_eq!(list.strangers(&["main/add".into(), "main/gc".into()]).collect::<Vec<_>>(), ["main/timeout"]);
    }

    #[test]
    fn blessing_keeps_reasons_and_comments() {
        let mut list = List::parse(LIST).unwrap_or_default();
        let outcomes = [
            ("main/add", Verdict::Failed),
            ("main/timeout", Verdict::Passed),
            ("main/gc", Verdict::Failed),
            ("main/new", Verdict::Skipped("No".into())),
        ];
        list.bless(&outcomes.map(|(name, verdict)| (name.to_owned(), outcome(verdict))).into());
        let text = list.to_string();
        let words: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
        assert_eq!(words[0], ["#", "A", "comment."]);
        assert_eq!(words[1], ["missing", "main/add", "?"]);
        assert_eq!(words[2], ["pass", "main/timeout"]);
        assert_eq!(words[3], ["missing", "main/gc", "the", "collector"]);
        assert_eq!(words[4], ["skip", "main/new", "No"]);
    }
}
