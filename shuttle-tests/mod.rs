// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Larger compositions of the crate's own code than loom can exhaust, in random interleavings.
//!
//! Shuttle runs all threads of a schedule on one and chooses at each atomic access, lock and wait
//! who goes on. It knows nothing of weak orderings: those are loom's. What a protocol keeps to one
//! thread at a time (payloads, the words of shards) fails a schedule in which two are at it.
//!
//! `cargo test --features shuttle --lib` runs some thousands of schedules of each composition and
//! some hundreds of each model of `loom-tests/`; `SHUTTLE_SCHEDULES` says how many of each
//! composition. A failure prints its schedule, which holds all that was left to chance. To see it
//! again:
//!
//! ```sh
//! SHUTTLE_REPLAY=SCHEDULE cargo test --features shuttle --lib -- --exact shuttle_tests::compositions::NAME
//! ```

mod compositions;
mod machine;

use core::ops::Range;
use std::env;

use shuttle::rand::{Rng, RngCore, thread_rng};
use shuttle::scheduler::{PctScheduler, RandomScheduler, ReplayScheduler, Scheduler};
use shuttle::{Config, Runner};

use crate::sync::Arc;

/// Depths of the schedulers that bound preemptions: so many less one, at random places.
const DEPTHS: [usize; 3] = [2, 3, 5];

/// Runs `body` in `schedules` interleavings: a quarter by a scheduler that chooses anew at each
/// step, the rest by those that bound preemptions.
pub(crate) fn explore(schedules: usize, body: impl Fn() + Send + Sync + 'static) {
    let body = Arc::new(body);
    let run = |scheduler: Box<dyn Scheduler + Send>| {
        let mut config = Config::new();
        config.stack_size = 1 << 18;
        // That orderings are taken for sequentially consistent is known here.
        config.silence_warnings = true;
        config
            .ungraceful_shutdown_config
            .immediately_return_on_panic = true;
        let body = Arc::clone(&body);
        Runner::new(scheduler, config).run(move || body())
    };
    if let Ok(schedule) = env::var("SHUTTLE_REPLAY") {
        run(Box::new(ReplayScheduler::new_from_encoded(&schedule)));
        return;
    }
    let each = schedules.div_ceil(1 + DEPTHS.len());
    let mut ran = run(Box::new(RandomScheduler::new(each)));
    for depth in DEPTHS {
        ran += run(Box::new(PctScheduler::new(depth, each)));
    }
    println!("{ran} schedules");
    assert!(ran >= schedules, "{ran} schedules instead of {schedules}");
}

/// Runs a composition in as many interleavings as are asked for.
fn compose(body: impl Fn() + Send + Sync + 'static) {
    let schedules = match env::var("SHUTTLE_SCHEDULES") {
        Ok(number) => number.parse().expect("SHUTTLE_SCHEDULES is a number"),
        Err(_) => 5_000,
    };
    explore(schedules, body);
}

/// A random number, which a replay draws again.
fn pick(range: Range<usize>) -> usize {
    thread_rng().gen_range(range)
}

/// A value that nobody has written before.
fn fresh() -> u64 {
    thread_rng().next_u64()
}
