//! The provers of the nodes: the real ones, each on a ledger that survives crashes, slower than the
//! rest of its node by a random time.
//!
//! What a prover gets waits in a queue, as in the daemon; messages between provers travel on the
//! control lane of the nodes' sessions.

use std::collections::VecDeque;
use std::time::Duration;

use hn4::log::{RING_START, Role, Stamp};
use hn4::types::{Epoch, Term};
use hn4_engine::core::event::{Disk, PeerId, ProofEvent, Tip};
use hn4_engine::core::{Action, Event};
use hn4_proof::batch::BatchPolicy;
use hn4_proof::ledger::file::{LedgerFile, MemoryMedium};
use hn4_proof::ledger::verify::Policy;
use hn4_proof::prover::{Frame, Now, Out, PeerState, Prover, Setup};
use hn4_proof::sign::{Algorithm, SecretKey};
use hn4_transport::session::Input;

use crate::link::{Lane, Message};
use crate::node::{identity, node_id};
use crate::plan::Plan;
use crate::rng::Rng;
use crate::world::{Outcome, What, World, broken};

/// What waits for a prover.
#[derive(Debug)]
pub(crate) enum Job {
    Standing(Option<Term>),
    /// From memory.
    Frame(Epoch, Vec<u8>),
    /// From the log.
    Read(Epoch, Vec<u8>),
    Cut(Tip),
    Connected(u8, PeerState),
    FedBy(u8),
    Disconnected(u8),
    Message(u8, Vec<u8>),
}

/// A node's prover while the node is alive.
pub(crate) struct Beside {
    prover: Prover<MemoryMedium>,
    jobs: VecDeque<Job>,
    /// When the prover has worked off what it has.
    busy_until: u64,
    tick_at: Option<u64>,
    standing: Option<Term>,
    /// It never let the core apply what is only durable.
    is_gated: bool,
}

impl Beside {
    /// Opens what the last life left.
    ///
    /// # Errors
    /// If the ledger is damaged, which nothing here does.
    pub(crate) fn open(plan: &Plan, index: usize, medium: MemoryMedium) -> Result<Self, String> {
        let identity = identity(plan);
        let (ledger, tip, _) = LedgerFile::open(medium, identity.volume)
            .map_err(|(_, error)| format!("node {index}: {error}"))?;
        let seed = [u8::try_from(index).unwrap_or(0) + 1; 32];
        let key = SecretKey::from_seed(Algorithm::Ed25519, &seed);
        let setup = Setup {
            identity,
            node: node_id(index),
            keys: key.map_err(|error| error.to_string())?.into(),
            required: Policy::default(),
            checkpoint_age: Duration::from_secs(60),
            policy: BatchPolicy {
                max_age: Duration::from_millis(plan.proof_age_ms),
                ..BatchPolicy::for_log(plan.ring_bytes)
            },
            gate: true,
            hold_bytes: plan.ring_bytes.min(u64::from(plan.slots) * 4096) / 4,
        };
        Ok(Self {
            prover: Prover::new(setup, ledger, tip),
            jobs: VecDeque::new(),
            busy_until: 0,
            tick_at: None,
            standing: None,
            is_gated: true,
        })
    }

    /// The ledger as a crash leaves it: whole, and sometimes with the beginning of an append. One
    /// time in sixteen it loses its last records, of which others may have heard: they rot, or were
    /// never written.
    pub(crate) fn crash(&self, rng: &mut Rng) -> MemoryMedium {
        let ledger = self.prover.ledger();
        let mut medium = ledger.medium().clone();
        if rng.one_in(4) && ledger.records() > 0 {
            let torn = rng.index(40) + 1;
            if torn.is_multiple_of(4) {
                let lost = (torn as u64 / 8).clamp(1, ledger.records());
                let tail = ledger.read(ledger.records() - lost, usize::MAX);
                let lost = tail.map_or(0, |tail| tail.len());
                let at = medium.bytes.len() - lost;
                medium.bytes[at..].fill(0x5A);
                if torn.is_multiple_of(8) {
                    medium.bytes.truncate(at);
                }
                return medium;
            }
            let begun = b"HN4R".iter().chain(&[0x5A; 40]).take(torn);
            medium.bytes.extend(begun);
        }
        medium
    }

    /// Whether the core applies only what is proven.
    pub(crate) fn is_gated(&self) -> bool {
        self.is_gated
    }

    pub(crate) fn describe(&self) -> String {
        format!("{:?} jobs {}", self.prover.status(), self.jobs.len())
    }
}

impl World {
    /// Carries out what a core says to its prover.
    pub(crate) fn carry_out_proof(&mut self, node: usize, action: &Action) {
        match action {
            Action::Prove { epoch } => {
                let live = self.nodes[node].live.as_ref();
                let frame = live.and_then(|live| live.volume.proof_frame(*epoch, &live.mem));
                if let Some(frame) = frame {
                    self.prove(node, Job::Frame(*epoch, frame));
                }
            }
            Action::ProofRead { offset, frames } => {
                let after = self.disk_time(node, Disk::Log);
                let what = What::ProofRead {
                    node,
                    boot: self.nodes[node].boot,
                    offset: offset.0,
                    frames: frames.clone(),
                };
                self.plan_in(after, what);
            }
            Action::ProofCut(tip) => self.prove(node, Job::Cut(*tip)),
            _ => {}
        }
    }

    /// What must hold of proofs after a step of a node that had this role before it.
    pub(crate) fn observe_proofs(&mut self, node: usize, role: Role, usable: bool) -> Outcome {
        let Some(live) = self.nodes[node].live.as_mut() else {
            return Ok(());
        };
        let status = live.volume.copy_status();
        let (tip, progress) = (status.tip, status.progress);
        let gated = live.beside.as_ref().is_none_or(Beside::is_gated);
        // A primary destages what it has not proven yet, and stays ahead if it is demoted.
        let swept = live.applied < progress.applied
            && role == Role::Replica
            && status.role == Role::Replica;
        live.applied = progress.applied;
        let (proven, retained) = (live.volume.proven(), live.volume.superblock().retained);
        let freed = std::mem::replace(&mut live.retained, retained);
        if swept && usable && gated && progress.applied > progress.proven {
            return broken(
                "P2",
                format!("node {node} applied beyond proofs: {progress:?}"),
            );
        }
        if !self.plan.proves {
            return Ok(());
        }
        // A copy that did not wait for proofs may have let go of more before it was promoted; its
        // prover has the hashes.
        let frees = role == Role::Primary && status.role == Role::Primary && retained > freed;
        if frees && retained > proven.epoch {
            let detail = format!("node {node} let go of log that is not proven");
            return broken("P4", detail);
        }
        if usable && !self.oracle.holds(tip, proven) {
            let detail = format!("node {node}: proven is {proven:?}, not on the way to {tip:?}");
            return broken("P6", detail);
        }
        Ok(())
    }

    /// Gives a prover something to do, after what it has already.
    pub(crate) fn prove(&mut self, node: usize, job: Job) {
        let slow = self.plan.proof_us * 1000;
        let boot = self.nodes[node].boot;
        let after = self.rng.below(slow + 1);
        let now = self.now;
        let Some(beside) = self.beside(node) else {
            return;
        };
        beside.jobs.push_back(job);
        let at = beside.busy_until.max(now) + after;
        beside.busy_until = at;
        self.plan_at(at, What::Prover { node, boot });
    }

    fn beside(&mut self, node: usize) -> Option<&mut Beside> {
        let live = self.nodes[node].live.as_mut()?;
        live.beside.as_mut()
    }

    /// The role of a node may have changed.
    pub(crate) fn prover_standing(&mut self, node: usize) {
        let Some(live) = self.nodes[node].live.as_mut() else {
            return;
        };
        let status = live.volume.copy_status();
        let primary = (status.role == Role::Primary).then_some(status.term);
        let Some(beside) = live.beside.as_mut() else {
            return;
        };
        if beside.standing != primary {
            beside.standing = primary;
            self.prove(node, Job::Standing(primary));
        }
    }

    /// A session opens at a side.
    pub(crate) fn prover_connected(&mut self, link: usize, side: usize, term: Term) {
        let ends = self.links[link].nodes;
        let Some(session) = self.links[link].sides[side].open else {
            return;
        };
        let state = PeerState {
            node: node_id(ends[1 - side]),
            session,
            term,
            proves: true,
            max_epoch_bytes: self.plan.max_epoch_blocks as u64 * 4096,
        };
        if let Some(peer) = self.peer_id(link, side) {
            self.prove(ends[side], Job::Connected(peer.0, state));
        }
    }

    /// Frames that a prover asked for are read from the log.
    pub(crate) fn proof_read(&mut self, node: usize, offset: u64, frames: &[(Epoch, u64)]) {
        let ring = self.plan.ring_bytes;
        let wanted = self.nodes[node].live.as_ref();
        if wanted.is_some_and(|live| live.volume.wants_proof_read()) {
            let mut at = offset;
            for &(epoch, bytes) in frames {
                let mut frame = vec![0; crate::oracle::index(bytes)];
                let disk = self.nodes[node].disk(Disk::Log);
                for block in frame.chunks_exact_mut(4096) {
                    disk.read(crate::oracle::index(RING_START + at % ring), block);
                    at += 4096;
                }
                Stamp::clear(&mut frame);
                if let Some(live) = &self.nodes[node].live {
                    live.volume.strike_out_foreign(epoch, &mut frame);
                }
                self.prove(node, Job::Read(epoch, frame));
            }
        }
        let event = ProofEvent::ReadDone { ok: true };
        self.post(node, Event::Proof(event));
    }

    /// A prover does the next thing it has to do.
    pub(crate) fn prover(&mut self, node: usize, boot: u64) -> Outcome {
        if self.nodes[node].boot != boot {
            return Ok(());
        }
        let time = self.now;
        let now = Now {
            time: Duration::from_nanos(time),
            wall_ms: self.clocks(node).wall_ms,
        };
        let Some(beside) = self.beside(node) else {
            return Ok(());
        };
        let prover = &mut beside.prover;
        let result = match beside.jobs.pop_front() {
            None => Ok(()),
            Some(Job::Standing(primary)) => prover.standing(now, primary),
            Some(Job::Frame(epoch, bytes)) => prover.frame(now, epoch, Frame::Memory(&bytes)),
            Some(Job::Read(epoch, bytes)) => prover.frame(now, epoch, Frame::Log(&bytes)),
            Some(Job::Cut(Tip { epoch, chain })) => prover.cut(now, epoch, chain),
            Some(Job::Connected(peer, state)) => {
                prover.connected(peer, state);
                Ok(())
            }
            Some(Job::FedBy(peer)) => prover.fed_by(peer),
            Some(Job::Disconnected(peer)) => {
                prover.disconnected(peer);
                Ok(())
            }
            Some(Job::Message(peer, bytes)) => prover.message(now, peer, &bytes),
        };
        if let Err(error) = result.and_then(|()| prover.tick(now)) {
            return broken("P10", format!("the prover of node {node}: {error}"));
        }
        let deadline = prover.deadline();
        let deadline = deadline.map(|at| u64::try_from(at.as_nanos()).unwrap_or(u64::MAX));
        let outs: Vec<Out> = std::iter::from_fn(|| prover.poll()).collect();
        if beside.tick_at.is_some_and(|at| at <= time) {
            beside.tick_at = None;
        }
        if let Some(at) = deadline.filter(|_| beside.tick_at.is_none()) {
            beside.tick_at = Some(at);
            self.plan_at(at.max(time), What::Prover { node, boot });
        }
        for out in outs {
            self.prover_said(node, out);
        }
        Ok(())
    }

    fn prover_said(&mut self, node: usize, out: Out) {
        self.trace
            .note(self.now, Some(node), || format!("   PROVER {out:?}"));
        let event = match out {
            Out::Start { after, credit } => {
                let (epoch, chain) = after;
                let after = Tip { epoch, chain };
                ProofEvent::Start { after, credit }
            }
            Out::Credit(bytes) => ProofEvent::Credit(bytes),
            Out::Proven(epoch, chain) => {
                self.stats.proven += 1;
                ProofEvent::Proven(Tip { epoch, chain })
            }
            Out::Gate(gate) => {
                if let Some(beside) = self.beside(node) {
                    beside.is_gated &= gate;
                }
                ProofEvent::Gate(gate)
            }
            Out::Refused { why, of } => {
                self.stats.refused_proofs += 1;
                let of = of.map(|(epoch, chain)| Tip { epoch, chain });
                ProofEvent::Refused { why, of }
            }
            Out::Notice(_) => {
                self.stats.ledgers_aside += 1;
                return;
            }
            Out::Send {
                peer,
                session,
                bytes,
            } => {
                let Some((link, side)) = self.link_of(node, PeerId(peer)) else {
                    return;
                };
                if self.links[link].sides[side].open != Some(session) {
                    return;
                }
                if self.plan.real_sessions {
                    self.wire_input(link, side, Input::Proof(bytes.into()));
                } else {
                    let message = Message::Proof(bytes);
                    self.send(link, session, side, Lane::Control, message);
                }
                return;
            }
        };
        self.post(node, Event::Proof(event));
    }
}
