// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Prefetching memory.

/// Prefetches the cache line at `address`, for a write.
///
/// The address may be anything: a prefetch reads nothing that a program can see, and never faults.
#[inline(always)]
pub(crate) fn for_write<T>(address: *const T) {
    // Not the intrinsic: without further target features it compiles to a prefetch for reading,
    // and the line would be fetched twice, shared first and then exclusive.
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: a hint without architectural effect; processors that lack it treat it as a NOP.
    unsafe {
        core::arch::asm!(
            "prefetchw [{}]", in(reg) address,
            options(nostack, preserves_flags, readonly)
        );
    }
    #[cfg(all(target_arch = "aarch64", not(miri)))]
    // SAFETY: a hint without architectural effect.
    unsafe {
        core::arch::asm!(
            "prfm pstl1keep, [{}]", in(reg) address,
            options(nostack, preserves_flags, readonly)
        );
    }
    #[cfg(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), not(miri))))]
    let _ = address;
}
