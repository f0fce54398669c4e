//! What the benchmarks share: rings that another core fills, patterns of pages, medians.

pub mod pattern;
pub mod ring;

/// The median; the values are put in order.
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Keeps the calling thread on CPU `cpu`, if there is one of that number.
pub fn pin(cpu: usize) {
    // SAFETY: cpu_set_t is an array of integers, for which zeroes are a value.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: CPU_SET only writes the set; `cpu` is far below its size.
    unsafe { libc::CPU_SET(cpu % libc::CPU_SETSIZE as usize, &mut set) };
    // SAFETY: 0 is the calling thread; the set is valid for the call. A failure leaves the thread
    // unpinned, which costs precision alone.
    unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) };
}
