// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Storms of signals, and their targets.

use std::ops::Deref;
use std::sync::PoisonError;

use super::{Conductor, REAPER};
use crate::episodes::fault::Fault;
use crate::episodes::plan::StormKind;
use kvm_integration::host::storm::{Storm, thread_named};

impl Conductor<'_> {
    pub fn rain(&mut self, kind: StormKind, acts: u64) {
        // One at a time.
        self.storm = None;
        let everybody = kind == StormKind::Everybody;
        if kind == StormKind::Vcpus || everybody {
            self.counts.add(Fault::SignalsAtVcpus);
        }
        if (kind == StormKind::Reaper || everybody) && self.reaper.is_some() {
            self.counts.add(Fault::SignalsAtReaper);
        }
        if kind == StormKind::Others || everybody {
            self.counts.add(Fault::SignalsAtOthers);
        }
        if kind == StormKind::SetUser {
            self.counts.add(Fault::SignalsOfTheCLibrary);
        }
        self.storm = Some((kind, acts, self.storm(kind)));
    }

    /// Aims a storm that goes on at the threads that there are now.
    pub fn aim(&mut self) {
        if let Some((kind, left, _)) = self.storm.take() {
            self.storm = Some((kind, left, self.storm(kind)));
        }
    }

    fn storm(&self, kind: StormKind) -> Storm {
        let everybody = kind == StormKind::Everybody;
        let mut tids = Vec::new();
        if kind == StormKind::SetUser {
            return Storm::of_set_user();
        }
        if kind == StormKind::Vcpus || everybody {
            tids.extend(self.vcpus.iter().map(|running| running.vcpu.tid()));
        }
        if kind == StormKind::Reaper || everybody {
            tids.extend(thread_named(REAPER));
        }
        if kind == StormKind::Others || everybody {
            let others = self.shared.tids.lock();
            tids.extend(others.unwrap_or_else(PoisonError::into_inner).deref());
        }
        Storm::at(tids)
    }
}
