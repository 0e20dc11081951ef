//! The loop of an ft thread, the same on both sides: a socket, a state machine of [`ft`], one `ppoll`.
//!
//! What must hold: actions are carried out in the order in which the state machine gave them. What the peer
//! said reaches it in the order in which it came, and nothing said later overtakes a message that is being
//! acted upon. An input of this side is preceded by what the peer said before it.

use std::collections::VecDeque;
use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

use ft::{Arbiter, Claim, FtStatus, Generation, Message, PairId};
use rt_channel::{Receiver, Sender};
use vmm_sys_util::eventfd::EventFd;

use super::channel::{Link, PARTING};
use super::status::{StatusCell, StatusWriter};
use super::wire::Wire;
use super::{Promptness, boot_time, run_first, wait};

/// A look at the channel older than this says nothing about the peer.
const STALE: Duration = Duration::from_millis(5);
/// Whoever looks at the status waits for the thread no longer than this.
const LOOK_TIMEOUT: Duration = Duration::from_millis(100);
/// The longest sleep.
const SECOND: Duration = Duration::from_secs(1);

/// A state machine of [`ft`], as far as the loop knows it.
pub(super) trait Machine {
    type Input;
    type Action;
    type Illegal: Display;
    /// For the log.
    const NAME: &'static str;
    /// What an operator is told whose wish comes too late.
    const ENDED: &'static str;

    fn step(
        &mut self,
        now: Duration,
        input: Self::Input,
        actions: &mut Vec<Self::Action>,
    ) -> Result<(), Self::Illegal>;
    fn next_deadline(&self) -> Option<Duration>;
    fn ended(&self) -> bool;
    fn message(message: Message) -> Self::Input;
    fn lost(reason: String) -> Self::Input;
    fn answered(generation: Generation, answer: Result<Claim, String>) -> Self::Input;
    fn tick() -> Self::Input;
}

macro_rules! machine {
    ($machine:ty, $module:ident, $name:literal, $ended:literal) => {
        impl Machine for $machine {
            type Input = ft::$module::Input;
            type Action = ft::$module::Action;
            type Illegal = ft::$module::IllegalInput;
            const NAME: &'static str = $name;
            const ENDED: &'static str = $ended;

            fn step(
                &mut self,
                now: Duration,
                input: Self::Input,
                actions: &mut Vec<Self::Action>,
            ) -> Result<(), Self::Illegal> {
                self.step(now, input, actions)
            }

            fn next_deadline(&self) -> Option<Duration> {
                self.next_deadline()
            }

            fn ended(&self) -> bool {
                self.ended()
            }

            fn message(message: Message) -> Self::Input {
                Self::Input::Message(message)
            }

            fn lost(reason: String) -> Self::Input {
                Self::Input::ConnectionLost { reason }
            }

            fn answered(generation: Generation, answer: Result<Claim, String>) -> Self::Input {
                Self::Input::ArbiterAnswered { generation, answer }
            }

            fn tick() -> Self::Input {
                Self::Input::Tick
            }
        }
    };
}

machine!(ft::Primary, primary, "primary", "protection has ended already");
machine!(ft::Backup, backup, "backup", "this VMM is no backup any more");

/// An input from another thread.
enum Inward<I> {
    /// Of an operator, who hears whether it was possible.
    Asked(I, Sender<Result<(), String>>),
    /// Of a thread that works for this side.
    Told(I),
    /// Of somebody who wants to know how things stand.
    Looked(Sender<FtStatus>),
}

/// The way to an ft thread.
pub(super) struct Handle<M: Machine> {
    inward: Sender<Inward<M::Input>>,
    waker: Arc<EventFd>,
    status: StatusCell,
}

impl<M: Machine> Clone for Handle<M> {
    fn clone(&self) -> Self {
        Self {
            inward: self.inward.clone(),
            waker: Arc::clone(&self.waker),
            status: self.status.clone(),
        }
    }
}

impl<M: Machine> Handle<M> {
    /// Asks for something. Returns when it is under way.
    pub(super) fn ask(&self, input: M::Input) -> Result<(), String> {
        let (reply, answer) = rt_channel::bounded(1);
        let gone = || M::ENDED.to_owned();
        self.inward.send(Inward::Asked(input, reply)).map_err(|_| gone())?;
        let _ = self.waker.write(1);
        answer.recv().map_err(|_| gone())?
    }

    /// Tells something, to whoever is still there.
    pub(super) fn tell(&self, input: M::Input) {
        let _ = self.inward.send(Inward::Told(input));
        let _ = self.waker.write(1);
    }

    /// Has the thread look around.
    pub(super) fn waker(&self) -> Arc<EventFd> {
        Arc::clone(&self.waker)
    }

    /// What the operator is shown: as it is now, or, if the thread is busy for long, as it was last.
    pub(super) fn status(&self) -> FtStatus {
        let (reply, answer) = rt_channel::bounded(1);
        if self.inward.send(Inward::Looked(reply)).is_ok() {
            let _ = self.waker.write(1);
            if let Ok(status) = answer.recv_timeout(LOOK_TIMEOUT) {
                return status;
            }
        }
        self.status.get()
    }
}

/// What both sides have.
pub(super) struct Core<M: Machine> {
    pub(super) machine: M,
    pub(super) link: Link,
    pub(super) status: StatusWriter,
    /// The way to this thread, for the threads it starts.
    pub(super) handle: Handle<M>,
    actions: VecDeque<M::Action>,
    inward: Receiver<Inward<M::Input>>,
    /// When the channel was looked at last.
    last_read: Duration,
}

impl<M: Machine> Core<M> {
    /// `actions` are the state machine's first.
    pub(super) fn new(machine: M, wire: Wire, actions: Vec<M::Action>) -> std::io::Result<Self> {
        let status = StatusWriter::default();
        let waker = Arc::new(EventFd::new(libc::EFD_NONBLOCK)?);
        let (sender, inward) = rt_channel::unbounded();
        Ok(Self {
            machine,
            link: Link::new(wire),
            handle: Handle { inward: sender, waker, status: status.cell() },
            status,
            actions: actions.into(),
            inward,
            last_read: boot_time(),
        })
    }

    /// Asks the arbiter; the answer becomes an input.
    pub(super) fn claim(
        &self,
        arbiter: &Arc<dyn Arbiter>,
        pair: PairId,
        generation: Generation,
        who: String,
    ) where
        M: 'static,
        M::Input: Send,
    {
        let handle = self.handle.clone();
        super::claim(Arc::clone(arbiter), pair, generation, who, move |answer| {
            handle.tell(M::answered(generation, answer));
        });
    }
}

/// One side's ft thread.
pub(super) trait Side {
    type Machine: Machine;

    fn core(&mut self) -> &mut Core<Self::Machine>;
    /// Carries out one action.
    fn act(&mut self, action: <Self::Machine as Machine>::Action);
    /// Takes what comes from elsewhere than the peer and [`Handle`]: with [`Side::catch_up`] before each.
    fn take(&mut self);
    /// After every step, before its actions.
    fn stepped(&mut self) {}
    /// After all actions.
    fn performed(&mut self) {}
    /// After what a round had to say was written.
    fn written(&mut self) {}
    fn update_status(&mut self);

    /// Runs until the state machine is at its end and everything it had to say is said.
    fn run(&mut self) {
        run_first();
        let mut promptness = Promptness::new(Self::Machine::NAME);
        let mut silent_at = None;
        loop {
            self.perform();
            self.write();
            self.written();
            self.update_status();
            let core = self.core();
            if core.machine.ended() {
                // The peer may never read our last words.
                let until = *silent_at.get_or_insert_with(|| boot_time() + PARTING);
                if !core.link.is_open() || boot_time() >= until {
                    return;
                }
            }
            let deadline = core.machine.next_deadline().unwrap_or(boot_time() + SECOND);
            promptness.sleeps();
            let ready = wait(core.link.channel(), &core.handle.waker, deadline);
            promptness.wakes(deadline);
            if ready.readable {
                self.read();
            }
            self.take();
            self.take_inward();
            self.catch_up();
            self.step(Self::Machine::tick());
        }
    }

    /// Before an input that is not the peer's: this thread may have been kept waiting, by the host or in a
    /// system call, and what the peer has said meanwhile comes first. Else a delay of our own would look
    /// like silence of the peer's. Never while a message is being acted upon: the next would overtake it.
    fn catch_up(&mut self) {
        if boot_time() > self.core().last_read + STALE {
            self.read();
        }
    }

    fn step(&mut self, input: <Self::Machine as Machine>::Input) {
        if let Err(error) = self.try_step(input) {
            // A bug of this side; the machine has not changed.
            log::error!("ft: {error}");
        }
    }

    fn try_step(
        &mut self,
        input: <Self::Machine as Machine>::Input,
    ) -> Result<(), <Self::Machine as Machine>::Illegal> {
        let mut actions = Vec::new();
        let core = self.core();
        let result = core.machine.step(boot_time(), input, &mut actions);
        core.actions.extend(actions);
        self.stepped();
        self.perform();
        result
    }

    fn perform(&mut self) {
        while let Some(action) = self.core().actions.pop_front() {
            self.act(action);
        }
        self.performed();
    }

    fn read(&mut self) {
        let core = self.core();
        core.last_read = boot_time();
        let heard = core.link.read();
        for message in heard.messages {
            self.step(Self::Machine::message(message));
        }
        self.lost(heard.lost);
    }

    fn write(&mut self) {
        let lost = self.core().link.flush();
        self.lost(lost);
    }

    /// Queues a message. What a round has to say leaves together at its end, for each piece wakes the
    /// peer's thread, which runs where a guest could; only what is large does not wait for that.
    fn send(&mut self, message: &Message) {
        let lost = self.core().link.send(message);
        self.lost(lost);
    }

    fn lost(&mut self, reason: Option<String>) {
        if let Some(reason) = reason {
            self.step(Self::Machine::lost(reason));
        }
    }

    fn take_inward(&mut self) {
        while let Ok(inward) = self.core().inward.try_recv() {
            self.catch_up();
            match inward {
                Inward::Told(input) => self.step(input),
                Inward::Asked(input, reply) => {
                    let result = self.try_step(input);
                    let _ = reply.send(result.map_err(|error| error.to_string()));
                }
                Inward::Looked(reply) => {
                    self.core().status.expire();
                    self.update_status();
                    let _ = reply.send(self.core().status.latest());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use ft::LogPosition;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;
    use crate::pair::channel::Channel;
    use crate::pair::tls::Security;

    /// Says what it was given, in order, and wants each message acted upon.
    #[derive(Default)]
    struct Listener(Vec<Input>);

    #[derive(Clone, Debug, PartialEq)]
    enum Input {
        Heard(u64),
        Loaded(u64),
        Operator,
        Other,
    }

    impl Machine for Listener {
        type Input = Input;
        type Action = u64;
        type Illegal = String;
        const NAME: &'static str = "listener";
        const ENDED: &'static str = "gone";

        fn step(
            &mut self,
            _: Duration,
            input: Input,
            actions: &mut Vec<u64>,
        ) -> Result<(), String> {
            if let Input::Heard(number) = input {
                actions.push(number);
            }
            self.0.push(input);
            Ok(())
        }

        fn next_deadline(&self) -> Option<Duration> {
            None
        }

        fn ended(&self) -> bool {
            false
        }

        fn message(message: Message) -> Input {
            match message {
                Message::Ack { received } => Input::Heard(received.0),
                _ => Input::Other,
            }
        }

        fn lost(_: String) -> Input {
            Input::Other
        }

        fn answered(_: Generation, _: Result<Claim, String>) -> Input {
            Input::Other
        }

        fn tick() -> Input {
            Input::Other
        }
    }

    /// Takes long to load each message: meanwhile the next arrives, and the last look at the socket is
    /// stale.
    struct SlowSide {
        core: Core<Listener>,
        peer: Channel,
        said: u64,
        will_say: u64,
    }

    impl SlowSide {
        fn new(will_say: u64) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (stream, _) = listener.accept().unwrap();
            let wire = Wire::accepting(stream, &Security::Plain).unwrap();
            let core = Core::new(Listener::default(), wire, Vec::new()).unwrap();
            let peer = Wire::connecting(peer, &Security::Plain, "127.0.0.1").unwrap();
            Self { core, peer: Channel::new(peer), said: 0, will_say }
        }

        fn peer_speaks(&mut self) {
            if self.said == self.will_say {
                return;
            }
            self.said += 1;
            self.peer.send(&Message::Ack { received: LogPosition(self.said) }).unwrap();
            self.peer.flush().unwrap();
        }

        /// Until something that was sent has arrived.
        fn wait_for_peer(&self) {
            use std::os::fd::{AsRawFd, BorrowedFd};
            let fd = self.core.link.channel().unwrap().as_raw_fd();
            // SAFETY: the channel keeps it open.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::NONE).unwrap();
        }
    }

    impl Side for SlowSide {
        type Machine = Listener;

        fn core(&mut self) -> &mut Core<Listener> {
            &mut self.core
        }

        fn act(&mut self, number: u64) {
            if self.said < self.will_say {
                self.peer_speaks();
                self.wait_for_peer();
            }
            self.core.last_read = Duration::ZERO;
            self.step(Input::Loaded(number));
        }

        fn take(&mut self) {}

        fn update_status(&mut self) {
            let heard = self.core.machine.0.len() as u64;
            self.core.status.update(boot_time(), "listening", |status| status.lag_us = heard);
        }
    }

    #[test]
    fn messages_that_arrive_during_a_slow_load_do_not_overtake_it() {
        let mut side = SlowSide::new(6);
        // Two at once, so that one waits already read while the first is acted upon.
        side.peer_speaks();
        side.peer_speaks();
        while side.core.machine.0.len() < 12 {
            side.wait_for_peer();
            side.read();
        }
        let expected: Vec<Input> =
            (1..=6).flat_map(|number| [Input::Heard(number), Input::Loaded(number)]).collect();
        assert_eq!(side.core.machine.0, expected);
    }

    #[test]
    fn what_the_peer_said_comes_before_an_input_of_this_side() {
        let mut side = SlowSide::new(1);
        let handle = side.core.handle.clone();
        let operator = std::thread::spawn(move || handle.ask(Input::Operator));
        while side.core.handle.inward.is_empty() {
            std::thread::yield_now();
        }
        side.peer_speaks();
        side.wait_for_peer();
        side.core.last_read = Duration::ZERO;
        side.take_inward();
        assert_eq!(side.core.machine.0, [Input::Heard(1), Input::Loaded(1), Input::Operator]);
        operator.join().unwrap().unwrap();
    }

    #[test]
    fn whoever_looks_sees_how_things_stand_now() {
        let mut side = SlowSide::new(0);
        side.update_status();
        side.step(Input::Operator);
        let handle = side.core.handle.clone();
        assert_eq!(handle.status.get().lag_us, 0, "that was before");
        let looker = std::thread::spawn(move || (handle.status().lag_us, handle));
        while side.core.handle.inward.is_empty() {
            std::thread::yield_now();
        }
        side.take_inward();
        let (seen, handle) = looker.join().unwrap();
        assert_eq!(seen, 1);
        drop(side);
        assert_eq!(handle.status().lag_us, 1, "the last one, of a thread that has ended");
    }
}
