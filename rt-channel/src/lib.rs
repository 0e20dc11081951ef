//! Channels between threads of which one has real-time priority.
//!
//! The ft thread of a side runs before all others, for heartbeats and acknowledgements must not wait. A channel
//! without locks does not do for it: whoever meets an operation that another thread has begun spins until that
//! thread has gone on. If that thread was preempted, by the very thread that spins, on the processor where both run, it goes on
//! only when the kernel saves it from starving, a second later, and by then the other side has taken over.
//!
//! What must hold: nobody spins for longer than a few microseconds. [`Receiver::try_recv`] waits for nobody: a message
//! whose sender is in the middle of its work is not there yet, so that a sender must wake such a receiver *after* it has
//! sent. Everything else may sleep for as long as another thread holds a lock, which is a few instructions while that
//! thread runs; and asleep it leaves its processor to that thread.

use std::collections::VecDeque;
use std::sync::mpsc::{RecvError, RecvTimeoutError, SendError, TryRecvError, TrySendError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

/// How often a receiver looks before it sleeps, with growing pauses, some microseconds in all: whoever need not be woken for
/// what is about to come has it sooner, and costs the sender less.
const LOOKS: u32 = 10;
/// After so many of them it leaves the processor to others in between.
const LOOKS_SPINNING: u32 = 7;

/// A channel that takes any number of messages. Nobody waits for room in it; bounds are up to those who send.
#[must_use]
pub fn unbounded<T>() -> (Sender<T>, Receiver<T>) {
    bounded(usize::MAX)
}

/// A channel in which `capacity` messages may wait, at least one.
///
/// # Panics
/// If `capacity` is zero: nobody could ever send.
#[must_use]
pub fn bounded<T>(capacity: usize) -> (Sender<T>, Receiver<T>) {
    assert!(capacity > 0, "a channel without room");
    let state = State {
        messages: VecDeque::new(),
        senders: 1,
        receives: true,
        receiver_sleeps: false,
        sleeping_senders: 0,
    };
    let shared = Arc::new(Shared {
        capacity,
        state: Mutex::new(state),
        sent: Condvar::new(),
        taken: Condvar::new(),
    });
    (Sender(Arc::clone(&shared)), Receiver(shared))
}

#[derive(Debug)]
struct State<T> {
    messages: VecDeque<T>,
    /// How many senders there are.
    senders: usize,
    /// Whether the receiver is still there.
    receives: bool,
    /// Who is asleep: waking nobody would cost a system call too.
    receiver_sleeps: bool,
    sleeping_senders: usize,
}

#[derive(Debug)]
struct Shared<T> {
    capacity: usize,
    state: Mutex<State<T>>,
    /// Something was sent, or nothing more will be.
    sent: Condvar,
    /// There is room, or no receiver any more.
    taken: Condvar,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // Nothing in here panics with half a change made.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends a message for which there is room.
    fn append(&self, mut state: MutexGuard<'_, State<T>>, message: T) {
        state.messages.push_back(message);
        self.wake_receiver(state);
    }

    fn wake_receiver(&self, mut state: MutexGuard<'_, State<T>>) {
        let sleeps = std::mem::take(&mut state.receiver_sleeps);
        drop(state);
        if sleeps {
            self.sent.notify_one();
        }
    }

    /// The oldest message.
    fn take(&self, mut state: MutexGuard<'_, State<T>>) -> Result<T, TryRecvError> {
        let Some(message) = state.messages.pop_front() else {
            let none_left = state.senders == 0;
            return Err(if none_left { TryRecvError::Disconnected } else { TryRecvError::Empty });
        };
        let sleeping = state.sleeping_senders > 0;
        drop(state);
        if sleeping {
            self.taken.notify_one();
        }
        Ok(message)
    }
}

/// Sleeps until `condition` is notified, no longer than `left`, or for no reason.
fn sleep<'a, T>(
    condition: &Condvar,
    state: MutexGuard<'a, State<T>>,
    left: Option<Duration>,
) -> MutexGuard<'a, State<T>> {
    match left {
        None => condition.wait(state).unwrap_or_else(PoisonError::into_inner),
        Some(left) => condition.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0,
    }
}

/// The sending end; clones send into the same channel.
#[derive(Debug)]
pub struct Sender<T>(Arc<Shared<T>>);

impl<T> Sender<T> {
    /// Sends; sleeps while there is no room.
    ///
    /// # Errors
    /// If the receiver has gone, with the message.
    pub fn send(&self, message: T) -> Result<(), SendError<T>> {
        self.send_until(message, None).map_err(|error| match error {
            TrySendError::Full(message) | TrySendError::Disconnected(message) => SendError(message),
        })
    }

    /// As [`Self::send`]; sleeps for no longer than `timeout`.
    ///
    /// # Errors
    /// If there is no room by then, or the receiver has gone, with the message.
    pub fn send_timeout(&self, message: T, timeout: Duration) -> Result<(), TrySendError<T>> {
        // What is too far away to be said never comes.
        self.send_until(message, Instant::now().checked_add(timeout))
    }

    fn send_until(&self, message: T, deadline: Option<Instant>) -> Result<(), TrySendError<T>> {
        let shared = &*self.0;
        let mut state = shared.lock();
        while state.receives && state.messages.len() >= shared.capacity {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Err(TrySendError::Full(message));
            }
            state.sleeping_senders += 1;
            state = sleep(&shared.taken, state, left);
            state.sleeping_senders -= 1;
        }
        if !state.receives {
            return Err(TrySendError::Disconnected(message));
        }
        shared.append(state, message);
        Ok(())
    }

    /// Sends if there is room.
    ///
    /// # Errors
    /// If there is none, or the receiver has gone, with the message.
    pub fn try_send(&self, message: T) -> Result<(), TrySendError<T>> {
        let state = self.0.lock();
        if !state.receives {
            return Err(TrySendError::Disconnected(message));
        }
        if state.messages.len() >= self.0.capacity {
            return Err(TrySendError::Full(message));
        }
        self.0.append(state, message);
        Ok(())
    }

    /// Messages that wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.lock().messages.len()
    }

    /// Whether none waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        self.0.lock().senders += 1;
        Self(Arc::clone(&self.0))
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.senders -= 1;
        if state.senders == 0 {
            self.0.wake_receiver(state);
        }
    }
}

/// The receiving end.
#[derive(Debug)]
pub struct Receiver<T>(Arc<Shared<T>>);

impl<T> Receiver<T> {
    /// The oldest message, if there is one. Waits for nobody, not even for a sender that is about to be done: it must wake
    /// the receiver afterwards.
    ///
    /// # Errors
    /// If there is none, or will never be one.
    pub fn try_recv(&self) -> Result<T, TryRecvError> {
        match self.0.state.try_lock() {
            Ok(state) => self.0.take(state),
            Err(TryLockError::Poisoned(state)) => self.0.take(state.into_inner()),
            Err(TryLockError::WouldBlock) => Err(TryRecvError::Empty),
        }
    }

    /// The oldest message; sleeps until there is one.
    ///
    /// # Errors
    /// If there will never be one.
    pub fn recv(&self) -> Result<T, RecvError> {
        self.recv_until(None).map_err(|_| RecvError)
    }

    /// As [`Self::recv`], for no longer than `timeout`.
    ///
    /// # Errors
    /// If there is none by then, or will never be one.
    pub fn recv_timeout(&self, timeout: Duration) -> Result<T, RecvTimeoutError> {
        // What is too far away to be said never comes.
        self.recv_until(Instant::now().checked_add(timeout))
    }

    fn recv_until(&self, deadline: Option<Instant>) -> Result<T, RecvTimeoutError> {
        for look in 0..LOOKS {
            match self.try_recv() {
                Ok(message) => return Ok(message),
                Err(TryRecvError::Disconnected) => return Err(RecvTimeoutError::Disconnected),
                Err(TryRecvError::Empty) if look < LOOKS_SPINNING => {
                    (0..1 << look).for_each(|_| std::hint::spin_loop());
                }
                Err(TryRecvError::Empty) => std::thread::yield_now(),
            }
        }
        let mut state = self.0.lock();
        loop {
            if !state.messages.is_empty() || state.senders == 0 {
                return self.0.take(state).map_err(|_| RecvTimeoutError::Disconnected);
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Err(RecvTimeoutError::Timeout);
            }
            state.receiver_sleeps = true;
            state = sleep(&self.0.sent, state, left);
            state.receiver_sleeps = false;
        }
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.receives = false;
        // They may have something to do when they go, and may be senders themselves.
        let unread = std::mem::take(&mut state.messages);
        drop(state);
        self.0.taken.notify_all();
        drop(unread);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_arrive_once_and_those_of_a_sender_in_order() {
        const SENDERS: usize = 3;
        const EACH: usize = 20_000;
        for capacity in [1, 4, usize::MAX] {
            let (sender, receiver) = bounded(capacity);
            let mut next = [0; SENDERS];
            std::thread::scope(|scope| {
                for who in 0..SENDERS {
                    let sender = sender.clone();
                    scope.spawn(move || {
                        for number in 0..EACH {
                            sender.send((who, number)).unwrap();
                        }
                    });
                }
                drop(sender);
                while let Ok((who, number)) = receiver.recv() {
                    assert_eq!(number, next[who]);
                    next[who] += 1;
                    if number % 3 == 0
                        && let Ok((who, number)) = receiver.try_recv()
                    {
                        assert_eq!(number, next[who]);
                        next[who] += 1;
                    }
                }
            });
            assert_eq!(next, [EACH; SENDERS]);
        }
    }

    #[test]
    fn a_receiver_does_not_wait_for_a_sender_that_was_put_to_sleep() {
        let (sender, receiver) = unbounded();
        sender.send(1).unwrap();
        let asleep_while_sending = sender.0.lock();
        // Would never return if it waited.
        assert_eq!(receiver.try_recv(), Err(TryRecvError::Empty));
        drop(asleep_while_sending);
        assert_eq!(receiver.try_recv(), Ok(1));
    }

    #[test]
    fn there_is_no_more_room_than_said() {
        let (sender, receiver) = bounded(2);
        sender.send(1).unwrap();
        sender.try_send(2).unwrap();
        assert_eq!(sender.try_send(3), Err(TrySendError::Full(3)));
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| sender.send(3));
            while receiver.0.lock().sleeping_senders == 0 {
                std::thread::yield_now();
            }
            assert_eq!(receiver.try_recv(), Ok(1));
            waits.join().unwrap().unwrap();
        });
        assert_eq!(sender.len(), 2);
        assert_eq!((receiver.recv(), receiver.recv()), (Ok(2), Ok(3)));
        assert!(sender.is_empty());
    }

    #[test]
    fn whoever_sleeps_hears_that_the_other_end_has_gone() {
        let (sender, receiver) = bounded(1);
        sender.send(1).unwrap();
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| sender.send(2));
            while receiver.0.lock().sleeping_senders == 0 {
                std::thread::yield_now();
            }
            drop(receiver);
            assert_eq!(waits.join().unwrap(), Err(SendError(2)));
        });
        assert_eq!(sender.try_send(3), Err(TrySendError::Disconnected(3)));

        let (sender, receiver) = unbounded::<u8>();
        std::thread::scope(|scope| {
            let shared = Arc::clone(&receiver.0);
            let waits = scope.spawn(move || receiver.recv());
            while !shared.lock().receiver_sleeps {
                std::thread::yield_now();
            }
            let other = sender.clone();
            drop(sender);
            drop(other);
            assert_eq!(waits.join().unwrap(), Err(RecvError));
        });
    }

    #[test]
    fn what_was_sent_before_the_end_is_received() {
        let (sender, receiver) = unbounded();
        sender.send(1).unwrap();
        drop(sender);
        assert_eq!(receiver.recv(), Ok(1));
        assert_eq!(receiver.try_recv(), Err(TryRecvError::Disconnected));
        assert_eq!(
            receiver.recv_timeout(Duration::from_secs(3600)),
            Err(RecvTimeoutError::Disconnected)
        );
    }

    #[test]
    fn a_timeout_ends_the_sleep_and_the_longest_is_none() {
        let (sender, receiver) = unbounded();
        assert_eq!(receiver.recv_timeout(Duration::ZERO), Err(RecvTimeoutError::Timeout));
        assert_eq!(receiver.recv_timeout(Duration::from_millis(1)), Err(RecvTimeoutError::Timeout));
        let (full, _receiver) = bounded(1);
        full.send_timeout(1, Duration::ZERO).unwrap();
        for timeout in [0, 1].map(Duration::from_millis) {
            assert_eq!(full.send_timeout(2, timeout), Err(TrySendError::Full(2)));
        }
        std::thread::scope(|scope| {
            let shared = Arc::clone(&receiver.0);
            let waits = scope.spawn(move || receiver.recv_timeout(Duration::MAX));
            while !shared.lock().receiver_sleeps {
                std::thread::yield_now();
            }
            sender.send(7).unwrap();
            assert_eq!(waits.join().unwrap(), Ok(7));
        });
    }

    /// Sends when it goes, into the channel in which it was.
    struct Last(Sender<Option<Self>>);

    impl Drop for Last {
        fn drop(&mut self) {
            assert!(self.0.send(None).is_err());
        }
    }

    #[test]
    fn unread_messages_go_when_nobody_holds_the_channel() {
        let (sender, receiver) = unbounded();
        sender.send(Some(Last(sender.clone()))).unwrap();
        drop(receiver);
    }
}
