//! What becomes of outputs when a pair ends, and of a guest whose log nobody takes.

use std::net::{TcpListener, TcpStream};
use std::sync::Mutex;

use ft::{DiskMode, DiskReads, Entry, Event, FileArbiter, OutputNumber, PairId, Terms};
use hypervisor::Kick;
use virtio_devices::BlockRequest;
use virtio_devices::net::Offloads;

use super::*;
use crate::boot::BootFile;
use crate::pair::tls::Security;
use crate::run_loop::recorder::Flush;

/// The numbers of the outputs that have left.
#[derive(Default)]
struct Left(Mutex<Vec<u64>>);

impl Outlet for Left {
    fn serial(&self, bytes: &[u8]) {
        self.0.lock().unwrap().push(u64::from_le_bytes(bytes.try_into().unwrap()));
    }
    fn block(&self, _: u8, _: BlockRequest) {}
    fn block_patiently(&self, _: u8, _: BlockRequest) {}
    fn frames(&self, _: u8, _: &[Vec<u8>]) {}
    fn frames_taken(&self, _: u8) {}
    fn set_offloads(&self, _: u8, _: Offloads) {}
    fn console(&self, _: u8, _: &[u8]) {}
    fn console_taken(&self, _: u8) {}
    fn serial_taken(&self) {}
    fn entropy(&self, _: u8, _: u32) {}
    fn close_disks(&self) {}
    fn open_disks(&self) {}
    fn set_write_through(&self, _: bool) -> Result<(), String> {
        Ok(())
    }
    fn set_lease(&self, _: Option<Duration>) {}
    fn announce(&self) {}
}

struct Nobody;

impl PrimaryObserver for Nobody {
    fn changed(&self, _: &'static str, _: Option<&str>) {}
    fn accepted(&self) {}
    fn protected(&self) {}
    fn abandoned(&self, _: &str) {}
    fn alone(&self, _: Generation, _: &Failover) {}
    fn halted(&self, _: &str) {}
    fn diverged(&self, _: ExecutionPoint, _: &Unequal) {}
}

impl Kick for Nobody {
    fn kick(&self) {}
}

fn terms() -> Terms {
    Terms {
        pair: PairId::new("vm").unwrap(),
        generation: Generation(1),
        timing: ft::Timing::default(),
        log_buffer_bytes: 1 << 20,
        arbiter_url: "file:/nowhere".into(),
        disk_mode: DiskMode::Shared,
        same_host: true,
        disk_reads: DiskReads::Log,
        standbys: Vec::new(),
        standby: "tcp:b:7700".into(),
    }
}

/// The ft thread's side, what its guest's thread is told, and the peer.
fn side(outlet: &Arc<Left>) -> (PrimarySide, Receiver<run_loop::Message>, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (peer, _) = listener.accept().unwrap();
    let (inbox, told) = run_loop::inbox::inbox(Arc::new(Nobody));
    let kernel = BootFile { path: "kernel".into(), content: Vec::new() };
    let payload = Payload { kernel, initramfs: None, cmdline: String::new() };
    let side = PrimarySide::new(PrimaryParts {
        config: PrimaryConfig {
            terms: terms(),
            who: "primary".into(),
            capabilities: crate::pair::capabilities(),
            vm_config: Vec::new(),
        },
        wire: Wire::connecting(stream, &Security::Plain, "127.0.0.1").unwrap(),
        arbiter: Arc::new(FileArbiter::new("/nowhere")),
        inbox,
        memory: hypervisor::memory::allocate(&[(0, 4096)]).unwrap(),
        payload: Arc::new(payload),
        outlet: Arc::clone(outlet) as Arc<dyn Outlet>,
        disks: Vec::new(),
        local: VmConfig::default(),
        observer: Box::new(Nobody),
    });
    (side.unwrap(), told, peer)
}

fn flush(number: u64) -> FromVcpu {
    let output = HeldOutput {
        number: OutputNumber(number),
        position: LogPosition(number),
        made: boot_time(),
        behind: LogPosition(0),
        outgoing: Outgoing::Serial(number.to_le_bytes().to_vec()),
    };
    FromVcpu::Flush(Flush {
        bytes: vec![0],
        end: LogPosition(number),
        point: ExecutionPoint(number),
        digests: Vec::new(),
        outputs: vec![output],
    })
}

#[test]
fn every_output_leaves_when_the_peers_end_is_heard_while_they_come() {
    let outlet = Arc::new(Left::default());
    let (mut side, told, peer) = side(&outlet);
    side.clone_sent = true;
    let sender = side.flush_sender.take().unwrap();
    drop(peer);
    // A guest that records until it is told to stop.
    let guest = std::thread::spawn(move || {
        let mut made = 0;
        while told.try_recv().is_err() {
            made += 1;
            sender.send(flush(made)).unwrap_or_else(|_| panic!("nobody takes output {made}"));
        }
        made
    });
    while !side.core.machine.ended() {
        side.take_flushes();
    }
    let made = guest.join().unwrap();
    assert_eq!(*outlet.0.lock().unwrap(), (1..=made).collect::<Vec<_>>());
}

#[test]
fn a_guest_waits_while_nobody_takes_its_log_and_goes_on_when_somebody_does() {
    let outlet = Arc::new(Left::default());
    let (mut side, told, _peer) = side(&outlet);
    let sender = side.flush_sender.take().unwrap();
    let (waker, feedback) = (side.core.handle.waker(), Arc::clone(&side.feedback));
    let mut recorder = Recorder::new(ExecutionPoint(0), sender, waker, feedback);
    // The last of the copy is on its way; the guest records already, a packet at a time.
    let frame = Event::Frames { device: 0, frames: vec![vec![0; 1500]] };
    let mut made = 0;
    while !recorder.stalled() {
        assert!(made < 2 * side.max_held_bytes, "nothing bounds the log");
        recorder.record(ExecutionPoint(0), &Entry::Event(frame.clone()));
        recorder.flush();
        made += 1500;
        side.take();
        side.perform();
    }
    assert!(2 * made > side.max_held_bytes && told.try_recv().is_err());
    // The machine has no backup yet and refuses what it is given now, so that this fills no other buffer.
    side.clone_sent = true;
    side.take();
    side.perform();
    assert!(!recorder.stalled() && matches!(told.try_recv(), Ok(run_loop::Message::Wake)));
}
