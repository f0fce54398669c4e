// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is drawn of the samples.

use kvm_integration::charts::Point;
use kvm_integration::guestperf::{Migration, Sample};

/// So many steps has a line that shows the run of things, not each sample.
const WINDOWS: f64 = 60.0;

/// Milliseconds for a GB; infinite while the guest stood still.
fn ms_per_gb(sample: &Sample) -> f64 {
    let moving = sample.ms_per_gb.filter(|ms| ms.is_finite() && *ms > 0.0);
    moving.unwrap_or(f64::INFINITY)
}

/// The guest's pace, sample by sample.
pub fn pace(migration: &Migration) -> Vec<Point> {
    let begin = migration.phases.begin;
    let point = |sample: &Sample| (sample.at - begin, ms_per_gb(sample));
    migration.samples.iter().map(point).collect()
}

/// The guest's pace on the average of times of `window` seconds. While it stands still for a part of
/// such a time, it is slow; infinitely so while it is stopped in the end.
pub fn mean_pace(migration: &Migration, window: f64) -> Vec<Point> {
    let phases = &migration.phases;
    let group = |sample: &Sample| {
        let stopped = phases.stop < sample.at && sample.at <= phases.resume;
        (((sample.at - phases.begin) / window).floor(), stopped)
    };
    let samples = &migration.samples;
    let groups = samples.chunk_by(|one, next| group(one) == group(next));
    let mean = |samples: &[Sample]| {
        // Speeds have a mean, times per GB have not.
        let speed: f64 = samples.iter().map(|sample| ms_per_gb(sample).recip()).sum();
        let (number, stopped) = group(&samples[0]);
        let pace = match stopped {
            true => f64::INFINITY,
            false => samples.len() as f64 / speed,
        };
        ((number + 0.5) * window, pace)
    };
    groups.map(mean).collect()
}

/// How long the times are over which [`mean_pace`] takes the mean, of `span` in all.
pub fn window(span: f64) -> f64 {
    // Whole numbers of hundredths can be written down.
    (span / WINDOWS * 100.0).ceil().max(1.0) / 100.0
}

/// One value of the samples of the migration itself: as steps, without the points in between.
pub fn steps(migration: &Migration, value: impl Fn(&Sample) -> Option<f64>) -> Vec<Point> {
    let phases = &migration.phases;
    let during = phases.begin..=phases.resume;
    let mut points: Vec<Point> = Vec::new();
    for sample in migration
        .samples
        .iter()
        .filter(|sample| during.contains(&sample.at))
    {
        let Some(value) = value(sample).filter(|value| value.is_finite()) else {
            continue;
        };
        let at = sample.at - phases.begin;
        match points.last() {
            Some(&(_, before)) if before == value => {}
            Some(&(_, before)) => points.extend([(at, before), (at, value)]),
            None => points.push((at, value)),
        }
    }
    let end = phases.resume - phases.begin;
    points.extend(points.last().map(|&(_, value)| (end, value)));
    points
}

/// When the guest stood still: from, to.
pub fn stills(migration: &Migration) -> Vec<Point> {
    let mut stills: Vec<Point> = Vec::new();
    let mut from = -migration.phases.begin;
    for (to, ms) in pace(migration) {
        match stills.last_mut() {
            _ if ms.is_finite() => {}
            Some((_, end)) if *end == from => *end = to,
            _ => stills.push((from, to)),
        }
        from = to;
    }
    stills
}

#[cfg(test)]
mod tests {
    use kvm_integration::guestperf::{Figures, Phases};

    use super::*;

    /// A sample each 20 ms, 2 s of each phase.
    fn migration(samples: usize, ms_per_gb: impl Fn(usize) -> Option<f64>) -> Migration {
        let sample = |number: usize| Sample {
            at: number as f64 / 50.0,
            ms_per_gb: ms_per_gb(number),
            full_exits: number as u64 / 75,
            delay_ms: (number > 120).then_some(5.0),
        };
        Migration {
            figures: Figures::default(),
            rounds: Vec::new(),
            phases: Phases {
                begin: 2.0,
                stop: 3.9,
                resume: 4.0,
                end: 6.0,
            },
            samples: (0..samples).map(sample).collect(),
        }
    }

    #[test]
    fn standing_still_is_seen() {
        let still = |number| (!(100..105).contains(&number)).then_some(300.0);
        let migration = migration(300, still);
        assert_eq!(pace(&migration)[102].1, f64::INFINITY);
        let stills = stills(&migration);
        assert_eq!(stills.len(), 1);
        let (from, to) = stills[0];
        assert!((from + 0.02).abs() < 1e-9 && (to - 0.08).abs() < 1e-9);
        assert!(pace(&migration).iter().all(|(_, ms)| !ms.is_nan()));
    }

    #[test]
    fn the_mean_is_one_of_speeds() {
        // Half of the time at 100 ms for a GB, half of it at none: 200 ms for a GB.
        let turns = |number: usize| (number % 2 == 0).then_some(100.0);
        let points = mean_pace(&migration(300, turns), window(24.0));
        assert_eq!(window(24.0), 0.4);
        assert!(points.len() > 10);
        for (_, ms) in points {
            // A time may hold one sample more of the one kind than of the other.
            assert!(ms.is_infinite() || (ms - 200.0).abs() < 25.0, "{ms}");
        }
        let never = mean_pace(&migration(300, |_| None), 0.4);
        assert!(never.iter().all(|(_, ms)| *ms == f64::INFINITY));
    }

    #[test]
    fn steps_are_those_of_the_migration() {
        let migration = migration(300, |_| Some(300.0));
        let exits = steps(&migration, |sample| Some(sample.full_exits as f64));
        assert_eq!(exits, [(0.0, 1.0), (1.0, 1.0), (1.0, 2.0), (2.0, 2.0)]);
        let delays = steps(&migration, |sample| sample.delay_ms);
        assert_eq!(delays.len(), 2);
        assert_eq!(delays[1], (2.0, 5.0));
        assert_eq!(steps(&migration, |_| None), []);
    }
}
