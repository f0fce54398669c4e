// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The program `guestperf`, run as a user runs it. No figure of time is asserted: what is, holds on
//! any machine.

mod program;

use std::fs;
use std::io::BufReader;
use std::path::PathBuf;
use std::process::ExitCode;

use kvm_integration::guestperf::Arm;
use serde_json::Value;

use program::{Ran, drain, end, next_line, tests};

const PROGRAM: &str = env!("CARGO_BIN_EXE_guestperf");

/// Small enough to be quick, with rings that fill up.
const SMALL: &str = "--memory-mib 16 --stress-mib 4 --ring-entries 256 --quiet-ms 200 --repeat 1";
/// A link that takes 4 MiB in less than the downtime limit.
const FAST: &str = "--bandwidth-mib 100";
/// One that takes long enough for a page to be written meanwhile, on a busy machine too.
const SLOW: &str = "--bandwidth-mib 25";

fn run(args: &str) -> Ran {
    program::run(PROGRAM, args)
}

/// A place for a file of a test's own.
fn temporary(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// Runs it, which must go well and miss no page. What it said, and the object that it wrote.
fn report(args: &str) -> (Ran, Value) {
    let path = temporary("guestperf.json");
    let _ = fs::remove_file(&path);
    let ran = run(&format!("{SMALL} {args} --json {}", path.display()));
    assert_eq!(ran.status, Some(0), "{args}: {}{}", ran.stderr, ran.stdout);
    let text = fs::read_to_string(&path).expect("the report was written");
    let report: Value = serde_json::from_str(&text).expect("the report is JSON");
    assert_eq!(
        (&report["schema"], &report["missed_pages"]),
        (&1.into(), &0.into())
    );
    (ran, report)
}

fn kvm_every_arm_arrives() {
    let page = temporary("guestperf.html");
    let (ran, report) = report(&format!("{FAST} --html {}", page.display()));
    assert_eq!(report["cells"].as_array().unwrap().len(), 1);
    let arms = report["cells"][0]["arms"].as_array().unwrap();
    let names: Vec<&str> = arms.iter().filter_map(|arm| arm["arm"].as_str()).collect();
    assert_eq!(names, Arm::ALL.map(|arm| arm.name));
    for arm in arms {
        assert_eq!(arm["missed_pages"], 0, "{arm}");
        let figures = &arm["migrations"][0]["figures"];
        assert_eq!(figures["converged"], true, "{figures}");
        let sent = figures["pages_sent"].as_u64().unwrap();
        assert!((4097..=5120).contains(&sent), "{figures}");
    }
    let html = fs::read_to_string(&page).expect("the page was written");
    for name in names {
        assert!(
            ran.stdout.contains(&format!("| {name} ")),
            "{name}: {}",
            ran.stdout
        );
        assert!(html.contains(name), "{name}");
    }
    for wanted in [
        "### Drop in seconds / worst ms per GB",
        "### adaptive is best or within 5 %: ",
        "\nmissed pages: 0\n",
    ] {
        assert!(
            ran.stdout.contains(wanted),
            "no `{wanted}` in {}",
            ran.stdout
        );
    }
    // Where figures come from is said beside them.
    let host = &report["host"];
    for place in [&ran.stdout, &html] {
        for key in ["kvm", "kernel"] {
            assert!(
                place.contains(host[key].as_str().unwrap()),
                "{key}: {place}"
            );
        }
    }
    assert_eq!(report["verdicts"].as_array().unwrap().len(), 4);
}

fn kvm_a_guest_that_outruns_the_link_is_reported_as_such() {
    let args = "--downtime-ms 0 --max-rounds 3 --arm bitmap --arm adaptive --arm qemu-fixed";
    let (ran, report) = report(&format!("{SLOW} {args}"));
    for arm in report["cells"][0]["arms"].as_array().unwrap() {
        let migration = &arm["migrations"][0];
        assert_eq!(migration["figures"]["converged"], false, "{arm}");
        let running = |round: &Value| round["running"].as_bool().unwrap();
        let rounds = migration["rounds"].as_array().unwrap();
        let running: Vec<bool> = rounds.iter().map(running).collect();
        assert_eq!(running, [true, true, true, false], "{arm}");
    }
    assert!(ran.stdout.contains("0 of 1"), "{}", ran.stdout);
}

fn kvm_more_vcpus_than_cores() {
    let once = SMALL.strip_suffix("--repeat 1").unwrap();
    let ran = run(&format!(
        "{once} {FAST} --repeat 2 --vcpus 7 --arm adaptive --arm qemu-adaptive --arm bitmap"
    ));
    assert_eq!(ran.status, Some(0), "{}{}", ran.stderr, ran.stdout);
    assert!(ran.stdout.contains("2 of 2"), "{}", ran.stdout);
}

fn kvm_one_signal_ends_it() {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let mut child = program::spawn(PROGRAM, "--quick");
        let stdout = drain(child.stdout.take().unwrap());
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        // It is at work by then.
        let mut line = String::new();
        while !line.starts_with("1/") {
            (line, stderr) = next_line(stderr, "guestperf");
            assert!(!line.is_empty(), "it has ended");
        }
        let stderr = drain(stderr);
        assert_eq!(end(&mut child, signal, "guestperf"), Some(130));
        let (stdout, stderr) = (stdout.join().unwrap(), stderr.join().unwrap());
        assert!(stderr.contains("interrupted"), "{stderr}{stdout}");
    }
}

fn nonsense_is_refused_with_what_is_allowed() {
    for (args, allowed) in [
        ("--vcpus 33", "1..=32"),
        ("--memory-mib 262145", "1..=262144"),
        (
            "--memory-mib 10 --stress-mib 11",
            "must not exceed the memory",
        ),
        ("--ring-entries 1000", "power of two"),
        ("--arm best", "choose one of bitmap, fixed"),
        ("--quick --full", "cannot be used with"),
        ("--quiet-ms 0", "200..=600000"),
        ("--json /nowhere/report", "could not be written"),
        ("--html /nowhere/report", "could not be written"),
        ("--frobnicate", "--help"),
    ] {
        let ran = run(args);
        assert_eq!(ran.status, Some(2), "{args}: {}", ran.stdout);
        assert!(ran.stderr.contains(allowed), "{args}: {}", ran.stderr);
    }
}

fn kvm_a_guest_too_large_is_refused() {
    let ran = run("--memory-mib 262144 --stress-mib 1");
    assert_eq!(ran.status, Some(2), "{}", ran.stdout);
    assert!(ran.stderr.contains("524288 MiB, and "), "{}", ran.stderr);
}

fn main() -> ExitCode {
    let everywhere = tests![nonsense_is_refused_with_what_is_allowed];
    let on_kvm = tests![
        kvm_every_arm_arrives,
        kvm_a_guest_that_outruns_the_link_is_reported_as_such,
        kvm_more_vcpus_than_cores,
        kvm_a_guest_too_large_is_refused,
        kvm_one_signal_ends_it,
    ];
    program::test("guestperf", &everywhere, &on_kvm)
}
