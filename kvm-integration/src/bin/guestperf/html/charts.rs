// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The charts of a cell.

use std::ops::Range;

use kvm_integration::charts::{
    Arm, Axis, Chart, Key, LEVEL, LIMIT, Legend, Point, QUIET, SOME, STOPPED, Shape, Undrawn,
    arm as key, extent, figure, outermost,
};
use kvm_integration::cli::markdown;
use kvm_integration::guestperf::{CellResult, Migration, Round, Sample};

use super::points;

/// Of charts with a line for each arm.
const SIZE: (u32, u32) = (600, 330);
/// Of charts of one arm.
const STRIP: (u32, u32) = (600, 170);
const SECONDS: &str = "seconds since the migration began";
/// As many fit side by side.
const TICKS: usize = 12;
/// More points than this cannot be distinguished.
const POINTS: usize = 360;

const STRIPS: &str = "<details open>\n<summary>Each arm by itself, every sample</summary>\n<p>ms/GB over seconds since the migration began. The thin line is the quiet \
    median, the dotted one twice as much: above it the guest is in its drop, which is filled. Bars in \
    the lane <i>still</i> are samples in which the guest did nothing. <span class=\"quiet\">Quiet \
    phases</span> and <span class=\"stopped\">the time with the guest stopped</span> are shaded.</p>\n";

type Shapes = Vec<(Key, Shape)>;

/// What a cell's charts have in common.
struct Charts<'a> {
    legend: &'a Legend,
    /// The arms by their numbers, each with the migration that stands for it.
    arms: Vec<(usize, &'a Migration)>,
    time: Range<f64>,
}

/// All of them, where there is anything to draw.
pub fn charts(result: &CellResult, legend: &Legend) -> Result<String, Undrawn> {
    let arms = result.arms.iter();
    let arms = arms.filter_map(|arm| Some((legend.number(arm.arm)?, arm.typical()?)));
    let arms: Vec<_> = arms.collect();
    if arms.is_empty() {
        return Ok("<p>Nothing to draw.</p>\n".into());
    }
    let phases = || arms.iter().map(|(_, one)| one.phases);
    let begin = phases().map(|phases| phases.begin).fold(0.0, f64::max);
    let ends = phases().map(|phases| phases.end - phases.begin);
    let time = -begin..ends.fold(1e-3, f64::max);
    let charts = Charts { legend, arms, time };
    let (pace, delays) = (charts.pace()?, charts.delays()?);
    let (full_exits, rounds) = (charts.full_exits()?, charts.rounds()?);
    let all = pace + &delays + &full_exits + &rounds;
    Ok(format!(
        "<div class=\"charts\">\n{all}</div>\n{}",
        charts.strips()?
    ))
}

impl Charts<'_> {
    /// The guest's pace, a line an arm.
    fn pace(&self) -> Result<String, Undrawn> {
        let window = points::window(self.time.end - self.time.start);
        let shapes = self.shapes(|one| {
            let points = points::mean_pace(one, window);
            let end = seconds(one);
            let mut after = points
                .iter()
                .filter(|(at, ms)| *at >= end && ms.is_finite());
            let dot = after.next().map(|&(_, ms)| (end, ms));
            [
                Shape::Stills(points::stills(one)),
                Shape::Line(points, 2),
                Shape::Dots(dot.into_iter().collect(), 4),
            ]
        });
        let caption = format!(
            "Guest speed: milliseconds a vCPU takes for a GB, less is faster; the mean of every \
             {window} s. A dot ends a migration. In the lane <i>still</i> each arm has a row, with \
             bars where its guest stood still."
        );
        let y = Axis::log("ms/GB", extent(&shapes));
        self.over_time(&caption, y, &shapes)
    }

    /// How long the reaper is to sleep, a line an arm; nothing if no arm has a reaper.
    fn delays(&self) -> Result<String, Undrawn> {
        let mut samples = self.arms.iter().flat_map(|(_, one)| &one.samples);
        if samples.all(|sample| sample.delay_ms.is_none()) {
            return Ok(String::new());
        }
        let shapes = self.steps(|sample| sample.delay_ms);
        // Less than this nobody sleeps.
        let range = extent(&shapes);
        let y = Axis::log("delay chosen, ms", range.start.max(0.1)..range.end);
        self.over_time("Delay that each policy chose for its reaper.", y, &shapes)
    }

    /// Full exits so far, a line an arm.
    fn full_exits(&self) -> Result<String, Undrawn> {
        let shapes = self.steps(|sample| Some(sample.full_exits as f64));
        let y = Axis::counts("full exits so far", extent(&shapes));
        self.over_time("Full exits, added up.", y, &shapes)
    }

    /// Pages sent in each round, a line an arm.
    fn rounds(&self) -> Result<String, Undrawn> {
        let shapes = self.shapes(|one| {
            let rounds = (1..).zip(&one.rounds);
            let place = |(number, round): (u32, &Round)| (f64::from(number), round.pages as f64);
            let stopped = rounds.clone().filter(|(_, round)| !round.running);
            [
                Shape::Line(rounds.clone().map(place).collect(), 2),
                Shape::Dots(rounds.map(place).collect(), 2),
                Shape::Dots(stopped.map(place).collect(), 5),
            ]
        });
        let last = self.arms.iter().map(|(_, one)| one.rounds.len()).max();
        let last = last.unwrap_or_default().max(2);
        let chart = Chart {
            size: SIZE,
            x: Axis::linear("round", 0.7..last as f64 + 0.3, last.min(TICKS)),
            y: Axis::counts("pages sent", extent(&shapes)),
            bands: &[],
            shapes: &shapes,
        };
        let caption = "Pages sent per round. The large dot is the round with the guest stopped.";
        figure("", caption, &chart)
    }

    /// Each arm's guest by itself, those of one policy side by side.
    fn strips(&self) -> Result<String, Undrawn> {
        let mut arms = self.arms.clone();
        arms.sort_by_key(|(number, _)| {
            let arm = self.legend.arms[*number];
            (arm.hue, arm.dashed)
        });
        // All on one scale, so that they can be compared.
        let paces = extent(&self.shapes(|one| [Shape::Line(points::pace(one), 1)]));
        let mut html = format!("{STRIPS}<div class=\"charts strips\">\n");
        for (number, one) in arms {
            html += &self.strip(number, one, Axis::log("ms/GB", paces.clone()))?;
        }
        Ok(html + "</div>\n</details>\n")
    }

    /// One arm's guest, sample by sample.
    fn strip(&self, number: usize, one: &Migration, y: Axis) -> Result<String, Undrawn> {
        let (key, Arm { name, dashed, .. }) = (key(number), self.legend.arms[number]);
        let since = |at: f64| at - one.phases.begin;
        let (stop, resume, end) = (since(one.phases.stop), seconds(one), since(one.phases.end));
        let points = outermost(&points::pace(one), POINTS);
        let during = points.iter().filter(|(at, _)| (0.0..=stop).contains(at));
        let during: Vec<Point> = during.copied().collect();
        let mut shapes = vec![(key, Shape::Stills(points::stills(one)))];
        let quiet = one.figures.quiet_ms_per_gb;
        if quiet.is_finite() && quiet > 0.0 {
            let level = |ms| Shape::Line(vec![(since(0.0), ms), (end, ms)], 1);
            shapes.push((key, Shape::Above(during, 2.0 * quiet)));
            shapes.push((LEVEL, level(quiet)));
            shapes.push((LIMIT, level(2.0 * quiet)));
        }
        shapes.push((key, Shape::Line(points, 1)));
        let migration = format!("migration {} s", markdown::figure(resume));
        let chart = Chart {
            size: STRIP,
            x: Axis::linear("", self.time.clone(), TICKS),
            y,
            bands: &[
                (Some(QUIET), since(0.0)..0.0, "quiet"),
                (None, 0.0..stop, &migration),
                (Some(STOPPED), stop..resume, "stopped"),
                (Some(QUIET), resume..end, "quiet"),
            ],
            shapes: &shapes,
        };
        let of = &one.figures;
        let figures = [of.drop_seconds, of.worst_ms_per_gb, of.longest_stall_ms];
        let [drop, worst, stall] = figures.map(markdown::figure);
        let mut caption = format!(
            "<b>{}</b>: drop {drop} s, worst {worst} ms/GB, stall {stall} ms",
            self.legend.named(name)
        );
        if !of.converged {
            caption += ", did not converge";
        }
        if of.missed_pages > 0 {
            let pages = of.missed_pages;
            caption += &format!(", <span class=\"alarm\">⚠ {pages} pages missed</span>");
        }
        let dashed = if dashed { " dashed" } else { "" };
        figure(&format!("of-arm-{number}{dashed}"), &caption, &chart)
    }

    /// What is drawn of each arm, in its colour.
    fn shapes<const N: usize>(&self, of: impl Fn(&Migration) -> [Shape; N]) -> Shapes {
        let arms = self.arms.iter();
        let shapes = arms.flat_map(|(number, one)| of(one).map(|shape| (key(*number), shape)));
        shapes.collect()
    }

    /// A line an arm, with a dot where the migration ends.
    fn steps(&self, value: impl Fn(&Sample) -> Option<f64>) -> Shapes {
        self.shapes(|one| {
            let points = outermost(&points::steps(one, &value), POINTS);
            let end = points.last().copied().into_iter().collect();
            [Shape::Line(points, 2), Shape::Dots(end, 4)]
        })
    }

    fn over_time(&self, caption: &str, y: Axis, shapes: &Shapes) -> Result<String, Undrawn> {
        let ends = self.arms.iter().map(|(_, one)| seconds(one));
        let first = ends.clone().fold(self.time.end, f64::min);
        let last = ends.fold(0.0, f64::max);
        let chart = Chart {
            size: SIZE,
            x: Axis::linear(SECONDS, self.time.clone(), TICKS),
            y,
            bands: &[
                (Some(QUIET), self.time.start..0.0, "quiet"),
                (None, 0.0..first, "all migrate"),
                (Some(SOME), first..last, "some are done"),
                (Some(QUIET), last..self.time.end, "quiet"),
            ],
            shapes,
        };
        figure("", caption, &chart)
    }
}

/// How long the migration took.
fn seconds(one: &Migration) -> f64 {
    one.phases.resume - one.phases.begin
}
