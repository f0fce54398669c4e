// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A thread beside others, which ends when it is dropped.

use std::io;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

/// A running thread.
#[derive(Debug)]
pub struct Background {
    /// Closed to end the thread.
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// How the thread learns that it is to stop.
#[derive(Debug)]
pub struct Ended(Receiver<()>);

impl Background {
    /// Runs `body`, which is to return soon after it is ended.
    pub fn spawn(name: &str, body: impl FnOnce(&Ended) + Send + 'static) -> io::Result<Self> {
        let (end, ended) = mpsc::channel();
        let thread = Builder::new().name(name.into());
        Ok(Self {
            end: Some(end),
            thread: Some(thread.spawn(move || body(&Ended(ended)))?),
        })
    }
}

impl Ended {
    /// Whether it is ended within that time; waits for that.
    pub fn within(&self, time: Duration) -> bool {
        self.0.recv_timeout(time) != Err(RecvTimeoutError::Timeout)
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.end = None;
        if let Some(thread) = self.thread.take() {
            // If it has panicked, it has said so.
            let _ = thread.join();
        }
    }
}
