// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Compares what a sync returns with a set of pages.
#![no_main]

use kvm_dirty_ring_fuzz::drain::{Script, run};

libfuzzer_sys::fuzz_target!(|script: Script| run(&script));
