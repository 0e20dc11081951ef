//! The guest-visible half of a console.

use vm_memory::GuestMemory;

use super::state::ConsoleState;
use crate::effect::{DeviceEvent, Effect, Effects};
use crate::front::{DriverError, Front, FrontError, FrontState, Io, StateError, copy_config};
use crate::queue::{read_buffers, write_buffers};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUE_SIZE: u16 = 64;

/// VIRTIO_CONSOLE_F_SIZE.
const F_SIZE: u64 = 1 << 0;

/// Input that waits for the guest; what comes beyond is dropped, as a serial line would. The back half hands over no
/// more while something waits here ([`Front::backlogged`]), so that little ever does.
const BACKLOG_MAX: usize = 64 << 10;

/// Output in one chain at most.
const OUTPUT_MAX: u64 = 64 << 10;

/// What a console is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ConsoleConfig {
    /// Columns and rows of the terminal, if the guest is to know.
    pub size: Option<(u16, u16)>,
}

/// The front half.
#[derive(Debug)]
pub struct ConsoleFront {
    state: ConsoleState,
}

impl ConsoleFront {
    /// A console just powered on.
    #[must_use]
    pub fn new(config: &ConsoleConfig) -> Self {
        let (columns, rows) = config.size.unwrap_or_default();
        Self { state: ConsoleState { columns, rows, ..ConsoleState::default() } }
    }

    /// Fills the guest's buffers from the backlog.
    fn deliver<M: GuestMemory>(&mut self, io: &mut Io<'_, M>) -> Result<(), DriverError> {
        while io.live && !self.state.backlog.is_empty() {
            let queue = &mut io.queues[RECEIVE];
            let Some(chain) = queue.pop(io.memory)? else {
                return queue.request_notify(io.memory);
            };
            let written =
                write_buffers(io.memory, &chain.writable, self.state.backlog.make_contiguous())?;
            self.state.backlog.drain(..written);
            self.state.input_bytes += written as u64;
            queue.push_used(io.memory, chain.head, written as u32)?;
        }
        Ok(())
    }

    fn transmit<M: GuestMemory>(&mut self, io: &mut Io<'_, M>) -> Result<(), DriverError> {
        let mut output = Vec::new();
        let result = self.take_output(&mut output, io);
        if !output.is_empty() {
            self.state.output_bytes += output.len() as u64;
            io.effects.push(Effect::ConsoleOutput(output));
        }
        result
    }

    fn take_output<M: GuestMemory>(
        &self,
        output: &mut Vec<u8>,
        io: &mut Io<'_, M>,
    ) -> Result<(), DriverError> {
        let queue = &mut io.queues[TRANSMIT];
        while let Some(chain) = queue.pop(io.memory)? {
            let len = chain.readable_len();
            if len > OUTPUT_MAX {
                return Err(DriverError::LongChain { head: chain.head });
            }
            let start = output.len();
            output.resize(start + len as usize, 0);
            let copied = read_buffers(io.memory, &chain.readable, &mut output[start..]);
            if copied.is_err() {
                output.truncate(start);
            }
            copied?;
            queue.push_used(io.memory, chain.head, 0)?;
        }
        queue.request_notify(io.memory)
    }

    fn input<M: GuestMemory>(
        &mut self,
        bytes: &[u8],
        io: &mut Io<'_, M>,
    ) -> Result<(), DriverError> {
        let room = BACKLOG_MAX - self.state.backlog.len();
        let taken = bytes.len().min(room);
        self.state.backlog.extend(&bytes[..taken]);
        self.state.dropped_bytes += (bytes.len() - taken) as u64;
        self.deliver(io)
    }
}

impl<M: GuestMemory> Front<M> for ConsoleFront {
    fn device_id(&self) -> u16 {
        3
    }

    fn features(&self) -> u64 {
        if self.state.columns > 0 { F_SIZE } else { 0 }
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let mut config = [0; 12];
        config[0..2].copy_from_slice(&self.state.columns.to_le_bytes());
        config[2..4].copy_from_slice(&self.state.rows.to_le_bytes());
        config[4..8].copy_from_slice(&1u32.to_le_bytes());
        copy_config(&config, offset, data);
    }

    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    fn activate(&mut self, _features: u64, _effects: &mut Effects) {}

    fn reset(&mut self) {
        self.state.backlog.clear();
    }

    fn notify(&mut self, queue: usize, io: &mut Io<'_, M>) -> Result<(), DriverError> {
        match queue {
            RECEIVE => self.deliver(io),
            _ => self.transmit(io),
        }
    }

    fn event(&mut self, event: DeviceEvent, io: &mut Io<'_, M>) -> Result<(), FrontError> {
        match event {
            DeviceEvent::ConsoleInput(bytes) => Ok(self.input(&bytes, io)?),
            other => Err(FrontError::WrongDevice { event: other.name(), device_id: 3 }),
        }
    }

    fn outstanding(&self) -> Vec<Effect> {
        Vec::new()
    }

    fn backlogged(&self) -> bool {
        !self.state.backlog.is_empty()
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("input_bytes", self.state.input_bytes),
            ("output_bytes", self.state.output_bytes),
            ("dropped_bytes", self.state.dropped_bytes),
        ]
    }

    fn save(&self) -> FrontState {
        FrontState::Console(self.state.clone())
    }

    fn restore(&mut self, state: &FrontState) -> Result<(), StateError> {
        let FrontState::Console(state) = state else {
            return Err(StateError::Mismatch { what: "device type" });
        };
        if state.backlog.len() > BACKLOG_MAX {
            return Err(StateError::Invalid { what: "input backlog" });
        }
        self.state = state.clone();
        Ok(())
    }
}
