//! Frames of the channel, and what a hostile peer can do with them: nothing but lose its connection.

use std::time::Duration;

use ft::message::{
    CloneStart, Hello, MAX_FRAME_BYTES, MAX_GREETING_BYTES, MessageError, PAGE_BYTES,
};
use ft::{
    Backup, BackupConfig, Capabilities, DiskMode, DiskReads, ExecutionPoint, FrameReader,
    Generation, LogPosition, Message, PageHasher, PageHashes, PairId, Primary, PrimaryConfig,
    Terms, Timing, Unequal, backup, primary,
};
use proptest::collection::vec;
use proptest::prelude::*;

fn capabilities() -> Capabilities {
    Capabilities {
        host: "here".into(),
        cpu_model: "soft-v1".into(),
        memory_bytes: 1 << 30,
        devices: vec!["net".into(), "disk".into()],
        disk_modes: vec![DiskMode::Shared],
    }
}

fn terms() -> Terms {
    Terms {
        pair: PairId::new("vm-1").expect("a name"),
        generation: Generation(3),
        timing: Timing::default(),
        log_buffer_bytes: 1 << 20,
        arbiter_url: "file:/shared".into(),
        disk_mode: DiskMode::Shared,
        same_host: true,
        disk_reads: DiskReads::Log,
        standbys: vec!["tcp:a:7700".into(), "tcp:b:7700".into()],
        standby: "tcp:b:7700".into(),
    }
}

fn hello(who: &str) -> Message {
    Message::Hello(Hello::new(who, capabilities()))
}

fn page_hashes() -> impl Strategy<Value = PageHashes> {
    vec((any::<u64>(), any::<u8>()), 0..20).prop_map(|pages| {
        let mut hasher = PageHasher::new();
        for (number, fill) in pages {
            hasher.add(number, &[fill]);
        }
        hasher.into_list()
    })
}

fn message() -> impl Strategy<Value = Message> {
    let text = "[ -~]{0,40}";
    let bytes = || vec(any::<u8>(), 0..300);
    // Positions near each other, so that some messages pass the first checks.
    let position = || prop_oneof![0u64..64, any::<u64>()].prop_map(LogPosition);
    let point = || any::<u64>().prop_map(ExecutionPoint);
    prop_oneof![
        Just(hello("peer")),
        Just(Message::CloneStart(CloneStart { terms: terms(), config: vec![1, 2] })),
        Just(Message::Accepted),
        text.prop_map(|reason| Message::Refused { reason }),
        bytes().prop_map(|bytes| Message::Payload { bytes }),
        (any::<u64>(), bytes()).prop_map(|(first, bytes)| Message::Pages { first, bytes }),
        (any::<u64>(), 1usize..3).prop_map(|(first, pages)| Message::Pages {
            first,
            bytes: vec![3; pages * PAGE_BYTES]
        }),
        (any::<u64>(), any::<u64>()).prop_map(|(first, count)| Message::ZeroPages { first, count }),
        any::<u64>().prop_map(|round| Message::RoundEnd { round }),
        (any::<u32>(), any::<u64>(), bytes())
            .prop_map(|(disk, first, hashes)| { Message::DiskHashes { disk, first, hashes } }),
        (any::<u32>(), any::<u64>(), bytes()).prop_map(|(disk, first, differing)| {
            Message::DiskDiffers { disk, first, differing }
        }),
        (any::<u32>(), any::<u64>(), bytes())
            .prop_map(|(disk, offset, bytes)| { Message::DiskData { disk, offset, bytes } }),
        (any::<u32>(), any::<u64>(), any::<u64>())
            .prop_map(|(disk, offset, len)| Message::DiskZeroes { disk, offset, len }),
        any::<u64>().prop_map(|round| Message::RoundTaken { round }),
        (point(), bytes()).prop_map(|(point, bytes)| Message::State { point, bytes }),
        Just(Message::Ready),
        Just(Message::Armed),
        Just(Message::Protecting),
        (position(), bytes()).prop_map(|(position, bytes)| Message::Log { position, bytes }),
        position().prop_map(|received| Message::Ack { received }),
        (point(), position(), any::<u64>()).prop_map(|(point, position, digests_compared)| {
            Message::Executed { point, position, digests_compared }
        }),
        (any::<u64>(), any::<Option<u64>>())
            .prop_map(|(stamp_us, echo_us)| Message::Heartbeat { stamp_us, echo_us }),
        (point(), prop_oneof![text, Just("memory".to_owned())], page_hashes()).prop_map(
            |(point, component, pages)| Message::DigestUnequal {
                point,
                unequal: Unequal { component, primary: Some(1), backup: None, page: None },
                pages
            }
        ),
        position().prop_map(|end| Message::HandOver { end }),
        any::<u64>().prop_map(|g| Message::TakenOver { generation: Generation(g) }),
        Just(Message::Yielded),
        any::<u64>().prop_map(|g| Message::Live { generation: Generation(g) }),
        text.prop_map(|reason| Message::Disable { reason }),
        text.prop_map(|reason| Message::Discarded { reason }),
    ]
}

/// The state of a conversation in which hostile messages begin: how far the honest part went.
fn honest_backup(steps: usize) -> Vec<backup::Input> {
    let start = CloneStart { terms: terms(), config: Vec::new() };
    let state = Message::State { point: ExecutionPoint(10), bytes: vec![1] };
    let log = Message::Log { position: LogPosition(0), bytes: vec![1, 0, 4] };
    let all = [
        backup::Input::Message(hello("primary")),
        backup::Input::Message(Message::CloneStart(start)),
        backup::Input::Accept,
        backup::Input::Message(state),
        backup::Input::Loaded,
        backup::Input::Message(Message::Armed),
        backup::Input::Message(log),
        backup::Input::TakeOver,
    ];
    all.into_iter().take(steps).collect()
}

fn honest_primary(steps: usize) -> Vec<primary::Input> {
    let mut hasher = PageHasher::new();
    hasher.add(1, &[7]);
    let digested =
        primary::Input::Digested { point: ExecutionPoint(12), pages: hasher.into_list() };
    let log = primary::Input::Log {
        end: LogPosition(3),
        point: ExecutionPoint(12),
        bytes: vec![1, 0, 4],
    };
    let all = [
        primary::Input::Message(hello("backup")),
        primary::Input::Message(Message::Accepted),
        primary::Input::CloneSent,
        digested,
        log,
        primary::Input::Message(Message::Ready),
        primary::Input::Message(Message::Protecting),
        primary::Input::HandOver,
        primary::Input::HandOverLogged { end: LogPosition(3) },
    ];
    all.into_iter().take(steps).collect()
}

/// States that end by an answer of the arbiter or by the vCPU's progress, not by time.
const WAITING: [&str; 2] = ["claiming", "draining"];

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn messages_pass_in_any_pieces(messages in vec(message(), 0..20), piece in 1usize..500) {
        let mut bytes = Vec::new();
        hello("first").append_frame(&mut bytes).expect("fits");
        for message in &messages {
            message.append_frame(&mut bytes).expect("fits");
        }
        let mut reader = FrameReader::new();
        let mut read = Vec::new();
        for piece in bytes.chunks(piece) {
            reader.push(piece);
            while let Some(message) = reader.next_message().expect("sound") {
                read.push(message);
            }
        }
        prop_assert_eq!(&read[1..], messages.as_slice());
        prop_assert_eq!(reader.pending_bytes(), 0);
    }

    #[test]
    fn garbage_never_panics(garbage in vec(any::<u8>(), 0..3000)) {
        let mut reader = FrameReader::new();
        reader.push(&garbage);
        while let Ok(Some(_)) = reader.next_message() {}
    }

    /// Whatever a peer says, at whatever time, a backup goes live only by a claim, and only the
    /// operator or the loss of its primary makes it ask for one.
    #[test]
    fn a_backup_survives_a_hostile_primary(
        steps in 0usize..9,
        messages in vec(message(), 0..30),
        gap_ms in 0u64..60,
    ) {
        let config = BackupConfig { who: "backup".into(), capabilities: capabilities() };
        let mut now = Duration::from_secs(1);
        let mut machine = Backup::new(now, config);
        let mut actions = Vec::new();
        for input in honest_backup(steps) {
            machine.step(now, input, &mut actions).expect("the honest part is legal");
        }
        for message in messages {
            now += Duration::from_millis(gap_ms);
            machine.step(now, backup::Input::Message(message), &mut actions).expect("never the caller's fault");
            prop_assert!(
                machine.ended()
                    || machine.next_deadline().is_some()
                    || WAITING.contains(&machine.state_name()),
                "stuck"
            );
        }
        let live = actions.iter().any(|action| matches!(action, backup::Action::GoLive { .. }));
        prop_assert!(!live, "live without a claim");
    }

    /// Whatever a peer says, a primary releases no output that was not acknowledged, and goes alone
    /// only with the peer's word or by a claim.
    #[test]
    fn a_primary_survives_a_hostile_backup(
        steps in 0usize..10,
        messages in vec(message(), 0..30),
        gap_ms in 0u64..60,
    ) {
        let config = PrimaryConfig {
            terms: terms(),
            who: "primary".into(),
            capabilities: capabilities(),
            vm_config: Vec::new(),
        };
        let mut now = Duration::from_secs(1);
        let mut actions = Vec::new();
        let mut machine = Primary::new(now, config, &mut actions);
        for input in honest_primary(steps) {
            machine.step(now, input, &mut actions).expect("the honest part is legal");
        }
        let mut given_up = false;
        let mut acknowledged = LogPosition(0);
        for message in messages {
            now += Duration::from_millis(gap_ms);
            match &message {
                Message::Ack { received } => acknowledged = acknowledged.max(*received),
                Message::Discarded { .. } | Message::DigestUnequal { .. } => given_up = true,
                _ => {}
            }
            let before = actions.len();
            machine.step(now, primary::Input::Message(message), &mut actions).expect("never the caller's fault");
            for action in &actions[before..] {
                match action {
                    primary::Action::Release { through } => {
                        prop_assert!(*through <= acknowledged && through.0 <= 3);
                    }
                    primary::Action::GoAlone { .. } => prop_assert!(given_up),
                    _ => {}
                }
            }
            prop_assert!(
                machine.ended()
                    || machine.next_deadline().is_some()
                    || WAITING.contains(&machine.state_name()),
                "stuck"
            );
        }
    }
}

#[test]
fn a_stranger_may_not_send_long_frames() {
    let mut reader = FrameReader::new();
    let length = MAX_GREETING_BYTES as u32 + 1;
    reader.push(&length.to_le_bytes());
    let refused = MessageError::TooLong { bytes: length as usize, limit: MAX_GREETING_BYTES };
    assert_eq!(reader.next_message(), Err(refused));

    let mut reader = FrameReader::new();
    let mut bytes = Vec::new();
    hello("peer").append_frame(&mut bytes).expect("fits");
    bytes.extend_from_slice(&(MAX_FRAME_BYTES as u32 + 1).to_le_bytes());
    reader.push(&bytes);
    assert!(matches!(reader.next_message(), Ok(Some(Message::Hello(_)))));
    assert!(matches!(reader.next_message(), Err(MessageError::TooLong { .. })));
}

#[test]
fn a_message_too_long_is_refused_and_leaves_no_trace() {
    let mut out = vec![9];
    let message = Message::State { point: ExecutionPoint(0), bytes: vec![0; MAX_FRAME_BYTES] };
    assert!(matches!(message.append_frame(&mut out), Err(MessageError::TooLong { .. })));
    assert_eq!(out, [9]);
}

#[test]
fn http_is_refused() {
    let mut reader = FrameReader::new();
    reader.push(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert!(reader.next_message().is_err());
}

#[test]
fn differences_are_named() {
    let offered = capabilities();
    let mut needed = capabilities();
    assert!(offered.lacking(&needed).is_empty());
    needed.cpu_model = "soft-v2".into();
    needed.memory_bytes = 1 << 31;
    needed.devices.push("tpm".into());
    needed.disk_modes = vec![DiskMode::Mirrored];
    let lacking = offered.lacking(&needed).join("\n");
    for word in ["soft-v2", "2147483648", "tpm", "Mirrored"] {
        assert!(lacking.contains(word), "{word} is missing in:\n{lacking}");
    }
}

#[test]
fn one_host_is_refused_unless_the_terms_allow_it() {
    for same_host in [false, true] {
        let config = PrimaryConfig {
            terms: Terms { same_host, ..terms() },
            who: "a".into(),
            capabilities: capabilities(),
            vm_config: Vec::new(),
        };
        let mut actions = Vec::new();
        let mut primary = Primary::new(Duration::ZERO, config, &mut actions);
        let input = primary::Input::Message(hello("b"));
        primary.step(Duration::ZERO, input, &mut actions).expect("a greeting is legal");
        let has = |wanted: fn(&primary::Action) -> bool| actions.iter().any(wanted);
        let started = |action: &primary::Action| {
            matches!(action, primary::Action::Send(Message::CloneStart(_)))
        };
        let refused = |action: &primary::Action| matches!(action, primary::Action::Abandoned { reason } if reason.contains("same_host=on"));
        assert_eq!((has(started), has(refused)), (same_host, !same_host));
    }
    let unknown = Capabilities { host: String::new(), ..capabilities() };
    assert!(!unknown.same_host(&unknown), "two hosts that do not tell are not known to be one");
}

#[test]
fn timing_is_checked() {
    assert_eq!(Timing::default().check(), Ok(()));
    assert_eq!(Timing::new(20, 50, 100).check(), Ok(()));
    assert!(Timing::new(20, 30, 100).check().is_err());
    assert!(Timing::new(0, 200, 100).check().is_err());
    assert!(Timing::new(20, 200, u64::MAX).check().is_err());
    for disk_timeout_ms in [0, u64::MAX] {
        let timing = Timing { disk_timeout_ms, ..Timing::default() };
        assert!(timing.check().is_err_and(|error| error.to_string().contains("disk_timeout_ms")));
    }
}

#[test]
fn a_peer_that_only_beats_is_given_up() {
    let config = BackupConfig { who: "b".into(), capabilities: capabilities() };
    let mut backup = Backup::new(Duration::ZERO, config);
    let mut actions = Vec::new();
    let mut hear = |at_ms, message| {
        let input = backup::Input::Message(message);
        backup.step(Duration::from_millis(at_ms), input, &mut actions).expect("legal at any time");
        backup.ended()
    };
    assert!(!hear(0, hello("a")));
    let beat = |stamp_us| Message::Heartbeat { stamp_us, echo_us: None };
    assert!((1..=10).any(|second| hear(second * 1000, beat(second))), "it keeps its connection");
}

#[test]
fn a_stalled_guest_runs_on_while_its_backup_is_lost() {
    let config = PrimaryConfig {
        terms: terms(),
        who: "a".into(),
        capabilities: capabilities(),
        vm_config: Vec::new(),
    };
    let mut actions = Vec::new();
    let mut primary = Primary::new(Duration::ZERO, config, &mut actions);
    let log = |start: u64| primary::Input::Log {
        end: LogPosition(start + (1 << 20)),
        point: ExecutionPoint(start + 1),
        bytes: vec![0; 1 << 20],
    };
    let said = primary::Input::Message;
    let reason = "reset by peer".to_owned();
    let (stall, unstall) = (
        |action: &primary::Action| matches!(action, primary::Action::Stall),
        |action: &primary::Action| matches!(action, primary::Action::Unstall),
    );
    for (input, stalls, unstalls) in [
        (said(hello("b")), false, false),
        (said(Message::Accepted), false, false),
        (primary::Input::CloneSent, false, false),
        (said(Message::Ready), false, false),
        (said(Message::Protecting), false, false),
        (log(0), true, false),
        (primary::Input::ConnectionLost { reason }, false, true),
        (log(1 << 20), false, false),
    ] {
        actions.clear();
        primary.step(Duration::ZERO, input.clone(), &mut actions).expect("legal in this order");
        let done = (actions.iter().any(stall), actions.iter().any(unstall));
        assert_eq!(done, (stalls, unstalls), "after {input:?}");
    }
}

/// A backup that has executed all of the log that it has, and is wanted to take over.
fn forced_backup() -> (Backup, Vec<backup::Action>) {
    let config = BackupConfig { who: "b".into(), capabilities: capabilities() };
    let mut backup = Backup::new(Duration::ZERO, config);
    let mut actions = Vec::new();
    for input in honest_backup(8) {
        backup.step(Duration::ZERO, input, &mut actions).expect("the honest part is legal");
    }
    let (point, position) = (ExecutionPoint(12), LogPosition(3));
    for input in [
        backup::Input::Executed { point, position, digests_compared: 0 },
        backup::Input::Stable { position },
    ] {
        backup.step(Duration::ZERO, input, &mut actions).expect("it was received");
    }
    (backup, actions)
}

#[test]
fn a_forced_take_over_costs_nothing_until_the_claim_is_won() {
    let (mut backup, mut actions) = forced_backup();
    assert!(matches!(actions.last(), Some(backup::Action::Claim { .. })), "{actions:?}");
    let generation = terms().generation;
    let mut now = Duration::ZERO;
    let mut received = 3;
    let mut step = |input: backup::Input, actions: &mut Vec<backup::Action>| {
        now += Duration::from_millis(10);
        actions.clear();
        backup.step(now, input, actions).expect("legal");
    };
    let acknowledges = |actions: &[backup::Action], position: u64| {
        let received = LogPosition(position);
        actions.contains(&backup::Action::Send(Message::Ack { received }))
    };
    let log = |position| {
        let bytes = vec![1, 0, 4];
        backup::Input::Message(Message::Log { position: LogPosition(position), bytes })
    };
    let heartbeat =
        |stamp_us| backup::Input::Message(Message::Heartbeat { stamp_us, echo_us: None });
    let echoes = |actions: &[backup::Action], stamp_us: u64| {
        actions.iter().any(|action| {
            matches!(action, backup::Action::Send(Message::Heartbeat { echo_us, .. }) if *echo_us == Some(stamp_us))
        })
    };
    // As long as the arbiter is out of reach.
    for _ in 0..100 {
        let answer = Err("no route to host".to_owned());
        step(backup::Input::ArbiterAnswered { generation, answer }, &mut actions);
        step(log(received), &mut actions);
        received += 3;
        assert!(acknowledges(&actions, received));
        step(heartbeat(received), &mut actions);
        assert!(echoes(&actions, received), "the primary has its lease");
    }
    // And no longer; but it is asked again only by a side that could go on.
    let tells = |actions: &[backup::Action]| {
        actions.contains(&backup::Action::Send(Message::TakenOver { generation }))
    };
    let executes = |position: u64| {
        let (point, position) = (ExecutionPoint(12), LogPosition(position));
        [
            backup::Input::Executed { point, position, digests_compared: 0 },
            backup::Input::Stable { position },
        ]
    };
    let claims = |actions: &[backup::Action]| {
        actions.iter().any(|action| matches!(action, backup::Action::Claim { .. }))
    };
    for _ in 0..100 {
        step(heartbeat(received), &mut actions);
        assert!(!claims(&actions), "it is not known whether its disks are well");
    }
    let [executed, stable] = executes(received);
    step(executed, &mut actions);
    step(stable, &mut actions);
    assert!(claims(&actions));
    step(log(received), &mut actions);
    received += 3;
    let answer = Ok(ft::Claim::Won);
    step(backup::Input::ArbiterAnswered { generation, answer }, &mut actions);
    let through = LogPosition(received);
    assert!(actions.contains(&backup::Action::MakeStable { through }) && !tells(&actions));
    step(log(received), &mut actions);
    assert!(!acknowledges(&actions, received + 3));
    step(heartbeat(received + 1), &mut actions);
    assert!(!echoes(&actions, received + 1));
    let [executed, stable] = executes(received);
    step(executed, &mut actions);
    assert!(!tells(&actions), "not all is stable");
    step(stable, &mut actions);
    assert!(tells(&actions));
    step(backup::Input::Message(Message::Yielded), &mut actions);
    let live = |action: &backup::Action| matches!(action, backup::Action::GoLive { .. });
    assert!(actions.iter().any(live), "{actions:?}");
}

#[test]
fn a_copy_that_differs_while_it_asks_is_left_to_its_primary() {
    for answer in [Err("no route to host".to_owned()), Ok(ft::Claim::Won)] {
        let (mut backup, mut actions) = forced_backup();
        let generation = terms().generation;
        let mut hasher = PageHasher::new();
        hasher.add(1, &[7]);
        let unequal =
            Unequal { component: "cpu".into(), primary: Some(1), backup: None, page: None };
        let log = Message::Log { position: LogPosition(3), bytes: vec![1, 0, 4] };
        let (point, pages) = (ExecutionPoint(13), hasher.into_list());
        for input in [
            backup::Input::Message(log),
            backup::Input::ArbiterAnswered { generation, answer },
            backup::Input::Unequal { point, unequal, pages },
        ] {
            backup.step(Duration::ZERO, input, &mut actions).expect("legal");
        }
        assert_eq!(backup.state_name(), "discarded");
        let said = |wanted: fn(&Message) -> bool| {
            actions
                .iter()
                .any(|action| matches!(action, backup::Action::Send(message) if wanted(message)))
        };
        assert!(said(|message| matches!(message, Message::DigestUnequal { .. })));
        assert!(
            !said(|message| matches!(message, Message::TakenOver { .. })),
            "the primary must not lose"
        );
    }
}

#[test]
fn a_hand_over_to_a_side_whose_disk_hangs_comes_back() {
    let config = BackupConfig { who: "b".into(), capabilities: capabilities() };
    let mut backup = Backup::new(Duration::ZERO, config);
    let mut actions = Vec::new();
    let end = LogPosition(3);
    let (point, position) = (ExecutionPoint(12), end);
    for input in honest_backup(7).into_iter().chain([
        backup::Input::Message(Message::HandOver { end }),
        backup::Input::Executed { point, position, digests_compared: 0 },
        backup::Input::AwaitsDisk { device: 0, failed: false },
    ]) {
        backup.step(Duration::ZERO, input, &mut actions).expect("legal");
    }
    let claims = |action: &backup::Action| matches!(action, backup::Action::Claim { .. });
    assert!(!actions.iter().any(claims), "it has taken the VM, and cannot go on");
    // The primary has waited long enough, and won.
    let message = Message::Disable { reason: "the primary goes on alone".into() };
    backup
        .step(Duration::from_secs(3), backup::Input::Message(message), &mut actions)
        .expect("legal");
    assert_eq!(backup.state_name(), "discarded");
}
