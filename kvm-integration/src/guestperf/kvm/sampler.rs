// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reads how far the guest is, all the time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::guest::StressedGuest;
use super::tracking::Delay;
use crate::guest::vcpu::Progress;
use crate::guestperf::analysis::Reading;
use crate::migration::Observer;
use crate::reaping::full_exit::FullExits;

/// Time between two readings.
const EVERY: Duration = Duration::from_millis(20);

/// What it takes to read a guest that somebody else may be changing meanwhile, and what was read.
pub(super) struct Sampler {
    progress: Vec<Progress>,
    full_exits: Option<Arc<FullExits>>,
    clock_hz: f64,
    delay: Delay,
    readings: Mutex<Vec<Raw>>,
}

/// One reading, and its time.
pub(super) type Raw = (Instant, Reading);

impl Sampler {
    pub(super) fn new(guest: &StressedGuest, delay: &Delay) -> Self {
        Self {
            progress: guest.progress(),
            full_exits: guest.full_exits.clone(),
            clock_hz: guest.clock_hz,
            delay: Delay::clone(delay),
            readings: Mutex::default(),
        }
    }

    /// Reads until it is over.
    pub(super) fn run(&self, over: &AtomicBool) {
        // Relaxed: nothing comes with it.
        while !over.load(Ordering::Relaxed) {
            self.read();
            thread::sleep(EVERY);
        }
        self.read();
    }

    /// Reads once, now. When that was.
    pub(super) fn read(&self) -> Instant {
        // One at a time, so that readings are in order and each gap is in one of them.
        let mut readings = self.readings.lock().unwrap_or_else(PoisonError::into_inner);
        let gaps = self.progress.iter().map(Progress::take_longest_gap);
        let gap = gaps.max().unwrap_or(0) as f64 / self.clock_hz;
        // Relaxed: a number by itself; 0 is no delay yet.
        let delay = self.delay.load(Ordering::Relaxed);
        let full_exits = self.full_exits.as_ref().map_or(0, |full| full.counts().0);
        let at = Instant::now();
        let reading = Reading {
            // Somebody who knows the phases fills this in.
            at: 0.0,
            pages: self.progress.iter().map(Progress::stores).collect(),
            gap,
            full_exits,
            delay: (delay > 0).then(|| Duration::from_nanos(delay).as_secs_f64()),
        };
        readings.push((at, reading));
        at
    }

    pub(super) fn into_readings(self) -> Vec<Raw> {
        let readings = self.readings.into_inner();
        readings.unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads when the guest is to stop.
impl Observer for &Sampler {
    fn stop(&mut self) {
        self.read();
    }
}
