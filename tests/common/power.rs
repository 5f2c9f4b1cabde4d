//! A machine whose disks lose their power again and again, with an oracle that judges it.

use std::path::Path;
use std::time::{Duration, Instant};

use hn4_replicad::quickstart::load::{Load, LoadPlan, Random, check, lock};
use hn4_replicad::quickstart::rig::{Node, Plan};

use super::disk::{Disk, Loop, wait};
use super::{LIMIT, folder, lonely, oracle, program};

/// What the disks do with what was not flushed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Cache {
    /// All of it is lost.
    Lost,
    /// A random part of it is lost.
    PartlyLost,
    /// The same, and of the backing, which has sectors of 512 bytes, some physical sectors of 4096
    /// bytes are damaged that were being written.
    LargeSectors,
    /// The same disks, but the daemon is told that their physical sectors are small.
    HiddenSectors,
    /// Flushed or not, all of it is lost: a disk that lies.
    Lying,
}

impl Cache {
    /// The backing is a loop device with sectors of 512 bytes over a disk with larger ones.
    fn has_sectors(self) -> bool {
        matches!(self, Self::LargeSectors | Self::HiddenSectors)
    }
}

fn plan(cache: Cache) -> Plan {
    let mut policy = "assume_strict_flush = true\n".to_owned();
    if cache.has_sectors() {
        // No loop device says so of itself. Sweeps are to be under way most of the time.
        let bytes = match cache {
            Cache::LargeSectors => "4096",
            _ => "512",
        };
        policy += &format!("physical_sector = \"{bytes}\"\ndestage_delay_ms = 20\n");
    }
    Plan {
        size_mib: 16,
        log_mib: 24,
        overlay_mib: 8,
        policy,
        alone: true,
        ..Plan::default()
    }
}

struct Machine {
    node: Node,
    log: Disk,
    backing: Disk,
    /// FUSE says nothing of sectors: a loop device does.
    sectors: Option<Loop>,
}

impl Machine {
    fn new(place: &Path, cache: Cache, random: &mut Random) -> Self {
        let plan = plan(cache);
        let (log, backing) = (plan.log_mib << 20, plan.size_mib << 20);
        let node = Node::existing("machine", place, program());
        let text = lonely("machine").replace("overlay_mib = 32\n", "overlay_mib = 8\n");
        std::fs::write(node.config(), text + &plan.policy).expect("a configuration");
        let disk = |name, bytes| match cache {
            Cache::PartlyLost => Disk::volatile(place, name, bytes),
            _ if cache.has_sectors() && name == "backing" => {
                Disk::with_large_sectors(place, "medium", bytes)
            }
            Cache::LargeSectors | Cache::HiddenSectors => Disk::volatile(place, name, bytes),
            Cache::Lost | Cache::Lying => Disk::nbdkit(place, name, bytes),
        };
        let mut machine = Self {
            log: disk("log", log),
            backing: disk("backing", backing),
            node,
            sectors: None,
        };
        machine.attach(cache);
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

    /// Puts the loop device where the node looks for its backing.
    fn attach(&mut self, cache: Cache) {
        if !cache.has_sectors() {
            return;
        }
        let found = Loop::over(self.backing.path(), &["--sector-size", "512"]);
        let found = found.expect("looked for before");
        let link = self.node.backing();
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(&found.device, &link).expect("a link");
        self.sectors = Some(found);
    }

    /// All disks come back.
    fn power_on(&mut self, cache: Cache) {
        if let Some(sectors) = self.sectors.take() {
            // It lets go when the last operation on the dead disk has failed.
            let name = sectors.device.file_name().expect("a device").to_owned();
            drop(sectors);
            let folder = Path::new("/sys/block").join(name);
            wait("the loop device to let go", || {
                !folder.join("loop/backing_file").exists()
            });
        }
        self.log.power_on();
        self.backing.power_on();
        self.attach(cache);
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
    let plan = plan(cache);
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
        if cache.has_sectors() {
            (plan.align, plan.sectors_max) = (1, 12);
        }
        // nbdfuse makes a TRIM of a punched hole, and nbdkit's cache does not zero what is trimmed.
        plan.holes = cache == Cache::PartlyLost || cache.has_sectors();
        let load = Load::start(&machine.node, &oracle, plan).map_err(rig)?;
        load.wait_for_progress(100 + random.below(1500), LIMIT)
            .map_err(rig)?;
        machine.cut_the_power(&mut random);
        load.was_cut().map_err(rig)?;
        machine.power_on(cache);
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
