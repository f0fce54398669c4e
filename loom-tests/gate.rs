// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The reset gate alone: which ioctl serves which pass.

use std::io;

use super::model;
use crate::harvest::reset_gate::{ResetGate, Rings};
use crate::kernel::{Kernel, Recycled};
use crate::sync::{Arc, AtomicBool, Mutex, Ordering, lock, thread};

/// A kernel that protects, at its end, what was marked when it began.
struct Slow<const N: usize> {
    marked: [AtomicBool; N],
    protected: [AtomicBool; N],
    /// Resets that fail first.
    failures: Mutex<usize>,
}

impl<const N: usize> Slow<N> {
    fn new(failures: usize) -> Arc<Self> {
        Arc::new(Self {
            marked: core::array::from_fn(|_| AtomicBool::new(false)),
            protected: core::array::from_fn(|_| AtomicBool::new(false)),
            failures: Mutex::new(failures),
        })
    }

    /// Marks an entry, as a pass does.
    fn mark(&self, entry: usize, gate: &ResetGate) {
        let mut harvest = gate.harvest();
        self.marked[entry].store(true, Ordering::Relaxed);
        harvest.marked = 1;
    }
}

impl<const N: usize> Kernel for Slow<N> {
    fn reset(&self) -> io::Result<Recycled> {
        let mut failures = lock(&self.failures);
        if *failures > 0 {
            *failures -= 1;
            return Err(io::Error::other("not now"));
        }
        // Everything relaxed: what is marked and not yet protected is ordered by the gate alone.
        let marked = self.marked.each_ref().map(|m| m.load(Ordering::Relaxed));
        thread::yield_now();
        let mut recycled = 0u32;
        for (marked, protected) in marked.into_iter().zip(&self.protected) {
            if marked && !protected.load(Ordering::Relaxed) {
                protected.store(true, Ordering::Relaxed);
                recycled += 1;
            }
        }
        Ok(recycled.into())
    }
}

/// Rings that are no business of the models of the gate.
struct NoRings;

impl Rings for NoRings {
    fn nothing_awaits_reset(&self) -> bool {
        false
    }

    fn look_for_overruns(&self) -> bool {
        false
    }

    fn suspect_last_batches(&self) {}
}

/// `N` passes at once, each of one entry.
fn passes<const N: usize>(preemptions: usize) {
    model(preemptions, || {
        let kernel = Slow::<N>::new(0);
        let gate = Arc::new(ResetGate::default());
        let pass = |me: usize| {
            let (kernel, gate) = (Arc::clone(&kernel), Arc::clone(&gate));
            move || {
                kernel.mark(me, &gate);
                let faults = gate.reset(&*kernel, &NoRings).unwrap();
                assert_eq!(faults, 0, "a reset that did all it had to was called short");
                assert!(
                    kernel.protected[me].load(Ordering::Relaxed),
                    "served by a reset that had started before the entry was marked"
                );
            }
        };
        let others: Vec<_> = (1..N).map(|me| thread::spawn(pass(me))).collect();
        pass(0)();
        for other in others {
            other.join().unwrap();
        }
        let resets = gate.stats().resets;
        assert!((1..=N as u64).contains(&resets), "{resets} resets");
    });
}

#[test]
fn gate_two_passes() {
    passes::<2>(4);
}

#[test]
fn gate_three_passes() {
    passes::<3>(3);
}

/// A reset that fails serves no pass, and no pass hangs.
#[test]
fn gate_failure() {
    model(3, || {
        let kernel = Slow::<2>::new(1);
        let gate = Arc::new(ResetGate::default());
        let pass = |me: usize| {
            let (kernel, gate) = (Arc::clone(&kernel), Arc::clone(&gate));
            move || {
                kernel.mark(me, &gate);
                let served = gate.reset(&*kernel, &NoRings).is_ok();
                if served {
                    let protected = kernel.protected[me].load(Ordering::Relaxed);
                    assert!(protected, "the failure was swallowed");
                }
            }
        };
        let other = thread::spawn(pass(1));
        // A pass whose own reset failed may yet be served by the other's.
        pass(0)();
        other.join().unwrap();
        assert_eq!(gate.stats().failed, 1);
        // The entries of those it failed are recycled by the next that does not count them again.
        gate.reset(&*kernel, &NoRings).unwrap();
        for protected in &kernel.protected {
            assert!(protected.load(Ordering::Relaxed));
        }
        assert_eq!(gate.faults(), 0);
    });
}
