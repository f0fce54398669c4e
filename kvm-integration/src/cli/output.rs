// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How programs say what came of it, and how they end.

use std::fmt::Display;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use serde::Serialize;

use super::interrupt::{INTERRUPTED, watch_signals};

/// Nobody may take silence for success.
pub fn unwritten(place: impl Display) -> String {
    format!("the result could not be written to {place}: see where the output goes")
}

/// A file that will be written, all at once or not at all: what was there before stays until then.
#[derive(Debug)]
pub struct Output {
    path: PathBuf,
    part: PathBuf,
}

impl Output {
    /// Makes sure that there is such a place, now and not after minutes of work.
    pub fn to(path: &Path) -> Result<Self> {
        let mut part = path.as_os_str().to_owned();
        part.push(".part");
        let (path, part) = (path.to_path_buf(), PathBuf::from(part));
        File::create(&part).with_context(|| unwritten(path.display()))?;
        Ok(Self { path, part })
    }

    /// Writes it.
    pub fn write(self, text: &str) -> Result<()> {
        let written = fs::write(&self.part, text);
        let renamed = written.and_then(|()| fs::rename(&self.part, &self.path));
        renamed.with_context(|| unwritten(self.path.display()))
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        // It is there if nothing was written; if it stays, it is no harm.
        let _ = fs::remove_file(&self.part);
    }
}

/// Writes a line, or several, to stdout.
pub fn say(text: &str) -> Result<()> {
    writeln!(io::stdout(), "{text}").with_context(|| unwritten("stdout"))
}

/// Runs a program until it comes to its end, or SIGINT or SIGTERM sets what it is given. Its exit
/// status: what it says; 2 if it failed, 130 if it was interrupted, both of which are said.
pub fn run(program: impl FnOnce(&AtomicBool) -> Result<ExitCode>) -> ExitCode {
    let interrupted = match watch_signals() {
        Ok(interrupted) => interrupted,
        Err(error) => return fail(&error.into()),
    };
    match program(&interrupted) {
        Ok(status) => status,
        // Relaxed: nothing comes with it.
        Err(_) if interrupted.load(Ordering::Relaxed) => {
            eprintln!("interrupted");
            ExitCode::from(INTERRUPTED)
        }
        Err(error) => fail(&error),
    }
}

/// The exit status of a program that came to its end: whether anything it looked for was found.
pub fn status(found: u64) -> ExitCode {
    ExitCode::from(u8::from(found > 0))
}

/// Says what went wrong, and why. The exit status then.
pub fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {error:#}");
    ExitCode::from(2)
}

/// Where what is for people goes, and what is for programs.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Teller {
    /// Ends stdout with one JSON object; everything for people goes to stderr
    #[arg(long)]
    pub json: bool,
}

impl Teller {
    /// Prints for people.
    pub fn tell(self, text: &str) -> Result<()> {
        match self.json {
            true => writeln!(io::stderr(), "{text}").with_context(|| unwritten("stderr")),
            false => say(text),
        }
    }

    /// Prints for programs, if that was asked for.
    pub fn end(self, object: &impl Serialize) -> Result<()> {
        if self.json {
            say(&serde_json::to_string(object)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_a_failure_and_so_are_256() {
        for (found, wanted) in [(0, 0), (1, 1), (256, 1), (u64::MAX, 1)] {
            let [status, wanted] = [status(found), ExitCode::from(wanted)];
            assert_eq!(format!("{status:?}"), format!("{wanted:?}"));
        }
    }

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
        assert!(error.to_string().contains("to /nowhere/report"));
    }
}
