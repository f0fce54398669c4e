# Debian's kernels: which package has which, and what is in it. Sourced.
# shellcheck shell=bash disable=SC2034,SC2154 # What other parts set or use.

# kernel_fetch WHICH: sets $kernel_folder, $kernel_image and $kernel_version.
kernel_fetch() {
    local release name
    case $1 in
        6.1) release=bookworm ;;
        6.12) release=trixie ;;
        newest) release=sid ;;
    esac
    # Those for clouds have all of KVM and few drivers. For pages of 16 KiB there is none.
    case $pages in
        4k) name=linux-image-cloud-$architecture ;;
        16k) name=linux-image-$architecture-16k ;;
    esac
    kernel_folder=$kept/kernel-$1-$architecture-$pages
    # What a kernel's package depends on, for its installation, is of no use here. From Linux 7 on kernel and modules are
    # packages of their own.
    unpack "$kernel_folder" "$release" "$architecture" '^linux-(image|binary|modules)-' "$name"
    # In boot/, or, from Linux 7 on, beside the modules.
    kernel_image=$(find "$kernel_folder" -name 'vmlinuz*' -type f | head -n 1)
    [ -n "$kernel_image" ] || cannot_be_had "$name of Debian $release holds no kernel"
    kernel_version=$(find "$kernel_folder" -path '*/lib/modules/*' -prune -printf %f)
}

# kernel_modules FOLDER MODULE...: puts MODULEs and those they need into FOLDER, and their order into FOLDER/order.
kernel_modules() {
    local folder=$1 name file needed
    shift
    for name; do
        name=${name//-/_}
        [ ! -e "$folder/$name.ko" ] || continue
        file=$(find "$kernel_folder" -name "$name.ko*" -o -name "${name//_/-}.ko*" | head -n 1)
        # Built in.
        [ -n "$file" ] || continue
        case $file in
            *.xz) "$busybox" xz -dc "$file" > "$folder/$name.ko" ;;
            *) cp "$file" "$folder/$name.ko" ;;
        esac
        needed=$(tr '\0' '\n' < "$folder/$name.ko" | sed -n 's/^depends=//p' | tr , ' ')
        # shellcheck disable=SC2086 # One word a module.
        kernel_modules "$folder" $needed
        echo "$name" >> "$folder/order"
    done
}
