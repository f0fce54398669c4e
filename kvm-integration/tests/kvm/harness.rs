//! How the tests are run: skipped loudly, watched, one by one.

use std::error::Error;
use std::process::{ExitCode, abort};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use libtest_mimic::{Arguments, Completion, Failed, Trial};

/// What a test ends with: [`Completion::Completed`], a reason to have been skipped, or a failure.
pub type Outcome = Result<Completion, Failed>;

/// A test and its name.
pub type Test = (&'static str, fn() -> Outcome);

/// A test that takes longer hangs, in what has no bound of its own: the slowest takes some seconds, on
/// a slow machine with much else to do two minutes.
const LONGEST: Duration = Duration::from_secs(300);

/// Lists tests by the name of their function, behind that of their module.
macro_rules! tests {
    ($($test:ident),* $(,)?) => {
        pub fn tests() -> Vec<$crate::kvm::harness::Test> {
            vec![$((concat!(module_path!(), "::", stringify!($test)), $test)),*]
        }
    };
}

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
    let required = std::env::var_os("KVM_REQUIRED").is_some_and(|value| value == "1");
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

/// Runs a test, and ends the process should it hang: nothing else can end a thread.
fn watched(name: &'static str, test: fn() -> Outcome) -> Outcome {
    let (done, over) = channel::<()>();
    let watchdog = thread::spawn(move || {
        if over.recv_timeout(LONGEST) == Err(RecvTimeoutError::Timeout) {
            eprintln!("\nKVM suite ABORTED: {name} has run for {LONGEST:?}");
            abort();
        }
    });
    let outcome = test();
    // A panic drops it just as well.
    drop(done);
    let _ = watchdog.join();
    outcome
}
