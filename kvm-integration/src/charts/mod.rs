// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Charts, and the pages that show them. A page is one file, which needs no other and no network,
//! and is read in light and in dark.
//!
//! Plotters draws, and knows no themes. What it is given as a colour is a key, which the style of the
//! page looks up.

mod axis;
mod page;
#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;

use plotters::coord::cartesian::Cartesian2d;
use plotters::coord::ranged1d::{AsRangedCoord, Ranged, ValueFormatter};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

pub use self::axis::Axis;
use self::axis::{Scale, tick};
pub use self::page::{Arm, Legend, facts, figure, page, remarks, section, table};

/// A time in seconds, and a value.
pub type Point = (f64, f64);

/// A chart could not be drawn.
pub type Undrawn = DrawingAreaErrorKind<io::Error>;

type Plot<'a, 'b, Y> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, Y>>;

/// A colour that the page's style looks up.
pub type Key = RGBColor;

const TEXT: Key = RGBColor(0, 0, 0);
const GRID: Key = RGBColor(0, 0, 1);
const AXIS: Key = RGBColor(0, 0, 2);
/// A line to compare with.
pub const LEVEL: Key = RGBColor(0, 0, 3);
/// A limit.
pub const LIMIT: Key = RGBColor(0, 0, 4);
/// A time in which nothing goes on but the guest.
pub const QUIET: Key = RGBColor(0, 0, 5);
/// A time in which some arms are done, and some are not.
pub const SOME: Key = RGBColor(0, 0, 6);
/// A time in which the guest is stopped.
pub const STOPPED: Key = RGBColor(0, 0, 7);

/// The arm of this number in the page's legend.
pub fn arm(number: usize) -> Key {
    RGBColor(0, 1, number as u8)
}

/// Of the font, in the units of plotters, which are smaller than those of SVG.
const FONT: (&str, u32) = ("sans-serif", 15);
/// About the width of a character of the font.
const CHARACTER: f64 = 6.3;
/// The height of the lane for bars, if not each row needs more.
const LANE: i32 = 18;
const LEAST_ROW: i32 = 6;

/// A chart: what lies on which axes.
#[derive(Debug)]
pub struct Chart<'a> {
    /// Width and height.
    pub size: (u32, u32),
    /// To the right.
    pub x: Axis,
    /// Upwards.
    pub y: Axis,
    /// Times that are shaded, or not, and what is written above them if there is room.
    pub bands: &'a [(Option<Key>, Range<f64>, &'a str)],
    /// What is drawn; the first lies undermost.
    pub shapes: &'a [(Key, Shape)],
}

/// What is drawn.
#[derive(Debug)]
pub enum Shape {
    /// A line so wide. It is interrupted where a value is not finite.
    Line(Vec<Point>, u32),
    /// Dots of such a radius.
    Dots(Vec<Point>, u32),
    /// What lies between a line and a level below it.
    Above(Vec<Point>, f64),
    /// Times of standing still, from and to: bars in a row of their own, above the scale.
    Stills(Vec<Point>),
}

impl Chart<'_> {
    fn draw(&self) -> Result<String, Undrawn> {
        let (range, ticks) = (self.y.range.clone(), self.y.ticks());
        match self.y.scale {
            Scale::Linear => self.draw_on(range),
            Scale::Log => self.draw_on(range.log_scale().with_key_points(ticks)),
            Scale::Counts => {
                self.draw_on(range.log_scale().zero_point(-1.0).with_key_points(ticks))
            }
        }
    }

    fn draw_on<Y>(&self, y: Y) -> Result<String, Undrawn>
    where
        Y: AsRangedCoord<Value = f64>,
        Y::CoordDescType: ValueFormatter<f64>,
    {
        let stills = self.shapes.iter().filter_map(|(key, shape)| match shape {
            Shape::Stills(times) => Some((*key, times)),
            _ => None,
        });
        let rows = stills.clone().count() as i32;
        let row = (LANE / rows.max(1)).max(LEAST_ROW);
        let lane = row * rows;
        let above = if self.bands.is_empty() { 10 } else { 20 };
        let below = if self.x.title.is_empty() { 22 } else { 42 };
        let mut svg = String::new();
        let root = SVGBackend::with_string(&mut svg, self.size).into_drawing_area();
        let mut plot = ChartBuilder::on(&root)
            .margin_top(lane + above)
            .margin_right(14)
            .set_label_area_size(LabelAreaPosition::Left, 66)
            .set_label_area_size(LabelAreaPosition::Bottom, below)
            .build_cartesian_2d(self.x.range.clone(), y)?;
        let (across, down) = plot.plotting_area().get_pixel_range();
        let top = down.start - lane;
        let pixel = |at| plot.backend_coord(&(self.x.hold(at), self.y.range.start)).0;
        let bar = |from: f64, to: f64, height: Range<i32>, key: Key| {
            // At least so wide that it is seen.
            let (left, right) = (pixel(from), pixel(to).max(pixel(from) + 1));
            let corners = [(left, height.start), (right, height.end)];
            root.draw(&Rectangle::new(corners, key.filled()))
        };
        let text = |text: &str, at: (i32, i32), h: HPos, v: VPos| {
            let style = TextStyle::from(FONT).color(&TEXT).pos(Pos::new(h, v));
            root.draw(&Text::new(text.to_string(), at, style))
        };
        for (key, time, label) in self.bands {
            if let Some(key) = *key {
                bar(time.start, time.end, top..down.end, key)?;
            }
            let (left, right) = (pixel(time.start), pixel(time.end));
            if label.chars().count() as f64 * CHARACTER <= f64::from(right - left) {
                let middle = ((left + right) / 2, top - 2);
                text(label, middle, HPos::Center, VPos::Bottom)?;
            }
        }
        for ((key, times), top) in stills.zip((top..).step_by(row as usize)) {
            for &(from, to) in times {
                bar(from, to, top..top + row, key)?;
            }
        }
        plot.configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(AXIS)
            .label_style(FONT)
            .axis_desc_style(FONT)
            .x_labels(self.x.labels)
            .y_labels(self.y.labels)
            .x_label_formatter(&|at| tick(*at))
            .y_label_formatter(&|value| tick(*value))
            .x_desc(self.x.title)
            .y_desc(self.y.title)
            .draw()?;
        if lane > 0 {
            let middle = (across.start - 8, (top + down.start) / 2);
            text("still", middle, HPos::Right, VPos::Center)?;
            let ends = [(across.start, down.start), (across.end, down.start)];
            root.draw(&PathElement::new(ends, AXIS))?;
        }
        for (key, shape) in self.shapes {
            self.shape(&mut plot, *key, shape)?;
        }
        root.present()?;
        drop((plot, root));
        Ok(svg)
    }

    fn shape<Y: Ranged<ValueType = f64>>(
        &self,
        plot: &mut Plot<'_, '_, Y>,
        key: Key,
        shape: &Shape,
    ) -> Result<(), Undrawn> {
        let place = |&(at, value): &Point| (self.x.hold(at), self.y.hold(value));
        let places = |points: &[Point]| points.iter().map(place).collect::<Vec<_>>();
        let dots = |points: &[Point], radius: u32| {
            let dot = |place| Circle::new(place, radius, key.filled());
            places(points).into_iter().map(dot).collect::<Vec<_>>()
        };
        match shape {
            Shape::Line(points, width) => {
                for run in points.split(|(_, value)| !value.is_finite()) {
                    match run {
                        [] => {}
                        [_] => drop(plot.draw_series(dots(run, 1))?),
                        _ => {
                            let line = PathElement::new(places(run), key.stroke_width(*width));
                            plot.draw_series([line])?;
                        }
                    }
                }
            }
            Shape::Dots(points, radius) => drop(plot.draw_series(dots(points, *radius))?),
            Shape::Above(points, level) => {
                let over = |&(at, value): &Point| place(&(at, value.max(*level)));
                let over = points.iter().map(over);
                plot.draw_series(AreaSeries::new(over, self.y.hold(*level), key.mix(0.22)))?;
            }
            Shape::Stills(_) => {}
        }
        Ok(())
    }
}

/// From the least to the most of what lines show.
pub fn extent(shapes: &[(Key, Shape)]) -> Range<f64> {
    let points = shapes.iter().flat_map(|(_, shape)| match shape {
        Shape::Line(points, _) => &points[..],
        _ => &[],
    });
    let values = points
        .map(|(_, value)| *value)
        .filter(|value| value.is_finite());
    let (low, high) = (values.clone().reduce(f64::min), values.reduce(f64::max));
    low.unwrap_or(1.0)..high.unwrap_or(10.0)
}

/// At most so many points, as many as can be distinguished: of each group the lowest and the highest.
pub fn outermost(points: &[Point], most: usize) -> Vec<Point> {
    if points.len() <= most {
        return points.to_vec();
    }
    let groups = points.chunks((2 * points.len()).div_ceil(most));
    let outermost = groups.flat_map(|group| {
        let order = |a: &usize, b: &usize| group[*a].1.total_cmp(&group[*b].1);
        let low = (0..group.len()).min_by(order).unwrap_or_default();
        let high = (0..group.len()).max_by(order).unwrap_or_default();
        [group[low.min(high)], group[low.max(high)]]
    });
    outermost.collect()
}
