// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Every policy under arbitrary observations.
#![no_main]

use kvm_dirty_ring_fuzz::pacing::{Script, run};

libfuzzer_sys::fuzz_target!(|script: Script| run(&script));
