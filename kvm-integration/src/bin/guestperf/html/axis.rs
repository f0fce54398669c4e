//! Axes: where a value goes, and what is written beside.

use std::ops::Range;

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};

use super::text::figure;

/// One axis of a chart.
#[derive(Debug, Clone)]
pub struct Axis {
    /// What it shows, and in what unit.
    pub title: &'static str,
    /// Where a value goes, before it is held to the range.
    map: fn(f64) -> f64,
    /// The ends of the scale.
    low: f64,
    high: f64,
    /// The end of what is drawn: beyond `high` if there is a lane for what is off the scale.
    end: f64,
    ticks: Vec<(f64, String)>,
}

impl Axis {
    /// Even steps.
    pub fn linear(title: &'static str, from: f64, to: f64, most_ticks: f64) -> Self {
        let to = to.max(from + 1e-3);
        let step = step((to - from) / most_ticks);
        let numbers = (from / step).ceil() as i64..=(to / step).floor() as i64;
        let tick = |number: i64| {
            let at = number as f64 * step;
            // No `0.30000000000000004`.
            (at, format!("{}", (at * 1e3).round() / 1e3))
        };
        Self::new(title, |value| value, from..to, numbers.map(tick).collect())
    }

    /// Each whole number, if there are not too many.
    pub fn ordinal(title: &'static str, last: usize, most_ticks: f64) -> Self {
        let step = step(last as f64 / most_ticks).max(1.0) as usize;
        let ticks = (1..=last).filter(|number| *number == 1 || number % step == 0);
        // `1` and `2` do not fit side by side if the steps are wide.
        let ticks = ticks.filter(|number| step < 5 || *number != 2);
        let ticks = ticks.map(|number| (number as f64, number.to_string()));
        let range = 0.7..last.max(2) as f64 + 0.3;
        Self::new(title, |value| value, range, ticks.collect())
    }

    /// Equal factors are equal steps.
    pub fn log(title: &'static str, from: f64, to: f64) -> Self {
        let from = from.clamp(1e-3, 1e9);
        let to = to.clamp(from * 2.0, 1e12);
        let range = from.log10() - 0.04..to.log10() + 0.04;
        let map = |value: f64| value.max(1e-6).log10();
        let ticks = decades(&range)
            .into_iter()
            .map(|value| (value.log10(), figure(value)));
        let ticks = ticks.filter(|(at, _)| range.contains(at)).collect();
        Self::new(title, map, range, ticks)
    }

    /// From zero, and beyond that nearly like a logarithm, which has no zero.
    pub fn counts(title: &'static str, most: f64) -> Self {
        let map = |value: f64| (1.0 + value.max(0.0)).log10();
        let range = 0.0..map(most.max(9.0)) * 1.04;
        let tens = (0..12).map(|power| 10f64.powi(power));
        let ticks = [0.0].into_iter().chain(tens);
        let ticks = ticks.map(|value| (map(value), figure(value)));
        let ticks = ticks.filter(|(at, _)| range.contains(at)).collect();
        Self::new(title, map, range, ticks)
    }

    /// With a lane above, under this name, for what is infinite: so large a part of the scale.
    pub fn with_lane(mut self, name: &str, part: f64) -> Self {
        self.end = self.high + (self.high - self.low) * part;
        self.ticks.push((self.lane(), name.into()));
        self
    }

    fn new(
        title: &'static str,
        map: fn(f64) -> f64,
        range: Range<f64>,
        ticks: Vec<(f64, String)>,
    ) -> Self {
        Self {
            title,
            map,
            low: range.start,
            high: range.end,
            end: range.end,
            ticks,
        }
    }

    /// Where a value goes: always within the axis.
    pub fn place(&self, value: f64) -> f64 {
        if value == f64::INFINITY {
            return self.lane();
        }
        let place = (self.map)(value);
        if place.is_nan() {
            return self.low;
        }
        place.clamp(self.low, self.high)
    }

    /// The ends of what is drawn.
    pub fn ends(&self) -> Range<f64> {
        self.low..self.end
    }

    /// Where the lane begins, if there is one.
    pub fn lane_begin(&self) -> Option<f64> {
        (self.end > self.high).then_some(self.high)
    }

    fn lane(&self) -> f64 {
        f64::midpoint(self.high, self.end)
    }
}

/// Plotters deals in places, not in values.
impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, place: &f64, (from, to): (i32, i32)) -> i32 {
        let share = (place - self.low) / (self.end - self.low);
        from + (share * f64::from(to - from)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() {
            return Vec::new();
        }
        self.ticks.iter().map(|(place, _)| *place).collect()
    }

    fn range(&self) -> Range<f64> {
        self.ends()
    }
}

impl ValueFormatter<f64> for Axis {
    fn format_ext(&self, place: &f64) -> String {
        let tick = self.ticks.iter().find(|(at, _)| at == place);
        tick.map_or_else(String::new, |(_, label)| label.clone())
    }
}

/// The next of 1, 2, 5, 10, 20, …
fn step(least: f64) -> f64 {
    let power = 10f64.powf(least.max(1e-3).log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power);
    let next = steps.into_iter().find(|step| *step >= least * 0.999);
    next.unwrap_or(10.0 * power)
}

/// Round numbers for a logarithmic axis: the fewer of each decade, the more decades.
fn decades(range: &Range<f64>) -> Vec<f64> {
    let factors: &[f64] = match range.end - range.start {
        ..1.0 => &[1.0, 1.5, 2.0, 3.0, 5.0, 7.0],
        ..1.8 => &[1.0, 2.0, 3.0, 5.0],
        ..2.4 => &[1.0, 2.0, 5.0],
        ..3.2 => &[1.0, 3.0],
        _ => &[1.0],
    };
    let powers = range.start.floor() as i32..=range.end.ceil() as i32;
    let numbers = powers.flat_map(|power| factors.iter().map(move |f| f * 10f64.powi(power)));
    numbers.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(axis: &Axis) -> Vec<String> {
        axis.ticks.iter().map(|(_, label)| label.clone()).collect()
    }

    #[test]
    fn ticks_are_round_numbers() {
        assert_eq!(
            labels(&Axis::linear("s", -1.5, 6.2, 8.0)),
            ["-1", "0", "1", "2", "3", "4", "5", "6"]
        );
        assert_eq!(
            labels(&Axis::linear("s", -0.2, 0.5, 8.0)),
            ["-0.2", "-0.1", "0", "0.1", "0.2", "0.3", "0.4", "0.5"]
        );
        assert_eq!(
            labels(&Axis::log("ms", 150.0, 700.0)),
            ["150", "200", "300", "500", "700"]
        );
        assert_eq!(
            labels(&Axis::log("ms", 1.0, 90_000.0)),
            ["1", "10", "100", "1000", "10\u{a0}k"]
        );
        assert_eq!(
            labels(&Axis::counts("exits", 150.0)),
            ["0", "1", "10", "100"]
        );
        assert_eq!(labels(&Axis::ordinal("round", 3, 10.0)), ["1", "2", "3"]);
        assert_eq!(
            labels(&Axis::ordinal("round", 30, 10.0)),
            ["1", "5", "10", "15", "20", "25", "30"]
        );
    }

    #[test]
    fn no_value_leaves_the_axis() {
        let axes = [
            Axis::linear("s", 0.0, 0.0, 5.0),
            Axis::log("ms", 0.0, 0.0).with_lane("still", 0.2),
            Axis::log("ms", 1e300, 1e308),
            Axis::counts("exits", 0.0),
            Axis::ordinal("round", 0, 10.0),
        ];
        let values = [0.0, -1.0, 1e300, f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
        for axis in axes {
            for value in values {
                let (place, ends) = (axis.place(value), axis.ends());
                assert!(
                    ends.start <= place && place <= ends.end,
                    "{value} at {place} of {axis:?}"
                );
            }
        }
    }

    #[test]
    fn the_lane_is_above_all_values() {
        let axis = Axis::log("ms", 10.0, 1000.0).with_lane("still", 0.2);
        assert!(axis.place(f64::INFINITY) > axis.place(1e9));
        assert_eq!(axis.format_ext(&axis.place(f64::INFINITY)), "still");
    }
}
