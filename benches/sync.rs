// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A sync of an idle guest: what it costs to find nothing.

use criterion::{BenchmarkId, Criterion};
use kvm_dirty_ring::DirtyPages;
use kvm_dirty_ring_benches::Tracked;

fn sync(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("sync");
    for gib in [1u64, 64, 1024] {
        let tracked = Tracked::new(4096, 1, gib << 18);
        let mut dirty = DirtyPages::new();
        let id = BenchmarkId::new("idle, GiB", gib);
        group.bench_function(id, |bencher| {
            bencher.iter(|| {
                tracked.log.sync(&mut dirty).expect("a sync");
                assert_eq!(dirty.runs().next(), None);
            });
        });
    }
    group.finish();
}

fn main() {
    let criterion = Criterion::default();
    let mut criterion = criterion.configure_from_args();
    sync(&mut criterion);
    criterion.final_summary();
}
