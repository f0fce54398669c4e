// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A program of this package, run as a user runs it.

use std::io::{BufRead, Read};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use kvm_integration::kvm_available;
use libtest_mimic::{Arguments, Trial};

/// No run here takes longer than half a minute, or than two on a machine with much else to do.
const LONGEST: Duration = Duration::from_secs(120);

/// What a run left behind.
pub struct Ran {
    pub status: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

pub fn spawn(program: &str, args: &str) -> Child {
    Command::new(program)
        .args(args.split_whitespace())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program was built with this test")
}

/// Reads all of a pipe on a thread, so that the child never waits for us.
pub fn drain(pipe: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut text = String::new();
        let mut pipe = pipe;
        pipe.read_to_string(&mut text).expect("its output is UTF-8");
        text
    })
}

/// The next line of a pipe, and the pipe; an empty one at its end.
pub fn next_line<R: BufRead + Send + 'static>(mut pipe: R, what: &str) -> (String, R) {
    let (sender, read) = mpsc::channel();
    thread::spawn(move || {
        let mut line = String::new();
        pipe.read_line(&mut line).expect("its output is UTF-8");
        let _ = sender.send((line, pipe));
    });
    let line = read.recv_timeout(LONGEST);
    line.unwrap_or_else(|_| panic!("`{what}` has said nothing for {LONGEST:?}"))
}

pub fn wait(child: &mut Child, what: &str) -> Option<i32> {
    let deadline = Instant::now() + LONGEST;
    loop {
        if let Some(status) = child.try_wait().expect("a child can be waited for") {
            return status.code();
        }
        if Instant::now() > deadline {
            child.kill().expect("a child can be killed");
            panic!("`{what}` has run for {LONGEST:?}");
        }
        thread::sleep(Duration::from_millis(5));
    }
}

pub fn run(program: &str, args: &str) -> Ran {
    let mut child = spawn(program, args);
    let stdout = drain(child.stdout.take().unwrap());
    let stderr = drain(child.stderr.take().unwrap());
    let status = wait(&mut child, args);
    Ran {
        status,
        stdout: stdout.join().unwrap(),
        stderr: stderr.join().unwrap(),
    }
}

/// Sends the signal to a child that runs, and waits for its end. Its status.
pub fn end(child: &mut Child, signal: libc::c_int, what: &str) -> Option<i32> {
    // SAFETY: the child has not been waited for, so that its id is still its own.
    assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, signal) }, 0);
    wait(child, what)
}

pub type Test = (&'static str, fn());

/// Names of functions, and the functions.
macro_rules! tests {
    ($($test:ident),* $(,)?) => { [$((stringify!($test), $test as fn())),*] };
}
pub(crate) use tests;

/// Runs tests that need no KVM, and tests that do: those are ignored where it can't be had, and one
/// line on stderr says why; with `KVM_REQUIRED=1` in the environment they fail instead.
pub fn test(name: &str, everywhere: &[Test], on_kvm: &[Test]) -> ExitCode {
    let mut arguments = Arguments::from_args();
    // They time what they do, and would rather not race each other for the CPUs.
    arguments.test_threads.get_or_insert(1);
    let missing = missing();
    let required = std::env::var_os("KVM_REQUIRED").is_some_and(|value| value == "1");
    if let Some(why) = missing.as_ref().filter(|_| !arguments.list) {
        let fate = if required { "FAILED" } else { "SKIPPED" };
        eprintln!("{name} on KVM {fate}: {why}; KVM_REQUIRED=1 makes this a failure");
    }
    let trial = |&(name, test): &Test| {
        Trial::test(name, move || {
            test();
            Ok(())
        })
    };
    let kvm_trial = |test: &Test| match missing.clone() {
        None => trial(test),
        Some(why) => Trial::test(test.0, move || Err(why.into())).with_ignored_flag(!required),
    };
    let trials = everywhere.iter().map(trial);
    let trials = trials.chain(on_kvm.iter().map(kvm_trial)).collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Why the guest can't run on KVM here, if it can't.
fn missing() -> Option<String> {
    if !cfg!(tiny_guest) {
        return Some(kvm_integration::host::NO_GUEST.into());
    }
    kvm_available().err().map(|error| error.to_string())
}
