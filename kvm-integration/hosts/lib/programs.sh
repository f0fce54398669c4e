# The programs of this package and its suite, as files that need no library. Sourced.
# shellcheck shell=bash disable=SC2034,SC2154 # What other parts set or use.

readonly programs=(chaos dirty-limit guestperf live-migration mini-vmm pacing-lab)

# programs_build FOLDER: builds them all and puts them, and `kvm`, the suite, into FOLDER.
programs_build() {
    local folder=$1 target built=$kept/built-$architecture file
    command -v cargo > /dev/null || cannot_be_had "cargo is missing: the programs are built from source"
    export RUSTFLAGS="-C target-feature=+crt-static" CARGO_PROFILE_RELEASE_STRIP=debuginfo
    # The guest is built for pages of one size.
    export TINY_GUEST_PAGE_KIB=${pages%k}
    case $architecture in
        amd64) target=x86_64-unknown-linux-gnu ;;
        arm64) target=aarch64-unknown-linux-gnu && rust_for_arm64 ;;
    esac
    say "building the programs for $architecture"
    (cd "$workspace" && cargo build --quiet --release --target "$target" --package kvm-integration --bins --test kvm \
        --message-format json-render-diagnostics) > "$built" || { say "the programs can't be built"; exit 1; }
    for file in "${programs[@]}" kvm; do
        cp "$(sed -n "s/.*\"name\":\"$file\".*\"executable\":\"\([^\"]*\)\".*/\1/p" "$built" | tail -n 1)" "$folder/$file"
    done
}

# rust_for_arm64: from Debian, the one Rust at hand that has a standard library for both architectures.
rust_for_arm64() {
    local rust=$kept/rust-arm64 std=$kept/rust-arm64-std
    # shellcheck source=/dev/null
    [ "$(. /etc/os-release && echo "$ID $VERSION_ID")" = "debian 12" ] ||
        cannot_be_had "the compiler for arm64 is Debian 12's and uses the machine's C library, and this is not Debian 12"
    unpack "$rust" bookworm amd64 '^(rustc-web|libstd-rust|libllvm|libz3|libedit|libxml2|libicu|libffi|.*arm64|.*aarch64|lib(bfd|ctf|mpc|mpfr|gmp|isl|jansson|bsd|md|zstd|tinfo))|^zlib1g$|^binutils-common$' rustc-web gcc-aarch64-linux-gnu libc6-dev-arm64-cross
    unpack "$std" bookworm arm64 '^libstd-rust-web-dev$' libstd-rust-web-dev
    # A compiler looks for all standard libraries beside itself.
    ln -sfn "$std/usr/lib/rustlib/aarch64-unknown-linux-gnu" "$rust/usr/lib/rustlib/"
    printf '#!/bin/sh\nexport LD_LIBRARY_PATH=%s\nexec %s "$@"\n' "$rust/usr/lib/x86_64-linux-gnu" "$rust/usr/bin/rustc" > "$rust/rustc"
    chmod +x "$rust/rustc"
    export RUSTC=$rust/rustc CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=$rust/usr/bin/aarch64-linux-gnu-gcc
}
