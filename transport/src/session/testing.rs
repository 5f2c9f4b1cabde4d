//! States for tests.

use hn4::types::{ChainHash, Epoch, Incarnation, NodeId, Term, VolumeId};

use super::api::{CopyState, LocalState, Role};

/// A usable replica on node `node`, in term 1 of node 1.
pub(crate) fn state(node: u8) -> LocalState {
    LocalState {
        node: NodeId([node; 16]),
        volume: VolumeId([0xAA; 16]),
        birth_nonce: [0xBB; 16],
        size_bytes: 64 << 20,
        sector_bytes: 512,
        format_version: 1,
        max_epoch_bytes: 1 << 20,
        role: Role::Replica,
        term: Term {
            counter: 1,
            node: NodeId([1; 16]),
        },
        incarnation: Incarnation(1),
        tip: (Epoch(0), ChainHash::default()),
        tip_rank: hn4::types::Rank::default(),
        anchored: (Epoch(0), ChainHash::default()),
        durable: Epoch(0),
        applied: Epoch(0),
        copy: CopyState::Usable,
        proves: true,
        compares: true,
        repairs: true,
        resyncs: true,
    }
}
