//! Models of the crate's own code: every interleaving of a few threads, and every value that a
//! weakly ordered load may return.
//!
//! `cargo test --features loom` explores them; without the feature the same closures run on plain
//! threads, many times over. What is modelled besides the crate is the kernel: see [`kernel`].

mod device;
mod faults;
mod gate;
mod kernel;
mod migration;
mod occupancy;
mod ring;
mod slots;

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

/// Runs `body` on plain threads, often.
#[cfg(not(feature = "loom"))]
fn model(_preemptions: usize, body: impl Fn() + Send + Sync + 'static) {
    for _ in 0..200 {
        body();
    }
}
