//! Pictures of a guest's rings: one file a guest, one line an arm.

use std::error::Error;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use kvm_integration::lab::{ArmResult, CellResult, Sample};
use plotters::coord::Shift;
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;

const WIDTH: u32 = 1400;
/// The height of an arm's strip.
const STRIP: u32 = 110;
/// The height of a chart of all arms.
const CHART: u32 = 300;
const HEAD: u32 = 40;
/// More points across than this can't be told apart.
const POINTS: usize = 1400;

/// A logarithm has no zero; and less than this nobody sleeps.
const SHORTEST_MS: f64 = 0.1;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// A picture could not be drawn.
#[derive(Debug, thiserror::Error)]
#[error("{} could not be drawn: {why}", .path.display())]
pub struct Undrawn {
    path: PathBuf,
    why: String,
}

/// Draws what was sampled of this guest into a file in `directory`.
///
/// # Errors
/// The file can't be written.
pub fn draw(directory: &Path, result: &CellResult) -> Result<PathBuf, Undrawn> {
    let name = format!(
        "{}-{}x{}.svg",
        result.workload, result.vcpus, result.ring_entries
    );
    let path = directory.join(name);
    let undrawn = |why: String| Undrawn {
        path: path.clone(),
        why,
    };
    let text = picture(result).map_err(|error| undrawn(error.to_string()))?;
    fs::write(&path, text).map_err(|error| undrawn(error.to_string()))?;
    Ok(path)
}

fn picture(result: &CellResult) -> Result<String, Box<dyn Error>> {
    let arms: Vec<&ArmResult> = result
        .arms
        .iter()
        .filter(|arm| !arm.samples.is_empty())
        .collect();
    let mut text = String::new();
    {
        let strips = STRIP * arms.len() as u32;
        let size = (WIDTH, HEAD + strips + 2 * CHART);
        let root = SVGBackend::with_string(&mut text, size).into_drawing_area();
        root.fill(&WHITE)?;
        let root = root.titled(&result.to_string(), ("sans-serif", 22))?;
        let (upper, lower) = root.split_vertically(strips);
        let end = arms.iter().filter_map(|arm| arm.samples.last());
        // The rest is for the names of the lines.
        let end = end.map(|sample| sample.at).fold(0.1, f64::max) * 1.18;
        for (number, (area, arm)) in upper
            .split_evenly((arms.len().max(1), 1))
            .iter()
            .zip(&arms)
            .enumerate()
        {
            strip(area, arm, number, end)?;
        }
        let charts = lower.split_evenly((2, 1));
        delays(&charts[0], &arms, end)?;
        full_exits(&charts[1], &arms, end)?;
        root.present()?;
    }
    Ok(text)
}

/// How full the fullest ring is, under one arm.
fn strip(area: &Area<'_>, arm: &ArmResult, number: usize, end: f64) -> Result<(), Box<dyn Error>> {
    let caption = format!("{}: fullest ring, of its soft limit", arm.arm);
    let mut chart = ChartBuilder::on(area)
        .caption(
            caption,
            ("sans-serif", 13).into_font().color(&color(number)),
        )
        .margin_right(20)
        .set_label_area_size(LabelAreaPosition::Left, 70)
        .set_label_area_size(LabelAreaPosition::Bottom, 18)
        .build_cartesian_2d(0.0..end, 0.0..1.05)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .y_labels(3)
        .light_line_style(TRANSPARENT)
        .draw()?;
    let points = thinned(&arm.samples, |sample| sample.fullest);
    chart.draw_series(LineSeries::new(points, color(number)))?;
    Ok(())
}

/// How long the policy sleeps, under all arms.
fn delays(area: &Area<'_>, arms: &[&ArmResult], end: f64) -> Result<(), Box<dyn Error>> {
    let ms = |sample: &Sample| (sample.delay * 1e3).max(SHORTEST_MS);
    let mut lines = lines(arms, |samples| thinned(samples, ms));
    // Who has no reaper has no delay.
    lines.retain(|line| line.points.iter().any(|&(_, ms)| ms > SHORTEST_MS));
    let scale = (SHORTEST_MS..2000.0).log_scale();
    chart(area, "delay chosen, ms", end, scale, &lines)
}

/// How often vCPUs have stopped, under all arms.
fn full_exits(area: &Area<'_>, arms: &[&ArmResult], end: f64) -> Result<(), Box<dyn Error>> {
    let count = |sample: &Sample| sample.full_exits as f64;
    let lines = lines(arms, |samples| thinned(samples, count));
    let last = arms.iter().filter_map(|arm| arm.samples.last());
    let most = last.map(count).fold(1.0, f64::max);
    chart(area, "full exits so far", end, 0.0..most * 1.05, &lines)
}

struct Line {
    arm: &'static str,
    color: RGBColor,
    points: Vec<(f64, f64)>,
}

fn lines(arms: &[&ArmResult], points: impl Fn(&[Sample]) -> Vec<(f64, f64)>) -> Vec<Line> {
    let line = |(number, arm): (usize, &&ArmResult)| Line {
        arm: arm.arm,
        color: color(number),
        points: points(&arm.samples),
    };
    arms.iter().enumerate().map(line).collect()
}

fn chart<Y>(
    area: &Area<'_>,
    caption: &str,
    end: f64,
    scale: Y,
    lines: &[Line],
) -> Result<(), Box<dyn Error>>
where
    Y: AsRangedCoord<Value = f64>,
    Y::CoordDescType: ValueFormatter<f64>,
{
    let seconds: Range<f64> = 0.0..end;
    let mut chart = ChartBuilder::on(area)
        .caption(caption, ("sans-serif", 15))
        .margin_right(20)
        .set_label_area_size(LabelAreaPosition::Left, 70)
        .set_label_area_size(LabelAreaPosition::Bottom, 35)
        .build_cartesian_2d(seconds, scale)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc("seconds since the arm's start")
        .draw()?;
    for line in lines {
        let (points, color) = (line.points.iter().copied(), line.color);
        chart
            .draw_series(LineSeries::new(points, color.stroke_width(2)))?
            .label(line.arm)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(3)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    Ok(())
}

/// Colours that can be told from white and from each other.
const COLORS: [(u8, u8, u8); 10] = [
    (214, 39, 40),
    (31, 119, 180),
    (44, 160, 44),
    (148, 103, 189),
    (255, 127, 14),
    (140, 86, 75),
    (227, 119, 194),
    (23, 160, 175),
    (60, 60, 60),
    (160, 150, 20),
];

fn color(number: usize) -> RGBColor {
    let (r, g, b) = COLORS[number % COLORS.len()];
    RGBColor(r, g, b)
}

/// No more points than can be told apart: of those in between, the highest counts.
fn thinned(samples: &[Sample], figure: impl Fn(&Sample) -> f64) -> Vec<(f64, f64)> {
    let group = samples.len().div_ceil(POINTS).max(1);
    let highest = |group: &[Sample]| {
        let highest = group.iter().map(|sample| (sample.at, figure(sample)));
        highest.max_by(|a, b| a.1.total_cmp(&b.1))
    };
    samples.chunks(group).filter_map(highest).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(samples: usize) -> CellResult {
        let sample = |number: usize| Sample {
            at: number as f64 / 500.0,
            fullest: (number % 50) as f64 / 50.0,
            delay: 0.002,
            full_exits: number as u64 / 50,
        };
        let arm = |arm| ArmResult {
            samples: (0..samples).map(sample).collect(),
            ..ArmResult::new(arm)
        };
        CellResult {
            workload: "bursts".into(),
            vcpus: 2,
            ring_entries: 1024,
            others: None,
            reset_load: None,
            arms: vec![arm("poll"), arm("fixed")],
        }
    }

    #[test]
    fn every_arm_has_its_strip_and_its_lines() {
        let text = picture(&result(750)).unwrap();
        assert!(text.starts_with("<svg ") && text.trim_end().ends_with("</svg>"));
        assert!(text.contains("bursts, 2 vCPUs, rings of 1024"));
        for arm in ["poll", "fixed"] {
            assert!(text.contains(&format!("{arm}: fullest ring")), "{arm}");
        }
        assert!(text.matches("<polyline").count() >= 6);
    }

    #[test]
    fn who_never_sleeps_has_no_delay() {
        let mut result = result(10);
        let awake = &mut result.arms[1].samples;
        awake.iter_mut().for_each(|sample| sample.delay = 0.0);
        let text = picture(&result).unwrap();
        // A strip, a delay and full exits; or no delay.
        assert_eq!(text.matches("poll").count(), 3);
        assert_eq!(text.matches("fixed").count(), 2);
    }

    #[test]
    fn nothing_sampled_is_drawn_as_nothing() {
        assert!(picture(&result(0)).is_ok());
        assert!(picture(&result(1)).is_ok());
    }

    #[test]
    fn peaks_are_kept() {
        let mut samples = result(30_000).arms.remove(0).samples;
        samples[17_001].fullest = 1.0;
        let points = thinned(&samples, |sample| sample.fullest);
        assert!(points.len() <= POINTS);
        assert!(points.contains(&(17_001.0 / 500.0, 1.0)));
    }
}
