// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Models of the crate's own code: every interleaving of a few threads with so many preemptions as the
//! model says, and every value that a weakly ordered load may return.
//!
//! `cargo test --features loom` explores them; under shuttle the same closures run in random
//! interleavings, without either on plain threads, many times over. What is modelled besides the
//! crate is the kernel: see [`kernel`].

mod bitmap;
mod device;
mod faults;
mod gate;
pub(crate) mod kernel;
mod limit;
mod migration;
mod occupancy;
mod ring;
mod slots;
mod tracking;
mod working_set;

/// Explores `body`, with at most `preemptions` preemptions in each execution.
#[cfg(feature = "loom")]
fn model(preemptions: usize, body: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 5_000;
    // Never cut a search short in silence.
    builder.max_duration = None;
    builder.max_permutations = None;
    builder.check(body);
}

/// Samples interleavings of `body`.
#[cfg(all(feature = "modelled", not(feature = "loom")))]
fn model(_preemptions: usize, body: impl Fn() + Send + Sync + 'static) {
    crate::shuttle_tests::explore(500, body);
}

/// Runs `body` on plain threads, often.
#[cfg(not(feature = "modelled"))]
fn model(_preemptions: usize, body: impl Fn() + Send + Sync + 'static) {
    for _ in 0..200 {
        body();
    }
}
