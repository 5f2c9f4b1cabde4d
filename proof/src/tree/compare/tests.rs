//! Two trees, one asking the other, with everything that is said counted.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::super::exchange::TreeMessage;
use super::super::run::tests::leaf;
use super::super::view::tests::Model;
use super::*;

struct Talk {
    groups: Vec<Group>,
    bytes: usize,
    waited: usize,
}

fn talk(local: &Model, remote: &Model) -> Talk {
    let (ours, theirs) = (local.view().root().unwrap(), remote.view().root().unwrap());
    let mut compare = Compare::new(local.geometry, ours, theirs);
    let mut talk = Talk {
        groups: Vec::new(),
        bytes: 0,
        waited: 0,
    };
    while let Some(request) = compare.poll_request() {
        let asked = request.encode();
        let reply = answer(&remote.view(), &NodeRequest::decode(&asked).unwrap()).unwrap();
        let said = reply.encode();
        talk.bytes += asked.len() + said.len();
        compare
            .on_reply(&NodeReply::decode(&said).unwrap(), &local.view())
            .unwrap();
        talk.groups.extend(compare.take_groups());
        talk.waited = talk.waited.max(compare.stack.len());
    }
    assert!(compare.is_done());
    talk
}

#[test]
fn equal_tebibytes_say_nothing() {
    let (mut a, mut b) = (Model::new(1 << 40), Model::new(1 << 40));
    let state: BTreeMap<u64, Digest> = (0..1000).map(|at| (at * 99_991, leaf(at))).collect();
    a.sweep(&state);
    b.sweep(&state);
    let talk = talk(&a, &b);
    assert_eq!((talk.groups.len(), talk.bytes), (0, 0));
}

#[test]
fn a_thousand_differences_in_a_tebibyte_cost_under_five_percent_of_their_groups() {
    let (mut a, mut b) = (Model::new(1 << 40), Model::new(1 << 40));
    let state: BTreeMap<u64, Digest> = (0..4000).map(|at| (at * 66_000, leaf(at))).collect();
    a.sweep(&state);
    b.sweep(&state);
    let changes: BTreeMap<u64, Digest> = (0..1000)
        .map(|at| (at * 104_729 * 2 % (1 << 28), leaf(at + 9999)))
        .collect();
    b.sweep(&changes);
    let talk = talk(&a, &b);
    assert_eq!(talk.groups.len(), 1000);
    println!(
        "1000 differences in 1 TiB: {} bytes of tree talk",
        talk.bytes
    );
    assert!(talk.bytes <= 1000 * 65_536 / 20, "{} bytes", talk.bytes);
}

#[test]
fn what_waits_is_bounded_even_if_everything_differs() {
    let (a, mut b) = (Model::new(1 << 30), Model::new(1 << 30));
    b.sweep(
        &(0..1 << 18)
            .step_by(16)
            .map(|at| (at, leaf(at + 1)))
            .collect(),
    );
    let talk = talk(&a, &b);
    assert_eq!(talk.groups.len(), 1 << 14);
    assert!(talk.waited <= MAX_REQUEST << (2 * STEP), "{}", talk.waited);
}

#[test]
fn a_forged_or_misshapen_answer_is_refused_and_asked_for_again() {
    let (a, mut b) = (Model::new(1 << 30), Model::new(1 << 30));
    b.sweep(&BTreeMap::from([(5, leaf(1))]));
    let remote = b.view().root().unwrap();
    let mut compare = Compare::new(a.geometry, a.geometry.zero_root(), remote);
    let request = compare.poll_request().unwrap();
    let good = answer(&b.view(), &request).unwrap();
    let mut forged = good.clone();
    forged.nodes[3] = leaf(7);
    let error = compare.on_reply(&forged, &a.view());
    assert!(matches!(
        error,
        Err(CompareError::Forged {
            level: 18,
            index: 0
        })
    ));
    let request = compare.poll_request().unwrap();
    let mut short = good.clone();
    (short.id, short.nodes) = (request.id, Vec::new());
    assert!(matches!(
        compare.on_reply(&short, &a.view()),
        Err(CompareError::Shape(_))
    ));
    assert!(matches!(
        compare.on_reply(&good, &a.view()),
        Err(CompareError::Unasked(_))
    ));
    let request = compare.poll_request().unwrap();
    compare.disconnected();
    let again = compare.poll_request().unwrap();
    assert_eq!(again.indexes, request.indexes);
    compare
        .on_reply(
            &NodeReply {
                id: again.id,
                ..good
            },
            &a.view(),
        )
        .unwrap();
    assert!(!compare.is_done());
}

#[test]
fn a_request_beyond_the_bounds_is_refused() {
    let model = Model::new(1 << 30);
    let request = |level, down, count: u64| NodeRequest {
        id: 1,
        level,
        down,
        indexes: (0..count).collect(),
    };
    assert!(answer(&model.view(), &request(18, 5, 1)).is_err());
    assert!(answer(&model.view(), &request(18, 4, 2)).is_err());
    assert!(answer(&model.view(), &request(4, 4, 1025)).is_err());
    assert!(NodeRequest::decode(&request(4, 4, 1025).encode()).is_err());
    assert!(NodeRequest::decode(&request(3, 4, 1).encode()).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn exactly_the_differing_groups_are_found(
        sectors in 1_u64..(1 << 21),
        common in prop::collection::btree_map(any::<u64>(), 1_u64..9, 0..50),
        theirs in prop::collection::btree_map(any::<u64>(), 0_u64..9, 0..50),
    ) {
        let (mut a, mut b) = (Model::new(sectors * 512), Model::new(sectors * 512));
        let blocks = a.geometry.blocks();
        let node = |n: u64| if n == 0 { zero_node(0) } else { leaf(n) };
        let place = |map: &BTreeMap<u64, u64>| -> BTreeMap<u64, Digest> {
            map.iter().map(|(at, &n)| (at % blocks, node(n))).collect()
        };
        let (common, theirs) = (place(&common), place(&theirs));
        a.sweep(&common);
        b.sweep(&common);
        b.sweep(&theirs);
        let floor = GROUP_LEVEL.min(a.geometry.height());
        let before = |at: &u64| common.get(at).copied().unwrap_or_else(|| zero_node(0));
        let differs = |at: &&u64| before(at) != theirs[*at];
        let expected: BTreeSet<u64> = theirs.keys().filter(differs).map(|at| at >> floor).collect();
        let found = talk(&a, &b);
        let indexes: BTreeSet<u64> = found.groups.iter().map(|group| group.index).collect();
        prop_assert_eq!(indexes.len(), found.groups.len());
        prop_assert_eq!(indexes, expected);
        for group in &found.groups {
            // A tree lower than a group has one group: the top node.
            prop_assert_eq!(b.view().node(floor, group.index).unwrap(), group.expected);
        }
    }

    #[test]
    fn replies_round_trip_and_only_in_one_form(nodes in prop::collection::vec(0_u64..3, 0..40)) {
        let nodes = nodes.iter().map(|&n| if n == 0 { zero_node(2) } else { leaf(n) }).collect();
        let reply = NodeReply { id: 7, level: 2, nodes };
        let bytes = reply.encode();
        prop_assert_eq!(&NodeReply::decode(&bytes).unwrap(), &reply);
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            if let Ok(other) = NodeReply::decode(&bad) {
                prop_assert_ne!(&other, &reply);
                prop_assert_eq!(other.encode(), bad);
            }
        }
    }
}

#[test]
fn an_answer_to_the_largest_request_fits_into_a_message_of_a_session() {
    let request = NodeRequest {
        id: 1,
        level: 8,
        down: STEP,
        indexes: (0..MAX_REQUEST as u64).collect(),
    };
    let reply = NodeReply {
        id: 1,
        level: 4,
        nodes: vec![Digest([1; 32]); MAX_REQUEST << STEP],
    };
    let (id, largest) = (7, 60 << 10);
    let asked = TreeMessage::Nodes { id, request };
    let given = TreeMessage::Given { id, reply };
    for message in [asked, given] {
        let bytes = message.encode();
        assert!(bytes.len() <= largest, "{}", bytes.len());
        assert_eq!(TreeMessage::decode(&bytes), Ok(message));
    }
}

#[test]
fn differences_are_ranges_within_the_volume_and_bounded() {
    const GROUP: u64 = 64 << 10;
    let mut differing = Differing::default();
    for group in [5, 2, 3, 9, u64::MAX] {
        differing.add(group);
    }
    let size = 9 * GROUP + 4096;
    let expected = [2 * GROUP..4 * GROUP, 5 * GROUP..6 * GROUP, 9 * GROUP..size];
    assert_eq!(differing.ranges(size), expected);

    let mut many = Differing::default();
    let groups = (0..4 * MAX_UNITS as u64).step_by(2);
    groups.clone().for_each(|group| many.add(group));
    assert!(many.units.len() <= MAX_UNITS);
    let ranges = many.ranges(u64::MAX);
    let holds = |group: u64| ranges.iter().any(|range| range.contains(&(group * GROUP)));
    assert!(groups.step_by(1 << 12).all(holds), "none is forgotten");
}
