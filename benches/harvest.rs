// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Harvesting a ring that another core has filled, an entry.

use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use kvm_dirty_ring_benches::Tracked;
use kvm_dirty_ring_benches::pattern::Pattern;
use kvm_dirty_ring_benches::pin;
use kvm_dirty_ring_benches::ring::Filler;

fn harvest(criterion: &mut Criterion) {
    pin(0);
    let filler = Filler::on(1);
    let mut group = criterion.benchmark_group("harvest");
    for entries in [256u32, 4096, 65536] {
        let fill = entries as usize - 64;
        group.throughput(Throughput::Elements(fill as u64));
        for pattern in Pattern::ALL {
            let (slots, slot_pages) = pattern.slots();
            let mut tracked = Tracked::new(entries, slots, slot_pages);
            let id = BenchmarkId::new(pattern.name(), entries);
            group.bench_function(id, |bencher| {
                bencher.iter_custom(|iterations| {
                    let mut total = Duration::ZERO;
                    for seed in 0..iterations {
                        let pages: Arc<[_]> = pattern.pages(seed, fill).into();
                        tracked.index = filler.fill(&tracked.ring, tracked.index, &pages);
                        let start = Instant::now();
                        let taken = tracked.vcpu.harvest_and_stop();
                        total += start.elapsed();
                        assert_eq!(taken as usize, fill);
                    }
                    total
                });
            });
        }
    }
    group.finish();
}

/// What a pass costs beside entries, with all that it uses in the nearest cache: a pass over an empty ring, after another.
fn empty_pass(criterion: &mut Criterion) {
    pin(0);
    let mut tracked = Tracked::new(256, 1, 1 << 18);
    criterion.bench_function("empty pass", |bencher| {
        bencher.iter(|| tracked.vcpu.harvest_and_stop());
    });
}

fn main() {
    let criterion = Criterion::default()
        .sample_size(50)
        .measurement_time(Duration::from_secs(1));
    let mut criterion = criterion.configure_from_args();
    harvest(&mut criterion);
    empty_pass(&mut criterion);
    criterion.final_summary();
}
