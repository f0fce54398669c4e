//! Reads how far the guest is, all the time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::guest::StressedGuest;
use super::tracking::Delay;
use crate::guestperf::analysis::Reading;
use crate::vcpu::Progress;

/// Time between two readings.
const EVERY: Duration = Duration::from_millis(20);

/// What it takes to read a guest that somebody else may be changing meanwhile.
pub(super) struct Sampler {
    progress: Vec<Progress>,
    full_exits: Box<dyn Fn() -> u64 + Send>,
    tsc_hz: f64,
    delay: Delay,
}

/// One reading, and its time.
pub(super) type Raw = (Instant, Reading);

impl Sampler {
    pub(super) fn new(guest: &StressedGuest, delay: &Delay) -> Self {
        let full_exits = guest.rings.as_ref().map(|rings| rings.full_exits.clone());
        Self {
            progress: guest.progress(),
            full_exits: Box::new(move || full_exits.as_ref().map_or(0, |full| full.counts().0)),
            tsc_hz: guest.tsc_hz,
            delay: Delay::clone(delay),
        }
    }

    /// Reads until it is over.
    pub(super) fn run(self, over: &AtomicBool) -> Vec<Raw> {
        let mut readings = vec![self.read()];
        while !over.load(Ordering::Relaxed) {
            thread::sleep(EVERY);
            readings.push(self.read());
        }
        readings
    }

    fn read(&self) -> Raw {
        let gaps = self.progress.iter().map(Progress::take_longest_gap);
        let gap = gaps.max().unwrap_or(0) as f64 / self.tsc_hz;
        // Relaxed: a number by itself; 0 is no delay yet.
        let delay = self.delay.load(Ordering::Relaxed);
        let at = Instant::now();
        let reading = Reading {
            // Somebody who knows the phases fills this in.
            at: 0.0,
            pages: self.progress.iter().map(Progress::stores).collect(),
            gap,
            full_exits: (self.full_exits)(),
            delay: (delay > 0).then(|| Duration::from_nanos(delay).as_secs_f64()),
        };
        (at, reading)
    }
}
