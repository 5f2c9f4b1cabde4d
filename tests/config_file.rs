//! The configuration file: what is accepted, and that everything wrong is told with its line, its
//! allowed values and what to do.

use std::path::{Path, PathBuf};

use hn4_engine::core::{AckMode, OnDegraded, OnExceed, VerifyReads};
use hn4_engine::device::DeviceKind;
use hn4_engine::shard::Listen;
use hn4_replicad::config::{Config, ConfigError, Problem, WriteAck};
use hn4_transport::driver::TransportKind;

const PIN: &str = "sha256:00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

fn parse(text: &str) -> Result<Config, Vec<Problem>> {
    Config::parse(Path::new("/etc/hn4/replicad.toml"), text).map_err(|error| match error {
        ConfigError::Invalid { problems, .. } => problems,
        ConfigError::Unreadable { .. } => panic!("nothing is read here"),
    })
}

/// A configuration with a volume, with these lines added to it, and its problems.
fn problems(volume: &str) -> Vec<String> {
    let text = format!("{SMALL}{volume}");
    let problems = parse(&text).expect_err("must be refused");
    problems.iter().map(ToString::to_string).collect()
}

/// The only problem of a configuration with these lines in its volume.
fn problem(volume: &str) -> String {
    let mut all = problems(volume);
    assert_eq!(all.len(), 1, "{all:?}");
    all.remove(0)
}

const SMALL: &str = "\
[node]
name = \"alpha\"
[[volume]]
name = \"vol0\"
backing = \"/dev/one\"
log = \"/dev/two\"
";

/// Every key there is. `PIN` stands for a key pin.
const FULL: &str = r#"
[node]
name = "alpha"
state_dir = "/srv/state"
control_socket = "/run/hn4/control.sock"
[transport]
listen = "0.0.0.0:7420"
certificate = "pki/alpha.pem"
key = "pki/alpha.key"
ca = "pki/ca.pem"
[[volume]]
name = "vol0"
backing = "/dev/nvme1n1"
log = "/dev/nvme2n1"
overlay_mib = 512
listen = ["unix:/run/hn4/vol0.sock", "tcp:127.0.0.1:10809", "tcp:[::1]:10809"]
write_ack = "durable"
ack = "received"
ack_peers = 1
on_degraded = "degrade"
peer_timeout_ms = 5000
log_age_ms = 50
destage_delay_ms = 0
stop_drain_s = 0
tree = "on"
verify_reads = "sample"
assume_strict_flush = true
device_kind = "hdd"
physical_sector = "4096"
cpu = 3
[[volume.peer]]
name = "beta"
address = "beta.example:7420"
key_pin = "PIN"
transport = "wss"
"#;

fn with_peer(volume: &str, peer: &str) -> String {
    format!(
        "[transport]\nlisten = \"0.0.0.0:7420\"\ncertificate = \"a.pem\"\nkey = \"a.key\"\n\
         ca = \"ca.pem\"\n{SMALL}{volume}\n[[volume.peer]]\nname = \"beta\"\n{peer}\n"
    )
}

#[test]
fn a_full_configuration_becomes_what_it_says() {
    let text = FULL.replace("PIN", PIN);
    let config = parse(&text).expect("a good configuration");
    assert_eq!(config.node.state_dir, Path::new("/srv/state"));
    let transport = config.transport.as_ref().expect("[transport]");
    assert_eq!(transport.key, Path::new("/etc/hn4/pki/alpha.key"));
    let volume = config.volume("vol0").expect("vol0");
    assert_eq!(volume.overlay_bytes(), 512 << 20);
    assert_eq!(
        volume.listen,
        [
            Listen::Unix(PathBuf::from("/run/hn4/vol0.sock")),
            Listen::Tcp("127.0.0.1:10809".parse().expect("an address")),
            Listen::Tcp("[::1]:10809".parse().expect("an address")),
        ]
    );
    assert_eq!(volume.write_ack, WriteAck::Durable);
    assert_eq!(
        (volume.ack, volume.required_peers()),
        (AckMode::Received, 1)
    );
    assert_eq!(volume.on_degraded, OnDegraded::Degrade);
    assert_eq!(
        (
            volume.peer_timeout_ms,
            volume.log_age_ms,
            volume.destage_delay_ms
        ),
        (5000, 50, 0)
    );
    assert_eq!(volume.stop_drain_ms(), 0);
    assert_eq!(
        volume.backing_options().kind_override,
        Some(DeviceKind::Hdd)
    );
    assert_eq!(volume.log_options().kind_override, None);
    assert_eq!(volume.backing_options().physical_override, Some(4096));
    assert_eq!(volume.log_options().physical_override, None);
    assert!(volume.log_options().assume_strict_flush);
    assert_eq!(
        (volume.tree, volume.verify_reads),
        (true, VerifyReads::Sample)
    );
    assert_eq!(volume.cpu, Some(3));
    assert_eq!(volume.peers[0].transport, TransportKind::Wss);
    assert_eq!(volume.peers[0].key_pin.to_string(), PIN);
    assert_eq!(config.peers()[0].volumes[0].0.name, "vol0");
}

#[test]
fn a_small_configuration_gets_safe_defaults() {
    let config = parse(SMALL).expect("a good configuration");
    let volume = &config.volumes[0];
    assert_eq!(
        config.node.control_socket,
        Path::new("/var/lib/hn4/control.sock")
    );
    assert_eq!(volume.overlay_mib, 256);
    assert_eq!(volume.on_degraded, OnDegraded::Block);
    assert_eq!((volume.ack, volume.required_peers()), (AckMode::Async, 0));
    assert!(!volume.assume_strict_flush && !volume.insecure_tcp);
    assert_eq!(volume.device_kind, None);
    assert_eq!(volume.physical_sector, None);
    assert_eq!(volume.verify_reads, VerifyReads::Off);
}

#[test]
fn reads_are_compared_only_with_a_tree() {
    for policy in ["sample", "all"] {
        let text = problem(&format!("verify_reads = \"{policy}\"\n"));
        assert!(
            text.starts_with("line 7, volume \"vol0\", verify_reads: "),
            "{text}"
        );
        assert!(text.contains("set tree = \"on\""), "{text}");
        let with_tree = format!("{SMALL}tree = \"on\"\nverify_reads = \"{policy}\"\n");
        parse(&with_tree).expect("a good configuration");
    }
    parse(&format!("{SMALL}verify_reads = \"off\"\n")).expect("nothing is asked for");
}

#[test]
fn an_unknown_key_is_refused_with_its_line_and_the_nearest_known_name() {
    let what = problem("log_age = 100\n");
    assert_eq!(
        what,
        "line 7, volume \"vol0\", log_age: there is no such key; did you mean \"log_age_ms\"?"
    );
    let problems = parse("[nod]\nname = \"alpha\"\n").expect_err("refused");
    assert!(
        problems[0].what.contains("did you mean \"node\"?"),
        "{problems:?}"
    );
}

#[test]
fn a_number_out_of_range_is_refused_with_the_range_and_its_unit() {
    assert_eq!(
        problem("log_age_ms = 0\n"),
        "line 7, volume \"vol0\", log_age_ms: 0 is not allowed; choose from 1 to 60000 milliseconds"
    );
    assert!(problem("overlay_mib = -1\n").contains("4 to 1048576 MiB"));
    let huge = "stop_drain_s = 99999999999999999999999999\n";
    assert!(problem(huge).contains("0 to 86400 seconds"));
    let text = problem("peer_timeout_ms = \"3s\"\n");
    assert!(
        text.contains("this is a text; expected a whole number from 100"),
        "{text}"
    );
}

#[test]
fn a_wrong_choice_is_refused_with_the_choices() {
    let text = problem("write_ack = \"sync\"\n");
    assert!(
        text.ends_with("\"sync\" is not allowed; choose one of overlay, durable"),
        "{text}"
    );
    let text = problem("device_kind = \"floppy\"\n");
    assert!(
        text.contains("auto, nvme, ssd, hdd, pmem, loop, file"),
        "{text}"
    );
}

#[test]
fn signatures_are_chosen_by_name_and_their_interval_is_bounded() {
    for key in ["ml_dsa", "slh_dsa"] {
        let text = problem(&format!("{key} = \"on\"\n"));
        assert!(
            text.ends_with("\"on\" is not allowed; choose one of off, sign, require"),
            "{text}"
        );
        assert!(parse(&format!("{SMALL}{key} = \"require\"\n")).is_ok());
    }
    let text = problem("checkpoint_s = 0\n");
    assert!(text.contains("choose from 1 to 86400"), "{text}");
}

#[test]
fn tcp_beyond_loopback_needs_insecure_tcp() {
    for address in [
        "0.0.0.0:10809",
        "[::]:10809",
        "10.0.0.1:10809",
        "[::ffff:10.0.0.1]:1",
    ] {
        let listen = format!("listen = [\"tcp:{address}\"]\n");
        assert!(
            problem(&listen).contains("insecure_tcp = true"),
            "{address}"
        );
        let allowed = format!("{SMALL}{listen}insecure_tcp = true\n");
        assert!(parse(&allowed).is_ok(), "{address}");
    }
    let loopback = format!("{SMALL}listen = [\"tcp:127.0.0.2:1\", \"tcp:[::ffff:127.0.0.1]:1\"]\n");
    assert!(parse(&loopback).is_ok());
}

#[test]
fn sockets_that_make_no_sense_are_refused() {
    for bad in [
        "/run/vol0.sock",
        "unix:",
        "tcp:localhost:1",
        "tcp:127.0.0.1",
        "udp:127.0.0.1:1",
    ] {
        let text = problem(&format!("listen = [\"{bad}\"]\n"));
        assert!(text.contains("tcp:127.0.0.1:10809"), "{bad}: {text}");
    }
    let long = format!("listen = [\"unix:/{}\"]\n", "x".repeat(107));
    assert!(problem(&long).contains("107"), "{}", problem(&long));
}

#[test]
fn names_paths_and_sockets_are_used_once() {
    let twice = "listen = [\"unix:/run/a\"]\n[[volume]]\nname = \"vol0\"\nbacking = \"/dev/two\"\n\
                 log = \"/dev/three\"\nlisten = [\"unix:/run/a\"]\n";
    let all = problems(twice);
    assert_eq!(all.len(), 3, "{all:?}");
    assert!(
        all[0].starts_with("line 9, volume \"vol0\", name: another volume"),
        "{all:?}"
    );
    assert!(
        all[1].contains("/dev/two is used by volume \"vol0\", log already"),
        "{all:?}"
    );
    assert!(all[2].contains("unix:/run/a is used by"), "{all:?}");
    let control = problem("listen = [\"unix:/var/lib/hn4/control.sock\"]\n");
    assert!(
        control.contains("is used by the control socket"),
        "{control}"
    );
}

#[test]
fn acknowledgements_need_as_many_peers_as_they_ask_for() {
    let text = problem("ack = \"durable\"\n");
    assert!(
        text.contains("1 peer are asked for, but 0 [[volume.peer]]"),
        "{text}"
    );
    let peer = format!("address = \"10.0.0.2:7420\"\nkey_pin = \"{PIN}\"");
    assert!(parse(&with_peer("ack = \"durable\"", &peer)).is_ok());
    let two = with_peer("ack = \"durable\"\nack_peers = 2", &peer);
    let problems = parse(&two).expect_err("refused");
    assert_eq!(problems[0].key, "volume \"vol0\", ack_peers");
}

#[test]
fn a_pin_names_roles_and_only_who_may_be_replica_counts_for_acknowledgements() {
    let with = |volume: &str, roles: &str| {
        let peer = format!("address = \"10.0.0.2:7420\"\nkey_pin = \"{PIN}\"\n{roles}");
        parse(&with_peer(volume, &peer))
    };
    let roles = |text: &str| with("", text).expect("valid").volumes[0].peers[0].roles;
    let both = roles("");
    assert!(both.primary && both.replica);
    assert_eq!(roles("roles = [\"replica\", \"primary\"]"), both);
    let replica = roles("roles = [\"replica\"]");
    assert!(!replica.primary && replica.replica);
    let durable = "ack = \"durable\"";
    assert!(with(durable, "roles = [\"replica\"]").is_ok());
    let refused = |volume: &str, roles: &str| {
        let problems = with(volume, roles).expect_err("refused");
        assert_eq!(problems.len(), 1, "{problems:?}");
        problems[0].to_string()
    };
    let text = refused(durable, "roles = [\"primary\"]");
    assert!(
        text.contains("but 0 [[volume.peer]] that may be replica"),
        "{text}"
    );
    let text = refused("", "roles = [\"boss\"]");
    assert!(text.contains("choose from primary, replica"), "{text}");
    assert!(refused("", "roles = []").contains("names no role"));
}

#[test]
fn a_peer_needs_a_transport_a_pin_and_the_address_if_this_node_dials() {
    let text = problem(&format!(
        "[[volume.peer]]\nname = \"beta\"\naddress = \"b:1\"\nkey_pin = \"{PIN}\"\n"
    ));
    assert!(text.contains("needs the section [transport]"), "{text}");
    let refused = |peer: &str| {
        let problems = parse(&with_peer("", peer)).expect_err("refused");
        assert_eq!(problems.len(), 1, "{problems:?}");
        problems[0].to_string()
    };
    let pin = format!("key_pin = \"{PIN}\"");
    let text = refused(&pin);
    assert!(text.contains("address: is missing; of two nodes"), "{text}");
    let text = refused("address = \"b:1\"");
    assert!(text.contains("key_pin: is missing"), "{text}");
    let text = refused("address = \"b:1\"\nkey_pin = \"sha256:12\"");
    assert!(text.contains("`hn4ctl pki issue` prints it"), "{text}");
    let text = refused(&format!("address = \"nowhere\"\n{pin}"));
    assert!(text.contains("not an address with a port"), "{text}");
    // The node whose name comes second is dialed and needs no address.
    let second = with_peer("", &pin).replace("\"alpha\"", "\"gamma\"");
    assert!(parse(&second).is_ok());
    let itself =
        with_peer("", &format!("address = \"b:1\"\n{pin}")).replace("\"beta\"", "\"alpha\"");
    let problems = parse(&itself).expect_err("refused");
    assert!(problems[0].what.contains("the node itself"), "{problems:?}");
}

#[test]
fn a_peer_of_two_volumes_is_one_node_with_one_key() {
    let peer = |pin: &str, transport: &str| {
        format!("address = \"b:1\"\nkey_pin = \"{pin}\"\ntransport = \"{transport}\"")
    };
    let two = |second: &str| {
        let first = with_peer("", &peer(PIN, "quic"));
        format!(
            "{first}[[volume]]\nname = \"vol1\"\nbacking = \"/dev/three\"\nlog = \"/dev/four\"\n\
             [[volume.peer]]\nname = \"beta\"\n{second}\n"
        )
    };
    let config = parse(&two(&peer(PIN, "quic"))).expect("good");
    let peers = config.peers();
    assert_eq!(peers.len(), 1);
    assert_eq!(peers[0].volumes.len(), 2);
    let other_pin = PIN.replace("00", "01");
    for (second, key) in [
        (peer(&other_pin, "quic"), "key_pin"),
        (peer(PIN, "wss"), "transport"),
        (peer(PIN, "quic").replace("b:1", "c:1"), "address"),
    ] {
        let problems = parse(&two(&second)).expect_err("refused");
        assert!(problems[0].key.ends_with(key), "{problems:?}");
    }
    let same_key = two(&peer(PIN, "quic")).replacen("\"beta\"", "\"beta2\"", 1);
    let problems = parse(&same_key).expect_err("refused");
    assert!(
        problems[0].what.contains("the key of \"beta2\" too"),
        "{problems:?}"
    );
}

#[test]
fn everything_that_is_wrong_is_told_at_once_in_the_order_of_the_file() {
    let text = "[node]\nname = \"a_b\"\n[[volume]]\nname = \"../x\"\nlog = 7\ncpu = true\n";
    let problems = parse(text).expect_err("refused");
    let lines: Vec<usize> = problems.iter().map(|problem| problem.line).collect();
    assert_eq!(lines, [2, 3, 4, 5, 6], "{problems:?}");
}

#[test]
fn what_is_no_toml_is_refused_with_its_line() {
    let problems = parse("[node]\nname = \n").expect_err("refused");
    assert_eq!(problems[0].line, 2, "{problems:?}");
    assert!(problems[0].what.starts_with("this is not TOML"));
    let twice = parse("[node]\nname = \"a\"\nname = \"b\"\n").expect_err("refused");
    assert_eq!(twice[0].line, 3, "{twice:?}");
    let empty = parse("").expect_err("refused");
    assert!(empty[0].what.contains("[node] is missing"), "{empty:?}");
}

#[test]
fn a_missing_or_huge_file_is_an_error_that_names_it() {
    let folder = tempfile::tempdir().expect("a directory");
    let path = folder.path().join("none.toml");
    let error = Config::load(&path).expect_err("missing");
    assert!(error.to_string().contains("none.toml"), "{error}");
    std::fs::write(&path, vec![b'#'; (1 << 20) + 1]).expect("written");
    let error = Config::load(&path).expect_err("huge");
    assert!(error.to_string().contains("more than 1048576"), "{error}");
    std::fs::write(&path, SMALL).expect("written");
    let config = Config::load(&path).expect("good");
    assert_eq!(config.path, path);
}

#[test]
fn bounds_of_a_peers_lag_are_read_and_what_is_wrong_with_them_is_told() {
    let with = |lines: &str| {
        let key = format!("address = \"b:1\"\nkey_pin = \"{PIN}\"\n{lines}");
        parse(&with_peer("", &key))
    };
    let config = with("max_lag_bytes = 1048576\nmax_lag_seconds = 5\non_exceed = \"detach\"\n");
    let lag = config.expect("good").volumes[0].peers[0].lag;
    assert_eq!((lag.max_bytes, lag.max_ms), (Some(1 << 20), Some(5000)));
    assert_eq!(lag.on_exceed, OnExceed::Detach);
    let lag = with("max_lag_seconds = 5\n").expect("good").volumes[0].peers[0].lag;
    assert_eq!(lag.on_exceed, OnExceed::Throttle);
    for (lines, words) in [
        ("on_exceed = \"spill\"\n", "no bound"),
        ("max_lag_bytes = 4096\n", "choose from 1048576"),
        ("max_lag_seconds = 0\n", "86400 seconds"),
        ("max_lag_secs = 5\n", "max_lag_seconds"),
        ("max_lag_seconds = 5\non_exceed = \"drop\"\n", "throttle"),
    ] {
        let problems = with(lines).expect_err("refused");
        assert!(problems[0].what.contains(words), "{problems:?}");
    }
}
