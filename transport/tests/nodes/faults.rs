//! What goes wrong on the way, and nodes that die: afterwards nothing is lost.

use hn4_transport::driver::TransportKind;
use hn4_transport::session::{CloseReason, Input, Output, Role};

use super::common::*;
use super::proxy::{Line, Proxy};

over_each_transport!(
    a_killed_replica_comes_back_and_misses_nothing,
    a_killed_primary_comes_back_and_goes_on,
    a_flipping_line_loses_nothing,
    a_stalled_line_is_noticed_and_left,
    a_cut_line_is_joined_again,
    garbage_at_the_port_disturbs_nobody,
    inputs_for_an_ended_session_have_no_effect,
);

async fn a_killed_replica_comes_back_and_misses_nothing(kind: TransportKind) {
    let mut pair = Pair::start(kind).await;
    pair.replicate(100).await;
    for round in 1..4_u64 {
        let address = pair.beta.transport.local_address();
        let replica = pair.beta.state.borrow().clone();
        // Dropped, not shut down: the peer gets no last words.
        drop(pair.beta);
        let identity = pair.cluster.identity("beta");
        pair.beta = restart(config("beta", identity, address), replica).await;
        let alpha = pair.alpha.transport.local_address();
        pair.to_alpha = pair.beta.add_peer(pair.cluster.peer("alpha", alpha, kind));
        pair.replicate(100 + round * 300).await;
        assert_eq!(pair.beta.state.borrow().tip.0.0, 100 + round * 300);
    }
}

async fn a_killed_primary_comes_back_and_goes_on(kind: TransportKind) {
    let mut pair = Pair::start(kind).await;
    pair.replicate(100).await;
    let address = pair.alpha.transport.local_address();
    let primary = pair.alpha.state.borrow().clone();
    drop(pair.alpha);
    pair.alpha = restart(
        config("alpha", pair.cluster.identity("alpha"), address),
        primary,
    )
    .await;
    let beta = pair.beta.transport.local_address();
    pair.to_beta = pair.alpha.add_peer(pair.cluster.peer("beta", beta, kind));
    pair.server = Server::default();
    pair.replicate(400).await;
}

/// Starts a node on a port that its predecessor has just left; the system may need a moment.
async fn restart(
    config: hn4_transport::driver::TransportConfig,
    state: hn4_transport::session::LocalState,
) -> Node {
    let (sender, receiver) = tokio::sync::watch::channel(state);
    let hn4_transport::driver::TransportConfig {
        listen,
        node_name,
        identity,
        session,
        timings,
    } = config;
    let pem = std::sync::Arc::new(identity);
    let deadline = tokio::time::Instant::now() + LIMIT;
    loop {
        let config = hn4_transport::driver::TransportConfig {
            listen,
            node_name: node_name.clone(),
            identity: pem.duplicate(),
            session: session.clone(),
            timings: timings.clone(),
        };
        let volumes = std::collections::HashMap::from([(VOLUME, receiver.clone())]);
        let environment = hn4_transport::driver::Environment::system(11);
        match hn4_transport::driver::Transport::start(config, volumes, environment).await {
            Ok(transport) => {
                return Node {
                    transport,
                    state: sender,
                };
            }
            Err(error) if tokio::time::Instant::now() > deadline => panic!("{error}"),
            Err(_) => tokio::task::yield_now().await,
        }
    }
}

async fn a_flipping_line_loses_nothing(kind: TransportKind) {
    let mut proxy = None;
    let mut pair = Pair::start_with(
        kind,
        |_| {},
        |beta| {
            let (line, address) = Proxy::start(kind, beta);
            proxy = Some(line);
            address
        },
    )
    .await;
    let proxy = proxy.expect("a proxy");
    pair.replicate(50).await;
    proxy.set(Line::Flipping(40));
    let sessions = pair.replicate(600).await;
    assert!(proxy.flipped() > 0, "nothing was flipped");
    // A damaged datagram is sent again by QUIC; a damaged TLS record ends the connection.
    if kind == TransportKind::Wss {
        assert!(sessions > 0, "no session was lost");
    }
}

async fn a_stalled_line_is_noticed_and_left(kind: TransportKind) {
    let mut proxy = None;
    let mut pair = Pair::start_with(
        kind,
        |_| {},
        |beta| {
            let (line, address) = Proxy::start(kind, beta);
            proxy = Some(line);
            address
        },
    )
    .await;
    let proxy = proxy.expect("a proxy");
    pair.replicate(50).await;
    proxy.set(Line::Stalled);
    let closed = |output: &Output| match output {
        Output::Closed { reason } => Some(reason.clone()),
        _ => None,
    };
    let (_, at_alpha) = wait_for(&mut pair.to_beta, closed).await;
    let (_, at_beta) = wait_for(&mut pair.to_alpha, closed).await;
    for reason in [at_alpha, at_beta] {
        assert_eq!(reason, CloseReason::HeartbeatTimeout);
    }
    proxy.set(Line::Open);
    assert!(pair.replicate(300).await > 0);
}

async fn a_cut_line_is_joined_again(kind: TransportKind) {
    let mut proxy = None;
    let mut pair = Pair::start_with(
        kind,
        |_| {},
        |beta| {
            let (line, address) = Proxy::start(kind, beta);
            proxy = Some(line);
            address
        },
    )
    .await;
    let proxy = proxy.expect("a proxy");
    pair.replicate(50).await;
    for round in 1..4_u64 {
        proxy.set(Line::Cut);
        let closed = |output: &Output| matches!(output, Output::Closed { .. }).then_some(());
        wait_for(&mut pair.to_beta, closed).await;
        proxy.set(Line::Open);
        assert!(pair.replicate(50 + round * 100).await > 0);
    }
}

async fn garbage_at_the_port_disturbs_nobody(kind: TransportKind) {
    use tokio::io::AsyncWriteExt;
    let mut pair = Pair::start(kind).await;
    let address = pair.beta.transport.local_address();
    let socket = tokio::net::UdpSocket::bind(("127.0.0.1", 0))
        .await
        .expect("a socket");
    for index in 0..500_u64 {
        let length = 1 + usize::try_from(index * 37 % 1400).expect("small");
        // Some look like the beginning of a handshake.
        let mut bytes = vec![index.to_le_bytes()[0]; length];
        bytes[0] |= if index % 2 == 0 { 0xC0 } else { 0 };
        socket.send_to(&bytes, address).await.expect("sent");
        if index % 50 == 0 {
            let mut stranger = tokio::net::TcpStream::connect(address)
                .await
                .expect("connected");
            // It may be thrown out before it has written everything.
            let _ = stranger.write_all(&bytes).await;
        }
    }
    pair.replicate(300).await;
}

async fn inputs_for_an_ended_session_have_no_effect(kind: TransportKind) {
    let mut pair = Pair::start(kind).await;
    let hello = |output: &Output| matches!(output, Output::PeerState(_)).then_some(());
    let (first, ()) = wait_for(&mut pair.to_beta, hello).await;
    send(&pair.to_beta, first, Input::Close).await;
    let (second, ()) = wait_for(&mut pair.to_beta, hello).await;
    assert!(second > first);
    // Closing the first one again must not close the second.
    send(&pair.to_beta, first, Input::Close).await;
    assert_eq!(pair.alpha.state.borrow().role, Role::Primary);
    let primary = serve_log_in(&mut pair.to_beta, second);
    let replica = take_log(&mut pair.to_alpha, &pair.beta.state, 20);
    tokio::join!(primary, replica);
}

/// Serves 20 epochs in this very session.
async fn serve_log_in(
    handle: &mut hn4_transport::driver::PeerHandle,
    session: hn4_transport::session::SessionId,
) {
    let (id, tip) = wait_for(handle, |output| match output {
        Output::Subscribe { tip, .. } => Some(*tip),
        Output::Closed { reason } => panic!("closed: {reason}"),
        _ => None,
    })
    .await;
    assert_eq!(id, session);
    let first = tip.0.next();
    send(handle, id, Input::FeedOpened { from: first }).await;
    for epoch in first.0..=20 {
        let epoch = hn4::types::Epoch(epoch);
        send(
            handle,
            id,
            Input::SendEpoch {
                epoch,
                frame: frame(epoch.0),
            },
        )
        .await;
    }
}
