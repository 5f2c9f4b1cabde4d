//! The world of a run: virtual time, the queue of what is to happen, the nodes and what connects
//! them. Everything that happens is a function of the seed.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};

use hn4::log::Role;
use hn4::types::SECTORS_PER_BLOCK;
use hn4_engine::core::Event;
use hn4_engine::core::event::{Now, PeerEvent, PeerId, RequestId, Time};

use crate::clients::{Client, Pending};
use crate::link::{Link, Message};
use crate::node::Node;
use crate::operator::Operator;
use crate::oracle::{Oracle, fill};
use crate::plan::Plan;
use crate::proofs::Beside;
use crate::rng::Rng;
use crate::trace::Trace;

/// Nanoseconds of a millisecond.
pub(crate) const MS: u64 = 1_000_000;
/// A run that is not over by then is stuck.
const LIMIT_MS: u64 = 4_000_000;
const LIMIT_EVENTS: u64 = 400_000;

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
        message: Message,
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
        frames: Vec<u64>,
    },
    SeedRead {
        link: usize,
        session: u64,
        side: usize,
        offset: u64,
        bytes: u64,
    },
    Restart {
        node: usize,
    },
    Prover {
        node: usize,
        boot: u64,
    },
    ProofRead {
        node: usize,
        boot: u64,
        offset: u64,
        frames: Vec<(hn4::types::Epoch, u64)>,
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

/// What happened in a run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    /// Events of the queue.
    pub events: u64,
    /// Requests that completed.
    pub requests: u64,
    /// Epochs that were sealed.
    pub epochs: u64,
    /// Nodes that crashed.
    pub crashes: u64,
    /// Recoveries that were cut off.
    pub cut_recoveries: u64,
    /// Sessions that ended.
    pub disconnects: u64,
    /// Nodes that were promoted.
    pub promotions: u64,
    /// Operations of disks that failed.
    pub disk_errors: u64,
    /// Copies that became usable by a full copy.
    pub seeded: u64,
    /// Tails that were dropped.
    pub truncations: u64,
    /// Tails of former primaries that were to be saved.
    pub forks: u64,
    /// Replicas wiped and made anew.
    pub wipes: u64,
    /// Bits of logs that rotted.
    pub rotten: u64,
    /// Recoveries that refused a damaged log.
    pub refused_logs: u64,
    /// Torn or lost writes.
    pub torn: u64,
    /// Sectors that were compared.
    pub compared: u64,
    /// Anchors that were appended to a ledger, or taken from a primary.
    pub proven: u64,
    /// Proofs that did not match.
    pub refused_proofs: u64,
    /// Ledgers, or parts of them, that were set aside.
    pub ledgers_aside: u64,
}

impl Stats {
    /// Sums up.
    pub fn add(&mut self, other: &Self) {
        let Self {
            events,
            requests,
            epochs,
            crashes,
            cut_recoveries,
            disconnects,
            promotions,
            disk_errors,
            seeded,
            truncations,
            forks,
            wipes,
            rotten,
            refused_logs,
            torn,
            compared,
            proven,
            refused_proofs,
            ledgers_aside,
        } = other;
        self.events += events;
        self.requests += requests;
        self.epochs += epochs;
        self.crashes += crashes;
        self.cut_recoveries += cut_recoveries;
        self.disconnects += disconnects;
        self.promotions += promotions;
        self.disk_errors += disk_errors;
        self.seeded += seeded;
        self.truncations += truncations;
        self.forks += forks;
        self.wipes += wipes;
        self.rotten += rotten;
        self.refused_logs += refused_logs;
        self.torn += torn;
        self.compared += compared;
        self.proven += proven;
        self.refused_proofs += refused_proofs;
        self.ledgers_aside += ledgers_aside;
    }
}

/// See the module.
pub(crate) struct World {
    pub(crate) plan: Plan,
    pub(crate) rng: Rng,
    pub(crate) now: u64,
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
    /// Faults have stopped, and clients are done.
    pub(crate) quiet: bool,
    /// What happened.
    pub(crate) stats: Stats,
    /// Record of the run.
    pub(crate) trace: Trace,
}

impl World {
    /// The world of a seed.
    #[must_use]
    pub(crate) fn new(seed: u64, trace: bool) -> Self {
        let mut rng = Rng::new(seed);
        let plan = Plan::draw(&mut rng.fork());
        let sectors = plan.blocks * SECTORS_PER_BLOCK;
        let initial: Vec<u64> = (0..sectors).map(|_| rng.below(3)).collect();
        let mut backing = vec![0; initial.len() * 512];
        for (sector, bytes) in (0..sectors).zip(backing.chunks_exact_mut(512)) {
            fill(initial[crate::oracle::index(sector)], sector, bytes);
        }
        let rubbish = vec![0xEE; backing.len()];
        let nodes = (0..plan.nodes)
            .map(|index| {
                let contents = if index == 0 { &backing } else { &rubbish };
                Node::new(index, &plan, contents)
            })
            .collect();
        let pairs = (0..plan.nodes).flat_map(|a| (a + 1..plan.nodes).map(move |b| [a, b]));
        let mut trace = Trace::new(trace);
        trace.note(0, None, || format!("{plan:?}"));
        Self {
            links: pairs.map(Link::new).collect(),
            clients: (0..plan.clients).map(|_| Client::default()).collect(),
            oracle: Oracle::new(initial),
            operator: Operator::default(),
            plan,
            rng,
            now: 0,
            queue: BinaryHeap::new(),
            planned: 0,
            inbox: VecDeque::new(),
            nodes,
            pending: BTreeMap::new(),
            next_request: 0,
            quiet: false,
            stats: Stats::default(),
            trace,
        }
    }

    /// Runs to the end.
    ///
    /// # Errors
    /// The first promise that was broken.
    pub(crate) fn run(&mut self) -> Outcome {
        for index in 0..self.nodes.len() {
            let role = if index == 0 {
                Role::Primary
            } else {
                Role::Replica
            };
            let created = self.nodes[index].create(&self.plan.clone(), role);
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
    pub(crate) fn clocks(&self) -> Now {
        Now {
            time: Time(self.now),
            wall_ms: 1_700_000_000_000 + self.now / MS,
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
            What::Deliver {
                link,
                session,
                side,
                message,
            } => {
                self.deliver(link, session, side, message);
                Ok(())
            }
            What::SessionEnds {
                link,
                session,
                side,
            } => {
                self.end_session(link, session, side);
                Ok(())
            }
            What::Connect { link } => {
                self.connect(link);
                Ok(())
            }
            What::FeedRead {
                link,
                session,
                side,
                offset,
                frames,
            } => {
                self.feed_read(link, session, side, offset, &frames);
                Ok(())
            }
            What::SeedRead {
                link,
                session,
                side,
                offset,
                bytes,
            } => {
                self.seed_read(link, session, side, offset, bytes);
                Ok(())
            }
            What::Restart { node } => {
                if self.nodes[node].live.is_none() {
                    self.start_node(node)?;
                }
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
            What::Operator => self.operate(),
        }
    }

    fn io(&mut self, node: usize, boot: u64, id: u64) -> Outcome {
        if self.nodes[node].boot != boot || self.nodes[node].live.is_none() {
            return Ok(());
        }
        let fails = !self.quiet && self.rng.one_in(self.plan.disk_error);
        self.stats.disk_errors += u64::from(fails);
        match self.nodes[node].land(id, fails, &mut self.rng) {
            None => {}
            Some(crate::node::Landed::Again) => {
                let after = self.disk_time(node);
                self.plan_in(after, What::Io { node, boot, id });
            }
            Some(crate::node::Landed::Done(token, result)) => {
                self.post(node, Event::IoDone { token, result });
            }
        }
        Ok(())
    }

    /// How long a disk takes.
    pub(crate) fn disk_time(&mut self, node: usize) -> u64 {
        let usual = self.plan.disk_us * 1000 * self.plan.disk_factors[node];
        let time = usual / 4 + self.rng.below(usual * 2);
        if !self.quiet && self.rng.one_in(self.plan.disk_spike) {
            time + self.rng.below(50 * MS)
        } else {
            time
        }
    }

    pub(crate) fn net_time(&mut self) -> u64 {
        let usual = self.plan.net_us * 1000;
        usual / 2 + self.rng.below(usual * 2)
    }

    /// The link between two nodes, and the side of the first.
    pub(crate) fn link_of(&self, node: usize, peer: PeerId) -> (usize, usize) {
        let other = usize::from(peer.0) + usize::from(usize::from(peer.0) >= node);
        let link = self
            .links
            .iter()
            .position(|link| link.side_of(node).is_some() && link.side_of(other).is_some());
        let link = link.expect("all nodes are linked");
        (link, usize::from(self.links[link].nodes[1] == node))
    }

    /// What a node calls the other side of a link.
    pub(crate) fn peer_id(&self, link: usize, side: usize) -> PeerId {
        let [own, other] = [side, 1 - side].map(|side| self.links[link].nodes[side]);
        PeerId(u8::try_from(other - usize::from(other > own)).expect("few nodes"))
    }

    pub(crate) fn post_peer(&mut self, link: usize, side: usize, event: PeerEvent) {
        let (node, peer) = (self.links[link].nodes[side], self.peer_id(link, side));
        self.post(node, Event::Peer { peer, event });
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
        for node in &self.nodes {
            let _ = write!(text, "\n  node {} boot {}: ", node.index, node.boot);
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
