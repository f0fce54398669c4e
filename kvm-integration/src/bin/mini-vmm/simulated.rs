//! What stands in for KVM and the guest where there is none: the crate's simulated kernel, and
//! vCPUs that do on it what the guest's code does. Nothing here is for copying.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::Duration;

use kvm_dirty_ring::sim::{SimConfig, SimVcpu, SimVm, WriteError};
use kvm_dirty_ring::{DirtyLog, GuestRegion, SlotId};
use serde::Deserialize;
use serde_json::Value;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, VolatileMemory};

use crate::Result;
use crate::machine::{Cpu, Exit, Memory, RAM, VCPUS, Vcpu, Vm};

const PAGES_PER_COUNT: u64 = 64;
const RAM_SLOT: SlotId = SlotId::new(0, 1);

pub fn create_vm() -> (Box<dyn Vm>, DirtyLog) {
    let vm = SimVm::new(SimConfig::default());
    let log = vm.dirty_log();
    (Box::new(Simulated(vm)), log)
}

struct Simulated(SimVm);

impl Vm for Simulated {
    fn set_region(&self, region: GuestRegion, _: *mut u8, logged: bool) -> io::Result<()> {
        if self.0.version(region.slot, 0).is_none() {
            self.0.create_slot(region.slot, region.pages);
        }
        self.0.set_logged(region.slot, logged);
        Ok(())
    }

    fn load(&self, _: &Memory) -> Result<()> {
        Ok(())
    }

    fn create_vcpu(&self, index: u32, log: &DirtyLog, memory: &Memory) -> Result<Cpu> {
        let vcpu = self.0.add_vcpu();
        let ring = log.attach_ring(vcpu.ring_memory())?;
        let ram = memory.find_region(RAM.0).ok_or("there is no RAM")?;
        let pages = ram.bitmap().region().pages() / u64::from(VCPUS);
        let vcpu = SimulatedVcpu {
            vcpu,
            memory: memory.clone(),
            first_page: u64::from(index) * pages,
            pages,
            written: 0,
        };
        Ok((Box::new(vcpu), ring))
    }
}

struct SimulatedVcpu {
    vcpu: SimVcpu,
    memory: Memory,
    first_page: u64,
    pages: u64,
    /// Its register: pages written so far.
    written: u64,
}

impl SimulatedVcpu {
    fn write(&mut self) -> Result<Option<WriteError>> {
        let page = self.first_page + self.written % self.pages;
        let count = (self.written / PAGES_PER_COUNT) as u32;
        let page_size = RAM.1 as u64 / u64::from(VCPUS) / self.pages;
        let address = RAM.0.unchecked_add(page * page_size);
        let place = self.memory.get_slice(address, 4)?;
        // By a reference, which marks nothing: what vCPUs write is for the log to find.
        let place = place.get_atomic_ref::<AtomicU32>(0)?;
        let store = || place.store(count, Ordering::Relaxed);
        let written = self.vcpu.write_with(RAM_SLOT, page, store);
        self.written += u64::from(written.is_ok());
        Ok(written.err())
    }
}

impl Vcpu for SimulatedVcpu {
    fn run(&mut self) -> Result<Exit> {
        sleep(Duration::from_micros(100));
        loop {
            match self.write()? {
                Some(WriteError::RingFull) => return Ok(Exit::DirtyRingFull),
                Some(error) => return Err(error.into()),
                None if self.written % PAGES_PER_COUNT == 0 => {
                    return Ok(Exit::Counted((self.written / PAGES_PER_COUNT) as u32));
                }
                None => {}
            }
        }
    }

    fn finish(&mut self) -> Result<()> {
        self.vcpu.exit();
        Ok(())
    }

    fn save(&self) -> Result<Value> {
        Ok(self.written.into())
    }

    fn restore(&mut self, state: &Value) -> Result<()> {
        self.written = u64::deserialize(state)?;
        Ok(())
    }
}
