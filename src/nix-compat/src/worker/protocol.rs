//! What a connection's two ends agreed on.

use crate::store_path::StoreDir;

/// The newest minor version spoken here. Upstream adds feature strings since, no versions.
pub const NEWEST_MINOR: u16 = 38;
/// The oldest minor version spoken here: Nix 2.0 and everything since is newer.
pub const OLDEST_MINOR: u16 = 18;

/// The parameters of an established connection. Everything after the handshake is encoded by them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Protocol {
    /// Minor version: the lower one of client and server, between [`OLDEST_MINOR`] and [`NEWEST_MINOR`].
    pub minor: u16,
    /// Features that both ends named. Empty below 1.38.
    pub features: Features,
    /// The directory that store paths are printed and parsed with.
    pub store_dir: StoreDir,
}

impl Protocol {
    /// Whether the connection is at least at 1.`minor`.
    pub fn since(&self, minor: u16) -> bool {
        self.minor >= minor
    }

    /// Whether a feature was negotiated.
    pub fn has(&self, feature: Features) -> bool {
        self.features.contains(feature)
    }
}

/// A set of the features that change encodings although the version stays 1.38.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(u8);

impl Features {
    /// No feature.
    pub const NONE: Self = Self(0);
    /// Realisations are named by derivation path and output name, no longer by a hash; since Nix 2.35.
    pub const REALISATION_WITH_PATH: Self = Self(1);
    /// CollectGarbage says whether it means the whole store, and may delete referrers; since Nix 2.35.
    pub const DELETE_REFERRERS: Self = Self(2);
    /// Every feature spoken here.
    pub const ALL: Self = Self(Self::REALISATION_WITH_PATH.0 | Self::DELETE_REFERRERS.0);

    const NAMES: [(Self, &'static str); 2] = [
        (Self::REALISATION_WITH_PATH, "realisation-with-path-not-hash"),
        (Self::DELETE_REFERRERS, "delete-dead-specific-referrers"),
    ];

    /// Whether all of `other` are in this set.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The features of either set.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The features of both sets.
    #[must_use]
    pub fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// The names to announce.
    pub fn names(self) -> Vec<&'static str> {
        Self::NAMES.iter().filter(|(feature, _)| self.contains(*feature)).map(|(_, name)| *name).collect()
    }

    /// The feature with this name, or none: unknown names are left out of the negotiation.
    pub fn from_name(name: &[u8]) -> Self {
        Self::NAMES.iter().find(|(_, known)| known.as_bytes() == name).map_or(Self::NONE, |(feature, _)| *feature)
    }
}
