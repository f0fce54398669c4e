// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The only file that names atomics, locks and threads, except for parts that are not modelled: the simulated kernel, and the
//! channels through which the crate's own threads start.
//!
//! Built for its own tests with the feature `loom` or `shuttle`, the crate uses loom's or shuttle's versions of them. So the
//! models in `loom-tests/` and `shuttle-tests/` check the code that ships. With both features it uses loom's. All other builds use
//! the standard library's, including those of a dependent that enables the features.

pub(crate) use std::sync::{Arc, OnceLock, PoisonError};

#[cfg(not(all(test, feature = "modelled")))]
mod real {
    pub(crate) use core::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
    pub(crate) use std::sync::{Condvar, Mutex, MutexGuard};
    pub(crate) use std::thread;

    macro_rules! plain {
        ($name:ident, $atomic:ident, $int:ty) => {
            /// Memory that the protocol around it never lets two threads access at once while one of them writes.
            ///
            /// Relaxed atomic accesses compile to plain loads and stores. They keep a mistake, or a kernel that breaks the protocol, from
            /// being undefined behaviour. Under loom this is a cell that reports every access not ordered by happens-before; under
            /// shuttle it reports two accesses at once.
            #[repr(transparent)]
            #[derive(Default)]
            pub(crate) struct $name($atomic);

            impl super::Plain for $name {
                type Int = $int;

                // Relaxed: pairs with nothing. The user of the type orders accesses by other means.
                #[inline(always)]
                fn load(&self) -> $int {
                    self.0.load(Ordering::Relaxed)
                }

                // Relaxed: as for `load`.
                #[inline(always)]
                fn store(&self, value: $int) {
                    self.0.store(value, Ordering::Relaxed)
                }
            }
        };
    }
    plain!(PlainU8, AtomicU8, u8);
    plain!(PlainU32, AtomicU32, u32);
    plain!(PlainU64, AtomicU64, u64);

    /// Lends `memory` to `borrower` as plain integers, which compilers can optimise better.
    ///
    /// # Safety
    /// No other thread may access it before this returns.
    #[inline(always)]
    pub(crate) unsafe fn lend<P: super::Plain, T>(
        memory: &[P],
        borrower: impl FnOnce(&mut [P::Int]) -> T,
    ) -> T {
        let start = memory.as_ptr().cast_mut().cast::<P::Int>();
        // SAFETY: each `Plain` is a transparent atomic, which has the size and bits of its integer
        // and may be written through a shared reference; the caller promises that we are alone.
        borrower(unsafe { core::slice::from_raw_parts_mut(start, memory.len()) })
    }
}

#[cfg(all(test, feature = "loom"))]
mod model {
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
    pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};
    pub(crate) use loom::thread;

    macro_rules! plain {
        ($name:ident, $int:ty) => {
            /// The race-checked double of the production type.
            pub(crate) struct $name(loom::cell::UnsafeCell<$int>);

            // SAFETY: loom tracks every access and fails the model at the first two that race.
            unsafe impl Sync for $name {}
            // SAFETY: an integer may move between threads.
            unsafe impl Send for $name {}

            impl Default for $name {
                fn default() -> Self {
                    Self(loom::cell::UnsafeCell::new(0))
                }
            }

            impl super::Plain for $name {
                type Int = $int;

                fn load(&self) -> $int {
                    // SAFETY: the pointer is the cell's own; loom has checked that nobody writes.
                    self.0.with(|p| unsafe { *p })
                }

                fn store(&self, value: $int) {
                    // SAFETY: the pointer is the cell's own; loom has checked that nobody else
                    // reads or writes.
                    self.0.with_mut(|p| unsafe { *p = value })
                }
            }
        };
    }
    plain!(PlainU8, u8);
    plain!(PlainU32, u32);
    plain!(PlainU64, u64);
}

#[cfg(all(test, feature = "modelled", not(feature = "loom")))]
mod model {
    use shuttle::sync::RwLock;
    pub(crate) use shuttle::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
    pub(crate) use shuttle::sync::{Condvar, Mutex, MutexGuard};
    pub(crate) use shuttle::thread;

    macro_rules! plain {
        ($name:ident, $int:ty) => {
            /// The race-checked double of the production type: a lock on which no thread waits. Other threads run while it is held.
            #[derive(Default)]
            pub(crate) struct $name(RwLock<$int>);

            impl super::Plain for $name {
                type Int = $int;

                fn load(&self) -> $int {
                    *self.0.try_read().expect("a data race: read while written")
                }

                fn store(&self, value: $int) {
                    *self
                        .0
                        .try_write()
                        .expect("a data race: written while accessed") = value;
                }
            }
        };
    }
    plain!(PlainU8, u8);
    plain!(PlainU32, u32);
    plain!(PlainU64, u64);
}

/// Lends a copy of `memory`, each access checked on the way there and back.
///
/// # Safety
/// As for the production function; a breach fails the model.
#[cfg(all(test, feature = "modelled"))]
pub(crate) unsafe fn lend<P: Plain, T>(
    memory: &[P],
    borrower: impl FnOnce(&mut [P::Int]) -> T,
) -> T {
    let mut copy: Vec<_> = memory.iter().map(P::load).collect();
    let result = borrower(&mut copy);
    memory
        .iter()
        .zip(copy)
        .for_each(|(to, from)| to.store(from));
    result
}

#[cfg(all(test, feature = "modelled"))]
pub(crate) use model::*;
#[cfg(not(all(test, feature = "modelled")))]
pub(crate) use real::*;

/// The common interface of `PlainU8`, `PlainU32` and `PlainU64`.
pub(crate) trait Plain {
    type Int: Copy;
    fn load(&self) -> Self::Int;
    fn store(&self, value: Self::Int);
}

/// Locks, even if the last holder panicked.
///
/// Every critical section of the crate leaves its data whole at each point where it can unwind. So a poisoned lock is no reason
/// to stop, and giving up would lose pages.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits on `condvar`, even if the last holder of its lock panicked.
pub(crate) fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condvar.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

/// Waits on `condvar` until `until` at the latest; it may also wake up for no reason. A model has no time: a thread that waits
/// there is woken, or waits for ever, which the model reports.
pub(crate) fn wait_until<'a, T>(
    condvar: &Condvar,
    guard: MutexGuard<'a, T>,
    until: std::time::Instant,
) -> MutexGuard<'a, T> {
    #[cfg(all(test, feature = "modelled"))]
    {
        let _ = until;
        wait(condvar, guard)
    }
    #[cfg(not(all(test, feature = "modelled")))]
    {
        let left = until.saturating_duration_since(std::time::Instant::now());
        let woken = condvar.wait_timeout(guard, left);
        woken.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// A statistic. Any thread may add to it and read it, and no decision depends on its order. So it is a relaxed counter that models
/// need not cover.
#[derive(Debug, Default)]
pub(crate) struct Counter(core::sync::atomic::AtomicU64);

impl Counter {
    // Relaxed, as is every access below: pairs with nothing, a count publishes no other memory.
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, core::sync::atomic::Ordering::Relaxed);
    }

    pub(crate) fn set(&self, n: u64) {
        self.0.store(n, core::sync::atomic::Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(core::sync::atomic::Ordering::Relaxed)
    }
}

/// Types whose all-zero bytes are their zero value.
///
/// # Safety
/// An all-zero bit pattern must be a valid value of the type.
#[cfg(not(all(test, feature = "modelled")))]
pub(crate) unsafe trait Zero: Sized {}

/// Types that start at zero; those of models are built one by one.
#[cfg(all(test, feature = "modelled"))]
pub(crate) trait Zero: Default {}

macro_rules! zero {
    ($($type:ty),*) => {$(
        // SAFETY: an integer, or a transparent wrapper of one, for which zero is a value.
        #[cfg(not(all(test, feature = "modelled")))]
        unsafe impl Zero for $type {}

        #[cfg(all(test, feature = "modelled"))]
        impl Zero for $type {}
    )*};
}
zero!(u8, u64, AtomicU64, PlainU8, PlainU64);

/// Returns `len` zeroes, or `None` where the allocator refuses.
///
/// Large blocks come from the operating system as zero pages and take memory only where they are written, so an idle guest's
/// bitmaps cost next to nothing.
#[cfg(not(all(test, feature = "modelled")))]
pub(crate) fn zeroed<T: Zero>(len: usize) -> Option<Box<[T]>> {
    let layout = core::alloc::Layout::array::<T>(len).ok()?;
    if layout.size() == 0 {
        return Some(Box::new([]));
    }
    // SAFETY: the layout's size is not zero.
    let start = unsafe { std::alloc::alloc_zeroed(layout) }.cast::<T>();
    if start.is_null() {
        return None;
    }
    let slice = core::ptr::slice_from_raw_parts_mut(start, len);
    // SAFETY: the block was allocated by the global allocator with this slice's layout, nobody else
    // has it, and `Zero` promises that its zero bytes are values.
    Some(unsafe { Box::from_raw(slice) })
}

/// Returns `len` zeroes, each registered with the model.
#[cfg(all(test, feature = "modelled"))]
pub(crate) fn zeroed<T: Zero>(len: usize) -> Option<Box<[T]>> {
    Some((0..len).map(|_| T::default()).collect())
}
