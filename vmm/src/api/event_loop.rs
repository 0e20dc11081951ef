//! The control thread's loop: takes calls, signals and the guest's own end one after the other.

use rt_channel::{Receiver, Sender, unbounded};

use super::control::{Control, ControlError, VmEnd};
use super::dispatch::{Next, delete, dispatch};
use super::http::Response;
use super::route::Call;
use crate::event_monitor::EventMonitor;

/// Something for the control thread to do.
pub enum Message {
    /// A call; its answer goes to the sender.
    Call(Call, Sender<Response>),
    /// The guest may have ended: [`Control::ended`] tells.
    Doorbell,
    /// The process was asked to end.
    Terminate,
}

/// Wakes the control thread from any other. Clones ring at the same door.
#[derive(Clone)]
pub struct Doorbell(Sender<Message>);

impl Doorbell {
    /// Has the control thread ask [`Control::ended`].
    pub fn ring(&self) {
        // Without a control thread the process is ending, and nobody has to be told.
        let _ = self.0.send(Message::Doorbell);
    }
}

/// The ways into an [`EventLoop`].
#[derive(Clone)]
pub struct Inbox(Sender<Message>);

impl Inbox {
    /// For whoever runs the guest.
    pub fn doorbell(&self) -> Doorbell {
        Doorbell(self.0.clone())
    }

    /// Asks the process to end in order, as a signal does.
    pub fn terminate(&self) {
        // As in `Doorbell::ring`.
        let _ = self.0.send(Message::Terminate);
    }

    /// Has the control thread execute a call and waits for the answer.
    pub fn call(&self, call: Call) -> Response {
        let (sender, receiver) = rt_channel::bounded(1);
        let answer = match self.0.send(Message::Call(call, sender)) {
            Ok(()) => receiver.recv().ok(),
            Err(_) => None,
        };
        answer.unwrap_or_else(|| Response::error(500, ["The VMM is shutting down"]))
    }
}

/// Why the VMM could not go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoopError {
    /// The guest ended in a failure.
    #[error("the VM failed: {0}")]
    VmFailed(String),
    /// The VM did not stop.
    #[error("the VM could not be stopped")]
    Stop(#[source] ControlError),
}

/// The loop.
pub struct EventLoop {
    receiver: Receiver<Message>,
    stay: bool,
}

impl EventLoop {
    /// `stay`: whether the VMM goes on when the guest switches itself off (`--no-shutdown`).
    pub fn new(stay: bool) -> (Self, Inbox) {
        let (sender, receiver) = unbounded();
        (Self { receiver, stay }, Inbox(sender))
    }

    /// Runs until the VMM is to end. `events` is told what happens to the VM.
    pub fn run(&self, control: &mut dyn Control, events: &EventMonitor) -> Result<(), LoopError> {
        while let Ok(message) = self.receiver.recv() {
            match message {
                Message::Call(call, answer) => {
                    let (response, next) = dispatch(call, control, events);
                    // A client that has gone does not want the answer.
                    let _ = answer.send(response);
                    if next == Next::Exit {
                        return Ok(());
                    }
                }
                Message::Terminate => {
                    log::info!("terminating");
                    return delete(control, events).map_err(LoopError::Stop);
                }
                Message::Doorbell => match control.ended() {
                    None => {}
                    Some(VmEnd::PowerOff) if self.stay => {
                        log::info!("the guest switched itself off");
                        control.shutdown().map_err(LoopError::Stop)?;
                        events.event("vm", "shutdown");
                    }
                    Some(VmEnd::PowerOff) => {
                        log::info!("the guest switched itself off");
                        return delete(control, events).map_err(LoopError::Stop);
                    }
                    Some(VmEnd::Failure(why)) => {
                        if let Err(error) = delete(control, events) {
                            log::warn!("the VM could not be stopped in order: {error}");
                        }
                        return Err(LoopError::VmFailed(why));
                    }
                },
            }
        }
        Ok(())
    }
}
