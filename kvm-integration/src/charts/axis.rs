// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Axes: what range they have, and where their ticks are.

use std::ops::Range;

use crate::cli::markdown::figure;

/// One axis of a chart.
#[derive(Debug)]
pub struct Axis {
    pub(super) title: &'static str,
    pub(super) scale: Scale,
    pub(super) range: Range<f64>,
    /// Ticks of a linear axis, at most.
    pub(super) labels: usize,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Scale {
    Linear,
    Log,
    Counts,
}

impl Axis {
    /// Even steps.
    pub fn linear(title: &'static str, range: Range<f64>, labels: usize) -> Self {
        let range = range.start..range.end.max(range.start + 1e-3);
        let scale = Scale::Linear;
        Self {
            title,
            scale,
            range,
            labels,
        }
    }

    /// Equal factors are equal steps.
    pub fn log(title: &'static str, range: Range<f64>) -> Self {
        let from = range.start.clamp(1e-3, 1e9);
        let to = range.end.clamp(from * 2.0, 1e12);
        let axis = Self::linear(title, from / 1.1..to * 1.2, 0);
        let scale = Scale::Log;
        Self { scale, ..axis }
    }

    /// From zero, and beyond that nearly like a logarithm, which has no zero.
    pub fn counts(title: &'static str, range: Range<f64>) -> Self {
        let axis = Self::linear(title, 0.0..range.end.clamp(9.0, 1e12) * 1.2, 0);
        let scale = Scale::Counts;
        Self { scale, ..axis }
    }

    /// Those of a logarithmic axis: the fewer of each decade, the more decades.
    pub(super) fn ticks(&self) -> Vec<f64> {
        let decades = (self.range.end / self.range.start).log10();
        let factors: &[f64] = match decades {
            ..1.0 => &[1.0, 1.5, 2.0, 3.0, 5.0, 7.0],
            ..2.0 => &[1.0, 2.0, 5.0],
            ..3.0 => &[1.0, 3.0],
            _ => &[1.0],
        };
        // Of counts, there is nothing between zero and one.
        let least = if self.range.start == 0.0 { 0 } else { -4 };
        let powers = (least..13).map(|power| 10f64.powi(power));
        let all = powers.flat_map(|power| factors.iter().map(move |factor| factor * power));
        let all = [0.0].into_iter().chain(all);
        all.filter(|value| self.range.contains(value)).collect()
    }

    /// A value goes nowhere else.
    pub(super) fn hold(&self, value: f64) -> f64 {
        value.clamp(self.range.start, self.range.end)
    }
}

/// What is written beside a tick. No `0.30000000000000004`, and no `-0`.
pub(super) fn tick(value: f64) -> String {
    match value.abs() {
        ..1000.0 => format!("{}", (value * 1e3).round() / 1e3 + 0.0),
        _ => figure(value),
    }
}
