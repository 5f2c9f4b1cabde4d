//! What two nodes that trust each other exchange.

use bytes::Bytes;
use hn4::types::{ChainHash, Epoch, LogOffset};
use hn4_transport::driver::{PeerHandle, TransportKind};
use hn4_transport::session::{
    AckState, CloseReason, CopyState, Field, FoundBy, Input, Output, PieceKind, SeedPiece,
};

use super::common::*;

over_each_transport!(
    a_replica_gets_every_epoch_in_order_and_unchanged,
    a_long_transfer_needs_one_session_only,
    a_fresh_copy_is_seeded_and_then_follows_the_log,
    a_copy_of_another_size_is_refused_by_both_and_says_why,
    a_primary_is_asked_to_step_down,
    a_change_of_role_ends_the_session_and_the_next_one_knows_it,
    shutting_down_says_goodbye,
);

async fn a_replica_gets_every_epoch_in_order_and_unchanged(kind: TransportKind) {
    let mut pair = Pair::start(kind).await;
    assert_eq!(pair.replicate(2000).await, 1);
}

/// Enough to reach full speed and the largest datagrams, where batches are full.
async fn a_long_transfer_needs_one_session_only(kind: TransportKind) {
    let mut pair = Pair::start(kind).await;
    let started = std::time::Instant::now();
    let (pieces, length) = (1024_u64, 256 << 10);
    let body = Bytes::from(vec![0x5A; length]);
    let served = async {
        let mut session = None;
        let mut next_epoch = 1;
        loop {
            let from = next(&mut pair.to_beta).await;
            assert_eq!(
                *session.get_or_insert(from.session),
                from.session,
                "the session broke"
            );
            match from.output {
                Output::Subscribe { .. } => {
                    let opened = Input::FeedOpened { from: Epoch(1) };
                    send(&pair.to_beta, from.session, opened).await;
                }
                Output::PeerAck(ack) if ack.received.0 == pieces => return,
                Output::PeerCredit { bytes } => {
                    for _ in 0..bytes / body.len() as u64 {
                        if next_epoch <= pieces {
                            let (epoch, frame) = (Epoch(next_epoch), body.clone());
                            let input = Input::SendEpoch { epoch, frame };
                            send(&pair.to_beta, from.session, input).await;
                            next_epoch += 1;
                        }
                    }
                }
                _ => {}
            }
        }
    };
    let taken = async {
        loop {
            let from = next(&mut pair.to_alpha).await;
            let session = from.session;
            match from.output {
                Output::FeedOpened { .. } => {
                    let bytes = 32 * body.len() as u64;
                    send(&pair.to_alpha, session, Input::Credit { bytes }).await;
                }
                Output::EpochReceived { epoch, frame } => {
                    assert_eq!(frame.len(), body.len());
                    let bytes = frame.len() as u64;
                    send(&pair.to_alpha, session, Input::Credit { bytes }).await;
                    let ack = AckState {
                        received: epoch,
                        ..AckState::default()
                    };
                    send(&pair.to_alpha, session, Input::Ack(ack)).await;
                }
                _ => {}
            }
        }
    };
    tokio::select! {
        () = served => {}
        () = taken => {}
    }
    println!("256 MiB over {kind} in {:?}", started.elapsed());
}

async fn a_fresh_copy_is_seeded_and_then_follows_the_log(kind: TransportKind) {
    let fresh = CopyState::Seeding { cursor_bytes: 4096 };
    let mut pair = Pair::start_with(kind, |state| state.copy = fresh, |address| address).await;
    tokio::join!(
        seed_source(&mut pair.to_beta),
        seed_sink(&mut pair.to_alpha)
    );
}

fn seed_data(index: u64) -> Bytes {
    Bytes::from(vec![index.to_le_bytes()[0]; 65536])
}

async fn seed_source(handle: &mut PeerHandle) {
    let (session, cursor_bytes) = wait_for(handle, |output| match output {
        Output::SeedRequest { cursor_bytes, .. } => Some(*cursor_bytes),
        _ => None,
    })
    .await;
    assert_eq!(cursor_bytes, 4096);
    let start = Input::SeedStart {
        from: (Epoch(6), ChainHash([6; 32])),
        log_offset: LogOffset(8192),
        cursor_bytes,
    };
    send(handle, session, start).await;
    for index in 0..200_u64 {
        let kind = PieceKind::Data(seed_data(index));
        let checksum = u32::try_from(index).expect("small");
        let piece = SeedPiece {
            offset_bytes: index << 16,
            kind,
            checksum,
        };
        send(handle, session, Input::SeedPiece(piece)).await;
    }
    let kind = PieceKind::Zero { length: 32 << 20 };
    let piece = SeedPiece {
        offset_bytes: 32 << 20,
        kind,
        checksum: 0,
    };
    send(handle, session, Input::SeedPiece(piece)).await;
    let epoch = Input::SendEpoch {
        epoch: Epoch(7),
        frame: frame(7),
    };
    send(handle, session, epoch).await;
    let end = Input::SeedEnd {
        usable_after: Epoch(7),
    };
    send(handle, session, end).await;
    let (_, cursor) = wait_for(handle, |output| match output {
        Output::SeedAck { cursor_bytes } => Some(*cursor_bytes),
        _ => None,
    })
    .await;
    assert_eq!(cursor, 64 << 20);
}

async fn seed_sink(handle: &mut PeerHandle) {
    let (session, _) = wait_for(handle, |output| {
        matches!(output, Output::PeerState(_)).then_some(())
    })
    .await;
    send(handle, session, Input::Credit { bytes: 1 << 20 }).await;
    let start = next(handle).await.output;
    assert_eq!(
        start,
        Output::SeedStart {
            from: (Epoch(6), ChainHash([6; 32])),
            log_offset: LogOffset(8192),
            cursor_bytes: 4096
        }
    );
    for index in 0..200_u64 {
        let piece = match next(handle).await.output {
            Output::SeedPiece(piece) => piece,
            other => panic!("piece {index} is missing, there is {other:?}"),
        };
        assert_eq!(
            (piece.offset_bytes, u64::from(piece.checksum)),
            (index << 16, index)
        );
        assert_eq!(piece.kind, PieceKind::Data(seed_data(index)));
        send(handle, session, Input::Credit { bytes: 65536 }).await;
    }
    let Output::SeedPiece(zeroes) = next(handle).await.output else {
        panic!("the zeroes are missing");
    };
    assert_eq!(zeroes.kind, PieceKind::Zero { length: 32 << 20 });
    let epoch = next(handle).await.output;
    assert_eq!(
        epoch,
        Output::EpochReceived {
            epoch: Epoch(7),
            frame: frame(7)
        }
    );
    let end = next(handle).await.output;
    assert_eq!(
        end,
        Output::SeedEnd {
            usable_after: Epoch(7)
        }
    );
    send(
        handle,
        session,
        Input::SeedAck {
            cursor_bytes: 64 << 20,
        },
    )
    .await;
}

async fn a_copy_of_another_size_is_refused_by_both_and_says_why(kind: TransportKind) {
    let mut pair =
        Pair::start_with(kind, |state| state.size_bytes += 4096, |address| address).await;
    let ours = (64_u64 << 20).to_string();
    let theirs = ((64_u64 << 20) + 4096).to_string();
    let refusal = |output: &Output| match output {
        Output::Refused { reason } => Some(reason.clone()),
        _ => None,
    };
    let (_, at_alpha) = wait_for(&mut pair.to_beta, refusal).await;
    assert_eq!(
        (at_alpha.field, &at_alpha.ours, &at_alpha.theirs),
        (Field::SizeBytes, &ours, &theirs)
    );
    let (_, at_beta) = wait_for(&mut pair.to_alpha, refusal).await;
    assert_eq!(
        (at_beta.field, &at_beta.ours, &at_beta.theirs),
        (Field::SizeBytes, &theirs, &ours)
    );
    assert!(at_alpha.found_by == FoundBy::Us || at_beta.found_by == FoundBy::Us);
}

async fn a_primary_is_asked_to_step_down(kind: TransportKind) {
    let mut pair = Pair::start(kind).await;
    let hello = |output: &Output| matches!(output, Output::PeerState(_)).then_some(());
    let (session, ()) = wait_for(&mut pair.to_alpha, hello).await;
    send(&pair.to_alpha, session, Input::StepDown).await;
    let asked = |output: &Output| matches!(output, Output::StepDown).then_some(());
    wait_for(&mut pair.to_beta, asked).await;
}

async fn a_change_of_role_ends_the_session_and_the_next_one_knows_it(kind: TransportKind) {
    use hn4_transport::session::Role;
    let mut pair = Pair::start(kind).await;
    let role = |output: &Output| match output {
        Output::PeerState(state) => Some(state.role),
        _ => None,
    };
    assert_eq!(wait_for(&mut pair.to_alpha, role).await.1, Role::Primary);
    pair.alpha
        .state
        .send_modify(|state| state.role = Role::Fenced);
    let (_, reason) = wait_for(&mut pair.to_beta, |output| match output {
        Output::Closed { reason } => Some(reason.clone()),
        _ => None,
    })
    .await;
    assert_eq!(reason, CloseReason::RoleChanged);
    assert_eq!(wait_for(&mut pair.to_alpha, role).await.1, Role::Fenced);
}

async fn shutting_down_says_goodbye(kind: TransportKind) {
    let mut pair = Pair::start(kind).await;
    let hello = |output: &Output| matches!(output, Output::PeerState(_)).then_some(());
    wait_for(&mut pair.to_beta, hello).await;
    let closed = |output: &Output| match output {
        Output::Closed { reason } => Some(reason.clone()),
        _ => None,
    };
    let shutdown = pair.alpha.transport.shutdown();
    let goodbye = wait_for(&mut pair.to_alpha, closed);
    let ((), (_, reason)) = tokio::join!(shutdown, goodbye);
    assert_eq!(reason, CloseReason::PeerError("it is closing".to_owned()));
}
