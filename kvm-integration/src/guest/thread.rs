// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The thread that runs a vCPU, and how others stop it.
//!
//! A thread that wants the vCPU out of the guest writes down what it wants, sets `immediate_exit`, and
//! sends a signal, in this order. The thread clears `immediate_exit` only under the lock and only
//! when it is wanted to run. So a kick is never lost: before `KVM_RUN` the flag keeps the vCPU
//! out, inside the signal throws it out, and after it the flag is still set.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, OnceLock};
use std::thread::{self, Builder, JoinHandle};
use std::time::Duration;

use vmm_sys_util::signal::Killable;

use super::error::VcpuError;
use super::kick::{self, ImmediateExit};
use super::parking::{Barrier, EndGuard, Parking, Want};
use super::program::Exit;
use super::vcpu::{Progress, Ran, TinyVcpu};
use crate::host::cores::confine;
use crate::host::storm::this_thread;

/// What a vCPU's handler wants done next.
#[derive(Debug)]
pub enum Action {
    /// Enter the guest again.
    Continue,
    /// Park, as if by [`VcpuThread::request_pause`], until someone resumes.
    Pause,
    /// Keep the vCPU out for a moment: it has no way into the guest, as its broken ring can't be emptied.
    StayOut,
    /// End the thread.
    Stop,
    /// End the thread with this error.
    Fail(Box<dyn std::error::Error + Send + Sync>),
}

/// A running vCPU. Dropping it stops it and drops the vCPU.
///
/// The handler is called on the vCPU's thread, out of `KVM_RUN`. A thread that pauses or stops the vCPU
/// waits for a handler that is still at work, so a handler must not wait for them.
#[derive(Debug)]
pub struct VcpuThread {
    index: u32,
    tid: libc::pid_t,
    parking: Arc<Parking<Arc<ImmediateExit>>>,
    /// The handler is to be called once the vCPU is out.
    kicked: Arc<AtomicBool>,
    progress: Progress,
    /// The error with which the thread ends.
    error: Arc<OnceLock<String>>,
    thread: Option<JoinHandle<Result<TinyVcpu, VcpuError>>>,
}

impl VcpuThread {
    /// Runs `vcpu` on a thread of its own. `handler` receives each exit of the guest's own, and
    /// of those that a [`Kicker`] causes; other signals are not its business.
    pub fn spawn(
        vcpu: TinyVcpu,
        handler: impl FnMut(Exit) -> Action + Send + 'static,
    ) -> Result<Self, VcpuError> {
        Self::start(vcpu, None, handler)
    }

    /// The same on a thread that stays on CPU `cpu`.
    pub fn spawn_pinned(
        vcpu: TinyVcpu,
        cpu: usize,
        handler: impl FnMut(Exit) -> Action + Send + 'static,
    ) -> Result<Self, VcpuError> {
        Self::start(vcpu, Some(cpu), handler)
    }

    fn start(
        vcpu: TinyVcpu,
        cpu: Option<usize>,
        handler: impl FnMut(Exit) -> Action + Send + 'static,
    ) -> Result<Self, VcpuError> {
        let index = vcpu.index();
        let failed = |source| VcpuError::Spawn(index, source);
        let progress = vcpu.progress().clone();
        // A vCPU that ran before was left with the flag set.
        let immediate_exit = Arc::clone(vcpu.immediate_exit());
        immediate_exit.set(false);
        let parking = Arc::new(Parking::new(immediate_exit));
        let kicked = Arc::<AtomicBool>::default();
        let error = Arc::<OnceLock<String>>::default();
        let (ready, is_ready) = mpsc::channel();
        let thread = Builder::new().name(format!("vcpu-{index}")).spawn({
            let (guard, kicked) = (EndGuard(Arc::clone(&parking)), Arc::clone(&kicked));
            let reason = Arc::clone(&error);
            move || {
                let ran = prepare(ready, index, cpu);
                let ran = ran.and_then(|()| run(&guard.0, &kicked, vcpu, handler));
                // Before the guard marks the thread as ended.
                ran.inspect_err(|error| {
                    reason.get_or_init(|| error.with_causes());
                })
            }
        });
        let mut this = Self {
            index,
            tid: 0,
            parking,
            kicked,
            progress,
            error,
            thread: Some(thread.map_err(failed)?),
        };
        match is_ready.recv() {
            Ok(tid) => this.tid = tid,
            Err(_) => {
                let failed = this.join();
                return Err(failed.expect_err("a thread that never ran ends with an error"));
            }
        }
        Ok(this)
    }

    /// Which vCPU this is.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Page stores so far; may be read at any time. See [`Progress::stores`].
    pub fn progress(&self) -> u64 {
        self.progress.stores()
    }

    /// Passes over the list completed so far.
    pub fn passes(&self) -> u64 {
        self.progress.passes()
    }

    /// For a thread that samples the progress by itself.
    pub fn progress_reader(&self) -> Progress {
        self.progress.clone()
    }

    /// The thread's kernel id, for `tgkill` and `/proc/self/task`.
    pub fn tid(&self) -> libc::pid_t {
        self.tid
    }

    /// Whether the thread has ended: by its handler's wish or by an error, which
    /// [`join`](Self::join) gives.
    pub fn ended(&self) -> bool {
        self.parking.ended()
    }

    /// Why the thread has ended, if it has; for threads that cannot [`join`](Self::join) it.
    pub fn why_ended(&self) -> Option<String> {
        let index = self.index;
        let why = || match self.error.get() {
            Some(error) => format!("vCPU {index} has ended: {error}"),
            None => format!("vCPU {index} has ended, as it was asked to, or by a panic"),
        };
        self.ended().then(why)
    }

    /// Sends the thread a signal that asks for nothing: an interruption to be survived. For a
    /// storm of them, call it often.
    pub fn interrupt(&self) {
        if let Some(thread) = &self.thread {
            // One that has ended needs none.
            let _ = thread.kill(kick::kick_signal());
        }
    }

    /// For a thread that is to throw the vCPU out of the guest now and then.
    pub fn kicker(&self) -> Kicker {
        let (parking, kicked) = (Arc::clone(&self.parking), Arc::clone(&self.kicked));
        let tid = self.tid;
        Kicker(Arc::new(move || {
            parking.unless_ended(|| {
                // Relaxed: the thread asks for the lock before it looks.
                kicked.store(true, Ordering::Relaxed);
                // SAFETY: integers only. The thread has not ended, and can't meanwhile. The signal's
                // handler does nothing.
                unsafe {
                    libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, kick::kick_signal())
                };
            });
        }))
    }

    /// Throws the vCPU out of the guest and waits until its thread is parked out of `KVM_RUN`;
    /// false if the thread has ended instead, which is just as quiet. Pausing twice is pausing
    /// once.
    ///
    /// What the guest stored before is in memory and, if it is logged, in the ring.
    pub fn pause(&self) -> bool {
        self.request_pause();
        self.wait_paused()
    }

    /// The first half of [`pause`](Self::pause): asks, and does not wait.
    pub fn request_pause(&self) {
        self.parking.tell(Want::Pause);
        self.interrupt();
    }

    /// The second half of [`pause`](Self::pause). Without a request it waits for one.
    pub fn wait_paused(&self) -> bool {
        self.parking.wait_parked()
    }

    /// Whether it is paused now, for a wait of one's own; a thread that has ended is not.
    pub fn is_paused(&self) -> bool {
        self.parking.is_parked()
    }

    /// Lets a paused vCPU run again.
    pub fn resume(&self) {
        self.parking.tell(Want::Run);
    }

    /// Stops the vCPU, running or paused, and gives it back: to be looked at, or to be run again.
    pub fn stop(self) -> Result<TinyVcpu, VcpuError> {
        self.request_stop();
        self.join()
    }

    /// Waits until the thread ends by itself: by its handler's wish, or by an error.
    pub fn join(mut self) -> Result<TinyVcpu, VcpuError> {
        let thread = self
            .thread
            .take()
            .expect("a thread is joined once, by value or by drop");
        thread.join().unwrap_or_else(|panic| {
            let message = match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
                (Some(text), _) => (*text).into(),
                (_, Some(text)) => text.clone(),
                _ => "no message".into(),
            };
            Err(VcpuError::Panicked {
                index: self.index,
                message,
            })
        })
    }

    fn request_stop(&self) {
        self.parking.tell(Want::Stop);
        self.interrupt();
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.request_stop();
        if let Some(thread) = self.thread.take() {
            // An error or a panic was for join() to report, which nobody called.
            let _ = thread.join();
        }
    }
}

/// Throws a vCPU out of the guest, to its handler.
#[derive(Clone)]
pub struct Kicker(Arc<dyn Fn() + Send + Sync>);

impl Kicker {
    /// Kicks. The handler receives [`Exit::Kicked`]; if the vCPU was about to enter the guest,
    /// perhaps not before something else brings it out.
    pub fn kick(&self) {
        (self.0)();
    }
}

/// Pauses all of them, which takes as long as the slowest; false if one has ended.
pub fn pause_all(threads: &[VcpuThread]) -> bool {
    threads.iter().for_each(VcpuThread::request_pause);
    // Not all(): it would not wait for those after one that has ended.
    threads
        .iter()
        .filter(|thread| !thread.wait_paused())
        .count()
        == 0
}

/// Readies the calling thread, and sends its id once that has succeeded.
fn prepare(ready: Sender<libc::pid_t>, index: u32, cpu: Option<usize>) -> Result<(), VcpuError> {
    kick::let_through().map_err(|source| VcpuError::Spawn(index, source))?;
    if let Some(cpu) = cpu {
        confine(&[cpu]).map_err(|source| VcpuError::Pin(index, cpu, source))?;
    }
    // The thread that started it waits for this.
    let _ = ready.send(this_thread());
    Ok(())
}

/// Time between two tries of a vCPU that has no way into the guest.
const STAY_OUT: Duration = Duration::from_millis(1);

/// The thread's loop. It parks only after `KVM_RUN` said EINTR: that run completes an `out` that
/// the handler has received, so that a parked vCPU is between two instructions.
fn run(
    parking: &Parking<Arc<ImmediateExit>>,
    kicked: &AtomicBool,
    mut vcpu: TinyVcpu,
    mut handler: impl FnMut(Exit) -> Action,
) -> Result<TinyVcpu, VcpuError> {
    let index = vcpu.index();
    loop {
        let exit = match vcpu.run()? {
            Ran::Interrupted if !parking.may_run() => return Ok(vcpu),
            Ran::Interrupted if !kicked.swap(false, Ordering::Relaxed) => continue,
            Ran::Interrupted => Exit::Kicked,
            Ran::Left(exit) => exit,
        };
        match handler(exit) {
            Action::Continue => {}
            // Here it parks without EINTR. After a full ring there is no `out` to complete, and kvm_pvm's emulator
            // looks at the ring again before it looks whether the vCPU is to leave.
            Action::StayOut if !parking.may_run() => return Ok(vcpu),
            // Not a sleep: in a storm of signals what is left of one grows, by the timer slack of each.
            Action::StayOut => thread::park_timeout(STAY_OUT),
            Action::Pause => parking.tell(Want::Pause),
            Action::Stop => parking.tell(Want::Stop),
            Action::Fail(source) => return Err(VcpuError::Handler(index, source)),
        }
    }
}
