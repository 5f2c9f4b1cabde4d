//! Promise P12: every state that is not the ideal one is shown with its cause and the next safe
//! command, and an ideal state is shown without any.

use std::path::Path;

use hn4::log::{CopyState, LogIdentity, Role};
use hn4::types::{ChainHash, Epoch, Incarnation, NodeId, Term, VolumeId};
use hn4_engine::core::event::{CopyStatus, Disk, Lag, Progress, Tip};
use hn4_engine::core::recovery::RecoveryReport;
use hn4_engine::core::{FailedClosed, LagState, Obstacle, ReplicaLag};
use hn4_engine::shard::{PeerLags, PeerStatus, ShardStatus};
use hn4_replicad::cli::show;
use hn4_replicad::config::{Config, VolumeSection};
use hn4_replicad::control::api::{CopyReport, Finding, Health, NodeStatus, Stage, VolumeReport};
use hn4_replicad::control::report;
use hn4_transport::driver::LinkStatus;

fn section(extra: &str) -> VolumeSection {
    configured(extra, "")
}

fn with_peer_lines(peer: &str) -> VolumeSection {
    configured("", peer)
}

fn configured(extra: &str, peer: &str) -> VolumeSection {
    let text = format!(
        "[node]\nname = \"alpha\"\n[transport]\nlisten = \"0.0.0.0:7420\"\ncertificate = \"c\"\n\
         key = \"k\"\nca = \"a\"\n[[volume]]\nname = \"vol0\"\nbacking = \"/dev/one\"\n\
         log = \"/dev/two\"\n{extra}\n[[volume.peer]]\nname = \"beta\"\naddress = \"b:1\"\n\
         key_pin = \"sha256:{}\"\n{peer}",
        "ab".repeat(32)
    );
    let config = Config::parse(Path::new("/x.toml"), &text).expect("a good configuration");
    config.volumes[0].clone()
}

fn connected() -> LinkStatus {
    LinkStatus::Connected {
        remote: "10.0.0.2:7420".parse().expect("an address"),
    }
}

fn nothing_replayed(all: Epoch) -> RecoveryReport {
    RecoveryReport {
        checkpoint: all,
        tip: all,
        replayed: 0,
        replayed_bytes: 0,
        torn_tail: false,
        restored_blocks: 0,
    }
}

/// A primary with one peer that has everything.
fn ideal() -> ShardStatus {
    let all = Epoch(100);
    let progress = Progress {
        received: all,
        durable: all,
        proven: all,
        applied: all,
    };
    let tip = Tip {
        epoch: all,
        chain: ChainHash([1; 32]),
    };
    ShardStatus {
        identity: LogIdentity {
            volume: VolumeId([2; 16]),
            birth_nonce: [3; 16],
            size_bytes: 1 << 30,
            sector_bytes: 512,
        },
        copy: CopyStatus {
            role: Role::Primary,
            term: Term {
                counter: 4,
                node: NodeId([5; 16]),
            },
            incarnation: Incarnation(1),
            tip,
            tip_rank: hn4::types::Rank::default(),
            anchored: tip,
            progress,
            copy: CopyState::Usable,
            seeded: false,
            surveys: false,
        },
        failed: None,
        obstacle: None,
        behind: None,
        degraded: false,
        proof_lag_bytes: 0,
        proof_throttles: false,
        waits_for_peers: None,
        opened_alone: false,
        waiting: 0,
        dirty_bytes: 0,
        overlay_bytes: 256 << 20,
        log_used_bytes: 0,
        log_bytes: 1 << 30,
        clients: 1,
        fork_file: None,
        no_shadow: None,
        pinned_epoch: None,
        readers: 0,
        requests: 10,
        written_bytes: 4096,
        read_bytes: 0,
        seeding_bytes: None,
        kept_bytes: 0,
        peers: vec![PeerStatus {
            connected: true,
            live: true,
            seeding_bytes: None,
            kept_bytes: None,
            sent: all,
            progress,
            lags: PeerLags {
                sent: Some(Lag::default()),
                received: Some(Lag::default()),
                durable: Some(Lag::default()),
                proven: Some(Lag::default()),
                applied: Some(Lag::default()),
            },
            lag_state: LagState::Within,
        }],
        recovery: nothing_replayed(all),
        log_device: "/dev/two: nvme".to_owned(),
        backing_device: "/dev/one: nvme".to_owned(),
        assumed_strict_flush: false,
    }
}

fn replica(copy: CopyState) -> ShardStatus {
    let mut status = ideal();
    status.copy.role = Role::Replica;
    status.copy.copy = copy;
    status.peers[0].live = false;
    status
}

#[test]
fn a_replica_that_is_behind_says_how_far_and_what_it_waits_for() {
    let mut status = replica(CopyState::Usable);
    let behind = |status: &ShardStatus| {
        let state = report(Ok(status), &section(""), &[connected()]).state;
        state.expect("open").behind.expect("a replica")
    };
    status.behind = Some(ReplicaLag {
        follows: true,
        announced: Epoch(100),
        unapplied: Some(Lag::default()),
    });
    let nothing = behind(&status);
    assert_eq!((nothing.waits_for, nothing.unapplied_epochs), (None, 0));
    // Epochs 98 to 100 are here and not written back, 101 to 107 have not come.
    let (bytes, ms) = (3 * 8192, 1500);
    status.copy.progress.applied = Epoch(97);
    status.behind = Some(ReplicaLag {
        follows: true,
        announced: Epoch(107),
        unapplied: Some(Lag { bytes, ms }),
    });
    let seven = behind(&status);
    assert_eq!((seven.missing_epochs, seven.unapplied_epochs), (7, 10));
    assert_eq!(
        (seven.unapplied_bytes, seven.unapplied_ms),
        (Some(bytes), Some(ms))
    );
    let waits = |status: &ShardStatus| behind(status).waits_for.unwrap_or_default();
    assert!(waits(&status).contains("have not arrived"));
    let follow = |status: &mut ShardStatus, announced: u64, follows: bool| {
        let unapplied = Some(Lag { bytes, ms });
        let announced = Epoch(announced);
        status.behind = Some(ReplicaLag {
            follows,
            announced,
            unapplied,
        });
    };
    follow(&mut status, 100, true);
    assert_eq!(waits(&status), "its next sweep");
    status.copy.progress.proven = Epoch(97);
    assert_eq!(waits(&status), "the primary's anchors");
    status.pinned_epoch = Some(Epoch(97));
    assert_eq!(waits(&status), "its readers to leave");
    follow(&mut status, 107, false);
    assert_eq!(waits(&status), "a primary: none sends anything");
    status.obstacle = Some(Obstacle::NeedsCopy { oldest: Epoch(500) });
    assert!(waits(&status).contains("the operator"));
}

/// The report with a connected peer, after a look at what every finding must have.
fn seen(status: &ShardStatus, extra: &str) -> VolumeReport {
    let report = report(Ok(status), &section(extra), &[connected()]);
    for finding in &report.findings {
        assert!(
            !finding.cause.is_empty() && !finding.next.is_empty(),
            "{finding:?}"
        );
    }
    report
}

/// The only finding.
fn only(status: &ShardStatus, extra: &str) -> Finding {
    let mut report = seen(status, extra);
    assert_eq!(report.findings.len(), 1, "{:?}", report.findings);
    assert_eq!(report.health, report.findings[0].health);
    report.findings.remove(0)
}

fn is(finding: &Finding, state: &str, health: Health, words: &[&str]) {
    assert_eq!((finding.state.as_str(), finding.health), (state, health));
    let text = format!("{} / {}", finding.cause, finding.next);
    for word in words {
        assert!(text.contains(word), "{word:?} is missing in: {text}");
    }
}

#[test]
fn an_ideal_volume_has_no_findings() {
    let report = seen(&ideal(), "ack = \"durable\"");
    assert_eq!((report.health, report.findings), (Health::Ok, Vec::new()));
    let report = seen(&replica(CopyState::Usable), "");
    assert_eq!((report.health, report.findings), (Health::Ok, Vec::new()));
}

#[test]
fn a_peer_beyond_its_bound_is_shown_with_what_it_costs_and_what_to_do() {
    let policy = "max_lag_bytes = 8388608\nmax_lag_seconds = 30\n";
    let mut status = ideal();
    status.peers[0].lags.durable = Some(Lag {
        bytes: 9_000_000,
        ms: 1500,
    });
    for (state, on_exceed, name, word) in [
        (
            LagState::Throttling,
            "throttle",
            "lag-throttled",
            "writes wait",
        ),
        (LagState::Spilling, "spill", "lag-spilling", "log is full"),
        (
            LagState::Detached,
            "detach",
            "peer-detached",
            "do not count",
        ),
    ] {
        status.peers[0].lag_state = state;
        let mut section = section("");
        let text = format!("{policy}on_exceed = \"{on_exceed}\"");
        section.peers[0].lag = with_peer_lines(&text).peers[0].lag;
        let mut report = report(Ok(&status), &section, &[connected()]);
        assert_eq!(report.findings.len(), 1, "{:?}", report.findings);
        let finding = report.findings.remove(0);
        let words = [
            "beta is 9000000 bytes and 1500 ms behind",
            "8388608 bytes or 30 s",
            word,
        ];
        is(&finding, name, Health::Attention, &words);
        let control = report.peers[0].lag_control.as_ref().expect("a bound");
        assert_eq!(control.on_exceed, on_exceed);
    }
    status.peers[0].lag_state = LagState::Within;
    let report = seen(&status, "");
    assert_eq!((report.health, report.findings), (Health::Ok, Vec::new()));
    assert_eq!(report.peers[0].lag_control, None);
}

#[test]
fn a_volume_that_is_not_open_says_why() {
    let report = report(Err("the log is gone"), &section(""), &[]);
    assert_eq!(report.state, None);
    is(
        &report.findings[0],
        "not-open",
        Health::Failed,
        &["the log is gone", "restart"],
    );
}

#[test]
fn a_volume_that_failed_closed_names_device_operation_and_error() {
    let mut status = ideal();
    status.failed = Some(FailedClosed {
        disk: Disk::Log,
        doing: "flush",
        errno: 5,
    });
    let words = [
        "flush failed on the log /dev/two",
        "os error 5",
        "Writes are refused",
        "restart",
    ];
    is(&only(&status, ""), "failed-closed", Health::Failed, &words);
    // What it waits for on peers no longer matters.
    status.peers[0].live = false;
    let report = seen(&status, "ack = \"durable\"");
    assert!(
        report
            .findings
            .iter()
            .all(|finding| finding.state != "waiting-for-peers")
    );
}

#[test]
fn a_fenced_primary_names_the_term_and_the_way_back_that_deletes_nothing() {
    let mut status = ideal();
    status.copy.role = Role::Fenced;
    let words = ["term 4", "`hn4ctl demote vol0`", "Nothing is deleted"];
    is(&only(&status, ""), "fenced", Health::Failed, &words);
}

#[test]
fn a_copy_that_is_not_complete_is_not_to_be_promoted() {
    let fresh = only(&replica(CopyState::Fresh), "");
    let words = ["holds nothing", "Do not promote"];
    is(&fresh, "not-seeded", Health::Attention, &words);
    let mut seeding = replica(CopyState::Seeding {
        cursor_bytes: 4096,
        from: Epoch(1),
        until: None,
    });
    seeding.seeding_bytes = Some(8192);
    let words = ["4096 of 1073741824 bytes", "Do not promote"];
    is(&only(&seeding, ""), "seeding", Health::Attention, &words);
    let copy = seen(&seeding, "").state.expect("open").copy;
    let expected = CopyReport::Seeding {
        received_bytes: 8192,
        kept_bytes: 0,
        durable_bytes: 4096,
        usable_after_epoch: None,
    };
    assert_eq!(copy, expected);
    let arrived = replica(CopyState::Seeding {
        cursor_bytes: 1 << 30,
        from: Epoch(1),
        until: Some(Epoch(101)),
    });
    is(
        &only(&arrived, ""),
        "seeding",
        Health::Attention,
        &["epoch 101", "100 is"],
    );
}

#[test]
fn each_obstacle_of_a_replica_is_named() {
    let with = |obstacle| {
        let mut status = replica(CopyState::Usable);
        status.obstacle = Some(obstacle);
        only(&status, "")
    };
    let oldest = Epoch(500);
    let words = [
        "begins at epoch 500",
        "ends at 100",
        "`hn4ctl volume forget 02020202-",
    ];
    is(
        &with(Obstacle::NeedsCopy { oldest }),
        "needs-copy",
        Health::Failed,
        &words,
    );
    let epoch = Epoch(90);
    let words = ["differ at epoch 90", "decide which history counts", "save"];
    is(
        &with(Obstacle::Diverged { epoch }),
        "diverged",
        Health::Failed,
        &words,
    );
    let why = "bad chain".to_owned();
    is(
        &with(Obstacle::Rejected { why }),
        "rejected",
        Health::Attention,
        &["bad chain"],
    );
}

#[test]
fn fewer_peers_than_acknowledgements_need_are_told_by_what_it_means() {
    let mut status = ideal();
    status.waiting = 7;
    assert_eq!(
        seen(&status, "ack = \"durable\"").findings,
        [],
        "enough peers: just waiting"
    );
    status.peers[0].live = false;
    status.peers[0].connected = false;
    let find = |status: &ShardStatus, extra: &str| {
        let report = seen(status, extra);
        let wanted = |finding: &Finding| finding.state == "waiting-for-peers";
        report.findings.into_iter().find(wanted)
    };
    let block = find(&status, "ack = \"durable\"").expect("told");
    let words = [
        "peers: 1, able to acknowledge: 0",
        "that wait: 7",
        "on_degraded",
    ];
    is(&block, "waiting-for-peers", Health::Failed, &words);
    let degrade = find(&status, "ack = \"durable\"\non_degraded = \"degrade\"").expect("told");
    is(
        &degrade,
        "waiting-for-peers",
        Health::Attention,
        &["peer_timeout_ms"],
    );
    assert_eq!(find(&status, ""), None, "async waits for nobody");
}

#[test]
fn a_degraded_volume_says_that_acknowledged_writes_may_be_here_only() {
    let mut status = ideal();
    status.degraded = true;
    let extra = "ack = \"durable\"\non_degraded = \"degrade\"";
    let words = ["on this node only", "Do not promote another node"];
    is(&only(&status, extra), "degraded", Health::Attention, &words);
}

#[test]
fn a_peer_without_a_session_is_told_by_what_the_connection_does() {
    let mut status = ideal();
    status.peers[0].connected = false;
    status.peers[0].live = false;
    let why = "the key is not pinned".to_owned();
    for (link, word) in [
        (LinkStatus::Listening, "it has not connected"),
        (LinkStatus::Connecting, "connecting to b:1"),
        (LinkStatus::Failed { why }, "the key is not pinned"),
        (connected(), "no session about this volume"),
    ] {
        let report = report(Ok(&status), &section(""), &[link]);
        assert_eq!(report.findings.len(), 1);
        let words = ["peer beta", word];
        is(
            &report.findings[0],
            "peer-not-connected",
            Health::Attention,
            &words,
        );
    }
    let report = report(Ok(&status), &section(""), &[]);
    assert!(report.findings[0].cause.contains("has not started"));
}

#[test]
fn a_peer_that_is_seeded_or_does_not_follow_is_told() {
    let mut status = ideal();
    status.peers[0].live = false;
    status.peers[0].progress.durable = Epoch(60);
    let words = ["takes no epochs", "ends at epoch 60"];
    is(
        &only(&status, ""),
        "peer-not-following",
        Health::Attention,
        &words,
    );
    status.peers[0].seeding_bytes = Some(1 << 20);
    let words = ["1048576 of 1073741824", "nothing"];
    is(
        &only(&status, ""),
        "peer-seeding",
        Health::Attention,
        &words,
    );
}

#[test]
fn a_replica_without_peers_an_assumed_flush_and_a_torn_tail_are_told() {
    let mut lonely = section("");
    lonely.peers.clear();
    let mut status = replica(CopyState::Usable);
    status.peers.clear();
    let report = report(Ok(&status), &lonely, &[]);
    is(
        &report.findings[0],
        "no-peers",
        Health::Failed,
        &["no peer to follow"],
    );
    let mut status = ideal();
    status.assumed_strict_flush = true;
    let words = ["assume_strict_flush = true", "/dev/two: nvme"];
    is(
        &only(&status, ""),
        "assumed-strict-flush",
        Health::Attention,
        &words,
    );
    let mut status = ideal();
    status.recovery.torn_tail = true;
    let words = ["after epoch 100", "no flush had been acknowledged"];
    is(
        &only(&status, ""),
        "recovered-torn-tail",
        Health::Ok,
        &words,
    );
}

#[test]
fn back_pressure_is_told_with_its_reason_and_is_no_fault() {
    let mut status = ideal();
    status.dirty_bytes = 250 << 20;
    is(
        &only(&status, ""),
        "overlay-nearly-full",
        Health::Ok,
        &["new writes wait", "overlay_mib"],
    );
    let mut status = ideal();
    status.log_used_bytes = 1000 << 20;
    status.peers[0].progress.durable = Epoch(70);
    is(
        &only(&status, ""),
        "log-nearly-full",
        Health::Ok,
        &["beta is the furthest behind", "70"],
    );
}

#[test]
fn the_worst_finding_comes_first_and_decides_the_health() {
    let mut status = ideal();
    status.recovery.torn_tail = true;
    status.assumed_strict_flush = true;
    status.failed = Some(FailedClosed {
        disk: Disk::Backing,
        doing: "write",
        errno: 28,
    });
    let report = seen(&status, "");
    let order: Vec<Health> = report
        .findings
        .iter()
        .map(|finding| finding.health)
        .collect();
    assert_eq!(order, [Health::Failed, Health::Attention, Health::Ok]);
    assert_eq!(report.health, Health::Failed);
}

#[test]
fn lag_is_told_for_each_stage_and_not_made_up_where_the_log_has_ended() {
    let mut status = ideal();
    status.peers[0].progress.durable = Epoch(97);
    status.peers[0].progress.applied = Epoch(90);
    status.peers[0].lags.durable = Some(Lag {
        bytes: 5 << 20,
        ms: 1500,
    });
    status.peers[0].lags.applied = None;
    let report = seen(&status, "");
    let progress = report.peers[0].progress.clone().expect("a primary knows");
    let figures = |stage: &Stage| (stage.lag_epochs, stage.lag_bytes, stage.lag_ms);
    assert_eq!(figures(&progress.durable), (3, Some(5 << 20), Some(1500)));
    assert_eq!(figures(&progress.applied), (10, None, None));
    assert_eq!(figures(&progress.sent), (0, Some(0), Some(0)));
    let node = NodeStatus {
        node: "alpha".to_owned(),
        node_id: NodeId([5; 16]).to_string(),
        version: "0.1.0".to_owned(),
        uptime_ms: 1,
        volumes: vec![report],
    };
    let text = show::node(&node);
    for words in [
        "durable  is behind by 3 epochs, 5.0 MiB, 1.5 s",
        "applied  is behind by 10 epochs, more than the log still holds",
    ] {
        assert!(text.contains(words), "{words:?} is missing in:\n{text}");
    }
    assert!(!text.contains("sent     is behind"), "{text}");
    let replica = seen(&replica(CopyState::Usable), "");
    assert_eq!(
        replica.peers[0].progress, None,
        "a replica does not know how far others are"
    );
}

#[test]
fn a_status_survives_json_and_its_text_names_every_finding() {
    let mut status = ideal();
    status.assumed_strict_flush = true;
    status.peers[0].progress.durable = Epoch(97);
    let node = NodeStatus {
        node: "alpha".to_owned(),
        node_id: NodeId([5; 16]).to_string(),
        version: "0.1.0".to_owned(),
        uptime_ms: 61_000,
        volumes: vec![
            seen(&status, "listen = [\"unix:/run/a\"]"),
            report(Err("the log is gone"), &section(""), &[]),
        ],
    };
    assert_eq!(node.health(), Health::Failed);
    let json = serde_json::to_string(&node).expect("JSON");
    assert_eq!(
        serde_json::from_str::<NodeStatus>(&json).expect("the same"),
        node
    );
    let text = show::node(&node);
    for words in [
        "volume vol0: primary, ATTENTION",
        "volume vol0: not open, FAILED",
        "ATTENTION assumed-strict-flush: ",
        "FAILED not-open: the log is gone",
        "    next: ",
        "tip 100",
        "3 epochs",
        "unix:/run/a",
        "1.0 GiB",
    ] {
        assert!(text.contains(words), "{words:?} is missing in:\n{text}");
    }
}
