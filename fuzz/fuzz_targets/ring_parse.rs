// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Arbitrary bytes as ring memory.
#![no_main]

use kvm_dirty_ring_fuzz::ring_parse::{Script, run};

libfuzzer_sys::fuzz_target!(|script: Script| run(&script));
