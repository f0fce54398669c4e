//! A snapshot of a running guest into a file: first all memory, then only what was written since,
//! each run of pages at its own offset. The guest stops for the last sync and the last pages alone.
//!
//! Pages are counted from the begin of their slot, so two slots have a page 3 each: in the file, slots lie one after the
//! other, without the hole that the guest has between them.
//!
//! ```sh
//! cargo run --example incremental_snapshot
//! cargo run --example incremental_snapshot -- FILE    # and keep the file
//! ```
//!
//! `guest` simulates what is below a VMM; all else a VMM does the same way.

mod guest;

use std::error::Error;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use guest::{Exit, Guest, Load, Memory, PAGE, Vcpu};
use kvm_dirty_ring::error::FullError;
use kvm_dirty_ring::pacing::Adaptive;
use kvm_dirty_ring::{DirtyPages, Reaper, SlotId, VcpuRing};

/// Memory from address 0 on, and from 4 GiB on.
const LOW: SlotId = SlotId::new(0, 0);
const HIGH: SlotId = SlotId::new(0, 1);
const PAGES: u64 = 4096;

fn main() -> Result<(), Box<dyn Error>> {
    let guest = Guest::new(1024, LOW, PAGES); // KVM_CREATE_VM
    let log = guest.dirty_log(); // DirtyLog::enable(&vm_fd, ...)
    log.add_slot(LOW, PAGES)?;
    guest.create_slot(); // KVM_SET_USER_MEMORY_REGION
    log.add_slot(HIGH, PAGES)?;
    let high = guest.add_memory(HIGH, PAGES); // the same
    let mut vcpus = Vec::new();
    for number in 0..2 {
        let load = Load {
            first_page: number * 2048,
            pages: 1000,
            burst: 20,
            rest: Duration::from_millis(2),
        };
        let vcpu = guest.create_vcpu(load); // KVM_CREATE_VCPU
        let ring = log.attach_ring(vcpu.vcpu.ring_memory())?; // log.attach_vcpu(&vcpu_fd)
        vcpus.push(thread::spawn(move || run_vcpu(vcpu, ring)));
    }
    let reaper = Reaper::spawn(&log, Adaptive::default())?;

    let given = std::env::args_os().nth(1).map(PathBuf::from);
    let path = given.clone().unwrap_or_else(temporary_path);
    let file = File::create(&path)?;
    let low = guest.memory();
    let slots = [(LOW, &*low), (HIGH, &*high)];

    // All memory, read after a sync: what is written from here on comes with the next one. Pages
    // that the guest writes while they are read end up torn in the file, and are written again.
    let mut dirty = DirtyPages::new();
    log.sync(&mut dirty)?;
    for (slot, memory) in slots {
        file.write_all_at(&memory.read(0, PAGES), offset(&slots, slot, 0))?;
    }
    println!("full: {} pages", 2 * PAGES);

    for number in 1..4 {
        // A device writes to one page above 4 GiB.
        high.write(3, number);
        log.mark_dirty(HIGH, 3, 1)?;
        thread::sleep(Duration::from_millis(100));
        log.sync(&mut dirty)?;
        let pages = write_increment(&file, &slots, &dirty)?;
        println!("increment: {pages} pages, the guest runs on");
    }

    let stopped = Instant::now();
    guest.kick(); // a signal to each vCPU's thread
    for vcpu in vcpus {
        vcpu.join().expect("a vCPU's thread panicked")?;
    }
    log.sync(&mut dirty)?;
    let pages = write_increment(&file, &slots, &dirty)?;
    // From here on the guest may run again: a VMM resumes its vCPUs now. This guest stays stopped,
    // to be compared.
    println!(
        "last: {pages} pages, the guest stopped for {} ms",
        stopped.elapsed().as_millis()
    );
    file.sync_all()?;
    reaper.stop()?;

    let restored = fs::read(&path)?;
    if given.is_none() {
        fs::remove_file(&path)?;
    }
    for (slot, memory) in slots {
        let restored = &restored[offset(&slots, slot, 0) as usize..][..PAGES as usize * PAGE];
        assert!(
            restored == memory.read(0, PAGES),
            "slot {slot} differs in the snapshot"
        );
    }
    println!("what the file restores is the guest's memory, byte by byte");
    Ok(())
}

/// Where a page is in the file: its slot comes after those before it. What is restored has the slots in the same order; a
/// VMM writes a table of them into the file.
fn offset(slots: &[(SlotId, &Memory)], slot: SlotId, page: u64) -> u64 {
    let before = slots.iter().take_while(|(other, _)| *other != slot);
    let first_page: u64 = before.map(|(_, memory)| memory.pages()).sum();
    (first_page + page) * PAGE as u64
}

/// Writes the dirty pages, each to its place in the file. How many there were.
fn write_increment(
    file: &File,
    slots: &[(SlotId, &Memory)],
    dirty: &DirtyPages,
) -> io::Result<u64> {
    for run in dirty.runs() {
        let memory = slots.iter().find(|(slot, _)| *slot == run.slot);
        let (_, memory) = memory.expect("a slot that the log does not know");
        // A VMM passes its mapping of the memory here, or has several runs written at once.
        let bytes = memory.read(run.first_page, run.pages);
        file.write_all_at(&bytes, offset(slots, run.slot, run.first_page))?;
    }
    Ok(dirty.page_count())
}

/// A vCPU's thread.
fn run_vcpu(mut vcpu: Vcpu, mut ring: VcpuRing) -> Result<(), FullError> {
    loop {
        // ioctl KVM_RUN
        match vcpu.run() {
            Exit::DirtyRingFull => ring.on_full()?,
            Exit::Kicked => return Ok(()),
        }
    }
}

fn temporary_path() -> PathBuf {
    let name = format!("incremental_snapshot.{}", std::process::id());
    std::env::temp_dir().join(name)
}
