// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A small VMM that migrates its running guest into another process: `cargo run --bin mini-vmm`, or
//! `-- --sim`. It starts itself once more as the destination, at the other end of a Unix socket. Memory
//! goes in rounds while vCPU and device write it; once they are stopped, the rest, and the vCPU's state.
//!
//! To be copied from. `machine.rs` is the VM, `kvm.rs` what it asks of KVM, and a file by the name of the
//! processor has what differs, and the guest.
//! `simulated.rs` stands in for KVM where there is none: nothing to copy from.

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(tiny_guest)]
mod kvm;
mod machine;
mod simulated;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use std::io::{Read, Write, stdin};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kvm_dirty_ring::convergence::{Convergence, Decision, Extent, Observation, Terms};
use kvm_dirty_ring::{DirtyPages, DirtyPart, LastPages, Reaper, WorkingSet, pacing::Adaptive};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, ReadVolatile, WriteVolatile};

use machine::{COUNT, Machine, PATIENCE, SLOT};

/// For so long the guest may be stopped.
const DOWNTIME: Duration = Duration::from_millis(10);

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let sim = args.iter().any(|arg| arg == "--sim");
    if args.iter().any(|arg| arg == "destination") {
        // Stdin is its end of the socket.
        let socket = UnixStream::from(stdin().as_fd().try_clone_to_owned()?);
        return receive_guest(socket, sim).context("the destination failed");
    }
    ensure!(args.len() == usize::from(sim), "usage: mini-vmm [--sim]");
    let (socket, theirs) = UnixStream::pair()?;
    let mut child = std::process::Command::new(std::env::current_exe()?)
        .args(args)
        .arg("destination")
        .stdin(OwnedFd::from(theirs))
        .spawn()?;
    let sent = send_guest(socket, sim).context("the source failed");
    if sent.is_err() {
        child.kill()?;
    }
    child.wait()?;
    sent
}

fn send_guest(mut socket: UnixStream, sim: bool) -> Result<()> {
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    let (machine, vcpu) = simulated::create_unless_kvm(sim)?;
    let thread = machine.start(vcpu, Value::Null)?;

    let log = &machine.log;
    let reaper = Reaper::spawn(log, Adaptive::default())?;
    log.start_tracking(SLOT, || (machine.set_logged)(true))?;
    // Any page may have been written until now: the first round sends all memory, and measures the link.
    let (start, mut dirty) = (Instant::now(), DirtyPages::new());
    log.sync(&mut dirty)?;
    let sent = send_pages(&mut socket, &machine, &dirty.part())?;
    let rate = sent.pages as f64 / start.elapsed().as_secs_f64();
    let mut link = Terms::new(rate, DOWNTIME);
    // So many pages stay open, and are sent in the end. Without refreshes, no more than that.
    log.set_working_set(Some(WorkingSet::new(link.places()).at_most(link.places())));
    let mut convergence = Convergence::new();
    loop {
        log.sync(&mut dirty)?;
        let [others, members] = [dirty.others(), dirty.members()].map(|part| extent(&part));
        let decision = convergence.decide(&Observation::new(link, others, members));
        println!("{others:?}, {decision:?}");
        // What does not get there by itself is ended all the same: this guest is small.
        if decision != Decision::GoOn || start.elapsed() > PATIENCE {
            break;
        }
        let begin = Instant::now();
        let sent = send_pages(&mut socket, &machine, &dirty.others())?;
        // Short runs cost more than their pages: each has a header.
        link.learn_run_cost(sent, begin.elapsed());
    }
    let state = machine.stop(thread)?;
    // What was found and not sent goes with the rest, each page once.
    log.put_back(&dirty)?;
    // Complete, for nobody writes any more: neither vCPU nor device. So nothing need be protected.
    let mut last = LastPages::new();
    log.last_sync(&mut last)?;
    send_pages(&mut socket, &machine, &last.part())?;
    reaper.stop()?;

    let (here, checksum): (u32, _) = (machine.memory.read_obj(COUNT)?, machine.checksum()?);
    send(&mut socket, &(0, 0))?;
    send(&mut socket, &(state, checksum))?;
    let there: u32 = receive(&mut socket)?;
    println!("all memory arrived, checksum {checksum:08x}; counted to {here}, and on to {there}");
    Ok(())
}

/// How many pages there are, in how many messages.
fn extent(pages: &DirtyPart<'_>) -> Extent {
    Extent {
        pages: pages.page_count(),
        runs: pages.runs().count() as u64,
    }
}

/// Sends these pages. Returns how much that was.
fn send_pages(socket: &mut UnixStream, machine: &Machine, pages: &DirtyPart<'_>) -> Result<Extent> {
    println!("{} pages to send", pages.page_count());
    for run in pages.runs() {
        let range = machine.map.range(run).context("a run of no slot")?;
        send(socket, &(range.start, range.end - range.start))?;
        // Straight from guest memory, in which vCPUs may write: then a later sync has the page.
        socket.write_all_volatile(&machine.map.slice(&machine.memory, run)?)?;
    }
    Ok(extent(pages))
}

fn receive_guest(mut socket: UnixStream, sim: bool) -> Result<()> {
    socket.set_read_timeout(Some(PATIENCE))?;
    let (machine, vcpu) = simulated::create_unless_kvm(sim)?;
    while let (address, bytes @ 1..) = receive(&mut socket)? {
        // The sender cannot choose where it goes: a slice is within one region.
        let mut slice = machine.memory.get_slice(GuestAddress(address), bytes)?;
        socket.read_exact_volatile(&mut slice)?;
    }
    let (state, checksum): (Value, u32) = receive(&mut socket)?;
    ensure!(machine.checksum()? == checksum, "the checksums differ");
    machine.stop(machine.start(vcpu, state)?)?;
    send(&mut socket, &machine.memory.read_obj::<u32>(COUNT)?)
}

fn send(socket: &mut UnixStream, message: &impl Serialize) -> Result<()> {
    Ok(socket.write_all(&serde_json::to_vec(message)?)?)
}

/// Reads to the closing bracket and not a byte further; no more than 1 MiB.
fn receive<T: DeserializeOwned>(socket: &mut UnixStream) -> Result<T> {
    let mut json = serde_json::Deserializer::from_reader(socket.take(1 << 20));
    T::deserialize(&mut json).context("the other process is gone or silent, or talks nonsense")
}
