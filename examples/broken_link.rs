// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A migration whose link breaks, again and again. What was sent is not what was received, and what was received is not what
//! was acknowledged. So:
//!
//! - The source numbers its chunks, and keeps every page that a sync has handed out until its chunk is acknowledged. The next
//!   sync's pages are merged into these.
//! - If the migration is put off, the source gives those pages back to the log.
//! - Of a slot that is unplugged meanwhile, the source drops what it has kept.
//! - The destination applies chunks in order, each once, and refuses one that does not follow. After a gap an older
//!   chunk could come later, and overwrite newer contents.
//! - A new connection begins with the number of the last chunk that the destination has applied.
//!
//! ```sh
//! cargo run --example broken_link
//! ```
//!
//! `guest` simulates what is below a VMM; all else a VMM does the same way.

mod guest;

use std::collections::VecDeque;
use std::error::Error;
use std::ops::Range;
use std::sync::Arc;
use std::thread;

use guest::{Exit, Guest, Load, Memory, Vcpu};
use kvm_dirty_ring::error::FullError;
use kvm_dirty_ring::{DirtyLog, DirtyPages, GuestMap, SlotId, VcpuRing};

const RAM: SlotId = SlotId::new(0, 0);
const DIMM: SlotId = SlotId::new(0, 1);
/// The most pages of a chunk.
const AT_ONCE: u64 = 16;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Pages on their way.
struct Chunk {
    /// From 1 on, without a gap. A number that was lost with a connection names another chunk on the next one.
    number: u64,
    address: u64,
    bytes: Vec<u8>,
}

/// The other side.
struct Destination {
    memory: Memory,
    /// The last chunk that is in memory.
    applied: u64,
}

impl Destination {
    /// Returns the acknowledgement: the number of the last chunk that is applied. An error ends the connection.
    fn receive(&mut self, chunk: &Chunk) -> Result<u64, String> {
        let next = self.applied + 1;
        if chunk.number > next {
            return Err(format!("chunk {} in place of {next}", chunk.number));
        }
        // One that is here already is not applied again: what came after it may be newer.
        if chunk.number == next {
            self.memory.put(chunk.address, &chunk.bytes);
            self.applied = next;
        }
        Ok(self.applied)
    }
}

/// A connection in which up to four chunks are on their way. A VMM has a socket.
struct Link {
    to: Destination,
    on_the_way: VecDeque<Chunk>,
    acknowledgements: VecDeque<u64>,
    /// What happens to the chunks that are sent, one after the other; then nothing more does.
    fates: VecDeque<Fate>,
}

#[derive(Clone, Copy)]
enum Fate {
    Arrives,
    ArrivesTwice,
    IsLost,
    Breaks,
}

impl Link {
    fn send(&mut self, chunk: Chunk) -> Result<(), String> {
        self.on_the_way.push_back(chunk);
        match self.on_the_way.len() {
            0..=4 => Ok(()),
            _ => self.deliver(),
        }
    }

    fn deliver(&mut self) -> Result<(), String> {
        let chunk = self.on_the_way.pop_front();
        let chunk = chunk.ok_or("no acknowledgement is to come")?;
        let times = match self.fates.pop_front().unwrap_or(Fate::Arrives) {
            Fate::Arrives => 1,
            Fate::ArrivesTwice => 2,
            Fate::IsLost => 0,
            Fate::Breaks => return Err("the connection broke".into()),
        };
        for _ in 0..times {
            let applied = self.to.receive(&chunk)?;
            self.acknowledgements.push_back(applied);
        }
        Ok(())
    }

    /// The next acknowledgement, once there is one.
    fn acknowledged(&mut self) -> Result<u64, String> {
        while self.acknowledgements.is_empty() {
            self.deliver()?;
        }
        Ok(self.acknowledgements.pop_front().expect("there is one"))
    }

    /// A new connection. Nothing of the old one arrives any more. Returns what the destination says first.
    fn connect(&mut self) -> u64 {
        self.on_the_way.clear();
        self.acknowledgements.clear();
        self.to.applied
    }
}

/// This side.
struct Source {
    log: DirtyLog,
    map: GuestMap,
    memory: Arc<Memory>,
    /// What the last sync has found.
    dirty: DirtyPages,
    /// What syncs have handed out and no chunk has brought over.
    unsent: DirtyPages,
    /// Chunks that were sent and not acknowledged.
    in_flight: VecDeque<(u64, Range<u64>)>,
    acknowledged: u64,
}

impl Source {
    /// Sends what was written since the last round, and what is left of that. Returns how many pages. After an error, connect.
    fn round(&mut self, link: &mut Link) -> Outcome<u64> {
        self.log.sync(&mut self.dirty)?;
        if !self.unsent.merge(&self.dirty) {
            self.log.put_back(&self.dirty)?;
            return Err("out of memory".into());
        }
        let pages = self.unsent.page_count();
        let chunks = self.map.ranges(self.unsent.part(), AT_ONCE)?;
        for (number, range) in (self.acknowledged + 1..).zip(chunks.collect::<Vec<_>>()) {
            self.in_flight.push_back((number, range.clone()));
            let (address, bytes) = (range.start, self.memory.bytes(&range));
            link.send(Chunk {
                number,
                address,
                bytes,
            })?;
        }
        // To the last one, before the next sync: then no acknowledgement is of an older state of a page that it finds.
        while !self.in_flight.is_empty() {
            let up_to = link.acknowledged()?;
            self.acknowledge(up_to);
        }
        Ok(pages)
    }

    fn acknowledge(&mut self, up_to: u64) {
        self.acknowledged = up_to;
        while let Some((_, range)) = self.in_flight.front().filter(|sent| sent.0 <= up_to) {
            for run in self.map.runs(range.clone()) {
                self.unsent.remove(run.slot, run.first_page, run.pages);
            }
            self.in_flight.pop_front();
        }
    }

    /// Begins a new connection: what has arrived need not be sent again, even if no acknowledgement came.
    fn connect(&mut self, link: &mut Link) {
        self.acknowledge(link.connect());
        self.in_flight.clear();
    }

    /// Puts the migration off: the log keeps the pages, so a later migration or a snapshot can start from them.
    fn put_off(&mut self) -> Outcome<()> {
        self.log.put_back(&self.unsent)?;
        self.unsent.clear();
        Ok(())
    }

    /// Drops a slot that the log does not have any more. Another one may have its id, or its place in the guest, soon. Returns how
    /// many pages of it need not be sent.
    fn drop_slot(&mut self, slot: SlotId, map: GuestMap) -> u64 {
        let dropped = self.log.clear_removed(&mut self.unsent);
        // Or an acknowledgement would take out the same pages of that one.
        let is_its = |range: &Range<u64>| self.map.runs(range.clone()).any(|run| run.slot == slot);
        self.in_flight.retain(|(_, range)| !is_its(range));
        self.map = map;
        dropped
    }
}

fn main() -> Outcome<()> {
    let map = guest::map([(0, 0, 1000), (1, 2048, 500)]);
    let guest = Guest::with_map(1024, &map); // KVM_CREATE_VM
    let log = guest.dirty_log(); // DirtyLog::enable(&vm_fd, ...)
    for region in map.regions() {
        log.add_slot(region.slot, region.pages)?;
        log.mark_dirty(region.slot, 0, region.pages)?; // The other side has nothing yet.
    }
    guest.create_slots(); // KVM_SET_USER_MEMORY_REGION
    let vcpu = guest.create_vcpu(Load::new(100, 300)); // KVM_CREATE_VCPU
    let ring = log.attach_ring(vcpu.vcpu.ring_memory())?; // log.attach_vcpu(&vcpu_fd)
    let vcpu = thread::spawn(move || run_vcpu(vcpu, ring));

    let mut source = Source {
        log: log.clone(),
        map: map.clone(),
        memory: guest.memory(),
        dirty: DirtyPages::new(),
        unsent: DirtyPages::new(),
        in_flight: VecDeque::new(),
        acknowledged: 0,
    };
    let fates = [
        (30, Fate::ArrivesTwice),
        (20, Fate::Breaks),
        (30, Fate::IsLost),
    ];
    let fates = fates.map(|(arrive, fate)| vec![Fate::Arrives; arrive].into_iter().chain([fate]));
    let mut link = Link {
        to: Destination {
            memory: Memory::of(&map),
            applied: 0,
        },
        on_the_way: VecDeque::new(),
        acknowledgements: VecDeque::new(),
        fates: fates.into_iter().flatten().collect(),
    };

    // The connection breaks, and the migration goes on by a new one. There a chunk is lost: it is put off.
    for _ in 0..2 {
        let error = source.round(&mut link).expect_err("by these fates");
        let kept = source.unsent.page_count();
        source.connect(&mut link);
        let left = source.unsent.page_count();
        println!("{error}: {kept} pages not acknowledged, of which {left} have not arrived");
    }
    // Before that, a DIMM is unplugged that was to be sent.
    let retired = log.retire_slot(DIMM)?;
    guest.delete_slot(DIMM); // KVM_SET_USER_MEMORY_REGION of no size
    log.finish_slot(&retired)?;
    let dropped = source.drop_slot(DIMM, guest::map([(0, 0, 1000)]));
    assert!(dropped > 0, "the DIMM would have been sent last");
    println!("{dropped} pages not sent went with a DIMM");
    source.put_off()?;

    // It is begun again, and finds all that has not arrived.
    for round in 0..4 {
        println!("round {round}: {} pages", source.round(&mut link)?);
    }
    guest.kick(); // a signal to the vCPU's thread
    vcpu.join().expect("the vCPU's thread panicked")?;
    // A device has written three pages far apart; and the link breaks while the guest is stopped, too.
    for page in [10, 500, 900] {
        source.memory.write(page, 7);
        log.mark_dirty(RAM, page, 1)?;
    }
    link.fates = [Fate::Arrives, Fate::Breaks].into();
    let error = source.round(&mut link).expect_err("by these fates");
    source.connect(&mut link);
    println!("{error}: once more, {} pages", source.round(&mut link)?);

    let copy = &link.to.memory;
    assert!(copy.equals(&source.memory, &source.map), "the copy differs");
    println!("the copy is equal to the original, byte by byte");
    Ok(())
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
