# KVM on 64-bit Arm, in QEMU. Sourced by `run`.
# shellcheck shell=bash disable=SC2034,SC2154
architecture=arm64
kernels=(6.12 newest) # The first unless one is asked for.
cpus=2
each=240
slowness=1
console=ttyAMA0
output=ttyAMA1
modules=() # KVM is built in.
module_options=()
shown=()
environment=(KVM_SUITE_SCALE=0.1)

settle() {
    # The fastest has no pages of 16 KiB. That which has them has VHE, too.
    processor=cortex-a72
    [ "$pages" = 4k ] || processor=neoverse-n1
}

refused() {
    [ "$kernel" != 6.1 ] || echo "KVM on arm64 has no dirty rings before Linux 6.2"
}

emulator() {
    local machine=$kept/qemu-arm
    unpack "$machine" trixie amd64 . qemu-system-arm
    emulated_by="QEMU $(version "$machine" qemu-system-arm)"
    by_loader "$machine" qemu-system-aarch64 -L "$machine/usr/share/qemu" \
        -machine virt,virtualization=on,gic-version=3 -accel tcg,thread=single -cpu "$processor" -smp "$cpus" -m 3G \
        -display none -monitor none -nic none -no-reboot \
        -serial "file:$run/console" -serial "file:$run/output" \
        -kernel "$kernel_image" -initrd "$run/initramfs" \
        -append "console=$console quiet panic=-1 rcupdate.rcu_cpu_stall_suppress=1"
    export QEMU_MODULE_DIR=$machine/usr/lib/x86_64-linux-gnu/qemu
}
