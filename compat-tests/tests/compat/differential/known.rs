//! Where castored answers differently from stock, and why.

use compat_tests::Who;

use super::{Difference, Place};

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

/// For everybody at every minor.
const ALWAYS: (u64, u64) = (18, 38);

const fn known(cases: &'static [&'static str], fields: &'static [&'static str], why: Why) -> Known {
    Known { cases, fields, minors: ALWAYS, who: None, why }
}

const fn for_root(known: Known) -> Known {
    Known { who: Some(Who::Root), ..known }
}

const fn for_user(known: Known) -> Known {
    Known { who: Some(Who::User), ..known }
}

const fn between(first: u64, last: u64, known: Known) -> Known {
    Known { minors: (first, last), ..known }
}

/// How a request ends, and whether the connection can be used then.
const END: &[&str] = &["ending", "usable", "closes"];

const STRICT_BOOL: Why = Why::Choice("any number but 0 is true, as it was in all of stock before 2.34");
const NO_DRAIN: Why = Why::StockIsWrong("it leaves the payload unread and takes it for the next request");
const REMOVED: Why = Why::Choice("2.34 has removed the operation; castored serves older clients with it");
const TIMES: Why = Why::StockIsWrong("2.34 does not fill in when and how often it built, which earlier releases do");
const NOT_ASKED: Why = Why::Choice("of a path that is there, nothing is asked for; as 2.3.7 does it");
const LAX_PATHS: Why = Why::Choice("what names no output of any derivation is malformed at every minor");

/// All of them.
pub(super) const LIST: &[Known] = &[
    // The handshake.
    between(38, 38, known(&["handshake"], &["features"], Why::Choice("a feature of 2.35 that 2.34 does not know"))),
    // Malformed requests.
    known(&["1 path: empty"], END, Why::StockIsWrong("its worker dies of an assertion")),
    known(&["1 cut off"], END, Why::Choice("whose stream ends within a request is not told that it did")),
    known(&["35 bool of 2"], &["ending", "usable"], STRICT_BOOL),
    known(&["3 removed", "4 removed", "5 removed", "16 removed"], END, REMOVED),
    known(&["27 removed"], &["usable"], REMOVED),
    // Queries.
    known(&["38 unknown"], END, Why::StockIsWrong("it says that the archive follows before it looks for the path")),
    // Adding.
    between(25, 38, known(&["7 repair of 2"], &["ending", "usable"], STRICT_BOOL)),
    known(&["39 flags of 2"], &["ending", "usable"], STRICT_BOOL),
    between(18, 24, known(&["7 old fixed 2"], &["ending", "usable", "info[0].known"], STRICT_BOOL)),
    between(
        18,
        24,
        known(
            &["7 old flat program"],
            &["info[0].known.narHash", "info[0].known.narSize"],
            Why::StockIsWrong("one path for two contents: the flat hash does not cover the executable bit it keeps"),
        ),
    ),
    between(18, 24, known(&["7 old unknown algorithm"], &["usable"], NO_DRAIN)),
    between(
        18,
        24,
        known(
            &["7 old padding"],
            &["usable"],
            Why::Choice("where a malformed archive ends cannot be known, so the connection ends"),
        ),
    ),
    between(
        25,
        38,
        known(
            &[
                "7 fixed:r:blake3",
                "7 fixed:git:sha1",
                "7 text:",
                "7 fixed:",
                "7 fixed:x:sha256",
                "7 fixed:sha3",
                "7 sha256",
                "7 ",
            ],
            &["usable"],
            NO_DRAIN,
        ),
    ),
    between(25, 38, known(&["7 text:sha1"], END, Why::StockIsWrong("its worker dies of an assertion"))),
    between(
        25,
        38,
        known(&["7 frame cut off"], END, Why::Choice("whose stream ends within a payload is not told that it did")),
    ),
    between(
        25,
        38,
        known(
            &["7 trailing bytes"],
            END,
            Why::StockIsWrong("it registers a path whose hash covers bytes that are not in its contents"),
        ),
    ),
    between(
        25,
        38,
        for_root(known(
            &["39 trailing bytes"],
            &["ending", "info[0].known"],
            Why::Choice("bytes after the archive are an error, and not passed over"),
        )),
    ),
    between(21, 21, known(&["39 content-addressed again"], &["payload left"], NOT_ASKED)),
    between(21, 21, for_user(known(&["39 repair of what is there"], &["payload left"], NOT_ASKED))),
    known(
        &["39 size of zero"],
        &["ending", "info[0].known"],
        Why::Choice("a size of 0 is that of a path whose size nobody knows, as in path infos"),
    ),
    known(&["44 count too small"], END, Why::Choice("bytes after the last path are an error, and not passed over")),
    for_root(known(
        &["44 references after"],
        &["ending", "info[0].known", "info[1].known"],
        Why::Choice("paths may come in any order where they are registered together"),
    )),
    // Builds.
    between(18, 29, known(&["40 no outputs", "40 bad output", "40 output of an output"], END, LAX_PATHS)),
    between(18, 29, known(&["9 no outputs", "46 no outputs"], END, LAX_PATHS)),
    known(
        &["46 unknown derivation"],
        &["results[0].status", "results[0].startTime", "results[0].stopTime"],
        Why::Choice("a derivation that is not there is no dependency that failed"),
    ),
    known(
        &["46 unknown output"],
        END,
        Why::StockIsWrong("one bad path of many fails the whole request, whose failures should be results"),
    ),
    between(
        29,
        38,
        known(
            &["46 all outputs", "46 one output", "46 an input first", "46 again, check"],
            &["results[0].timesBuilt", "results[0].startTime", "results[0].stopTime"],
            TIMES,
        ),
    ),
    between(
        29,
        38,
        known(
            &[
                "46 failure",
                "46 dependency",
                "46 no output made",
                "46 forbidden reference",
                "46 foreign system",
                "46 a failure and a success",
                "46 fixed output",
                "46 random, check",
                "46 timeout",
                "46 hash mismatch",
            ],
            &["results[0].timesBuilt", "results[0].startTime", "results[0].stopTime"],
            TIMES,
        ),
    ),
    between(
        18,
        25,
        known(
            &["9 two failures"],
            &["error.status"],
            Why::Choice("without keep-going the first failure ends the request; which one is first is not said"),
        ),
    ),
    between(29, 38, for_root(known(&["36", "36 check"], &["timesBuilt", "startTime", "stopTime"], TIMES))),
    between(29, 38, known(&["36 fixed"], &["timesBuilt", "startTime", "stopTime"], TIMES)),
    for_root(known(
        &["36 fixed elsewhere"],
        &["*"],
        Why::Choice("a fixed output that is not where its hash puts it is refused, as 2.35 does it"),
    )),
    // Realisations.
    known(&["43 bad"], &["usable"], Why::Choice("a malformed argument ends the connection, whatever it is")),
    between(
        31,
        38,
        known(&["42 bad"], &["usable"], Why::Choice("a malformed argument ends the connection, whatever it is")),
    ),
    // Roots, signatures, logs.
    known(&["37 unknown path"], END, Why::StockIsWrong("its worker dies of an assertion")),
    for_root(known(&["45 not a derivation"], END, Why::StockIsWrong("its worker dies of an assertion"))),
    for_user(known(&["45", "45 not a derivation", "45 unknown"], &["usable"], NO_DRAIN)),
    for_user(known(
        &["47*"],
        &["usable"],
        Why::StockIsWrong("it ends the connection although it has read all of the request that it refuses"),
    )),
    // Garbage.
    known(&["20 dead with paths"], &["paths"], Why::StockIsWrong("it overlooks the paths and lists all that is dead")),
    known(
        &["20 delete with paths"],
        END,
        Why::StockIsWrong("it passes over the paths and deletes everything that is dead"),
    ),
];

/// The same for the operations that 2.34 has removed, beside 2.26.3.
pub(super) const REMOVED_LIST: &[Known] = &[
    between(35, 38, known(&["handshake"], &["nix", "features"], Why::Choice("castored follows another release"))),
    known(&["5 signed"], END, Why::StockIsWrong("its worker dies over a path that has references")),
];
