//! The vCPU thread and its drivers around guests of a few bytes.

#[path = "../executable/mod.rs"]
mod executable;
mod gathering;
#[expect(dead_code, reason = "of what records and replays, these tests need a part")]
#[path = "../recording/mod.rs"]
mod recording;

use std::sync::Arc;
use std::time::{Duration, Instant};

use executable::executable;
use ft::{Control, Event};
use recording::{guest, replay};
use rt_channel::{bounded, unbounded};
use virtio_devices::BlockRequest;
use virtio_devices::net::Offloads;
use vmm::boot::{BootFile, Payload};
use vmm::config::{ConsoleMode, VmConfig};
use vmm::guest::{Guest, GuestError};
use vmm::machine::HostFacts;
use vmm::run_loop::live::{Live, Next};
use vmm::run_loop::outgoing::Outlet;
use vmm::run_loop::recorder::{Feedback, FromVcpu, Recorder};
use vmm::run_loop::{Command, Mailbox, Message, Observer, VcpuThread, ask};
use vmm_sys_util::eventfd::EventFd;

/// JMP to itself.
const SPIN: &[u8] = &[0xeb, 0xfe];
/// UD2, with no handler for it: a triple fault.
const FAULT: &[u8] = &[0x0f, 0x0b];

/// A host without devices.
struct Nothing;

impl Outlet for Nothing {
    fn block(&self, _device: u8, _request: BlockRequest) {}
    fn block_patiently(&self, _device: u8, _request: BlockRequest) {}
    fn frames(&self, _device: u8, _frames: &[Vec<u8>]) {}
    fn frames_taken(&self, _device: u8) {}
    fn set_offloads(&self, _device: u8, _offloads: Offloads) {}
    fn console_taken(&self, _device: u8) {}
    fn serial_taken(&self) {}
    fn console(&self, _device: u8, _bytes: &[u8]) {}
    fn serial(&self, _bytes: &[u8]) {}
    fn entropy(&self, _device: u8, _len: u32) {}
    fn close_disks(&self) {}
    fn open_disks(&self) {}
    fn set_write_through(&self, _on: bool) -> Result<(), String> {
        Ok(())
    }
    fn set_lease(&self, _until: Option<Duration>) {}
    fn announce(&self) {}
}

impl Observer for Nothing {
    fn powered_off(&self) {}
    fn rebooted(&self) {}
    fn paused(&self, _paused: bool) {}
    fn failed(&self, error: &GuestError) {
        panic!("{error}");
    }
}

/// A guest that executes `code`, with the network of `config`, serial port attached.
fn guest_of(code: &[u8], mut config: VmConfig) -> Guest {
    config.memory.size = 16 << 20;
    config.serial.mode = ConsoleMode::Null;
    config.console.mode = ConsoleMode::Off;
    config.complete(|| [0; 5]);
    let host = HostFacts { boot_wall_ns: 0, disk_sectors: Vec::new() };
    let kernel = BootFile { path: "code".into(), content: executable(code) };
    let payload = Payload { kernel, initramfs: None, cmdline: String::new() };
    guest(&config, &host, &Arc::new(payload))
}

#[test]
fn what_a_user_asks_for_waits_while_a_copy_is_made() {
    let guest = guest_of(SPIN, VmConfig::default());
    let mailbox = Mailbox::new(&guest);
    let thread =
        VcpuThread::live(guest, Arc::new(Nothing), false, mailbox, Arc::new(Nothing)).unwrap();
    let inbox = thread.inbox();
    assert!(!ask(inbox, Command::Freeze).unwrap().paused);
    let (reply, paused) = bounded(1);
    inbox.send(Message::Command(Command::Pause(reply)));
    let (reply, pressed) = bounded(1);
    inbox.send(Message::Command(Command::Control(Control::PowerButton, reply)));
    // Answered after what came before it has been looked at.
    ask(inbox, Command::Look).unwrap();
    assert!(paused.try_recv().is_err() && pressed.try_recv().is_err());
    inbox.send(Message::Command(Command::Thaw));
    paused.recv().unwrap().unwrap();
    pressed.recv().unwrap().unwrap();

    ask(inbox, Command::Resume).unwrap();
    ask(inbox, Command::Freeze).unwrap();
    let (reply, paused) = bounded(1);
    inbox.send(Message::Command(Command::Pause(reply)));
    inbox.send(Message::Command(Command::Halt));
    assert!(!matches!(paused.recv(), Ok(Ok(()))), "a halted guest is not paused");
}

#[test]
fn what_comes_while_the_log_is_full_waits_for_room() {
    let guest = guest_of(SPIN, VmConfig::default());
    let (mailbox, point) = (Mailbox::new(&guest), guest.point());
    let thread =
        VcpuThread::live(guest, Arc::new(Nothing), false, mailbox, Arc::new(Nothing)).unwrap();
    let inbox = thread.inbox();
    let point_now = ask(inbox, Command::Freeze).unwrap().point;
    assert!(point_now >= point);
    let (sink, flushes) = unbounded();
    let (waker, feedback) = (Arc::new(EventFd::new(0).unwrap()), Arc::new(Feedback::default()));
    let recorder = Recorder::new(point_now, sink, waker, Arc::clone(&feedback));
    feedback.set_stalled(true);
    ask(inbox, |reply| Command::Record(Box::new(recorder), reply)).unwrap();
    for _ in 0..100 {
        inbox.send(Message::Event(Event::SerialInput { bytes: vec![b'x'; 1000] }));
    }
    ask(inbox, Command::Look).unwrap();
    let bytes_logged = |wait: usize| {
        let mut bytes = 0;
        loop {
            let message = if bytes < wait { flushes.recv().ok() } else { flushes.try_recv().ok() };
            let Some(FromVcpu::Flush(flush)) = message else { return bytes };
            bytes += flush.bytes.len();
        }
    };
    assert!(bytes_logged(0) < 1000, "input went into a full log");
    feedback.set_stalled(false);
    inbox.send(Message::Wake);
    assert!(bytes_logged(100_000) >= 100_000);
}

#[test]
fn what_comes_right_after_a_triple_fault_reaches_the_machine_that_starts_over() {
    let mut primary = guest_of(FAULT, VmConfig::default());
    let (sink, flushes) = unbounded();
    let waker = Arc::new(EventFd::new(0).unwrap());
    let recorder = Recorder::new(primary.point(), sink, waker, Arc::default());
    let mut live = Live::new(&primary, Arc::new(Nothing), primary.tsc(), Instant::now());
    live.start_recording(&primary, Box::new(recorder));
    while live.advance(&mut primary).unwrap() != Next::Rebooted {}
    live.apply(&mut primary, Event::SerialInput { bytes: b"hello".to_vec() }).unwrap();
    live.digest(&mut primary).unwrap();
    let mut log = Vec::new();
    while let Ok(FromVcpu::Flush(flush)) = flushes.try_recv() {
        log.extend(flush.bytes);
    }

    let mut backup = guest_of(FAULT, VmConfig::default());
    let (_, _, equal) = replay(&mut backup, log.as_slice());
    assert_eq!((equal, backup.point()), (1, primary.point()));
}
