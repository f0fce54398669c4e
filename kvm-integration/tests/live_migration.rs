// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The program `live-migration`, run as a user runs it.
//!
//! Tests on KVM are ignored where it can't be had, and one line on stderr says why; with
//! `KVM_REQUIRED=1` in the environment they fail instead.

mod program;

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd};
use std::process::{Child, Command, ExitCode, Stdio};
use std::ptr;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use kvm_integration::kvm_available;
use serde_json::Value;

use program::{Ran, drain, end, next_line, tests};

const PROGRAM: &str = env!("CARGO_BIN_EXE_live-migration");

/// Small enough to be quick, with rings that fill up.
const SMALL: &str = "--memory-mib 16 --ring-entries 256 --bandwidth-mib 64";

fn spawn(args: &str) -> Child {
    program::spawn(PROGRAM, args)
}

fn run(args: &str) -> Ran {
    program::run(PROGRAM, args)
}

/// Migrations of which one is to have a guest that writes while all memory is sent.
const MOST_TRIES: u32 = 10;

/// Runs with `--json`; all must go well, and the object be all there is on stdout. A guest that writes
/// anything is asked more than once what: if not the first one, on a machine so busy that its vCPUs
/// did not come to it, then another.
fn json(args: &str) -> Value {
    for _ in 0..MOST_TRIES {
        let ran = run(&format!("{args} --downtime-ms 0 --json"));
        assert_eq!(ran.status, Some(0), "{args}: {}{}", ran.stderr, ran.stdout);
        assert_eq!(ran.stdout.lines().count(), 1, "{}", ran.stdout);
        let object: Value = serde_json::from_str(&ran.stdout).expect("the line is JSON");
        assert_eq!(object["mismatched_pages"], 0, "{args}: {object}");
        if number(&object, "rounds") >= 3.0 || number(&object, "guest_stores") < 10.0 {
            return object;
        }
    }
    panic!("{args}: in {MOST_TRIES} migrations no guest wrote anything before it was to stop");
}

fn number(object: &Value, key: &str) -> f64 {
    let number = object[key].as_f64();
    number.unwrap_or_else(|| panic!("`{key}` is missing, or no number: {object}"))
}

fn promised_keys_hold_what_they_promise() {
    // A pass each second leaves the rings to fill up.
    let object = json(&format!("{SMALL} --backend sim --vcpus 3 --pacing fixed"));
    let integer = |key| {
        object[key]
            .as_u64()
            .unwrap_or_else(|| panic!("{key}: {object}"))
    };
    assert_eq!(object["backend"], "sim");
    assert_eq!(object["mode"], "rings");
    assert_eq!(integer("vcpus"), 3);
    assert_eq!(integer("ring_entries"), 256);
    assert_eq!(integer("pages_total"), 4096);
    assert!(integer("pages_sent") >= 4096);
    assert!(integer("ring_full_exits") > 0, "{object}");
    assert!(integer("resets") > 0);
    assert!(integer("entries_harvested") >= 192 * integer("ring_full_exits"));
    assert!(number(&object, "downtime_ms") > 0.0);
    assert!(number(&object, "total_ms") > number(&object, "downtime_ms"));
    let rounds = object["per_round"].as_array().unwrap();
    assert_eq!(rounds.len() as u64, integer("rounds"));
    let sent: u64 = rounds
        .iter()
        .filter_map(|round| round["pages"].as_u64())
        .sum();
    assert_eq!(sent, integer("pages_sent"));
}

/// What a guest dirties that does not converge by itself: all of its memory, in each round.
const OUTRUNS: &str = "--backend sim --memory-mib 8 --vcpus 2 --write-rate 0 --bandwidth-mib 16 \
                       --workload random --downtime-ms 30 --json";

fn a_guest_that_outruns_the_link_converges_by_limits() {
    let migrate = |args: &str| {
        let ran = run(&format!("{OUTRUNS} {args}"));
        assert_eq!(ran.status, Some(0), "{args}: {}", ran.stderr);
        let object: Value = serde_json::from_str(&ran.stdout).expect("the line is JSON");
        assert_eq!(object["mismatched_pages"], 0, "{object}");
        object
    };
    let unlimited = migrate("--max-rounds 4");
    assert_eq!(unlimited["converged"], false, "{unlimited}");
    assert_eq!(number(&unlimited, "limited_ms"), 0.0);
    let limited = migrate("--max-rounds 100 --converge");
    assert_eq!(limited["converged"], true, "{limited}");
    assert!(number(&limited, "limited_ms") > 0.0, "{limited}");
    let rounds = limited["per_round"].as_array().unwrap();
    let is_limited = |at: usize| rounds[at]["limit_per_second"].is_u64();
    // It takes two rounds to see that the second was no better than the first.
    assert!(!is_limited(0) && is_limited(rounds.len() - 1), "{limited}");
    assert!(limited["hopeless_pages_per_second"].is_u64(), "{limited}");
}

fn people_get_a_table() {
    let ran = run(&format!("{SMALL} --backend sim --workload walk"));
    assert_eq!(ran.status, Some(0), "{}", ran.stderr);
    for wanted in [
        "backend: sim, as asked for",
        "log: rings, simulated",
        "2 vCPUs, 16 MiB in two slots, rings of 256, adaptive; walk (30,000 stores/s), link 64 MiB/s",
        "dirtied pages/s",
        "\n stopped ",
        "\nring-full exits ",
        "\npage stores ",
        "\ndowntime ",
        "\nmismatched pages   0 of 4,096\n",
    ] {
        assert!(
            ran.stdout.contains(wanted),
            "no `{wanted}` in {}",
            ran.stdout
        );
    }
    assert_eq!(ran.stderr, "", "a progress bar is for terminals");
}

fn every_workload_arrives() {
    for workload in ["walk", "random", "hot-and-cold"] {
        for rate in [0, 3, 100_000] {
            let args = format!("--workload {workload} --write-rate {rate} --max-rounds 4");
            json(&format!("{SMALL} --backend sim {args}"));
        }
    }
}

const POLICIES: [&str; 5] = [
    "adaptive",
    "fixed",
    "run-levels",
    "run-levels-as-posted",
    "aimd",
];

fn every_policy_brings_it_there() {
    for pacing in POLICIES {
        let object = json(&format!("{SMALL} --backend sim --pacing {pacing}"));
        assert_eq!(object["pacing"], pacing);
    }
    assert_eq!(
        json(&format!("{SMALL} --backend sim"))["pacing"],
        "adaptive"
    );
}

fn the_smallest_and_the_most_parallel_guests_arrive() {
    json("--backend sim --memory-mib 1 --vcpus 1 --ring-entries 65536");
    json("--backend sim --memory-mib 1 --vcpus 32 --ring-entries 256 --workload random");
    json("--backend sim --memory-mib 3 --bandwidth-mib 0");
}

fn a_guest_that_outruns_the_link_is_stopped() {
    let rest = "--write-rate 0 --workload random --max-rounds 2";
    let object = json(&format!("{SMALL} --backend sim {rest}"));
    assert_eq!(object["converged"], false);
    assert_eq!(object["rounds"], 3);
}

/// A guest that writes no page twice: what is not sent again after a link that broke is not sent at all.
const BREAKS: &str =
    "--memory-mib 16 --bandwidth-mib 16 --workload walk --write-rate 2000 --max-rounds 8";

/// What has not arrived is given back, and sent by the next round: also what was sent, and lost with the link.
fn assert_broken_link_loses_nothing(backend: &str) {
    const UNDER_WAY: u64 = 64;
    for after in [7, 64, 300] {
        let object = json(&format!("{BREAKS} {backend} --break-after {after}"));
        let broken = object["broken_round"].as_u64();
        let broken = broken.unwrap_or_else(|| panic!("no link broke: {object}")) as usize;
        let pages = |round: usize, key| object["per_round"][round][key].as_u64().unwrap();
        assert_eq!(pages(broken, "pages"), after, "{object}");
        assert!(broken > 0 && pages(broken, "cut_off") > 0, "{object}");
        let again = pages(broken, "cut_off") + after.min(UNDER_WAY);
        assert!(pages(broken + 1, "pages") >= again, "{object}");
        let breaks = |round: &&Value| round["cut_off"] != 0;
        let rounds = object["per_round"].as_array().unwrap();
        assert_eq!(rounds.iter().filter(breaks).count(), 1, "{object}");
    }
}

fn a_broken_link_loses_nothing() {
    for working_set in ["auto", "off", "100"] {
        assert_broken_link_loses_nothing(&format!("--backend sim --working-set {working_set}"));
    }
    let object = json(&format!("{SMALL} --backend sim --break-after 5000"));
    assert_eq!(object["broken_round"], Value::Null);
    let table = |after| {
        let ran = run(&format!("{BREAKS} --backend sim --break-after {after}"));
        assert_eq!(ran.status, Some(0), "{}", ran.stderr);
        ran.stdout
    };
    assert!(table(100).contains("\nbroken link        in round "));
    let unbroken = "\nbroken link        no, no round had more than 5,000 pages\n";
    assert!(table(5000).contains(unbroken));
}

/// What `--watch` says without a terminal: lines of this form on stderr alone.
fn assert_watched(stderr: &str, rings: bool) {
    let mut left = Vec::new();
    for line in stderr.lines() {
        let parts: Vec<&str> = line.split(", ").collect();
        let watched = line.starts_with("watch: ")
            && line.contains(" s, round ")
            && line.ends_with(" suspects")
            && line.contains(" pages left")
            && line.contains(" entries/s, fullest ring ") == rings
            && line.contains(" of the reaper, which sleeps ") == rings
            && parts.len() == if rings { 10 } else { 6 };
        assert!(watched, "{line}\nin {stderr}");
        assert!(!line.contains('\x1b'), "{line:?}");
        left.push(parts[3].to_owned());
    }
    assert!((2..100).contains(&left.len()), "{stderr}");
    // The first is taken in round 0, on whose way the link takes its time; the last when all is over.
    assert!(left[0].ends_with(" of 4,096 pages left"), "{stderr}");
    assert!(left.last().unwrap().starts_with("0 of "), "{stderr}");
}

/// Round 0 takes this link the time for several lines.
const WATCHED: &str = "--memory-mib 16 --bandwidth-mib 8 --max-rounds 2 --watch";

fn a_watched_migration_says_how_it_stands() {
    let ran = run(&format!("{WATCHED} --backend sim"));
    assert_eq!(ran.status, Some(0), "{}", ran.stderr);
    assert_watched(&ran.stderr, true);
    assert!(ran.stdout.contains("\nmismatched pages   0 of 4,096"));
    assert!(!ran.stdout.contains("watch: "), "{}", ran.stdout);

    // With --json stdout is the object, and the table comes behind the lines.
    let ran = run(&format!("{WATCHED} --backend sim --json"));
    assert_eq!(ran.stdout.lines().count(), 1, "{}", ran.stdout);
    let object: Value = serde_json::from_str(&ran.stdout).expect("the line is JSON");
    assert_eq!(object["mismatched_pages"], 0);
    let (before, after) = ran.stderr.split_once("log: rings, simulated\n").unwrap();
    assert_eq!(before, "backend: sim, as asked for\n");
    let lines = after.lines().take_while(|line| line.starts_with("watch: "));
    assert_watched(&lines.collect::<Vec<_>>().join("\n"), true);
    assert!(
        after.ends_with("mismatched pages   0 of 4,096\n"),
        "{after}"
    );
}

fn a_watched_migration_is_interrupted_as_others_are() {
    let args = "--backend sim --memory-mib 60 --bandwidth-mib 1 --watch";
    let mut child = spawn(args);
    let stdout = drain(child.stdout.take().unwrap());
    let (line, stderr) = next_line(BufReader::new(child.stderr.take().unwrap()), args);
    assert!(line.starts_with("watch: "), "{line}");
    assert_eq!(end(&mut child, libc::SIGINT, args), Some(130));
    let rest = drain(stderr).join().unwrap();
    assert!(rest.ends_with(" suspects\ninterrupted\n"), "{rest}");
    assert!(!stdout.join().unwrap().contains("mismatched"));
}

/// Nobody reads what is said, as stderr is closed.
fn a_watched_migration_needs_no_reader() {
    let mut child = spawn(&format!("{WATCHED} --backend sim"));
    drop(child.stderr.take());
    let stdout = drain(child.stdout.take().unwrap());
    assert_eq!(program::wait(&mut child, "--watch"), Some(0));
    assert!(
        stdout
            .join()
            .unwrap()
            .contains("\nmismatched pages   0 of 4,096")
    );
}

/// A terminal of 24 lines and 80 columns: the user's side, and the program's.
fn terminal() -> (File, File) {
    let size = libc::winsize {
        ws_row: 24,
        ws_col: 80,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let (mut person, mut program) = (-1, -1);
    // SAFETY: both integers are written, the size is read; no name and no mode are wanted.
    let opened = unsafe {
        libc::openpty(
            &mut person,
            &mut program,
            ptr::null_mut(),
            ptr::null(),
            &size,
        )
    };
    assert_eq!(opened, 0, "{}", io::Error::last_os_error());
    // SAFETY: both are open, and nobody else's.
    unsafe { (File::from_raw_fd(person), File::from_raw_fd(program)) }
}

fn modes(terminal: &File) -> Vec<u32> {
    // SAFETY: a struct of integers, for which zero is a value.
    let mut modes: libc::termios = unsafe { mem::zeroed() };
    // SAFETY: the descriptor is open, and the struct is written.
    let told = unsafe { libc::tcgetattr(terminal.as_raw_fd(), &mut modes) };
    assert_eq!(told, 0, "{}", io::Error::last_os_error());
    vec![modes.c_iflag, modes.c_oflag, modes.c_cflag, modes.c_lflag]
}

/// Drawn in place, taken away in the end, in whatever way that comes; and no mode is changed.
fn a_watched_migration_leaves_the_terminal_as_it_was() {
    for signal in [None, Some(libc::SIGINT), Some(libc::SIGTERM)] {
        let (person, program) = terminal();
        let before = modes(&program);
        // Interrupted, or over by itself.
        let mib = if signal.is_some() { 60 } else { 1 };
        let args = format!("--backend sim --memory-mib {mib} --bandwidth-mib 1 --vcpus 3 --watch");
        let mut child = Command::new(PROGRAM)
            .args(args.split_whitespace())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(program.try_clone().unwrap())
            .spawn()
            .unwrap();
        let seen = Arc::<Mutex<String>>::default();
        let reader = thread::spawn({
            let seen = Arc::clone(&seen);
            let mut chunk = [0; 4096];
            move || {
                while !seen.lock().unwrap().ends_with("END") {
                    let read = (&person).read(&mut chunk).unwrap();
                    let text = std::str::from_utf8(&chunk[..read]).unwrap();
                    seen.lock().unwrap().push_str(text);
                }
            }
        });
        let start = Instant::now();
        // Drawn for the second time.
        while !seen.lock().unwrap().contains("\x1b[J") {
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "nothing is drawn"
            );
            thread::sleep(Duration::from_millis(5));
        }
        let status = match signal {
            Some(signal) => end(&mut child, signal, &args),
            None => program::wait(&mut child, &args),
        };
        assert_eq!(status, Some(if signal.is_some() { 130 } else { 0 }));
        assert_eq!(modes(&program), before);
        // Whatever is still to be read ends with this.
        (&program).write_all(b"END").unwrap();
        reader.join().unwrap();
        let seen = seen.lock().unwrap().clone();
        assert!(seen.contains("round 0, guest running ["), "{seen:?}");
        assert!(
            seen.contains("\r\n     2 "),
            "a line for each vCPU: {seen:?}"
        );
        assert!(seen.contains("\r\nsuspects: 0 pages"), "{seen:?}");
        let last = seen.rsplit("\x1b[J").next().unwrap();
        let wanted = if signal.is_some() {
            "interrupted\r\nEND"
        } else {
            "END"
        };
        assert_eq!(last, wanted, "{seen:?}");
        // Cursors are hidden, and screens switched, by private modes.
        assert!(!seen.contains("\x1b[?"), "{seen:?}");
    }
}

fn nonsense_is_refused_with_what_is_allowed() {
    for (args, allowed) in [
        ("--vcpus 0", "1..=32"),
        ("--vcpus 33", "1..=32"),
        ("--vcpus 1000", "1..=32"),
        ("--memory-mib 0", "1..=262144"),
        ("--memory-mib 262145", "1..=262144"),
        (
            "--memory-mib 123456789012345678901234567890",
            "number too large",
        ),
        ("--ring-entries 1000", "must be a power of two"),
        ("--ring-entries 1", "at least 256"),
        ("--ring-entries 1048576", "at most 65536"),
        ("--workload stroll", "choose walk, random or hot-and-cold"),
        ("--backend qemu", "auto, kvm, bitmap, sim"),
        (
            "--pacing qemu",
            "adaptive, fixed, run-levels, run-levels-as-posted, aimd",
        ),
        ("--write-rate=-1", "--write-rate <PAGES>"),
        ("--max-rounds 0", "1..=1000"),
        ("--break-after 0", "1..=67108864"),
        ("--downtime-ms 60001", "0..=60000"),
        ("--frobnicate", "--help"),
    ] {
        let ran = run(args);
        assert_eq!(ran.status, Some(2), "{args}: {}", ran.stdout);
        assert!(ran.stderr.contains(allowed), "{args}: {}", ran.stderr);
        assert_eq!(ran.stdout, "", "{args}");
    }
}

fn help_names_every_option() {
    let ran = run("--help");
    assert_eq!(ran.status, Some(0));
    for option in [
        "--vcpus",
        "--memory-mib",
        "--ring-entries",
        "--workload",
        "--write-rate",
        "--bandwidth-mib",
        "--max-rounds",
        "--seed",
        "--backend",
        "--pacing",
        "--break-after",
        "--watch",
        "--json",
    ] {
        assert!(ran.stdout.contains(option), "{option}: {}", ran.stdout);
    }
}

fn auto_says_what_and_why() {
    let ran = run(&format!("{SMALL} --json"));
    assert_eq!(ran.status, Some(0), "{}", ran.stderr);
    let mut lines = ran.stderr.lines();
    let line = lines.next().expect("a line about the backend");
    let log = lines.next().expect("a line about the log");
    // Every KVM that this suite takes for one has rings.
    assert!(log.starts_with("log: rings, "), "{log}");
    let object: Value = serde_json::from_str(&ran.stdout).unwrap();
    let backend = if kvm_available().is_ok() && cfg!(tiny_guest) {
        "kvm"
    } else {
        "sim"
    };
    assert_eq!(object["backend"], backend);
    let start = format!("backend: {backend}, because ");
    assert!(
        line.starts_with(&start) && line.len() > start.len(),
        "{line}"
    );
}

/// Sends a signal in the middle of a round that would take a minute.
fn interrupt(args: &str, signal: libc::c_int) {
    let args = format!("{args} --memory-mib 60 --bandwidth-mib 1");
    let mut child = spawn(&args);
    let stdout = BufReader::new(child.stdout.take().unwrap());
    let stderr = drain(child.stderr.take().unwrap());
    let (line, _stdout) = next_line(stdout, &args);
    assert!(line.starts_with("backend: "), "{line}");
    thread::sleep(Duration::from_millis(300));
    assert_eq!(end(&mut child, signal, &args), Some(130));
    assert_eq!(stderr.join().unwrap(), "interrupted\n");
}

fn one_signal_ends_it() {
    interrupt("--backend sim", libc::SIGINT);
    interrupt("--backend sim", libc::SIGTERM);
    // Its vCPUs sleep for most of an hour.
    interrupt("--backend sim --vcpus 32 --write-rate 1", libc::SIGINT);
}

fn kvm_default_run() {
    let object = json("");
    assert_eq!(object["backend"], "kvm");
    assert_eq!(object["pages_total"], 131_072);
    number(&object, "ring_full_exits");
}

fn kvm_eight_vcpus_on_small_rings() {
    let args = "--backend kvm --vcpus 8 --ring-entries 1024 --workload random";
    let object = json(args);
    assert_eq!(
        (&object["vcpus"], &object["ring_entries"]),
        (&8.into(), &1024.into())
    );
    // Between two passes is a second, in which two vCPUs fill such rings on any machine.
    let args = "--backend kvm --vcpus 2 --ring-entries 1024 --workload random --write-rate 0";
    let rest = "--memory-mib 64 --bandwidth-mib 32 --max-rounds 2 --pacing fixed";
    let object = json(&format!("{args} {rest}"));
    assert!(number(&object, "ring_full_exits") > 0.0, "{object}");
}

fn kvm_broken_link() {
    assert_broken_link_loses_nothing("--backend kvm");
    assert_broken_link_loses_nothing("--backend bitmap");
}

fn kvm_twenty_seeds() {
    for seed in 0..20 {
        json(&format!(
            "--backend kvm --memory-mib 64 --ring-entries 1024 --seed {seed}"
        ));
    }
}

fn kvm_every_policy() {
    for pacing in POLICIES {
        json(&format!(
            "--backend kvm --memory-mib 64 --ring-entries 1024 --pacing {pacing}"
        ));
    }
}

fn kvm_by_bitmap() {
    for workload in ["walk", "random", "hot-and-cold"] {
        let args = format!("--memory-mib 64 --vcpus 4 --workload {workload}");
        let object = json(&format!("--backend bitmap {args}"));
        assert_eq!(
            (&object["backend"], &object["mode"]),
            (&"kvm".into(), &"bitmap".into())
        );
        for none in ["ring_full_exits", "resets", "entries_harvested"] {
            assert_eq!(object[none], 0, "{object}");
        }
        let object = json(&format!("--backend kvm {args}"));
        assert_eq!(object["mode"], "rings");
    }
    let ran = run("--backend bitmap --memory-mib 16");
    for wanted in [
        "backend: kvm, as asked for\nlog: bitmap, as asked for\n",
        "in two slots, bitmap, ",
    ] {
        assert!(
            ran.stdout.contains(wanted),
            "no `{wanted}` in {}",
            ran.stdout
        );
    }
}

fn kvm_watched() {
    for (backend, rings) in [("kvm", true), ("bitmap", false)] {
        let ran = run(&format!("{WATCHED} --backend {backend}"));
        assert_eq!(ran.status, Some(0), "{}", ran.stderr);
        assert_watched(&ran.stderr, rings);
        assert!(ran.stdout.contains("\nmismatched pages   0 of 4,096"));
    }
}

fn kvm_as_fast_as_it_goes() {
    for workload in ["walk", "random", "hot-and-cold"] {
        let args = "--memory-mib 64 --ring-entries 1024 --write-rate 0 --bandwidth-mib 0";
        json(&format!("--backend kvm {args} --workload {workload}"));
    }
}

fn kvm_one_signal_ends_it() {
    interrupt("--backend kvm", libc::SIGINT);
    interrupt("--backend kvm --write-rate 0", libc::SIGTERM);
    interrupt("--backend kvm --vcpus 32 --write-rate 1", libc::SIGINT);
}

fn main() -> ExitCode {
    let everywhere = tests![
        promised_keys_hold_what_they_promise,
        a_guest_that_outruns_the_link_converges_by_limits,
        people_get_a_table,
        every_workload_arrives,
        every_policy_brings_it_there,
        the_smallest_and_the_most_parallel_guests_arrive,
        a_guest_that_outruns_the_link_is_stopped,
        a_broken_link_loses_nothing,
        a_watched_migration_says_how_it_stands,
        a_watched_migration_is_interrupted_as_others_are,
        a_watched_migration_needs_no_reader,
        a_watched_migration_leaves_the_terminal_as_it_was,
        nonsense_is_refused_with_what_is_allowed,
        help_names_every_option,
        auto_says_what_and_why,
        one_signal_ends_it,
    ];
    let on_kvm = tests![
        kvm_default_run,
        kvm_eight_vcpus_on_small_rings,
        kvm_broken_link,
        kvm_twenty_seeds,
        kvm_every_policy,
        kvm_by_bitmap,
        kvm_watched,
        kvm_as_fast_as_it_goes,
        kvm_one_signal_ends_it,
    ];
    program::test("live-migration", &everywhere, &on_kvm)
}
