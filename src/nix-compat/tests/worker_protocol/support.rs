//! Helpers: protocols to test with, and a second, independent way to write messages down.

use nix_compat::store_path::{StoreDir, StorePath};
use nix_compat::worker::{Features, NEWEST_MINOR, OLDEST_MINOR, Protocol};

/// The parameters of a connection at 1.`minor`.
pub(crate) fn protocol(minor: u16, features: Features) -> Protocol {
    Protocol { minor, features, store_dir: StoreDir::default() }
}

/// Every version, and every set of features at the one that has them.
pub(crate) fn all_protocols() -> Vec<Protocol> {
    let plain = (OLDEST_MINOR..=NEWEST_MINOR).map(|minor| protocol(minor, Features::NONE));
    let features = [Features::REALISATION_WITH_PATH, Features::DELETE_REFERRERS, Features::ALL];
    plain.chain(features.map(|features| protocol(NEWEST_MINOR, features))).collect()
}

/// A store path with a hash part of one repeated digit.
pub(crate) fn path(digit: char, name: &str) -> StorePath {
    let hash_part: String = std::iter::repeat_n(digit, 32).collect();
    StorePath::from_base_name(&format!("{hash_part}-{name}")).unwrap()
}

/// An item of a message as the specification words it.
pub(crate) enum Item<'a> {
    /// An integer.
    N(u64),
    /// A string.
    S(&'a str),
}
pub(crate) use Item::{N, S};

/// Writes items without the code under test.
pub(crate) fn bytes(items: &[Item<'_>]) -> Vec<u8> {
    let mut message = Vec::new();
    for item in items {
        match item {
            N(number) => message.extend(number.to_le_bytes()),
            S(text) => {
                message.extend((text.len() as u64).to_le_bytes());
                message.extend(text.bytes());
                while message.len() % 8 != 0 {
                    message.push(0);
                }
            }
        }
    }
    message
}
