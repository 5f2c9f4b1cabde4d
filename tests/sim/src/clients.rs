//! Clients: what they ask for, how a front end brings it to a core, and what each answer is worth.

use hn4::log::Role;
use hn4::types::{Epoch, Lba, SECTORS_PER_BLOCK};
use hn4_engine::arena::{SlotId, SlotMemory};
use hn4_engine::core::event::{Failure, Request, RequestId, Tip};
use hn4_engine::core::{AckMode, Event, VerifyReads};

use crate::disk::SECTOR;
use crate::node::Node;
use crate::oracle::{Change, Tag, apply, describe, fill, index, is};
use crate::world::{MS, Outcome, What, World, broken};

/// One connection, which waits for each answer before it asks again.
#[derive(Debug, Default)]
pub(crate) struct Client {
    /// It asks no more.
    pub(crate) done: bool,
}

/// What is wanted.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Wish {
    Write {
        lba: u64,
        sectors: u64,
        fua: bool,
        tag: Tag,
    },
    Zero {
        lba: u64,
        sectors: u64,
        fua: bool,
        trim: bool,
    },
    Read {
        lba: u64,
        sectors: u64,
    },
    Flush,
}

/// A request that was not answered yet.
#[derive(Debug)]
pub(crate) struct Pending {
    client: Option<usize>,
    pub(crate) node: usize,
    pub(crate) wish: Wish,
    /// Writes: the epoch that they went into. Flushes: the epoch they must make durable.
    epoch: Epoch,
    slots: Vec<SlotId>,
    /// When the core was told.
    pub(crate) at: u64,
    /// Reads: blocks that the core knew to be damaged then.
    pub(crate) known: Vec<u64>,
    /// Reads: the legal contents of each sector; nothing if the copy changed as a whole meanwhile.
    legal: Option<Vec<Vec<Tag>>>,
}

impl Pending {
    /// Whether it is a write of this block that has not been written back yet.
    pub(crate) fn is_to_write(&self, block: u64, checkpoint: Epoch) -> bool {
        let is_back = self.epoch > Epoch(0) && self.epoch <= checkpoint;
        match self.wish {
            Wish::Write { lba, .. } => lba == block * SECTORS_PER_BLOCK && !is_back,
            _ => false,
        }
    }
}

fn blocks_of(lba: u64, sectors: u64) -> usize {
    index((lba + sectors).div_ceil(SECTORS_PER_BLOCK) - lba / SECTORS_PER_BLOCK)
}

fn edges_of(lba: u64, sectors: u64) -> usize {
    let end = lba + sectors;
    let unaligned = |sector: u64| usize::from(!sector.is_multiple_of(SECTORS_PER_BLOCK));
    if lba.div_ceil(SECTORS_PER_BLOCK) > end / SECTORS_PER_BLOCK {
        1
    } else {
        unaligned(lba) + unaligned(end)
    }
}

impl World {
    /// A client's pause is over.
    pub(crate) fn client(&mut self, client: usize) -> Outcome {
        if self.quiet || self.next_request >= self.plan.requests {
            self.clients[client].done = true;
            return Ok(());
        }
        let Some(node) = self.node_to_ask() else {
            self.plan_in(5 * MS, What::Client(client));
            return Ok(());
        };
        let wish = self.wish();
        self.ask_node(Some(client), node, wish);
        Ok(())
    }

    /// Most clients find the primary of the highest term; a few stay with whoever answers.
    fn node_to_ask(&mut self) -> Option<usize> {
        let live = self.nodes.iter().filter_map(|node| {
            let live = node.live.as_ref()?;
            let status = live.volume.copy_status();
            let primary = status.role == Role::Primary;
            Some((primary, status.term.counter, node.index))
        });
        let live: Vec<_> = live.collect();
        if self.rng.one_in(20) && !live.is_empty() {
            return Some(self.rng.pick(&live).2);
        }
        live.into_iter()
            .filter(|node| node.0)
            .max()
            .map(|node| node.2)
    }

    fn wish(&mut self) -> Wish {
        let volume = self.plan.blocks * SECTORS_PER_BLOCK;
        let hot = if self.rng.one_in(4) {
            volume
        } else {
            self.plan.hot_blocks * SECTORS_PER_BLOCK
        };
        let mut lba = self.rng.below(hot);
        let most = self.plan.max_sectors.min(volume - lba);
        let mut sectors = self.rng.log_between(1, most);
        if self.rng.one_in(2) {
            lba = lba / SECTORS_PER_BLOCK * SECTORS_PER_BLOCK;
            sectors = sectors
                .next_multiple_of(SECTORS_PER_BLOCK)
                .min(volume - lba);
        }
        let fua = self.rng.one_in(self.plan.fua);
        let weights = self.plan.weights;
        let mut draw = self.rng.below(weights.iter().sum());
        let mut kind = 0;
        while draw >= weights[kind] {
            draw -= weights[kind];
            kind += 1;
        }
        match kind {
            0 => {
                // Tags 1 and 2 are the initial contents.
                let tag = self.next_request + 10;
                Wish::Write {
                    lba,
                    sectors,
                    fua,
                    tag,
                }
            }
            1 => {
                let trim = self.rng.one_in(2);
                let sectors = if self.rng.one_in(8) {
                    self.rng.between(1, volume - lba)
                } else {
                    sectors
                };
                Wish::Zero {
                    lba,
                    sectors,
                    fua,
                    trim,
                }
            }
            2 => Wish::Read { lba, sectors },
            _ => Wish::Flush,
        }
    }

    pub(crate) fn ask_node(&mut self, client: Option<usize>, node: usize, wish: Wish) {
        self.next_request += 1;
        let id = RequestId(self.next_request);
        let pending = Pending {
            client,
            node,
            wish,
            epoch: Epoch(0),
            slots: Vec::new(),
            at: 0,
            known: Vec::new(),
            legal: None,
        };
        self.pending.insert(id, pending);
        if let Some(live) = &mut self.nodes[node].live {
            live.held.push_back(id);
        }
        self.admit(node);
    }

    /// Reads the whole volume and compares it.
    pub(crate) fn verify(&mut self, node: usize) {
        let live = self.nodes[node].live.as_ref();
        let torn = live.is_some_and(|live| live.volume.may_be_pinned() && live.volume.is_torn());
        if torn && self.plan.trees && self.plan.verify_reads == VerifyReads::All {
            // Readers of such a replica are not let in. They would wait for the tree, which waits
            // for the sweep, and hold memory that the copy needs which comes before that.
            return;
        }
        let volume = self.plan.blocks * SECTORS_PER_BLOCK;
        let chunk = 8 * SECTORS_PER_BLOCK;
        for lba in (0..volume).step_by(index(chunk)) {
            let sectors = chunk.min(volume - lba);
            self.ask_node(None, node, Wish::Read { lba, sectors });
        }
    }

    /// Brings the requests that have room to the core. One at a time: each changes what has room.
    pub(crate) fn admit(&mut self, node: usize) {
        let waiting = self.inbox.iter().any(|(to, ..)| *to == node);
        let Some(live) = self.nodes[node].live.as_mut().filter(|_| !waiting) else {
            return;
        };
        let Some(id) = live.held.front().copied() else {
            return;
        };
        let Some(pending) = self.pending.get_mut(&id) else {
            live.held.pop_front();
            return;
        };
        let (slots, writes) = match pending.wish {
            Wish::Write { lba, sectors, .. } => (blocks_of(lba, sectors), true),
            Wish::Zero { lba, sectors, .. } => (edges_of(lba, sectors), true),
            Wish::Read { lba, sectors } => (blocks_of(lba, sectors), false),
            Wish::Flush => (0, false),
        };
        let room = live.mem.free_slots() >= slots;
        if !room || (writes && !live.volume.admits(&live.mem, slots)) {
            return;
        }
        live.held.pop_front();
        let slots: Vec<SlotId> = (0..slots).filter_map(|_| live.mem.alloc()).collect();
        let request = request(pending.wish, &slots, &mut live.mem);
        if let Wish::Read { .. } = pending.wish {
            pending.slots = slots;
        }
        self.post(node, Event::Request { id, request });
    }

    /// Just before a request's step: the oracle takes note of what the core is told.
    pub(crate) fn note_request(&mut self, node: usize, id: RequestId) -> Outcome {
        if let Some(&Pending {
            wish: Wish::Read { lba, sectors },
            ..
        }) = self.pending.get(&id)
        {
            let known = self.known_in(node, lba, sectors);
            if let Some(pending) = self.pending.get_mut(&id) {
                (pending.at, pending.known) = (self.now, known);
            }
        }
        let (Some(live), Some(pending)) = (&mut self.nodes[node].live, self.pending.get_mut(&id))
        else {
            return Ok(());
        };
        let accepts = live.volume.accepts_writes().is_ok();
        let change = match pending.wish {
            Wish::Write {
                lba, sectors, tag, ..
            } => Change {
                sectors: lba..lba + sectors,
                tag,
            },
            Wish::Zero { lba, sectors, .. } => Change {
                sectors: lba..lba + sectors,
                tag: 0,
            },
            Wish::Read { lba, sectors } => {
                let range = index(lba)..index(lba + sectors);
                let view = live.view.get(range).filter(|_| live.usable);
                pending.legal = view.map(|view| view.iter().map(|&tag| vec![tag]).collect());
                return Ok(());
            }
            Wish::Flush => {
                pending.epoch = live.completed;
                return Ok(());
            }
        };
        if !accepts {
            return Ok(());
        }
        pending.epoch = live.volume.open_epoch();
        let term = live.volume.superblock().term.counter;
        live.open.push(change.clone());
        if !self.oracle.wrote(term, node) {
            return broken(
                "terms",
                format!("node {node} writes in term {term} of another node"),
            );
        }
        self.change_view(node, &change);
        Ok(())
    }

    /// What a copy holds changed: also for the reads that are on their way.
    pub(crate) fn change_view(&mut self, node: usize, change: &Change) {
        let Some(live) = &mut self.nodes[node].live else {
            return;
        };
        if live.view.is_empty() {
            return;
        }
        apply(&mut live.view, change);
        for pending in self
            .pending
            .values_mut()
            .filter(|pending| pending.node == node)
        {
            let (Wish::Read { lba, .. }, Some(legal)) = (pending.wish, &mut pending.legal) else {
                continue;
            };
            for (sector, legal) in (lba..).zip(legal) {
                if change.sectors.contains(&sector) {
                    legal.push(change.tag);
                }
            }
        }
    }

    /// A copy's contents were replaced: reads that are on their way may see anything.
    pub(crate) fn forget_reads(&mut self, node: usize) {
        for pending in self
            .pending
            .values_mut()
            .filter(|pending| pending.node == node)
        {
            pending.legal = None;
        }
    }

    /// A request is answered.
    pub(crate) fn completed(
        &mut self,
        node: usize,
        id: RequestId,
        result: Result<(), Failure>,
    ) -> Outcome {
        let Some(pending) = self.pending.remove(&id) else {
            return broken("liveness", format!("{id:?} was answered twice"));
        };
        self.stats.requests += 1;
        self.trace.mix(&[id.0, u64::from(result.is_ok())]);
        if let Some(client) = pending.client {
            let pause = if result.is_ok() {
                self.plan.think_us * 1000
            } else {
                20 * MS
            };
            let after = self.rng.below(pause + 1000);
            self.plan_in(after, What::Client(client));
        }
        let ok = result.is_ok();
        match pending.wish {
            Wish::Read { lba, .. } => return self.read_back(node, lba, &pending, ok),
            _ if !ok => {}
            Wish::Write { fua, .. } | Wish::Zero { fua, .. } => {
                if pending.epoch == Epoch(0) {
                    return broken("P5", format!("{pending:?} was not accepted, but completed"));
                }
                if let Some(live) = &mut self.nodes[node].live {
                    live.completed = live.completed.max(pending.epoch);
                }
                self.received(node, pending.epoch);
                if fua {
                    return self.promised(node, pending.epoch);
                }
            }
            Wish::Flush => return self.promised(node, pending.epoch),
        }
        Ok(())
    }

    fn read_back(&mut self, node: usize, lba: u64, pending: &Pending, ok: bool) -> Outcome {
        let Some(live) = &mut self.nodes[node].live else {
            return Ok(());
        };
        let mut at = lba;
        let mut wrong: Vec<(u64, String)> = Vec::new();
        for (legal, sector) in pending.legal.iter().flatten().zip(lba..) {
            let slot = pending.slots[index(sector / SECTORS_PER_BLOCK - lba / SECTORS_PER_BLOCK)];
            let from = index(sector % SECTORS_PER_BLOCK) * SECTOR;
            let bytes = &live.mem.bytes(slot)[from..from + SECTOR];
            if ok && !legal.iter().any(|&tag| is(tag, sector, bytes)) {
                let found = describe(bytes);
                let what = format!("sector {sector}: {found}, legal were {legal:?}");
                wrong.push((sector / SECTORS_PER_BLOCK, what));
            }
            at += 1;
        }
        self.stats.compared += at - lba;
        for &slot in &pending.slots {
            live.mem.free(slot);
        }
        self.post(node, Event::Timer); // Slots became free.
        self.stats.damage.served += u64::from(!wrong.is_empty());
        let excused = |block: u64| self.is_excused(node, block, pending);
        match wrong.into_iter().find(|(block, _)| !excused(*block)) {
            Some((_, wrong)) => broken("P2", format!("node {node} read {wrong}")),
            None => Ok(()),
        }
    }

    /// The policy of the volume asks for peers, and they are not being done without.
    fn peers_have_it(&self, node: usize) -> bool {
        self.plan.ack_mode != AckMode::Async
            && self.plan.ack_peers > 0
            && self.nodes[node]
                .live
                .as_ref()
                .is_some_and(|live| !live.volume.is_degraded())
    }

    /// As many peers have it as the policy asks for, and nobody has accepted that it may be lost:
    /// the others' histories must hold it, too.
    fn counts_everywhere(&self, node: usize) -> bool {
        let live = self.nodes[node].live.as_ref();
        let term = live.map_or(0, |live| live.volume.superblock().term.counter);
        self.peers_have_it(node) && term >= self.operator.loss_term
    }

    fn place(&self, node: usize, epoch: Epoch) -> Option<Tip> {
        let tip = self.nodes[node].live.as_ref()?.tip;
        self.oracle.ancestor(tip, epoch)
    }

    /// P1 with peers: as many as the policy asks for had it on their medium, at the latest now.
    fn peers_flushed_it(&self, node: usize, place: Tip) -> Outcome {
        let live = self.nodes[node].live.as_ref();
        let primary = live.is_some_and(|live| live.volume.role() == Role::Primary);
        let counts = self.plan.ack_mode == AckMode::Durable && self.peers_have_it(node);
        if !primary || !counts || place.epoch == Epoch(0) {
            return Ok(());
        }
        let holders = self.holders(node, place);
        if holders >= self.plan.ack_peers {
            return Ok(());
        }
        let wanted = self.plan.ack_peers;
        broken(
            "P1",
            format!("node {node}: flushed {place:?}, which {holders} of {wanted} peers have"),
        )
    }

    fn received(&mut self, node: usize, epoch: Epoch) {
        // A peer that crashed after it acknowledged may be missed a little later: that is a second
        // failure, against which memory does not help.
        let there = |place: Tip| {
            let counts = |other: &&Node| self.nodes[node].counts(other.index);
            let live = self
                .nodes
                .iter()
                .filter(counts)
                .filter_map(|other| other.live.as_ref());
            let holders = live.filter(|live| self.oracle.holds(live.tip, place));
            holders.count() >= self.plan.ack_peers
        };
        if self.counts_everywhere(node)
            && let Some(place) = self.place(node, epoch)
            && place.epoch > self.oracle.received.epoch
            && there(place)
        {
            self.oracle.received = place;
        }
    }

    /// P1: what was completed before a flush was received must survive from now on.
    fn promised(&mut self, node: usize, epoch: Epoch) -> Outcome {
        let Some(place) = self.place(node, epoch) else {
            let detail = format!("node {node}: a flush completed before epoch {epoch} was sealed");
            return broken("P1", detail);
        };
        self.peers_flushed_it(node, place)?;
        if place.epoch > self.nodes[node].promise.epoch {
            self.nodes[node].promise = place;
        }
        if self.plan.ack_mode == AckMode::Durable
            && self.counts_everywhere(node)
            && place.epoch > self.oracle.promised.epoch
        {
            self.oracle.promised = place;
        }
        self.received(node, epoch);
        Ok(())
    }

    /// A node is gone: its clients notice.
    pub(crate) fn drop_requests(&mut self, node: usize) {
        let lost = self
            .pending
            .iter()
            .filter(|(_, pending)| pending.node == node);
        let lost: Vec<RequestId> = lost.map(|(&id, _)| id).collect();
        for id in lost {
            if let Some(Pending {
                client: Some(client),
                ..
            }) = self.pending.remove(&id)
            {
                let after = self.rng.below(20 * MS);
                self.plan_in(after, What::Client(client));
            }
        }
    }
}

/// Fills slots the way a front end does.
fn request(wish: Wish, slots: &[SlotId], mem: &mut dyn SlotMemory) -> Request {
    let slots_vec = slots.to_vec();
    match wish {
        Wish::Write {
            lba,
            sectors,
            fua,
            tag,
        } => {
            for sector in lba..lba + sectors {
                let block = index(sector / SECTORS_PER_BLOCK - lba / SECTORS_PER_BLOCK);
                let from = index(sector % SECTORS_PER_BLOCK) * SECTOR;
                fill(
                    tag,
                    sector,
                    &mut mem.bytes_mut(slots[block])[from..from + SECTOR],
                );
            }
            let sectors = u32::try_from(sectors).expect("bounded by the plan");
            Request::Write {
                lba: Lba(lba),
                sectors,
                fua,
                slots: slots_vec,
            }
        }
        Wish::Zero {
            lba,
            sectors,
            fua,
            trim,
        } => Request::Zero {
            lba: Lba(lba),
            sectors,
            fua,
            trim,
            edges: slots_vec,
        },
        Wish::Read { lba, sectors } => {
            let sectors = u32::try_from(sectors).expect("bounded by the plan");
            Request::Read {
                lba: Lba(lba),
                sectors,
                slots: slots_vec,
            }
        }
        Wish::Flush => Request::Flush,
    }
}
