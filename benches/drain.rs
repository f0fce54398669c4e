// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Draining a guest of 64 GiB into runs, a sync.

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion};
use kvm_dirty_ring::DirtyPages;
use kvm_dirty_ring_benches::Tracked;
use kvm_dirty_ring_benches::pattern::Dirtied;

fn drain(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("drain");
    for dirtied in Dirtied::ALL {
        let pages = dirtied.pages();
        let mut tracked = Tracked::new(65536, 1, Dirtied::OF);
        let mut dirty = DirtyPages::new();
        let id = BenchmarkId::from_parameter(dirtied.name());
        group.bench_function(id, |bencher| {
            bencher.iter_custom(|iterations| {
                let mut total = Duration::ZERO;
                for _ in 0..iterations {
                    tracked.dirty(&pages);
                    let start = Instant::now();
                    tracked.log.sync(&mut dirty).expect("a sync");
                    let found: u64 = dirty.runs().map(|run| run.pages).sum();
                    total += start.elapsed();
                    assert!(found > 0);
                }
                total
            });
        });
    }
    group.finish();
}

fn main() {
    let criterion = Criterion::default()
        .sample_size(20)
        .measurement_time(Duration::from_secs(1));
    let mut criterion = criterion.configure_from_args();
    drain(&mut criterion);
    criterion.final_summary();
}
