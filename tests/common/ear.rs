// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A subscriber for all events of a process, for tests.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Never reached on a machine that gets on.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// An event as it was emitted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    pub level: Level,
    pub name: &'static str,
    pub fields: BTreeMap<&'static str, String>,
}

impl Told {
    pub fn count(&self, field: &str) -> u64 {
        self.fields[field].parse().unwrap()
    }
}

impl Visit for Told {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.fields.insert(field.name(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.fields.insert(field.name(), value.into());
    }
}

type Hook = Arc<dyn Fn(&Told) + Send + Sync>;

/// Receives all events of the process, from any thread.
#[derive(Default)]
struct Ear {
    told: Mutex<Vec<Told>>,
    hook: Mutex<Option<Hook>>,
}

struct Capture(Arc<Ear>);

impl Subscriber for Capture {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "kvm_dirty_ring"
    }

    fn event(&self, event: &Event<'_>) {
        let metadata = event.metadata();
        let mut told = Told {
            level: *metadata.level(),
            name: metadata.name(),
            fields: BTreeMap::new(),
        };
        event.record(&mut told);
        // Subscribers that show no names of events show the message.
        assert_eq!(told.fields.remove("message").as_deref(), Some(told.name));
        lock(&self.0.told).push(told.clone());
        let hook = lock(&self.0.hook).clone();
        if let Some(hook) = hook {
            hook(&told);
        }
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One test at a time has the process's ear.
pub struct Listening {
    ear: Arc<Ear>,
    _alone: MutexGuard<'static, ()>,
}

impl Listening {
    pub fn new() -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        static EAR: OnceLock<Arc<Ear>> = OnceLock::new();
        let alone = lock(&ALONE);
        let ear = EAR.get_or_init(|| {
            let ear = Arc::<Ear>::default();
            tracing::subscriber::set_global_default(Capture(Arc::clone(&ear))).unwrap();
            ear
        });
        lock(&ear.told).clear();
        Self {
            ear: Arc::clone(ear),
            _alone: alone,
        }
    }

    pub fn hook(&self, hook: impl Fn(&Told) + Send + Sync + 'static) {
        *lock(&self.ear.hook) = Some(Arc::new(hook));
    }

    /// The events since the last call.
    pub fn take(&self) -> Vec<Told> {
        core::mem::take(&mut lock(&self.ear.told))
    }

    /// Waits for an event that `wanted` wants.
    pub fn wait_for(&self, what: &str, wanted: impl Fn(&Told) -> bool) {
        let start = Instant::now();
        while !lock(&self.ear.told).iter().any(&wanted) {
            assert!(
                start.elapsed() < PATIENCE,
                "no event within the time allowed: {what}"
            );
            thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn wait_for_state(&self, state: &str) {
        self.wait_for(state, |told| {
            told.name == "kvm_dirty_ring_reaper" && told.fields["state"] == state
        });
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        *lock(&self.ear.hook) = None;
    }
}

pub fn names(told: &[Told]) -> Vec<&str> {
    told.iter().map(|told| told.name).collect()
}
