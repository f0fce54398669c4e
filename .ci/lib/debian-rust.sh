# SPDX-License-Identifier: Apache-2.0 OR MIT
# Debian's Rust with the sources of the standard library, for builds that need their own. Sourced.
# shellcheck shell=bash

# Installs it where it is missing.
install_debian_rust() {
    if [ -d "$(/usr/bin/rustc --print sysroot 2> /dev/null)/lib/rustlib/src/rust/library" ]; then return; fi
    if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
        echo "install Debian's packages rustc-web and rust-web-src"
        exit 1
    fi
    apt-get update && apt-get install --yes rustc-web rust-web-src
}
