//! Store paths over the castore: path infos, roots, garbage collection, NAR in and out, trust.

pub mod view;
