# Appended to the suite's common.sh.in: what restart.sh is for later suites. The file is read more than once, and some
# tests have ended their daemon themselves.
if ! declare -F clearDirectories >/dev/null; then
    eval "clearDirectories() $(declare -f clearStore | tail -n +2)"
fi
clearStore() {
    local running=${pidDaemon-} remote=${NIX_REMOTE-}
    if ! kill -0 "${running:-none}" 2>/dev/null; then running=; fi
    if [[ -n $running ]]; then
        killDaemon
        export NIX_REMOTE=
    fi
    clearDirectories
    if [[ -n $running ]]; then
        startDaemon
        export NIX_REMOTE=$remote
    fi
}
