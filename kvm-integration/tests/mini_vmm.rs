//! The program `mini-vmm`, run as a user runs it.
//!
//! Tests on KVM are ignored where it can't be had, and one line on stderr says why; with
//! `KVM_REQUIRED=1` in the environment they fail instead.

mod program;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, ExitCode};
use std::thread::sleep;
use std::time::Duration;

use kvm_integration::kvm_available;

use program::{Ran, drain, end, run, spawn, tests, wait};

const PROGRAM: &str = env!("CARGO_BIN_EXE_mini-vmm");
const SIMULATED: &str = "THE KERNEL AND THE GUEST ARE SIMULATED";
/// What the guest's memory begins with, and how much there is of it: 2 MiB, and 64.
const PAGES: u64 = (66 << 20) / 4096;

/// A socket of its own for each test.
struct Socket(PathBuf);

impl Socket {
    fn new(name: &str) -> Self {
        let name = format!("mini-vmm-test-{name}-{}", std::process::id());
        Self(std::env::temp_dir().join(name))
    }

    fn path(&self) -> &str {
        self.0.to_str().expect("a path of letters")
    }

    /// Where the program listens by and by.
    fn connect(&self) -> UnixStream {
        for _ in 0..2000 {
            if let Ok(stream) = UnixStream::connect(&self.0) {
                return stream;
            }
            sleep(Duration::from_millis(5));
        }
        panic!("nobody listens at {}", self.path());
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A run in which all went well: every page was sent at first, the vCPUs have counted on.
fn assert_migrated(ran: &Ran) {
    let Ran { stdout, stderr, .. } = ran;
    assert_eq!(ran.status, Some(0), "{stderr}{stdout}");
    assert!(stdout.contains("all memory arrived"), "{stdout}");
    let pages = stdout.lines().find_map(|line| {
        let pages = line.strip_prefix("source: round 0, ")?;
        pages.strip_suffix(" pages")?.parse().ok()
    });
    if cfg!(target_arch = "x86_64") {
        assert_eq!(pages, Some(PAGES), "{stdout}");
    }
    let vcpus = stdout.lines().filter_map(|line| {
        let (_, counts) = line.split_once(" counted to ")?;
        let (here, there) = counts.split_once(" here, and on to ")?;
        let there = there.strip_suffix(" there")?;
        Some((here.parse::<u32>().ok()?, there.parse::<u32>().ok()?))
    });
    let vcpus: Vec<_> = vcpus.collect();
    assert_eq!(vcpus.len(), 2, "{stdout}");
    assert!(
        vcpus
            .iter()
            .all(|(here, there)| *here >= 50 && *there >= here + 50)
    );
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
    let on_kvm = cfg!(target_arch = "x86_64") && kvm_available().is_ok();
    assert_eq!(ran.stderr.contains(SIMULATED), !on_kvm, "{}", ran.stderr);
}

fn the_two_may_be_started_one_by_one() {
    let socket = Socket::new("two");
    let source = spawn(PROGRAM, &format!("source {} --sim", socket.path()));
    let destination = run(PROGRAM, &format!("destination {} --sim", socket.path()));
    assert_eq!(destination.status, Some(0), "{}", destination.stderr);
    assert!(!socket.0.exists(), "the socket is left behind");
    assert_migrated(&finish(source));
}

/// What a child leaves behind.
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

fn assert_failed(ran: &Ran, words: &str) {
    assert_eq!(ran.status, Some(1), "{}{}", ran.stderr, ran.stdout);
    assert!(ran.stderr.contains("FAILED"), "{}", ran.stderr);
    assert!(ran.stderr.contains(words), "no `{words}` in {}", ran.stderr);
}

fn nobody_at_the_other_end_is_an_error() {
    let socket = Socket::new("nobody");
    for role in ["source", "destination"] {
        let ran = run(
            PROGRAM,
            &format!("{role} {} --sim --patience 1", socket.path()),
        );
        assert_failed(&ran, "nobody at the other end for 1s");
    }
}

fn a_destination_that_leaves_or_is_silent_is_an_error() {
    for (name, leaves) in [("leaves", true), ("silent", false)] {
        let socket = Socket::new(name);
        let listener = UnixListener::bind(&socket.0).unwrap();
        let source = format!("source {} --sim --patience 1", socket.path());
        let source = spawn(PROGRAM, &source);
        let (peer, _) = listener.accept().unwrap();
        let peer = (!leaves).then_some(peer);
        assert_failed(&finish(source), "mini-vmm FAILED, source");
        drop(peer);
    }
}

/// A destination, and what it says of a source that sends `bytes`, and no more.
fn destination_of(name: &str, bytes: &[u8], stays: bool) -> Ran {
    let socket = Socket::new(name);
    let destination = format!("destination {} --sim --patience 1", socket.path());
    let destination = spawn(PROGRAM, &destination);
    let mut peer = socket.connect();
    peer.write_all(bytes).unwrap();
    let peer = stays.then_some(peer);
    let ran = finish(destination);
    drop(peer);
    ran
}

fn a_source_that_leaves_or_is_silent_is_an_error() {
    let header = [0u64, 4096].map(u64::to_le_bytes);
    for bytes in [&[][..], &[7], header.as_flattened()] {
        for stays in [false, true] {
            let ran = destination_of("cut", bytes, stays);
            assert_failed(&ran, "mini-vmm FAILED, destination");
        }
    }
}

fn nonsense_of_a_source_is_an_error() {
    let pages = |address: u64, bytes: u64| {
        let header = [address.to_le_bytes(), bytes.to_le_bytes()];
        header.as_flattened().to_vec()
    };
    let message = |length: u32, text: &str| {
        [&pages(0, 0)[..], &length.to_le_bytes(), text.as_bytes()].concat()
    };
    // Past the end, between the two, around the end of all addresses.
    for (address, bytes) in [
        (2 << 20, 1),
        ((2 << 20) - 1, 2),
        (u64::MAX, 4096),
        (0, u64::MAX),
    ] {
        let ran = destination_of("pages", &pages(address, bytes), true);
        assert_failed(&ran, "mini-vmm FAILED, destination");
    }
    let long = destination_of("long", &message(u32::MAX, ""), true);
    assert_failed(&long, "a message of 4294967295 bytes: at most 1048576");
    let text = r#"{"guest":{"vcpus":[],"device_writes":0},"checksum":1}"#;
    let other = destination_of("differs", &message(text.len() as u32, text), true);
    assert_failed(&other, "the memory that arrived differs");
    let garbage = destination_of("garbage", &message(4, "{}{}"), true);
    assert_failed(&garbage, "mini-vmm FAILED, destination");
}

/// The source is killed as soon as it has told of its first round.
fn a_source_that_dies_is_an_error() {
    let socket = Socket::new("dies");
    let destination = spawn(PROGRAM, &format!("destination {}", socket.path()));
    let mut source = spawn(PROGRAM, &format!("source {}", socket.path()));
    let mut line = String::new();
    let mut stdout = BufReader::new(source.stdout.take().unwrap());
    stdout.read_line(&mut line).unwrap();
    assert!(line.starts_with("source: round 0"), "{line}");
    end(&mut source, libc::SIGKILL, "the source");
    assert_failed(&finish(destination), "mini-vmm FAILED, destination");
}

fn main() -> ExitCode {
    let everywhere = tests![
        a_simulated_guest_goes_on_in_another_process,
        it_runs_anywhere,
        the_two_may_be_started_one_by_one,
        nobody_at_the_other_end_is_an_error,
        a_destination_that_leaves_or_is_silent_is_an_error,
        a_source_that_leaves_or_is_silent_is_an_error,
        nonsense_of_a_source_is_an_error,
    ];
    let on_kvm = tests![a_source_that_dies_is_an_error];
    program::test("mini-vmm", &everywhere, &on_kvm)
}
