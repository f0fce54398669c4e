// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `--watch`: what the log and the migration do, while they do it.
//!
//! A thread of its own looks and writes, so that a terminal which takes its time holds nothing up. It
//! only reads: no harvest and no reset waits for it. No mode of the terminal is changed, so there is
//! none to be restored, however the program ends.

mod look;
mod view;

use std::sync::{Arc, Mutex, PoisonError};

use kvm_dirty_ring::DirtyLog;
use kvm_integration::host::background::{Background, Ended};
use kvm_integration::migration::Observer;

use look::{Phase, Progress, Sampler};
use view::View;

/// Shows on stderr how things stand, until it is dropped.
pub struct Watch {
    progress: Arc<Mutex<Progress>>,
    _thread: Background,
}

impl Watch {
    /// Starts to look at `log`.
    pub fn start(log: &DirtyLog) -> std::io::Result<Self> {
        let progress = Arc::<Mutex<Progress>>::default();
        let shared = Arc::clone(&progress);
        let mut sampler = Sampler::new(log.clone());
        let watch = move |ended: &Ended| {
            let mut view = View::for_stderr();
            loop {
                let ended = ended.within(view.interval());
                let progress = shared.lock().unwrap_or_else(PoisonError::into_inner);
                let progress = Progress::clone(&progress);
                view.show(&sampler.look(progress));
                if ended {
                    break;
                }
            }
        };
        Ok(Self {
            progress,
            _thread: Background::spawn("watch", watch)?,
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
