//! The 16550 serial port COM1, on vm-superio's register model.
//!
//! What is typed faster than the guest reads waits here, up to a limit; beyond it bytes are lost, as on
//! a line without flow control. The limit counts bytes, not time, so both sides lose the same ones. The back
//! half hands over no more while something waits ([`SerialPort::backlogged`]), so that little ever does.

use std::cell::Cell;
use std::collections::VecDeque;
use std::convert::Infallible;

use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial, SerialState as Registers};

/// Bytes that may wait for room in the receive FIFO.
const BACKLOG_MAX: usize = 16 << 10;

/// Remembers that the register model raised its (edge-triggered) interrupt.
#[derive(Debug, Default)]
struct Edge(Cell<bool>);

impl Trigger for Edge {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.set(true);
        Ok(())
    }
}

/// The port.
#[derive(Debug)]
pub struct SerialPort {
    uart: Serial<Edge, NoEvents, Vec<u8>>,
    backlog: VecDeque<u8>,
}

/// A saved port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    fifo: Vec<u8>,
    backlog: Vec<u8>,
}

/// A saved port holds more bytes than its FIFO or backlog has room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the saved serial port holds more received bytes than fit")]
pub struct SerialStateError;

impl SerialPort {
    /// A port fresh from reset.
    #[must_use]
    pub fn new() -> Self {
        Self { uart: Serial::new(Edge::default(), Vec::new()), backlog: VecDeque::new() }
    }

    /// The guest reads the register at `offset` (0 to 7).
    pub fn read(&mut self, offset: u8) -> u8 {
        let value = self.uart.read(offset);
        self.refill();
        value
    }

    /// The guest writes the register at `offset`.
    pub fn write(&mut self, offset: u8, value: u8) {
        // The sink is a Vec and the trigger a flag: neither can fail. In loopback a full FIFO drops.
        let _ = self.uart.write(offset, value);
        self.refill();
    }

    /// Bytes arrive on the line.
    pub fn input(&mut self, bytes: &[u8]) {
        let room = BACKLOG_MAX - self.backlog.len();
        self.backlog.extend(bytes.iter().take(room));
        self.refill();
    }

    /// Whether more had better wait outside, since the guest has not taken yet what came before.
    #[must_use]
    pub fn backlogged(&self) -> bool {
        !self.backlog.is_empty()
    }

    fn refill(&mut self) {
        let room = self.uart.fifo_capacity();
        if self.backlog.is_empty() || room == 0 {
            return;
        }
        let len = room.min(self.backlog.len());
        let next: Vec<u8> = self.backlog.iter().copied().take(len).collect();
        // In loopback the line is cut off and nothing is taken.
        let taken = self.uart.enqueue_raw_bytes(&next).unwrap_or(0);
        self.backlog.drain(..taken);
    }

    /// Bytes the guest sent since the last call.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(self.uart.writer_mut())
    }

    /// Whether an interrupt was raised since the last call.
    pub fn take_interrupt(&mut self) -> bool {
        self.uart.interrupt_evt().0.take()
    }

    /// The port's state; output must have been taken.
    #[must_use]
    pub fn save(&self) -> SerialState {
        let registers = self.uart.state();
        SerialState {
            divisor: [registers.baud_divisor_low, registers.baud_divisor_high],
            interrupt_enable: registers.interrupt_enable,
            interrupt_identification: registers.interrupt_identification,
            line_control: registers.line_control,
            line_status: registers.line_status,
            modem_control: registers.modem_control,
            modem_status: registers.modem_status,
            scratch: registers.scratch,
            fifo: registers.in_buffer,
            backlog: self.backlog.iter().copied().collect(),
        }
    }

    /// Becomes the port `state` was saved from.
    pub fn restore(&mut self, state: &SerialState) -> Result<(), SerialStateError> {
        if state.backlog.len() > BACKLOG_MAX {
            return Err(SerialStateError);
        }
        let registers = Registers {
            baud_divisor_low: state.divisor[0],
            baud_divisor_high: state.divisor[1],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.fifo.clone(),
        };
        self.uart = Serial::from_state(&registers, Edge::default(), NoEvents, Vec::new())
            .map_err(|_| SerialStateError)?;
        // The model raises a pending interrupt anew; here its edge is already in the saved IOAPIC.
        self.take_interrupt();
        self.backlog = state.backlog.iter().copied().collect();
        Ok(())
    }
}

impl Default for SerialPort {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: u8 = 0;
    const INTERRUPT_ENABLE: u8 = 1;
    const LINE_STATUS: u8 = 5;
    const DATA_READY: u8 = 1;

    fn read_all(port: &mut SerialPort) -> Vec<u8> {
        let mut bytes = Vec::new();
        while port.read(LINE_STATUS) & DATA_READY != 0 {
            bytes.push(port.read(DATA));
        }
        bytes
    }

    #[test]
    fn sent_bytes_come_out_once() {
        let mut port = SerialPort::new();
        for byte in b"hello" {
            port.write(DATA, *byte);
        }
        assert_eq!(port.take_output(), b"hello");
        assert_eq!(port.take_output(), b"");
    }

    #[test]
    fn long_input_arrives_whole_and_interrupts() {
        let mut port = SerialPort::new();
        port.write(INTERRUPT_ENABLE, 1);
        let sent: Vec<u8> = (0..1000u32).map(|n| n as u8).collect();
        port.input(&sent);
        assert!(port.take_interrupt());
        assert!(port.backlogged());
        assert_eq!(read_all(&mut port), sent);
        assert!(!port.backlogged());
    }

    #[test]
    fn input_beyond_the_backlog_is_dropped() {
        let mut port = SerialPort::new();
        port.input(&vec![b'x'; BACKLOG_MAX]);
        port.input(&vec![b'y'; BACKLOG_MAX]);
        let received = read_all(&mut port);
        assert!(received.len() < BACKLOG_MAX + 100);
        assert!(received.starts_with(&vec![b'x'; BACKLOG_MAX]));
    }

    #[test]
    fn a_restored_port_goes_on_where_the_saved_one_was() {
        let mut port = SerialPort::new();
        port.write(INTERRUPT_ENABLE, 3);
        port.input(&[b'a'; 100]);
        port.read(DATA);
        let mut twin = SerialPort::new();
        twin.restore(&port.save()).unwrap();
        assert_eq!(twin.save(), port.save());
        assert!(!twin.take_interrupt());
        assert_eq!(read_all(&mut twin), read_all(&mut port));
        let mut impossible = port.save();
        impossible.fifo = vec![0; 1000];
        assert!(twin.restore(&impossible).is_err());
    }
}
