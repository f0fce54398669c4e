//! How programs say what came of it, and how they end.

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::interrupt::INTERRUPTED;

/// Nobody may take silence for success.
#[derive(Debug, thiserror::Error)]
#[error("the result could not be written to {place}: see where the output goes")]
pub struct Unwritten {
    /// Where it was to go.
    pub place: String,
    /// What the kernel said.
    pub source: io::Error,
}

impl Unwritten {
    /// For a result that was to go to `place`.
    pub fn to(place: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let place = place.into();
        move |source| Self { place, source }
    }
}

/// Writes a line, or several, to stdout.
///
/// # Errors
/// It could not be written.
pub fn say(text: &str) -> Result<(), Unwritten> {
    writeln!(io::stdout(), "{text}").map_err(Unwritten::to("stdout"))
}

/// The exit status of a program that came to this end, which is said if it is not a good one: 2 if
/// it failed, 130 if it was interrupted.
pub fn exit_status(result: Result<ExitCode, Box<dyn Error>>, interrupted: &AtomicBool) -> ExitCode {
    match result {
        Ok(status) => status,
        // Relaxed: nothing comes with it.
        Err(_) if interrupted.load(Ordering::Relaxed) => {
            eprintln!("interrupted");
            ExitCode::from(INTERRUPTED)
        }
        Err(error) => fail(&*error),
    }
}

/// Says what went wrong. The exit status then.
pub fn fail(error: &dyn Error) -> ExitCode {
    eprintln!("error: {}", chain(error));
    ExitCode::from(2)
}

/// An error and its causes, in one line.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}
