//! The sections of the configuration file, key by key.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use hn4_engine::core::{AckMode, LagPolicy, OnDegraded, OnExceed, VerifyReads};
use hn4_engine::device::DeviceKind;
use hn4_engine::shard::Listen;
use hn4_transport::driver::TransportKind;
use hn4_transport::pki::check_name;
use hn4_transport::session::PeerRoles;
use hn4_transport::tls::KeyPin;
use toml::de::DeTable;

use super::check::{self, Parsed};
use super::read::{Reader, Table};
use super::{
    Apply, Config, LISTEN_MAX, NodeSection, PEERS_MAX, PeerSection, Problem, Signing,
    TransportSection, VOLUMES_MAX, VolumeSection, WriteAck,
};

const OVERLAY_MIB: RangeInclusive<u64> = 4..=1 << 20;
const PEER_TIMEOUT_MS: RangeInclusive<u64> = 100..=600_000;
const LOG_AGE_MS: RangeInclusive<u64> = 1..=60_000;
const DESTAGE_DELAY_MS: RangeInclusive<u64> = 0..=3_600_000;
const STOP_DRAIN_S: RangeInclusive<u64> = 0..=86_400;
const FORK_SPACE_MIB: RangeInclusive<u64> = 0..=1024 * 1024;
const SHADOW_SPACE_MIB: RangeInclusive<u64> = 0..=1024 * 1024 * 1024;
const START_ALONE_S: RangeInclusive<u64> = 0..=86_400;
const SCAN_MIB_PER_S: RangeInclusive<u64> = 1..=65_536;
const VERIFY_INTERVAL_H: RangeInclusive<u64> = 0..=8760;
const PROOF_BATCH_MS: RangeInclusive<u64> = 1..=60_000;
const CHECKPOINT_S: RangeInclusive<u64> = 1..=86_400;
const CPU: RangeInclusive<u64> = 0..=1023;
const THREADS: RangeInclusive<u64> = 1..=64;
const MAX_LAG_BYTES: RangeInclusive<u64> = 1 << 20..=1 << 50;
const MAX_LAG_SECONDS: RangeInclusive<u64> = 1..=86_400;

const PEER_KEYS: [&str; 9] = [
    "name",
    "address",
    "key_pin",
    "transport",
    "roles",
    "scxq2",
    "max_lag_bytes",
    "max_lag_seconds",
    "on_exceed",
];

const SWITCH: [(&str, bool); 2] = [("on", true), ("off", false)];
const SIGNING: [(&str, Signing); 3] = [
    ("off", Signing::Off),
    ("sign", Signing::Sign),
    ("require", Signing::Require),
];
const VERIFY_READS: [(&str, VerifyReads); 3] = [
    ("off", VerifyReads::Off),
    ("sample", VerifyReads::Sample),
    ("all", VerifyReads::All),
];
/// Whether peers get compressed data if nothing is said.
const SCXQ2_DEFAULT: bool = false;

/// Where the node keeps its id and attach records if nothing else is said.
const DEFAULT_STATE_DIR: &str = "/var/lib/hn4";

/// Longest path of a unix socket in bytes, without the closing zero.
const SOCKET_PATH_MAX: usize = 107;
/// Longest name of a volume: it is a file name and an export name.
const VOLUME_NAME_MAX: usize = 64;

const DEVICE_KINDS: [(&str, Option<DeviceKind>); 7] = [
    ("auto", None),
    ("nvme", Some(DeviceKind::Nvme)),
    ("ssd", Some(DeviceKind::Ssd)),
    ("hdd", Some(DeviceKind::Hdd)),
    ("pmem", Some(DeviceKind::Pmem)),
    ("loop", Some(DeviceKind::Loop)),
    ("file", Some(DeviceKind::File)),
];

const PHYSICAL_SECTORS: [(&str, Option<u32>); 3] =
    [("auto", None), ("512", Some(512)), ("4096", Some(4096))];

const VOLUME_KEYS: [&str; 34] = [
    "name",
    "backing",
    "log",
    "overlay_mib",
    "listen",
    "insecure_tcp",
    "write_ack",
    "ack",
    "ack_peers",
    "on_degraded",
    "peer_timeout_ms",
    "start_alone_after_s",
    "fork_space_mib",
    "shadow",
    "shadow_space_mib",
    "log_age_ms",
    "destage_delay_ms",
    "stop_drain_s",
    "assume_strict_flush",
    "proof",
    "ml_dsa",
    "slh_dsa",
    "proof_batch_ms",
    "checkpoint_s",
    "tree",
    "scan_mib_per_s",
    "verify_interval_h",
    "verify_reads",
    "apply",
    "device_kind",
    "physical_sector",
    "threads",
    "cpu",
    "peer",
];

const WRITE_ACKS: [(&str, WriteAck); 2] = [
    ("overlay", WriteAck::Overlay),
    ("durable", WriteAck::Durable),
];

const ACKS: [(&str, AckMode); 3] = [
    ("async", AckMode::Async),
    ("received", AckMode::Received),
    ("durable", AckMode::Durable),
];

const ON_DEGRADED: [(&str, OnDegraded); 2] = [
    ("block", OnDegraded::Block),
    ("degrade", OnDegraded::Degrade),
];

const APPLY: [(&str, Apply); 2] = [("proven", Apply::Proven), ("durable", Apply::Durable)];

/// What happens when a peer is too far behind, as it is written.
pub(crate) const ON_EXCEED: [(&str, OnExceed); 3] = [
    ("throttle", OnExceed::Throttle),
    ("spill", OnExceed::Spill),
    ("detach", OnExceed::Detach),
];

struct Parser<'t> {
    reader: Reader<'t>,
    folder: PathBuf,
}

pub(super) fn parse(path: &Path, text: &str) -> Result<Config, Vec<Problem>> {
    let mut reader = Reader::new(text);
    let document = match DeTable::parse(text) {
        Ok(document) => document,
        Err(error) => {
            let at = error.span().map_or(0, |span| span.start);
            let message = error.message().replace('\n', "; ");
            reader.note(at, String::new(), format!("this is not TOML: {message}"));
            return Err(reader.into_problems());
        }
    };
    let mut parser = Parser {
        reader,
        folder: path.parent().unwrap_or(Path::new("/")).to_owned(),
    };
    let root = Table::root(document.get_ref());
    parser
        .reader
        .refuse_unknown(&root, &["node", "transport", "volume"]);
    let node = parser.node(&root);
    let transport = parser.transport(&root);
    let reader = &mut parser.reader;
    let sections = reader.sections(&root, "volume", "volume", VOLUMES_MAX);
    let volumes: Vec<_> = sections
        .into_iter()
        .map(|section| {
            let (volume, peers) = parser.volume(&section);
            Parsed {
                section,
                volume,
                peers,
            }
        })
        .collect();
    let mut reader = parser.reader;
    check::check(&mut reader, &root, &node, &volumes);
    let problems = reader.into_problems();
    if !problems.is_empty() {
        return Err(problems);
    }
    Ok(Config {
        path: path.to_owned(),
        node,
        transport,
        volumes: volumes.into_iter().map(|parsed| parsed.volume).collect(),
    })
}

impl<'t> Parser<'t> {
    /// A path that must be there. Empty if it is not, which was noted then.
    fn path(&mut self, table: &Table<'t>, key: &str, example: &str) -> PathBuf {
        let found = self.reader.needed(table, key, example);
        found.map_or_else(PathBuf::new, |found| self.folder.join(found.value))
    }

    fn node(&mut self, root: &Table<'t>) -> NodeSection {
        let empty = NodeSection {
            name: String::new(),
            state_dir: PathBuf::new(),
            control_socket: PathBuf::new(),
        };
        let Some(table) = self.reader.section(root, "node") else {
            let what = "the section [node] is missing; it needs at least: name = \"alpha\"";
            self.reader.note(0, String::new(), what.to_owned());
            return empty;
        };
        let known = ["name", "state_dir", "control_socket"];
        self.reader.refuse_unknown(&table, &known);
        let state_dir = match self.reader.text(&table, "state_dir") {
            Some(found) => self.folder.join(found.value),
            None => PathBuf::from(DEFAULT_STATE_DIR),
        };
        let control_socket = match self.reader.text(&table, "control_socket") {
            Some(found) => self.folder.join(found.value),
            None => state_dir.join("control.sock"),
        };
        let at = table.at_of("control_socket");
        self.socket_path(at, table.key("control_socket"), &control_socket);
        NodeSection {
            name: self.node_name(&table, "alpha"),
            state_dir,
            control_socket,
        }
    }

    fn node_name(&mut self, table: &Table<'t>, example: &str) -> String {
        let Some(found) = self.reader.needed(table, "name", example) else {
            return String::new();
        };
        if let Err(error) = check_name(found.value) {
            self.reader
                .note(found.at, table.key("name"), error.to_string());
        }
        found.value.to_owned()
    }

    fn socket_path(&mut self, at: usize, key: String, path: &Path) {
        let bytes = path.as_os_str().len();
        if bytes > SOCKET_PATH_MAX {
            let what = format!(
                "the path {} has {bytes} bytes; the system allows {SOCKET_PATH_MAX} for a socket, \
                 choose a shorter one",
                path.display()
            );
            self.reader.note(at, key, what);
        }
    }

    fn transport(&mut self, root: &Table<'t>) -> Option<TransportSection> {
        let table = self.reader.section(root, "transport")?;
        let known = ["listen", "certificate", "key", "ca"];
        self.reader.refuse_unknown(&table, &known);
        let certificate = self.path(&table, "certificate", "/etc/hn4/alpha.pem");
        let key = self.path(&table, "key", "/etc/hn4/alpha.key");
        let ca = self.path(&table, "ca", "/etc/hn4/ca.pem");
        let found = self.reader.needed(&table, "listen", "0.0.0.0:7420")?;
        match found.value.parse() {
            Ok(listen) => Some(TransportSection {
                listen,
                certificate,
                key,
                ca,
            }),
            Err(_) => {
                let what = not_an_address(found.value, "0.0.0.0:7420");
                self.reader.note(found.at, table.key("listen"), what);
                None
            }
        }
    }

    fn volume(&mut self, table: &Table<'t>) -> (VolumeSection, Vec<Table<'t>>) {
        self.reader.refuse_unknown(table, &VOLUME_KEYS);
        let peer_tables = self
            .reader
            .sections(table, "peer", "volume.peer", PEERS_MAX);
        let peers = peer_tables.iter().map(|table| self.peer(table)).collect();
        let backing = self.path(table, "backing", "/dev/disk/by-id/nvme-example");
        let log = self.path(table, "log", "/var/lib/hn4/vol0.log");
        let shadow = self.reader.text(table, "shadow");
        let shadow = shadow.map(|found| self.folder.join(found.value));
        let name = self.volume_name(table);
        let listen = self.listen(table);
        let reader = &mut self.reader;
        let mut number = |key, range, default| reader.number(table, key, &range).unwrap_or(default);
        let overlay_mib = number("overlay_mib", OVERLAY_MIB, 256);
        let ack_peers = number("ack_peers", 1..=PEERS_MAX as u64, 1);
        let peer_timeout_ms = number("peer_timeout_ms", PEER_TIMEOUT_MS, 3000);
        let fork_space_mib = number("fork_space_mib", FORK_SPACE_MIB, 1024);
        let shadow_space_mib = number("shadow_space_mib", SHADOW_SPACE_MIB, 4096);
        let log_age_ms = number("log_age_ms", LOG_AGE_MS, 100);
        let destage_delay_ms = number("destage_delay_ms", DESTAGE_DELAY_MS, 1000);
        let stop_drain_s = number("stop_drain_s", STOP_DRAIN_S, 10);
        let scan_mib_per_s = number("scan_mib_per_s", SCAN_MIB_PER_S, 64);
        let verify_interval_h = number("verify_interval_h", VERIFY_INTERVAL_H, 168);
        let proof_batch_ms = number("proof_batch_ms", PROOF_BATCH_MS, 50);
        let checkpoint_s = number("checkpoint_s", CHECKPOINT_S, 60);
        let threads = number("threads", THREADS, 1);
        let cpu = reader.number(table, "cpu", &CPU);
        let start_alone_after_s = reader.number(table, "start_alone_after_s", &START_ALONE_S);
        let volume = VolumeSection {
            name,
            backing,
            log,
            overlay_mib,
            listen,
            insecure_tcp: reader.flag(table, "insecure_tcp"),
            write_ack: choice(reader, table, "write_ack", &WRITE_ACKS),
            ack: choice(reader, table, "ack", &ACKS),
            ack_peers: small(ack_peers),
            on_degraded: choice(reader, table, "on_degraded", &ON_DEGRADED),
            peer_timeout_ms,
            start_alone_after_s,
            fork_space_mib,
            shadow,
            shadow_space_mib,
            log_age_ms,
            destage_delay_ms,
            stop_drain_s,
            assume_strict_flush: reader.flag(table, "assume_strict_flush"),
            proof: reader.choice(table, "proof", &SWITCH).unwrap_or(true),
            ml_dsa: choice(reader, table, "ml_dsa", &SIGNING),
            slh_dsa: choice(reader, table, "slh_dsa", &SIGNING),
            proof_batch_ms,
            checkpoint_s,
            tree: reader.choice(table, "tree", &SWITCH).unwrap_or(false),
            scan_mib_per_s,
            verify_interval_h,
            verify_reads: choice(reader, table, "verify_reads", &VERIFY_READS),
            apply: choice(reader, table, "apply", &APPLY),
            device_kind: choice(reader, table, "device_kind", &DEVICE_KINDS),
            physical_sector: choice(reader, table, "physical_sector", &PHYSICAL_SECTORS),
            threads: small(threads),
            cpu: cpu.map(small),
            peers,
        };
        (volume, peer_tables)
    }

    fn volume_name(&mut self, table: &Table<'t>) -> String {
        let Some(found) = self.reader.needed(table, "name", "vol0") else {
            return String::new();
        };
        let legal =
            |character: char| character.is_ascii_alphanumeric() || "-_.".contains(character);
        let name = found.value;
        let starts = name.starts_with(|first: char| first.is_ascii_alphanumeric());
        if !starts || !name.chars().all(legal) || name.len() > VOLUME_NAME_MAX {
            let what = format!(
                "{name:?} cannot be the name of a volume; use letters, digits, \"-\", \"_\" and \
                 \".\", at most {VOLUME_NAME_MAX} characters, beginning with a letter or digit"
            );
            self.reader.note(found.at, table.key("name"), what);
        }
        name.to_owned()
    }

    fn listen(&mut self, table: &Table<'t>) -> Vec<Listen> {
        let all = self.reader.texts(table, "listen");
        let key = table.key("listen");
        if all.len() > LISTEN_MAX {
            let what = format!("{} sockets; at most {LISTEN_MAX} are allowed", all.len());
            self.reader.note(table.at_of("listen"), key.clone(), what);
        }
        let mut sockets = Vec::new();
        for found in all {
            let text = found.value;
            if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
                let path = self.folder.join(path);
                self.socket_path(found.at, key.clone(), &path);
                sockets.push(Listen::Unix(path));
            } else if let Some(address) = text.strip_prefix("tcp:") {
                match address.parse::<SocketAddr>() {
                    Ok(address) => sockets.push(Listen::Tcp(address)),
                    Err(_) => {
                        let what = not_an_address(address, "tcp:127.0.0.1:10809");
                        self.reader.note(found.at, key.clone(), what);
                    }
                }
            } else {
                let what = format!(
                    "{text:?} is not allowed; write \"unix:/run/hn4/vol0.sock\" or \
                     \"tcp:127.0.0.1:10809\""
                );
                self.reader.note(found.at, key.clone(), what);
            }
        }
        sockets
    }

    fn peer(&mut self, table: &Table<'t>) -> PeerSection {
        self.reader.refuse_unknown(table, &PEER_KEYS);
        let name = self.node_name(table, "beta");
        let address = self.reader.text(table, "address").map(|found| {
            if !is_host_and_port(found.value) {
                let what = not_an_address(found.value, "10.0.0.2:7420");
                self.reader.note(found.at, table.key("address"), what);
            }
            found.value.to_owned()
        });
        let example = "sha256:(64 hexadecimal digits, as `hn4ctl pki issue` prints them)";
        let found = self.reader.needed(table, "key_pin", example);
        let key_pin = found.map_or(Ok(KeyPin([0; 32])), |found| {
            let pin = found.value.parse::<KeyPin>();
            pin.map_err(|error| (found.at, error))
        });
        let key_pin = key_pin.unwrap_or_else(|(at, error)| {
            let what = format!("{error}; `hn4ctl pki issue` prints it");
            self.reader.note(at, table.key("key_pin"), what);
            KeyPin([0; 32])
        });
        let transports = [("quic", TransportKind::Quic), ("wss", TransportKind::Wss)];
        let scxq2 = self.reader.choice(table, "scxq2", &SWITCH);
        PeerSection {
            name,
            address,
            key_pin,
            transport: choice(&mut self.reader, table, "transport", &transports),
            roles: self.roles(table),
            scxq2: scxq2.unwrap_or(SCXQ2_DEFAULT),
            lag: self.lag(table),
        }
    }

    fn roles(&mut self, table: &Table<'t>) -> PeerRoles {
        if !table.has("roles") {
            return PeerRoles::default();
        }
        let mut roles = PeerRoles {
            primary: false,
            replica: false,
        };
        for found in self.reader.texts(table, "roles") {
            match found.value {
                "primary" => roles.primary = true,
                "replica" => roles.replica = true,
                other => {
                    let what = format!("{other:?} is no role; choose from primary, replica");
                    self.reader.note(found.at, table.key("roles"), what);
                    return PeerRoles::default();
                }
            }
        }
        if !roles.primary && !roles.replica {
            let what = "names no role; write [\"primary\"], [\"replica\"] or both, or remove it";
            let at = table.at_of("roles");
            self.reader.note(at, table.key("roles"), what.to_owned());
        }
        roles
    }

    fn lag(&mut self, table: &Table<'t>) -> LagPolicy {
        let reader = &mut self.reader;
        let policy = LagPolicy {
            max_bytes: reader.number(table, "max_lag_bytes", &MAX_LAG_BYTES),
            max_ms: reader
                .number(table, "max_lag_seconds", &MAX_LAG_SECONDS)
                .map(|seconds| seconds * 1000),
            on_exceed: choice(reader, table, "on_exceed", &ON_EXCEED),
        };
        let bounded = table.has("max_lag_bytes") || table.has("max_lag_seconds");
        if table.has("on_exceed") && !bounded {
            let what =
                "has no bound to go with; add max_lag_bytes or max_lag_seconds, or remove it";
            let at = table.at_of("on_exceed");
            reader.note(at, table.key("on_exceed"), what.to_owned());
        }
        policy
    }
}

fn choice<'t, T: Copy + Default>(
    reader: &mut Reader<'t>,
    table: &Table<'t>,
    key: &str,
    choices: &[(&str, T)],
) -> T {
    reader.choice(table, key, choices).unwrap_or_default()
}

/// A number whose range was checked to be small.
fn small(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

fn not_an_address(text: &str, example: &str) -> String {
    format!("{text:?} is not an address with a port; write, for example, \"{example}\"")
}

fn is_host_and_port(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else {
        return false;
    };
    let port = port.parse::<u16>().is_ok_and(|port| port > 0);
    let bracketed = host.starts_with('[') && host.ends_with(']');
    port && !host.is_empty() && (bracketed || !host.contains([':', '/', ' ']))
}
