//! The guest-visible half of an entropy source.
//!
//! Random bytes come as events, so that two machines with the same log hand out the same ones.

use vm_memory::{GuestMemory, Permissions};

use super::state::{Reply, RngState, Want};
use crate::effect::{DeviceEvent, Effect, Effects};
use crate::front::{DriverError, Front, FrontError, FrontState, Io, StateError, copy_config};
use crate::queue::{Buffer, in_memory, slice_buffers, total_len, write_buffers};

const QUEUE_SIZE: u16 = 64;

/// Bytes given for one request at most. The rest of its buffer stays unused, which 5.4.6 allows.
const REQUEST_MAX: u64 = 4096;

/// Requests handed out at most. Beyond, chains stay in the queue.
const WANTS_MAX: usize = 2 * QUEUE_SIZE as usize;

/// The front half.
#[derive(Debug, Default)]
pub struct RngFront {
    state: RngState,
}

impl RngFront {
    /// An entropy source just powered on.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn take_requests<M: GuestMemory>(&mut self, io: &mut Io<'_, M>) -> Result<(), DriverError> {
        while io.live && self.state.wants.len() < WANTS_MAX {
            let Some(chain) = io.queues[0].pop(io.memory)? else {
                return io.queues[0].request_notify(io.memory);
            };
            let data = slice_buffers(&chain.writable, 0, REQUEST_MAX);
            let len: u32 = data.iter().map(|b: &Buffer| b.len).sum();
            if len == 0 {
                return Err(DriverError::ShortChain);
            }
            if !in_memory(io.memory, &data, Permissions::Write) {
                return Err(DriverError::Memory { address: data[0].address, len });
            }
            io.effects.push(Effect::EntropyWanted { len });
            let reply = Some(Reply { head: chain.head, data });
            self.state.wants.push_back(Want { len, reply });
        }
        Ok(())
    }

    fn entropy<M: GuestMemory>(
        &mut self,
        bytes: &[u8],
        io: &mut Io<'_, M>,
    ) -> Result<(), FrontError> {
        let want = self.state.wants.pop_front().ok_or(FrontError::Unasked)?;
        if let Some(reply) = want.reply
            && io.live
        {
            let written = write_buffers(io.memory, &reply.data, bytes)? as u32;
            self.state.bytes += u64::from(written);
            io.queues[0].push_used(io.memory, reply.head, written)?;
        }
        Ok(self.take_requests(io)?)
    }
}

impl<M: GuestMemory> Front<M> for RngFront {
    fn device_id(&self) -> u16 {
        4
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        copy_config(&[], offset, data);
    }

    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    fn activate(&mut self, _features: u64, _effects: &mut Effects) {}

    fn reset(&mut self) {
        for want in &mut self.state.wants {
            want.reply = None;
        }
    }

    fn notify(&mut self, _queue: usize, io: &mut Io<'_, M>) -> Result<(), DriverError> {
        self.take_requests(io)
    }

    fn event(&mut self, event: DeviceEvent, io: &mut Io<'_, M>) -> Result<(), FrontError> {
        match event {
            DeviceEvent::Entropy(bytes) => self.entropy(&bytes, io),
            other => Err(FrontError::WrongDevice { event: other.name(), device_id: 4 }),
        }
    }

    fn outstanding(&self) -> Vec<Effect> {
        self.state.wants.iter().map(|want| Effect::EntropyWanted { len: want.len }).collect()
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("bytes", self.state.bytes)]
    }

    fn save(&self) -> FrontState {
        FrontState::Rng(self.state.clone())
    }

    fn restore(&mut self, state: &FrontState) -> Result<(), StateError> {
        let FrontState::Rng(state) = state else {
            return Err(StateError::Mismatch { what: "device type" });
        };
        if state.wants.len() > WANTS_MAX || !state.wants.iter().all(proper_want) {
            return Err(StateError::Invalid { what: "request for random bytes" });
        }
        self.state = state.clone();
        Ok(())
    }
}

/// Whether a driver can have wanted this.
fn proper_want(want: &Want) -> bool {
    let len = u64::from(want.len);
    (1..=REQUEST_MAX).contains(&len)
        && want.reply.as_ref().is_none_or(|reply| total_len(&reply.data) == len)
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::*;

    /// What an entropy source says that is to go on with these requests under way.
    fn restored(wants: Vec<Want>) -> Result<(), StateError> {
        let state = FrontState::Rng(RngState { wants: wants.into(), bytes: 0 });
        Front::<GuestMemoryMmap<()>>::restore(&mut RngFront::new(), &state)
    }

    fn want(len: u32) -> Want {
        let data = vec![Buffer { address: 0, len }];
        Want { len, reply: Some(Reply { head: 0, data }) }
    }

    #[test]
    fn only_what_a_driver_can_have_wanted_is_restored() {
        let most = REQUEST_MAX as u32;
        let forgotten = Want { reply: None, ..want(1) };
        assert_eq!(restored(vec![want(1), want(most), forgotten.clone()]), Ok(()));
        assert_eq!(restored(vec![want(1); WANTS_MAX]), Ok(()));
        let impossible = Err(StateError::Invalid { what: "request for random bytes" });
        assert_eq!(restored(vec![want(1); WANTS_MAX + 1]), impossible);
        assert_eq!(restored(vec![want(0)]), impossible);
        assert_eq!(restored(vec![Want { len: u32::MAX, ..forgotten }]), impossible);
        assert_eq!(restored(vec![want(most + 1)]), impossible);
        assert_eq!(restored(vec![Want { len: 2, ..want(1) }]), impossible);
    }
}
