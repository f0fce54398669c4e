// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Rings handled by hand, without the log: to do what the log must not do, and see the harm.

use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;

use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING_ACQ_REL, kvm_dirty_gfn, kvm_enable_cap};
use kvm_dirty_ring::ring::{Entry, RingMemory, RingView};
use kvm_integration::{
    Action, Exit, GuestMemory, Load, Mode, TinyVcpu, TinyVm, VcpuThread, kvm_available,
};
use libtest_mimic::Failed;
use memmap2::MmapOptions;

use super::machine::{gpa, host_page_size, page_of};

const RESET_DIRTY_RINGS: u64 = 0xaec7;

/// Where in a vCPU's mapping its ring is, in pages of the host.
pub const RING_OFFSET_PAGES: u64 = 64;

/// The ring of a vCPU, and its machine.
pub struct RawRing {
    ring: RingView,
    vm: TinyVm,
}

/// A machine with one native vCPU that walks over the pages of slot 1, and a ring that is large
/// enough for all of them.
pub struct RawMachine {
    pub vcpu: VcpuThread,
    pub memory: Arc<GuestMemory>,
    ring: RawRing,
}

impl RawMachine {
    /// It pauses after each pass over its pages if `pass_exits`. Half of the ring must be enough.
    pub fn new(entries: u32, pages: u64, pass_exits: bool) -> Result<Self, Failed> {
        assert!(pages <= u64::from(entries / 2));
        let (ring, vcpu, memory) = RawRing::new(entries, pages, pass_exits)?;
        let vcpu = VcpuThread::spawn(vcpu, |exit| match exit {
            Exit::PassDone => Action::Pause,
            other => Action::Fail(format!("an exit was not asked for: {other:?}").into()),
        })?;
        Ok(Self { vcpu, memory, ring })
    }

    /// See [`RawRing::harvest`].
    pub fn harvest(&mut self) -> Vec<u64> {
        self.ring.harvest()
    }

    /// See [`RawRing::reset`].
    pub fn reset(&self) -> Result<usize, Failed> {
        self.ring.reset()
    }
}

/// Enables rings by hand.
pub fn enable(vm: &TinyVm, entries: u32) -> Result<(), kvm_ioctls::Error> {
    let mut enable = kvm_enable_cap {
        cap: KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
        ..Default::default()
    };
    enable.args[0] = u64::from(entries) * size_of::<kvm_dirty_gfn>() as u64;
    vm.vm_fd().enable_cap(&enable)
}

impl RawRing {
    /// The ring of a native vCPU that walks over the pages of slot 1, before it runs, and these pages.
    pub fn new(
        entries: u32,
        pages: u64,
        pass_exits: bool,
    ) -> Result<(Self, TinyVcpu, Arc<GuestMemory>), Failed> {
        let vm = TinyVm::new(&kvm_available()?)?;
        enable(&vm, entries)?;
        let memory = Arc::new(GuestMemory::new(pages)?);
        vm.add_slot(1, gpa(1), Arc::clone(&memory), true)?;
        let list = (0..pages).map(|page| page_of(1, page)).collect();
        let mut load = Load::new(Mode::Native, list);
        load.pass_exits = pass_exits;
        let vcpu = vm.create_vcpu(0, &load)?;
        let map = MmapOptions::new()
            .offset(RING_OFFSET_PAGES * host_page_size())
            .len(entries as usize * size_of::<kvm_dirty_gfn>())
            .map_raw(vcpu.fd())?;
        let start = NonNull::new(map.as_mut_ptr().cast::<Entry>()).expect("a mapping is not null");
        // SAFETY: the mapping has that many entries and is owned by the ring; only the ring's view
        // and the kernel access it.
        let ring = RingView::new(unsafe { RingMemory::new(start, entries, Box::new(map)) });
        Ok((Self { ring, vm }, vcpu, memory))
    }

    /// The pages in the ring, which are marked for the next reset.
    pub fn harvest(&mut self) -> Vec<u64> {
        let mut pages = Vec::new();
        self.ring.harvest(|_slot, page| pages.push(page));
        pages
    }

    /// See [`reset`].
    pub fn reset(&self) -> Result<usize, Failed> {
        reset(&self.vm)
    }
}

/// The bare ioctl. How many entries it recycled.
pub fn reset(vm: &TinyVm) -> Result<usize, Failed> {
    // SAFETY: the ioctl takes no argument.
    let recycled = unsafe { libc::ioctl(vm.vm_fd().as_raw_fd(), RESET_DIRTY_RINGS as _) };
    usize::try_from(recycled).map_err(|_| std::io::Error::last_os_error().into())
}
