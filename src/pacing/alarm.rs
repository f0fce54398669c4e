// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How the reaper sleeps, and what wakes it.

#[cfg(not(all(test, feature = "modelled")))]
use {crate::sync::PoisonError, core::time::Duration, std::io, std::time::Instant};

use crate::sync::{Condvar, Mutex, lock};

/// How long the reaper ignores full exits after one has woken it. In a storm of them one look serves many.
#[cfg(not(all(test, feature = "modelled")))]
pub(crate) const DEAF: Duration = Duration::from_micros(500);

/// Rung by vCPUs that stop on a full ring, and by the reaper's owner.
#[derive(Default)]
pub(crate) struct Alarm {
    rung: Mutex<Rung>,
    bell: Condvar,
}

#[derive(Default)]
struct Rung {
    full: bool,
    #[cfg(not(all(test, feature = "modelled")))]
    command: bool,
    /// Whether a thread waits that a full exit may wake. A wake-up that wakes no thread costs a system call, too.
    listening: bool,
    /// What wakes an event loop, where no thread waits.
    #[cfg(not(all(test, feature = "modelled")))]
    remote: Option<Remote>,
}

/// An event loop that waits for a timer.
#[cfg(not(all(test, feature = "modelled")))]
struct Remote {
    arm: Arm,
    /// When a full exit is to wake it.
    at: Instant,
}

/// Has an event loop wake up at a time, in place of the one before.
#[cfg(not(all(test, feature = "modelled")))]
pub(crate) type Arm = Box<dyn Fn(Instant) -> io::Result<()> + Send>;

/// What ended a wait.
#[cfg(not(all(test, feature = "modelled")))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Heard {
    /// The owner.
    Command,
    /// A vCPU with a full ring.
    Full,
    /// Nothing, until the time was up.
    Nothing,
}

#[cfg(not(all(test, feature = "modelled")))]
impl Heard {
    /// What has woken the reaper, if anything did.
    pub(crate) fn kick(self) -> Option<&'static str> {
        match self {
            Self::Command => Some("order"),
            Self::Full => Some("full"),
            Self::Nothing => None,
        }
    }
}

impl Alarm {
    /// A vCPU has stopped on a full ring.
    pub(crate) fn full(&self) {
        let mut rung = lock(&self.rung);
        rung.full = true;
        if core::mem::take(&mut rung.listening) {
            #[cfg(not(all(test, feature = "modelled")))]
            if let Some(remote) = &rung.remote {
                // If the timer can't be armed, the loop learns that when it arms it the next time.
                let _ = (remote.arm)(remote.at);
                return;
            }
            self.bell.notify_all();
        }
    }

    /// From now on full exits wake an event loop, by `arm`; or, again, the thread that waits here.
    #[cfg(not(all(test, feature = "modelled")))]
    pub(crate) fn set_remote(&self, arm: Option<Arm>) {
        let at = Instant::now();
        *lock(&self.rung) = Rung {
            remote: arm.map(|arm| Remote { arm, at }),
            ..Rung::default()
        };
    }

    /// In an event loop that has woken up: what there was to hear.
    #[cfg(not(all(test, feature = "modelled")))]
    pub(crate) fn heard(&self) -> Heard {
        let mut rung = lock(&self.rung);
        rung.listening = false;
        match core::mem::take(&mut rung.full) {
            true => Heard::Full,
            false => Heard::Nothing,
        }
    }

    /// In an event loop that is about to sleep until `until`: a full exit wakes it from `deaf` on, also one that came since it
    /// has [heard](Self::heard).
    #[cfg(not(all(test, feature = "modelled")))]
    pub(crate) fn listen(&self, deaf: Instant, until: Instant) -> io::Result<()> {
        let mut rung = lock(&self.rung);
        rung.listening = !rung.full;
        let full = rung.full;
        let Some(remote) = &mut rung.remote else {
            return Ok(());
        };
        remote.at = deaf.min(until);
        // Under the lock: a full exit arms it only after this, and never is its wake-up put off.
        (remote.arm)(if full { remote.at } else { until })
    }

    /// The owner has a command, which ends any wait at once.
    #[cfg(not(all(test, feature = "modelled")))]
    pub(crate) fn command(&self) {
        lock(&self.rung).command = true;
        self.bell.notify_all();
    }

    /// Waits for a command.
    #[cfg(not(all(test, feature = "modelled")))]
    pub(crate) fn wait_for_command(&self) {
        let mut rung = lock(&self.rung);
        while !rung.command {
            rung = crate::sync::wait(&self.bell, rung);
        }
        *rung = Rung::default();
    }

    /// Waits for the alarm until `until`; until `deaf` for commands only.
    #[cfg(not(all(test, feature = "modelled")))]
    pub(crate) fn wait(&self, deaf: Instant, until: Instant) -> Heard {
        let mut rung = lock(&self.rung);
        let heard = loop {
            let now = Instant::now();
            if rung.command {
                break Heard::Command;
            }
            if now >= until {
                break Heard::Nothing;
            }
            rung.listening = now >= deaf;
            if rung.full && rung.listening {
                break Heard::Full;
            }
            let next = if rung.listening {
                until
            } else {
                until.min(deaf)
            };
            let woken = self.bell.wait_timeout(rung, next - now);
            rung = woken.unwrap_or_else(PoisonError::into_inner).0;
        };
        // A look that comes now sees the state of all rings.
        *rung = Rung::default();
        heard
    }
}

#[cfg(all(test, not(feature = "modelled")))]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    /// Never reached in a test that passes.
    const LONG: Duration = Duration::from_secs(60);

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(20)
    }

    #[test]
    fn what_rang_before_is_heard_once() {
        let alarm = Alarm::default();
        let now = Instant::now();
        alarm.full();
        alarm.full();
        assert_eq!(alarm.wait(now, now + LONG), Heard::Full);
        assert_eq!(alarm.wait(now, soon()), Heard::Nothing);
        alarm.full();
        alarm.command();
        assert_eq!(alarm.wait(now, now + LONG), Heard::Command);
        assert_eq!(alarm.wait(now, soon()), Heard::Nothing);
    }

    #[test]
    fn a_sleeper_is_woken() {
        for (ring, heard) in [
            (Alarm::full as fn(&Alarm), Heard::Full),
            (Alarm::command, Heard::Command),
        ] {
            let alarm = Arc::new(Alarm::default());
            let sleeper = thread::spawn({
                let alarm = Arc::clone(&alarm);
                move || alarm.wait(Instant::now(), Instant::now() + LONG)
            });
            while !lock(&alarm.rung).listening {
                thread::yield_now();
            }
            ring(&alarm);
            assert_eq!(sleeper.join().unwrap(), heard);
        }
    }

    #[test]
    fn full_exits_are_not_heard_while_deaf_and_not_forgotten() {
        let alarm = Alarm::default();
        alarm.full();
        let deaf = soon();
        assert_eq!(alarm.wait(deaf, Instant::now() + LONG), Heard::Full);
        assert!(Instant::now() >= deaf, "it was heard");
        alarm.full();
        // An alarm that rang is seen when the time is up.
        let (until, deaf) = (soon(), Instant::now() + LONG);
        assert_eq!(alarm.wait(deaf, until), Heard::Nothing);
        assert_eq!(alarm.wait(Instant::now(), soon()), Heard::Nothing);
        // A command is heard at any time.
        alarm.command();
        let later = Instant::now() + LONG;
        assert_eq!(alarm.wait(later, later), Heard::Command);
    }

    #[test]
    fn a_full_exit_is_nothing_to_who_waits_for_a_command() {
        let alarm = Arc::new(Alarm::default());
        let sleeper = thread::spawn({
            let alarm = Arc::clone(&alarm);
            move || alarm.wait_for_command()
        });
        for _ in 0..100 {
            alarm.full();
            thread::yield_now();
        }
        assert!(!sleeper.is_finished());
        alarm.command();
        sleeper.join().unwrap();
    }
}
