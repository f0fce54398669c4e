// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The virtual machine: memory, a vCPU on a thread of its own, and a device.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use kvm_dirty_ring::{DirtyLog, GuestMap, GuestRegion, SlotId, vm_memory::RegionBitmap};
use serde_json::Value;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// What the VMM writes through it is marked as dirty.
pub type Memory = GuestMemoryMmap<RegionBitmap>;
/// Creates the slot in KVM, or sets its `KVM_MEM_LOG_DIRTY_PAGES`.
pub type SetLogged = Box<dyn Fn(bool) -> std::io::Result<()>>;
/// Runs a vCPU, from a state or null, until `STOP`. Returns the state it is in by then.
pub type Vcpu = Box<dyn FnOnce(Value) -> Result<Value> + Send>;

/// All memory is one slot, from address 0 on.
pub const SLOT: SlotId = SlotId::new(0, 0);
pub const MEMORY: usize = 64 << 20;
/// Where the device writes the count that it received last.
pub const COUNT: GuestAddress = GuestAddress(1 << 20);
/// How long the other process, or the guest, may be silent; and rounds may go on.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// How far the vCPU counts before its migration, and after it.
const COUNTS: u32 = 1000;
/// Asks the vCPU's thread to stop.
pub static STOP: AtomicBool = AtomicBool::new(false);

pub struct Machine {
    pub set_logged: SetLogged,
    pub log: DirtyLog,
    pub map: GuestMap,
    pub memory: Memory,
}

impl Machine {
    pub fn new(memory: Memory, set_logged: SetLogged, log: DirtyLog) -> Result<Self> {
        let bitmap = memory.iter().next().context("no memory")?.bitmap();
        log.add_slot_with(SLOT, bitmap.region())?;
        log.stop_tracking(SLOT, || set_logged(false))?;
        let map = GuestMap::new([GuestRegion {
            slot: SLOT,
            address: 0,
            pages: bitmap.region().pages(),
        }])?;
        Ok(Self {
            set_logged,
            log,
            map,
            memory,
        })
    }

    /// Lets the guest begin, or go on, and waits until it has counted a while.
    pub fn start(&self, vcpu: Vcpu, state: Value) -> Result<JoinHandle<Result<Value>>> {
        // It does nothing: interrupting `KVM_RUN` is all the signal is for.
        extern "C" fn nothing(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        register_signal_handler(SIGRTMIN(), nothing)?;
        let count = || self.memory.read_obj::<u32>(COUNT);
        let (start, before) = (Instant::now(), count()?);
        let thread = spawn(move || vcpu(state));
        while count()?.wrapping_sub(before) < COUNTS && !thread.is_finished() {
            ensure!(start.elapsed() < PATIENCE, "the guest is silent");
            sleep(Duration::from_millis(1));
        }
        Ok(thread)
    }

    /// Stops the vCPU for good. Returns its state.
    pub fn stop(&self, thread: JoinHandle<Result<Value>>) -> Result<Value> {
        STOP.store(true, Relaxed);
        // Until it has ended: a signal that comes right before `KVM_RUN` interrupts nothing.
        while !thread.is_finished() {
            thread.kill(SIGRTMIN())?;
            sleep(Duration::from_micros(200));
        }
        thread.join().map_err(|_| anyhow!("the vCPU panicked"))?
    }

    pub fn checksum(&self) -> Result<u32> {
        let mut bytes = vec![0; MEMORY];
        self.memory.read_slice(&mut bytes, GuestAddress(0))?;
        Ok(crc32fast::hash(&bytes))
    }
}

/// Puts the count it receives into memory. A guest that does not go on where it was is found out.
pub fn device(memory: &Memory, told: &[u8]) -> Result<()> {
    let count = u32::from_le_bytes(told.try_into()?);
    let before: u32 = memory.read_obj(COUNT)?;
    ensure!(count == before.wrapping_add(1), "{count} after {before}");
    Ok(memory.write_obj(count, COUNT)?)
}
