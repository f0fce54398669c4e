// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What must be so of every page.

use std::collections::HashSet;

use kvm_integration::Host;
use kvm_integration::guestperf::{Arm, CellResult, Round, Sample};

use super::page;
use crate::column::COLUMNS;
use crate::tests::{cell_result, figures};
use crate::verdict::verdicts;

/// Every arm, with three migrations of 100 samples; of those, five while the guest stood still.
fn result() -> CellResult {
    let arms = Arm::ALL.map(|arm| (arm.name, [figures(); 3]));
    let arms: Vec<_> = arms.iter().map(|(arm, all)| (*arm, &all[..])).collect();
    let mut result = cell_result(&arms);
    for (seed, arm) in result.arms.iter_mut().enumerate() {
        for one in &mut arm.migrations {
            let sample = |number: usize| Sample {
                at: (number + 1) as f64 / 25.0,
                ms_per_gb: (!(40..45).contains(&number)).then_some(50.0 + (seed * number) as f64),
                full_exits: number as u64 / 9,
                delay_ms: (seed > 0).then_some(2.0 + (number % 7) as f64),
            };
            one.samples = (0..100).map(sample).collect();
            let stopped = Round {
                running: false,
                ..one.rounds[0]
            };
            one.rounds.push(stopped);
        }
    }
    result
}

fn drawn(results: &[CellResult]) -> String {
    let host = Host {
        kvm_kind: "kvm_pvm".into(),
        kernel: "6.18.0".into(),
        cores: 8,
        cpu: "CPU <of> \"none\" & all".into(),
    };
    let facts = [("bandwidth", "<1 GB/s> & more".to_string())];
    page(&host, &facts, results, &verdicts(results)).unwrap()
}

/// What lies between the opening and the closing tags of all charts.
fn charts(html: &str) -> Vec<&str> {
    let charts = html.split("<svg role=\"img\"").skip(1);
    let ended = charts.map(|chart| chart.split("</svg>").next().unwrap());
    ended.collect()
}

/// The values of an attribute.
fn values<'a>(html: &'a str, name: &str) -> HashSet<&'a str> {
    let opening = format!(" {name}=\"");
    let values = html.split(&opening).skip(1);
    values.map(|rest| rest.split('"').next().unwrap()).collect()
}

#[test]
fn every_arm_has_its_row_its_strip_and_its_switch() {
    let html = drawn(&[result()]);
    assert_eq!(charts(&html).len(), 4 + Arm::ALL.len());
    for (number, arm) in Arm::ALL.iter().enumerate() {
        let name = arm.name;
        assert!(html.contains(&format!("</svg>{name}</th><td>")), "{name}");
        assert!(html.contains(&format!("</svg>{name}</b>: drop")), "{name}");
        assert!(html.contains(&format!("id=\"arm-{number}\" checked")));
        assert!(html.contains(&format!("body:has(#arm-{number}:not(:checked))")));
        assert!(html.contains(&format!("class=\"of-arm-{number}")));
        // A policy has one hue, and QEMU's shape is dashed.
        let (key, qemu) = (format!("[stroke=\"#0001{number:02X}\"] {{"), number > 7);
        let hue = if qemu { number - 7 } else { number };
        assert!(html.contains(&format!("{key} stroke: var(--hue-{hue})")));
        assert_eq!(html.contains(&format!("{key} stroke-dasharray")), qemu);
    }
    assert!(html.contains("<span class=\"good\">✓ bitmap: 1.50</span>"));
    for column in COLUMNS {
        assert!(
            html.contains(&format!("<dt>{}</dt>", column.name)),
            "{column:?}"
        );
    }
}

#[test]
fn the_host_and_the_facts_are_told_and_escaped() {
    let mut result = result();
    let html = drawn(&[result.clone()]);
    assert!(html.contains("<dd>kvm_pvm, Linux 6.18.0, 8 cores</dd>"));
    assert!(html.contains("CPU &lt;of&gt; &quot;none&quot; &amp; all"));
    assert!(html.contains("<dt>bandwidth</dt><dd>&lt;1 GB/s&gt; &amp; more</dd>"));
    result.arms[0].arm = "<script>";
    assert!(!drawn(&[result]).contains("<script"));
}

#[test]
fn it_needs_no_network() {
    let alone = drawn(&[result()]).replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
    for foreign in [
        "http:", "https:", "//", "url(", "@import", "<script", "<link", " src=",
    ] {
        assert!(!alone.contains(foreign), "{foreign}");
    }
}

#[test]
fn what_spoils_figures_can_not_be_overlooked() {
    let mut result = result();
    let sound = drawn(&[result.clone()]);
    assert!(sound.contains("39 migrations, 0 missed pages"));
    let not_converged = "<td><span class=\"bad\">✗ 2 of 3</span></td>";
    assert!(!sound.contains("class=\"alarm\"") && !sound.contains(not_converged));
    result.arms[1].migrations[0].figures.converged = false;
    result.arms[3].migrations[2].figures.missed_pages = 17;
    let html = drawn(&[result]);
    assert!(!html.contains("0 missed pages"));
    assert!(html.contains("role=\"alert\">⚠ 17 pages differ"));
    assert!(html.contains("<p class=\"alarm\">⚠ run-levels MISSED 17 pages"));
    assert!(html.contains("<td><span class=\"alarm\">⚠ 17 pages</span></td>"));
    assert!(html.contains(not_converged));
}

#[test]
fn the_guests_standing_still_is_drawn() {
    let mut result = result();
    result.arms.truncate(1);
    let html = drawn(&[result.clone()]);
    // In the chart of all arms and in the arm's own.
    assert_eq!(html.matches("\nstill\n").count(), 2);
    let bars = |html: &str| {
        let rectangles = html.split("<rect ").skip(1);
        let first = rectangles.filter_map(|rest| rest.split("/>").next());
        first.filter(|one| one.contains("fill=\"#000100\"")).count()
    };
    assert_eq!(bars(&html), 2);
    for sample in &mut result.arms[0].migrations[1].samples {
        sample.ms_per_gb = Some(300.0);
    }
    assert_eq!(bars(&drawn(&[result])), 0);
}

#[test]
fn nonsense_is_drawn_as_nothing() {
    let [mut bare, mut unmeasured, mut empty, mut odd] = [(); 4].map(|()| result());
    bare.arms.clear();
    unmeasured.arms[0].migrations.clear();
    for one in empty.arms.iter_mut().flat_map(|arm| &mut arm.migrations) {
        one.samples.clear();
        one.rounds.clear();
        one.phases = Default::default();
        one.figures = Default::default();
    }
    for one in odd.arms.iter_mut().flat_map(|arm| &mut arm.migrations) {
        one.figures.worst_ms_per_gb = f64::INFINITY;
        one.figures.quiet_ms_per_gb = f64::NAN;
        let nonsense = [f64::NAN, f64::INFINITY, 0.0, -1.0];
        for (sample, odd) in one.samples.iter_mut().zip(nonsense) {
            (sample.ms_per_gb, sample.delay_ms) = (Some(odd), Some(odd));
        }
    }
    let html = drawn(&[bare, unmeasured, empty, odd]);
    assert_eq!(charts(&html).len(), 16 + 16 + 17);
    for chart in charts(&(html + &drawn(&[result()]))) {
        assert!(!chart.contains("NaN") && !chart.contains("inf"), "{chart}");
        let [width, height] = ["width", "height"].map(|name| -> f64 {
            let rest = chart.split(&format!(" {name}=\"")).nth(1).unwrap();
            rest.split('"').next().unwrap().parse().unwrap()
        });
        // And no line leaves its chart.
        let places = values(chart, "points")
            .into_iter()
            .flat_map(str::split_whitespace);
        for (x, y) in places.filter_map(|place| place.split_once(',')) {
            assert!((0.0..=width).contains(&x.parse().unwrap()), "{x}");
            assert!((0.0..=height).contains(&y.parse().unwrap()), "{y}");
        }
    }
    drawn(&[]);
}

#[test]
fn a_long_run_is_a_small_file() {
    let size = drawn(&vec![result(); 18]).len();
    assert!(size < 4 << 20, "{size}");
}

#[test]
fn the_style_knows_the_keys() {
    let html = drawn(&[result()]);
    for chart in charts(&html) {
        for name in ["fill", "stroke"] {
            for key in values(chart, name) {
                // The ink of all text has a rule of its own.
                let known = matches!(key, "none" | "#000000");
                let rule = format!("[{name}=\"{key}\"] {{");
                assert!(known || html.contains(&rule), "{rule}");
            }
        }
    }
}
