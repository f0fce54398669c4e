// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Looks at the rings all the time, for a picture.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use kvm_dirty_ring::pacing::RingObservation;

use crate::lab::measure::Sample;
use crate::reaping::full_exit::FullExits;
use crate::reaping::reaper::Reaping;

/// Time between two samples: a full ring is there for longer, as a rule.
const EVERY: Duration = Duration::from_millis(2);

/// Samples until it is over.
pub(super) fn sample(
    full_exits: &FullExits,
    reaping: Option<&Reaping>,
    over: &AtomicBool,
) -> Vec<Sample> {
    let start = Instant::now();
    let (before, _) = full_exits.counts();
    let mut rings = Vec::new();
    let mut samples = Vec::new();
    while !over.load(Ordering::Relaxed) {
        full_exits.log().observe(&mut rings);
        let fill = |ring: &RingObservation| ring.waiting as f64 / ring.soft_limit.max(1) as f64;
        let delay_ns = reaping.map_or(0, |reaping| reaping.counts().delay_ns);
        samples.push(Sample {
            at: start.elapsed().as_secs_f64(),
            fullest: rings.iter().map(fill).fold(0.0, f64::max),
            delay: Duration::from_nanos(delay_ns).as_secs_f64(),
            full_exits: full_exits.counts().0 - before,
        });
        thread::sleep(EVERY);
    }
    samples
}
