// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How fast vCPUs dirty memory.

use core::time::Duration;
use std::time::Instant;

use super::DirtyLog;
use crate::kernel::Mode;
use crate::pacing::RingObservation;
use crate::pacing::fading::FadingMean;
use crate::sync::thread;

/// Seconds after which a sample has half its weight in [`Rate::mean`].
const HALF_LIFE: f64 = 5.0;

/// A dirty rate, in pages a second.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[non_exhaustive]
pub struct Rate {
    /// Between the last two samples.
    pub last: f64,
    /// Over all samples so far: a mean in which a sample that is five seconds old has half the weight.
    pub mean: f64,
}

/// The dirty rates of a VM.
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct Rates {
    /// The VM: the sum of its vCPUs.
    pub vm: Rate,
    /// The vCPUs, in the order in which they were attached.
    pub vcpus: Vec<Rate>,
}

/// Computes dirty rates from samples of a log: of each vCPU and of the VM.
///
/// It counts entries that vCPUs have logged, whether or not any thread has taken them from the rings yet. An entry is the first
/// write to a page since it was last protected. So a rate is a lower bound of what the guest writes, and depends on how often
/// rings are reset: a page that is written all the time makes one entry more per reset, while a sync reports it once. Writes
/// of devices are not included, nor are writes to [members](crate::DirtyPages::members) of a working set, which are not protected.
///
/// Bitmaps do not record which vCPU wrote, so in [`Mode::Bitmap`] there is nothing to sample.
///
/// It reads no clock: times count from a moment of the caller's choice.
///
/// ```
/// # let vm = kvm_dirty_ring::sim::SimVm::new(Default::default());
/// # let log = vm.dirty_log();
/// # let slot = kvm_dirty_ring::SlotId::new(0, 0);
/// # log.add_slot(slot, 100)?;
/// # vm.create_slot(slot, 100);
/// # let vcpu = vm.add_vcpu();
/// # let ring = log.attach_ring(vcpu.ring_memory())?;
/// use std::time::Duration;
/// use kvm_dirty_ring::RateMeter;
///
/// let mut meter = RateMeter::default();
/// meter.sample(&log, Duration::ZERO);
/// // The guest writes 50 pages within half a second.
/// # (0..50).for_each(|page| vcpu.write(slot, page).unwrap());
/// let rates = meter.sample(&log, Duration::from_millis(500)).ok_or("no rings")?;
/// assert_eq!(rates.vcpus[0].last, 100.0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct RateMeter {
    last: Option<Duration>,
    known: Vec<Known>,
    vm: FadingMean,
    rates: Rates,
    rings: Vec<RingObservation>,
}

/// What the last sample recorded of a vCPU.
#[derive(Debug, Clone, Copy, Default)]
struct Known {
    logged: u64,
    mean: FadingMean,
}

impl RateMeter {
    /// Takes a sample at time `now`, and returns the rates, in pages a second; `None` in [`Mode::Bitmap`].
    ///
    /// The rates are zero at the first sample, and those of a vCPU at the first sample after it was attached. A sample at the same
    /// time as the one before changes nothing. If the clock has gone back, rates stay, and the next sample counts from this one. No
    /// rate is ever infinite or not a number.
    pub fn sample(&mut self, log: &DirtyLog, now: Duration) -> Option<&Rates> {
        if log.mode() == Mode::Bitmap {
            return None;
        }
        let mut rings = core::mem::take(&mut self.rings);
        log.observe(&mut rings);
        self.take(
            rings
                .iter()
                .map(|ring| ring.taken.saturating_add(ring.waiting)),
            now,
        );
        self.rings = rings;
        Some(&self.rates)
    }

    /// Returns the rates of the last sample.
    pub fn rates(&self) -> &Rates {
        &self.rates
    }

    /// Adds the numbers of pages that each vCPU has logged by `now`.
    fn take(&mut self, logged: impl Iterator<Item = u64>, now: Duration) {
        let elapsed = self.last.and_then(|last| now.checked_sub(last));
        if elapsed == Some(Duration::ZERO) {
            return;
        }
        self.last = Some(now);
        let seconds = elapsed.map(|elapsed| elapsed.as_secs_f64());
        let old = self.known.len();
        let mut sum = 0.0;
        for (place, logged) in logged.enumerate() {
            if place >= self.known.len() {
                self.known.push(Known::default());
                self.rates.vcpus.push(Rate::default());
            }
            let known = &mut self.known[place];
            // A harvest of a broken ring can make the count go back. Do not count those entries twice.
            let logged = logged.max(known.logged);
            let more = (logged - core::mem::replace(&mut known.logged, logged)) as f64;
            // Entries from before a vCPU's first sample belong to no interval.
            if let Some(seconds) = seconds.filter(|_| place < old) {
                sum += more;
                known.mean.add(more, seconds, HALF_LIFE);
                self.rates.vcpus[place] = Rate {
                    last: more / seconds,
                    mean: known.mean.per_second(),
                };
            }
        }
        if let Some(seconds) = seconds {
            self.vm.add(sum, seconds, HALF_LIFE);
            self.rates.vm = Rate {
                last: sum / seconds,
                mean: self.vm.per_second(),
            };
        }
    }
}

impl Rates {
    /// Watches the VM for `time`, during which it blocks, and returns how fast it dirtied memory, as QEMU's
    /// `calc-dirty-rate` does.
    ///
    /// `None` in [`Mode::Bitmap`].
    ///
    /// Logging must be on for the slots that count. Sync right before, as pages that are not protected when it begins do not
    /// count, and copy what that sync reports as that of any other.
    pub fn measure(log: &DirtyLog, time: Duration) -> Option<Self> {
        let mut meter = RateMeter::default();
        let start = Instant::now();
        meter.sample(log, Duration::ZERO)?;
        thread::sleep(time);
        meter.sample(log, start.elapsed())?;
        Some(meter.rates)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn take(meter: &mut RateMeter, logged: &[u64], now: Duration) -> Rates {
        meter.take(logged.iter().copied(), now);
        meter.rates.clone()
    }

    #[test]
    fn rates_are_differences_over_time() {
        let mut meter = RateMeter::default();
        assert_eq!(take(&mut meter, &[700, 9], 3 * SECOND).vm, Rate::default());
        let rates = take(&mut meter, &[1700, 9], 5 * SECOND);
        assert_eq!(
            [rates.vm.last, rates.vcpus[0].last, rates.vcpus[1].last],
            [500.0, 500.0, 0.0]
        );
        assert_eq!(rates.vm.mean, 500.0);
        // Five seconds halve the weight of the two before: 0.5 x 1000 pages in 0.5 x 2 s, and 0 in
        // 5.
        let rates = take(&mut meter, &[1700, 9], 10 * SECOND);
        assert_eq!(rates.vm.last, 0.0);
        assert!((rates.vm.mean - 500.0 / 6.0).abs() < 1e-9, "{rates:?}");
    }

    #[test]
    fn a_vcpu_that_comes_later_has_no_past() {
        let mut meter = RateMeter::default();
        take(&mut meter, &[0], Duration::ZERO);
        let rates = take(&mut meter, &[100, 1 << 40], SECOND);
        assert_eq!((rates.vm.last, rates.vcpus[1]), (100.0, Rate::default()));
        let rates = take(&mut meter, &[100, (1 << 40) + 50], 2 * SECOND);
        assert_eq!((rates.vm.last, rates.vcpus[1].last), (50.0, 50.0));
    }

    #[test]
    fn what_was_seen_before_is_not_counted_twice() {
        let mut meter = RateMeter::default();
        take(&mut meter, &[100], Duration::ZERO);
        for (logged, rate) in [(60, 0.0), (100, 0.0), (110, 10.0)] {
            let now = meter.last.unwrap() + SECOND;
            assert_eq!(take(&mut meter, &[logged], now).vm.last, rate);
        }
    }

    #[test]
    fn time_that_stands_still_or_goes_back_changes_no_rate() {
        let mut meter = RateMeter::default();
        take(&mut meter, &[0], 9 * SECOND);
        let rates = take(&mut meter, &[100], 10 * SECOND);
        assert_eq!(take(&mut meter, &[200], 10 * SECOND), rates);
        // Entries that were logged meanwhile are not forgotten.
        assert_eq!(take(&mut meter, &[200], 11 * SECOND).vm.last, 100.0);
        let rates = take(&mut meter, &[300], SECOND);
        assert_eq!(rates.vm.last, 100.0);
        assert_eq!(take(&mut meter, &[310], 2 * SECOND).vm.last, 10.0);
    }

    proptest! {
        /// Whatever the input, rates are numbers not below zero, and the VM's is the sum of its vCPUs'.
        #[test]
        fn rates_are_numbers(
            samples in prop::collection::vec(
                (prop::collection::vec(any::<u64>(), 0..4), any::<u64>(), any::<bool>()),
                1..20,
            ),
        ) {
            let mut meter = RateMeter::default();
            for (logged, time, coarse) in samples {
                let unit = if coarse { Duration::from_secs } else { Duration::from_nanos };
                let time = unit(time);
                let before = meter.rates.vcpus.len();
                let back = meter.last.is_none_or(|last| time <= last);
                let rates = take(&mut meter, &logged, time);
                for rate in rates.vcpus.iter().chain([&rates.vm]) {
                    prop_assert!(rate.last.is_finite() && rate.last >= 0.0, "{:?}", rate);
                    prop_assert!(rate.mean.is_finite() && rate.mean >= 0.0, "{:?}", rate);
                }
                if !back && logged.len() >= before {
                    let sum: f64 = rates.vcpus[..before].iter().map(|rate| rate.last).sum();
                    prop_assert!((sum - rates.vm.last).abs() <= sum * 1e-9);
                }
            }
        }

        /// A guest at a steady rate has that rate, however irregular the samples, from the second
        /// on.
        #[test]
        fn a_steady_rate_is_its_mean(
            rate in 1u64..1_000_000,
            times in prop::collection::vec(1u64..5_000, 1..30),
        ) {
            let mut meter = RateMeter::default();
            let mut now = 0;
            take(&mut meter, &[0], Duration::ZERO);
            for time in times {
                now += time;
                let rates = take(&mut meter, &[now * rate], Duration::from_secs(now));
                for found in [rates.vm.last, rates.vm.mean] {
                    prop_assert!((found / rate as f64 - 1.0).abs() < 1e-9, "{found}");
                }
            }
        }
    }
}
