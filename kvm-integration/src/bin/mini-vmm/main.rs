//! A small VMM that migrates its running guest into another process: to be copied from.
//!
//! ```sh
//! cargo run --release --bin mini-vmm
//! ```
//!
//! It starts itself once more as the destination, and is the source itself; `mini-vmm destination
//! SOCKET` and `mini-vmm source SOCKET` are the two by themselves. The guest's vCPUs write memory
//! all the time, and count aloud through a port; a device writes memory, too. The source copies it
//! in rounds meanwhile, stops them, copies the rest, and sends their state. Both compute a checksum
//! of all memory, and fail if the two differ. The guest counts on at the destination, where it left
//! off.
//!
//! | file | is |
//! |---|---|
//! | this one | the migration |
//! | `machine.rs` | the VM: memory, vCPUs' threads, a device |
//! | `kvm.rs` | what it asks of KVM, and the guest's few instructions |
//! | `simulated.rs` | a stand-in for that, without KVM: nothing to copy from |

#[cfg(target_arch = "x86_64")]
mod kvm;
mod machine;
mod simulated;

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::thread::sleep;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use kvm_dirty_ring::pacing::LookFirst;
use kvm_dirty_ring::{DirtyPages, Reaper};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use vm_memory::{GuestAddress, GuestMemoryBackend, ReadVolatile, WriteVolatile};

use machine::{Guest, Machine};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// So few pages that the guest may stand still while they are sent.
const REST: u64 = 256;
/// Rounds after which it is stopped, whatever is left: it may write faster than the link takes.
const MOST_ROUNDS: u32 = 30;
/// How far each vCPU counts before its migration, and after it.
const COUNTS: u32 = 50;
/// Bytes that a message may have.
const LONGEST_MESSAGE: u32 = 1 << 20;

/// Migrates a running guest from one process to another.
#[derive(Parser)]
struct Options {
    /// Simulate the kernel and the guest, also where there is KVM
    #[arg(long, global = true)]
    sim: bool,
    /// Seconds for which the other process, or the guest, may be silent: 1 to 600
    #[arg(long, global = true, default_value_t = 10)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=600))]
    patience: u64,
    #[command(subcommand)]
    role: Option<Role>,
}

#[derive(Subcommand)]
enum Role {
    /// Wait at a socket for a guest, and run it
    Destination { socket: PathBuf },
    /// Run a guest, and send it to a socket
    Source { socket: PathBuf },
}

/// What the source sends behind the pages.
#[derive(Serialize, Deserialize)]
struct Left {
    guest: Guest,
    checksum: u32,
}

/// What the destination answers.
#[derive(Serialize, Deserialize)]
struct Arrived {
    checksum: u32,
    /// How far the vCPUs have counted by then.
    counts: Vec<u32>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let (role, done) = match &options.role {
        Some(Role::Destination { socket }) => ("destination", destination(&options, socket)),
        Some(Role::Source { socket }) => ("source", source(&options, socket)),
        None => ("source", both(&options)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mini-vmm FAILED, {role}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The destination in a process of its own, the source in this one.
fn both(options: &Options) -> Result<()> {
    let socket = std::env::temp_dir().join(format!("mini-vmm-{}.socket", std::process::id()));
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("destination").arg(&socket);
    command.arg(format!("--patience={}", options.patience));
    if options.sim {
        command.arg("--sim");
    }
    let mut child = command.spawn()?;
    let sent = source(options, &socket);
    // It ends by itself: the link is closed by now, and it waits no longer than we do.
    let ended = child.wait()?;
    sent?;
    match ended.success() {
        true => Ok(()),
        false => Err("the destination failed".into()),
    }
}

fn source(options: &Options, socket: &Path) -> Result<()> {
    let patience = Duration::from_secs(options.patience);
    let mut link = Link::new(
        patiently(patience, || UnixStream::connect(socket))?,
        patience,
    )?;
    let machine = Machine::new(options.sim)?;
    machine.load()?;
    let running = machine.start(&Guest::new())?;
    running.count(COUNTS, patience)?;

    let log = running.machine.log.clone();
    let reaper = Reaper::spawn(&log, LookFirst::default())?;
    running.machine.track(true)?;
    let mut dirty = DirtyPages::new();
    for round in 0.. {
        // Nobody knows what was written before the log began: the first sync reports all memory.
        log.sync(&mut dirty)?;
        println!("source: round {round}, {} pages", dirty.page_count());
        if dirty.page_count() <= REST || round == MOST_ROUNDS {
            break;
        }
        link.send_pages(&running.machine, &dirty)?;
    }

    // The guest stands still from here on. What the last sync reported is not sent yet; the final
    // one adds what was written after it.
    let (machine, guest) = running.stop()?;
    link.send_pages(&machine, &dirty)?;
    log.sync(&mut dirty)?;
    println!("source: stopped, {} pages", dirty.page_count());
    link.send_pages(&machine, &dirty)?;
    reaper.stop()?;
    let left = Left {
        guest,
        checksum: machine.checksum()?,
    };
    link.send_end(&left)?;

    let arrived: Arrived = link.receive()?;
    differ(left.checksum, arrived.checksum)?;
    println!("source: all memory arrived, checksum {:08x}", left.checksum);
    for (vcpu, (then, now)) in left.guest.counts().zip(&arrived.counts).enumerate() {
        println!("source: vCPU {vcpu} counted to {then} here, and on to {now} there");
    }
    Ok(())
}

fn destination(options: &Options, socket: &Path) -> Result<()> {
    let patience = Duration::from_secs(options.patience);
    let listener = UnixListener::bind(socket)?;
    listener.set_nonblocking(true)?;
    let accepted = patiently(patience, || listener.accept());
    std::fs::remove_file(socket)?;
    let mut link = Link::new(accepted?.0, patience)?;
    let machine = Machine::new(options.sim)?;
    link.receive_pages(&machine)?;
    let Left { guest, checksum } = link.receive()?;
    let mut arrived = Arrived {
        checksum: machine.checksum()?,
        counts: Vec::new(),
    };
    if arrived.checksum == checksum {
        let running = machine.start(&guest)?;
        running.count(COUNTS, patience)?;
        let (_, guest) = running.stop()?;
        arrived.counts.extend(guest.counts());
    }
    link.send(&arrived)?;
    differ(checksum, arrived.checksum)
}

fn differ(left: u32, arrived: u32) -> Result<()> {
    if left == arrived {
        return Ok(());
    }
    Err(format!("the memory that arrived differs: checksum {arrived:08x}, not {left:08x}").into())
}

/// Tries until it succeeds, for as long as `patience` allows.
fn patiently<T>(patience: Duration, mut attempt: impl FnMut() -> io::Result<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        match attempt() {
            Ok(done) => return Ok(done),
            Err(error) if start.elapsed() > patience => {
                return Err(format!("nobody at the other end for {patience:?}: {error}").into());
            }
            Err(_) => sleep(Duration::from_millis(5)),
        }
    }
}

/// The way to the other process: runs of pages, each behind its address and its length in bytes,
/// until one of no bytes; and messages.
struct Link(UnixStream);

impl Link {
    /// Each call on the socket that takes longer than `patience` fails.
    fn new(socket: UnixStream, patience: Duration) -> Result<Self> {
        // One that was accepted has it from its listener.
        socket.set_nonblocking(false)?;
        socket.set_read_timeout(Some(patience))?;
        socket.set_write_timeout(Some(patience))?;
        Ok(Self(socket))
    }

    fn send_pages(&mut self, machine: &Machine, dirty: &DirtyPages) -> Result<()> {
        for run in dirty.runs() {
            let range = machine
                .map
                .range(run)
                .ok_or("a slot that the map does not know")?;
            self.send_header(range.start, range.end - range.start)?;
            // Straight from guest memory, in which vCPUs may write: then a later sync has the page.
            self.0
                .write_all_volatile(&machine.map.slice(&machine.memory, run)?)?;
        }
        Ok(())
    }

    fn send_header(&mut self, address: u64, bytes: u64) -> io::Result<()> {
        self.0.write_all(&address.to_le_bytes())?;
        self.0.write_all(&bytes.to_le_bytes())
    }

    fn send_end(&mut self, left: &Left) -> Result<()> {
        self.send_header(0, 0)?;
        self.send(left)
    }

    fn receive_pages(&mut self, machine: &Machine) -> Result<()> {
        loop {
            let mut header = [[0; 8]; 2];
            self.0.read_exact(header.as_flattened_mut())?;
            let [address, bytes] = header.map(u64::from_le_bytes);
            if bytes == 0 {
                return Ok(());
            }
            // Whoever sends it does not decide where it goes: the slice is inside of one region.
            let mut slice = machine
                .memory
                .get_slice(GuestAddress(address), bytes as usize)?;
            self.0.read_exact_volatile(&mut slice)?;
        }
    }

    fn send(&mut self, message: &impl Serialize) -> Result<()> {
        let message = serde_json::to_vec(message)?;
        self.0.write_all(&(message.len() as u32).to_le_bytes())?;
        Ok(self.0.write_all(&message)?)
    }

    fn receive<T: DeserializeOwned>(&mut self) -> Result<T> {
        let mut bytes = [0; 4];
        self.0.read_exact(&mut bytes)?;
        let bytes = u32::from_le_bytes(bytes);
        if bytes > LONGEST_MESSAGE {
            return Err(format!("a message of {bytes} bytes: at most {LONGEST_MESSAGE}").into());
        }
        let mut message = vec![0; bytes as usize];
        self.0.read_exact(&mut message)?;
        Ok(serde_json::from_slice(&message)?)
    }
}
