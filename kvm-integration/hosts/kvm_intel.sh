# kvm_intel with EPT and page-modification logging (PML), in Bochs: QEMU emulates neither. Sourced by `run`.
# shellcheck shell=bash disable=SC2034,SC2154
architecture=amd64
kernels=(6.1 6.12 newest) # The first unless one is asked for.
cpus=1        # With one, what a PML buffer holds while its vCPU is elsewhere can't be seen.
each=400
slowness=3 # A second of the machine takes two or three of ours.
console=ttyS0
output=ttyS1
modules=(kvm-intel)
shown=(kvm_intel/parameters/ept kvm_intel/parameters/pml kvm/parameters/{tdp_mmu,eager_page_split})
environment=(KVM_SUITE_SCALE=0.05)

settle() { module_options=("kvm_intel pml=$pml"); }

refused() { :; }

emulator() {
    # Debian 12's own is 2.7, which logs addresses in the middle of pages by PML.
    local machine=$kept/bochs libraries=$kept/bochs/usr/lib/x86_64-linux-gnu disc=$run/disc
    unpack "$machine" trixie amd64 . bochs bochs-term bochsbios vgabios isolinux syslinux-common xorriso
    emulated_by="Bochs $(version "$machine" bochs)"

    mkdir -p "$disc/isolinux"
    cp "$kernel_image" "$disc/vmlinuz"
    cp "$run/initramfs" "$disc/initrd"
    cp "$machine/usr/lib/ISOLINUX/isolinux.bin" "$machine/usr/lib/syslinux/modules/bios/ldlinux.c32" "$disc/isolinux/"
    # The time-stamp counter counts what `ips` below says, and not what the processor says of itself. The self-tests of
    # cryptography would take a minute.
    cat > "$disc/isolinux/isolinux.cfg" <<CONF
default linux
prompt 0
timeout 1
label linux
 kernel /vmlinuz
 append initrd=/initrd console=$console,115200 quiet panic=-1 nokaslr tsc_early_khz=50000 tsc=reliable lpj=200000 mitigations=off random.trust_cpu=on cryptomgr.notests=1$([ "$cpus" != 1 ] || echo ' nosmp')
CONF
    by_loader "$machine" xorriso -as mkisofs -quiet -o "$run/iso" -b isolinux/isolinux.bin -c isolinux/boot.cat \
        -no-emul-boot -boot-load-size 4 -boot-info-table "$disc"
    "${command_line[@]}" > "$run/xorriso" 2>&1 || { cat "$run/xorriso" >&2; exit 1; }
    rm -r "$disc" "$run/initramfs"

    cat > "$run/bochsrc" <<CONF
cpu: model=corei7_skylake_x, count=$cpus, ips=50000000, reset_on_triple_fault=0, ignore_bad_msrs=1
memory: guest=768, host=768
romimage: file=$machine/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=$machine/usr/share/bochs/VGABIOS-lgpl-latest
display_library: term
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path=$run/iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$run/console
com2: enabled=1, mode=file, dev=$run/output
clock: sync=none, time0=utc
log: $run/bochs
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
CONF
    export LTDL_LIBRARY_PATH=$libraries/bochs/plugins BXSHARE=$machine/usr/share/bochs TERM=xterm
    by_loader "$machine" bochs-bin -q -f "$run/bochsrc"
    command_line=("$hosts/lib/bochs" "$run/screen" "${command_line[@]}")
}
