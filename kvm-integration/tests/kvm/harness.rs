// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How the tests are run: skipped loudly, watched, one by one.

use std::env;
use std::error::Error;
use std::panic::resume_unwind;
use std::process::{Command, ExitCode};
use std::sync::OnceLock;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::Builder;
use std::time::Duration;

use kvm_integration::host::threads::states;
use libtest_mimic::{Arguments, Completion, Failed, Trial};

use super::scale;

/// What a test ends with: [`Completion::Completed`], a reason to have been skipped, or a failure.
pub type Outcome = Result<Completion, Failed>;

/// A test and its name.
pub type Test = (&'static str, fn() -> Outcome);

/// A test that takes longer hangs, in what has no bound of its own: the slowest takes some seconds, on
/// a slow machine with much else to do two minutes.
const LONGEST: Duration = Duration::from_secs(300);

/// Another limit, in milliseconds: for a process in which tests are to run out of time.
const LIMIT: &str = "KVM_SUITE_LIMIT_MS";

/// Lists tests by the name of their function, behind that of their module.
macro_rules! tests {
    ($($test:ident),* $(,)?) => {
        pub fn tests() -> Vec<$crate::kvm::harness::Test> {
            vec![$((concat!(module_path!(), "::", stringify!($test)), $test)),*]
        }
    };
}

tests![a_test_that_runs_out_of_time_says_so];

/// An error with all of its causes.
pub fn chain(error: &dyn Error) -> String {
    let causes = std::iter::successors(error.source(), |&cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// Skips the test that returns this, and says so where nobody can miss it.
pub fn skip(reason: &str) -> Outcome {
    eprintln!("\nKVM test SKIPPED: {reason}");
    Ok(Completion::ignored_with(reason))
}

/// Something to know about this machine that is neither a failure nor a reason to skip.
pub fn remark(text: &str) {
    eprintln!("\nKVM suite NOTES: {text}");
}

pub fn run(tests: Vec<Test>) -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(1);
    let factor = match scale::read() {
        Ok(factor) => factor,
        Err(refused) => {
            eprintln!("KVM suite FAILED: {refused}");
            return ExitCode::FAILURE;
        }
    };
    let required = env::var_os("KVM_REQUIRED").is_some_and(|value| value == "1");
    let missing = kvm_integration::kvm_available()
        .err()
        .map(|error| chain(&error));
    if let Some(why) = missing.as_ref().filter(|_| !arguments.list) {
        if required {
            eprintln!("KVM suite FAILED: {why}; KVM_REQUIRED=1 makes this a failure");
        } else {
            eprintln!("KVM suite SKIPPED: {why}; set KVM_REQUIRED=1 to make this a failure");
        }
    }
    if let (Some(factor), None, false) = (factor, &missing, arguments.list) {
        remark(&format!("KVM_SUITE_SCALE={factor} scales rounds and waits"));
    }
    let trial = |(name, test): Test| {
        // The crate's name, and the module that holds all the others.
        let name = name.trim_start_matches("kvm::");
        match missing.clone() {
            None => Trial::ignorable_test(name, move || watched(name, test)),
            Some(why) => Trial::test(name, move || Err(why.into())).with_ignored_flag(!required),
        }
    };
    libtest_mimic::run(&arguments, tests.into_iter().map(trial).collect()).exit_code()
}

/// The test that has run out of time, if one has: it still runs, in an unknown state.
static OUT_OF_TIME: OnceLock<&str> = OnceLock::new();

/// Runs a test for as long as it may take. Nothing can end a thread that hangs, so after one that does no other
/// test is run: it might disturb them, and the end of the process ends it.
fn watched(name: &'static str, test: fn() -> Outcome) -> Outcome {
    if let Some(hangs) = OUT_OF_TIME.get() {
        let reason = format!("not run: {hangs} has run out of time and may disturb it");
        return Ok(Completion::ignored_with(reason));
    }
    let limit = limit();
    let (done, over) = channel::<()>();
    let thread = Builder::new().name(name.into()).spawn(move || {
        // A panic drops it just as well.
        let _done = done;
        test()
    })?;
    if over.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
        OUT_OF_TIME.get_or_init(|| name);
        let late = format!(
            "{name} has run for {} s: it hangs, or needs",
            limit.as_secs_f64()
        );
        let late = format!(
            "{late} a smaller KVM_SUITE_SCALE; its threads:\n{}",
            states()
        );
        // At once: the summary comes after the other tests that run beside it.
        eprintln!("\nKVM suite OUT OF TIME: {late}");
        return Err(late.into());
    }
    thread.join().unwrap_or_else(|panic| resume_unwind(panic))
}

fn limit() -> Duration {
    let given = env::var(LIMIT).ok().and_then(|text| text.parse().ok());
    given.map_or_else(|| scale::limit(LONGEST), Duration::from_millis)
}

/// The suite in a process of its own, where no test has enough time: the first one fails as itself, no other is
/// run, and the process ends.
fn a_test_that_runs_out_of_time_says_so() -> Outcome {
    let mut suite = Command::new(env::current_exe()?);
    let suite = suite
        .arg("guest::")
        .env(LIMIT, "10")
        .env("KVM_REQUIRED", "1");
    let output = suite.output()?;
    let [printed, complaint] = [output.stdout, output.stderr].map(String::from_utf8);
    let (printed, complaint) = (printed?, complaint?);
    let both = format!("{printed}{complaint}");
    assert!(!output.status.success(), "{both}");
    assert!(
        printed.contains("FAILED. 0 passed; 1 failed; 5 ignored;"),
        "{both}"
    );
    let name = "guest::stores_what_its_progress_says";
    let late = format!("{name} has run for 0.01 s");
    assert!(
        printed.contains(&late) && complaint.contains(&late),
        "{both}"
    );
    let not_run = format!("not run: {name} has run out of time");
    assert_eq!(printed.matches(&not_run).count(), 5, "{both}");
    // At least its own thread and the one that waits for it.
    assert!(printed.matches(": state ").count() >= 2, "{both}");
    Ok(Completion::Completed)
}
