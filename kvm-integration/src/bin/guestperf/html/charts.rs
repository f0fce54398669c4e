//! What each chart of a cell shows.

use std::ops::Range;

use kvm_integration::guestperf::{CellResult, Migration, Sample};
use plotters::style::RGBColor;

use super::axis::Axis;
use super::frame::{Chart, Frame, LEVEL, LIMIT, Phase, Shade, Undrawn};
use super::palette::{Paint, Palette};
use super::points::{self, Point};
use super::text::figure;

/// Of charts with a line for each arm.
const SIZE: (u32, u32) = (600, 330);
/// Of charts of one arm.
const STRIP: (u32, u32) = (600, 170);

const SECONDS: &str = "seconds since the migration began";
const STILL: &str = "still";

/// What a cell's charts have in common: who is drawn, and on which axes.
#[derive(Debug)]
pub struct Charts<'a> {
    /// The arms, each with the migration that stands for it.
    arms: Vec<(Paint, &'a Migration)>,
    time: Range<f64>,
    pace: Range<f64>,
}

impl<'a> Charts<'a> {
    /// Of a cell's arms; those without a migration are left out.
    pub fn new(result: &'a CellResult, palette: &Palette) -> Self {
        let arms = result.arms.iter();
        let arms: Vec<_> = arms
            .filter_map(|arm| Some((palette.paint(arm.arm)?, arm.typical()?)))
            .collect();
        let phases = || arms.iter().map(|(_, one)| one.phases);
        let begin = phases().map(|phases| phases.begin).fold(0.0, f64::max);
        let ends = phases().map(|phases| phases.end - phases.begin);
        let paces = arms.iter().flat_map(|(_, one)| &one.samples);
        Self {
            time: -begin..ends.fold(1e-3, f64::max),
            pace: range(paces.map(points::ms_per_gb)),
            arms,
        }
    }

    /// Who is drawn, with the migration that is.
    pub fn arms(&self) -> &[(Paint, &'a Migration)] {
        &self.arms
    }

    /// How long the times are whose mean is a point of [`Self::pace`], in seconds.
    pub fn window(&self) -> f64 {
        points::window(self.span())
    }

    /// The guest's pace, a line an arm.
    pub fn pace(&self) -> Result<String, Undrawn> {
        let label = "milliseconds a vCPU takes for a GB, over time, a line an arm";
        let (lines, _) = self.lines(|one| points::mean_pace(one, self.span()));
        let values = lines.iter().flat_map(|(_, points)| points);
        let y = pace_axis(&range(values.map(|&(_, ms)| ms)), 0.35);
        let rows = self.arms.len();
        self.over_time(y).draw(label, |chart| {
            for (row, ((paint, points), (_, one))) in lines.iter().zip(&self.arms).enumerate() {
                for still in points::stills(one) {
                    chart.bar(still, row, rows, paint.key)?;
                }
                moving(chart, points, paint.key, 2)?;
                end_dot(chart, *paint, one, points)?;
            }
            Ok(())
        })
    }

    /// Full exits so far, a line an arm.
    pub fn full_exits(&self) -> Result<String, Undrawn> {
        let label = "full exits since the migration began, over time, a line an arm";
        let exits = |sample: &Sample| Some(sample.full_exits as f64);
        let (lines, most) = self.lines(|one| points::steps(one, exits));
        let y = Axis::counts("full exits so far", most);
        self.over_time(y)
            .draw(label, |chart| step_lines(chart, &lines))
    }

    /// How long the reaper is to sleep, a line an arm; none if no arm has a reaper.
    pub fn delays(&self) -> Result<Option<String>, Undrawn> {
        let label = "delay chosen by each policy in milliseconds, over time, a line an arm";
        let (lines, most) = self.lines(|one| points::steps(one, |sample| sample.delay_ms));
        let values = lines.iter().flat_map(|(_, points)| points);
        let least = values.map(|&(_, ms)| ms).fold(most, f64::min);
        if lines.iter().all(|(_, points)| points.is_empty()) {
            return Ok(None);
        }
        // Less than this nobody sleeps.
        let y = Axis::log("delay chosen, ms", least.max(0.1), most);
        self.over_time(y)
            .draw(label, |chart| step_lines(chart, &lines))
            .map(Some)
    }

    /// Pages sent in each round, a line an arm.
    pub fn rounds(&self) -> Result<String, Undrawn> {
        let points = |one: &Migration| {
            let rounds = one.rounds.iter().enumerate();
            let points = rounds.map(|(number, round)| (number as f64 + 1.0, round.pages as f64));
            points.collect::<Vec<Point>>()
        };
        let (lines, most) = self.lines(points);
        let last = lines.iter().map(|(_, points)| points.len()).max();
        let frame = Frame {
            size: SIZE,
            x: Axis::ordinal("round", last.unwrap_or(1), 14.0),
            y: Axis::counts("pages sent", most),
            shades: Vec::new(),
        };
        frame.draw("pages sent in each round, a line an arm", |chart| {
            for ((paint, points), (_, one)) in lines.iter().zip(&self.arms) {
                chart.line(points, paint.key, 2)?;
                // Dots side by side would hide the line.
                if points.len() <= 40 {
                    chart.dots(points, paint.key, 2)?;
                }
                let stopped = points.iter().zip(&one.rounds);
                let stopped = stopped.filter(|(_, round)| !round.running);
                let stopped: Vec<Point> = stopped.map(|(point, _)| *point).collect();
                chart.dots(&stopped, paint.key, 5)?;
            }
            Ok(())
        })
    }

    /// One arm's guest, sample by sample.
    pub fn strip(&self, paint: Paint, one: &Migration) -> Result<String, Undrawn> {
        let phases = &one.phases;
        let since = |at: f64| at - phases.begin;
        let (stop, resume, end) = (since(phases.stop), since(phases.resume), since(phases.end));
        let frame = Frame {
            size: STRIP,
            x: Axis::linear("", self.time.start, self.time.end, 12.0),
            y: pace_axis(&self.pace, 0.16),
            shades: vec![
                shade(Phase::Quiet, -phases.begin, 0.0, "quiet"),
                shade(
                    Phase::Migration,
                    0.0,
                    stop,
                    &format!("migration {} s", figure(resume)),
                ),
                shade(Phase::Stopped, stop, resume, "stopped"),
                shade(Phase::Quiet, resume, end, "quiet"),
            ],
        };
        let label = format!(
            "milliseconds a vCPU takes for a GB, over time: {}",
            paint.arm
        );
        frame.draw(&label, |chart| {
            let quiet = one.figures.quiet_ms_per_gb;
            let points = points::pace(one);
            if quiet.is_finite() && quiet > 0.0 {
                let during = points.iter().filter(|(at, _)| (0.0..=stop).contains(at));
                let during: Vec<Point> = during.copied().collect();
                chart.above(&during, 2.0 * quiet, paint.key)?;
                chart.level(quiet, -phases.begin, end, LEVEL)?;
                chart.level(2.0 * quiet, -phases.begin, end, LIMIT)?;
            }
            for still in points::stills(one) {
                chart.bar(still, 0, 1, paint.key)?;
            }
            moving(chart, &points, paint.key, 1)?;
            Ok(())
        })
    }

    fn over_time(&self, y: Axis) -> Frame {
        let ends = self.arms.iter().map(|(_, one)| migration_seconds(one));
        let (first, last) = ends.fold((self.time.end, 0.0), |(first, last), end| {
            (end.min(first), end.max(last))
        });
        Frame {
            size: SIZE,
            x: Axis::linear(SECONDS, self.time.start, self.time.end, 12.0),
            y,
            shades: vec![
                shade(Phase::Quiet, self.time.start, 0.0, "quiet"),
                shade(Phase::Migration, 0.0, first, "all migrate"),
                shade(Phase::Some, first, last, "some are done"),
                shade(Phase::Quiet, last, self.time.end, "quiet"),
            ],
        }
    }

    /// A line an arm, and the highest value of all.
    fn lines(&self, points: impl Fn(&Migration) -> Vec<Point>) -> (Vec<(Paint, Vec<Point>)>, f64) {
        let lines = self.arms.iter().map(|(paint, one)| (*paint, points(one)));
        let lines: Vec<_> = lines.collect();
        let values = lines.iter().flat_map(|(_, points)| points);
        let most = values.map(|&(_, value)| value).fold(0.0, f64::max);
        (lines, most)
    }

    fn span(&self) -> f64 {
        self.time.end - self.time.start
    }
}

/// A line through the pace; while the guest stands still there is none, but bars in the lane.
fn moving(
    chart: &mut Chart<'_, '_, '_>,
    points: &[Point],
    key: RGBColor,
    width: u32,
) -> Result<(), Undrawn> {
    for run in points.split(|(_, ms)| ms.is_infinite()) {
        match run {
            [] => {}
            [alone] => chart.dots(&[*alone], key, 1)?,
            run => chart.line(run, key, width)?,
        }
    }
    Ok(())
}

/// Each with a dot where the migration ends.
fn step_lines(chart: &mut Chart<'_, '_, '_>, lines: &[(Paint, Vec<Point>)]) -> Result<(), Undrawn> {
    for (paint, points) in lines {
        chart.line(points, paint.key, 2)?;
        chart.dots(
            points.last().map_or(&[], std::slice::from_ref),
            paint.key,
            4,
        )?;
    }
    Ok(())
}

/// A dot on a line through the pace, where the migration ends.
fn end_dot(
    chart: &mut Chart<'_, '_, '_>,
    paint: Paint,
    one: &Migration,
    points: &[Point],
) -> Result<(), Undrawn> {
    let end = migration_seconds(one);
    let mut moving = points.iter().filter(|(_, ms)| ms.is_finite());
    let Some(&(_, value)) = moving.find(|(at, _)| *at >= end) else {
        return Ok(());
    };
    chart.dots(&[(end, value)], paint.key, 4)
}

fn pace_axis(range: &Range<f64>, lane: f64) -> Axis {
    Axis::log("ms/GB", range.start, range.end).with_lane(STILL, lane)
}

/// From the least to the most of what is finite.
fn range(values: impl Iterator<Item = f64>) -> Range<f64> {
    let finite = values.filter(|value| value.is_finite());
    let ends = finite.map(|value| (value, value));
    let ends = ends.reduce(|(low, high), (value, _)| (low.min(value), high.max(value)));
    let (low, high) = ends.unwrap_or((1.0, 10.0));
    low..high
}

fn migration_seconds(one: &Migration) -> f64 {
    one.phases.resume - one.phases.begin
}

fn shade(phase: Phase, from: f64, to: f64, label: &str) -> Shade {
    Shade {
        phase,
        from,
        to,
        label: label.into(),
    }
}
