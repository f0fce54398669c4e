// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The thread of a vCPU, whole, for kvm-ioctls: other threads park it, let it go on, and kick it. To be copied;
//! `signal.rs` goes with it. It needs the crates kvm-ioctls 0.25, kvm-bindings 0.14, memmap2 0.9, libc 0.2 and vmm-sys-util 0.15.
//!
//! To read registers at the end, call [`Parked::stop`], before the last sync or after it. It returns the vCPUs, which do not
//! enter the guest again. Do not drop [`Parked`] and park them once more: in between they write, and no sync has that.
//!
//! A thread that wants the vCPU out of the guest writes down what it wants, sets `immediate_exit`, and sends a signal, in
//! this order. The thread clears `immediate_exit` only under the lock, and only when it is wanted to run. So no kick is lost:
//! before `KVM_RUN` the flag keeps the vCPU out, inside the signal throws it out, and after it the flag is still set.

mod signal;

use std::error::Error;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;
use kvm_dirty_ring::{Awake, DirtyLog, VcpuRing};
use kvm_ioctls::{VcpuExit, VcpuFd};
use signal::{ImmediateExit, kick_signal, let_through};

pub type Failure = Box<dyn Error + Send + Sync>;

/// What a thread gives back at its end.
type End = Result<(VcpuFd, VcpuRing), Failure>;

struct State {
    /// Requests to park that have not been taken back: a pause by the operator and a last sync may overlap.
    parks: u32,
    stop: bool,
    /// The acknowledgement: the thread is out of `KVM_RUN`, and stays out while there are requests.
    parked: bool,
    /// The thread's `pthread_t`, from when it begins to when it ends. With musl that is a pointer, which is not `Send`.
    thread: Option<usize>,
    ended: bool,
}

/// What the thread and all others share.
struct Control {
    state: Mutex<State>,
    changed: Condvar,
    immediate_exit: ImmediateExit,
}

impl Control {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change of the state is one step, so a panic leaves it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the vCPU leave `KVM_RUN`, or not enter it.
    fn kick(&self, state: &State) {
        self.immediate_exit.set(true);
        if let Some(thread) = state.thread {
            // SAFETY: the thread has not ended, and can't while the state is locked: it takes its id back first.
            unsafe { libc::pthread_kill(thread as libc::pthread_t, kick_signal()) };
        }
    }

    fn park(&self) {
        let mut state = self.lock();
        state.parks += 1;
        self.kick(&state);
    }

    /// Takes one request back. The thread clears `immediate_exit` itself.
    fn resume(&self) {
        let mut state = self.lock();
        state.parks = state.parks.saturating_sub(1);
        self.changed.notify_all();
    }

    fn stop(&self) {
        let mut state = self.lock();
        state.stop = true;
        self.kick(&state);
        self.changed.notify_all();
    }

    /// On the vCPU's thread, after `KVM_RUN` has returned EINTR: waits while it is to be parked. False if it is to stop.
    fn may_run(&self) -> bool {
        let mut state = self.lock();
        while state.parks > 0 && !state.stop {
            state.parked = true;
            self.changed.notify_all();
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.parked = false;
        if !state.stop {
            self.immediate_exit.set(false);
        }
        !state.stop
    }
}

/// A vCPU that runs on a thread of its own. Dropping it stops it.
pub struct VcpuThread {
    control: Arc<Control>,
    /// Until it is joined.
    thread: Mutex<Option<JoinHandle<End>>>,
}

impl VcpuThread {
    /// Runs the vCPU. `on_exit` gets each exit of the guest's but full rings, on the vCPU's thread; an error of it ends the
    /// thread.
    pub fn spawn(
        fd: VcpuFd,
        ring: VcpuRing,
        on_exit: impl FnMut(VcpuExit<'_>) -> Result<(), Failure> + Send + 'static,
    ) -> io::Result<Self> {
        let state = State {
            parks: 0,
            stop: false,
            parked: false,
            thread: None,
            ended: false,
        };
        let control = Arc::new(Control {
            state: Mutex::new(state),
            changed: Condvar::new(),
            immediate_exit: ImmediateExit::map(&fd)?,
        });
        let theirs = Arc::clone(&control);
        let body = move || {
            let ending = Ending(theirs);
            let_through()?;
            // SAFETY: it takes nothing, and names the calling thread.
            ending.0.lock().thread = Some(unsafe { libc::pthread_self() } as usize);
            run(&ending.0, fd, ring, on_exit)
        };
        Ok(Self {
            control,
            thread: Mutex::new(Some(Builder::new().name("vcpu".into()).spawn(body)?)),
        })
    }

    /// For `Limiter::spawn`: makes the vCPU leave the guest once, and call `VcpuRing::throttle`. Without a limiter, leave it out.
    pub fn kicker(&self) -> impl Fn() + Send + 'static {
        let control = Arc::clone(&self.control);
        move || control.kick(&control.lock())
    }

    /// Has the vCPU parked, and does not wait for it. It stays parked until each request is taken back by `resume`.
    pub fn request_park(&self) {
        self.control.park();
    }

    /// Waits until it is parked, after a request that is not taken back before this returns; false if its thread has ended instead, which is just as quiet.
    pub fn wait_parked(&self) -> bool {
        let mut state = self.control.lock();
        while !(state.ended || state.parked && state.parks > 0) {
            let woken = self.control.changed.wait(state);
            state = woken.unwrap_or_else(PoisonError::into_inner);
        }
        !state.ended
    }

    /// Takes a request to park back. After the last one the vCPU goes on.
    pub fn resume(&self) {
        self.control.resume();
    }

    /// Waits until the thread has ended, and returns the vCPU, or the error that has ended the thread.
    fn join(&self) -> End {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        let thread = thread.take().ok_or("it was joined before")?;
        let panicked = |_| Err("the vCPU's thread panicked".into());
        thread.join().unwrap_or_else(panicked)
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.control.stop();
        // `Parked::stop` may have joined it; an error that has ended it was for `park_all` to return.
        let _ = self.join();
    }
}

/// All vCPUs parked, and none asleep for its limit. Dropping it lets them go on, unless others want them parked, too.
#[must_use = "the vCPUs go on as soon as it is dropped"]
pub struct Parked<'a> {
    vcpus: &'a [VcpuThread],
    _awake: Awake,
}

impl Parked<'_> {
    /// Stops the vCPUs for good, and returns them: none enters the guest again. To run one on, spawn its thread anew.
    pub fn stop(self) -> Result<Vec<(VcpuFd, VcpuRing)>, Failure> {
        // Before the requests to park are taken back, which dropping `self` does.
        self.vcpus.iter().for_each(|vcpu| vcpu.control.stop());
        self.vcpus.iter().map(VcpuThread::join).collect()
    }
}

/// Parks all vCPUs, which takes as long as the slowest: before the last sync, a `rearm`, a `refresh`. If the thread of one has
/// ended, it returns why.
pub fn park_all<'a>(log: &DirtyLog, vcpus: &'a [VcpuThread]) -> Result<Parked<'a>, Failure> {
    let parked = Parked {
        // A vCPU that sleeps for its limit would be parked when it has slept: in seconds.
        _awake: log.keep_awake(),
        vcpus,
    };
    vcpus.iter().for_each(VcpuThread::request_park);
    match vcpus.iter().position(|vcpu| !vcpu.wait_parked()) {
        Some(ended) => {
            let why = vcpus[ended].join().err();
            let why = why.unwrap_or_else(|| "it was stopped".into());
            Err(format!("the thread of vCPU {ended} has ended: {why}").into())
        }
        None => Ok(parked),
    }
}

impl Drop for Parked<'_> {
    fn drop(&mut self) {
        self.vcpus.iter().for_each(VcpuThread::resume);
    }
}

/// Marks the thread as ended, also if it panics.
struct Ending(Arc<Control>);

impl Drop for Ending {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        (state.thread, state.ended) = (None, true);
        self.0.changed.notify_all();
    }
}

fn run(
    control: &Control,
    mut fd: VcpuFd,
    mut ring: VcpuRing,
    mut on_exit: impl FnMut(VcpuExit<'_>) -> Result<(), Failure>,
) -> End {
    loop {
        match fd.run() {
            // kvm-ioctls has no name of its own for it.
            Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => ring.on_full()?,
            // Only here, where the guest's last access to a device is complete, is the vCPU parked or stopped.
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                if !control.may_run() {
                    return Ok((fd, ring));
                }
                ring.throttle();
            }
            Ok(exit) => on_exit(exit)?,
            Err(error) => return Err(error.into()),
        }
    }
}
