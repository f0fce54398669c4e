//! The suite on real KVM: `cargo test -p kvm-integration --test kvm`.
//!
//! Where KVM can't be had every test is ignored and one line on stderr says why, or, with
//! `KVM_REQUIRED=1` in the environment, every test fails. Tests run one after the other unless
//! `--test-threads` says otherwise: most of them race a guest against the log, and would rather not
//! race each other for the CPUs too.

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
    mod limit;
    mod machine;
    mod order;
    mod overrun;
    mod process;
    mod raw;
    mod refusals;
    mod rings;
    mod seccomp;
    mod signals;
    mod slots;
    mod suspicion;
    mod tracking;

    pub fn run() -> std::process::ExitCode {
        harness::run(
            [
                guest::tests(),
                refusals::tests(),
                absent::tests(),
                full::tests(),
                limit::tests(),
                rings::tests(),
                order::tests(),
                complete::tests(),
                hotplug::tests(),
                slots::tests(),
                tracking::tests(),
                signals::tests(),
                suspicion::tests(),
                overrun::tests(),
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
