//! The world of a run: virtual time, the queue of what is to happen, the nodes and what connects
//! them. Everything that happens is a function of the seed.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::time::Instant;

use bytes::Bytes;
use hn4::log::Role;
use hn4::types::{Epoch, SECTORS_PER_BLOCK};
use hn4_engine::core::event::{Now, RequestId, Time, TreeEvent};
use hn4_engine::core::{Actions, Event};
use hn4_proof::tree::exchange::TreeMessage;
use hn4_transport::session;
use hn4_transport::wire::Stream;

use crate::Options;
use crate::clients::{Client, Pending};
use crate::faults::{Fault, Faults};
use crate::link::{Link, Message};
use crate::meetings::{Meeting, Taken};
use crate::node::Node;
use crate::operator::Operator;
use crate::oracle::{Oracle, fill};
use crate::peers::Membership;
use crate::plan::Plan;
use crate::proofs::Beside;
use crate::rng::Rng;
use crate::stats::Stats;
use crate::trace::Trace;

/// Nanoseconds of a millisecond.
pub(crate) const MS: u64 = 1_000_000;
/// A run that is not over by then is stuck.
const LIMIT_MS: u64 = 4_000_000;
/// A slow disk alone needs many: 600 s of the operator's visits are 200,000.
const LIMIT_EVENTS: u64 = 1_000_000;

/// A promise that was broken.
#[derive(Clone, Debug)]
pub struct Violation {
    /// Which.
    pub promise: &'static str,
    /// How.
    pub detail: String,
}

/// How a run goes on.
pub(crate) type Outcome = Result<(), Violation>;

/// Says that a promise was broken.
///
/// # Errors
/// Always.
pub(crate) fn broken<T>(promise: &'static str, detail: impl Into<String>) -> Result<T, Violation> {
    let detail = detail.into();
    Err(Violation { promise, detail })
}

/// What is to happen.
#[derive(Debug)]
pub(crate) enum What {
    Io {
        node: usize,
        boot: u64,
        id: u64,
    },
    Timer {
        node: usize,
        boot: u64,
    },
    Client(usize),
    Deliver {
        link: usize,
        session: u64,
        side: usize,
        message: Box<Message>,
    },
    /// Bytes of a real session.
    WireBytes {
        link: usize,
        session: u64,
        side: usize,
        stream: Stream,
        bytes: Bytes,
    },
    /// A real session wants to be woken.
    WireTimer {
        link: usize,
        session: u64,
        side: usize,
    },
    SessionEnds {
        link: usize,
        session: u64,
        side: usize,
    },
    Connect {
        link: usize,
    },
    FeedRead {
        link: usize,
        session: u64,
        side: usize,
        offset: u64,
        frames: Vec<(Epoch, u64)>,
    },
    /// A part of a full copy is read, unless it is the same, and sent.
    SeedPart {
        link: usize,
        session: u64,
        side: usize,
        offset: u64,
        bytes: u64,
        same: bool,
    },
    Restart {
        node: usize,
    },
    PowerLoss {
        node: usize,
        boot: u64,
        fault: Fault,
    },
    Prover {
        node: usize,
        boot: u64,
    },
    ProofRead {
        node: usize,
        boot: u64,
        offset: u64,
        frames: Vec<(Epoch, u64)>,
    },
    /// A state tree has something for its core.
    Tree {
        node: usize,
        boot: u64,
        event: TreeEvent,
    },
    /// A state tree is taken, to be compared.
    TreeTaken(Meeting),
    /// It is compared with a peer's.
    TreesMeet(Meeting, Box<Taken>),
    /// A state tree takes what waits for it.
    TreeTurn {
        node: usize,
        boot: u64,
    },
    /// A repair was written to the backing, or flushed.
    TreeWrote {
        node: usize,
        boot: u64,
    },
    /// What a peer's state tree says arrives.
    TreeHears {
        link: usize,
        session: u64,
        side: usize,
        message: TreeMessage,
    },
    Operator,
}

struct Planned {
    at: u64,
    order: u64,
    what: What,
}

impl PartialEq for Planned {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}
impl Eq for Planned {}
impl PartialOrd for Planned {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Planned {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// See the module.
pub(crate) struct World {
    pub(crate) plan: Plan,
    pub(crate) rng: Rng,
    pub(crate) now: u64,
    /// The moment at which the run began, for code that asks for real clocks' times.
    pub(crate) zero: Instant,
    queue: BinaryHeap<Reverse<Planned>>,
    planned: u64,
    /// Events for cores, in order; carried out one after the other.
    pub(crate) inbox: VecDeque<(usize, u64, Event)>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) links: Vec<Link>,
    pub(crate) oracle: Oracle,
    pub(crate) clients: Vec<Client>,
    pub(crate) pending: BTreeMap<RequestId, Pending>,
    pub(crate) next_request: u64,
    pub(crate) operator: Operator,
    /// Who belongs to the volume.
    pub(crate) membership: Membership,
    /// Faults have stopped, and clients are done.
    pub(crate) quiet: bool,
    /// What a step says, used again.
    pub(crate) actions: Actions,
    /// What goes wrong.
    pub(crate) faults: Faults,
    /// What happened.
    pub(crate) stats: Stats,
    /// Record of the run.
    pub(crate) trace: Trace,
}

impl World {
    /// The world of a seed.
    #[must_use]
    pub(crate) fn new(seed: u64, options: &Options) -> Self {
        let mut rng = Rng::new(seed);
        let mut plan = Plan::draw(&mut rng.fork(), &options.knobs);
        // Not drawn, so that the seeds that were kept stay what they were: none of them is such.
        plan.scxq2 = seed % 8 == 2;
        let leans = matches!(seed % 32, 7 | 11 | 18 | 25 | 28);
        if options.knobs.other_peers.unwrap_or(leans) {
            plan.lean_to_other_peers(&mut Rng::new(seed.rotate_left(32)), &options.knobs);
        }
        plan.large_sectors = seed % 4 == 3;
        // Again none of those that were kept.
        if options.knobs.trees.unwrap_or(seed % 32 == 10 && seed > 10) {
            plan.lean_to_trees(&mut Rng::new(seed.rotate_left(16)), &options.knobs);
            plan.draw_damage(&mut Rng::new(seed.rotate_left(24)));
            // And again.
            if seed % 5 == 2 && seed > 1000 {
                plan.lean_to_trucks(&mut Rng::new(seed.rotate_left(40)));
            }
        }
        let sectors = plan.blocks * SECTORS_PER_BLOCK;
        let initial: Vec<u64> = (0..sectors).map(|_| rng.below(3)).collect();
        let mut backing = vec![0; initial.len() * 512];
        for (sector, bytes) in (0..sectors).zip(backing.chunks_exact_mut(512)) {
            fill(initial[crate::oracle::index(sector)], sector, bytes);
        }
        let rubbish = vec![0xEE; backing.len()];
        let mut nodes: Vec<Node> = (0..plan.nodes)
            .map(|index| {
                let contents = if index == 0 { &backing } else { &rubbish };
                Node::new(index, &plan, contents)
            })
            .collect();
        for node in &mut nodes {
            node.skew_ms = rng.below(plan.skew_ms.max(1));
        }
        let pairs = (0..plan.nodes).flat_map(|a| (a + 1..plan.nodes).map(move |b| [a, b]));
        let mut trace = Trace::new(options.words);
        trace.note(0, None, || format!("{plan:?}"));
        Self {
            links: pairs.map(Link::new).collect(),
            clients: (0..plan.clients).map(|_| Client::default()).collect(),
            oracle: Oracle::new(initial),
            operator: Operator::default(),
            membership: Membership::default(),
            plan,
            rng,
            now: 0,
            zero: Instant::now(),
            queue: BinaryHeap::new(),
            planned: 0,
            inbox: VecDeque::new(),
            nodes,
            pending: BTreeMap::new(),
            next_request: 0,
            quiet: false,
            actions: Actions::default(),
            faults: Faults::new(options.keep.as_deref()),
            stats: Stats::default(),
            trace,
        }
    }

    /// Runs to the end.
    ///
    /// # Errors
    /// The first promise that was broken.
    pub(crate) fn run(&mut self) -> Outcome {
        self.found();
        for index in 0..self.plan.members {
            let role = if index == 0 {
                Role::Primary
            } else {
                Role::Replica
            };
            let seeded = role == Role::Replica && self.rng.one_in(self.plan.seeded);
            if seeded {
                self.bring_backing(index);
            }
            let created = self.nodes[index].create(&self.plan.clone(), role, seeded);
            if let Err(error) = created {
                return broken("liveness", format!("node {index}: {error}"));
            }
            self.start_node(index)?;
        }
        for link in 0..self.links.len() {
            self.plan_connect(link);
        }
        for client in 0..self.clients.len() {
            self.plan_in(client as u64 * 1000, What::Client(client));
        }
        self.plan_in(MS, What::Operator);
        while !self.is_over() {
            let Some(Reverse(next)) = self.queue.pop() else {
                return broken("liveness", "nothing is left to happen");
            };
            self.now = next.at;
            self.stats.events += 1;
            if self.now > LIMIT_MS * MS || self.stats.events > LIMIT_EVENTS {
                return broken("liveness", self.describe());
            }
            self.happen(next.what)?;
            self.work_inbox()?;
        }
        self.final_checks()
    }

    /// Both clocks of a node.
    pub(crate) fn clocks(&self, node: usize) -> Now {
        let node = &self.nodes[node];
        Now {
            time: Time(node.clock_start + self.now),
            wall_ms: 1_700_000_000_000 + node.skew_ms + self.now / MS,
        }
    }

    pub(crate) fn plan_in(&mut self, after: u64, what: What) {
        self.plan_at(self.now + after, what);
    }

    pub(crate) fn plan_at(&mut self, at: u64, what: What) {
        self.planned += 1;
        let order = self.planned;
        self.queue.push(Reverse(Planned { at, order, what }));
    }

    /// Hands an event to a node's core, after those that are waiting.
    pub(crate) fn post(&mut self, node: usize, event: Event) {
        let boot = self.nodes[node].boot;
        self.inbox.push_back((node, boot, event));
    }

    pub(crate) fn work_inbox(&mut self) -> Outcome {
        while let Some((node, boot, event)) = self.inbox.pop_front() {
            if self.nodes[node].live.is_some() && self.nodes[node].boot == boot {
                self.step(node, event)?;
            }
        }
        Ok(())
    }

    fn happen(&mut self, what: What) -> Outcome {
        match what {
            What::Io { node, boot, id } => self.io(node, boot, id),
            What::Timer { node, boot } => {
                let same_life = self.nodes[node].boot == boot;
                if let Some(live) = &mut self.nodes[node].live
                    && same_life
                    && live.timer_at == Some(self.now)
                {
                    live.timer_at = None;
                    self.post(node, Event::Timer);
                }
                Ok(())
            }
            What::Client(client) => self.client(client),
            What::Restart { node } => {
                if self.nodes[node].live.is_none() && !self.is_gone(node) {
                    self.start_node(node)?;
                }
                Ok(())
            }
            What::TreeTurn { node, boot } => self.tree_turn(node, boot),
            What::TreesMeet(meeting, taken) => self.trees_meet(meeting, &taken),
            What::PowerLoss { node, boot, fault } => {
                self.power_loss(node, boot, fault);
                Ok(())
            }
            What::Prover { node, boot } => self.prover(node, boot),
            What::ProofRead {
                node,
                boot,
                offset,
                frames,
            } => {
                if self.nodes[node].live.is_some() && self.nodes[node].boot == boot {
                    self.proof_read(node, offset, &frames);
                }
                Ok(())
            }
            What::Tree { node, boot, event } => {
                self.tree_says(node, boot, event);
                Ok(())
            }
            What::Operator => self.operate(),
            between => {
                self.happen_between(between);
                Ok(())
            }
        }
    }

    /// What happens between nodes.
    fn happen_between(&mut self, what: What) {
        match what {
            What::Deliver {
                link,
                session,
                side,
                message,
            } => {
                self.deliver(link, session, side, *message);
            }
            What::WireBytes {
                link,
                session,
                side,
                stream,
                bytes,
            } => {
                if self.reaches(link, session, side) {
                    self.wire_event(link, side, session::Event::Received { stream, bytes });
                }
            }
            What::WireTimer {
                link,
                session,
                side,
            } => {
                self.wire_timeout(link, session, side);
            }
            What::SessionEnds {
                link,
                session,
                side,
            } => {
                self.end_session(link, session, side);
            }
            What::Connect { link } => {
                self.connect(link);
            }
            What::FeedRead {
                link,
                session,
                side,
                offset,
                frames,
            } => {
                self.feed_read(link, session, side, offset, &frames);
            }
            What::SeedPart {
                link,
                session,
                side,
                offset,
                bytes,
                same,
            } => {
                self.seed_part(link, session, side, (offset, bytes, same));
            }
            What::TreeTaken(meeting) => self.tree_taken(meeting),
            What::TreeWrote { node, boot } => self.tree_wrote(node, boot),
            What::TreeHears {
                link,
                session,
                side,
                message,
            } => self.tree_hears(link, session, side, message),
            What::Io { .. }
            | What::Timer { .. }
            | What::Client(_)
            | What::Restart { .. }
            | What::PowerLoss { .. }
            | What::Prover { .. }
            | What::ProofRead { .. }
            | What::Tree { .. }
            | What::TreeTurn { .. }
            | What::TreesMeet(..)
            | What::Operator => {}
        }
    }

    /// Where the run stands, for messages.
    #[must_use]
    pub(crate) fn describe(&self) -> String {
        use std::fmt::Write;
        let mut text = format!(
            "at {} ms, {} events, {} requests pending, operator {:?}",
            self.now / MS,
            self.stats.events,
            self.pending.len(),
            self.operator,
        );
        if self.plan.regroups {
            let _ = write!(text, "\n  {:?}", self.membership);
        }
        for node in &self.nodes {
            let _ = write!(text, "\n  node {} boot {}: ", node.index, node.boot);
            if self.plan.regroups {
                let _ = write!(text, "members {:?} seats {:?} ", node.members, node.seats);
            }
            let Some(live) = &node.live else {
                text.push_str("dead");
                continue;
            };
            let _ = write!(
                text,
                "{:?} log {:?} dirty {} free {} held {} waiting {} flights {} clean {} \
                 failed {:?} obstacle {:?} deadline {:?}",
                live.volume.copy_status(),
                live.volume.log_usage(),
                live.volume.dirty_slots(),
                hn4_engine::arena::SlotMemory::free_slots(&live.mem),
                live.held.len(),
                live.volume.waiting(),
                node.in_flight(),
                live.volume.is_clean(),
                live.volume.failed(),
                live.volume.obstacle(),
                live.volume.next_deadline(),
            );
            let beside = live.beside.as_ref().map(Beside::describe);
            let _ = write!(text, " prover {beside:?}");
        }
        text
    }
}
