//! Orders and bytes that nobody thought of.

use proptest::prelude::*;

use super::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever order the streams progress in, every epoch arrives, in order and unchanged.
    #[test]
    fn any_schedule_delivers_the_log_in_order(
        schedule in prop::collection::vec((0_usize..2, any::<bool>()), 1..200),
        last in 1_u64..40,
        grant in 1_u64..2_000_000,
    ) {
        let mut line = Line::new(primary(), replica());
        line.settle();
        line.ends[0].input(Input::FeedOpened { from: Epoch(1) });
        for epoch in 1..=last {
            line.ends[0].input(Input::SendEpoch { epoch: Epoch(epoch), frame: frame(epoch) });
        }
        for (from, is_data) in schedule {
            let stream = if is_data { Stream::Data } else { Stream::Control };
            line.deliver(Duration::ZERO, from, stream);
        }
        let arrived = |line: &Line| -> Vec<(Epoch, Bytes)> {
            line.ends[1].outputs.iter().filter_map(|output| match output {
                Output::EpochReceived { epoch, frame } => Some((*epoch, frame.clone())),
                _ => None,
            }).collect()
        };
        for _ in 0..=last {
            line.ends[1].input(Input::Credit { bytes: grant });
            line.settle();
        }
        let arrived = arrived(&line);
        let sent: Vec<_> = (1..=last).map(|epoch| (Epoch(epoch), frame(epoch))).collect();
        // A small grant moves one frame at a time until the debt is paid off.
        prop_assert!(sent.starts_with(&arrived));
        let granted = grant * (last + 1);
        let needed: u64 = sent.iter().map(|(_, frame)| frame.len() as u64).sum();
        prop_assert!(arrived.len() == sent.len() || needed >= granted);
        prop_assert!(line.ends.iter().all(|end| !end.session.is_closed()));
    }

    /// Bytes that are no frames end the session; they never panic.
    #[test]
    fn arbitrary_bytes_end_the_session(
        bytes in prop::collection::vec(any::<u8>(), 16..200),
        on_data in any::<bool>(),
    ) {
        let (mut end, ..) = liar();
        let stream = if on_data { Stream::Data } else { Stream::Control };
        end.session.handle(Duration::ZERO, Event::Received { stream, bytes: bytes.into() });
        end.collect(true);
        let is_protocol = matches!(end.closed(), Some(CloseReason::Protocol(_)));
        prop_assert!(is_protocol);
    }

    /// Authentic frames with arbitrary payloads, of any kind, in any order, never panic.
    #[test]
    fn arbitrary_authentic_frames_never_panic(
        frames in prop::collection::vec(
            (0_u8..4, any::<bool>(), prop::collection::vec(any::<u8>(), 0..120), any::<bool>()),
            1..30,
        ),
    ) {
        let (mut end, mut control, mut data) = liar();
        for (kind, is_small, mut payload, takes) in frames {
            let stream = if kind == 0 { Stream::Data } else { Stream::Control };
            let (sealer, kind) = match kind {
                0 => (&mut data, FrameKind::Data),
                1 => (&mut control, FrameKind::Control),
                2 => (&mut control, FrameKind::Heartbeat),
                _ => (&mut control, FrameKind::Error),
            };
            // Half of the bulk messages get a legal kind and small numbers.
            if kind == FrameKind::Data && is_small && payload.len() >= 32 {
                payload[0] %= 8;
                payload[1..8].fill(0);
                for number in [8, 16, 24] {
                    payload[number] %= 64;
                    payload[number + 1..number + 8].fill(0);
                }
            }
            let bytes = sealer.seal(kind, true, &payload, Bytes::new()).to_bytes();
            end.session.handle(Duration::ZERO, Event::Received { stream, bytes });
            end.collect(takes);
        }
    }

    /// Messages that are well formed, in any order, never panic and never pass for an epoch.
    #[test]
    fn arbitrary_orders_of_control_messages_never_panic(
        order in prop::collection::vec(0_usize..13, 1..40),
    ) {
        use crate::wire::control::{ControlMessage, Hello};
        let tip = (Epoch(3), ChainHash([1; 32]));
        let term = Term { counter: 2, node: NodeId([1; 16]) };
        let state = Box::new(primary());
        let protocol = (1, 1);
        let hello = Hello { protocol, capabilities: capability::offered(true), state: primary() };
        let messages = [
            ControlMessage::Hello(Box::new(hello)),
            ControlMessage::Subscribe { tip, anchored: tip },
            ControlMessage::SeedRequest { cursor_bytes: u64::MAX, from: tip },
            ControlMessage::FeedRefused(FeedRefusal::Truncate { to: tip }),
            ControlMessage::Anchored(tip),
            ControlMessage::Ack(AckState::default()),
            ControlMessage::Credit { bytes: u64::MAX },
            ControlMessage::SeedAck { cursor_bytes: 0 },
            ControlMessage::FrameAck { control_sequence: 1, data_sequence: 0 },
            ControlMessage::State(state),
            ControlMessage::TermNotice(term),
            ControlMessage::StepDown,
            ControlMessage::Proof(Bytes::from_static(b"a proof")),
        ];
        let (mut end, mut control, _) = liar();
        for index in order {
            let message = messages[index].encode();
            let frame = control.seal(FrameKind::Control, true, &message, Bytes::new());
            let (stream, bytes) = (Stream::Control, frame.to_bytes());
            end.session.handle(Duration::ZERO, Event::Received { stream, bytes });
            end.collect(true);
        }
        let epoch = |output: &Output| matches!(output, Output::EpochReceived { .. });
        prop_assert!(!end.outputs.iter().any(epoch));
    }
}
