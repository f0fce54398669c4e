// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The running vCPUs of one guest on KVM.

use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cli::interrupt::go_on;
use crate::guest::thread::{VcpuThread, pause_all};

/// How often it is looked whether all is well.
const WATCH: Duration = Duration::from_millis(20);

#[derive(Debug, Default)]
pub(crate) struct Vcpus(pub(crate) Vec<VcpuThread>);

impl Vcpus {
    /// Page stores of all of them so far.
    pub(crate) fn stores(&self) -> u64 {
        self.0.iter().map(VcpuThread::progress).sum()
    }

    /// Looks whether every one is still up; if not, says what has ended it.
    pub(crate) fn check(&mut self) -> Result<()> {
        let Some(ended) = self.0.iter().position(VcpuThread::ended) else {
            return Ok(());
        };
        let ended = self.0.swap_remove(ended).join();
        ended.context("a vCPU failed")?;
        bail!("a vCPU's thread has ended for no reason it could give")
    }

    /// Takes all of them out of the guest, and waits until they are.
    pub(crate) fn pause(&mut self) -> Result<()> {
        // One that has ended is as quiet as those that wait.
        pause_all(&self.0);
        self.check()
    }

    pub(crate) fn resume(&self) {
        self.0.iter().for_each(VcpuThread::resume);
    }

    /// Waits, unless one ends or the caller wants no more.
    pub(crate) fn watch(&mut self, time: Duration, interrupted: &AtomicBool) -> Result<()> {
        self.watch_until(Instant::now() + time, interrupted, |_| false)
    }

    /// The same until `done`, or for as long at the most.
    pub(crate) fn watch_until(
        &mut self,
        end: Instant,
        interrupted: &AtomicBool,
        done: impl Fn(&[VcpuThread]) -> bool,
    ) -> Result<()> {
        loop {
            go_on(interrupted)?;
            self.check()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || done(&self.0) {
                return Ok(());
            }
            thread::sleep(left.min(WATCH));
        }
    }
}
