//! What must be so of every page.

use kvm_integration::Host;
use kvm_integration::guestperf::CellResult;

use super::synthetic::{ARMS, results};
use super::{STYLE, page};

fn host() -> Host {
    Host {
        kvm_kind: "kvm_pvm".into(),
        kernel: "6.18.0".into(),
        cores: 8,
        cpu: "CPU <of> \"none\" & all".into(),
    }
}

fn drawn(results: &[CellResult]) -> String {
    let facts = [("bandwidth", "<1 GB/s> & more".to_string())];
    page(&host(), &facts, results, &[]).unwrap()
}

/// What lies between the opening and the closing tags of all charts.
fn charts(html: &str) -> Vec<&str> {
    let charts = html.split("<svg role=\"img\"").skip(1);
    charts
        .map(|chart| chart.split("</svg>").next().unwrap())
        .collect()
}

/// The part of the page about one cell.
fn section(html: &str, number: usize) -> &str {
    let section = html.split("<section class=\"cell\"").nth(number + 1);
    section.unwrap().split("</section>").next().unwrap()
}

#[test]
fn every_arm_has_its_row_its_strip_and_its_switch() {
    let results = results(2);
    let html = drawn(&results);
    for (number, result) in results.iter().enumerate() {
        let section = section(&html, number);
        assert!(section.contains(&result.cell.to_string()));
        assert_eq!(charts(section).len(), 4 + ARMS.len());
        for (number, arm) in ARMS.iter().enumerate() {
            assert!(section.contains(&format!("</svg>{arm}</th>")), "{arm}");
            assert!(section.contains(&format!("<b>{arm}</b>: drop")), "{arm}");
            assert!(section.contains(&format!("of-arm-{number}\"")), "{arm}");
        }
    }
    for number in 0..ARMS.len() {
        assert!(html.contains(&format!("id=\"arm-{number}\" checked")));
        assert!(html.contains(&format!("body:has(#arm-{number}:not(:checked))")));
    }
}

#[test]
fn the_host_and_the_facts_are_told_and_escaped() {
    let html = drawn(&results(1));
    assert!(html.contains("<dd>kvm_pvm, Linux 6.18.0, 8 cores</dd>"));
    assert!(html.contains("CPU &lt;of&gt; &quot;none&quot; &amp; all"));
    assert!(html.contains("<dt>bandwidth</dt><dd>&lt;1 GB/s&gt; &amp; more</dd>"));
    let mut results = results(1);
    results[0].arms[0].arm = "<script>";
    assert!(!drawn(&results).contains("<script"));
}

#[test]
fn it_needs_no_network() {
    let html = drawn(&results(1));
    let alone = html.replace("xmlns=\"http://www.w3.org/2000/svg\"", "");
    for foreign in [
        "http:", "https:", "//", "url(", "@import", "<script", "<link", " src=",
    ] {
        assert!(!alone.contains(foreign), "{foreign}");
    }
}

#[test]
fn missed_pages_can_not_be_overlooked() {
    let mut results = results(2);
    let sound = drawn(&results);
    assert!(sound.contains("66 migrations, 0 missed pages"));
    assert!(!sound.contains("class=\"missed\""));
    results[1].arms[3].migrations[2].figures.missed_pages = 17;
    let html = drawn(&results);
    assert!(!html.contains("0 missed pages"));
    assert!(html.contains("role=\"alert\">⚠ 17 pages differ"));
    assert!(!section(&html, 0).contains("class=\"missed\""));
    let section = section(&html, 1);
    assert!(section.contains("run-levels missed 17 pages"));
    assert!(section.contains("<td class=\"missed\">⚠ 17 missed</td>"));
}

#[test]
fn who_does_not_converge_is_marked() {
    let mut results = results(1);
    for arm in &mut results[0].arms {
        for one in &mut arm.migrations {
            one.figures.converged = true;
        }
    }
    assert!(!drawn(&results).contains("class=\"not\""));
    results[0].arms[1].migrations[0].figures.converged = false;
    assert!(drawn(&results).contains("<td class=\"not\">2 of 3</td>"));
}

#[test]
fn the_guests_standing_still_is_drawn() {
    let mut results = results(1);
    results[0].arms.truncate(1);
    let still = results[0].arms[0].typical().unwrap().samples.iter();
    assert!(still.clone().any(|sample| sample.ms_per_gb.is_none()));
    let lanes = drawn(&results).matches("\nstill\n").count();
    // In the chart of all arms and in the arm's own.
    assert_eq!(lanes, 2);
    let bars = |results: &[CellResult]| drawn(results).matches("fill=\"#6E6E6E\"").count();
    let before = bars(&results);
    for one in &mut results[0].arms[0].migrations {
        for sample in &mut one.samples {
            sample.ms_per_gb = sample.ms_per_gb.or(Some(300.0));
        }
    }
    assert_eq!(bars(&results) + 2, before);
}

#[test]
fn nonsense_is_drawn_as_nothing() {
    let mut results = results(4);
    results[0].arms.clear();
    results[1].arms[0].migrations.clear();
    for arm in &mut results[2].arms {
        for one in &mut arm.migrations {
            one.samples.clear();
            one.rounds.clear();
            one.phases = Default::default();
            one.figures = Default::default();
        }
    }
    for arm in &mut results[3].arms {
        for one in &mut arm.migrations {
            one.figures.worst_ms_per_gb = f64::INFINITY;
            one.figures.quiet_ms_per_gb = f64::NAN;
            for (sample, odd) in one
                .samples
                .iter_mut()
                .zip([f64::NAN, f64::INFINITY, 0.0, -1.0])
            {
                sample.ms_per_gb = Some(odd);
                sample.delay_ms = Some(odd);
            }
        }
    }
    let html = drawn(&results);
    for chart in charts(&html) {
        for text in ["NaN", "inf"] {
            assert!(!chart.contains(text), "{text}: {chart}");
        }
    }
    drawn(&[]);
}

#[test]
fn lines_stay_within_their_charts() {
    let html = drawn(&results(3));
    let charts = charts(&html);
    for chart in charts {
        let number = |name: &str| -> i32 {
            let rest = chart.split(&format!("{name}=\"")).nth(1).unwrap();
            rest.split('"').next().unwrap().parse().unwrap()
        };
        let (width, height) = (number(" width"), number(" height"));
        for points in chart.split("points=\"").skip(1) {
            for point in points.split('"').next().unwrap().split_whitespace() {
                let (x, y) = point.split_once(',').unwrap();
                let (x, y): (i32, i32) = (x.parse().unwrap(), y.parse().unwrap());
                assert!((0..=width).contains(&x), "{point}");
                assert!((0..=height).contains(&y), "{point}");
            }
        }
    }
}

#[test]
fn a_long_run_is_a_small_file() {
    let size = drawn(&results(18)).len();
    assert!(size < 4 << 20, "{size}");
}

#[test]
fn the_style_knows_the_keys() {
    let html = drawn(&results(1));
    let arms = super::Palette::of(&results(1)).css();
    for chart in charts(&html) {
        for name in ["fill", "stroke"] {
            for key in chart.split(&format!(" {name}=\"")).skip(1) {
                let key = key.split('"').next().unwrap();
                let rule = format!("[{name}=\"{key}\"]");
                // The ink of all text has a rule of its own.
                let known = matches!(key, "none" | "#000000");
                assert!(
                    known || STYLE.contains(&rule) || arms.contains(&rule),
                    "{rule}"
                );
            }
        }
    }
}
