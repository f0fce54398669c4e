//! The CPU time of one of this process's threads.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

/// A thread of this process.
#[derive(Debug, Clone)]
pub(crate) struct CpuTime {
    schedstat: PathBuf,
}

impl CpuTime {
    /// The thread of that name, of which Linux keeps 15 bytes; `None` if there is none.
    pub(crate) fn named(name: &str) -> Option<Self> {
        let tasks = fs::read_dir("/proc/self/task").ok()?;
        let found = tasks.flatten().map(|task| task.path()).find(|task| {
            let comm = fs::read_to_string(task.join("comm"));
            comm.is_ok_and(|comm| comm.trim_end() == name)
        });
        let schedstat = found?.join("schedstat");
        Some(Self { schedstat })
    }

    /// The thread of that kernel id.
    pub(crate) fn of(tid: libc::pid_t) -> Self {
        let schedstat = format!("/proc/self/task/{tid}/schedstat").into();
        Self { schedstat }
    }

    /// What it has used so far. `None` if it has ended, or the kernel does not say.
    pub(crate) fn read(&self) -> Option<Duration> {
        // Nanoseconds on a CPU, nanoseconds in a queue, turns.
        let text = fs::read_to_string(&self.schedstat).ok()?;
        let on_cpu = text.split_whitespace().next()?;
        on_cpu.parse().ok().map(Duration::from_nanos)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Instant;

    use super::*;

    #[test]
    fn counts_work_and_not_sleep() {
        let (ask, asked) = mpsc::channel::<Duration>();
        let (done, is_done) = mpsc::channel();
        let worker = std::thread::Builder::new().name("lab-worker".into());
        let worker = worker.spawn(move || {
            done.send(()).unwrap();
            for work in asked {
                let start = Instant::now();
                while start.elapsed() < work {}
                done.send(()).unwrap();
                // So that the kernel writes its time down.
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let worker = worker.unwrap();
        // Its first words say that it has its name.
        is_done.recv().unwrap();
        let time = CpuTime::named("lab-worker").expect("a thread of that name");
        let spend = |ms| {
            let before = time.read().expect("a live thread's time");
            ask.send(Duration::from_millis(ms)).unwrap();
            is_done.recv().unwrap();
            std::thread::sleep(Duration::from_millis(20));
            time.read().expect("a live thread's time") - before
        };
        assert!(spend(0) < Duration::from_millis(5));
        // On a busy machine it is at work for a small part of the time.
        let deadline = Instant::now() + Duration::from_secs(60);
        while spend(30) <= Duration::from_millis(5) {
            assert!(Instant::now() < deadline, "no work is counted");
        }
        drop(ask);
        worker.join().unwrap();
        assert!(CpuTime::named("lab-worker").is_none());
    }
}
