// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Ends the program should it hang, and says what each thread is at: nothing else can end a thread that does.

use std::io;
use std::process;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::Duration;

use crate::host::threads;

/// Watches until it is dropped.
#[derive(Debug)]
pub struct Watchdog {
    allowances: Sender<(Duration, String)>,
}

impl Watchdog {
    /// Starts to watch; nothing is bounded yet.
    pub fn start() -> io::Result<Self> {
        let (allowances, allowed) = mpsc::channel::<(Duration, String)>();
        let watch = move || {
            let Ok(mut current) = allowed.recv() else {
                return;
            };
            loop {
                match allowed.recv_timeout(current.0) {
                    Ok(next) => current = next,
                    Err(RecvTimeoutError::Disconnected) => return,
                    Err(RecvTimeoutError::Timeout) => {
                        let (time, what) = current;
                        eprintln!(
                            "error: {what} has taken {time:?} and hangs\n{}",
                            threads::states()
                        );
                        process::exit(2);
                    }
                }
            }
        };
        thread::Builder::new()
            .name("watchdog".into())
            .spawn(watch)?;
        Ok(Self { allowances })
    }

    /// From now on, `what` may take `time`, and nothing else is bounded.
    pub fn allow(&self, time: Duration, what: &str) {
        // The thread ends the process, or outlives us.
        let _ = self.allowances.send((time, what.into()));
    }
}
