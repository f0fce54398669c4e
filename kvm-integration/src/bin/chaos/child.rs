// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The program in a child of itself.
//!
//! A shell watches the process that it has started: one that is stopped, as resets are to be, it takes for
//! suspended, and gives its terminal to others. Nobody watches the child but its parent.

use std::env;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::anyhow;
use kvm_integration::cli::output::fail;

/// Runs the program there, with the same arguments, and ends as it does.
pub fn run() -> ExitCode {
    match wait_for_it() {
        Ok(Some(code)) => ExitCode::from(code as u8),
        Ok(None) => fail(&anyhow!("killed by a signal")),
        Err(error) => fail(&error.into()),
    }
}

fn wait_for_it() -> io::Result<Option<i32>> {
    let mut command = Command::new(env::current_exe()?);
    command.args(env::args_os().skip(1));
    let end_with_the_parent = || {
        // SAFETY: prctl takes integers here, and may be called between fork and exec.
        match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: the closure makes a system call, and touches no memory but errno.
    unsafe { command.pre_exec(end_with_the_parent) };
    let mut child = command.spawn()?;
    // A terminal sends it to both; the child prints what it has found so far.
    // SAFETY: ignoring a signal runs no code of ours.
    unsafe { libc::signal(libc::SIGINT, libc::SIG_IGN) };
    Ok(child.wait()?.code())
}
