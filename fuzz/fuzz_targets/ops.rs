// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Arbitrary scripts against the truth of the simulated kernel.
#![no_main]

use kvm_dirty_ring_fuzz::ops::{Script, run};

libfuzzer_sys::fuzz_target!(|script: Script| run(&script));
