# shellcheck shell=bash
# Debian packages for the scripts beside this file: looked up, downloaded and unpacked by apt and dpkg, never installed.
# Everything apt writes goes below the cache, so that neither root nor a package list on the machine is needed.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
mkdir -p "${DAXVM_CACHE:-$root/target/cache}"
cache=$(cd "${DAXVM_CACHE:-$root/target/cache}" && pwd)
apt_lists=()   # empty: the machine's own package lists
apt_sources=() # empty: the machine's own sources

say() { printf '%s\n' "$*" >&2; }
die() { say "$(basename "$0"): $*"; exit 1; }

# need PROGRAM PACKAGE: a program this script cannot do without.
need() { command -v "$1" >/dev/null || die "needs the program $1: apt-get install $2"; }

# apt TOOL ARG...: an apt program that keeps its state in the cache and takes no lock of the system.
apt() {
    local tool=$1
    shift
    mkdir -p "$cache/apt/lists/partial" "$cache/apt/archives/partial"
    "$tool" -q -o Dir::Cache="$cache/apt" -o Debug::NoLocking=1 -o APT::Sandbox::User=root \
        -o APT::Get::List-Cleanup=0 "${apt_lists[@]}" "${apt_sources[@]}" "$@"
}

# with_lists COMMAND...: runs COMMAND with the machine's package lists and, if it fails, with lists fetched now. On a new
# machine the lists are empty, on an old one they name packages that are gone from the mirror.
with_lists() {
    "$@" && return
    say "fetching package lists"
    apt_lists=(-o Dir::State::lists="$cache/apt/lists")
    apt apt-get update >&2 || say "apt-get update had errors; trying what it could fetch"
    "$@"
}

# newest_package REGEX: the newest package whose name matches, as apt lists them.
newest_package() {
    apt apt-cache search --names-only "$1" 2>/dev/null | cut -d' ' -f1 | sort -V | tail -n 1 | grep .
}

# download DIR PACKAGE...: leaves the .deb files in DIR.
download() {
    local dir=$1
    shift
    mkdir -p "$dir"
    say "downloading $*"
    (cd "$dir" && apt apt-get download "$@" >&2)
}

# unpack DEBS DIR: unpacks every package in DEBS over DIR.
unpack() {
    local deb
    mkdir -p "$2"
    for deb in "$1"/*.deb; do
        dpkg -x "$deb" "$2"
    done
}
