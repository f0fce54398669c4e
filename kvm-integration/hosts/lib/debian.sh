# Packages of Debian, unpacked beside: nothing is installed, and the machine's own apt is only read. Sourced.
#
# Each release and architecture has an apt of its own, which believes that nothing is installed; so a program comes with
# all that it needs, its C library too, and runs by its own loader whatever the machine has.
# shellcheck shell=bash disable=SC2034,SC2154 # What other parts set or use.

# debian_needs: what all of this stands on.
debian_needs() {
    local tool
    for tool in apt-get apt-cache dpkg; do
        command -v "$tool" > /dev/null || cannot_be_had "$tool is missing: this takes all it needs from Debian's packages, so it runs on Debian 12"
    done
    [ "$(dpkg --print-architecture)" = amd64 ] || cannot_be_had "this is not Debian for amd64"
    [ -r /usr/share/keyrings/debian-archive-keyring.gpg ] || cannot_be_had "Debian's keys are missing: install debian-archive-keyring"
}

# mirror NAME: the machine's mirror of the archive called NAME (debian, debian-security).
mirror() {
    local uri
    uri=$({ cat /etc/apt/sources.list /etc/apt/sources.list.d/*.{sources,list} 2> /dev/null || true; } |
        sed -n 's/^URIs: *\([^ ]*\).*/\1/p; s/^deb \(\[[^]]*\] *\)\{0,1\}\([^ ]*\) .*/\2/p' |
        sed 's|/*$||' | grep -m 1 "/$1\$") || cannot_be_had "the machine's apt names no mirror that ends in /$1"
    echo "$uri"
}

# debian RELEASE ARCHITECTURE COMMAND...: runs COMMAND with that release's apt.
debian() {
    local release=$1 architecture=$2 apt=$kept/apt/$1-$2
    shift 2
    if [ ! -e "$apt/updated" ]; then
        local key='[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]' archive security
        archive=$(mirror debian) || exit
        security=$(mirror debian-security) || exit
        mkdir -p "$apt"/{lists,archives}/partial "$apt"/{apt.conf,preferences}.d
        : > "$apt/status"
        echo "deb $key $archive $release main" > "$apt/sources.list"
        [ "$release" = sid ] || echo "deb $key $security $release-security main" >> "$apt/sources.list"
        # A mirror that stands still is good enough: what counts is who has signed it.
        cat > "$apt/apt.conf" <<CONF
Dir::Etc "$apt";
Dir::State "$apt";
Dir::State::lists "$apt/lists";
Dir::State::status "$apt/status";
Dir::Cache "$apt";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
Dir::Cache::archives "$apt/archives";
APT::Architecture "$architecture";
APT::Architectures { "$architecture"; };
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::GzipIndexes "true";
Acquire::Retries "3";
APT::Update::Error-Mode "any";
Acquire::Check-Valid-Until "false";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
CONF
        say "fetching the lists of Debian $release for $architecture"
        APT_CONFIG=$apt/apt.conf timeout 600 apt-get update -qq >&2 ||
            cannot_be_had "the lists of Debian $release for $architecture can't be fetched"
        touch "$apt/updated"
    fi
    APT_CONFIG=$apt/apt.conf timeout 1200 "$@"
}

# unpack FOLDER RELEASE ARCHITECTURE PATTERN PACKAGE...: unpacks PACKAGEs and those that they need into FOLDER, as far
# as PATTERN matches their names, unless that was done before.
unpack() {
    local folder=$1 release=$2 architecture=$3 pattern=$4 names
    shift 4
    [ ! -e "$folder/unpacked" ] || return 0
    rm -rf "$folder"
    mkdir -p "$folder/packages"
    names=$(debian "$release" "$architecture" apt-get install --simulate "$@") ||
        cannot_be_had "Debian $release for $architecture does not offer $*"
    names=$(sed -n 's/^Inst \([^ ]*\) .*/\1/p' <<< "$names" | grep -E "$pattern") ||
        cannot_be_had "Debian $release for $architecture: nothing of $* is to be unpacked"
    say "fetching from Debian $release for $architecture: $*"
    # shellcheck disable=SC2086 # One word a package.
    (cd "$folder/packages" && debian "$release" "$architecture" apt-get download -qq $names >&2) ||
        cannot_be_had "Debian $release for $architecture: $* can't be fetched"
    local package
    for package in "$folder"/packages/*.deb; do dpkg -x "$package" "$folder"; done
    # A record of the versions.
    ls "$folder/packages" > "$folder/packages.txt"
    rm -r "$folder/packages"
    mv "$folder/packages.txt" "$folder/unpacked"
}

# version FOLDER PACKAGE: the version of what was unpacked, as its makers call it.
version() { sed -n "s/^$2_\(.*%3a\)\{0,1\}\([0-9.]*\).*/\2/p" "$1/unpacked"; }

# by_loader FOLDER PROGRAM ARGS...: makes the array `command_line`, which runs what was unpacked into FOLDER.
by_loader() {
    local libraries=$1/usr/lib/x86_64-linux-gnu
    command_line=("$1/usr/lib64/ld-linux-x86-64.so.2" --library-path "$libraries:$libraries/pulseaudio" "$1/usr/bin/$2" "${@:3}")
}
