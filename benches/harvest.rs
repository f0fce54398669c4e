//! x
use kvm_dirty_ring::{DirtyLog, SlotId};
use kvm_dirty_ring_benches::pattern::Pattern;
use kvm_dirty_ring_benches::ring::{NoKernel, Ring};
fn main() {
    let entries = 65536;
    let log = DirtyLog::with_kernel(Box::new(NoKernel), entries);
    log.add_slot(SlotId::new(0, 0), 1 << 18).unwrap();
    let ring = Ring::new(entries);
    let mut vcpu = log.attach_ring(ring.memory()).unwrap();
    let pages = Pattern::Random1.pages(1, 65472);
    let n: usize = std::env::var("N").map_or(1, |n| n.parse().unwrap());
    let mut index = 0;
    for _ in 0..n {
        index = ring.push(index, &pages);
        let t = std::time::Instant::now();
        assert_eq!(vcpu.harvest_and_stop(), 65472);
        if n > 1 {
            println!("{:.2}", t.elapsed().as_nanos() as f64 / 65472.0);
        }
    }
}
