// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The program `mini-vmm`, run as a user runs it.
//!
//! Tests on KVM are ignored where it can't be had, and one line on stderr says why; with
//! `KVM_REQUIRED=1` in the environment they fail instead.

#[allow(dead_code, reason = "what tests of other programs need, too")]
mod program;

use std::fs::read_to_string;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use kvm_integration::kvm_available;

use program::{Ran, drain, end, run, spawn, tests, wait};

const PROGRAM: &str = env!("CARGO_BIN_EXE_mini-vmm");
const SIMULATED: &str = "THE KERNEL AND THE GUEST ARE SIMULATED";
/// The guest's memory.
const BYTES: u64 = 64 << 20;

/// A run in which all went well: every page was sent at first, the guest has counted on.
fn assert_migrated(ran: &Ran) {
    let Ran { stdout, stderr, .. } = ran;
    assert_eq!(ran.status, Some(0), "{stderr}{stdout}");
    let pages: Option<u64> = stdout.lines().next().and_then(|line| {
        let pages = line.strip_suffix(" pages to send")?;
        pages.parse().ok()
    });
    if cfg!(tiny_guest) {
        assert_eq!(pages, Some(BYTES / 4096), "{stdout}");
    }
    let counts = stdout.lines().find_map(|line| {
        let line = line.strip_prefix("all memory arrived, checksum ")?;
        let (_, counts) = line.split_once("; counted to ")?;
        let (here, there) = counts.split_once(", and on to ")?;
        Some((here.parse::<u32>().ok()?, there.parse::<u32>().ok()?))
    });
    let (here, there) = counts.unwrap_or_else(|| panic!("{stdout}"));
    assert!(here >= 1000 && there >= here + 1000, "{stdout}");
}

fn assert_failed(ran: &Ran, words: &str) {
    assert_eq!(ran.status, Some(1), "{}{}", ran.stderr, ran.stdout);
    assert!(ran.stderr.contains(words), "no `{words}` in {}", ran.stderr);
    assert!(!ran.stdout.contains("all memory arrived"), "{}", ran.stdout);
}

fn a_simulated_guest_goes_on_in_another_process() {
    let ran = run(PROGRAM, "--sim");
    assert_migrated(&ran);
    // Of either process.
    assert_eq!(ran.stderr.matches(SIMULATED).count(), 2, "{}", ran.stderr);
}

/// The same command, with KVM and without.
fn it_runs_anywhere() {
    let ran = run(PROGRAM, "");
    assert_migrated(&ran);
    let on_kvm = cfg!(tiny_guest) && kvm_available().is_ok();
    assert_eq!(ran.stderr.contains(SIMULATED), !on_kvm, "{}", ran.stderr);
}

/// As the README and the guide say: what there is to copy, on either processor.
fn it_is_about_400_lines() {
    let files = [
        include_str!("../src/bin/mini-vmm/main.rs"),
        include_str!("../src/bin/mini-vmm/machine.rs"),
        include_str!("../src/bin/mini-vmm/kvm.rs"),
    ];
    let processors = [
        include_str!("../src/bin/mini-vmm/x86_64.rs"),
        include_str!("../src/bin/mini-vmm/aarch64.rs"),
    ];
    for processor in processors {
        let files = files.iter().chain([&processor]);
        let lines: usize = files.map(|file| file.lines().count()).sum();
        assert!((375..425).contains(&lines), "{lines} lines");
    }
}

fn other_options_are_an_error() {
    for options in ["--simulate", "--sim --sim", "source"] {
        assert_failed(&run(PROGRAM, options), "usage: mini-vmm [--sim]");
    }
}

/// What a child leaves behind, and the processes that still have its stdout and stderr.
fn finish(mut child: Child) -> Ran {
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let (stdout, stderr) = (drain(stdout.unwrap()), drain(stderr.unwrap()));
    let status = wait(&mut child, "mini-vmm");
    let (stdout, stderr) = (stdout.join().unwrap(), stderr.join().unwrap());
    Ran {
        status,
        stdout,
        stderr,
    }
}

/// The source's child, once it is the destination.
fn destination_of(source: &Child) -> libc::pid_t {
    let children = format!("/proc/{0}/task/{0}/children", source.id());
    let deadline = Instant::now() + Duration::from_secs(60);
    while Instant::now() < deadline {
        let children = read_to_string(&children).expect("Linux lists children");
        for child in children.split_whitespace() {
            let command = read_to_string(format!("/proc/{child}/cmdline"));
            if command.is_ok_and(|command| command.contains("destination")) {
                return child.parse().expect("an id is a number");
            }
        }
        sleep(Duration::from_millis(1));
    }
    panic!("the source starts no destination");
}

fn a_destination_that_leaves_or_is_silent_is_an_error() {
    for signal in [libc::SIGKILL, libc::SIGSTOP] {
        let source = spawn(PROGRAM, "--sim");
        let destination = destination_of(&source);
        // SAFETY: the source has not waited for its child yet, so that the id is still that one's.
        assert_eq!(unsafe { libc::kill(destination, signal) }, 0);
        assert_failed(&finish(source), "the source failed");
    }
}

/// The source is killed; the destination, which has its stderr, ends by itself.
fn a_source_that_dies_is_an_error(options: &str) {
    let mut source = spawn(PROGRAM, options);
    destination_of(&source);
    end(&mut source, libc::SIGKILL, "the source");
    let ran = finish(source);
    assert!(
        ran.stderr.contains("the destination failed"),
        "{}",
        ran.stderr
    );
}

fn a_simulated_source_that_dies_is_an_error() {
    a_source_that_dies_is_an_error("--sim");
}

fn a_source_on_kvm_that_dies_is_an_error() {
    a_source_that_dies_is_an_error("");
}

/// A destination by itself, and our end of its socket.
fn destination() -> (Child, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let child = Command::new(PROGRAM)
        .args(["destination", "--sim"])
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program was built with this test");
    (child, ours)
}

/// Headers of pages, and pages, that end in the midst of something.
const CUT: [&[u8]; 4] = [b"", b"[0,", b"[0,4096]", b"[0,4096]pages"];

fn a_source_that_leaves_is_an_error() {
    for bytes in CUT {
        let (child, mut ours) = destination();
        ours.write_all(bytes).unwrap();
        drop(ours);
        assert_failed(&finish(child), "the destination failed");
    }
}

fn a_source_that_is_silent_is_an_error() {
    // All at once, for each takes as long as a destination waits.
    let silent = CUT.map(|bytes| {
        let (child, mut ours) = destination();
        ours.write_all(bytes).unwrap();
        (child, ours)
    });
    for (child, ours) in silent {
        assert_failed(&finish(child), "the destination failed");
        drop(ours);
    }
}

/// Neither reads a destination past the end of memory, nor goes it on from what differs.
fn nonsense_of_a_source_is_an_error() {
    let largest = u64::MAX;
    let nonsense = [
        (format!("[{BYTES},1]"), "invalid guest address"),
        (format!("[{},2]", BYTES - 1), "destination failed"),
        (format!("[{largest},4096]"), "invalid guest address"),
        (format!("[0,{largest}]"), "destination failed"),
        ("[-1,5]".into(), "talks nonsense"),
        ("GET / HTTP/1.1\r\n\r\n".into(), "talks nonsense"),
        ("[0,0]{}".into(), "talks nonsense"),
        ("[0,0][null,1]".into(), "the checksums differ"),
        (format!("[0,0][\"{}", "x".repeat(1 << 20)), "talks nonsense"),
    ];
    for (bytes, words) in nonsense {
        let (child, mut ours) = destination();
        // It may leave before it has read all.
        let _ = ours.write_all(bytes.as_bytes());
        assert_failed(&finish(child), words);
    }
}

/// A destination that goes on prints how far it has come; one whose state is none does not go on.
fn a_destination_answers_once_the_guest_goes_on() {
    // Memory as it is before anything was sent: none at all, on the simulated kernel.
    let checksum = {
        let mut hasher = crc32fast::Hasher::new();
        let zeros = vec![0; 1 << 20];
        (0..BYTES >> 20).for_each(|_| hasher.update(&zeros));
        hasher.finalize()
    };
    let answer_to = |state: &str| {
        let (child, mut ours) = destination();
        write!(ours, "[0,0][{state},{checksum}]").unwrap();
        let ran = finish(child);
        let mut answer = String::new();
        ours.read_to_string(&mut answer).unwrap();
        (ran, answer)
    };
    let (ran, answer) = answer_to("0");
    assert_eq!(ran.status, Some(0), "{}", ran.stderr);
    assert!(answer.parse::<u32>().unwrap() >= 1000, "{answer}");
    // Memory says that the guest has counted to 0.
    let (ran, answer) = answer_to("7");
    assert_failed(&ran, "8 after 0");
    assert_eq!(answer, "");
    let (ran, answer) = answer_to("{}");
    assert_failed(&ran, "the destination failed");
    assert_eq!(answer, "");
}

fn main() -> ExitCode {
    let everywhere = tests![
        a_simulated_guest_goes_on_in_another_process,
        it_runs_anywhere,
        it_is_about_400_lines,
        other_options_are_an_error,
        a_destination_that_leaves_or_is_silent_is_an_error,
        a_simulated_source_that_dies_is_an_error,
        a_source_that_leaves_is_an_error,
        a_source_that_is_silent_is_an_error,
        nonsense_of_a_source_is_an_error,
        a_destination_answers_once_the_guest_goes_on,
    ];
    let on_kvm = tests![a_source_on_kvm_that_dies_is_an_error];
    program::test("mini-vmm", &everywhere, &on_kvm)
}
