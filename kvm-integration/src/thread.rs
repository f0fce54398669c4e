//! The thread that runs a vCPU, and how others stop it.
//!
//! Whoever wants the vCPU out of the guest writes down what it wants, sets `immediate_exit`, and
//! sends a signal, in this order. The thread clears `immediate_exit` only under the lock and only
//! when it is wanted to run. So a kick is never lost: before `KVM_RUN` the flag keeps the vCPU
//! out, inside the signal throws it out, and after it the flag is still set.

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use crate::kick::{self, ImmediateExit};
use crate::vcpu::{Exit, Progress, Ran, TinyVcpu, VcpuError};

/// What a vCPU's handler wants done next.
#[derive(Debug)]
pub enum Action {
    /// Enter the guest again.
    Continue,
    /// Park, as if by [`VcpuThread::request_pause`], until someone resumes.
    Pause,
    /// End the thread.
    Stop,
    /// End the thread with this error.
    Fail(Box<dyn std::error::Error + Send + Sync>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Want {
    Run,
    Pause,
    Stop,
}

#[derive(Debug)]
struct State {
    want: Want,
    /// The thread waits, out of `KVM_RUN`, and will go on waiting while `want` is `Pause`.
    parked: bool,
    /// The thread is through with `KVM_RUN` for good.
    ended: bool,
    tid: libc::pid_t,
    /// The handler is to be called once the vCPU is out.
    kicked: bool,
}

impl State {
    fn is_paused(&self) -> bool {
        self.parked && self.want == Want::Pause && !self.ended
    }
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    immediate_exit: Arc<ImmediateExit>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change of the state is one step, so a panic leaves it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_while(&self, condition: impl FnMut(&mut State) -> bool) -> MutexGuard<'_, State> {
        let guard = self.changed.wait_while(self.lock(), condition);
        guard.unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the thread to leave `KVM_RUN`, or not to enter it. Nothing takes back a `Stop`.
    fn want_out(&self, want: Want) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        if state.want != Want::Stop {
            state.want = want;
        }
        self.immediate_exit.set(true);
        self.changed.notify_all();
        state
    }

    /// Whether the vCPU was kicked since this was asked last.
    fn take_kick(&self) -> bool {
        std::mem::take(&mut self.lock().kicked)
    }

    /// On the thread, out of `KVM_RUN`: waits while it is wanted out; false if for ever.
    fn may_run(&self) -> bool {
        let mut state = self.lock();
        if state.want == Want::Pause {
            state.parked = true;
            self.changed.notify_all();
            drop(state);
            state = self.wait_while(|state| state.want == Want::Pause);
            state.parked = false;
        }
        if state.want == Want::Stop {
            return false;
        }
        self.immediate_exit.set(false);
        true
    }
}

/// Tells the waiting that the thread has ended, also if it panics.
struct EndGuard(Arc<Shared>);

impl Drop for EndGuard {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.changed.notify_all();
    }
}

/// A running vCPU. Dropping it stops it and drops the vCPU.
///
/// The handler is called on the vCPU's thread, out of `KVM_RUN`. Whoever pauses or stops the vCPU
/// waits for a handler that is still at work, so a handler must not wait for them.
#[derive(Debug)]
pub struct VcpuThread {
    index: u32,
    shared: Arc<Shared>,
    progress: Progress,
    thread: Option<JoinHandle<Result<TinyVcpu, VcpuError>>>,
}

impl VcpuThread {
    /// Runs `vcpu` on a thread of its own. `handler` is told of each exit of the guest's own, and
    /// of those that a [`Kicker`] causes; other signals are not its business.
    ///
    /// # Errors
    /// The thread could not be started.
    pub fn spawn<H>(vcpu: TinyVcpu, handler: H) -> Result<Self, VcpuError>
    where
        H: FnMut(Exit) -> Action + Send + 'static,
    {
        Self::start(vcpu, None, handler)
    }

    /// The same on a thread that stays on CPU `cpu`.
    ///
    /// # Errors
    /// The thread could not be started or pinned.
    pub fn spawn_pinned<H>(vcpu: TinyVcpu, cpu: usize, handler: H) -> Result<Self, VcpuError>
    where
        H: FnMut(Exit) -> Action + Send + 'static,
    {
        Self::start(vcpu, Some(cpu), handler)
    }

    fn start<H>(vcpu: TinyVcpu, cpu: Option<usize>, handler: H) -> Result<Self, VcpuError>
    where
        H: FnMut(Exit) -> Action + Send + 'static,
    {
        let index = vcpu.index();
        let failed = |source| VcpuError::Spawn { index, source };
        kick::install_handler().map_err(failed)?;
        let progress = vcpu.progress().clone();
        // A vCPU that ran before was left with the flag set.
        let immediate_exit = Arc::clone(vcpu.immediate_exit());
        immediate_exit.set(false);
        let state = State {
            want: Want::Run,
            parked: false,
            ended: false,
            tid: 0,
            kicked: false,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            changed: Condvar::new(),
            immediate_exit,
        });
        let thread = Builder::new().name(format!("vcpu-{index}"));
        let thread = thread.spawn({
            let shared = Arc::clone(&shared);
            move || {
                let guard = EndGuard(shared);
                prepare(&guard.0, index, cpu)?;
                run(&guard.0, vcpu, handler)
            }
        });
        let thread = Some(thread.map_err(failed)?);
        let started = |state: &mut State| state.tid == 0 && !state.ended;
        let failed_early = shared.wait_while(started).tid == 0;
        let this = Self {
            index,
            shared,
            progress,
            thread,
        };
        if failed_early {
            return Err(this
                .join()
                .expect_err("a thread that never ran ends with an error"));
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
        self.shared.lock().tid
    }

    /// Whether the thread has ended: by its handler's wish or by an error, which
    /// [`join`](Self::join) gives.
    pub fn ended(&self) -> bool {
        self.shared.lock().ended
    }

    /// Sends the thread a signal that asks for nothing: an interruption to be survived. For a
    /// storm of them, call it often.
    pub fn interrupt(&self) {
        if let Some(thread) = &self.thread {
            // SAFETY: the thread is not joined yet, so that its pthread_t is still valid, even if
            // it has ended; the signal's handler does nothing.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), kick::kick_signal()) };
        }
    }

    /// For a thread that is to throw the vCPU out of the guest now and then.
    pub fn kicker(&self) -> Kicker {
        Kicker(Arc::clone(&self.shared))
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
        drop(self.shared.want_out(Want::Pause));
        self.interrupt();
    }

    /// The second half of [`pause`](Self::pause). Without a request it waits for one.
    pub fn wait_paused(&self) -> bool {
        let quiet = |state: &State| state.is_paused() || state.ended;
        !self.shared.wait_while(|state| !quiet(state)).ended
    }

    /// Whether it is paused now, for a wait of one's own; a thread that has ended is not.
    pub fn is_paused(&self) -> bool {
        self.shared.lock().is_paused()
    }

    /// Lets a paused vCPU run again.
    pub fn resume(&self) {
        let mut state = self.shared.lock();
        if state.want == Want::Pause {
            state.want = Want::Run;
            self.shared.changed.notify_all();
        }
    }

    /// Stops the vCPU, running or paused, and gives it back: to be looked at, or to be run again.
    ///
    /// # Errors
    /// The thread had ended with an error.
    pub fn stop(self) -> Result<TinyVcpu, VcpuError> {
        self.request_stop();
        self.join()
    }

    /// Waits until the thread ends by itself: by its handler's wish, or by an error.
    ///
    /// # Errors
    /// The thread ended with an error.
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
        drop(self.shared.want_out(Want::Stop));
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
#[derive(Debug, Clone)]
pub struct Kicker(Arc<Shared>);

impl Kicker {
    /// Kicks. The handler is told [`Exit::Kicked`]; if the vCPU was about to enter the guest,
    /// perhaps not before something else brings it out.
    pub fn kick(&self) {
        let mut state = self.0.lock();
        if !state.ended {
            state.kicked = true;
            // SAFETY: integers only. The thread has not ended: it says so under the lock first. The
            // signal's handler does nothing.
            unsafe {
                libc::syscall(
                    libc::SYS_tgkill,
                    libc::getpid(),
                    state.tid,
                    kick::kick_signal(),
                )
            };
        }
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

/// Readies the calling thread, and shows its id when that went well.
fn prepare(shared: &Shared, index: u32, cpu: Option<usize>) -> Result<(), VcpuError> {
    kick::unblock_on_this_thread().map_err(|source| VcpuError::Spawn { index, source })?;
    if let Some(cpu) = cpu {
        pin(cpu).map_err(|source| VcpuError::Pin { index, cpu, source })?;
    }
    // SAFETY: gettid takes nothing and cannot fail.
    shared.lock().tid = unsafe { libc::gettid() };
    shared.changed.notify_all();
    Ok(())
}

fn pin(cpu: usize) -> io::Result<()> {
    if cpu >= libc::CPU_SETSIZE as usize {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: cpu_set_t is an array of integers, for which zeroes are a valid value: no CPU.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: CPU_SET indexes the set with `cpu`, which was just checked to be inside it.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: 0 is the calling thread, and the pointer is to a set of the size given.
    match unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The thread's loop. It parks only after `KVM_RUN` said EINTR: that run completes an `out` that
/// the handler was told of, so that a parked vCPU is between two instructions.
fn run<H>(shared: &Shared, mut vcpu: TinyVcpu, mut handler: H) -> Result<TinyVcpu, VcpuError>
where
    H: FnMut(Exit) -> Action,
{
    let index = vcpu.index();
    loop {
        let exit = match vcpu.run()? {
            Ran::Interrupted if !shared.may_run() => return Ok(vcpu),
            Ran::Interrupted if !shared.take_kick() => continue,
            Ran::Interrupted => Exit::Kicked,
            Ran::Left(exit) => exit,
        };
        match handler(exit) {
            Action::Continue => {}
            Action::Pause => drop(shared.want_out(Want::Pause)),
            Action::Stop => drop(shared.want_out(Want::Stop)),
            Action::Fail(source) => return Err(VcpuError::Handler { index, source }),
        }
    }
}
