// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The CPU time of one of this process's threads.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

/// What the thread of that kernel id has used so far, if it has not ended.
pub(crate) fn cpu_time(tid: libc::pid_t) -> Result<Duration> {
    // Nanoseconds on a CPU, nanoseconds in a queue, turns.
    let text = fs::read_to_string(format!("/proc/self/task/{tid}/schedstat"));
    let text = text.context("no CPU time of a thread can be had from /proc/self/task")?;
    let on_cpu = text.split_whitespace().next().unwrap_or_default();
    Ok(Duration::from_nanos(on_cpu.parse()?))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Instant;

    use super::*;
    use crate::host::storm::thread_named;

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
        let thread = thread_named("lab-worker").expect("a thread of that name");
        let time = || cpu_time(thread).expect("a live thread's time");
        let spend = |ms| {
            let before = time();
            ask.send(Duration::from_millis(ms)).unwrap();
            is_done.recv().unwrap();
            std::thread::sleep(Duration::from_millis(20));
            time() - before
        };
        assert!(spend(0) < Duration::from_millis(5));
        // On a busy machine it is at work for a small part of the time.
        let deadline = Instant::now() + Duration::from_secs(60);
        while spend(30) <= Duration::from_millis(5) {
            assert!(Instant::now() < deadline, "no work is counted");
        }
        drop(ask);
        worker.join().unwrap();
        assert!(cpu_time(thread).is_err() && thread_named("lab-worker").is_none());
    }
}
