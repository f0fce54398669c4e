//! `--watch`: what the log and the migration do, while they do it.
//!
//! A thread of its own looks and writes, so that a terminal which takes its time holds nothing up. It
//! only reads: no harvest and no reset waits for it. No mode of the terminal is changed, so there is
//! none to be restored, however the program ends.

mod look;
mod view;

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use kvm_dirty_ring::DirtyLog;
use kvm_integration::migration::Observer;

use look::{Phase, Progress, Sampler};
use view::View;

/// Shows on stderr how things stand, until it is dropped.
pub struct Watch {
    progress: Arc<Mutex<Progress>>,
    /// Closed to end the thread.
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Starts to look at `log`.
    ///
    /// # Errors
    /// The thread can't be started.
    pub fn start(log: &DirtyLog) -> std::io::Result<Self> {
        let progress = Arc::<Mutex<Progress>>::default();
        let (end, ended) = channel::<()>();
        let shared = Arc::clone(&progress);
        let mut sampler = Sampler::new(log.clone());
        let watch = move || {
            let mut view = View::for_stderr();
            loop {
                let waited = ended.recv_timeout(view.interval());
                let progress = shared
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .clone();
                view.show(&sampler.look(progress));
                if waited != Err(RecvTimeoutError::Timeout) {
                    break;
                }
            }
        };
        let thread = thread::Builder::new().name("watch".into()).spawn(watch)?;
        Ok(Self {
            progress,
            end: Some(end),
            thread: Some(thread),
        })
    }

    fn note(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.progress.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

impl Observer for Watch {
    fn begin(&mut self, round: usize, pages: u64, running: bool) {
        let phase = match running {
            true => Phase::Running,
            false => Phase::Stopped,
        };
        self.note(|progress| {
            *progress = Progress {
                round,
                pages,
                sent: 0,
                phase,
            }
        });
    }

    fn sent(&mut self, pages: u64) {
        self.note(|progress| progress.sent += pages);
    }

    fn stop(&mut self) {
        self.note(|progress| progress.phase = Phase::Stopping);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.end = None;
        if let Some(thread) = self.thread.take() {
            // If it has panicked, it has said so: the migration is none the worse for it.
            let _ = thread.join();
        }
    }
}
