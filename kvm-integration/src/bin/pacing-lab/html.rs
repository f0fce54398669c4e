// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The report as a page: what came of each guest, and how full its rings were meanwhile.

use kvm_integration::Host;
use kvm_integration::charts::{
    Arm, Axis, Chart, Legend, Shape, Undrawn, arm as key, extent, facts, figure, outermost,
    page as whole, remarks, section, table as html,
};
use kvm_integration::lab::{self, CellResult, Sample};

use crate::table;
use crate::targets::Verdict;

const WIDTH: u32 = 1240;
/// The height of an arm's strip.
const STRIP: u32 = 130;
/// The height of a chart of all arms.
const CHART: u32 = 300;
/// More points across than this cannot be distinguished.
const POINTS: usize = 1200;

/// Less than this nobody sleeps.
const SHORTEST_MS: f64 = 0.1;

/// All results on one page.
///
/// # Errors
/// A chart can't be drawn.
pub fn page(
    host: &Host,
    guests: &str,
    summary: &str,
    results: &[CellResult],
    verdicts: &[Verdict],
) -> Result<String, Undrawn> {
    let arms = results.iter().flat_map(|result| &result.arms);
    let legend = Legend::new(arms.map(|arm| {
        let place = lab::Arm::ALL.iter().position(|one| one.name == arm.arm);
        Arm {
            name: arm.arm,
            // The crate's own, which is the first, is blue on all pages.
            hue: (place.unwrap_or_default() + 5) % 10,
            dashed: false,
        }
    }));
    let mut body = facts(&[
        ("host", host.to_string()),
        ("CPU", host.cpu.clone()),
        ("guests", guests.into()),
    ]);
    body += &format!("<p>{summary}</p>\n");
    if !verdicts.is_empty() {
        body += &html(&table::verdicts(verdicts), &legend);
    }
    body += &legend.html("Lines");
    for result in results {
        body += &section(&result.to_string(), &guest(result, &legend)?);
    }
    Ok(whole("Pacing policies compared", &legend, &body))
}

fn guest(result: &CellResult, legend: &Legend) -> Result<String, Undrawn> {
    let sampled = result.arms.iter().filter(|arm| !arm.samples.is_empty());
    let ends = sampled.clone().filter_map(|arm| arm.samples.last());
    let end = ends.map(|sample| sample.at).fold(0.1, f64::max);
    let drawn = |class: &str, caption: &str, height, y, shapes: &[_]| {
        let chart = Chart {
            size: (WIDTH, height),
            x: Axis::linear("", 0.0..end, 12),
            y,
            bands: &[],
            shapes,
        };
        figure(class, caption, &chart)
    };
    let mut body = remarks(&table::remarks(result)) + &html(&table::figures(result), legend);
    body += "<p>Charts show one turn of each arm, over the seconds since its start.</p>\n\
             <div class=\"charts across\">\n";
    let (mut delays, mut full_exits) = (Vec::new(), Vec::new());
    for arm in sampled {
        let number = legend.number(arm.arm).unwrap_or_default();
        let line = |value: &dyn Fn(&Sample) -> f64| {
            let points = arm.samples.iter().map(|sample| (sample.at, value(sample)));
            let points = outermost(&points.collect::<Vec<_>>(), POINTS);
            (key(number), Shape::Line(points, 2))
        };
        // An arm without a reaper has no delay.
        if arm.samples.iter().any(|sample| sample.delay > 0.0) {
            delays.push(line(&|sample| (sample.delay * 1e3).max(SHORTEST_MS)));
        }
        full_exits.push(line(&|sample| sample.full_exits as f64));
        let caption = legend.named(arm.arm) + ": fullest ring, of its soft limit";
        let fullest = [line(&|sample| sample.fullest)];
        let (class, y) = (format!("of-arm-{number}"), Axis::linear("", 0.0..1.05, 3));
        body += &drawn(&class, &caption, STRIP, y, &fullest)?;
    }
    for (title, axis, lines) in [
        ("delay chosen, ms", Axis::log as fn(_, _) -> _, delays),
        ("full exits so far", Axis::counts, full_exits),
    ] {
        let y = axis(title, extent(&lines));
        body += &drawn("", title, CHART, y, &lines)?;
    }
    Ok(body + "</div>\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_integration::lab::ArmResult;

    fn drawn(samples: usize, asleep: bool) -> String {
        let sample = |number: usize| Sample {
            at: number as f64 / 500.0,
            fullest: (number % 50) as f64 / 50.0,
            delay: if asleep { 0.002 } else { 0.0 },
            full_exits: number as u64 / 50,
        };
        let arm = |arm| ArmResult {
            samples: (0..samples).map(sample).collect(),
            ..ArmResult::new(arm)
        };
        let result = CellResult {
            workload: "bursts".into(),
            vcpus: 2,
            ring_entries: 1024,
            others: None,
            reset_load: None,
            arms: vec![arm("poll"), arm("fixed")],
        };
        page(&Host::detect(), "simulated", "", &[result], &[]).unwrap()
    }

    #[test]
    fn every_arm_has_its_strip_and_its_lines() {
        let text = drawn(750, true);
        assert!(text.contains("<h2>bursts, 2 vCPUs, rings of 1024</h2>"));
        for arm in ["poll", "fixed"] {
            assert!(text.contains(&format!("{arm}: fullest ring")), "{arm}");
        }
        let line = "<polyline fill=\"none\" stroke=\"#0001";
        assert_eq!(text.matches(line).count(), 6);
        // A reaper that never sleeps has no delay.
        assert_eq!(drawn(750, false).matches(line).count(), 4);
        assert_eq!(drawn(0, false).matches(line).count(), 0);
    }
}
