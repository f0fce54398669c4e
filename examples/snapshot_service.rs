// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Snapshots of a microVM, as a VMM makes them on request: one of all memory, then *diffs*, each of what was written since the
//! one before. The guest is paused while one is written.
//!
//! - Memory that can be plugged in is one region of several slots. In a file a page stands at its guest address, whichever slot
//!   it is in: slots have a page 3 each, and offsets by slot collide. Holes of the guest are holes of the file.
//! - A hole in a diff may also be a page of zeroes. So the VMM keeps which ranges a diff has.
//! - If writing fails, the pages go back to the log: the next diff has them, too.
//! - A balloon marks the pages that it discards. KVM logs no write there, and the snapshot before has what they held.
//!
//! ```sh
//! cargo run --example snapshot_service
//! ```
//!
//! `guest` simulates what is below a VMM; all else a VMM does the same way.

mod guest;

use std::error::Error;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use guest::{Exit, Guest, Load, Memory, Vcpu, page_size};
use kvm_dirty_ring::error::FullError;
use kvm_dirty_ring::{DirtyLog, DirtyPages, GuestMap, GuestRegion, VcpuRing};

/// The most pages of one write to a file.
const AT_ONCE: u64 = 256;
/// Where the slots of the second region begin: 4 of 512 pages each.
const HIGH: u64 = 4096;

type Outcome<T> = Result<T, Box<dyn Error>>;
type VcpuThread = JoinHandle<Result<(Vcpu, VcpuRing), FullError>>;

/// A file, and how many bytes its disk has room for.
struct Disk {
    file: File,
    room: u64,
}

/// Makes snapshots. Every method is called with the vCPUs and the devices stopped.
struct Snapshots {
    log: DirtyLog,
    map: GuestMap,
    memory: Arc<Memory>,
    dirty: DirtyPages,
}

impl Snapshots {
    /// All memory.
    fn full(&mut self, disk: &mut Disk) -> Outcome<Vec<Range<u64>>> {
        // The next diff begins here: it need not have what this sync takes out of the log.
        self.log.sync(&mut self.dirty)?;
        let bytes = |region: &GuestRegion| region.pages * page_size() as u64;
        let regions = self.map.regions().iter();
        let ranges = regions.map(|region| region.address..region.address + bytes(region));
        self.write(disk, ranges.collect())
    }

    /// What was written since the last snapshot that has succeeded.
    fn diff(&mut self, disk: &mut Disk) -> Outcome<Vec<Range<u64>>> {
        self.log.sync(&mut self.dirty)?;
        let ranges = self.map.ranges(self.dirty.part(), AT_ONCE)?.collect();
        self.write(disk, ranges)
    }

    /// Writes memory, each page at its guest address. Returns what was written.
    fn write(&self, disk: &mut Disk, ranges: Vec<Range<u64>>) -> Outcome<Vec<Range<u64>>> {
        let write = |range| disk.write_at(&self.memory.bytes(range), range.start);
        let written = ranges.iter().try_for_each(write);
        if let Err(error) = written.and_then(|()| disk.file.sync_all()) {
            // All of them: half a file is none.
            self.log.put_back(&self.dirty)?;
            return Err(error.into());
        }
        Ok(ranges)
    }
}

impl Disk {
    fn create(name: &str, room: u64) -> io::Result<Self> {
        let name = format!("snapshot_service.{}.{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create_new(true);
        let file = options.open(&path)?;
        fs::remove_file(path)?; // It goes with its descriptor. A VMM keeps it.
        Ok(Self { file, room })
    }

    fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let left = self.room.checked_sub(bytes.len() as u64);
        self.room = left.ok_or(io::ErrorKind::StorageFull)?;
        self.file.write_all_at(bytes, offset)
    }

    /// Puts the snapshot, or what a diff has of it, into memory.
    fn restore(&self, ranges: &[Range<u64>], memory: &Memory) -> io::Result<()> {
        for range in ranges {
            let mut bytes = vec![0; (range.end - range.start) as usize];
            self.file.read_exact_at(&mut bytes, range.start)?;
            memory.put(range.start, &bytes);
        }
        Ok(())
    }
}

fn main() -> Outcome<()> {
    let high = (0..4).map(|at| (1 + at as u16, HIGH + at * 512, 512));
    let map = guest::map([(0, 0, 2048)].into_iter().chain(high));
    let guest = Guest::with_map(1024, &map); // KVM_CREATE_VM
    let log = guest.dirty_log(); // DirtyLog::enable(&vm_fd, ...)
    for region in map.regions() {
        log.add_slot(region.slot, region.pages)?;
    }
    guest.create_slots(); // KVM_SET_USER_MEMORY_REGION

    let mut vcpus = Vec::new();
    for (first_page, pages) in [(100, 1000), (HIGH + 300, 1000)] {
        let vcpu = guest.create_vcpu(Load::new(first_page, pages)); // KVM_CREATE_VCPU
        let ring = log.attach_ring(vcpu.vcpu.ring_memory())?; // log.attach_vcpu(&vcpu_fd)
        vcpus.push((vcpu, ring));
    }
    let memory = guest.memory();
    // What a device or a balloon has changed, after it has.
    let mark = |page: u64| -> Outcome<()> {
        let place = map.locate(page * page_size() as u64);
        let (slot, page) = place.ok_or("no memory there")?;
        Ok(log.mark_dirty(slot, page, 1)?)
    };
    let mut snapshots = Snapshots {
        log: log.clone(),
        map: map.clone(),
        memory: Arc::clone(&memory),
        dirty: DirtyPages::new(),
    };

    memory.write(HIGH + 1500, 7); // A device has written it. The guest does not.
    mark(HIGH + 1500)?;
    let vcpus = run_a_while(&guest, vcpus)?;
    let mut base = Disk::create("base", u64::MAX)?;
    let all = snapshots.full(&mut base)?;
    println!("base: {} ranges", all.len());

    // The balloon is inflated, and the disk is full when the next snapshot is asked for.
    memory.discard(HIGH + 1500);
    mark(HIGH + 1500)?;
    let vcpus = run_a_while(&guest, vcpus)?;
    let mut full = Disk::create("full", 100 * page_size() as u64)?;
    let failed = snapshots.diff(&mut full).map(|ranges| ranges.len());
    println!("diff: {}", failed.expect_err("it has no room"));

    // Nothing is lost: the guest goes on, and the next one has all since the base.
    memory.write(HIGH + 3, 9);
    mark(HIGH + 3)?;
    run_a_while(&guest, vcpus)?;
    let mut disk = Disk::create("diff", u64::MAX)?;
    let diff = snapshots.diff(&mut disk)?;
    println!("diff: {} ranges", diff.len());

    let restored = Memory::of(&map);
    base.restore(&all, &restored)?;
    disk.restore(&diff, &restored)?;
    assert!(restored.equals(&memory, &map), "the snapshot differs");
    println!("base and diff restore the guest's memory, byte by byte");
    page_3_of_the_second_slot()
}

/// Two slots of 4,096 pages, at 0 and 4 GiB. A diff of page 3 of the second one leaves the first as it is.
fn page_3_of_the_second_slot() -> Outcome<()> {
    const AT: u64 = 4 << 30;
    let page = page_size() as u64;
    let map = guest::map([(0, 0, 4096), (1, AT / page, 4096)]);
    let guest = Guest::with_map(1024, &map);
    let log = guest.dirty_log();
    for region in map.regions() {
        log.add_slot(region.slot, region.pages)?;
    }
    let memory = guest.memory();
    let mut snapshots = Snapshots {
        log: log.clone(),
        map: map.clone(),
        memory: Arc::clone(&memory),
        dirty: DirtyPages::new(),
    };
    // Something is there, so that what is restored in the wrong place shows.
    let restored = Memory::of(&map);
    for (at, number) in [(3, 1), (AT / page + 2, 2), (AT / page + 4, 3)] {
        restored.write(at, number);
    }
    let before = [restored.read(0, 4096), restored.read(AT / page, 4096)];
    memory.write(AT / page + 3, 7);
    log.mark_dirty(map.regions()[1].slot, 3, 1)?;

    let mut disk = Disk::create("page-3", page)?;
    let diff = snapshots.diff(&mut disk)?;
    let expected = AT + 3 * page..AT + 4 * page;
    assert_eq!(diff, std::slice::from_ref(&expected));
    disk.restore(&diff, &restored)?;
    let [first, mut second] = before;
    let [begin, end] = [3 * page as usize, 4 * page as usize];
    second[begin..end].copy_from_slice(&memory.read(AT / page + 3, 1));
    assert!(restored.read(0, 4096) == first, "the first slot changed");
    assert!(restored.read(AT / page, 4096) == second, "the second slot");
    println!("page 3 of a slot at 4 GiB is restored, and no other page changes");
    Ok(())
}

/// Resumes the vCPUs, and pauses them again.
fn run_a_while(guest: &Guest, vcpus: Vec<(Vcpu, VcpuRing)>) -> Outcome<Vec<(Vcpu, VcpuRing)>> {
    guest.resume();
    let run = |(vcpu, ring)| thread::spawn(move || run_vcpu(vcpu, ring));
    let threads: Vec<VcpuThread> = vcpus.into_iter().map(run).collect();
    thread::sleep(Duration::from_millis(100));
    guest.kick(); // a signal to each vCPU's thread
    let stopped = threads.into_iter().map(|thread| thread.join().unwrap());
    Ok(stopped.collect::<Result<_, _>>()?)
}

/// A vCPU's thread. Without a reaper, full rings are emptied here.
fn run_vcpu(mut vcpu: Vcpu, mut ring: VcpuRing) -> Result<(Vcpu, VcpuRing), FullError> {
    loop {
        // ioctl KVM_RUN
        match vcpu.run() {
            Exit::DirtyRingFull => ring.on_full()?,
            Exit::Kicked => return Ok((vcpu, ring)),
        }
    }
}
