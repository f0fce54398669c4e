//! How programs say what came of it, and how they end.

use std::error::Error;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
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

/// A file that will be written, all at once or not at all: what was there before stays until then.
#[derive(Debug)]
pub struct Output {
    path: PathBuf,
    part: PathBuf,
    file: Option<File>,
}

impl Output {
    /// Makes sure that there is such a place, now and not after minutes of work.
    ///
    /// # Errors
    /// There is not.
    pub fn to(path: &Path) -> Result<Self, Unwritten> {
        let mut part = path.as_os_str().to_owned();
        part.push(".part");
        let part = PathBuf::from(part);
        let file = File::create(&part).map_err(Unwritten::to(path.display().to_string()))?;
        Ok(Self {
            path: path.into(),
            part,
            file: Some(file),
        })
    }

    /// Writes it.
    ///
    /// # Errors
    /// The kernel said no.
    pub fn write(mut self, text: &str) -> Result<(), Unwritten> {
        let file = self.file.take();
        let written = file.map_or(Ok(()), |mut file| file.write_all(text.as_bytes()));
        let renamed = written.and_then(|()| fs::rename(&self.part, &self.path));
        renamed.map_err(Unwritten::to(self.path.display().to_string()))
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if self.file.take().is_some() {
            // Nothing was written; if it stays, it is no harm.
            let _ = fs::remove_file(&self.part);
        }
    }
}

/// Writes a line, or several, to stdout.
///
/// # Errors
/// It could not be written.
pub fn say(text: &str) -> Result<(), Unwritten> {
    writeln!(io::stdout(), "{text}").map_err(Unwritten::to("stdout"))
}

/// The same to stderr: for people, where stdout is for programs.
///
/// # Errors
/// It could not be written.
pub fn say_aside(text: &str) -> Result<(), Unwritten> {
    writeln!(io::stderr(), "{text}").map_err(Unwritten::to("stderr"))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_there_stays_until_all_is_written() {
        let path = std::env::temp_dir().join(format!("output-{}", std::process::id()));
        Output::to(&path).unwrap().write("old").unwrap();
        drop(Output::to(&path).unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        let output = Output::to(&path).unwrap();
        let part = output.part.clone();
        assert!(part.exists());
        output.write("new").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        assert!(!part.exists());
        fs::remove_file(&path).unwrap();
        let error = Output::to(Path::new("/nowhere/report")).unwrap_err();
        assert!(chain(&error).contains("to /nowhere/report"));
    }
}
