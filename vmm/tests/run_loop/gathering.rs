//! How a recorded guest's outputs leave: those of one that never rests together, those of one that waits at once.

use std::arch::global_asm;
use std::sync::Arc;
use std::time::Instant;

use ft::{Digest, ExecutionPoint};
use rt_channel::unbounded;
use vmm::config::{NetConfig, VmConfig};
use vmm::guest::Guest;
use vmm::run_loop::live::Live;
use vmm::run_loop::recorder::{Feedback, FromVcpu, Recorder};
use vmm_sys_util::eventfd::EventFd;

use super::recording::{replay, run};
use super::{Nothing, guest_of};

global_asm!(include_str!("sender.s"));

unsafe extern "C" {
    static sender_start: u8;
    static sender_end: u8;
}

/// How many frames `sender.s` sends.
const OUTPUTS: usize = 2000;
/// A guest that was seen to wait is not tried again for 64 quanta, of which none is shorter than a thousand instructions.
const HASTE: u64 = 64_000;

fn sender(rests: bool) -> Guest {
    let len = (&raw const sender_end).addr() - (&raw const sender_start).addr();
    // SAFETY: the two labels enclose initialized, read-only data of one section of this program.
    let code = unsafe { std::slice::from_raw_parts(&raw const sender_start, len) };
    let mov_ebp = [0xbd, u8::from(rests), 0, 0, 0];
    let network = VmConfig { net: Some(vec![NetConfig::default()]), ..VmConfig::default() };
    guest_of(&[&mov_ebp, code].concat(), network)
}

/// One run of a sender.
struct Recording {
    log: Vec<u8>,
    /// The number of outputs in each piece of log that has any.
    pieces: Vec<usize>,
    /// Pieces whose log goes on behind their last output: they did not leave where the guest made that.
    late: usize,
    end: (Digest, ExecutionPoint),
}

impl Recording {
    fn make(rests: bool) -> Self {
        let mut guest = sender(rests);
        let (sink, flushes) = unbounded();
        let (waker, feedback) = (Arc::new(EventFd::new(0).unwrap()), Arc::<Feedback>::default());
        let recorder = Recorder::new(guest.point(), sink, waker, Arc::clone(&feedback));
        let mut live = Live::new(&guest, Arc::new(Nothing), guest.tsc(), Instant::now());
        live.start_recording(&guest, Box::new(recorder));
        let (_silent, nothing) = unbounded();
        let (mut log, mut pieces, mut late) = (Vec::new(), Vec::new(), 0);
        let off = run(&mut live, &mut guest, &nothing, |_| {
            while let Ok(FromVcpu::Flush(flush)) = flushes.try_recv() {
                log.extend(flush.bytes);
                if let Some(last) = flush.outputs.last() {
                    pieces.push(flush.outputs.len());
                    late += usize::from(last.position < flush.end);
                    feedback.release(last.number);
                }
            }
            false
        });
        assert!(off);
        Self { log, pieces, late, end: (guest.digest().unwrap(), guest.point()) }
    }

    fn outputs(&self) -> usize {
        self.pieces.iter().sum()
    }

    fn replays(&self, rests: bool) {
        let mut backup = sender(rests);
        let (_, off, _) = replay(&mut backup, self.log.as_slice());
        assert!(off, "the log ended before the guest powered off");
        assert_eq!(backup.digest().unwrap().first_unequal(&self.end.0), None);
        assert_eq!(backup.point(), self.end.1);
    }
}

#[test]
fn outputs_of_a_guest_that_never_rests_leave_together() {
    let recording = Recording::make(false);
    let pieces = recording.pieces.len();
    println!("{pieces} pieces in {} instructions", recording.end.1.0);
    assert_eq!(recording.outputs(), OUTPUTS);
    assert!(pieces > 1 && pieces < OUTPUTS / 5, "{pieces} pieces");
    recording.replays(false);
}

#[test]
fn each_output_of_a_guest_that_waits_leaves_at_once() {
    let recording = Recording::make(true);
    assert_eq!(recording.pieces, [1; OUTPUTS]);
    let trials = recording.end.1.0 / HASTE + 1;
    println!("{} late, {trials} at most", recording.late);
    assert!(recording.late as u64 <= trials, "{} of at most {trials} are late", recording.late);
    recording.replays(true);
}
