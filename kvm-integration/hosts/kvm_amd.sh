# kvm_amd with nested paging, in QEMU. Sourced by `run`.
# shellcheck shell=bash disable=SC2034,SC2154
architecture=amd64
kernels=(newest 6.1 6.12) # The first unless one is asked for.
cpus=2
each=240
slowness=1
console=ttyS0
output=ttyS1
modules=(kvm-amd)
module_options=()
shown=(kvm_amd/parameters/npt kvm_amd/parameters/pml kvm/parameters/{tdp_mmu,eager_page_split})
environment=(KVM_SUITE_SCALE=0.1)

settle() { :; }

refused() { :; }

emulator() {
    local machine=$kept/qemu-x86
    unpack "$machine" trixie amd64 . qemu-system-x86
    emulated_by="QEMU $(version "$machine" qemu-system-x86)"
    by_loader "$machine" qemu-system-x86_64 -L "$machine/usr/share/qemu" -L "$machine/usr/share/seabios" \
        `# One thread for all CPUs: with one for each QEMU hung, or reset itself, in storms of signals.` \
        -machine q35 -accel tcg,thread=single -cpu EPYC,+svm,+npt -smp "$cpus" -m 4G \
        -display none -monitor none -nic none -no-reboot \
        -serial "file:$run/console" -serial "file:$run/output" \
        -kernel "$kernel_image" -initrd "$run/initramfs" \
        `# On a busy machine the timer falls behind what the kernel checks it against.` \
        -append "console=$console quiet panic=-1 no_timer_check"
    export QEMU_MODULE_DIR=$machine/usr/lib/x86_64-linux-gnu/qemu
}
