//! A machine whose disks lose their power again and again, with an oracle that judges it.

use std::path::Path;
use std::time::{Duration, Instant};

use hn4_replicad::quickstart::load::{Load, LoadPlan, Random, check, lock};
use hn4_replicad::quickstart::rig::{Node, Plan};

use super::disk::Disk;
use super::{LIMIT, folder, lonely, oracle, program};

/// What the disks do with what was not flushed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Cache {
    /// All of it is lost.
    Lost,
    /// A random part of it is lost.
    PartlyLost,
    /// Flushed or not, all of it is lost: a disk that lies.
    Lying,
}

fn plan() -> Plan {
    Plan {
        size_mib: 16,
        log_mib: 24,
        overlay_mib: 8,
        policy: "assume_strict_flush = true\n".to_owned(),
        alone: true,
        ..Plan::default()
    }
}

struct Machine {
    node: Node,
    log: Disk,
    backing: Disk,
}

impl Machine {
    fn new(place: &Path, cache: Cache, random: &mut Random) -> Self {
        let plan = plan();
        let (log, backing) = (plan.log_mib << 20, plan.size_mib << 20);
        let node = Node::existing("machine", place, program());
        let text = lonely("machine").replace("overlay_mib = 32\n", "overlay_mib = 8\n");
        std::fs::write(node.config(), text + &plan.policy).expect("a configuration");
        let disk = |name, bytes| match cache {
            Cache::PartlyLost => Disk::volatile(place, name, bytes),
            Cache::Lost | Cache::Lying => Disk::nbdkit(place, name, bytes),
        };
        let mut machine = Self {
            log: disk("log", log),
            backing: disk("backing", backing),
            node,
        };
        machine.node.create_on_existing().expect("a volume");
        if cache == Cache::Lying {
            // A new volume is there in any case; the question is what becomes of writes to it.
            for disk in [&mut machine.log, &mut machine.backing] {
                disk.power_off(random);
                disk.lie();
                disk.power_on();
            }
        }
        machine
    }

    fn cut_the_power(&mut self, random: &mut Random) {
        let disks = [&mut self.log, &mut self.backing];
        disks.iter().for_each(|disk| disk.freeze());
        let off = || disks.into_iter().for_each(|disk| disk.power_off(random));
        self.node.kill_while(off).expect("killed");
    }
}

/// How a series of cuts ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Ended {
    /// Data was lost, or the volume could not be opened any more.
    #[error("a promise was broken: {0}")]
    Promise(String),
    /// The rig did not work.
    #[error("the rig did not work: {0}")]
    Rig(String),
}

/// Cuts the power again and again, until a promise is broken. The daemon gets the variables.
pub(crate) fn cuts(
    cache: Cache,
    count: u64,
    seed: u64,
    variables: &[(&str, &str)],
) -> Result<String, Ended> {
    let rig = |error: anyhow::Error| Ended::Rig(format!("{error:#}"));
    let broken = |cut, error: anyhow::Error| Ended::Promise(format!("cut {cut}: {error:#}"));
    let place = folder();
    let plan = plan();
    let mut random = Random::new(seed);
    let mut machine = Machine::new(place.path(), cache, &mut random);
    for (name, value) in variables {
        machine.node.set_variable(name, value);
    }
    let oracle = oracle(seed, &plan);
    let mut slowest = Duration::ZERO;
    let mut dropped = 0;
    machine.node.start().map_err(rig)?;
    for cut in 0..count {
        let mut plan = LoadPlan::mixed(seed + cut);
        // FUSE takes direct transfers of whole pages only.
        (plan.connections, plan.depth, plan.align) = (2, 4, 8);
        // nbdfuse makes a TRIM of a punched hole, and nbdkit's cache does not zero what is trimmed.
        plan.holes = cache == Cache::PartlyLost;
        let load = Load::start(&machine.node, &oracle, plan).map_err(rig)?;
        load.wait_for_progress(100 + random.below(1500), LIMIT)
            .map_err(rig)?;
        machine.cut_the_power(&mut random);
        load.was_cut().map_err(rig)?;
        machine.log.power_on();
        machine.backing.power_on();
        let started = Instant::now();
        machine.node.start().map_err(|error| broken(cut, error))?;
        slowest = slowest.max(started.elapsed());
        let seen = check(&machine.node, &oracle, 0).map_err(|error| broken(cut, error))?;
        dropped += seen.missing;
        lock(&oracle).settle(&seen);
    }
    let counts = lock(&oracle).counts();
    Ok(format!(
        "{count} cuts: {counts:?}, {dropped} unflushed dropped, slowest {slowest:?}"
    ))
}
