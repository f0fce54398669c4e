// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Storms of signals.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use super::background::{Background, Ended};

/// About what a reset of a thousand entries takes: the next one will be hit.
const LULL: Duration = Duration::from_micros(10);

/// How long it may take a shell, on a busy machine, to send its first signal.
const FIRST_STOP: Duration = Duration::from_secs(60);

/// Signals rain on some threads until this is dropped.
#[derive(Debug)]
pub struct Storm {
    _thread: Background,
}

/// The calling thread's id in the kernel.
pub fn this_thread() -> libc::pid_t {
    // SAFETY: gettid takes nothing and cannot fail.
    unsafe { libc::gettid() }
}

/// The thread of this process that has this name, if one has.
pub fn thread_named(name: &str) -> Option<libc::pid_t> {
    let threads = fs::read_dir("/proc/self/task").ok()?;
    threads.flatten().find_map(|thread| {
        let found = fs::read_to_string(thread.path().join("comm")).ok()?;
        let id = thread.file_name().to_str()?.parse().ok()?;
        (found.trim_end() == name).then_some(id)
    })
}

impl Storm {
    /// SIGUSR1, whose handler does nothing, at these threads of this process.
    ///
    /// Not a real-time signal: those queue up where they are blocked, until nobody can send any.
    ///
    /// # Panics
    /// If the signal can't be handled.
    pub fn at(threads: Vec<libc::pid_t>) -> Self {
        extern "C" fn nothing(_signal: libc::c_int) {}
        // SAFETY: sigaction is made of integers, a pointer-sized handler and an optional function
        // pointer, for which zeroes are valid values.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
        // What else the thread is doing is to go on as if nothing had happened.
        action.sa_flags = libc::SA_RESTART;
        // SAFETY: the action is ours, and a handler that does nothing is safe in any context.
        let result = unsafe { libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut()) };
        assert_eq!(result, 0, "SIGUSR1 could not be handled");
        Self::of(move || {
            for &thread in &threads {
                // SAFETY: tgkill takes integers. A thread that has ended is an error, not a danger.
                unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, libc::SIGUSR1) };
            }
        })
    }

    /// The C library's own signal at all threads of this process, which `pthread_sigmask` does not
    /// block: it is how a process with threads sets its user, here to what it is.
    ///
    /// # Panics
    /// On its thread, if that fails.
    pub fn of_set_user() -> Self {
        let same = libc::uid_t::MAX;
        Self::of(move || {
            // SAFETY: setresuid takes integers; these leave everything as it is.
            let result = unsafe { libc::setresuid(same, same, same) };
            assert_eq!(result, 0, "setting no user at all failed");
        })
    }

    /// Whether this process may be [stopped](Self::of_stops) without anybody being misled: a shell
    /// would take a job of its own for suspended, and give its terminal to others.
    pub fn can_stop() -> bool {
        // SAFETY: both take nothing and cannot fail.
        unsafe { libc::getpgrp() != libc::getpid() }
    }

    /// Stops of this whole process, each followed by its continuation as soon as every thread has
    /// stopped: nobody can block them.
    ///
    /// A stop that is taken back before a thread has come to it may cut short what the thread is at, and
    /// leaves no trace whatever: there is nothing to be shown by it. Nor does a process get on that is
    /// stopped again before its threads have run. So there is a lull between: most are at most a
    /// millisecond and each of another length, so that what begins with a continuation is hit early and
    /// late; each fourth is long enough for a busy machine.
    ///
    /// A process of their own sends them. It ends only after a continuation: when its file is gone,
    /// or this process. This returns once the first stop has been.
    ///
    /// # Panics
    /// If that process can't be started, or stops nobody.
    pub fn of_stops() -> Self {
        // The third field of `stat`, behind a name without spaces or not, is the thread's state.
        const SCRIPT: &str = r#"
            runs() {
                for thread in /proc/"$1"/task/*; do
                    read -r stat < "$thread/stat" || continue
                    case "${stat##*)}" in " T "*) ;; *) return 0 ;; esac
                done 2> /dev/null
                return 1
            }
            lull=0 begun=
            while [ -e "$1" ] && kill -STOP "$2"; do
                while runs "$2"; do :; done
                kill -CONT "$2" || exit
                if [ -z "$begun" ]; then begun=yes && : > "$3"; fi
                lull=$(((lull + 271) % 1009)) turn=0
                while [ $turn -lt $lull ]; do turn=$((turn + 1)); done
                [ $lull -gt 250 ] || sleep 0.004
            done"#;
        let me = std::process::id();
        let file = std::env::temp_dir().join(format!("kvm-suite-storm-{me}"));
        let begun = file.with_extension("begun");
        fs::write(&file, "").expect("a file in the directory for temporary ones");
        let mut sender = Command::new("sh");
        sender.args(["-c", SCRIPT, "storm"]).arg(&file);
        let sender = sender.arg(me.to_string()).arg(&begun);
        let mut sender = sender.spawn().expect("a shell");
        let storm = Self::start({
            let begun = begun.clone();
            move |ended| {
                while !ended.within(Duration::from_secs(1)) {}
                fs::remove_file(&file).expect("the file that was just made");
                sender.wait().expect("the child that was just started");
                // Not there if it has stopped nobody.
                let _ = fs::remove_file(&begun);
            }
        });
        let deadline = Instant::now() + FIRST_STOP;
        while !begun.exists() {
            assert!(
                Instant::now() < deadline,
                "{FIRST_STOP:?} went by without a stop"
            );
            thread::park_timeout(Duration::from_millis(1));
        }
        storm
    }

    fn of(mut gust: impl FnMut() + Send + 'static) -> Self {
        Self::start(move |ended| {
            while !ended.within(Duration::ZERO) {
                gust();
                // In a storm without a lull nobody gets from one signal to the next.
                let lull = Instant::now();
                while lull.elapsed() < LULL {
                    thread::yield_now();
                }
            }
        })
    }

    fn start(weather: impl FnOnce(&Ended) + Send + 'static) -> Self {
        Self {
            _thread: Background::spawn("storm", weather).expect("a thread"),
        }
    }
}
