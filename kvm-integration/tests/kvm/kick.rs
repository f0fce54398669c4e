// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The vCPU's thread of the example `vcpu_thread`, which is to be copied.

#[path = "../../../examples/kick/mod.rs"]
#[expect(clippy::module_inception, reason = "the example's name")]
mod kick;
#[path = "../../../examples/tiny_vm/mod.rs"]
mod tiny_vm;

use std::num::NonZeroU64;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use kick::{VcpuThread, park_all};
use kvm_dirty_ring::pacing::Adaptive;
use kvm_dirty_ring::{DirtyLog, DirtyPages, Limiter, Reaper, RingEntries, VcpuRing};
use kvm_integration::kvm_available;
use kvm_ioctls::VcpuFd;
use libtest_mimic::Completion::Completed;
use libtest_mimic::Failed;
use tiny_vm::{PAGE, TinyVm, has_written};

use super::harness::Outcome;
use super::machine::{assert_unsuspicious, nap, patience, wait};
use super::scale::scaled;

tests![
    no_kick_is_lost_and_no_page,
    parking_waits_for_no_sleep,
    no_vcpu_writes_once_it_is_stopped,
    an_end_is_noticed,
];

const VCPUS: u64 = 2;
const PAGES: u64 = 4096;

struct Machine {
    vm: TinyVm,
    log: DirtyLog,
    vcpus: Arc<Vec<VcpuThread>>,
}

impl Machine {
    fn new() -> Result<Self, Failed> {
        let vm = TinyVm::new(&kvm_available()?, VCPUS, PAGES).map_err(failed)?;
        let log = DirtyLog::enable(vm.fd(), RingEntries::new(1024)?)?;
        vm.add_memory(&log).map_err(failed)?;
        let mut vcpus = Vec::new();
        for index in 0..VCPUS {
            let fd = vm.create_vcpu(index).map_err(failed)?;
            let ring = log.attach_vcpu(&fd)?;
            vcpus.push(spawn(fd, ring)?);
        }
        Ok(Self {
            vm,
            log,
            vcpus: Arc::new(vcpus),
        })
    }

    /// Calls `act` with all vCPUs parked, and fails if they are not parked in time.
    fn parked<T: Send + 'static>(
        &self,
        act: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Failed> {
        let (log, vcpus) = (self.log.clone(), Arc::clone(&self.vcpus));
        let (done, is_done) = channel();
        // It has no bound of its own.
        thread::spawn(move || {
            let parked = park_all(&log, &vcpus).map(|_parked| act());
            let _ = done.send(parked.map_err(|error| error.to_string()));
        });
        let parked = is_done.recv_timeout(patience());
        Ok(parked.map_err(|_| "a kick was lost: vCPUs were not parked in time")??)
    }
}

fn spawn(fd: VcpuFd, ring: VcpuRing) -> std::io::Result<VcpuThread> {
    VcpuThread::spawn(fd, ring, |exit| match has_written(&exit) {
        true => Ok(()),
        false => Err(format!("{exit:x?}").into()),
    })
}

fn failed(error: kick::Failure) -> Failed {
    error.to_string().into()
}

/// Parks vCPUs that leave the guest all the time, wherever the kick meets them; what is copied while they are parked is complete.
fn no_kick_is_lost_and_no_page() -> Outcome {
    let machine = Arc::new(Machine::new()?);
    let reaper = Reaper::spawn(&machine.log, Adaptive::default())?;
    let copy = Arc::new(Mutex::new(machine.vm.read_all().map_err(failed)?));
    let (mut changed, mut random) = (0, 7_u64);
    for round in 0..scaled(1000, 100) {
        let (shared, copy) = (Arc::clone(&machine), Arc::clone(&copy));
        let pages = machine.parked(move || -> Result<u64, String> {
            let mut dirty = DirtyPages::new();
            let mut copy = copy.lock().map_err(|error| error.to_string())?;
            let told = |error: kick::Failure| error.to_string();
            shared
                .log
                .sync(&mut dirty)
                .map_err(|error| told(error.into()))?;
            for run in dirty.runs() {
                let (at, bytes) = shared.vm.read(run).map_err(told)?;
                copy[at..at + bytes.len()].copy_from_slice(&bytes);
            }
            if round % 50 == 0 && *copy != shared.vm.read_all().map_err(told)? {
                return Err("pages were lost, or a parked vCPU writes".into());
            }
            Ok(dirty.page_count())
        })??;
        changed += u64::from(pages > 0);
        // At whatever moment the vCPUs are parked next.
        random = random.wrapping_mul(6_364_136_223_846_793_005) + 1;
        nap(Duration::from_micros(random >> 54));
    }
    assert!(changed > 0, "nobody has written anything");
    reaper.stop()?;
    assert_unsuspicious(&machine.log.stats());
    Ok(Completed)
}

/// A vCPU that sleeps for minutes, for its limit, is parked at once; a kick of the limiter's has brought it there.
fn parking_waits_for_no_sleep() -> Outcome {
    let machine = Machine::new()?;
    let reaper = Reaper::spawn(&machine.log, Adaptive::default())?;
    let kicks: Vec<_> = machine.vcpus.iter().map(VcpuThread::kicker).collect();
    let limiter = Limiter::spawn(&machine.log, move |vcpu| kicks[vcpu]())?;
    machine.log.set_dirty_limits(NonZeroU64::new(1))?;
    let asleep = || machine.log.enforce_dirty_limits(|_| ()) > Some(Duration::from_secs(1));
    for _ in 0..3 {
        wait("a sleep of each vCPU", asleep)?;
        machine.parked(|| ())?;
    }
    machine.log.set_dirty_limits(None)?;
    limiter.stop()?;
    reaper.stop()?;
    Ok(Completed)
}

/// The last sync, then the stop that gives the vCPUs back: the copy is complete. They can run on, and are tracked.
fn no_vcpu_writes_once_it_is_stopped() -> Outcome {
    let mut machine = Machine::new()?;
    let reaper = Reaper::spawn(&machine.log, Adaptive::default())?;
    let mut copy = machine.vm.read_all().map_err(failed)?;
    let (mut dirty, mut written) = (DirtyPages::new(), 0);
    for _ in 0..scaled(50, 20) {
        let parked = park_all(&machine.log, &machine.vcpus).map_err(failed)?;
        machine.log.sync(&mut dirty)?;
        written += dirty.page_count();
        for run in dirty.runs() {
            let (at, bytes) = machine.vm.read(run).map_err(failed)?;
            copy[at..at + bytes.len()].copy_from_slice(&bytes);
        }
        let stopped = parked.stop().map_err(failed)?;
        let memory = machine.vm.read_all().map_err(failed)?;
        let pages = copy.chunks(PAGE).zip(memory.chunks(PAGE));
        let differ = pages.filter(|(copy, page)| copy != page).count();
        assert_eq!(differ, 0, "pages were written after the last sync");
        let vcpus = stopped.into_iter().map(|(fd, ring)| spawn(fd, ring));
        machine.vcpus = Arc::new(vcpus.collect::<Result<_, _>>()?);
        assert_eq!(machine.vcpus.len() as u64, VCPUS);
        nap(Duration::from_millis(5));
    }
    assert!(written > 0, "no vCPU has written anything");
    reaper.stop()?;
    assert_unsuspicious(&machine.log.stats());
    Ok(Completed)
}

/// By an exit that nobody handles. The thread that parks or stops it gets an error, and does not wait.
fn an_end_is_noticed() -> Outcome {
    let vm = TinyVm::new(&kvm_available()?, 1, PAGES).map_err(failed)?;
    let log = DirtyLog::enable(vm.fd(), RingEntries::new(1024)?)?;
    vm.add_memory(&log).map_err(failed)?;
    let fd = vm.create_vcpu(0).map_err(failed)?;
    let ring = log.attach_vcpu(&fd)?;
    let vcpu = VcpuThread::spawn(fd, ring, |_| Err("not today".into()))?;
    let kick = vcpu.kicker();
    let vcpu = [vcpu];
    let mut ended = None;
    // The first write is enough, or the request came before it.
    wait("the end of the vCPU", || {
        ended = park_all(&log, &vcpu).err().map(|error| error.to_string());
        ended.is_some()
    })?;
    assert_eq!(
        ended.as_deref(),
        Some("the thread of vCPU 0 has ended: not today")
    );
    kick();
    assert!(park_all(&log, &vcpu).is_err(), "it has not ended");
    Ok(Completed)
}
