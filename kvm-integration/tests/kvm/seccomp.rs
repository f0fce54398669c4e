//! The log under exactly the seccomp filter that SECURITY.md lists for VMMs.
//!
//! A call that is not in the filter kills the process; so it is another process, this suite run
//! again, that installs it.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::io;
use std::num::NonZeroU64;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_dirty_ring::error::ReaperError;
use kvm_dirty_ring::pacing::{Adaptive, Fixed};
use kvm_dirty_ring::{DirtyLog, HostSupport, Limiter, Priority, Reaper, RingEntries};
use kvm_integration::{Action, Exit, TinyVm, VcpuThread, Workload, kvm_available};
use libtest_mimic::Completion::Completed;
use libtest_mimic::Failed;
use seccompiler::SeccompCmpArgLen::Dword;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter,
};

use super::harness::Outcome;
use super::machine::{
    Machine, assert_unsuspicious, pause, resume, run_passes, serve, slot_id, stop, wait_beside,
};

tests![
    security_md_has_the_same_calls,
    under_the_filter,
    a_call_left_out_is_missed,
];

/// Marks the process that is to install the filter, and names a call to leave out, if any.
const WITHOUT: &str = "KVM_FILTER_WITHOUT";

/// A row of the table in SECURITY.md: when, and which calls.
#[derive(Clone, Copy)]
struct Row {
    when: &'static str,
    calls: &'static [Call],
}

/// A system call, by whatever arguments or by one value of one of them.
struct Call {
    symbol: &'static str,
    number: libc::c_long,
    argument: Option<Argument>,
}

struct Argument {
    place: u8,
    name: &'static str,
    value: u64,
}

mod numbers {
    pub use libc::*;

    /// There the C library reads links by a call that takes a directory, too.
    #[cfg(target_arch = "aarch64")]
    #[allow(non_upper_case_globals)]
    pub const SYS_readlink: c_long = SYS_readlinkat;
}

macro_rules! calls {
    (@) => { None };
    (@ $place:literal $name:ident $value:literal) => {
        Some(Argument { place: $place, name: stringify!($name), value: $value })
    };
    ($($call:ident $(($place:literal: $name:ident = $value:literal))?),* $(,)?) => {
        &[$(Call {
            symbol: stringify!($call),
            number: numbers::$call,
            argument: calls!(@ $($place $name $value)?),
        }),*]
    };
}

/// What the standard library, the C library and its allocator may do in any call.
const ANY: Row = Row {
    when: "any call",
    calls: calls![
        SYS_futex,
        SYS_restart_syscall,
        SYS_clock_gettime,
        SYS_brk,
        SYS_mmap,
        SYS_munmap,
        SYS_mremap,
        SYS_mprotect,
        SYS_madvise,
    ],
};

const QUERY: Row = Row {
    when: "query the host",
    calls: calls![
        SYS_openat,
        SYS_ioctl(1: KVM_GET_API_VERSION = 0xae00),
        SYS_ioctl(1: KVM_CHECK_EXTENSION = 0xae03),
        SYS_close,
    ],
};

const ENABLE: Row = Row {
    when: "enable",
    calls: calls![
        SYS_fcntl(1: F_DUPFD_CLOEXEC = 1030),
        SYS_ioctl(1: KVM_GET_API_VERSION = 0xae00),
        SYS_ioctl(1: KVM_CHECK_EXTENSION = 0xae03),
        SYS_ioctl(1: KVM_GET_DIRTY_LOG = 0x4010_ae42),
        SYS_ioctl(1: KVM_SET_USER_MEMORY_REGION = 0x4020_ae46),
        SYS_ioctl(1: KVM_ENABLE_CAP = 0x4068_aea3),
        SYS_mmap,
        SYS_munmap,
        SYS_openat,
        SYS_statx,
        SYS_read,
        SYS_close,
    ],
};

const ENABLE_BITMAP: Row = Row {
    when: "enable bitmaps",
    calls: calls![
        SYS_fcntl(1: F_DUPFD_CLOEXEC = 1030),
        SYS_ioctl(1: KVM_GET_API_VERSION = 0xae00),
        SYS_ioctl(1: KVM_CHECK_EXTENSION = 0xae03),
        SYS_ioctl(1: KVM_GET_DIRTY_LOG = 0x4010_ae42),
        SYS_ioctl(1: KVM_ENABLE_CAP = 0x4068_aea3),
        SYS_close,
    ],
};

const ATTACH: Row = Row {
    when: "attach a vCPU",
    calls: calls![
        SYS_mmap,
        SYS_munmap,
        SYS_madvise,
        SYS_readlink,
        SYS_openat,
        SYS_statx,
        SYS_read,
        SYS_close,
    ],
};

const PASS: Row = Row {
    when: "pass",
    calls: calls![
        SYS_rt_sigprocmask,
        SYS_getrusage,
        SYS_ioctl(1: KVM_GET_DIRTY_LOG = 0x4010_ae42),
        SYS_ioctl(1: KVM_RESET_DIRTY_RINGS = 0xaec7),
    ],
};

const BITMAP: Row = Row {
    when: "take bitmaps",
    calls: calls![
        SYS_ioctl(1: KVM_GET_DIRTY_LOG = 0x4010_ae42),
        SYS_ioctl(1: KVM_CLEAR_DIRTY_LOG = 0xc018_aec0),
    ],
};

const THREAD: Row = Row {
    when: "start and end a thread",
    calls: calls![
        SYS_clone3,
        SYS_clone,
        SYS_sched_yield,
        SYS_set_robust_list,
        SYS_rseq,
        SYS_rt_sigprocmask,
        SYS_sigaltstack,
        SYS_sched_getaffinity,
        SYS_gettid,
        SYS_prctl(0: PR_SET_NAME = 15),
        SYS_exit,
    ],
};

const REAPER: Row = Row {
    when: "reaper",
    calls: calls![
        SYS_rt_sigprocmask,
        SYS_getrusage,
        SYS_prctl(0: PR_SET_TIMERSLACK = 29),
        SYS_ioctl(1: KVM_GET_DIRTY_LOG = 0x4010_ae42),
        SYS_ioctl(1: KVM_RESET_DIRTY_RINGS = 0xaec7),
    ],
};

const LIMITER: Row = Row {
    when: "limiter",
    calls: calls![
        SYS_rt_sigprocmask,
        SYS_prctl(0: PR_SET_TIMERSLACK = 29),
    ],
};

/// The kick that this test gives a limiter: the VMM's own.
const KICK: Row = Row {
    when: "",
    calls: calls![SYS_getpid, SYS_tgkill],
};

const CPUS: Row = Row {
    when: "reaper with `cpus`",
    calls: calls![SYS_sched_setaffinity],
};

const NICE: Row = Row {
    when: "reaper with `Priority::Nice`",
    calls: calls![SYS_setpriority],
};

const FIFO: Row = Row {
    when: "reaper with `Priority::Fifo`",
    calls: calls![SYS_sched_setscheduler],
};

const DROP: Row = Row {
    when: "drop the last handle",
    calls: calls![SYS_munmap, SYS_close],
};

const TABLE: [Row; 14] = [
    ANY,
    QUERY,
    ENABLE,
    ENABLE_BITMAP,
    ATTACH,
    PASS,
    BITMAP,
    THREAD,
    REAPER,
    LIMITER,
    CPUS,
    NICE,
    FIFO,
    DROP,
];

/// What this test itself does on threads with a filter: print a failure, end the thread, hand over
/// results; not the log's business, so not in SECURITY.md.
const TEST: Row = Row {
    when: "",
    calls: calls![
        SYS_write,
        SYS_sched_yield,
        SYS_rt_sigprocmask,
        SYS_sigaltstack,
        SYS_exit,
    ],
};

/// The same on a vCPU's thread.
const VCPU: Row = Row {
    when: "",
    calls: calls![SYS_ioctl(1: KVM_RUN = 0xae80), SYS_rt_sigreturn],
};

/// With debug assertions, the standard library looks at each descriptor that it is to close.
const DEBUG: Row = Row {
    when: "",
    calls: if cfg!(debug_assertions) {
        calls![SYS_fcntl(1: F_GETFD = 1)]
    } else {
        &[]
    },
};

impl Call {
    /// As it is written in SECURITY.md.
    fn text(&self) -> String {
        let name = self.symbol.trim_start_matches("SYS_");
        match &self.argument {
            None => name.into(),
            Some(argument) if argument.value < 1 << 12 => {
                format!("{name}({} = {})", argument.name, argument.value)
            }
            Some(argument) => format!("{name}({} = {:#x})", argument.name, argument.value),
        }
    }

    /// The conditions under which a filter lets it pass: none, or one.
    fn rule(&self) -> Result<Option<SeccompRule>, seccompiler::BackendError> {
        let Some(argument) = &self.argument else {
            return Ok(None);
        };
        let equals = SeccompCmpOp::Eq;
        let condition = SeccompCondition::new(argument.place, Dword, equals, argument.value)?;
        SeccompRule::new(vec![condition]).map(Some)
    }
}

/// A filter that lets pass what is in `rows`, but for the call that is to be left out, and kills
/// the process for any other.
fn filter(rows: &[Row]) -> Result<BpfProgram, Failed> {
    let left_out = env::var(WITHOUT)?;
    let calls = rows.iter().flat_map(|row| row.calls);
    // No rule at all lets a call pass whatever its arguments.
    let mut rules = BTreeMap::<i64, Vec<SeccompRule>>::new();
    for call in calls.filter(|call| call.text() != left_out) {
        rules.entry(call.number).or_default().extend(call.rule()?);
    }
    let (refused, allowed) = (SeccompAction::KillProcess, SeccompAction::Allow);
    let filter = SeccompFilter::new(rules, refused, allowed, env::consts::ARCH.try_into()?)?;
    Ok(filter.try_into()?)
}

type Job = Box<dyn FnOnce() + Send>;

/// A thread that has a filter, as has every thread that it starts.
struct Confined {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Confined {
    fn to(rows: &[Row]) -> Result<Self, Failed> {
        let filter = filter(&[rows, &[TEST, DEBUG]].concat())?;
        let (jobs, queue) = mpsc::channel::<Job>();
        let thread = thread::spawn(move || {
            apply_filter(&filter).expect("a filter for the thread");
            queue.into_iter().for_each(|job| job());
        });
        Ok(Self {
            jobs: Some(jobs),
            thread: Some(thread),
        })
    }

    /// Does `job` on the thread.
    fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = mpsc::channel();
        let job = Box::new(move || done.send(job()).expect("somebody waits for it"));
        let jobs = self.jobs.as_ref().expect("it is there until the drop");
        jobs.send(job).expect("the thread runs");
        result.recv().expect("a job that does not panic")
    }
}

impl Drop for Confined {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            // What a job panicked with was for its caller.
            let _ = thread.join();
        }
    }
}

/// A vCPU whose thread gets its filter at the guest's first exit.
fn spawn_confined(machine: Machine, index: u32) -> Result<(Machine, VcpuThread), Failed> {
    let load = machine.load(Workload::Random, index, VCPUS);
    let vcpu = machine.vm.create_vcpu(index, &load)?;
    let log = machine.log.clone();
    let attach = move || {
        let ring = log.attach_vcpu(vcpu.fd());
        (vcpu, ring)
    };
    let (vcpu, ring) = Confined::to(&[ANY, ATTACH])?.run(attach);
    let mut ring = ring?;
    let mut to_install = Some(filter(&[ANY, PASS, VCPU, TEST, DEBUG])?);
    let handler = move |exit| {
        if let Some(filter) = to_install.take() {
            apply_filter(&filter).expect("a filter for the vCPU's thread");
        }
        match exit {
            Exit::RingFull => match ring.on_full() {
                Ok(()) => Action::Continue,
                Err(error) => Action::Fail(error.into()),
            },
            Exit::Kicked => {
                ring.throttle();
                Action::Continue
            }
            Exit::Chunk => Action::Continue,
            Exit::PassDone => Action::Pause,
        }
    };
    Ok((machine, VcpuThread::spawn(vcpu, handler)?))
}

const VCPUS: u32 = 2;

/// What a reaper does in its life, on a thread that may do no more than that.
fn reap(confined: &Confined, log: &DirtyLog, vcpus: &[VcpuThread]) -> Result<(), Failed> {
    let spawned = log.clone();
    let reaper = confined.run(move || Reaper::spawn(&spawned, Adaptive::default()))?;
    run_passes(vcpus, 2)?;
    let reaper = confined.run(move || {
        reaper.pause();
        reaper.set_policy(Fixed::new(Duration::from_millis(1)));
        reaper.resume();
        reaper
    });
    let before = reaper.stats().passes;
    wait_beside(vcpus, "ten passes of the reaper", || {
        reaper.stats().passes >= before + 10
    })?;
    Ok(confined.run(move || reaper.stop())?)
}

/// All that a VMM does with a log, each on a thread with the filter for it.
fn confined() -> Outcome {
    let support = Confined::to(&[ANY, QUERY])?.run(HostSupport::query)?;
    assert!(support.max_entries >= 1024);
    let vm = TinyVm::new(&kvm_available()?)?;
    let enable = move || {
        let entries = RingEntries::new(1024).expect("a power of two");
        let log = DirtyLog::enable(vm.vm_fd(), entries);
        (vm, log)
    };
    let (vm, log) = Confined::to(&[ANY, ENABLE])?.run(enable);
    let mut machine = Machine::with(vm, log?, &[6000, 500])?;
    let mut vcpus = Vec::new();
    for index in 0..VCPUS {
        let (same, vcpu) = spawn_confined(machine, index)?;
        machine = same;
        vcpus.push(vcpu);
    }
    let log = machine.log.clone();

    // Full exits alone, with syncs beside them; then slots that KVM need not know of.
    let mut rows = vec![ANY, PASS, DROP];
    if support.with_bitmap {
        rows.push(BITMAP);
    }
    let syncing = Confined::to(&rows)?;
    for _ in 0..5 {
        run_passes(&vcpus, 1)?;
        let sync = move || {
            let synced = machine.round();
            (machine, synced)
        };
        let (same, synced) = syncing.run(sync);
        machine = same;
        synced?;
    }
    assert!(log.stats().full_exits() > 0, "{:?}", log.stats());
    let changed = log.clone();
    syncing.run(move || {
        let (log, slot) = (changed, slot_id(9));
        log.add_slot(slot, 1 << 24)?;
        log.mark_dirty(slot, 0, 1 << 20)?;
        log.stop_tracking(slot, || Ok(()))?;
        log.start_tracking(slot, || Ok(()))?;
        log.rearm(|_| Ok(()))?;
        log.rearmed(slot)?;
        let retired = log.retire_slot(slot)?;
        log.finish_slot(&retired)
    })?;

    // A reaper beside them, and one that is refused nothing that it may ask for.
    let reaping = Confined::to(&[ANY, PASS, THREAD, REAPER])?;
    reap(&reaping, &log, &vcpus)?;
    drop(reaping);
    for (rows, priority) in [
        (&[CPUS][..], Priority::Inherited),
        (&[CPUS, NICE], Priority::Nice(5)),
        (&[CPUS, FIFO], Priority::Fifo(1)),
    ] {
        let reaping = Confined::to(&[&[ANY, PASS, THREAD, REAPER], rows].concat())?;
        let log = log.clone();
        let ended = reaping.run(move || {
            let allowed = (0..64).filter(|&cpu| may_run_on(cpu));
            let builder = Reaper::builder().cpus(allowed).priority(priority);
            builder.spawn(&log, Adaptive::default())?.stop()
        });
        match ended {
            // A refusal of the priority by the kernel is not one by the filter.
            Ok(()) | Err(ReaperError::Scheduling { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }

    limit(&log, &vcpus)?;

    // The last sync, and the end of all.
    pause(&vcpus)?;
    let finish = move || {
        let finished = machine.round().and_then(|_| machine.compare());
        (machine, finished)
    };
    let (machine, finished) = syncing.run(finish);
    finished?;
    let mut stats = log.stats();
    // That of the slot that KVM does not know, where rings have bitmaps beside them.
    stats.missing_bitmaps -= u64::from(support.with_bitmap);
    assert_unsuspicious(&stats);
    resume(&vcpus);
    drop(stop(vcpus)?);
    drop(log);
    syncing.run(move || drop(machine));
    let maps = fs::read_to_string("/proc/self/maps")?;
    assert!(!maps.contains("kvm-vcpu"), "rings are mapped:\n{maps}");
    Ok(Completed)
}

/// A limiter, and vCPUs that sleep and are woken.
fn limit(log: &DirtyLog, vcpus: &[VcpuThread]) -> Result<(), Failed> {
    let limiting = Confined::to(&[ANY, THREAD, LIMITER, KICK])?;
    let kickers: Vec<_> = vcpus.iter().map(VcpuThread::kicker).collect();
    let limited = log.clone();
    let limiter = limiting.run(move || {
        limited.set_dirty_limits(NonZeroU64::new(1_000))?;
        Ok::<_, Failed>(Limiter::spawn(&limited, move |vcpu| kickers[vcpu].kick())?)
    })?;
    let slept = || log.stats().vcpus.iter().all(|vcpu| vcpu.limited_ns > 0);
    wait_beside(vcpus, "a sleep of each vCPU", slept)?;
    let log = log.clone();
    limiting.run(move || {
        drop(log.keep_awake());
        log.set_dirty_limits(None)?;
        Ok(limiter.stop()?)
    })
}

/// The same in bitmap mode, but for the vCPU's thread, which calls nothing there.
fn confined_to_bitmaps() -> Outcome {
    let vm = TinyVm::new(&kvm_available()?)?;
    let enable = move || {
        let log = DirtyLog::enable_bitmap(vm.vm_fd());
        (vm, log)
    };
    let (vm, log) = Confined::to(&[ANY, ENABLE_BITMAP])?.run(enable);
    let mut machine = Machine::with(vm, log?, &[6000, 500])?;
    let load = machine.load(Workload::Random, 0, 1);
    let vcpu = machine.vm.create_vcpu(0, &load)?;
    let log = machine.log.clone();
    let attach = move || {
        let ring = log.attach_vcpu(vcpu.fd());
        (vcpu, ring)
    };
    let (vcpu, ring) = Confined::to(&[ANY, ATTACH])?.run(attach);
    let ring = ring?;
    let vcpus = [serve(vcpu, ring)?];
    let syncing = Confined::to(&[ANY, BITMAP, DROP])?;
    for _ in 0..3 {
        run_passes(&vcpus, 1)?;
        let sync = move || {
            let synced = machine.round();
            (machine, synced)
        };
        let (same, synced) = syncing.run(sync);
        machine = same;
        assert!(synced? > 0);
    }
    pause(&vcpus)?;
    let finish = move || {
        let finished = machine.round().and_then(|_| machine.compare());
        let retired = machine.log.retire_slot(slot_id(2));
        (machine, finished, retired)
    };
    let (machine, finished, retired) = syncing.run(finish);
    finished?;
    let _ = retired?;
    resume(&vcpus);
    stop(vcpus)?;
    syncing.run(move || drop(machine));
    Ok(Completed)
}

/// Whether this process was started on that CPU, by one call that its threads may make anyway.
fn may_run_on(cpu: usize) -> bool {
    // SAFETY: cpu_set_t is an array of integers, for which zeroes are a valid value.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: 0 is the calling thread, and the pointer is to a set of the size given.
    let result = unsafe { libc::sched_getaffinity(0, size_of_val(&set), &mut set) };
    // SAFETY: CPU_ISSET indexes the set with `cpu`, which its callers keep below its size.
    result == 0 && unsafe { libc::CPU_ISSET(cpu, &set) }
}

/// A process of its own that does the above, without the call `left_out`.
fn in_a_process(left_out: &str) -> io::Result<Output> {
    let mut suite = Command::new(env::current_exe()?);
    suite.args(["--exact", "seccomp::under_the_filter"]);
    suite.env(WITHOUT, left_out).env("KVM_REQUIRED", "1");
    suite.output()
}

/// All that it has printed.
fn said(child: &Output) -> String {
    let [printed, complaint] =
        [&child.stdout, &child.stderr].map(|text| String::from_utf8_lossy(text));
    format!("the process said:\n{printed}{complaint}")
}

fn under_the_filter() -> Outcome {
    if env::var_os(WITHOUT).is_some() {
        // To be killed is no reason for a core file.
        let none = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: the call reads the struct that it is given.
        unsafe { libc::setrlimit(libc::RLIMIT_CORE, &none) };
        confined()?;
        return confined_to_bitmaps();
    }
    let child = in_a_process("")?;
    let said = said(&child);
    assert!(
        child.status.success(),
        "{}; by SIGSYS, the filter lacks a call, which `strace -f` shows; {said}",
        child.status
    );
    assert!(said.contains("ok. 1 passed; 0 failed;"), "{said}");
    Ok(Completed)
}

/// Each is made in all that the log does on whatever host: so the filter is in force, and the test
/// above fails when one is missing in it.
fn a_call_left_out_is_missed() -> Outcome {
    for call in [
        "fcntl(F_DUPFD_CLOEXEC = 1030)",
        "ioctl(KVM_ENABLE_CAP = 0x4068aea3)",
        "readlink",
        "rt_sigprocmask",
        "getrusage",
        "ioctl(KVM_RESET_DIRTY_RINGS = 0xaec7)",
        "ioctl(KVM_CLEAR_DIRTY_LOG = 0xc018aec0)",
        "futex",
        "prctl(PR_SET_TIMERSLACK = 29)",
        "sched_setaffinity",
        "sched_setscheduler",
        "setpriority",
    ] {
        let known = TABLE.iter().flat_map(|row| row.calls);
        assert!(known.map(Call::text).any(|text| text == call), "{call}");
        let child = in_a_process(call)?;
        let (status, said) = (child.status, said(&child));
        let by_sigsys = status.signal() == Some(libc::SIGSYS);
        assert!(by_sigsys, "without {call}: {status}; {said}");
    }
    Ok(Completed)
}

/// The table that VMMs read and the one above, call by call.
fn security_md_has_the_same_calls() -> Outcome {
    let text = include_str!("../../../SECURITY.md");
    for row in TABLE {
        let start = format!("| {} |", row.when);
        let line = text.lines().find(|line| line.starts_with(&start));
        let line = line.ok_or_else(|| format!("no row in SECURITY.md starts with {start:?}"))?;
        // The last column; what stands in backticks there is a call.
        let last = line.trim_end_matches(" |").rsplit(" | ").next();
        let calls = last.unwrap_or_default().split('`').skip(1).step_by(2);
        let expected: Vec<String> = row.calls.iter().map(Call::text).collect();
        assert_eq!(calls.collect::<Vec<_>>(), expected, "row {:?}", row.when);
    }
    Ok(Completed)
}
