// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The program `pacing-lab`, run as a user runs it. No figure of time is asserted: what is, holds
//! on any machine.

mod program;

use std::fs;
use std::io::BufReader;
use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::Value;

use program::{Ran, drain, end, next_line, tests};

const PROGRAM: &str = env!("CARGO_BIN_EXE_pacing-lab");

fn run(args: &str) -> Ran {
    program::run(PROGRAM, args)
}

/// The table is Markdown: a head, a line, and a row for each value.
fn numbers_are_justified() {
    let ran = run("--sim --constants --seconds 1");
    assert_eq!(ran.status, Some(0), "{}", ran.stderr);
    for number in [
        "half_life, s",
        "faster",
        "steps",
        "deviations",
        "least",
        "along",
    ] {
        let rows = ran
            .stdout
            .lines()
            .filter(|line| line.starts_with(&format!("| {number}")));
        let (default, others): (Vec<_>, Vec<_>) = rows.partition(|row| row.contains(" *"));
        assert!(
            default.len() == 1 && others.len() >= 2,
            "{number}: {}",
            ran.stdout
        );
    }
}

/// A place for a file of a test's own.
fn temporary(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// Runs it, which must go well. What it said, and the object that it wrote.
fn report(args: &str) -> (Ran, Value) {
    let path = temporary("report.json");
    let _ = fs::remove_file(&path);
    let ran = run(&format!("{args} --json {}", path.display()));
    assert_eq!(ran.status, Some(0), "{args}: {}{}", ran.stderr, ran.stdout);
    let text = fs::read_to_string(&path).expect("the report was written");
    let report: Value = serde_json::from_str(&text).expect("the report is JSON");
    assert_eq!(report["schema"], 1);
    (ran, report)
}

/// The arms of the only guest, which are to be these.
fn arms(report: &Value, names: &[&str]) -> Vec<Value> {
    let guests = report["guests"].as_array().expect("guests");
    assert_eq!(guests.len(), 1, "{report}");
    let arms = guests[0]["arms"].as_array().expect("arms").clone();
    let skipped = report["skipped"].as_array().expect("skipped arms");
    let ran: Vec<&str> = arms.iter().filter_map(|arm| arm["arm"].as_str()).collect();
    let is_skipped = |name: &&&str| skipped.iter().any(|skipped| skipped["arm"] == **name);
    let wanted: Vec<&str> = names.iter().filter(|n| !is_skipped(n)).copied().collect();
    assert_eq!(ran, wanted, "{report}");
    arms
}

fn number(figures: &Value, key: &str) -> f64 {
    let number = figures[key].as_f64();
    number.unwrap_or_else(|| panic!("`{key}` is missing, or no number: {figures}"))
}

/// Of a guest that logs every store: nothing is lost, nothing is counted twice, and nobody does
/// with fewer passes than can be.
fn is_sound(arm: &Value, turns: f64, vcpus: f64, ring_entries: f64) {
    let all = &arm["total"];
    assert_eq!(arm["overruns"], 0, "{arm}");
    assert_eq!(arm["rounds"].as_array().unwrap().len() as f64, turns);
    let (entries, stores) = (number(all, "entries"), number(all, "stores"));
    assert!(entries > 0.0, "{arm}");
    // From a turn's start to its end, rings may have become full or empty; progress is reported
    // by up to 64 stores.
    let most = turns * vcpus * (ring_entries + 64.0);
    assert!((entries - stores).abs() <= most, "{arm}");
    let passes = number(all, "passes");
    assert!(
        passes >= 0.9 * number(all, "minimum_passes") - turns,
        "{arm}"
    );
    assert!(number(all, "minimum_passes") * vcpus * ring_entries * 1.1 >= entries);
    // Each full exit makes a pass, and so does the reaper; one may be under way.
    let made = number(all, "full_exits") + number(all, "reaper_passes");
    assert!(passes >= made - turns * (vcpus + 1.0), "{arm}");
    assert!(
        number(all, "full_exits") == 0.0 || number(all, "stall_ms") > 0.0,
        "{arm}"
    );
    assert!(
        number(all, "wakeups") >= number(all, "reaper_passes") - turns,
        "{arm}"
    );
    assert!(number(all, "seconds") >= 0.2 * turns, "{arm}");
}

fn kvm_every_arm_on_a_native_guest() {
    let args = "--workload constant --vcpus 1 --ring-entries 1024 --slice-ms 200";
    let (ran, report) = report(args);
    let names = [
        "adaptive",
        "adaptive-fifo",
        "fixed",
        "fixed-10ms",
        "run-levels",
        "run-levels-as-posted",
        "aimd",
        "poll",
        "qemu",
        "no-reaper",
    ];
    assert_eq!(report["simulated"], false);
    for arm in arms(&report, &names) {
        is_sound(&arm, 2.0, 1.0, 1024.0);
        let all = &arm["total"];
        let has_reaper = arm["arm"] != "no-reaper";
        assert!(has_reaper || number(all, "wakeups") == 0.0, "{arm}");
        // A ring this small fills many times in between.
        let fills = ["fixed", "qemu", "no-reaper"]
            .map(Value::from)
            .contains(&arm["arm"]);
        assert!(!fills || number(all, "full_exits") > 0.0, "{arm}");
    }
    assert!(
        ran.stdout.contains("### constant, 1 vCPU, rings of 1024\n"),
        "{}",
        ran.stdout
    );
    assert!(ran.stdout.contains("### Targets: "), "{}", ran.stdout);
    for skipped in report["skipped"].as_array().unwrap() {
        let line = format!("SKIPPED {}: ", skipped["arm"].as_str().unwrap());
        assert!(ran.stderr.contains(&line), "{}", ran.stderr);
    }
}

fn kvm_more_vcpus_than_cores() {
    for workload in ["constant", "fast"] {
        let rest = "--vcpus 8 --ring-entries 512 --slice-ms 200 --rounds 1";
        let names = ["adaptive", "fixed", "qemu"];
        let arm = names.map(|name| format!("--arm {name}")).join(" ");
        let (_, report) = report(&format!("--workload {workload} {rest} {arm}"));
        for arm in arms(&report, &names) {
            match workload {
                "constant" => is_sound(&arm, 1.0, 8.0, 512.0),
                _ => assert_eq!(arm["overruns"], 0, "{arm}"),
            }
        }
    }
}

fn kvm_whoever_logs_nothing_needs_no_pass() {
    let rest = "--vcpus 2 --ring-entries 512 --rounds 1 --arm no-reaper --slice-ms 200";
    let (_, idle) = report(&format!("--workload idle {rest}"));
    let (_, hot_set) = report(&format!("--workload hot-set {rest}"));
    let figures = |report: &Value| {
        let all = arms(report, &["no-reaper"])[0]["total"].clone();
        ["entries", "passes", "stores"].map(|key| number(&all, key))
    };
    assert_eq!(figures(&idle), [0.0, 0.0, 0.0]);
    let [entries, passes, stores] = figures(&hot_set);
    assert_eq!([entries, passes], [0.0, 0.0]);
    assert!(stores > 0.0);
}

fn kvm_a_page_is_drawn() {
    let page = temporary("pacing-lab.html");
    let rest = "--vcpus 1 --ring-entries 1024 --slice-ms 100 --rounds 1 --arm poll";
    let args = format!("--workload skew {rest} --html {}", page.display());
    let (_, report) = report(&args);
    let rounds = &arms(&report, &["poll"])[0]["rounds"];
    assert_eq!(rounds.as_array().unwrap().len(), 1);
    let page = fs::read_to_string(page).expect("the page was written");
    assert!(page.contains("poll: fullest ring"));
    assert!(page.contains("skew, 1 vCPU, rings of 1024"));
}

fn interrupt(args: &str, signal: libc::c_int) {
    let mut child = program::spawn(PROGRAM, args);
    let stdout = drain(child.stdout.take().unwrap());
    let stderr = BufReader::new(child.stderr.take().unwrap());
    // Progress: it has begun.
    let (_, stderr) = next_line(stderr, args);
    let stderr = drain(stderr);
    assert_eq!(end(&mut child, signal, args), Some(130));
    let stderr = stderr.join().unwrap();
    assert!(stderr.ends_with("interrupted\n"), "{stderr}");
    assert!(!stdout.join().unwrap().contains("Targets"));
}

fn kvm_one_signal_ends_it() {
    interrupt("--workload constant --rounds 1000", libc::SIGINT);
    interrupt("--workload idle --rounds 1000", libc::SIGTERM);
    interrupt("--workload trickle --vcpus 16 --rounds 1000", libc::SIGINT);
}

fn one_signal_ends_a_simulation() {
    let args = "--sim --workload constant --vcpus 1024 --seconds 3600";
    interrupt(args, libc::SIGINT);
}

fn simulations_repeat_themselves() {
    let rest = "--vcpus 64 --seconds 2 --arm adaptive --arm fixed";
    let args = format!("--sim --workload constant {rest} --seed 5");
    let (ran, first) = report(&args);
    let (_, second) = report(&args);
    assert_eq!(first, second);
    assert_eq!(first["simulated"], true);
    assert!(
        ran.stdout
            .contains("### constant, 64 vCPUs, rings of 4096\n")
    );
    for arm in arms(&first, &["adaptive", "fixed"]) {
        assert!(number(&arm["total"], "entries") > 0.0, "{arm}");
    }
}

fn recordings_are_simulated() {
    let path = temporary("recording.csv");
    fs::write(&path, "0,0,20000\n0,2,1000\n1,2,0\n").unwrap();
    let recorded = format!("--trace {}", path.display());
    let (_, report) = report(&format!("--sim --seconds 2 --arm poll {recorded}"));
    let guest = &report["guests"][0];
    assert_eq!(
        (&guest["workload"], &guest["vcpus"]),
        (&"recorded".into(), &3.into())
    );
    let stores = number(&guest["arms"][0]["total"], "stores");
    assert!((30_000.0..50_000.0).contains(&stores), "{guest}");

    fs::write(&path, "0,0,many\n").unwrap();
    let ran = run(&format!("--sim {recorded}"));
    assert_eq!(ran.status, Some(2), "{}", ran.stdout);
    assert!(ran.stderr.contains("`many` is no number"), "{}", ran.stderr);
}

/// What it wrote of the migrations of one guest by the four arms, of which none has missed a page.
fn migrations(args: &str) -> Value {
    let (ran, report) = report(&format!("--migrations {args}"));
    assert!(ran.stdout.contains("### Targets: "), "{}", ran.stdout);
    assert_eq!(report["missed_pages"], 0);
    let guests = report["guests"].as_array().expect("guests");
    let [guest] = &guests[..] else {
        panic!("one guest was asked for: {report}")
    };
    let arms = guest["arms"].as_array().expect("arms");
    let names: Vec<&str> = arms.iter().filter_map(|arm| arm["arm"].as_str()).collect();
    assert_eq!(names, ["rings", "bitmap", "rings+ws", "bitmap+ws"]);
    for arm in arms {
        assert!(number(arm, "rounds") >= 1.0, "{arm}");
        // All of the guest at least.
        assert!(number(arm, "pages_sent") >= 8192.0, "{arm}");
        let has_rings = arm["arm"].as_str().unwrap().starts_with("rings");
        assert_eq!(arm["entries"].is_u64(), has_rings, "{arm}");
    }
    report
}

fn simulated_migrations_repeat_themselves() {
    let [first, second] = [0; 2].map(|_| migrations("--sim --workload moving"));
    assert_eq!(first, second);
    assert!(first["last_sync"].is_null());
    let targets = first["targets"].as_array().expect("targets");
    assert!(!targets.is_empty());
}

fn kvm_no_page_is_missed_by_a_migration() {
    migrations("--quick --workload hot-and-cold");
}

fn nonsense_is_refused_with_what_is_allowed() {
    for (args, allowed) in [
        ("--workload stroll", "choose one of constant, trickle"),
        ("--sim --workload stroll", "choose one of idle, constant"),
        ("--workload sliced", "choose one of constant, trickle"),
        (
            "--migrations --workload idle",
            "choose one of hot-set, hot-and-cold",
        ),
        ("--migrations --arm adaptive", "cannot be used with"),
        ("--vcpus 33", "at most 32, or --sim"),
        ("--vcpus 1025", "1..=1024"),
        ("--ring-entries 1000", "power of two"),
        ("--arm best", "choose one of adaptive, adaptive-fifo"),
        ("--quick --sim", "cannot be used with"),
        ("--trace nowhere", "--sim"),
        ("--sim --trace /nowhere", "could not be read"),
        (
            "--sim --seconds 1 --vcpus 1 --json /nowhere/report",
            "could not be written",
        ),
    ] {
        let ran = run(args);
        assert_eq!(ran.status, Some(2), "{args}: {}", ran.stdout);
        assert!(ran.stderr.contains(allowed), "{args}: {}", ran.stderr);
    }
}

fn main() -> ExitCode {
    let everywhere = tests![
        one_signal_ends_a_simulation,
        simulations_repeat_themselves,
        simulated_migrations_repeat_themselves,
        recordings_are_simulated,
        numbers_are_justified,
        nonsense_is_refused_with_what_is_allowed,
    ];
    let on_kvm = tests![
        kvm_every_arm_on_a_native_guest,
        kvm_more_vcpus_than_cores,
        kvm_whoever_logs_nothing_needs_no_pass,
        kvm_a_page_is_drawn,
        kvm_no_page_is_missed_by_a_migration,
        kvm_one_signal_ends_it,
    ];
    program::test("pacing-lab", &everywhere, &on_kvm)
}
