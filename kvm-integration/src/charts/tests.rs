// SPDX-License-Identifier: Apache-2.0 OR MIT
use super::axis::tick;
use super::*;

#[test]
fn ticks_are_round_numbers() {
    let labels = |axis: Axis| axis.ticks().into_iter().map(tick).collect::<Vec<_>>();
    let log = |from, to| labels(Axis::log("ms", from..to));
    assert_eq!(log(150.0, 680.0), ["150", "200", "300", "500", "700"]);
    assert_eq!(log(1.0, 80_000.0), ["1", "10", "100", "1000", "10 k"]);
    assert_eq!(log(0.2, 0.4), ["0.2", "0.3"]);
    let counts = |most| labels(Axis::counts("exits", 0.0..most));
    assert_eq!(counts(150.0), ["0", "1", "10", "100"]);
    assert_eq!(counts(0.0), ["0", "1", "10"]);
    assert_eq!([-1e-17, 0.1 + 0.2, -1.5].map(tick), ["0", "0.3", "-1.5"]);
}

fn drawn(y: Axis, points: impl Iterator<Item = Point>) -> String {
    let chart = Chart {
        size: (300, 200),
        x: Axis::linear("", 0.0..8.0, 5),
        y,
        bands: &[(Some(QUIET), 0.0..8.0, "quiet"), (None, 0.0..0.1, "narrow")],
        shapes: &[(arm(3), Shape::Line(points.collect(), 2))],
    };
    figure("", "<b>a &lt; b</b>: &amp;", &chart).unwrap()
}

const LINE: &str = "<polyline fill=\"none\" stroke=\"#000103\"";

#[test]
fn a_line_is_interrupted_where_there_is_no_value() {
    let (no, yes) = (f64::NAN, 5.0);
    let values = [yes, yes, no, yes, f64::INFINITY, no, yes, yes];
    let svg = drawn(Axis::counts("", 0.0..9.0), (0..).map(f64::from).zip(values));
    assert_eq!(svg.matches(LINE).count(), 2, "{svg}");
    assert_eq!(svg.matches("<circle").count(), 1, "{svg}");
    assert!(svg.contains("<svg role=\"img\" aria-label=\"a &lt; b: &amp;\" "));
    // What is too long for its time is not written.
    assert!(
        svg.contains("\nquiet\n") && !svg.contains("narrow"),
        "{svg}"
    );
}

#[test]
fn what_is_off_the_scale_is_at_its_end() {
    let values = [0.0, -3.0, 1e300];
    for (y, kind) in [
        (Axis::log("", 2.0..90.0), "log"),
        (Axis::counts("", 0.0..90.0), "counts"),
        (Axis::linear("", 0.0..90.0, 5), "linear"),
    ] {
        let svg = drawn(y, (0..).map(f64::from).zip(values));
        let line = svg.split(LINE).nth(1).unwrap();
        let places = line.split("points=\"").nth(1).unwrap();
        let places = places.split('"').next().unwrap().split_whitespace();
        let down: Vec<&str> = places.filter_map(|place| place.split(',').nth(1)).collect();
        assert_eq!(down, ["177", "177", "20"], "{kind}");
    }
}

#[test]
fn peaks_are_kept() {
    let value = |at: u32| if at == 17_001 { 1.0 } else { 0.3 };
    let points: Vec<Point> = (0..30_000).map(|at| (f64::from(at), value(at))).collect();
    let few = outermost(&points, 400);
    assert!(few.len() <= 400);
    assert!(few.contains(&(17_001.0, 1.0)));
    assert!(few.is_sorted_by(|a, b| a.0 <= b.0));
}
