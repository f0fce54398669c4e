//! A chart's axes, shades and lines, as SVG.

use plotters::chart::ChartContext;
use plotters::coord::Shift;
use plotters::coord::cartesian::Cartesian2d;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::axis::Axis;
use super::points::Point;
use super::text::escaped;

/// A chart could not be drawn.
#[derive(Debug, thiserror::Error)]
#[error("a chart could not be drawn")]
pub struct Undrawn(#[from] DrawingAreaErrorKind<std::io::Error>);

type Drawn = Result<(), Undrawn>;

/// Keys of what is no arm's; the style of the page knows them, too.
const INK: RGBColor = RGBColor(0, 0, 0);
const GRID: RGBColor = RGBColor(221, 221, 221);
const AXIS: RGBColor = RGBColor(136, 136, 136);
/// A line to compare with.
pub const LEVEL: RGBColor = RGBColor(119, 119, 119);
/// A limit.
pub const LIMIT: RGBColor = RGBColor(118, 118, 118);

/// Of the font, in the units of plotters, which are smaller than those of SVG.
const FONT: (&str, u32) = ("sans-serif", 15);
/// About the width of a character of the font.
const CHARACTER: f64 = 6.3;

/// What a time is shaded as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Nothing goes on but the guest.
    Quiet,
    /// The guest runs, and is migrated.
    Migration,
    /// Some arms are done, some are not.
    Some,
    /// The guest is stopped.
    Stopped,
}

/// A time, and what is written above it.
#[derive(Debug, Clone)]
pub struct Shade {
    /// As what.
    pub phase: Phase,
    /// Since when.
    pub from: f64,
    /// Until when.
    pub to: f64,
    /// Written above if there is room.
    pub label: String,
}

/// A chart without its lines.
#[derive(Debug)]
pub struct Frame {
    /// Width and height.
    pub size: (u32, u32),
    /// To the right.
    pub x: Axis,
    /// Upwards.
    pub y: Axis,
    /// Times, if it is they that go to the right.
    pub shades: Vec<Shade>,
}

/// A chart that is being drawn.
pub struct Chart<'f, 'a, 'b> {
    frame: &'f Frame,
    context: ChartContext<'a, SVGBackend<'b>, Cartesian2d<Axis, Axis>>,
}

impl Phase {
    /// The key of its shade; none if it is not shaded.
    fn key(self) -> Option<RGBColor> {
        match self {
            Self::Quiet => Some(RGBColor(238, 238, 238)),
            Self::Migration => None,
            Self::Some => Some(RGBColor(247, 247, 247)),
            Self::Stopped => Some(RGBColor(242, 184, 181)),
        }
    }
}

impl Frame {
    /// The frame with what is drawn in it; `label` is for those who can't see it.
    ///
    /// # Errors
    /// It can't be drawn.
    pub fn draw(
        &self,
        label: &str,
        contents: impl FnOnce(&mut Chart<'_, '_, '_>) -> Drawn,
    ) -> Result<String, Undrawn> {
        let mut svg = String::new();
        {
            let root = SVGBackend::with_string(&mut svg, self.size).into_drawing_area();
            let bottom = if self.x.title.is_empty() { 22 } else { 42 };
            let top = if self.shades.is_empty() { 10 } else { 20 };
            let context = ChartBuilder::on(&root)
                .margin_top(top)
                .margin_right(14)
                .set_label_area_size(LabelAreaPosition::Left, 66)
                .set_label_area_size(LabelAreaPosition::Bottom, bottom)
                .build_cartesian_2d(self.x.clone(), self.y.clone())?;
            let mut chart = Chart {
                frame: self,
                context,
            };
            for shade in &self.shades {
                chart.shade(shade)?;
            }
            chart.mesh()?;
            contents(&mut chart)?;
            for shade in &self.shades {
                chart.name(&root, shade)?;
            }
            root.present()?;
        }
        let named = format!("<svg role=\"img\" aria-label=\"{}\" ", escaped(label));
        // What is so anyway is said thousands of times.
        Ok(svg
            .replacen("<svg ", &named, 1)
            .replace(" opacity=\"1\"", ""))
    }
}

impl Chart<'_, '_, '_> {
    /// A line through these points.
    pub fn line(&mut self, points: &[Point], key: RGBColor, width: u32) -> Drawn {
        let points = self.places(points);
        let line = PathElement::new(points, key.stroke_width(width));
        self.context.draw_series([line])?;
        Ok(())
    }

    /// A dot at each of these points.
    pub fn dots(&mut self, points: &[Point], key: RGBColor, radius: u32) -> Drawn {
        let points = self.places(points);
        let dot = |point| Circle::new(point, radius, key.filled());
        self.context.draw_series(points.into_iter().map(dot))?;
        Ok(())
    }

    /// What lies between a line and a level below it.
    pub fn above(&mut self, points: &[Point], level: f64, key: RGBColor) -> Drawn {
        let over = points.iter().map(|&(x, y)| (x, y.max(level)));
        let (Some(first), Some(last)) = (points.first(), points.last()) else {
            return Ok(());
        };
        let around = [(first.0, level)].into_iter().chain(over);
        let around: Vec<Point> = around.chain([(last.0, level)]).collect();
        let area = Polygon::new(self.places(&around), key.mix(0.22).filled());
        self.context.draw_series([area])?;
        Ok(())
    }

    /// A bar in the lane above the scale, which has so many rows: in this one.
    pub fn bar(&mut self, (from, to): (f64, f64), row: usize, rows: usize, key: RGBColor) -> Drawn {
        let Some(begin) = self.frame.y.lane_begin() else {
            return Ok(());
        };
        let end = self.frame.y.ends().end;
        let height = (end - begin) / rows as f64;
        // The first is the uppermost.
        let top = end - height * row as f64;
        self.rectangle(from, to, top - height..top, key)
    }

    /// A level line over this time.
    pub fn level(&mut self, value: f64, from: f64, to: f64, key: RGBColor) -> Drawn {
        self.line(&[(from, value), (to, value)], key, 1)
    }

    fn shade(&mut self, shade: &Shade) -> Drawn {
        let Some(key) = shade.phase.key() else {
            return Ok(());
        };
        self.rectangle(shade.from, shade.to, self.frame.y.ends(), key)
    }

    /// At least a pixel wide: what was is seen.
    fn rectangle(
        &mut self,
        from: f64,
        to: f64,
        height: std::ops::Range<f64>,
        key: RGBColor,
    ) -> Drawn {
        let (x, ends) = (&self.frame.x, self.frame.x.ends());
        let pixel = (ends.end - ends.start) / f64::from(self.frame.size.0);
        let (left, right) = (x.place(from), x.place(to.max(from + 1.5 * pixel)));
        let corners = [(left, height.end), (right, height.start)];
        let rectangle = Rectangle::new(corners, key.filled());
        self.context.draw_series([rectangle])?;
        Ok(())
    }

    /// Writes above a time what it is.
    fn name(&self, root: &DrawingArea<SVGBackend<'_>, Shift>, shade: &Shade) -> Drawn {
        let Frame { x, y, .. } = self.frame;
        let pixel = |at: f64| self.context.backend_coord(&(x.place(at), y.ends().end));
        let ((left, top), (right, _)) = (pixel(shade.from), pixel(shade.to));
        let width = shade.label.chars().count() as f64 * CHARACTER;
        if width > f64::from(right - left) {
            return Ok(());
        }
        let middle = Pos::new(HPos::Center, VPos::Bottom);
        let style = TextStyle::from(FONT).color(&INK).pos(middle);
        let at = ((left + right) / 2, top - 2);
        root.draw(&Text::new(shade.label.clone(), at, style))?;
        Ok(())
    }

    fn mesh(&mut self) -> Drawn {
        let Frame { x, y, .. } = self.frame;
        self.context
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(AXIS)
            .label_style(FONT)
            .axis_desc_style(FONT)
            .x_desc(x.title)
            .y_desc(y.title)
            .draw()?;
        if let Some(begin) = y.lane_begin() {
            let ends = x.ends();
            let line = PathElement::new([(ends.start, begin), (ends.end, begin)], AXIS);
            self.context.draw_series([line])?;
        }
        Ok(())
    }

    fn places(&self, points: &[Point]) -> Vec<Point> {
        let Frame { x, y, .. } = self.frame;
        let place = |&(at, value): &Point| (x.place(at), y.place(value));
        points.iter().map(place).collect()
    }
}
