//! Real block devices that lose their power: the daemon runs in a virtual machine with NVMe
//! namespaces, a rotating disk and persistent memory, and the machine is reset in mid-load.
//!
//! The load and its oracle are on the host and survive. The machine's disks have no volatile cache
//! of their own (`e2e_power` has such disks): what is tested is the daemon on the kernel's real
//! drivers, with everything that was in the machine's memory gone.
//!
//! Without KVM the machine is emulated: ten seconds for a boot. The long runs are ignored.

#[path = "../common/mod.rs"]
mod common;
mod machine;

use std::time::{Duration, Instant};

use common::{folder, oracle, program, seed, times};
use hn4_engine::nbd::client::Address;
use hn4_replicad::quickstart::load::{Load, LoadPlan, Random, check, lock};
use hn4_replicad::quickstart::rig::{Node, Plan, VOLUME};
use machine::{Backing, Disks, Machine, prepared};

/// Longest wait for anything: emulation is slow, and slower on a busy host.
const LIMIT: Duration = Duration::from_secs(300);
const LOG_MIB: u64 = 24;
/// Persistent memory comes in multiples of this.
const BACKING_MIB: u64 = 16;

/// The node's configuration, in one line of the machine's shell.
fn configuration(backing: Backing) -> String {
    let text = format!(
        "[node]\nname = \"vm\"\nstate_dir = \"/state/hn4\"\ncontrol_socket = \"/run/ctl.sock\"\n\
         [[volume]]\nname = \"{VOLUME}\"\nbacking = \"{}\"\nlog = \"/dev/nvme0n2\"\n\
         listen = [\"unix:/run/nbd.sock\", \"tcp:0.0.0.0:10809\"]\ninsecure_tcp = true\n\
         overlay_mib = 8\n",
        backing.device()
    );
    format!("printf '{}' > /run/config.toml", text.replace('\n', "\\n"))
}

/// Boots a machine; the first time it makes the volume.
fn boot(disks: &Disks<'_>, is_new: bool) -> Option<Machine> {
    let mut machine = Machine::boot(prepared()?, disks);
    machine.run(&configuration(disks.backing));
    if is_new {
        machine.run(&format!(
            "hn4ctl --config /run/config.toml volume create {VOLUME}"
        ));
    }
    Some(machine)
}

/// Starts the daemon and waits until it serves.
fn serve(machine: &mut Machine, node: &mut Node) {
    machine.run("hn4-replicad run --config /run/config.toml 2> /run/daemon.log &");
    node.set_nbd_address(Address::Tcp(machine.nbd));
    let started = Instant::now();
    while node.client().is_err() {
        let (_, words) = machine.try_run("cat /run/daemon.log");
        assert!(!words.contains("hn4-replicad: "), "it ended: {words}");
        assert!(started.elapsed() < LIMIT, "it does not serve: {words}");
    }
}

fn power_cuts(backing: Backing, cuts: u64) {
    if prepared().is_none() {
        return;
    }
    let seed = seed("vm");
    let place = folder();
    let disks = Disks {
        folder: place.path(),
        backing,
    };
    disks.make(LOG_MIB, BACKING_MIB);
    let mut node = Node::existing("vm", place.path(), program());
    let plan = Plan {
        size_mib: BACKING_MIB,
        ..Plan::default()
    };
    let oracle = oracle(seed, &plan);
    let mut random = Random::new(seed);
    let mut machine = boot(&disks, true).expect("prepared");
    serve(&mut machine, &mut node);
    let status = machine.run("hn4ctl --config /run/config.toml status");
    println!("{backing:?}: {}", devices(&status));
    let mut slowest = Duration::ZERO;
    for cut in 0..cuts {
        let mut load_plan = LoadPlan::mixed(seed + cut);
        (load_plan.connections, load_plan.depth) = (2, 4);
        // The device says how small a write may be; persistent memory has sectors of 512 too.
        let load = Load::start(&node, &oracle, load_plan).expect("started");
        load.wait_for_progress(100 + random.below(600), LIMIT)
            .expect("it moves");
        machine.cut_the_power();
        load.was_cut().expect("no request was refused");
        machine = boot(&disks, false).expect("prepared");
        let started = Instant::now();
        serve(&mut machine, &mut node);
        slowest = slowest.max(started.elapsed());
        let seen = check(&node, &oracle, 0)
            .unwrap_or_else(|error| panic!("seed {seed}, {backing:?}, cut {cut}: {error:#}"));
        lock(&oracle).settle(&seen);
    }
    let counts = lock(&oracle).counts();
    println!("{backing:?}: {cuts} power cuts, 0 flushes lost, {counts:?}, slowest {slowest:?}");
}

/// The lines of a status that say what log and backing are.
fn devices(status: &str) -> String {
    let lines = status.lines().map(str::trim);
    let lines: Vec<&str> = lines
        .filter(|line| line.starts_with("log ") || line.starts_with("backing "))
        .collect();
    lines.join("; ")
}

#[test]
fn a_machine_with_nvme_loses_no_flushed_write_when_it_is_reset() {
    power_cuts(Backing::Nvme, times("HN4_VM_CUTS", 2));
}

#[test]
fn a_machine_with_a_rotating_disk_loses_no_flushed_write_when_it_is_reset() {
    power_cuts(Backing::Hdd, times("HN4_VM_CUTS", 2));
}

#[test]
fn a_machine_with_persistent_memory_loses_no_flushed_write_when_it_is_reset() {
    power_cuts(Backing::Pmem, times("HN4_VM_CUTS", 2));
}

#[test]
#[ignore = "the long run: 20 boots of an emulated machine"]
fn twenty_resets_of_a_machine_with_nvme_lose_no_flushed_write() {
    power_cuts(Backing::Nvme, 20);
}

#[test]
#[ignore = "the long run: 20 boots of an emulated machine"]
fn twenty_resets_of_a_machine_with_a_rotating_disk_lose_no_flushed_write() {
    power_cuts(Backing::Hdd, 20);
}

#[test]
#[ignore = "the long run: 20 boots of an emulated machine"]
fn twenty_resets_of_a_machine_with_persistent_memory_lose_no_flushed_write() {
    power_cuts(Backing::Pmem, 20);
}

/// Shell commands: bytes of file `$i`, different for each. (Paths of programs are written out where
/// the shell has a program of its own of that name, which it would prefer.)
const FILE: &str = "yes \"file $i\" | head -c $((i * 7919 % 60000 + 1))";

/// The kernel's own NBD client on the daemon beside it, with a file system that is written and
/// synced file by file; after a reset every file that had been synced is there, and fsck is happy.
fn kernel_client_cuts(cuts: u64) {
    if prepared().is_none() {
        return;
    }
    let place = folder();
    let disks = Disks {
        folder: place.path(),
        backing: Backing::Nvme,
    };
    disks.make(LOG_MIB, 64);
    let mut node = Node::existing("vm", place.path(), program());
    let next = format!("i=$((i + 1)); {FILE}");
    let attach = format!("/bin/nbd-client -unix /run/nbd.sock /dev/nbd0 -N {VOLUME} > /dev/null");
    let (mut synced, mut random) = (0, Random::new(seed("kernel client")));
    for cut in 0..=cuts {
        let mut machine = boot(&disks, cut == 0).expect("prepared");
        serve(&mut machine, &mut node);
        machine.run(&attach);
        if cut == 0 {
            machine.run("/bin/mke2fs -q -t ext4 -F /dev/nbd0");
        }
        machine.run("mount -t ext4 /dev/nbd0 /mnt");
        let compare =
            format!("i=0; while [ $i -lt {synced} ]; do {next} | cmp - /mnt/f$i || break; done");
        machine.run(&compare);
        if cut == cuts {
            machine.run("umount /mnt");
            machine.run("/bin/e2fsck -f -n /dev/nbd0");
            break;
        }
        machine.send(&format!(
            "(i={synced}; while :; do {next} > /mnt/f$i; sync; echo synced $i; done) &"
        ));
        let goal = synced + 3 + random.below(12);
        let mut note = |line: &str| {
            let number = line
                .strip_prefix("synced ")
                .and_then(|text| text.parse().ok());
            synced = number.unwrap_or(synced);
            synced
        };
        while note(&machine.read().expect("it goes on")) < goal {}
        for line in machine.cut_the_power() {
            note(&line);
        }
    }
    println!("kernel client: {cuts} power cuts, {synced} synced files all there, fsck clean");
}

#[test]
fn ext4_on_the_kernels_nbd_client_keeps_what_was_synced_when_the_machine_is_reset() {
    kernel_client_cuts(times("HN4_VM_CUTS", 2));
}

#[test]
#[ignore = "the long run: 20 boots of an emulated machine"]
fn ext4_on_the_kernels_nbd_client_survives_twenty_resets() {
    kernel_client_cuts(20);
}
