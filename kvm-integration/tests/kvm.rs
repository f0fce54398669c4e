// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The suite on real KVM: `cargo test -p kvm-integration --test kvm`.
//!
//! Where KVM can't be had every test is ignored and one line on stderr says why, or, with
//! `KVM_REQUIRED=1` in the environment, every test fails. Tests run one after the other unless
//! `--test-threads` says otherwise: most of them race a guest against the log, and would rather not
//! race each other for the CPUs too.
//!
//! `KVM_SUITE_SCALE` is a factor from 0.001 to 1000, 1 by default, for machines of another speed: storms and
//! other long loops have so many times as many rounds as by default, but as many as the test needs to prove
//! anything. With a factor below 1, many vCPUs and large slots are fewer and smaller, too, and waits and the time
//! that each test may take are divided by it: 0.1 suits a machine that is emulated. With a factor above 1 each test
//! may take as many times longer.
//!
//! A test that runs out of time fails, with what each thread of the process is at. No other is run after it.

use std::process::ExitCode;

#[cfg(tiny_guest)]
mod kvm {
    #[macro_use]
    mod harness;

    mod absent;
    mod bitmap;
    mod complete;
    mod full;
    mod guest;
    mod held_call;
    mod hotplug;
    mod kick;
    mod limit;
    mod machine;
    mod order;
    mod overrun;
    mod pml;
    mod process;
    mod raw;
    mod refusals;
    mod rings;
    mod scale;
    mod seccomp;
    mod signals;
    mod slots;
    mod stat;
    mod suspicion;
    mod tracking;
    mod working_set;

    pub fn run() -> std::process::ExitCode {
        harness::run(
            [
                scale::tests(),
                harness::tests(),
                guest::tests(),
                refusals::tests(),
                absent::tests(),
                full::tests(),
                kick::tests(),
                limit::tests(),
                rings::tests(),
                order::tests(),
                complete::tests(),
                hotplug::tests(),
                slots::tests(),
                tracking::tests(),
                working_set::tests(),
                signals::tests(),
                suspicion::tests(),
                overrun::tests(),
                pml::tests(),
                process::tests(),
                bitmap::tests(),
                seccomp::tests(),
            ]
            .concat(),
        )
    }
}

#[cfg(tiny_guest)]
fn main() -> ExitCode {
    kvm::run()
}

#[cfg(not(tiny_guest))]
fn main() -> ExitCode {
    let required = std::env::var_os("KVM_REQUIRED").is_some_and(|value| value == "1");
    eprintln!(
        "KVM suite SKIPPED: {}; set KVM_REQUIRED=1 to make this a failure",
        kvm_integration::host::NO_GUEST
    );
    ExitCode::from(u8::from(required))
}
