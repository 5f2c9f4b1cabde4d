//! Who may not come in, and what the configuration may not say.

use std::collections::HashMap;

use hn4::types::VolumeId;
use hn4_transport::driver::{
    Environment, LinkStatus, PeerHandle, StartError, Transport, TransportKind,
};
use hn4_transport::pki;
use hn4_transport::session::{Field, Output, PeerRoles, Role};
use tokio::sync::watch;

use super::common::*;

over_each_transport!(
    a_peer_whose_key_is_not_the_pinned_one_is_not_talked_to,
    a_valid_certificate_without_a_pin_gets_nothing,
    a_certificate_of_another_authority_gets_nothing,
    a_volume_that_is_not_shared_is_refused_and_the_others_go_on,
    a_removed_peer_is_gone,
);

/// Waits until the connection below a handle has failed; gives the reason. No session may come.
async fn failure(handle: &mut PeerHandle) -> String {
    let failed = |status: &LinkStatus| matches!(status, LinkStatus::Failed { .. });
    let status = tokio::time::timeout(LIMIT, handle.link.wait_for(failed))
        .await
        .expect("a failure in time")
        .expect("a running transport")
        .clone();
    assert_no_hello(handle);
    match status {
        LinkStatus::Failed { why } => why,
        other => panic!("{other:?}"),
    }
}

fn assert_no_hello(handle: &mut PeerHandle) {
    while let Ok(from) = handle.from.try_recv() {
        assert!(
            !matches!(from.output, Output::PeerState(_)),
            "a stranger got a hello"
        );
    }
}

async fn a_peer_whose_key_is_not_the_pinned_one_is_not_talked_to(kind: TransportKind) {
    // Mallory has a valid certificate in the name of beta, but another key.
    let cluster = Cluster::new(&["alpha", "beta", "mallory"]);
    let fake = cluster.again("beta");
    let alpha = Node::start(
        config("alpha", cluster.identity("alpha"), any_port()),
        state(1, Role::Primary),
    )
    .await;
    let mallory = Node::start(config("beta", fake, any_port()), state(2, Role::Replica)).await;
    let address = alpha.transport.local_address();
    let mut to_alpha = mallory.add_peer(cluster.peer("alpha", address, kind));
    let address = mallory.transport.local_address();
    let mut to_beta = alpha.add_peer(cluster.peer("beta", address, kind));
    let why = failure(&mut to_beta).await;
    assert!(why.contains("pinned is"), "{why}");
    assert_no_hello(&mut to_alpha);
}

async fn a_valid_certificate_without_a_pin_gets_nothing(kind: TransportKind) {
    let cluster = Cluster::new(&["alpha", "beta", "stranger"]);
    let beta = Node::start(
        config("beta", cluster.identity("beta"), any_port()),
        state(2, Role::Replica),
    )
    .await;
    let address = beta.transport.local_address();
    let mut expected = beta.add_peer(cluster.peer("alpha", any_port(), kind));
    // The stranger calls itself alpha, so that it dials; its key is its own.
    let stranger = Node::start(
        config("alpha", cluster.identity("stranger"), any_port()),
        state(1, Role::Primary),
    )
    .await;
    let mut to_beta = stranger.add_peer(cluster.peer("beta", address, kind));
    failure(&mut to_beta).await;
    assert_no_hello(&mut expected);
}

async fn a_certificate_of_another_authority_gets_nothing(kind: TransportKind) {
    let (cluster, other) = (Cluster::new(&["beta"]), Cluster::new(&["alpha"]));
    let beta = Node::start(
        config("beta", cluster.identity("beta"), any_port()),
        state(2, Role::Replica),
    )
    .await;
    let alpha = Node::start(
        config("alpha", other.identity("alpha"), any_port()),
        state(1, Role::Primary),
    )
    .await;
    // Both have pinned each other's key; the chains do not lead to an authority they believe.
    let mut to_alpha = beta.add_peer(other.peer("alpha", alpha.transport.local_address(), kind));
    let address = beta.transport.local_address();
    let mut to_beta = alpha.add_peer(cluster.peer("beta", address, kind));
    let why = failure(&mut to_beta).await;
    assert!(why.contains("invalid peer certificate"), "{why}");
    assert_no_hello(&mut to_alpha);
}

async fn a_volume_that_is_not_shared_is_refused_and_the_others_go_on(kind: TransportKind) {
    let cluster = Cluster::new(&["alpha", "beta"]);
    let second = VolumeId([0xCC; 16]);
    let node = |name| config(name, cluster.identity(name), any_port());
    let alpha = Node::start(node("alpha"), state(1, Role::Primary)).await;
    let beta = Node::start(node("beta"), state(2, Role::Replica)).await;
    let mut other = state(1, Role::Primary);
    other.volume = second;
    let (_other, receiver) = watch::channel(other);
    alpha.transport.add_volume(second, receiver.clone());
    // Beta has the second volume too, but does not share it with alpha.
    beta.transport.add_volume(second, receiver);
    let address = alpha.transport.local_address();
    let mut to_alpha = beta.add_peer(cluster.peer("alpha", address, kind));
    let mut peer = cluster.peer("beta", beta.transport.local_address(), kind);
    peer.volumes.push((second, PeerRoles::default()));
    let mut handles = alpha.transport.add_peer(peer).expect("a peer");
    let mut refused = handles.pop().expect("a handle");
    let mut shared = handles.pop().expect("a handle");
    assert_eq!(refused.volume, second);
    let (_, field) = wait_for(&mut refused, |output| match output {
        Output::Refused { reason } => Some(reason.field),
        _ => None,
    })
    .await;
    assert_eq!(field, Field::NotShared);
    let mut server = Server::default();
    let served = server.serve(&mut shared, 200);
    let taken = async {
        take_log(&mut to_alpha, &beta.state, 200).await;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        sessions = served => assert_eq!(sessions, 1),
        () = taken => {}
    }
}

async fn a_removed_peer_is_gone(kind: TransportKind) {
    let mut pair = Pair::start(kind).await;
    pair.replicate(20).await;
    assert!(pair.beta.transport.remove_peer("alpha"));
    assert!(!pair.beta.transport.remove_peer("alpha"));
    let why = failure(&mut pair.to_beta).await;
    assert!(!why.is_empty());
    // Added again, it goes on where it was.
    let address = pair.alpha.transport.local_address();
    pair.to_alpha = pair
        .beta
        .add_peer(pair.cluster.peer("alpha", address, kind));
    pair.replicate(100).await;
}

#[tokio::test]
async fn a_port_in_use_is_an_error_that_names_it() {
    let cluster = Cluster::new(&["alpha"]);
    let first = config("alpha", cluster.identity("alpha"), any_port());
    let first = Node::start(first, state(1, Role::Primary)).await;
    let address = first.transport.local_address();
    let second = config("alpha", cluster.identity("alpha"), address);
    let started = Transport::start(second, HashMap::new(), Environment::system(1)).await;
    let error = started.err().expect("the port is taken");
    assert!(matches!(error, StartError::Listen { .. }));
    assert!(error.to_string().contains(&address.to_string()), "{error}");
}

#[tokio::test]
async fn a_contradicting_configuration_is_refused_by_name() {
    let cluster = Cluster::new(&["alpha", "beta"]);
    let alpha = config("alpha", cluster.identity("alpha"), any_port());
    let alpha = Node::start(alpha, state(1, Role::Primary)).await;
    let good = cluster.peer("beta", any_port(), TransportKind::Quic);
    let refusal = |change: fn(&mut hn4_transport::driver::PeerConfig)| {
        let mut peer = good.clone();
        change(&mut peer);
        alpha
            .transport
            .add_peer(peer)
            .expect_err("a refusal")
            .to_string()
    };
    assert!(refusal(|peer| peer.address = None).contains("give an address"));
    assert!(refusal(|peer| peer.name = "alpha".to_owned()).contains("this node itself"));
    assert!(
        refusal(|peer| peer.volumes.push((VolumeId([9; 16]), PeerRoles::default())))
            .contains("not known")
    );
    assert!(refusal(|peer| peer.volumes.push((VOLUME, PeerRoles::default()))).contains("twice"));
    assert!(refusal(|peer| peer.name = "not a name".to_owned()).contains("node name"));
    assert!(alpha.transport.add_peer(good.clone()).is_ok());
    let mut same_key = good;
    same_key.name = "gamma".to_owned();
    let error = alpha
        .transport
        .add_peer(same_key)
        .expect_err("a refusal")
        .to_string();
    assert!(error.contains("belongs to peer \"beta\""), "{error}");
    assert!(pki::check_name("beta").is_ok());
}
