//! A step of a core, what is seen of it, and how its actions are carried out.

use hn4::log::{CopyState, FrameHead, RING_START, Role, Stamp};
use hn4_engine::arena::SlotMemory;
use hn4_engine::core::event::{
    FeedRefusal, PeerEvent, PeerId, PeerMessage, SeedPiece, SeedSent, Tip,
};
use hn4_engine::core::{Action, Actions, Event};

use crate::link::{Lane, Message, News};
use crate::node::identity;
use crate::oracle::Change;
use crate::proofs::Beside;
use crate::world::{MS, Outcome, What, World, broken};

impl World {
    /// Takes a step of a node's core and carries out what it says.
    pub(crate) fn step(&mut self, node: usize, event: Event) -> Outcome {
        self.trace.mix(&[self.now, node as u64]);
        self.trace
            .note(self.now, Some(node), || format!("{event:?}"));
        if let Event::Request { id, .. } = &event {
            self.note_request(node, *id)?;
        }
        let now = self.clocks();
        let is_timer = event == Event::Timer;
        let Some(live) = &mut self.nodes[node].live else {
            return Ok(());
        };
        let role = live.volume.role();
        let opening = live.volume.is_opening();
        let mut actions = Actions::default();
        live.volume.step(now, event, &mut live.mem, &mut actions);
        if is_timer
            && live
                .volume
                .next_deadline()
                .is_some_and(|at| at.0 <= self.now)
        {
            let detail = format!("node {node} would spin on its timer. {}", self.describe());
            return broken("P9", detail);
        }
        self.observe(node, role)?;
        if opening {
            self.note_opened(node)?;
        }
        let dies = self.dies_now(node);
        let keeps = if dies {
            self.rng.index(actions.list.len() + 1)
        } else {
            actions.list.len()
        };
        for action in &actions.list[..keeps] {
            self.trace
                .note(self.now, Some(node), || format!("   {action:?}"));
            self.carry_out(node, action, &actions)?;
        }
        if dies {
            self.crash(node);
            return Ok(());
        }
        self.set_timer(node);
        self.admit(node);
        Ok(())
    }

    fn set_timer(&mut self, node: usize) {
        let Some(live) = &mut self.nodes[node].live else {
            return;
        };
        let Some(deadline) = live.volume.next_deadline() else {
            live.timer_at = None;
            return;
        };
        let at = deadline.0.max(self.now);
        if live
            .timer_at
            .is_none_or(|planned| planned > at || planned < self.now)
        {
            live.timer_at = Some(at);
            let boot = self.nodes[node].boot;
            self.plan_at(at, What::Timer { node, boot });
        }
    }

    /// Compares what a step did with what is legal.
    fn observe(&mut self, node: usize, role: Role) -> Outcome {
        let Some(live) = &mut self.nodes[node].live else {
            return Ok(());
        };
        let status = live.volume.copy_status();
        let (before, tip) = (live.tip, status.tip);
        live.tip = tip;
        let rank_before = std::mem::replace(&mut live.tip_rank, status.tip_rank);
        let was_usable = live.usable;
        // What a fenced primary shows of its open epoch is of no consequence: it will be dropped.
        live.usable = status.copy == CopyState::Usable && status.role != Role::Fenced;
        let usable = live.usable;
        if status.role != Role::Primary {
            live.open.clear();
        } else if role != Role::Primary {
            live.completed = hn4::types::Epoch(0); // Its clients are new.
        }
        if was_usable && !usable {
            self.forget_reads(node);
        }
        let Some(live) = &mut self.nodes[node].live else {
            return Ok(());
        };
        if tip != before {
            let began = live.volume.role() == Role::Primary && status.tip_rank != rank_before;
            if role == Role::Primary || began {
                let changes = std::mem::take(&mut live.open);
                // An epoch without changes marks the beginning of a term.
                let marks = status.tip_rank != rank_before;
                if tip.epoch != before.epoch.next() || (changes.is_empty() && !marks) {
                    return broken(
                        "P2",
                        format!("primary {node} went from {before:?} to {tip:?}"),
                    );
                }
                self.oracle.sealed(tip, before, changes);
                self.stats.epochs += 1;
            } else {
                self.follow(node, before, tip)?;
            }
        }
        if usable && !was_usable {
            self.stats.seeded += 1;
            self.refresh_view(node)?;
            self.verify(node);
        }
        if !self.oracle.holds(tip, status.anchored) {
            let detail = format!(
                "node {node}: {:?} is not on the way to {tip:?}",
                status.anchored
            );
            return broken("P6", detail);
        }
        let progress = status.progress;
        // Also a fenced one answers for what it has on its own medium.
        if status.role != Role::Replica
            && let Some(durable) = self.oracle.ancestor(tip, progress.durable)
        {
            self.oracle.became_durable(durable);
        } else if !self.oracle.was_durable(status.anchored) {
            let detail = format!("node {node}: {:?} was durable nowhere", status.anchored);
            return broken("P2", detail);
        }
        let ordered = progress.applied <= progress.durable && progress.durable <= progress.received;
        let top_term = &mut self.nodes[node].top_term;
        let term = status.term.counter;
        if term < *top_term {
            let detail = format!("node {node} went from term {top_term} to {term}");
            return broken("terms", detail);
        }
        *top_term = term;
        if usable && !ordered {
            return broken("P2", format!("node {node}: {progress:?} is out of order"));
        }
        self.observe_proofs(node, role, usable)?;
        self.note_primary(node)?;
        self.check_bounds(node)
    }

    fn check_bounds(&self, node: usize) -> Outcome {
        let Some(live) = &self.nodes[node].live else {
            return Ok(());
        };
        let (used, ring) = live.volume.log_usage();
        if used > ring || live.volume.dirty_slots() > live.mem.capacity() {
            return broken(
                "P8",
                format!("node {node}: {used} of {ring} bytes of log in use"),
            );
        }
        Ok(())
    }

    /// The log of a copy went from one place to another.
    fn follow(&mut self, node: usize, before: Tip, tip: Tip) -> Outcome {
        if !self.oracle.knows(tip) {
            return broken(
                "P6",
                format!("node {node} took {tip:?}, which nobody sealed"),
            );
        }
        let changes = self.oracle.changes(before, tip);
        if let Some(changes) = changes {
            let changes: Vec<Change> = changes.into_iter().cloned().collect();
            for change in &changes {
                self.change_view(node, change);
            }
            return Ok(());
        }
        self.stats.truncations += 1;
        self.doom_if_touchy(node);
        if !self.oracle.holds(tip, self.nodes[node].promise) {
            let promise = self.nodes[node].promise;
            return broken("P1", format!("node {node} dropped {promise:?} for {tip:?}"));
        }
        self.refresh_view(node)
    }

    /// What the copy holds, from scratch.
    pub(crate) fn refresh_view(&mut self, node: usize) -> Outcome {
        self.forget_reads(node);
        let Some(live) = &mut self.nodes[node].live else {
            return Ok(());
        };
        let Some(contents) = self.oracle.contents(live.tip) else {
            return broken(
                "P2",
                format!("node {node}: no history leads to {:?}", live.tip),
            );
        };
        live.view = contents;
        Ok(())
    }

    fn carry_out(&mut self, node: usize, action: &Action, actions: &Actions) -> Outcome {
        match action {
            Action::Complete { id, result } => return self.completed(node, *id, *result),
            Action::Io { token, io } => {
                match self.nodes[node].start_io(*token, io, &actions.segs) {
                    Err(why) => return broken("P2", format!("node {node}: {why}")),
                    Ok(id) => {
                        let after = self.disk_time(node);
                        let boot = self.nodes[node].boot;
                        self.plan_in(after, What::Io { node, boot, id });
                    }
                }
            }
            Action::Ship { peer, epoch } => {
                let live = self.nodes[node].live.as_ref();
                let frame = live.and_then(|live| live.volume.frame_bytes(*epoch, &live.mem));
                let Some(frame) = frame else {
                    return broken("P10", format!("node {node} has no frame of epoch {epoch}"));
                };
                self.send_to(
                    node,
                    *peer,
                    Lane::Data,
                    Message::Event(PeerEvent::Epoch(frame)),
                );
            }
            Action::FeedRead {
                peer,
                offset,
                frames,
            } => {
                let (link, side) = self.link_of(node, *peer);
                if let Some(session) = self.links[link].sides[side].open {
                    let frames = frames.iter().map(|&(_, bytes)| bytes).collect();
                    let after = self.disk_time(node);
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
            Action::SeedRead {
                peer,
                offset,
                bytes,
            } => {
                let (link, side) = self.link_of(node, *peer);
                if let Some(session) = self.links[link].sides[side].open {
                    let after = self.disk_time(node);
                    let (offset, bytes) = (*offset, *bytes);
                    self.plan_in(
                        after,
                        What::SeedRead {
                            link,
                            session,
                            side,
                            offset,
                            bytes,
                        },
                    );
                }
            }
            Action::Prove { .. } | Action::ProofRead { .. } | Action::ProofCut(_) => {
                self.carry_out_proof(node, action);
            }
            Action::Peer { peer, message } => self.peer_message(node, *peer, message),
            Action::ControlDone { id, result } => return self.control_done(node, *id, result),
            Action::Pinned { .. } | Action::PinsBroken => {}
            Action::SaveFork { after, .. } => self.save_fork(node, *after),
            Action::StateChanged => self.state_changed(node),
        }
        Ok(())
    }

    fn send_to(&mut self, node: usize, peer: PeerId, lane: Lane, message: Message) {
        let (link, side) = self.link_of(node, peer);
        if let Some(session) = self.links[link].sides[side].open {
            self.send(link, session, side, lane, message);
        }
    }

    fn peer_message(&mut self, node: usize, peer: PeerId, message: &PeerMessage) {
        let (lane, event) = match message {
            PeerMessage::SeedAck(_) => return,
            PeerMessage::FeedOpened(_) => {
                return self.send_to(node, peer, Lane::Data, Message::FeedOpened);
            }
            PeerMessage::FeedRefused(refusal) => {
                let refusal: FeedRefusal = *refusal;
                return self.send_to(node, peer, Lane::Data, Message::Refused(refusal));
            }
            PeerMessage::Close => {
                let (link, side) = self.link_of(node, peer);
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
        self.send_to(node, peer, lane, Message::Event(event));
    }

    /// What a former primary has and nobody else is saved, mostly; from then on it need not be in
    /// its log.
    fn save_fork(&mut self, node: usize, after: hn4::types::Epoch) {
        self.stats.forks += 1;
        let fails = !self.quiet && self.rng.one_in(8);
        let result = if fails {
            Err("no room".to_owned())
        } else {
            if self.nodes[node].promise.epoch > after {
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
            self.doom_if_touchy(node);
        }
        for link in 0..self.links.len() {
            let Some(side) = self.links[link].side_of(node) else {
                continue;
            };
            let Some(session) = self.links[link].sides[side].open else {
                continue;
            };
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
        frames: &[u64],
    ) {
        let node = self.links[link].nodes[side];
        if self.links[link].sides[side].open != Some(session) || self.nodes[node].live.is_none() {
            return;
        }
        let ring = self.plan.ring_bytes;
        let identity = identity(&self.plan);
        let disk = self.nodes[node].disk(hn4_engine::core::event::Disk::Log);
        let mut at = offset;
        let mut sent = Vec::new();
        for &bytes in frames {
            let mut frame = vec![0; crate::oracle::index(bytes)];
            for block in frame.chunks_exact_mut(4096) {
                disk.read(crate::oracle::index(RING_START + at % ring), block);
                at += 4096;
            }
            Stamp::clear(&mut frame);
            if FrameHead::decode_frame(&identity, &frame).is_err() {
                break;
            }
            sent.push(frame);
        }
        let ok = sent.len() == frames.len();
        for frame in sent {
            let message = Message::Event(PeerEvent::Epoch(frame));
            self.send(link, session, side, Lane::Data, message);
        }
        self.post_peer(link, side, PeerEvent::FeedReadDone { ok });
    }

    /// A piece of a full copy is read from the backing and sent.
    pub(crate) fn seed_read(
        &mut self,
        link: usize,
        session: u64,
        side: usize,
        offset: u64,
        bytes: u64,
    ) {
        let node = self.links[link].nodes[side];
        if self.links[link].sides[side].open != Some(session) || self.nodes[node].live.is_none() {
            return;
        }
        let disk = self.nodes[node].disk(hn4_engine::core::event::Disk::Backing);
        let mut data = vec![0; crate::oracle::index(bytes)];
        disk.read(crate::oracle::index(offset), &mut data);
        let is_zero = data.iter().all(|&byte| byte == 0);
        let data = (!is_zero).then_some(data);
        let piece = SeedPiece {
            offset,
            bytes,
            data,
        };
        let sent = Some(SeedSent {
            bytes,
            cost: piece.cost(),
        });
        let message = Message::Event(PeerEvent::SeedPiece(piece));
        self.send(link, session, side, Lane::Data, message);
        self.post_peer(link, side, PeerEvent::SeedReadDone(sent));
    }

    /// Power is lost at a node.
    pub(crate) fn crash(&mut self, node: usize) {
        self.trace.note(self.now, Some(node), || "CRASH".to_owned());
        self.stats.crashes += 1;
        let live = self.nodes[node].live.as_ref();
        if live.is_some_and(|live| live.volume.role() != Role::Primary) {
            // What peers held in memory is gone.
            self.oracle.received = self.oracle.promised;
        }
        self.nodes[node].crash(self.plan.shears, &mut self.rng);
        if !self.quiet && self.rng.one_in(self.plan.rot) {
            let ring = RING_START;
            let offset = ring + self.rng.log_between(1, self.plan.ring_bytes) - 1;
            let bit = u8::try_from(self.rng.below(8)).unwrap_or(0);
            let log = self.nodes[node].disk(hn4_engine::core::event::Disk::Log);
            log.rot(crate::oracle::index(offset), bit);
            self.nodes[node].rotten = true;
            self.stats.rotten += 1;
        }
        self.drop_requests(node);
        self.node_left(node);
        let after = MS / 10 + self.rng.below(self.plan.down_ms * MS);
        self.plan_in(after, What::Restart { node });
    }

    /// The sessions of a node end.
    pub(crate) fn node_left(&mut self, node: usize) {
        for link in 0..self.links.len() {
            let Some(side) = self.links[link].side_of(node) else {
                continue;
            };
            if let Some(session) = self.links[link].sides[side].open.take() {
                let after = self.rng.below(50 * MS);
                let side = 1 - side;
                self.plan_in(
                    after,
                    What::SessionEnds {
                        link,
                        session,
                        side,
                    },
                );
            }
        }
    }

    /// A node starts: recovery, and what must have survived.
    pub(crate) fn start_node(&mut self, node: usize) -> Outcome {
        let dies = !self.quiet && self.rng.one_in(self.plan.dies_in_recovery);
        let operations = self.rng.below(12);
        let log = self.nodes[node].disk(hn4_engine::core::event::Disk::Log);
        log.dies_after = dies.then_some(operations);
        let plan = self.plan.clone();
        let opened = self.nodes[node].open(&plan);
        self.nodes[node]
            .disk(hn4_engine::core::event::Disk::Log)
            .dies_after = None;
        let report = match opened {
            Ok(report) => report,
            Err(_) if dies => {
                self.stats.cut_recoveries += 1;
                self.nodes[node].crash(self.plan.shears, &mut self.rng);
                self.plan_in(MS, What::Restart { node });
                return Ok(());
            }
            Err(_) if self.nodes[node].rotten => {
                self.refused(node);
                return Ok(());
            }
            Err(error) => return broken("P1", format!("node {node} does not open: {error}")),
        };
        self.trace
            .note(self.now, Some(node), || format!("OPEN {report:?}"));
        let Some(live) = &mut self.nodes[node].live else {
            return Ok(());
        };
        let status = live.volume.copy_status();
        live.usable = status.copy == CopyState::Usable && status.role != Role::Fenced;
        let (tip, usable) = (status.tip, live.usable);
        let opening = live.volume.is_opening();
        if !self.oracle.knows(tip) {
            return broken(
                "P2",
                format!("node {node} opened at {tip:?}, which nobody sealed"),
            );
        }
        if self.nodes[node].rotten && !self.oracle.holds(tip, self.nodes[node].promise) {
            // The last frame, of which nothing proves that it was durable, may be taken for torn.
            self.nodes[node].promise = Tip::default();
            self.oracle.promised = Tip::default();
        }
        let promise = self.nodes[node].promise;
        if !self.oracle.holds(tip, promise) {
            let detail = format!("node {node} promised {promise:?} and opened at {tip:?}");
            return broken("P1", detail);
        }
        if status.role == Role::Primary && !opening {
            // It may make peers drop what they hold and it does not.
            self.oracle.received = self.oracle.promised;
        }
        if usable {
            self.refresh_view(node)?;
            self.verify(node);
        }
        if self.plan.proves {
            let medium = std::mem::take(&mut self.nodes[node].ledger);
            match Beside::open(&self.plan, node, medium) {
                Err(error) => return broken("P10", error),
                Ok(beside) => {
                    if let Some(live) = &mut self.nodes[node].live {
                        live.beside = Some(beside);
                    }
                }
            }
            // It says that it has begun.
            self.prover_standing(node);
            let boot = self.nodes[node].boot;
            self.plan_in(0, What::Prover { node, boot });
        }
        self.post(node, Event::Timer);
        for link in 0..self.links.len() {
            if self.links[link].side_of(node).is_some() {
                self.plan_connect(link);
            }
        }
        Ok(())
    }
}
