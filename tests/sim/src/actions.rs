//! Carrying out what a core says: operations on disks, messages to peers, answers to clients.

use hn4::log::{RING_START, Stamp};
use hn4::types::Epoch;
use hn4_engine::core::event::{
    Contents, Disk, Fork, Io, IoToken, PeerEvent, PeerId, PeerMessage, SeedPiece, SeedSent, Tip,
};
use hn4_engine::core::{Action, Actions, Event};
use hn4_transport::session::Input;

use crate::faults::Fault;
use crate::link::{Lane, Message, News};
use crate::node::{Damages, Fate, Kind, Landed};
use crate::oracle::index;
use crate::translate;
use crate::world::{MS, Outcome, What, World, broken};

impl World {
    pub(crate) fn carry_out(&mut self, node: usize, action: &Action, actions: &Actions) -> Outcome {
        match action {
            Action::Complete { id, result } => return self.completed(node, *id, *result),
            Action::Io { token, io } => return self.start_io(node, *token, io, actions),
            Action::Ship { peer, epoch } => {
                let live = self.nodes[node].live.as_ref();
                let frame = live.and_then(|live| live.volume.frame_bytes(*epoch, &live.mem));
                let Some(frame) = frame else {
                    return broken("P10", format!("node {node} has no frame of epoch {epoch}"));
                };
                if let Some((link, side)) = self.link_of(node, *peer) {
                    self.send_frame(link, side, *epoch, frame);
                }
            }
            Action::FeedRead {
                peer,
                offset,
                frames,
            } => {
                if let Some((link, side)) = self.link_of(node, *peer)
                    && let Some(session) = self.links[link].sides[side].open
                {
                    let frames = frames.clone();
                    let after = self.disk_time(node, Disk::Log);
                    let offset = offset.0;
                    self.plan_in(
                        after,
                        What::FeedRead {
                            link,
                            session,
                            side,
                            offset,
                            frames,
                        },
                    );
                }
            }
            Action::SeedRead { offset, bytes, .. } => {
                self.check_copied(node, *offset, *bytes)?;
                self.carry_out_copy(node, action);
            }
            Action::SeedSame { .. } => self.carry_out_copy(node, action),
            Action::Prove { .. } | Action::ProofRead { .. } | Action::ProofCut(_) => {
                self.carry_out_proof(node, action);
            }
            Action::Tree(work) => self.carry_out_tree(node, work, actions),
            Action::DropShadow => self.nodes[node].drop_shadow(),
            Action::Pinned { .. } | Action::PinsBroken => {}
            Action::PeerRetired { peer } => {
                let retired =
                    |event: &Event| matches!(event, Event::Peer { peer: from, .. } if from == peer);
                self.inbox
                    .retain(|(to, _, event)| *to != node || !retired(event));
            }
            Action::Peer { peer, message } => self.peer_message(node, *peer, message),
            Action::ControlDone { id, result } => return self.control_done(node, *id, result),
            Action::SaveFork(fork) => self.save_fork(node, fork),
            Action::StateChanged => self.state_changed(node),
        }
        Ok(())
    }

    /// The next part of a full copy is to be read and sent, or said to be the same: behind those
    /// that were asked for before.
    fn carry_out_copy(&mut self, node: usize, action: &Action) {
        let (peer, offset, bytes, same) = match *action {
            Action::SeedRead {
                peer,
                offset,
                bytes,
                ..
            } => (peer, offset, bytes, false),
            Action::SeedSame {
                peer,
                offset,
                bytes,
            } => (peer, offset, bytes, true),
            _ => return,
        };
        if let Some((link, side)) = self.link_of(node, peer)
            && let Some(session) = self.links[link].sides[side].open
        {
            let after = match same {
                true => 0,
                false => self.disk_time(node, Disk::Backing),
            };
            let until = &mut self.links[link].sides[side].copied_until;
            *until = (*until).max(self.now + after);
            let (at, what) = (
                *until,
                What::SeedPart {
                    link,
                    session,
                    side,
                    offset,
                    bytes,
                    same,
                },
            );
            self.plan_at(at, what);
            if !same {
                self.post_peer(link, side, PeerEvent::SeedPart(bytes));
            }
        }
    }

    fn start_io(&mut self, node: usize, token: IoToken, io: &Io, actions: &Actions) -> Outcome {
        if token == IoToken::Superblock && self.rng.one_in(self.plan.superblock_touchy) {
            self.doom_soon(node);
        }
        match self.nodes[node].start_io(token, io, &actions.segs) {
            Err(why) => broken("P2", format!("node {node}: {why}")),
            Ok((id, disk)) => {
                let after = self.disk_time(node, disk);
                let boot = self.nodes[node].boot;
                self.plan_in(after, What::Io { node, boot, id });
                if token == IoToken::Superblock {
                    // It is flushed too, which takes about as long again.
                    let (rate, within) = (self.plan.superblock_crash, 2 * after);
                    self.power_may_fail(node, rate, within, Fault::CrashInSuperblock);
                }
                Ok(())
            }
        }
    }

    /// An operation's time has come.
    pub(crate) fn io(&mut self, node: usize, boot: u64, id: u64) -> Outcome {
        if self.nodes[node].boot != boot {
            return Ok(());
        }
        let Some((disk, kind)) = self.nodes[node].flight(id) else {
            return Ok(());
        };
        let superblock = self.nodes[node].writes_superblock(id);
        let damages = self.damages(node, (disk, superblock), id);
        let fate = self.fate(node, disk, kind, damages);
        if superblock {
            self.nodes[node].superblock_lost = matches!(fate, Fate::Lost);
        }
        match self.nodes[node].land(id, fate, &mut self.rng) {
            None => {}
            Some(Landed::Again) => {
                let after = self.disk_time(node, disk);
                self.plan_in(after, What::Io { node, boot, id });
            }
            Some(Landed::Done(token, result)) => {
                self.post(node, Event::IoDone { token, result });
            }
        }
        Ok(())
    }

    /// What may become of a write.
    ///
    /// A superblock and a frame are not damaged both: then nothing on the node tells that a sweep
    /// wrote what its log lacks now. Two disks are for that.
    fn damages(&self, node: usize, (disk, superblock): (Disk, bool), id: u64) -> Damages {
        let at = &self.nodes[node];
        match disk {
            Disk::Log if superblock && !at.rotten => Damages::Lost,
            Disk::Log if superblock || at.superblock_lost => Damages::No,
            // Where there are trees, only what they can know of is damaged.
            Disk::Backing if self.plan.trees && !at.is_watched_write(id) => Damages::No,
            Disk::Log | Disk::Backing | Disk::Shadow => Damages::Any,
        }
    }

    /// What becomes of an operation.
    pub(crate) fn fate(&mut self, node: usize, disk: Disk, kind: Kind, damages: Damages) -> Fate {
        if self.quiet {
            return Fate::Done;
        }
        if self.rng.one_in(self.plan.disk_error) && self.fault(Fault::IoError, Some(node)) {
            return Fate::Fails(5);
        }
        let write = kind == Kind::Write;
        if write && disk != Disk::Log && self.now < self.nodes[node].no_space_until {
            return Fate::Fails(28);
        }
        let rate = match disk {
            _ if damages == Damages::No => 0,
            Disk::Log => self.plan.log_damage,
            Disk::Backing => self.plan.backing_damage,
            Disk::Shadow => 0,
        };
        if write && self.rng.one_in(rate) {
            let lost = self.rng.one_in(2) || damages == Damages::Lost;
            let fault = match (disk, lost) {
                (Disk::Log, true) => Fault::LostLogWrite,
                (Disk::Log, false) => Fault::MisdirectedLogWrite,
                (Disk::Backing | Disk::Shadow, true) => Fault::LostBackingWrite,
                (Disk::Backing | Disk::Shadow, false) => Fault::MisdirectedBackingWrite,
            };
            if self.fault(fault, Some(node)) {
                self.nodes[node].rotten |= disk == Disk::Log;
                return if lost { Fate::Lost } else { Fate::Astray };
            }
        }
        let lies = kind == Kind::Flush && disk == Disk::Log;
        if lies
            && self.rng.one_in(self.plan.lying_flush)
            && self.fault(Fault::LyingFlush, Some(node))
        {
            return Fate::Lost;
        }
        Fate::Done
    }

    /// A frame of the log goes to a peer.
    fn send_frame(&mut self, link: usize, side: usize, epoch: Epoch, frame: Vec<u8>) {
        if self.plan.real_sessions {
            let frame = frame.into();
            return self.wire_input(link, side, Input::SendEpoch { epoch, frame });
        }
        let message = Message::Event(PeerEvent::Epoch(frame));
        self.send_open(link, side, Lane::Data, message);
    }

    fn send_open(&mut self, link: usize, side: usize, lane: Lane, message: Message) {
        if let Some(session) = self.links[link].sides[side].open {
            self.send(link, session, side, lane, message);
        }
    }

    fn peer_message(&mut self, node: usize, peer: PeerId, message: &PeerMessage) {
        let Some((link, side)) = self.link_of(node, peer) else {
            return;
        };
        if self.plan.real_sessions {
            return self.wire_input(link, side, translate::input(message.clone()));
        }
        let (lane, event) = match message {
            PeerMessage::SeedAck(_) => return,
            PeerMessage::FeedOpened(from) => (Lane::Data, PeerEvent::FeedOpened(*from)),
            PeerMessage::FeedRefused(refusal) => {
                return self.send_open(link, side, Lane::Data, Message::Refused(*refusal));
            }
            PeerMessage::Close => {
                if let Some(session) = self.links[link].sides[side].open {
                    self.end_session(link, session, side);
                }
                return;
            }
            PeerMessage::Pull { tip, anchored } => {
                let (tip, anchored) = (*tip, *anchored);
                (Lane::Control, PeerEvent::Subscribe { tip, anchored })
            }
            PeerMessage::Anchored(tip) => (Lane::Control, PeerEvent::Anchored(*tip)),
            PeerMessage::SeedStart(origin) => (Lane::Data, PeerEvent::SeedStart(*origin)),
            PeerMessage::SeedEnd { usable_after } => {
                let usable_after = *usable_after;
                (Lane::Data, PeerEvent::SeedEnd { usable_after })
            }
            PeerMessage::Ack(progress) => (Lane::Control, PeerEvent::Ack(*progress)),
            PeerMessage::Credit(bytes) => (Lane::Control, PeerEvent::Credit(*bytes)),
        };
        self.send_open(link, side, lane, Message::Event(event));
    }

    /// What a former primary has and nobody else is saved, mostly; from then on it need not be in
    /// its log.
    fn save_fork(&mut self, node: usize, fork: &Fork) {
        self.stats.forks += 1;
        let fails = !self.quiet && self.rng.one_in(8) && self.fault(Fault::UnsavedFork, Some(node));
        let result = if fails {
            Err("no room".to_owned())
        } else {
            let all = fork.shadow_bytes.is_some();
            if let Some(live) = &mut self.nodes[node].live {
                live.saved |= all;
            }
            if all || self.nodes[node].promise.epoch > fork.after.epoch {
                self.nodes[node].promise = Tip::default();
            }
            Ok(())
        };
        self.post(node, Event::ForkSaved(result));
    }

    fn state_changed(&mut self, node: usize) {
        let Some(live) = &self.nodes[node].live else {
            return;
        };
        let status = live.volume.copy_status();
        let kind = std::mem::discriminant(&status.copy);
        let standing = (status.role, status.term, kind);
        self.prover_standing(node);
        if self.nodes[node].standing.replace(standing) != Some(standing) {
            let switched = matches!(status.copy, hn4::log::CopyState::Applying { .. });
            self.stats.shadows += u64::from(switched);
            self.doom_if_touchy(node);
        }
        for link in 0..self.links.len() {
            let Some(side) = self.links[link].side_of(node) else {
                continue;
            };
            let Some(session) = self.links[link].sides[side].open else {
                continue;
            };
            if self.plan.real_sessions {
                let state = self.local_state(node, &status);
                self.wire_input(link, side, Input::LocalState(state));
                continue;
            }
            match self.links[link].sides[side].local_changed(status) {
                News::Close => self.end_session(link, session, side),
                News::Tell => {
                    self.send(link, session, side, Lane::Control, Message::State(status));
                    self.ask(link, side);
                }
                News::None => self.ask(link, side),
            }
        }
    }

    /// Frames that a feed asked for are read from the log and sent.
    pub(crate) fn feed_read(
        &mut self,
        link: usize,
        session: u64,
        side: usize,
        offset: u64,
        frames: &[(Epoch, u64)],
    ) {
        let node = self.links[link].nodes[side];
        if self.links[link].sides[side].open != Some(session) || self.nodes[node].live.is_none() {
            return;
        }
        let ring = self.plan.ring_bytes;
        let disk = self.nodes[node].disk(Disk::Log);
        let mut at = offset;
        let mut sent = Vec::new();
        for &(_, bytes) in frames {
            let mut frame = vec![0; index(bytes)];
            for block in frame.chunks_exact_mut(4096) {
                disk.read(index(RING_START + at % ring), block);
                at += 4096;
            }
            Stamp::clear(&mut frame);
            sent.push(frame);
        }
        let whole = sent.concat();
        let live = self.nodes[node].live.as_ref();
        let intact = live.map_or(0, |live| live.volume.intact_frames(frames, &whole));
        let ok = intact == frames.len();
        let epochs = frames.iter().map(|&(epoch, _)| epoch);
        for (epoch, frame) in epochs.zip(sent).take(intact) {
            self.send_frame(link, side, epoch, frame);
        }
        self.post_peer(link, side, PeerEvent::FeedReadDone { ok });
    }

    /// A piece of a full copy is read from the backing and sent.
    pub(crate) fn seed_part(
        &mut self,
        link: usize,
        session: u64,
        side: usize,
        (offset, bytes, same): (u64, u64, bool),
    ) {
        let node = self.links[link].nodes[side];
        if self.links[link].sides[side].open != Some(session) || self.nodes[node].live.is_none() {
            return;
        }
        if same {
            self.stats.kept_bytes += bytes;
            return self.send_piece(link, side, offset, bytes, Contents::Same);
        }
        let disk = self.nodes[node].disk(Disk::Backing);
        let mut data = vec![0; index(bytes)];
        disk.read(index(offset), &mut data);
        let other = self.links[link].nodes[1 - side];
        self.damage_spreads(node, other, offset, bytes);
        let is_zero = data.iter().all(|&byte| byte == 0);
        let contents = match is_zero {
            true => Contents::Zeroes,
            false => Contents::Data(data),
        };
        self.send_piece(link, side, offset, bytes, contents);
    }

    /// A piece of a full copy goes to a peer.
    fn send_piece(
        &mut self,
        link: usize,
        side: usize,
        offset: u64,
        bytes: u64,
        contents: Contents,
    ) {
        let piece = SeedPiece {
            offset,
            bytes,
            contents,
        };
        let sent = Some(SeedSent {
            bytes,
            cost: piece.cost(),
        });
        if self.plan.real_sessions {
            self.wire_input(link, side, translate::piece_input(piece));
        } else {
            let message = Message::Event(PeerEvent::SeedPiece(piece));
            self.send_open(link, side, Lane::Data, message);
        }
        self.post_peer(link, side, PeerEvent::SeedReadDone(sent));
    }

    /// How long a disk takes.
    pub(crate) fn disk_time(&mut self, node: usize, disk: Disk) -> u64 {
        let factor = self.plan.disk_factors[node][usize::from(disk == Disk::Backing)];
        let usual = self.plan.disk_us * 1000 * factor;
        let time = usual / 4 + self.rng.below(usual * 2);
        if !self.quiet && self.rng.one_in(self.plan.disk_spike) {
            self.stats.spikes += 1;
            time + self.rng.below(50 * MS)
        } else {
            time
        }
    }
}
