# What `run` says, always to stderr, and the ways in which it gives up. Sourced.
# shellcheck shell=bash disable=SC2034,SC2154 # What other parts set or use.

readonly EXIT_USAGE=64 EXIT_CANNOT_BE_HAD=69 EXIT_NO_END=70

say() { printf 'hosts/run: %s\n' "$*" >&2; }

# Asked for in a way that nobody understands.
usage() {
    say "$*"
    sed -n 's/^# \{0,1\}//; /^Usage:/,/^$/p' "${BASH_SOURCE[0]%/*}/../run" >&2
    exit "$EXIT_USAGE"
}

# Nothing has failed, but this host, here, is not to be had.
cannot_be_had() {
    say "CANNOT BE HAD: $*"
    exit "$EXIT_CANNOT_BE_HAD"
}
