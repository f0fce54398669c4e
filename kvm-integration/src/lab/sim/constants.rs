// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What each number of [`Adaptive`] is good for: the policy with one of them changed, under loads
//! that each tempt it to another mistake.

use std::time::Duration;

use kvm_dirty_ring::pacing::{Adaptive, Tuning};

use super::{Guest, Lateness, Load, Scenario, run_policy};
use crate::lab::{Measured, Shape};

/// A number, in some unit, and other values for it.
struct Constant {
    name: &'static str,
    set: fn(&mut Tuning, f64),
    default: fn(&Tuning) -> f64,
    others: &'static [f64],
}

/// A field of `Tuning`, a number or a time, which is counted in `$unit`s.
macro_rules! constant {
    ($name:literal, $field:ident: f64, $unit:literal, $others:expr) => {
        Constant {
            name: $name,
            set: |tuning, value| tuning.$field = value * $unit,
            default: |tuning| tuning.$field / $unit,
            others: &$others,
        }
    };
    ($name:literal, $field:ident: Duration, $unit:literal, $others:expr) => {
        Constant {
            name: $name,
            set: |tuning, value| tuning.$field = Duration::from_secs_f64(value / $unit),
            default: |tuning| tuning.$field.as_secs_f64() * $unit,
            others: &$others,
        }
    };
}

const CONSTANTS: [Constant; 9] = [
    constant!("half_life, s", half_life: Duration, 1.0, [0.2, 1.0, 20.0]),
    constant!("faster", faster: f64, 1.0, [1.0, 1.2, 1.5, 2.0]),
    constant!("steps", steps: f64, 1.0, [4.0, 10.0, 40.0]),
    constant!("deviations", deviations: f64, 1.0, [0.0, 1.0, 6.0]),
    constant!("least", least: f64, 1.0, [0.0, 0.25, 0.75]),
    constant!("along", along: f64, 1.0, [0.0, 1.0, 16.0]),
    constant!("first_sight, M/s", first_sight: f64, 1e6, [0.4, 1.0, 20.0]),
    constant!("shortest, us", shortest: Duration, 1e6, [500.0, 2000.0]),
    constant!("longest, s", longest: Duration, 1.0, [0.1, 5.0]),
];

/// What a value does, under all loads together.
#[derive(Debug, Clone, Default)]
pub struct Row {
    /// The number's name and unit.
    pub name: &'static str,
    /// Its value.
    pub value: f64,
    /// Whether that is the default.
    pub is_default: bool,
    /// Full exits a minute, a mean over the loads.
    pub full_exits: f64,
    /// Passes ÷ minimum, a mean over the loads.
    pub passes: f64,
    /// Wake-ups a second, a mean over the loads.
    pub wakeups: f64,
}

/// Every number at its default and at other values.
pub fn rows(seed: u64, time: Duration) -> impl Iterator<Item = Row> {
    CONSTANTS.iter().flat_map(move |constant| {
        let default = (constant.default)(&Tuning::DEFAULT);
        let mut values = constant.others.to_vec();
        values.push(default);
        values.sort_by(f64::total_cmp);
        values.into_iter().map(move |value| {
            let mut tuning = Tuning::DEFAULT;
            (constant.set)(&mut tuning, value);
            Row {
                name: constant.name,
                value,
                is_default: value == default,
                ..row(&tuning, seed, time)
            }
        })
    })
}

/// What `tuning` does; of no number yet.
fn row(tuning: &Tuning, seed: u64, time: Duration) -> Row {
    let measured: Vec<Measured> = scenarios(seed, time)
        .iter()
        .map(|scenario| {
            let policy = Box::new(Adaptive::new(*tuning));
            run_policy(scenario, Shape::OwnRing, Some(policy)).measured
        })
        .collect();
    let mean = |number: &dyn Fn(&Measured) -> Option<f64>| {
        let numbers: Vec<f64> = measured.iter().filter_map(number).collect();
        numbers.iter().sum::<f64>() / numbers.len().max(1) as f64
    };
    Row {
        full_exits: mean(&|m| Some(60.0 * m.full_exits_per_second())),
        passes: mean(&Measured::passes_by_minimum),
        wakeups: mean(&|m| Some(m.wakeups_per_second())),
        ..Row::default()
    }
}

/// Loads that it should do well under, in rings of 4,096; the first edge counts, too.
fn scenarios(seed: u64, time: Duration) -> Vec<Scenario> {
    let loads = [
        ("constant", Guest::NATIVE, 1, Lateness::IDLE_CORE),
        ("constant", Guest::FAST, 1, Lateness::IDLE_CORE),
        ("constant", Guest::NATIVE, 8, Lateness::BUSY_CORES),
        ("constant", Guest::NATIVE, 64, Lateness::IDLE_CORE),
        ("bursts", Guest::FAST, 8, Lateness::IDLE_CORE),
        ("ramp", Guest::NATIVE, 1, Lateness::IDLE_CORE),
        ("walk", Guest::NATIVE, 8, Lateness::IDLE_CORE),
        ("trickle", Guest::NATIVE, 8, Lateness::IDLE_CORE),
        ("sliced", Guest::FAST, 8, Lateness::BUSY_CORES),
        ("idle", Guest::NATIVE, 8, Lateness::IDLE_CORE),
    ];
    loads
        .into_iter()
        .filter_map(|(name, guest, vcpus, lateness)| {
            let scenario = Scenario::new(vcpus, Load::Idle);
            let load = Load::named(name, &guest, scenario.soft_limit)?;
            Some(Scenario {
                load,
                guest,
                lateness,
                seed,
                time,
                warm_up: Duration::ZERO,
                ..scenario
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_number_has_its_default_among_its_values() {
        let rows: Vec<Row> = rows(1, Duration::from_millis(500)).collect();
        for constant in CONSTANTS {
            let of = rows.iter().filter(|row| row.name == constant.name);
            assert_eq!(of.clone().count(), constant.others.len() + 1);
            assert_eq!(
                of.filter(|row| row.is_default).count(),
                1,
                "{}",
                constant.name
            );
        }
        // They all ran under the same loads.
        let mut defaults = rows.iter().filter(|row| row.is_default);
        let first = defaults.next().unwrap();
        assert!(first.passes >= 1.0 && first.wakeups > 0.0, "{first:?}");
        assert!(defaults.all(|row| row.passes == first.passes && row.wakeups == first.wakeups));
        // And what is changed is changed.
        let other = rows.iter().filter(|row| !row.is_default);
        let like_default = |row: &&Row| row.passes == first.passes && row.wakeups == first.wakeups;
        assert!(other.filter(like_default).count() <= 2);
    }
}
