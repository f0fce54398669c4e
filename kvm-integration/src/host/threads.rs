// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the threads of this process are at: what there is to know of one that hangs.

use std::fmt::Write;
use std::fs;

/// A line for each thread: its id, name and state, where in the kernel it waits, and the system call that it
/// is in, by its number and first arguments. What the kernel does not show is a `?`.
pub fn states() -> String {
    let mut lines = String::new();
    let threads = fs::read_dir("/proc/self/task").into_iter().flatten();
    for thread in threads.flatten() {
        let read = |file| fs::read_to_string(thread.path().join(file)).unwrap_or_default();
        let id = thread.file_name();
        let (stat, wchan, call) = (read("stat"), read("wchan"), read("syscall"));
        let call: Vec<&str> = call.split_whitespace().take(4).collect();
        // A String takes whatever is written.
        let _ = writeln!(
            lines,
            "  thread {} {}: state {}, waits in {}, system call {}",
            id.to_string_lossy(),
            known(read("comm").trim_end()),
            known(state(&stat)),
            // 0: it waits nowhere, or we may not know.
            known(wchan.trim_matches('0')),
            known(&call.join(" ")),
        );
    }
    lines
}

fn known(text: &str) -> &str {
    if text.is_empty() { "?" } else { text }
}

/// The third field of `stat`, behind a name that may hold blanks and parentheses.
fn state(stat: &str) -> &str {
    let behind_name = stat.rsplit_once(") ").map(|(_, rest)| rest);
    behind_name
        .and_then(|rest| rest.split(' ').next())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::thread::{self, Builder};
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_thread_that_waits_is_told_from_one_that_runs() {
        let waiting = Builder::new()
            .name("waits (a b)".into())
            .spawn(thread::park);
        let waiting = waiting.unwrap();
        let line_of = |name: &str| {
            let states = states();
            let line = states.lines().find(|line| line.contains(name));
            line.unwrap_or_default().to_string()
        };
        // It may take it a while to come to its wait.
        let deadline = Instant::now() + Duration::from_secs(60);
        let futex = format!("system call {} 0x", libc::SYS_futex);
        loop {
            let line = line_of(" waits (a b): ");
            if line.contains(": state S, ") && line.contains(&futex) {
                break;
            }
            assert!(Instant::now() < deadline, "{}", states());
            thread::yield_now();
        }
        let me = format!("  thread {} ", crate::host::storm::this_thread());
        let line = line_of(&me);
        assert!(
            line.contains(": state R, ") && !line.contains(&futex),
            "{line}"
        );
        waiting.thread().unpark();
        waiting.join().unwrap();
    }

    #[test]
    fn names_do_not_hide_the_state() {
        assert_eq!(state("42 (a) R (b) D 1 2 3"), "D");
        assert_eq!(state(""), "");
    }
}
