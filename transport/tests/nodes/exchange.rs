//! Two real nodes in one process, over real sockets.

use super::common::*;
use hn4_transport::driver::TransportKind::Quic;
use hn4_transport::session::Role;

#[tokio::test]
async fn a_replica_gets_every_epoch_in_order_and_unchanged() {
    let cluster = Cluster::new(&["alpha", "beta"]);
    let alpha = Node::start(
        config("alpha", cluster.identity("alpha"), any_port()),
        state(1, Role::Primary),
    )
    .await;
    let beta = Node::start(
        config("beta", cluster.identity("beta"), any_port()),
        state(2, Role::Replica),
    )
    .await;
    let mut to_beta = alpha.add_peer(cluster.peer("beta", beta.transport.local_address(), Quic));
    let mut to_alpha = beta.add_peer(cluster.peer("alpha", alpha.transport.local_address(), Quic));
    let started = std::time::Instant::now();
    let (sessions, ()) = tokio::join!(
        serve_log(&mut to_beta, 2000),
        take_log(&mut to_alpha, &beta.state, 2000)
    );
    eprintln!("2000 epochs in {:?}", started.elapsed());
    assert_eq!(sessions, 1);
}
