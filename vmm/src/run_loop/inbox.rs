//! The vCPU thread's inbox: the one way in for other threads.
//!
//! Whoever has something for the guest (a received frame, a finished disk request, a command of the
//! control thread, a piece of the log) puts it here. A message to a running vCPU also kicks it out of
//! guest code; a sleeping one wakes because it sleeps on the inbox.

use std::sync::Arc;

use hypervisor::Kick;
use rt_channel::{Receiver, Sender};

/// Sends to one vCPU thread.
pub struct InboxSender<T> {
    sender: Sender<T>,
    kicker: Arc<dyn Kick>,
}

impl<T> Clone for InboxSender<T> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), kicker: Arc::clone(&self.kicker) }
    }
}

impl<T> InboxSender<T> {
    /// Delivers `message`. Returns false if the vCPU thread has ended.
    pub fn send(&self, message: T) -> bool {
        let delivered = self.sender.send(message).is_ok();
        self.kicker.kick();
        delivered
    }

    /// Delivers `message` without interrupting the guest: it is looked at when the guest next stops.
    pub fn post(&self, message: T) -> bool {
        self.sender.send(message).is_ok()
    }
}

/// An inbox for the vCPU that `kicker` kicks.
#[must_use]
pub fn inbox<T>(kicker: Arc<dyn Kick>) -> (InboxSender<T>, Receiver<T>) {
    let (sender, receiver) = rt_channel::unbounded();
    (InboxSender { sender, kicker }, receiver)
}
