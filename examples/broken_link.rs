// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A migration whose link breaks every few messages. What was sent is not what was received, and what was received is not what
//! was acknowledged. So:
//!
//! - The source numbers its chunks, and keeps every page that a sync has returned until its chunk is acknowledged.
//! - After a break it sends the rest of the same round first. It syncs only once that is acknowledged: otherwise each round
//!   would begin again at the lowest address, and a link that breaks often would never bring the highest one.
//! - A wait for an acknowledgement has a bound. A link that falls silent has broken.
//! - Each attempt counts as a round, and the number of rounds is bounded.
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
use std::time::Duration;

use guest::{Exit, Guest, Load, Memory, Vcpu};
use kvm_dirty_ring::error::FullError;
use kvm_dirty_ring::{DirtyLog, DirtyPages, GuestMap, SlotId, VcpuRing};

const RAM: SlotId = SlotId::new(0, 0);
const DIMM: SlotId = SlotId::new(0, 1);
/// The most pages of a chunk.
const AT_ONCE: u64 = 16;
/// Each connection that breaks counts as one.
const MOST_ROUNDS: u32 = 100;

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
        thread::sleep(Duration::from_millis(1)); // The guest writes meanwhile.
        let chunk = self.on_the_way.pop_front();
        // A VMM's socket has a timeout for this: `set_read_timeout`.
        let chunk = chunk.ok_or("no acknowledgement came in time")?;
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
    /// What is left of the last sync: no chunk that has it is acknowledged.
    dirty: DirtyPages,
    /// Chunks that were sent and not acknowledged.
    in_flight: VecDeque<(u64, Range<u64>)>,
    acknowledged: u64,
    breaks: u32,
}

impl Source {
    /// Sends what was written since the last round, in at most `attempts` connections, and returns how many pages. After an
    /// error, put the migration off.
    fn round(&mut self, link: &mut Link, attempts: u32) -> Outcome<u64> {
        // The last round has arrived whole, so nothing is left in it.
        self.log.sync(&mut self.dirty)?;
        let pages = self.dirty.page_count();
        for _ in 0..attempts {
            match self.send(link) {
                Ok(()) => return Ok(pages),
                Err(error) => self.connect(link, &*error),
            }
        }
        Err(format!("the link broke {attempts} times in a round").into())
    }

    /// Sends what is left of a round, until all of it is acknowledged. After an error, connect and call it again.
    fn send(&mut self, link: &mut Link) -> Outcome<()> {
        let chunks = self.map.ranges(self.dirty.part(), AT_ONCE)?;
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
        Ok(())
    }

    fn acknowledge(&mut self, up_to: u64) {
        self.acknowledged = up_to;
        while let Some((_, range)) = self.in_flight.front().filter(|sent| sent.0 <= up_to) {
            for run in self.map.runs(range.clone()) {
                self.dirty.remove(run.slot, run.first_page, run.pages);
            }
            self.in_flight.pop_front();
        }
    }

    /// Begins a new connection: what has arrived need not be sent again, even if no acknowledgement came.
    fn connect(&mut self, link: &mut Link, why: &dyn Error) {
        let kept = self.dirty.page_count();
        self.acknowledge(link.connect());
        self.in_flight.clear();
        self.breaks += 1;
        let left = self.dirty.page_count();
        println!("  {why}: {kept} pages not acknowledged, of which {left} have not arrived");
    }

    /// Puts the migration off: the log keeps the pages, so a later migration or a snapshot can start from them.
    fn put_off(&mut self) -> Outcome<()> {
        self.log.put_back(&self.dirty)?;
        self.dirty.clear();
        Ok(())
    }

    /// Drops a slot that the log does not have any more. Another one may have its id, or its place in the guest, soon. Returns how
    /// many pages of it need not be sent.
    fn drop_slot(&mut self, slot: SlotId, map: GuestMap) -> u64 {
        let dropped = self.log.clear_removed(&mut self.dirty);
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
        in_flight: VecDeque::new(),
        acknowledged: 0,
        breaks: 0,
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

    // The connection breaks, and the round goes on by a new one. There a chunk is lost: the migration is put off.
    let error = source.round(&mut link, 2).expect_err("by these fates");
    println!("{error}: put off");
    // Before that, a DIMM is unplugged that was to be sent.
    let retired = log.retire_slot(DIMM)?;
    guest.delete_slot(DIMM); // KVM_SET_USER_MEMORY_REGION of no size
    log.finish_slot(&retired)?;
    let dropped = source.drop_slot(DIMM, guest::map([(0, 0, 1000)]));
    assert!(dropped > 0, "the DIMM would have been sent last");
    println!("{dropped} pages not sent went with a DIMM");
    source.put_off()?;

    // It is begun again, and finds all that has not arrived. From here on the link breaks at every fifth message.
    let fates = [Fate::Arrives, Fate::Arrives, Fate::Arrives, Fate::Arrives];
    let fates = fates.into_iter().chain([Fate::Breaks]);
    link.fates = fates.cycle().take(5 * MOST_ROUNDS as usize).collect();
    source.breaks = 0;
    let mut rounds = 0;
    loop {
        let left = MOST_ROUNDS - rounds - source.breaks;
        let pages = source.round(&mut link, left)?;
        println!("round {rounds}: {pages} pages");
        rounds += 1;
        if rounds == 4 {
            break; // It fits into the downtime, say.
        }
    }
    guest.kick(); // a signal to the vCPU's thread
    vcpu.join().expect("the vCPU's thread panicked")?;
    // A device has written three pages far apart; and the link breaks while the guest is stopped, too.
    for page in [10, 500, 900] {
        source.memory.write(page, 7);
        log.mark_dirty(RAM, page, 1)?;
    }
    let pages = source.round(&mut link, MOST_ROUNDS - rounds - source.breaks)?;
    println!("the last: {pages} pages, after {} breaks", source.breaks);
    assert!(source.breaks > 20, "the link hardly broke");

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
