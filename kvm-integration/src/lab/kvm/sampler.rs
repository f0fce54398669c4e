//! Looks at the rings all the time, for a picture.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use kvm_dirty_ring::pacing::RingObservation;

use super::guest::Guest;
use super::reaping::Reaping;
use crate::lab::measure::Sample;

/// Time between two samples: a full ring is there for longer, as a rule.
const EVERY: Duration = Duration::from_millis(2);

/// Samples until it is over.
pub(super) fn sample(guest: &Guest, reaping: &Reaping, over: &AtomicBool) -> Vec<Sample> {
    let start = Instant::now();
    let (before, _) = guest.full_exits.counts();
    let mut rings = Vec::new();
    let mut samples = Vec::new();
    while !over.load(Ordering::Relaxed) {
        guest.log.observe(&mut rings);
        let fill = |ring: &RingObservation| ring.waiting as f64 / ring.soft_limit.max(1) as f64;
        let (full_exits, _) = guest.full_exits.counts();
        samples.push(Sample {
            at: start.elapsed().as_secs_f64(),
            fullest: rings.iter().map(fill).fold(0.0, f64::max),
            delay: Duration::from_nanos(reaping.counts().delay_ns).as_secs_f64(),
            full_exits: full_exits - before,
        });
        thread::sleep(EVERY);
    }
    samples
}
