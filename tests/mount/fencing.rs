//! A mount that does not let go by itself: it is stopped, killed, unmounted lazily, or kmsd was started anew meanwhile. What
//! counts is what a process that holds files of it can still read once DisableKey has returned.

use crate::world::{World, eventually, noise};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::ptr::null_mut;

const SIZE: usize = 1 << 20;
/// A mount that has this long to go dark; kmsd waits two seconds more.
const SHORT: &[&str] = &["-o", "drain_max_ms=100"];

/// A mounted volume with a file that is cached, and that another process has open and mapped. This one has not: whatever it
/// starts would close a copy, and wait for a mount that is stopped.
fn with_cached_file(options: &[&str]) -> (World, Holder) {
    let mut world = World::unmounted();
    let holder = mount_and_hold(&mut world, options);
    (world, holder)
}

fn mount_and_hold(world: &mut World, options: &[&str]) -> Holder {
    world.mount(options);
    let bytes = noise(7, SIZE);
    let mut file = File::create(world.at("file")).unwrap();
    file.write_all(&bytes).unwrap();
    // What is not, a killed mount loses like a power cut.
    file.sync_all().unwrap();
    drop(file);
    assert_eq!(fs::read(world.at("file")).unwrap(), bytes);
    let holder = Holder::of(world);
    assert_eq!(holder.sees(), (true, true));
    holder
}

/// Names the socket to the process that holds files.
const ROLE: &str = "CMKFS_TEST_HOLDER";

/// A process that has a file open and mapped, and tells what it can read of it.
struct Holder {
    process: Child,
    questions: UnixStream,
}

impl Holder {
    fn of(world: &World) -> Self {
        let socket = world.path("holder.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "fencing::holder"])
            .env(ROLE, &socket)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let (questions, _) = listener.accept().unwrap();
        let holder = Self { process, questions };
        assert_eq!(holder.ask(world.at("file").to_str().unwrap()), "ready");
        holder
    }

    fn ask(&self, line: &str) -> String {
        let mut questions = &self.questions;
        writeln!(questions, "{line}").unwrap();
        let mut answer = String::new();
        BufReader::new(questions).read_line(&mut answer).unwrap();
        answer.trim_end().to_owned()
    }

    /// Whether any page can be read through the open file, and through a mapping.
    fn sees(&self) -> (bool, bool) {
        let answer = self.ask("sees");
        let (open, mapped) = answer.split_once(' ').unwrap();
        (open.parse().unwrap(), mapped.parse().unwrap())
    }

    /// Writes something that only the page cache holds.
    fn dirty(&self) {
        assert_eq!(self.ask("dirty"), "done");
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

/// The holding process; with every other run of the tests it has nothing to do.
#[test]
fn holder() {
    let Ok(socket) = std::env::var(ROLE) else {
        return;
    };
    let stream = UnixStream::connect(socket).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let answer = |text: String| writeln!(&stream, "{text}").unwrap();
    let path = lines.next().unwrap().unwrap();
    let file = File::options().read(true).write(true).open(path).unwrap();
    let map = |how| {
        // SAFETY: a new mapping at an address that the kernel chooses; its pages are touched by the kernel alone.
        let map = unsafe { libc::mmap(null_mut(), SIZE, libc::PROT_READ, how, file.as_raw_fd(), 0) };
        assert_ne!(map, libc::MAP_FAILED);
        map.cast::<u8>()
    };
    let maps = [map(libc::MAP_SHARED), map(libc::MAP_PRIVATE)];
    let (mut taken, given) = std::io::pipe().unwrap();
    answer("ready".to_owned());
    for line in lines {
        match line.unwrap().as_str() {
            "dirty" => {
                file.write_all_at(b"dirty", 8192).unwrap();
                answer("done".to_owned());
            }
            _ => {
                let mut pages = (0..SIZE).step_by(4096);
                let mut byte = [0];
                let open = pages
                    .clone()
                    .any(|page| file.read_at(&mut byte, page as u64).is_ok());
                // write(2) fails with EFAULT where a load would be answered by SIGBUS.
                let mapped = pages.any(|page| {
                    maps.iter().any(|map| {
                        // SAFETY: the address lies within the mapping.
                        let written = unsafe { libc::write(given.as_raw_fd(), map.add(page).cast(), 1) };
                        written == 1 && taken.read(&mut byte).unwrap() == 1
                    })
                });
                answer(format!("{open} {mapped}"));
            }
        }
    }
}

/// What systemd does for a service with FileDescriptorStoreMax=: keeps descriptors (sd_notify(3), FDSTORE), and starts the
/// service's next process with them (sd_listen_fds(3)).
struct ServiceManager {
    path: PathBuf,
    socket: UnixDatagram,
    kept: BTreeMap<String, OwnedFd>,
}

/// Descriptors that are passed come to lie from here on (SD_LISTEN_FDS_START).
const FIRST_PASSED: i32 = 3;
/// No descriptor that is passed on lies below this before.
const KEPT_FROM: i32 = 100;

impl ServiceManager {
    fn of(world: &World) -> Self {
        let path = world.path("notify.sock");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_nonblocking(true).unwrap();
        Self {
            path,
            socket,
            kept: BTreeMap::new(),
        }
    }

    /// Starts kmsd, with what earlier ones have stored.
    fn start(&self, world: &mut World) {
        let kmsd = world.kmsd_command();
        let mut command = Command::new("sh");
        // The number of the process is known to itself alone.
        command
            .args(["-c", "LISTEN_PID=$$ exec \"$@\"", "sh"])
            .arg(kmsd.get_program())
            .args(kmsd.get_args())
            .env("NOTIFY_SOCKET", &self.path)
            .env("LISTEN_FDS", self.kept.len().to_string());
        if !self.kept.is_empty() {
            let names: Vec<_> = self.kept.keys().map(String::as_str).collect();
            command.env("LISTEN_FDNAMES", names.join(":"));
        }
        let kept: Vec<_> = self.kept.values().map(AsRawFd::as_raw_fd).collect();
        let pass = move || {
            for (descriptor, place) in kept.iter().zip(FIRST_PASSED..) {
                // SAFETY: takes two numbers.
                if unsafe { libc::dup2(*descriptor, place) } < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: between fork(2) and execve(2) it makes async-signal-safe calls alone.
        unsafe { command.pre_exec(pass) };
        world.start_kmsd_by(command);
    }

    /// Takes what was stored so far.
    fn take(&mut self) {
        loop {
            let mut bytes = [0; 4096];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let received = rustix::net::recvmsg(
                &self.socket,
                &mut [IoSliceMut::new(&mut bytes)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            );
            let Ok(received) = received else {
                return;
            };
            let text = str::from_utf8(&bytes[..received.bytes]).unwrap();
            let name = text.lines().find_map(|line| line.strip_prefix("FDNAME="));
            let stores = text.lines().any(|line| line == "FDSTORE=1");
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                    for descriptor in descriptors {
                        assert!(stores, "{text}");
                        let high = rustix::io::fcntl_dupfd_cloexec(&descriptor, KEPT_FROM).unwrap();
                        self.kept.insert(name.unwrap().to_owned(), high);
                    }
                }
            }
        }
    }
}

fn disable(world: &World) -> Result<(), String> {
    world.kmsctl(&["disable-key", "--key-id", &world.key]).map(|_| ())
}

#[test]
fn a_stopped_mount_is_ended_and_shows_nothing() {
    let (mut world, holder) = with_cached_file(SHORT);
    // Dirty pages, too, which nobody will write back.
    holder.dirty();
    world.signal_mount(libc::SIGSTOP);
    disable(&world).unwrap();
    assert_eq!(holder.sees(), (false, false));
    assert!(!world.wait_for_mount().success());
    drop(holder);
    world.clear_mountpoint();
    world.with_key("enable-key");
    world.mount(&[]);
    assert_eq!(fs::read(world.at("file")).unwrap().len(), SIZE);
}

#[test]
fn a_killed_mount_shows_nothing_and_its_users_do_not_hang() {
    let (mut world, holder) = with_cached_file(SHORT);
    holder.dirty();
    world.end_mount(libc::SIGKILL);
    // Nothing was revoked, but nobody is left who could be told.
    eventually("what a killed mount cached is dropped", || {
        holder.sees() == (false, false)
    });
    disable(&world).unwrap();
    assert_eq!(holder.sees(), (false, false));
}

#[test]
fn a_mount_that_was_unmounted_lazily_is_told_like_any_other() {
    let (world, holder) = with_cached_file(&[]);
    world.detach();
    assert_eq!(holder.sees(), (true, true));
    disable(&world).unwrap();
    assert_eq!(holder.sees(), (false, false));
    world.with_key("enable-key");
    eventually("the open file can be read again", || {
        holder.sees() == (true, true)
    });
}

#[test]
fn a_kmsd_that_was_started_anew_knows_the_holders_of_the_one_before() {
    let (mut world, holder) = with_cached_file(&[]);
    world.stop_kmsd(libc::SIGKILL);
    world.start_kmsd();
    // The mount may or may not have found it yet.
    disable(&world).unwrap();
    assert_eq!(holder.sees(), (false, false));
}

#[test]
fn a_stopped_mount_that_a_new_kmsd_cannot_reach_is_named_until_it_is_gone() {
    let (mut world, holder) = with_cached_file(SHORT);
    let pid = world.mount_pid();
    world.signal_mount(libc::SIGSTOP);
    world.stop_kmsd(libc::SIGKILL);
    world.start_kmsd();
    for _ in 0..2 {
        let error = disable(&world).unwrap_err();
        assert!(error.starts_with("RevocationIncomplete: "), "{error}");
        assert!(error.contains(&format!("process {pid} of uid 0")), "{error}");
        assert_eq!(world.key_state(), "Disabled");
    }
    assert!(!world.wait_for_mount().success());
    drop(holder);
    world.detach();
    disable(&world).unwrap();
}

#[test]
fn a_stopped_mount_is_ended_by_a_new_kmsd_that_was_given_its_descriptors() {
    let mut world = World::unmounted();
    world.stop_kmsd(libc::SIGTERM);
    let mut manager = ServiceManager::of(&world);
    manager.start(&mut world);
    let holder = mount_and_hold(&mut world, SHORT);
    holder.dirty();
    manager.take();
    assert_eq!(manager.kept.len(), 3, "{:?}", manager.kept);
    world.signal_mount(libc::SIGSTOP);
    // Twice: what it was given is not stored anew by a mount that is stopped.
    for _ in 0..2 {
        world.stop_kmsd(libc::SIGKILL);
        manager.start(&mut world);
        manager.take();
    }
    disable(&world).unwrap();
    assert_eq!(holder.sees(), (false, false));
    assert!(!world.wait_for_mount().success());
}

#[test]
fn what_a_mount_cached_before_it_was_killed_without_a_kmsd_counts_until_it_is_gone() {
    let (mut world, holder) = with_cached_file(SHORT);
    world.stop_kmsd(libc::SIGKILL);
    world.end_mount(libc::SIGKILL);
    assert!(holder.sees().1);
    world.start_kmsd();
    let error = disable(&world).unwrap_err();
    assert!(error.starts_with("RevocationIncomplete: "), "{error}");
    drop(holder);
    world.detach();
    disable(&world).unwrap();
}

#[test]
fn a_mount_that_ended_in_order_is_no_holder() {
    let (mut world, holder) = with_cached_file(&[]);
    drop(holder);
    world.unmount();
    world.stop_kmsd(libc::SIGTERM);
    world.start_kmsd();
    disable(&world).unwrap();
}
