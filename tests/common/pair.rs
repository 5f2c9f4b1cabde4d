//! Two nodes whose logs and backings are files, loop devices or disks that can lose their power.

use std::path::Path;

use hn4_replicad::quickstart::load::Random;
use hn4_replicad::quickstart::rig::{NODES, Node, Plan};

use super::disk::{Disk, Loop, can_lose_power};
use super::volatile::VolatileDisk;
use super::{LIMIT, folder, is_usable, pair};

/// What logs and backings are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Medium {
    /// Regular files: a loss is SIGKILL.
    Files,
    /// Loop devices: a loss is SIGKILL.
    Loops,
    /// Disks with a volatile cache: half of the losses are power cuts.
    Volatile,
}

/// Two running nodes. Dropped in this order: daemons, then what they lie on.
pub(crate) struct Pair {
    /// The first one, which is made primary.
    pub(crate) alpha: Node,
    /// The second one.
    pub(crate) beta: Node,
    /// Power cuts so far.
    pub(crate) cuts: u64,
    disks: [Vec<Disk>; 2],
    _loops: Vec<Loop>,
    /// Where all of it is.
    pub(crate) place: super::Place,
}

impl Pair {
    /// Nodes with a full copy each; `None`, said aloud, where this machine cannot have such a
    /// medium.
    pub(crate) fn start(plan: &Plan, medium: Medium) -> Option<Self> {
        let place = folder();
        let mut plan = plan.clone();
        let mut disks = [Vec::new(), Vec::new()];
        let mut loops = Vec::new();
        plan.existing = medium != Medium::Files;
        if medium == Medium::Volatile && !can_lose_power(&["nbdfuse"]) {
            return None;
        }
        let parts = [("log", plan.log_mib), ("backing", plan.size_mib)];
        for (disks, name) in disks.iter_mut().zip(NODES) {
            let folder = place.path().join(name);
            std::fs::create_dir_all(&folder).expect("a folder");
            for (part, mib) in parts {
                match medium {
                    Medium::Files => {}
                    Medium::Volatile => disks.push(Disk::volatile(&folder, part, mib << 20)),
                    Medium::Loops => loops.push(loop_device(&folder, part, mib << 20)?),
                }
            }
        }
        if medium == Medium::Volatile {
            plan.policy.push_str("assume_strict_flush = true\n");
            // FUSE takes direct transfers of whole pages only.
            plan.sector_bytes = 4096;
        }
        let (alpha, beta) = pair(place.path(), &plan);
        let mut pair = Self {
            alpha,
            beta,
            cuts: 0,
            disks,
            _loops: loops,
            place,
        };
        pair.alpha.start().expect("alpha serves");
        pair.beta.start().expect("beta runs");
        pair.alpha.wait_for_peer(LIMIT).expect("beta follows");
        pair.beta
            .wait_for("have a full copy", LIMIT, is_usable)
            .expect("beta is seeded");
        Some(pair)
    }

    /// The backing of the first or second node, a volatile disk.
    pub(crate) fn backing(&self, node: usize) -> &VolatileDisk {
        self.disks[node][1].behind()
    }

    /// The log of the first or second node, a volatile disk.
    pub(crate) fn log(&self, node: usize) -> &VolatileDisk {
        self.disks[node][0].behind()
    }

    /// Power is cut under the primary.
    pub(crate) fn cut_alpha(&mut self, random: &mut Random) {
        cut(&mut self.alpha, &mut self.disks[0], random);
        self.cuts += 1;
    }

    /// The primary is lost, by SIGKILL or, if its disks can, by a power cut.
    pub(crate) fn lose_alpha(&mut self, random: &mut Random) {
        let cut = lose(&mut self.alpha, &mut self.disks[0], random);
        self.cuts += u64::from(cut);
    }

    /// The replica is lost.
    pub(crate) fn lose_beta(&mut self, random: &mut Random) {
        let cut = lose(&mut self.beta, &mut self.disks[1], random);
        self.cuts += u64::from(cut);
    }
}

fn lose(node: &mut Node, disks: &mut [Disk], random: &mut Random) -> bool {
    let cuts = !disks.is_empty() && random.one_in(2);
    if cuts {
        cut(node, disks, random);
    } else {
        node.kill().expect("killed");
    }
    cuts
}

fn cut(node: &mut Node, disks: &mut [Disk], random: &mut Random) {
    disks.iter().for_each(Disk::freeze);
    let off = || disks.iter_mut().for_each(|disk| disk.power_off(random));
    node.kill_while(off).expect("killed");
    disks.iter_mut().for_each(Disk::power_on);
}

/// A loop device over a new file, under the name of the part.
fn loop_device(folder: &Path, part: &str, bytes: u64) -> Option<Loop> {
    let file = folder.join(format!("{part}.img"));
    std::fs::File::create(&file)
        .and_then(|file| file.set_len(bytes))
        .expect("a file");
    let device = Loop::over(&file, &[])?;
    std::os::unix::fs::symlink(&device.device, folder.join(part)).expect("a link");
    Some(device)
}
