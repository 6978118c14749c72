# Appended to the suite's common/functions.sh. The suite clears a store by deleting its directories under a running
# daemon. One that owns the store, with a mount and an index of its own, has to be stopped before and started after.
# The file is read more than once.
if ! declare -F clearDirectories >/dev/null; then
    eval "clearDirectories() $(declare -f doClearStore | tail -n +2)"
fi
doClearStore() {
    local running=${_NIX_TEST_DAEMON_PID-} remote=${NIX_REMOTE-}
    if [[ -n $running ]]; then killDaemon; fi
    clearDirectories
    if [[ -n $running ]]; then
        startDaemon
        export NIX_REMOTE=$remote
    fi
}
