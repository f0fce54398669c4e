// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The program `dirty-limit`, run as a user runs it. How well limits hold is for people to read off
//! its output; here is that there is one.

mod program;

use std::io::BufReader;
use std::process::ExitCode;

use serde_json::Value;

use program::{drain, end, next_line, run, tests};

const PROGRAM: &str = env!("CARGO_BIN_EXE_dirty-limit");

/// A second each, and whatever came of it is good enough.
const QUICK: &str = "--memory-mib 64 --seconds 1 --tolerance 1000 --json";

fn json(args: &str) -> Value {
    let ran = run(PROGRAM, &format!("{QUICK} {args}"));
    assert_eq!(ran.status, Some(0), "{args}: {}{}", ran.stderr, ran.stdout);
    assert_eq!(ran.stdout.lines().count(), 1, "{}", ran.stdout);
    serde_json::from_str(&ran.stdout).expect("the line is JSON")
}

fn a_guest_is_held_to_each_limit() {
    // Less than a guest writes on any machine.
    let object = json("--limit 500 --limit 1000 --vcpus 2 --ring-entries 1024");
    assert_eq!(object["vcpus"], 2);
    assert_eq!(object["holds"], true);
    let runs = object["runs"].as_array().expect("a run for each limit");
    let limits: Vec<_> = runs.iter().map(|run| run["limit"].as_u64()).collect();
    assert_eq!(limits, [Some(500), Some(1000)]);
    for run in runs {
        let number = |key: &str| run[key].as_f64().unwrap_or_else(|| panic!("{key}: {run}"));
        assert!(number("seconds") >= 1.0, "{run}");
        assert!(number("asleep_percent") > 0.0, "{run}");
        assert!(number("deviation_percent").is_finite(), "{run}");
        // What syncs find was logged, and what was logged was written, but for a step of the count.
        let logged = run["logged_per_second"].as_array().expect("one a vCPU");
        assert_eq!(logged.len(), 2, "{run}");
    }
}

fn full_rings_alone_hold_it_too() {
    let object = json("--limit 2000 --ring-entries 1024 --at-full-rings");
    let run = &object["runs"][0];
    assert!(run["full_exits"].as_u64() > Some(0), "{object}");
    assert!(run["asleep_percent"].as_f64() > Some(0.0), "{object}");
}

fn a_limit_that_does_not_hold_is_a_failure() {
    // A guest's rate in a second is not known so well, unless it slept through it.
    let args = "--memory-mib 64 --seconds 1 --limit 1 --ring-entries 65536 --at-full-rings";
    let ran = run(PROGRAM, args);
    assert_eq!(ran.status, Some(1), "{}{}", ran.stderr, ran.stdout);
}

fn one_signal_ends_it() {
    // It would take an hour, most of which its vCPU sleeps.
    let args = "--memory-mib 64 --seconds 3600 --limit 1";
    let mut child = program::spawn(PROGRAM, args);
    // The head of the table.
    let (_, stdout) = next_line(BufReader::new(child.stdout.take().unwrap()), args);
    let (stdout, stderr) = (drain(stdout), drain(child.stderr.take().unwrap()));
    assert_eq!(end(&mut child, libc::SIGINT, args), Some(130));
    stdout.join().unwrap();
    assert_eq!(stderr.join().unwrap(), "interrupted\n");
}

fn nonsense_is_refused() {
    for args in [
        "--limit 0",
        "--limit many",
        "--vcpus 0",
        "--fifo --at-full-rings",
        "now",
    ] {
        let ran = run(PROGRAM, args);
        assert_eq!(ran.status, Some(2), "{args}: {}", ran.stdout);
        assert!(ran.stdout.is_empty(), "{args}: {}", ran.stdout);
    }
}

fn main() -> ExitCode {
    let everywhere = tests![nonsense_is_refused];
    let on_kvm = tests![
        a_guest_is_held_to_each_limit,
        full_rings_alone_hold_it_too,
        a_limit_that_does_not_hold_is_a_failure,
        one_signal_ends_it,
    ];
    program::test("dirty-limit", &everywhere, &on_kvm)
}
