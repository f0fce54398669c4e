// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The program `chaos`, run as a user runs it: a few episodes of it. How many faults of each kind there
//! are in so few is for chance to say; that no page is missed is not.

mod program;

use std::io::BufReader;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use serde_json::Value;

use program::{Ran, drain, end, next_line, tests};

const PROGRAM: &str = env!("CARGO_BIN_EXE_chaos");

/// What cannot be had, or not be counted, on KVM.
const FAULTS_OF_THE_SIMULATION: [&str; 2] = ["voids_ignored", "writes_in_resets"];

/// What befalls rings and their resets.
const FAULTS_OF_RINGS: [&str; 8] = [
    "full_exits",
    "passes_abandoned",
    "ring_overruns",
    "failed_resets",
    "short_resets",
    "doubtful_resets",
    "entries_of_no_slot",
    "voids_ignored",
];

fn run(args: &str) -> Ran {
    program::run(PROGRAM, args)
}

/// Runs with `--json`; no page may be missed, and the object is to be all there is on stdout.
fn json(args: &str) -> Value {
    let ran = run(&format!("{args} --json"));
    assert_eq!(ran.status, Some(0), "{args}: {}{}", ran.stderr, ran.stdout);
    assert_eq!(ran.stdout.lines().count(), 1, "{}", ran.stdout);
    let object: Value = serde_json::from_str(&ran.stdout).expect("the line is JSON");
    for key in ["missed_pages", "stray_pages", "strange_entries"] {
        assert_eq!(object[key], 0, "{args}: {object}");
    }
    assert_eq!(object["failed_episodes"], Value::Array(Vec::new()));
    object
}

/// What holds for any run: `wanted` episodes have come to their end, and did something.
fn is_sound(object: &Value, backend: &str, mode: &str, wanted: u64) {
    let number = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("{object}"));
    assert_eq!(object["backend"], backend, "{object}");
    assert_eq!(object["mode"], mode, "{object}");
    assert_eq!(number(&object["episodes"]), wanted, "{object}");
    assert!(number(&object["comparisons"]) >= 2 * wanted, "{object}");
    assert!(number(&object["exact_comparisons"]) >= wanted, "{object}");
    let entries = number(&object["entries"]);
    assert!(entries > 1000 || mode == "bitmap", "{object}");
    assert!(object["seconds"].as_f64().is_some_and(|time| time > 0.0));
    let faults = object["faults"].as_object().expect("faults by kind");
    let happened = faults.values().filter(|times| number(times) > 0).count();
    assert!(happened >= 10, "{object}");
    let elsewhere = object["not_applicable"].as_array().expect("kinds");
    assert_eq!(faults.len() + elsewhere.len(), 34, "{object}");
    let is_sim = backend == "sim";
    for fault in FAULTS_OF_THE_SIMULATION.iter().chain(&FAULTS_OF_RINGS) {
        let of_rings = FAULTS_OF_RINGS.contains(fault);
        let of_sim = FAULTS_OF_THE_SIMULATION.contains(fault);
        let is_here = (mode == "rings" || !of_rings) && (is_sim || !of_sim);
        assert_eq!(faults.contains_key(*fault), is_here, "{fault}: {object}");
        assert_eq!(!elsewhere.contains(&(*fault).into()), is_here, "{object}");
    }
}

fn no_page_is_missed_on_the_simulated_kernel() {
    for mode in ["rings", "bitmap"] {
        let object = json(&format!(
            "--backend sim --mode {mode} --seed 3 --episodes 100"
        ));
        is_sound(&object, "sim", mode, 100);
        assert_eq!(object["seed"], 3);
        // So many episodes have some of each.
        let faults = object["faults"].as_object().expect("faults by kind");
        for (fault, times) in faults {
            assert_ne!(times, 0, "{fault}: {object}");
        }
    }
}

fn kvm_no_page_is_missed() {
    let object = json("--backend kvm --seed 3 --episodes 15");
    is_sound(&object, "kvm", "rings", 15);
}

fn kvm_no_page_is_missed_in_bitmaps() {
    let object = json("--backend kvm --mode bitmap --seed 3 --episodes 10");
    is_sound(&object, "kvm", "bitmap", 10);
}

/// A shell's job, which is the leader of its group, gets its stops all the same.
fn kvm_a_job_of_a_shell_is_spared_nothing() {
    let mut job = Command::new(PROGRAM);
    let job = job.args("--backend kvm --seed 3 --episodes 2 --json".split(' '));
    let ran = job.process_group(0).output().unwrap();
    assert!(ran.status.success(), "{ran:?}");
    let object: Value = serde_json::from_slice(&ran.stdout).expect("the line is JSON");
    let elsewhere = Value::from(FAULTS_OF_THE_SIMULATION.to_vec());
    assert_eq!(object["not_applicable"], elsewhere, "{object}");
}

fn an_episode_can_be_had_again() {
    let ran = run("--backend sim --seed 3 --only-episode 11 --episodes 2");
    assert_eq!(ran.status, Some(0), "{}", ran.stderr);
    for wanted in ["backend: sim, as asked for", "; sim, rings, seed 3\n"] {
        assert!(ran.stdout.contains(wanted), "{}", ran.stdout);
    }
    let line = |name: &str| {
        let found = ran.stdout.lines().find(|line| line.starts_with(name));
        let line = found.unwrap_or_else(|| panic!("no {name}: {}", ran.stdout));
        line.split_whitespace().last().unwrap().to_string()
    };
    assert_eq!([line("episodes"), line("missed pages")], ["2", "0"]);
    assert_eq!(ran.stderr, "", "a progress line is for terminals");
}

fn one_signal_ends_it() {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let args = "--backend sim --minutes 100";
        let mut child = program::spawn(PROGRAM, args);
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let stderr = drain(child.stderr.take().unwrap());
        // Once it has chosen, it listens.
        let (_, stdout) = next_line(stdout, args);
        let stdout = drain(stdout);
        assert_eq!(end(&mut child, signal, args), Some(130));
        assert_eq!(stderr.join().unwrap(), "interrupted\n");
        assert!(stdout.join().unwrap().contains("\nmissed pages "));
    }
}

fn nonsense_is_refused_with_what_is_allowed() {
    for (args, allowed) in [
        ("--minutes 0", "more than 0 and at most 10000"),
        ("--backend xen", "possible values: auto, kvm, sim"),
        ("--episodes 0", "not in 1.."),
    ] {
        let ran = run(args);
        assert_eq!(ran.status, Some(2), "{args}: {}", ran.stdout);
        assert!(ran.stderr.contains(allowed), "{args}: {}", ran.stderr);
    }
}

fn main() -> ExitCode {
    let everywhere = tests![
        no_page_is_missed_on_the_simulated_kernel,
        an_episode_can_be_had_again,
        one_signal_ends_it,
        nonsense_is_refused_with_what_is_allowed,
    ];
    program::test(
        "chaos",
        &everywhere,
        &tests![
            kvm_no_page_is_missed,
            kvm_no_page_is_missed_in_bitmaps,
            kvm_a_job_of_a_shell_is_spared_nothing,
        ],
    )
}
