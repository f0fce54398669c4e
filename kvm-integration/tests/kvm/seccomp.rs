// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The log under exactly the seccomp filter that SECURITY.md lists for VMMs.
//!
//! A call that is not in the filter kills the process; so it is another process, this suite run
//! again, that installs it.

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
use kvm_dirty_ring::{DirtyLog, EventReaper, HostSupport, Limiter, Priority, Reaper, RingEntries};
use kvm_integration::{Action, Exit, TinyVm, VcpuThread, Workload, kvm_available};
use libtest_mimic::Completion::Completed;
use libtest_mimic::Failed;
use seccompiler::{BpfMap, BpfProgram, apply_filter, compile_from_json};
use serde_json::{Map, Value, json};

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

/// The rows of the table in SECURITY.md, by what they are for: a filter each, in seccompiler's form. Each call that has a
/// value to look at carries that value's name as a comment.
const FILTERS: &str = include_str!("../../../docs/seccomp.json");

/// A row's name.
type Row = &'static str;

const ANY: Row = "any call";
const QUERY: Row = "query the host";
const ENABLE: Row = "enable";
const ENABLE_BITMAP: Row = "enable bitmaps";
const ATTACH: Row = "attach a vCPU";
const BEGIN: Row = "begin to log";
const PASS: Row = "pass";
const BITMAP: Row = "take bitmaps";
const THREAD: Row = "start and end a thread";
const REAPER: Row = "reaper";
const MAKE_EVENT_REAPER: Row = "make an event reaper";
const EVENT_REAPER: Row = "event reaper";
const LIMITER: Row = "limiter";
const CPUS: Row = "reaper with `cpus`";
const NICE: Row = "reaper with `Priority::Nice`";
const FIFO: Row = "reaper with `Priority::Fifo`";
const DROP: Row = "drop the last handle";

/// What this test itself does on threads with a filter: print a failure, end the thread, hand over
/// results; not the log's business, so not in that file.
const TEST: Row = "this test";
/// The same on a vCPU's thread.
const VCPU: Row = "this test's vCPU";
/// The kick that this test gives a limiter: the VMM's own.
const KICK: Row = "this test's kick";
/// With debug assertions, the standard library looks at each descriptor that it is to close.
const DEBUG: Row = "debug assertions";

/// The file's filters.
fn filters() -> Result<Map<String, Value>, Failed> {
    Ok(serde_json::from_str(FILTERS)?)
}

/// What a row lets pass.
fn rules(row: Row) -> Result<Vec<Value>, Failed> {
    let plain = |calls: &[&str]| {
        calls
            .iter()
            .map(|call| json!({ "syscall": call }))
            .collect()
    };
    let with = |call: &str, name: &str, value: u64| {
        let argument =
            json!({ "index": 1, "type": "dword", "op": "eq", "val": value, "comment": name });
        json!({ "syscall": call, "args": [argument] })
    };
    Ok(match row {
        TEST => plain(&[
            "write",
            "sched_yield",
            "rt_sigprocmask",
            "sigaltstack",
            "exit",
        ]),
        VCPU => vec![
            with("ioctl", "KVM_RUN", 0xae80),
            json!({ "syscall": "rt_sigreturn" }),
        ],
        KICK => plain(&["getpid", "tgkill"]),
        DEBUG if cfg!(debug_assertions) => vec![with("fcntl", "F_GETFD", 1)],
        DEBUG => Vec::new(),
        _ => {
            let filters = filters()?;
            let rules = filters
                .get(row)
                .and_then(|filter| filter["filter"].as_array());
            let rules = rules.ok_or_else(|| format!("docs/seccomp.json has no {row:?}"))?;
            rules.clone()
        }
    })
}

/// A rule as it is written in SECURITY.md.
fn text(rule: &Value) -> String {
    let call = rule["syscall"].as_str().unwrap_or("no call");
    let Some(argument) = rule["args"].get(0) else {
        return call.into();
    };
    let name = argument["comment"].as_str().unwrap_or("no name");
    match argument["val"].as_u64() {
        None => format!("{call}({name} = no number)"),
        Some(value) if value < 1 << 12 => format!("{call}({name} = {value})"),
        Some(value) => format!("{call}({name} = {value:#x})"),
    }
}

/// Programs by name.
fn compiled(filters: &str) -> Result<BpfMap, Failed> {
    // There the C library reads links by a call that takes a directory, too.
    let filters = match env::consts::ARCH {
        "aarch64" => filters.replace("\"readlink\"", "\"readlinkat\""),
        _ => filters.into(),
    };
    let architecture = env::consts::ARCH.try_into()?;
    Ok(compile_from_json(filters.as_bytes(), architecture)?)
}

/// The calls that musl makes in place of one of glibc's, or after it, as SECURITY.md says.
fn of_musl(rule: &Value) -> Vec<Value> {
    let closed_on_exec = || {
        let argument = json!({ "index": 1, "type": "dword", "op": "eq", "val": libc::F_SETFD });
        json!({ "syscall": "fcntl", "args": [argument] })
    };
    match rule["syscall"].as_str() {
        Some("openat") => vec![json!({ "syscall": "open" }), closed_on_exec()],
        Some("fcntl") => vec![closed_on_exec()],
        Some("statx") => vec![json!({ "syscall": "fstat" })],
        _ => Vec::new(),
    }
}

/// A filter that lets pass what is in `rows`, but for the call that is to be left out, and kills
/// the process for any other.
fn filter(rows: &[Row]) -> Result<BpfProgram, Failed> {
    let left_out = env::var(WITHOUT)?;
    let mut allowed = Vec::new();
    for row in rows {
        allowed.extend(rules(row)?);
    }
    allowed.retain(|rule| text(rule) != left_out);
    if cfg!(target_env = "musl") {
        let theirs: Vec<_> = allowed.iter().flat_map(of_musl).collect();
        allowed.extend(theirs);
    }
    let filter = json!({
        "mismatch_action": "kill_process",
        "match_action": "allow",
        "filter": allowed,
    });
    let mut compiled = compiled(&json!({ "thread": filter }).to_string())?;
    Ok(compiled.remove("thread").ok_or("no filter")?)
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
    let mut to_install = Some(filter(&[ANY, PASS, EVENT_REAPER, VCPU, TEST, DEBUG])?);
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
    rows.push(BEGIN);
    Confined::to(&rows)?.run(move || {
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

    tick(&log, &vcpus)?;
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

/// A reaper in an event loop, which full exits wake.
fn tick(log: &DirtyLog, vcpus: &[VcpuThread]) -> Result<(), Failed> {
    let looping = Confined::to(&[ANY, PASS, MAKE_EVENT_REAPER, EVENT_REAPER])?;
    let theirs = log.clone();
    let mut reaper = looping.run(move || EventReaper::new(&theirs, Fixed::default()))?;
    let woken = log.stats().reaper.woken;
    let mut rounds = 0;
    while log.stats().reaper.woken < woken + 3 {
        rounds += 1;
        assert!(rounds < 1000, "full exits do not wake it");
        run_passes(vcpus, 1)?;
        let (same, ticked) = looping.run(move || {
            let ticked = reaper.tick();
            (reaper, ticked)
        });
        reaper = same;
        ticked?;
    }
    looping.run(move || drop(reaper));
    Ok(())
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
        "timerfd_settime",
    ] {
        let filters = filters()?;
        let rules = filters
            .values()
            .flat_map(|filter| filter["filter"].as_array());
        assert!(rules.flatten().any(|rule| text(rule) == call), "{call}");
        let child = in_a_process(call)?;
        let (status, said) = (child.status, said(&child));
        let by_sigsys = status.signal() == Some(libc::SIGSYS);
        assert!(by_sigsys, "without {call}: {status}; {said}");
    }
    Ok(Completed)
}

/// The table that people read and the file that seccompiler reads, call by call.
fn security_md_has_the_same_calls() -> Outcome {
    let filters = filters()?;
    assert_eq!(compiled(FILTERS)?.len(), filters.len());
    let text_of = include_str!("../../../SECURITY.md");
    let section = text_of
        .split("## System calls, for a seccomp filter")
        .nth(1);
    let section = section.and_then(|rest| rest.split("\n## ").next());
    let rows = section.unwrap_or_default().lines();
    let rows: Vec<&str> = rows.filter(|line| line.starts_with("| ")).skip(1).collect();
    assert_eq!(rows.len(), filters.len(), "rows of SECURITY.md");
    for (row, (when, filter)) in rows.iter().zip(&filters) {
        let start = format!("| {when} |");
        assert!(
            row.starts_with(&start),
            "{row:?} does not start with {start:?}"
        );
        // The last column; what stands in backticks there is a call.
        let last = row.trim_end_matches(" |").rsplit(" | ").next();
        let calls = last.unwrap_or_default().split('`').skip(1).step_by(2);
        let rules = filter["filter"].as_array().ok_or("no rules")?;
        let expected: Vec<String> = rules.iter().map(text).collect();
        assert_eq!(calls.collect::<Vec<_>>(), expected, "row {when:?}");
        assert_eq!(filter["mismatch_action"], "kill_process", "{when:?}");
        assert_eq!(filter["match_action"], "allow", "{when:?}");
    }
    Ok(Completed)
}
