//! How the reaper sleeps, and what wakes it.

#[cfg(not(all(test, feature = "modelled")))]
use {crate::sync::PoisonError, core::time::Duration, std::time::Instant};

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
}

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
            self.bell.notify_all();
        }
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
