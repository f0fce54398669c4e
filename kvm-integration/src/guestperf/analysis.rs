// SPDX-License-Identifier: Apache-2.0 OR MIT
//! From what was read of a running guest to what it felt.

use super::result::{Figures, Phases, Sample, Spread};

/// Pages of a GB.
const GB: f64 = (1u64 << 18) as f64;
/// A drop is significant when a GB takes so many times as long as before.
const SIGNIFICANT: f64 = 2.0;

/// What was read at one moment.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Reading {
    /// When, in seconds on the clock of [`Phases`].
    pub(crate) at: f64,
    /// Pages each vCPU has done so far.
    pub(crate) pages: Vec<u64>,
    /// The longest time between two pages of a vCPU since the reading before, in seconds.
    pub(crate) gap: f64,
    /// Full exits so far.
    pub(crate) full_exits: u64,
    /// How long the policy has the reaper sleep, in seconds.
    pub(crate) delay: Option<f64>,
}

impl Figures {
    /// What the guest felt, and nothing else yet. From readings in order of time, among them one at
    /// the migration's begin and one when the guest is to stop; `None` if there is no other one of the
    /// quiet phase before.
    pub(crate) fn felt(readings: &[Reading], phases: &Phases) -> Option<Self> {
        // From the last reading that is not later than `from` on.
        let between = |from: f64, to: f64| -> &[Reading] {
            let begin = readings.partition_point(|reading| reading.at <= from);
            let end = readings.partition_point(|reading| reading.at <= to);
            let begin = begin.saturating_sub(1);
            readings.get(begin..end).unwrap_or_default()
        };
        let quiet = median(&Steps::of(between(0.0, phases.begin)))?;
        let migration = between(phases.begin, phases.stop);
        let steps = Steps::of(migration);
        let dropped = steps.iter().filter(|step| {
            step.ms_per_gb
                .is_none_or(|speed| speed > SIGNIFICANT * quiet)
        });
        let (first, last) = (migration.first()?, migration.last()?);
        let pages = last.pages.iter().sum::<u64>() - first.pages.iter().sum::<u64>();
        // The reading at the begin took the quiet phase's gaps away.
        let gaps = migration[1..].iter().map(|reading| reading.gap);
        let stall = gaps.fold(standing(migration), f64::max);
        Some(Self {
            quiet_ms_per_gb: quiet,
            median_ms_per_gb: median(&steps)?,
            worst_ms_per_gb: worst(migration)?,
            drop_seconds: dropped.fold(0.0, |sum, step| sum + step.seconds),
            longest_stall_ms: stall * 1e3,
            guest_pages_per_second: pages as f64 / (last.at - first.at),
            ..Self::default()
        })
    }
}

/// What to show of the readings.
pub(crate) fn samples(readings: &[Reading], phases: &Phases) -> Vec<Sample> {
    let started = readings.partition_point(|reading| reading.at <= phases.begin);
    let before = started
        .checked_sub(1)
        .map_or(0, |at| readings[at].full_exits);
    let steps = Steps::of(readings);
    let samples = readings.iter().skip(1).zip(steps);
    samples
        .map(|(reading, step)| Sample {
            at: reading.at,
            ms_per_gb: step.ms_per_gb,
            full_exits: reading.full_exits.saturating_sub(before),
            delay_ms: reading.delay.map(|delay| delay * 1e3),
        })
        .collect()
}

/// From one reading to the next.
struct Steps {
    seconds: f64,
    /// Of a vCPU on average; `None` if none did anything.
    ms_per_gb: Option<f64>,
}

impl Steps {
    fn of(readings: &[Reading]) -> Vec<Self> {
        let step = |pair: &[Reading]| {
            let seconds = pair[1].at - pair[0].at;
            let done = pair[1].pages.iter().sum::<u64>() - pair[0].pages.iter().sum::<u64>();
            let per_vcpu = done as f64 / pair[0].pages.len() as f64;
            Self {
                seconds,
                ms_per_gb: (done > 0).then(|| seconds * 1e3 * GB / per_vcpu),
            }
        };
        readings.windows(2).map(step).collect()
    }
}

/// `None` without steps. One in which nothing was done counts as if it was a page.
fn median(steps: &[Steps]) -> Option<f64> {
    let speeds = steps
        .iter()
        .map(|step| step.ms_per_gb.unwrap_or(step.seconds * 1e3 * GB));
    Spread::of(speeds.collect()).map(|spread| spread.median)
}

/// The longest that any vCPU was seen at one and the same page, in seconds: what it would have
/// said of that, had it not been stopped first.
fn standing(readings: &[Reading]) -> f64 {
    let vcpus = readings.first().map_or(0, |reading| reading.pages.len());
    let of = |vcpu: usize| {
        let same = readings.chunk_by(|a, b| a.pages[vcpu] == b.pages[vcpu]);
        let times = same.map(|same| same[same.len() - 1].at - same[0].at);
        times.fold(0.0, f64::max)
    };
    (0..vcpus).map(of).fold(0.0, f64::max)
}

/// The longest that any vCPU took for a GB, from any reading on, in milliseconds. A GB that it was
/// not through with in the end took at least until then. Of a vCPU that has not done one in all the
/// time, how long it would have taken for one at that pace.
fn worst(readings: &[Reading]) -> Option<f64> {
    let vcpus = readings.first()?.pages.len();
    let of = |vcpu: usize| {
        let points: Vec<(f64, f64)> = readings
            .iter()
            .map(|reading| (reading.at, reading.pages[vcpu] as f64))
            .collect();
        slowest(&points)
    };
    (0..vcpus).filter_map(of).reduce(f64::max)
}

fn slowest(points: &[(f64, f64)]) -> Option<f64> {
    let (first, last) = (points.first()?, points.last()?);
    let done = last.1 - first.1;
    if done < GB {
        return Some((last.0 - first.0) * GB / done.max(1.0) * 1e3);
    }
    let mut end = 0;
    let mut worst = 0.0_f64;
    for &(begin, pages) in points {
        let goal = pages + GB;
        while end < points.len() && points[end].1 < goal {
            end += 1;
        }
        let at = match points.get(end) {
            None => last.0,
            Some((t1, p1)) => {
                // It was done somewhere between two readings.
                let (t0, p0) = points[end - 1];
                t0 + (t1 - t0) * (goal - p0) / (p1 - p0)
            }
        };
        worst = worst.max(at - begin);
    }
    Some(worst * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every 0.1 s, so many pages more of each vCPU.
    fn readings(steps: &[&[u64]]) -> Vec<Reading> {
        let mut pages = vec![0; steps[0].len()];
        let mut readings = vec![Reading {
            at: 0.0,
            pages: pages.clone(),
            gap: 0.0,
            full_exits: 0,
            delay: None,
        }];
        for (n, step) in (1..).zip(steps) {
            pages
                .iter_mut()
                .zip(*step)
                .for_each(|(sum, more)| *sum += more);
            readings.push(Reading {
                at: f64::from(n) / 10.0,
                pages: pages.clone(),
                gap: f64::from(n) * 0.01,
                full_exits: n as u64 * 3,
                delay: Some(0.5),
            });
        }
        readings
    }

    const PHASES: Phases = Phases {
        begin: 0.3,
        stop: 0.9,
        resume: 1.0,
        end: 1.3,
    };

    /// Of one vCPU.
    fn felt(steps: &[u64]) -> Figures {
        let steps: Vec<_> = steps.iter().map(|step| [*step]).collect();
        let steps: Vec<&[u64]> = steps.iter().map(|step| &step[..]).collect();
        Figures::felt(&readings(&steps), &PHASES).unwrap()
    }

    fn near(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-6 * b.abs().max(1.0), "{a} is not {b}");
    }

    #[test]
    fn what_is_felt_is_what_happened() {
        let gb = GB as u64;
        // Quiet: a GB each 100 ms. Then half, a third, nothing, and as before again.
        let felt = felt(&[gb, gb, gb, gb, gb / 2, gb / 3, 0, gb, gb, 0, gb, gb, gb]);
        near(felt.quiet_ms_per_gb, 100.0);
        // Half as fast is not more than twice as slow.
        near(felt.drop_seconds, 0.2);
        // From the reading at 0.4: half, a third, nothing, and a sixth of the next step.
        near(felt.worst_ms_per_gb, 300.0 + 100.0 / 6.0);
        // Of 100, 200, 300, for ever, 100 and 100.
        near(felt.median_ms_per_gb, 150.0);
        near(felt.longest_stall_ms, 100.0);
        near(felt.guest_pages_per_second, (3.0 + 5.0 / 6.0) * GB / 0.6);
    }

    #[test]
    fn a_vcpu_that_stands_when_it_is_stopped_has_stalled() {
        let gb = GB as u64;
        let felt = felt(&[gb, gb, gb, gb, gb, gb, 0, 0, 0, 0]);
        near(felt.longest_stall_ms, 300.0);
        near(felt.drop_seconds, 0.3);
        // It was not through with the last GB.
        near(felt.worst_ms_per_gb, 300.0);
    }

    #[test]
    fn the_slowest_vcpu_counts_and_speed_is_the_mean() {
        let gb = GB as u64;
        let both: &[u64] = &[gb, gb];
        let one: &[u64] = &[gb + gb / 2, gb / 2];
        let steps = [both, both, both, one, one, one, one, one, one];
        let felt = Figures::felt(&readings(&steps), &PHASES).unwrap();
        near(felt.drop_seconds, 0.0);
        near(felt.median_ms_per_gb, 100.0);
        near(felt.worst_ms_per_gb, 200.0);
    }

    #[test]
    fn less_than_a_gb_is_judged_by_its_pace() {
        let gb = GB as u64;
        let felt = felt(&[gb, gb, gb, 100, 100, 0, 0, 0, 0]);
        near(felt.worst_ms_per_gb, 600.0 * GB / 200.0);
        near(felt.drop_seconds, 0.6);
        // Mostly nothing: still a number.
        near(felt.median_ms_per_gb, 100.0 * GB);
    }

    #[test]
    fn too_few_readings_tell_nothing() {
        let gb: &[u64] = &[GB as u64];
        assert_eq!(Figures::felt(&[], &PHASES), None);
        assert_eq!(Figures::felt(&readings(&[gb]), &PHASES), None);
        assert_eq!(Figures::felt(&readings(&[gb, gb]), &PHASES), None);
    }

    #[test]
    fn samples_count_full_exits_from_the_migration_on() {
        let some: &[u64] = &[5, 5];
        let none: &[u64] = &[0, 0];
        let samples = samples(&readings(&[some, some, some, none, some]), &PHASES);
        let full: Vec<u64> = samples.iter().map(|sample| sample.full_exits).collect();
        assert_eq!(full, [0, 0, 0, 3, 6]);
        assert_eq!(samples[3].ms_per_gb, None);
        near(samples[4].ms_per_gb.unwrap(), 100.0 * GB / 5.0);
        assert_eq!(samples[0].delay_ms, Some(500.0));
    }
}
