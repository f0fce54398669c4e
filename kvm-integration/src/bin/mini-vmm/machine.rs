//! The virtual machine: memory, vCPUs on threads of their own, and a device.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use crc32fast::Hasher;
use kvm_dirty_ring::vm_memory::RegionBitmap;
use kvm_dirty_ring::{DirtyLog, GuestMap, GuestRegion, SlotId, VcpuRing};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::Result;

pub type Memory = GuestMemoryMmap<RegionBitmap>;

/// Where memory is, a slot each: code, page tables, and the device's pages; what vCPUs write.
pub const LOW: (GuestAddress, usize) = (GuestAddress(0), 2 << 20);
pub const RAM: (GuestAddress, usize) = (GuestAddress(1 << 30), 64 << 20);
/// Eight pages to which the device writes in turn, and one for its state.
const DEVICE: GuestAddress = GuestAddress(1 << 20);
pub const VCPUS: u32 = 2;

/// A vCPU, and its ring.
pub type Cpu = (Box<dyn Vcpu>, VcpuRing);

/// What a VMM asks of KVM about a VM.
pub trait Vm: Send + Sync {
    /// `KVM_SET_USER_MEMORY_REGION`; `host` is where the region's memory is in this process.
    fn set_region(&self, region: GuestRegion, host: *mut u8, logged: bool) -> io::Result<()>;
    /// Puts into memory what the guest needs to begin.
    fn load(&self, memory: &Memory) -> Result<()>;
    /// `KVM_CREATE_VCPU`, ready to begin; and its ring attached to the log.
    fn create_vcpu(&self, index: u32, log: &DirtyLog, memory: &Memory) -> Result<Cpu>;
}

/// What it asks about a vCPU.
pub trait Vcpu: Send {
    /// `KVM_RUN`.
    fn run(&mut self) -> Result<Exit>;
    /// Ends the access to a port for which it left the guest, without entering that again: else the
    /// state is that of a vCPU that has yet to make the access.
    fn finish(&mut self) -> Result<()>;
    fn save(&self) -> Result<Value>;
    fn restore(&mut self, state: &Value) -> Result<()>;
}

/// Why a vCPU has left the guest.
pub enum Exit {
    /// It has counted, aloud.
    Counted(u32),
    DirtyRingFull,
    /// A signal has come.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        expect(dead_code, reason = "none comes to a simulated vCPU")
    )]
    Interrupted,
}

/// All of a guest that is not its memory.
#[derive(Serialize, Deserialize)]
pub struct Guest {
    /// What each vCPU has counted last, and its registers: none before it has begun.
    vcpus: Vec<(u32, Option<Value>)>,
    device_writes: u64,
}

impl Guest {
    pub fn new() -> Self {
        Self {
            vcpus: (0..VCPUS).map(|_| (0, None)).collect(),
            device_writes: 0,
        }
    }

    pub fn counts(&self) -> impl Iterator<Item = u32> {
        self.vcpus.iter().map(|(count, _)| *count)
    }
}

/// A machine whose guest stands still.
pub struct Machine {
    vm: Box<dyn Vm>,
    pub log: DirtyLog,
    pub memory: Memory,
    pub map: GuestMap,
    vcpus: Vec<Cpu>,
}

impl Machine {
    pub fn new(sim: bool) -> Result<Self> {
        // The log comes before the first vCPU, and a slot into the log before it is made.
        let (vm, log) = create_vm(sim)?;
        let memory = Memory::from_ranges(&[LOW, RAM])?;
        let mut regions = Vec::new();
        for (id, region) in (0..).zip(memory.iter()) {
            let (slot, bitmap) = (SlotId::new(0, id), region.bitmap().region());
            log.add_slot_with(slot, bitmap)?;
            let (address, pages) = (region.start_addr().0, bitmap.pages());
            regions.push(GuestRegion {
                slot,
                address,
                pages,
            });
        }
        let map = GuestMap::new(regions)?;
        let mut machine = Self {
            vm,
            log,
            memory,
            map,
            vcpus: Vec::new(),
        };
        machine.track(false)?;
        for index in 0..VCPUS {
            let vcpu = machine
                .vm
                .create_vcpu(index, &machine.log, &machine.memory)?;
            machine.vcpus.push(vcpu);
        }
        Ok(machine)
    }

    /// Puts into memory what the guest needs to begin.
    pub fn load(&self) -> Result<()> {
        self.vm.load(&self.memory)
    }

    /// Creates the slots in KVM, or switches their `KVM_MEM_LOG_DIRTY_PAGES`.
    pub fn track(&self, on: bool) -> Result<()> {
        for &region in self.map.regions() {
            let host = self.memory.get_host_address(GuestAddress(region.address))?;
            let set = || self.vm.set_region(region, host, on);
            match on {
                true => self.log.start_tracking(region.slot, set)?,
                false => self.log.stop_tracking(region.slot, set)?,
            }
        }
        Ok(())
    }

    /// Of all memory.
    pub fn checksum(&self) -> Result<u32> {
        let mut hasher = Hasher::new();
        let mut bytes = vec![0; 1 << 20];
        for region in self.memory.iter() {
            for chunk in 0..region.len() / bytes.len() as u64 {
                let address = region.start_addr().0 + chunk * bytes.len() as u64;
                self.memory.read_slice(&mut bytes, GuestAddress(address))?;
                hasher.update(&bytes);
            }
        }
        Ok(hasher.finalize())
    }

    /// Lets the guest run on from where it was.
    pub fn start(mut self, guest: &Guest) -> Result<Running> {
        // It does nothing: interrupting `KVM_RUN` is all the signal is for.
        extern "C" fn nothing(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        register_signal_handler(SIGRTMIN(), nothing)?;
        if guest.vcpus.len() != self.vcpus.len() {
            return Err(format!("a guest of {} vCPUs, not {VCPUS}", guest.vcpus.len()).into());
        }
        let stop = Arc::new(AtomicBool::new(false));
        let (mut counts, mut threads) = (Vec::new(), Vec::new());
        for ((mut vcpu, ring), (count, state)) in self.vcpus.drain(..).zip(&guest.vcpus) {
            if let Some(state) = state {
                vcpu.restore(state)?;
            }
            let (count, stop) = (Arc::new(AtomicU32::new(*count)), Arc::clone(&stop));
            counts.push(Arc::clone(&count));
            let memory = self.memory.clone();
            threads.push(spawn(move || {
                let ran = run_vcpu(vcpu, ring, &count, &stop);
                // Until here, whoever else has let go of it: else the guest would write whatever
                // comes to be in its place.
                drop(memory);
                ran
            }));
        }
        let (memory, writes) = (self.memory.clone(), guest.device_writes);
        let stopped = Arc::clone(&stop);
        let device = spawn(move || run_device(&memory, writes, &stopped));
        Ok(Running {
            machine: self,
            counts,
            threads,
            device,
            stop,
        })
    }
}

/// A machine whose guest runs.
pub struct Running {
    pub machine: Machine,
    counts: Vec<Arc<AtomicU32>>,
    threads: Vec<JoinHandle<Result<Cpu>>>,
    device: JoinHandle<Result<u64>>,
    stop: Arc<AtomicBool>,
}

impl Running {
    /// Waits until each vCPU has counted `more` than by now.
    pub fn count(&self, more: u32, patience: Duration) -> Result<()> {
        let start = Instant::now();
        for (count, thread) in self.counts.iter().zip(&self.threads) {
            let goal = count.load(Ordering::Relaxed) + more;
            while count.load(Ordering::Relaxed) < goal {
                if thread.is_finished() || start.elapsed() > patience {
                    return Err("a vCPU does not count any more".into());
                }
                sleep(Duration::from_millis(1));
            }
        }
        Ok(())
    }

    /// Stops vCPUs and device, for good.
    pub fn stop(self) -> Result<(Machine, Guest)> {
        self.stop.store(true, Ordering::Relaxed);
        let mut machine = self.machine;
        let mut vcpus = Vec::new();
        for (thread, count) in self.threads.into_iter().zip(&self.counts) {
            // Until it has come through: one that finds the vCPU outside of `KVM_RUN`, on its way
            // into it, interrupts nothing.
            while !thread.is_finished() {
                thread.kill(SIGRTMIN())?;
                sleep(Duration::from_micros(200));
            }
            let (mut vcpu, ring) = thread
                .join()
                .map_err(|_| "the thread of a vCPU panicked")??;
            vcpu.finish()?;
            vcpus.push((count.load(Ordering::Relaxed), Some(vcpu.save()?)));
            machine.vcpus.push((vcpu, ring));
        }
        let device_writes = self
            .device
            .join()
            .map_err(|_| "the device's thread panicked")??;
        let guest = Guest {
            vcpus,
            device_writes,
        };
        Ok((machine, guest))
    }
}

/// A vCPU's thread.
fn run_vcpu(
    mut vcpu: Box<dyn Vcpu>,
    mut ring: VcpuRing,
    count: &AtomicU32,
    stop: &AtomicBool,
) -> Result<Cpu> {
    while !stop.load(Ordering::Relaxed) {
        match vcpu.run()? {
            Exit::DirtyRingFull => ring.on_full()?,
            Exit::Interrupted => {}
            // So a guest that did not go on where it was is found out.
            Exit::Counted(now) => match count.swap(now, Ordering::Relaxed) {
                before if now == before.wrapping_add(1) => {}
                before => return Err(format!("a vCPU counted {now} after {before}").into()),
            },
        }
    }
    Ok((vcpu, ring))
}

/// The device's thread: `writes` is how often it has written. What it writes through `memory` is
/// marked as dirty thereby.
fn run_device(memory: &Memory, mut writes: u64, stop: &AtomicBool) -> Result<u64> {
    loop {
        let last = stop.load(Ordering::Relaxed);
        writes += 1;
        // When it is stopped it still writes its state, to a page that it never wrote before: for
        // such things the last sync comes after all have stopped.
        let page = if last { 8 } else { writes % 8 };
        memory.write_obj(writes, DEVICE.unchecked_add(page * 4096))?;
        if last {
            return Ok(writes);
        }
        sleep(Duration::from_millis(1));
    }
}

/// A VM and its log: on KVM, where there is one.
fn create_vm(sim: bool) -> Result<(Box<dyn Vm>, DirtyLog)> {
    #[cfg(target_arch = "x86_64")]
    if !sim {
        match kvm_ioctls::Kvm::new() {
            Ok(kvm) => return crate::kvm::create_vm(&kvm),
            Err(error) => eprintln!("mini-vmm: no KVM: {error}"),
        }
    }
    eprintln!(
        "mini-vmm: THE KERNEL AND THE GUEST ARE SIMULATED, {}",
        match sim {
            true => "as asked for",
            false => "for want of a KVM for x86-64",
        }
    );
    Ok(crate::simulated::create_vm())
}
