//! The operations of the worker protocol and their numbers.

use crate::wire::wire_enum;

wire_enum! {
    /// What a client can ask for. Numbers that are missing were never used, or no release since Nix 2.0 has them.
    pub enum Operation {
        /// Is this path valid?
        IsValidPath = 1,
        /// Does a substituter have this path? Obsolete.
        HasSubstitutes = 3,
        /// The NAR hash of a path. Obsolete.
        QueryPathHash = 4,
        /// The references of a path. Obsolete.
        QueryReferences = 5,
        /// The paths that refer to a path.
        QueryReferrers = 6,
        /// Adds a file or tree under a content address.
        AddToStore = 7,
        /// Adds a text, for clients below 1.25.
        AddTextToStore = 8,
        /// Builds or substitutes.
        BuildPaths = 9,
        /// Makes a path valid by substitution.
        EnsurePath = 10,
        /// Keeps a path from the collector while the connection lives.
        AddTempRoot = 11,
        /// Registers a symlink outside the state directory as a root.
        AddIndirectRoot = 12,
        /// Waits for the collector. Obsolete.
        SyncWithGc = 13,
        /// Lists the collector's roots.
        FindRoots = 14,
        /// Streams a path as an export record. For clients below 1.17.
        ExportPath = 16,
        /// The deriver of a path. Obsolete.
        QueryDeriver = 18,
        /// Tells the client's settings.
        SetOptions = 19,
        /// Runs the garbage collector.
        CollectGarbage = 20,
        /// What a substituter knows about a path.
        QuerySubstitutablePathInfo = 21,
        /// The output paths of a derivation. Obsolete.
        QueryDerivationOutputs = 22,
        /// All valid paths.
        QueryAllValidPaths = 23,
        /// Everything known about a path.
        QueryPathInfo = 26,
        /// Imports an export stream. For clients below 1.18.
        ImportPaths = 27,
        /// The output names of a derivation. Obsolete.
        QueryDerivationOutputNames = 28,
        /// Finds a path by the hash part of its name.
        QueryPathFromHashPart = 29,
        /// What substituters know about many paths.
        QuerySubstitutablePathInfos = 30,
        /// Which of these paths are valid?
        QueryValidPaths = 31,
        /// Which of these paths do substituters have?
        QuerySubstitutablePaths = 32,
        /// The derivations that have this path as an output.
        QueryValidDerivers = 33,
        /// Deduplicates the store.
        OptimiseStore = 34,
        /// Checks the store.
        VerifyStore = 35,
        /// Builds a derivation that is sent along.
        BuildDerivation = 36,
        /// Adds signatures to a path.
        AddSignatures = 37,
        /// Streams a path as a NAR.
        NarFromPath = 38,
        /// Adds a NAR with its path info.
        AddToStoreNar = 39,
        /// What would building these paths take?
        QueryMissing = 40,
        /// The outputs of a derivation by name.
        QueryDerivationOutputMap = 41,
        /// Records the realisation of a derivation output.
        RegisterDrvOutput = 42,
        /// Looks up a realisation.
        QueryRealisation = 43,
        /// Adds many NARs in one stream.
        AddMultipleToStore = 44,
        /// Stores the log of a build.
        AddBuildLog = 45,
        /// Builds or substitutes, and tells each result.
        BuildPathsWithResults = 46,
        /// Creates a symlink to a path and registers it as a root.
        AddPermRoot = 47,
    }
}
