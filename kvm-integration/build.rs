// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Sets `tiny_guest` where there is a guest for the processor at hand, so that the sources don't repeat for which ones;
//! and the size of its pages, `TINY_GUEST_PAGE_KIB`, where the machine that will run it has other ones than 4 KiB.

fn main() {
    println!("cargo::rustc-check-cfg=cfg(tiny_guest)");
    let processor = std::env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default();
    if ["x86_64", "aarch64"].contains(&processor.as_str()) {
        println!("cargo::rustc-cfg=tiny_guest");
    }
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=TINY_GUEST_PAGE_KIB");
    let kib = std::env::var("TINY_GUEST_PAGE_KIB").unwrap_or_else(|_| "4".into());
    assert!(
        ["4", "16", "64"].contains(&kib.as_str()),
        "TINY_GUEST_PAGE_KIB is `{kib}`: Linux has pages of 4, 16 or 64 KiB"
    );
    println!("cargo::rustc-env=TINY_GUEST_PAGE_KIB={kib}");
}
