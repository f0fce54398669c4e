// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a vCPU is made to leave `KVM_RUN`: as in the example `vcpu_thread`, by the same file.

#[path = "../../../examples/kick/signal.rs"]
mod signal;

use std::sync::Arc;

pub(crate) use signal::{ImmediateExit, kick_signal, let_through};

use super::parking::Barrier;

impl Barrier for Arc<ImmediateExit> {
    fn set(&self, closed: bool) {
        ImmediateExit::set(self, closed);
    }
}
