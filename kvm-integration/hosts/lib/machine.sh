# The emulated machine: what it boots, and one bounded run of it. Sourced.
# shellcheck shell=bash disable=SC2034,SC2154 # What other parts set or use.

# quoted WORD...: each so that a shell reads it as it is.
quoted() {
    local word
    for word; do printf " '%s'" "${word//\'/\'\\\'\'}"; done
}

# machine_initramfs FILE WORD...: one with busybox, KVM, our programs and a job of the commands in WORDs, which `+`
# separates.
machine_initramfs() {
    local file=$1 tree=$run/tree option parts word
    shift
    mkdir -p "$tree"/{bin,modules}
    cp "$guest_busybox" "$tree/bin/busybox"
    programs_build "$tree/bin"
    kernel_modules "$tree/modules" "${modules[@]}"
    cp "$hosts/guest/init" "$tree/init"
    cp "$hosts/guest/suite" "$tree/bin/suite"
    grep -v -e '^#' -e '^$' "$hosts/$host.skipped" > "$tree/skipped" || true
    {
        echo "processor='$processor' output=$output limit=$((limit / slowness)) shown='${shown[*]}' programs='${programs[*]} kvm'"
        for option in "${module_options[@]}"; do echo "options_${option%% *}='${option#* }'"; done
        echo "export KVM_REQUIRED=1 LIMIT=$((limit / slowness)) EACH=$each ${environment[*]}"
        echo 'job() {'
        parts=()
        for word in "$@" +; do
            if [ "$word" != + ]; then
                parts+=("$word")
            elif [ "${#parts[@]}" != 0 ]; then
                echo "    one$(quoted "${parts[@]}")"
                parts=()
            fi
        done
        echo '}'
    } > "$tree/job"
    chmod +x "$tree/init" "$tree"/bin/*
    (cd "$tree" && find . | "$busybox" cpio -o -H newc -R 0:0 2> /dev/null | gzip -1) > "$file"
    rm -r "$tree"
}

# machine_run: boots $command_line once, passes on what it says, sets $status to that of the job, or to nothing if the
# machine came to no end.
machine_run() {
    local console held=
    : > "$run/console"
    : > "$run/output"
    # With all that it has started: an emulator that hangs is not asked twice.
    timeout --kill-after=10 "$((limit + 30))" "${command_line[@]}" > "$run/emulator" 2>&1 < /dev/null &
    emulator=$!
    trap 'kill "$emulator" 2> /dev/null; exit 1' INT TERM
    tail --pid="$emulator" --lines=+1 --follow "$run/console" | tr -d '\r' >&2 &
    console=$!
    # Where nobody watches it is held until the end, so that a run that is repeated leaves nothing.
    if [ -t 1 ]; then
        tail --pid="$emulator" --lines=+1 --follow "$run/output" | tr -d '\r' &
        held=$!
    fi
    wait "$emulator" || true
    trap - INT TERM
    # shellcheck disable=SC2086 # One or two.
    wait $console $held
    status=$(tr -d '\r' < "$run/console" | sed -n 's/^host: done \([0-9]*\)$/\1/p' | tail -n 1)
    if [ -n "$status" ] && [ -z "$held" ]; then tr -d '\r' < "$run/output"; fi
}
