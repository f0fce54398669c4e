// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One guest under one limit.

use std::num::NonZeroU64;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use kvm_dirty_ring::{DirtyPages, Limiter, Priority, Reaper};
use kvm_integration::cli::interrupt::go_on;
use kvm_integration::machine::Machine;

use crate::options::Options;

/// Between two looks at how far the guest is.
const LOOK: Duration = Duration::from_millis(1);
/// Between two syncs.
const ROUND: Duration = Duration::from_secs(1);
/// The longest that the guest may take to write all of its memory once.
const WARM_UP: Duration = Duration::from_secs(20);

/// What came of it.
#[derive(Default)]
pub struct Measured {
    pub limit: Option<NonZeroU64>,
    pub time: Duration,
    /// Pages that the guest wrote, by its own count.
    pub stores: u64,
    /// Pages that syncs reported.
    pub pages: u64,
    /// Entries that vCPU by vCPU were logged.
    pub logged: Vec<u64>,
    /// Time that vCPUs slept for the limit, all together.
    pub asleep: Duration,
    /// The longest time in which no vCPU wrote a page.
    pub longest_stop: Duration,
    pub full_exits: u64,
}

impl Measured {
    /// What is counted by now, since `start` or the guest's making.
    fn by_now(machine: &dyn Machine, start: Instant) -> Self {
        let stats = machine.log().stats();
        let mut rings = Vec::new();
        machine.log().observe(&mut rings);
        let asleep = stats.vcpus.iter().map(|vcpu| vcpu.limited_ns).sum();
        Self {
            time: start.elapsed(),
            stores: machine.stores(),
            logged: rings.iter().map(|ring| ring.taken + ring.waiting).collect(),
            asleep: Duration::from_nanos(asleep),
            full_exits: stats.full_exits(),
            ..Self::default()
        }
    }
}

/// Runs a new guest under the limit for as long as asked for.
pub fn run(
    options: &Options,
    limit: Option<NonZeroU64>,
    interrupted: &AtomicBool,
) -> Result<Measured> {
    let mut machine = start(options)?;
    let log = machine.log().clone();
    let mut dirty = DirtyPages::new();
    let priority = match options.fifo {
        true => Priority::Fifo(1),
        false => Priority::Inherited,
    };
    let (reaper, limiter) = match options.at_full_rings {
        true => (None, None),
        false => (
            Some(Reaper::spawn(&log, options.pacing.make())?),
            Some(Limiter::spawn_with(&log, priority, machine.kick())?),
        ),
    };
    // Once through all memory, for it to be there.
    let begin = Instant::now();
    while machine.stores() < options.setup().pages && begin.elapsed() < WARM_UP {
        thread::sleep(LOOK);
        go_on(interrupted)?;
        machine.check()?;
    }

    log.set_dirty_limits(limit)?;
    log.sync(&mut dirty)?;
    let start = Instant::now();
    let before = Measured::by_now(&*machine, start);
    let mut pages = 0;
    let mut stops = Stops::new(before.stores);
    for round in 1..=options.seconds {
        let end = start + ROUND * round as u32;
        while Instant::now() < end {
            thread::sleep(LOOK);
            stops.look(machine.stores());
            go_on(interrupted)?;
            machine.check()?;
        }
        log.sync(&mut dirty)?;
        pages += dirty.page_count();
    }
    let after = Measured::by_now(&*machine, start);
    machine.pause()?;
    drop(machine);
    if let Some(limiter) = limiter {
        limiter.stop()?;
    }
    if let Some(reaper) = reaper {
        reaper.stop()?;
    }
    let logged = after.logged.iter().zip(&before.logged);
    Ok(Measured {
        limit,
        time: after.time - before.time,
        stores: after.stores - before.stores,
        pages,
        logged: logged.map(|(after, before)| after - before).collect(),
        asleep: after.asleep - before.asleep,
        longest_stop: stops.longest,
        full_exits: after.full_exits - before.full_exits,
    })
}

/// How long the guest stood still.
struct Stops {
    stores: u64,
    since: Instant,
    longest: Duration,
}

impl Stops {
    fn new(stores: u64) -> Self {
        Self {
            stores,
            since: Instant::now(),
            longest: Duration::ZERO,
        }
    }

    fn look(&mut self, stores: u64) {
        if stores != self.stores {
            (self.stores, self.since) = (stores, Instant::now());
        }
        self.longest = self.longest.max(self.since.elapsed());
    }
}

#[cfg(tiny_guest)]
fn start(options: &Options) -> Result<Box<dyn Machine>> {
    use kvm_integration::kvm_available;
    use kvm_integration::machine::{KvmMachine, Logging};
    let machine = KvmMachine::start(&kvm_available()?, &options.setup(), Logging::Rings)?;
    Ok(Box::new(machine))
}

#[cfg(not(tiny_guest))]
fn start(_options: &Options) -> Result<Box<dyn Machine>> {
    anyhow::bail!(kvm_integration::host::NO_GUEST)
}
