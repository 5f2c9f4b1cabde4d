//! Which 64 KiB groups of two trees differ.
//!
//! One side holds a [`Compare`] and asks; the other answers from its tree with [`answer`]. A
//! request names nodes of one level that are known to differ and gets the nodes a few levels below
//! each. Every answer is checked: the nodes must hash to the node that was asked about, and so, in
//! the end, to the root that the other side has said. A peer can withhold, but not invent, and its
//! tree cannot change on the way.
//!
//! Requests go depth first, so what waits is bounded by the height of the tree and not by the
//! number of differences. Nothing has to be remembered to resume: groups that were repaired no
//! longer differ.

use std::collections::BTreeSet;
use std::ops::Range;

use hn4::types::BLOCK_BYTES;

use super::view::Nodes;
use super::{GROUP_LEVEL, Geometry, TreeError, parent, zero_node};
use crate::codec::{DecodeError, Reader, Writer};
use crate::hash::Digest;

/// Most nodes in a request, so that the answer fits into a message of 60 KiB.
pub const MAX_REQUEST: usize = 112;
/// Levels that an answer goes down.
const STEP: u8 = 4;
/// Requests that may be under way at once.
pub const MAX_IN_FLIGHT: usize = 8;
const VERSION: u8 = 1;
/// Most units of a [`Differing`].
const MAX_UNITS: usize = 1 << 17;

/// Asks for the nodes below some nodes of one level.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeRequest {
    /// Chosen by the asker, repeated in the answer.
    pub id: u32,
    /// Level of the nodes.
    pub level: u8,
    /// How many levels below them the answer lies, at most 4.
    pub down: u8,
    /// The nodes, at most [`MAX_REQUEST`].
    pub indexes: Vec<u64>,
}

impl NodeRequest {
    /// The encoding: version, id, level, down, count, indexes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        writer
            .u8(VERSION)
            .u32(self.id)
            .u8(self.level)
            .u8(self.down)
            .count(self.indexes.len());
        self.indexes.iter().for_each(|index| _ = writer.u64(*index));
        writer.finish()
    }

    /// Reads an encoding.
    ///
    /// # Errors
    /// [`DecodeError`] if it is not one.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new("node request", bytes);
        reader.version(VERSION)?;
        let (id, level, down) = (reader.u32()?, reader.u8()?, reader.u8()?);
        if down > STEP || down > level {
            return Err(reader.invalid("depth"));
        }
        let count = reader.count(MAX_REQUEST, "number of nodes")?;
        let indexes = (0..count).map(|_| reader.u64()).collect::<Result<_, _>>()?;
        reader.finish()?;
        Ok(Self {
            id,
            level,
            down,
            indexes,
        })
    }
}

/// The nodes that were asked for, in the order of the request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeReply {
    /// Of the request.
    pub id: u32,
    /// Level of the nodes in this reply.
    pub level: u8,
    /// `2^down` for each node of the request.
    pub nodes: Vec<Digest>,
}

impl NodeReply {
    /// The encoding: version, id, level, count, a bit for each node that is not zero, those nodes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        writer
            .u8(VERSION)
            .u32(self.id)
            .u8(self.level)
            .count(self.nodes.len());
        let zero = zero_node(self.level);
        for eight in self.nodes.chunks(8) {
            let bits = eight
                .iter()
                .rev()
                .fold(0, |bits, node| bits << 1 | u8::from(*node != zero));
            writer.u8(bits);
        }
        let present = self.nodes.iter().filter(|node| **node != zero);
        present.for_each(|node| _ = writer.digest(node));
        writer.finish()
    }

    /// Reads an encoding.
    ///
    /// # Errors
    /// [`DecodeError`] if it is not one.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new("node reply", bytes);
        reader.version(VERSION)?;
        let (id, level) = (reader.u32()?, reader.u8()?);
        let count = reader.count(MAX_REQUEST << STEP, "number of nodes")?;
        let bits = reader.take(count.div_ceil(8))?.to_vec();
        let zero = zero_node(level);
        let mut nodes = Vec::with_capacity(count);
        for at in 0..bits.len() * 8 {
            let is_present = bits[at / 8] >> (at % 8) & 1 == 1;
            match (at < count, is_present) {
                (true, true) => nodes.push(reader.digest()?),
                (true, false) => nodes.push(zero),
                (false, true) => return Err(reader.invalid("padding")),
                (false, false) => {}
            }
            // A node that is zero is never spelled out.
            if is_present && nodes.last() == Some(&zero) {
                return Err(reader.invalid("node"));
            }
        }
        reader.finish()?;
        Ok(Self { id, level, nodes })
    }
}

/// Answers a request.
///
/// # Errors
/// [`TreeError`] if the request reaches outside the tree, or from the tree.
pub fn answer(tree: &impl Nodes, request: &NodeRequest) -> Result<NodeReply, TreeError> {
    let NodeRequest {
        id,
        level,
        down,
        ref indexes,
    } = *request;
    if down > level || down > STEP || indexes.len() > MAX_REQUEST {
        let height = tree.geometry().height();
        return Err(TreeError::OutOfRange {
            level,
            index: 0,
            height,
        });
    }
    let mut nodes = Vec::with_capacity(indexes.len() << down);
    for &index in indexes {
        nodes.extend(tree.below(level, index, down)?);
    }
    Ok(NodeReply {
        id,
        level: level - down,
        nodes,
    })
}

/// A group of up to 16 blocks that differs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Group {
    /// First block divided by 16.
    pub index: u64,
    /// Node over the group as the other side has it: what arrives is checked against this.
    pub expected: Digest,
}

/// Which parts of a volume differ, in bounded memory: of very many groups only larger units are
/// remembered in which some differ.
#[derive(Clone, Debug, Default)]
pub struct Differing {
    /// A unit is so many times two groups.
    shift: u32,
    units: BTreeSet<u64>,
}

impl Differing {
    /// The group with this number differs.
    pub fn add(&mut self, group: u64) {
        self.units.insert(group >> self.shift);
        while self.units.len() > MAX_UNITS {
            self.shift += 1;
            let wider = std::mem::take(&mut self.units);
            self.units = wider.into_iter().map(|unit| unit >> 1).collect();
        }
    }

    /// Byte ranges of a volume of this size, ascending, that do not touch.
    #[must_use]
    pub fn ranges(&self, size_bytes: u64) -> Vec<Range<u64>> {
        let unit_bytes = (BLOCK_BYTES << GROUP_LEVEL) << self.shift;
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for unit in &self.units {
            let start = unit.saturating_mul(unit_bytes);
            let end = start.saturating_add(unit_bytes).min(size_bytes);
            match ranges.last_mut() {
                // Nothing lies past the end, whatever the other side says.
                _ if start >= size_bytes => break,
                Some(last) if last.end == start => last.end = end,
                _ => ranges.push(start..end),
            }
        }
        ranges
    }
}

/// Why a comparison cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// No such request is under way.
    #[error("an answer to node request {0}, which is not under way; ignore it")]
    Unasked(u32),
    /// The answer has another shape than was asked for.
    #[error("the answer to node request {0} does not fit it; ask another peer")]
    Shape(u32),
    /// The nodes do not hash to the node that was asked about.
    #[error("node {index} of level {level} does not hash to the trusted root; ask another peer")]
    Forged {
        /// Level of the node.
        level: u8,
        /// Its index.
        index: u64,
    },
    /// The own tree failed.
    #[error(transparent)]
    Tree(#[from] TreeError),
}

#[derive(Clone, Copy, Debug)]
struct Pending {
    level: u8,
    index: u64,
    // The other side's node; for the top, its root.
    remote: Digest,
}

/// The asking side.
#[derive(Debug)]
pub struct Compare {
    geometry: Geometry,
    // Nodes known to differ; the last is asked about first.
    stack: Vec<Pending>,
    in_flight: Vec<(NodeRequest, Vec<Pending>)>,
    groups: Vec<Group>,
    next_id: u32,
    asked_nodes: u64,
}

impl Compare {
    /// Compares a tree whose root is `local` with one whose trusted root is `remote`.
    #[must_use]
    pub fn new(geometry: Geometry, local: Digest, remote: Digest) -> Self {
        let top = Pending {
            level: geometry.height(),
            index: 0,
            remote,
        };
        let stack = if local == remote {
            Vec::new()
        } else {
            vec![top]
        };
        let (in_flight, groups) = (Vec::new(), Vec::new());
        Self {
            geometry,
            stack,
            in_flight,
            groups,
            next_id: 1,
            asked_nodes: 0,
        }
    }

    /// The next request to send; `None` while enough are under way, or there is nothing to ask.
    pub fn poll_request(&mut self) -> Option<NodeRequest> {
        if self.in_flight.len() >= MAX_IN_FLIGHT {
            return None;
        }
        let level = self.stack.last()?.level;
        let same = self
            .stack
            .iter()
            .rev()
            .take(MAX_REQUEST)
            .take_while(|next| next.level == level);
        let at = self.stack.len() - same.count();
        let mut asked = self.stack.split_off(at);
        asked.reverse();
        let floor = GROUP_LEVEL.min(self.geometry.height());
        let (id, down) = (self.next_id, STEP.min(level - floor));
        self.next_id = self.next_id.wrapping_add(1);
        let indexes = asked.iter().map(|node| node.index).collect();
        let request = NodeRequest {
            id,
            level,
            down,
            indexes,
        };
        self.in_flight.push((request.clone(), asked));
        Some(request)
    }

    /// Takes an answer, checks it and compares it with the own tree.
    ///
    /// # Errors
    /// [`CompareError`]. After [`CompareError::Shape`] and [`CompareError::Forged`] the nodes are
    /// asked about again, of whomever the next request goes to.
    pub fn on_reply(&mut self, reply: &NodeReply, local: &impl Nodes) -> Result<(), CompareError> {
        let at = self
            .in_flight
            .iter()
            .position(|(request, _)| request.id == reply.id);
        let (request, asked) = self
            .in_flight
            .swap_remove(at.ok_or(CompareError::Unasked(reply.id))?);
        let found = self.check(&request, &asked, reply, local);
        match found {
            Ok(found) => self.file(request.level - request.down, found),
            Err(error) => {
                self.stack.extend(asked.into_iter().rev());
                return Err(error);
            }
        }
        Ok(())
    }

    fn check(
        &self,
        request: &NodeRequest,
        asked: &[Pending],
        reply: &NodeReply,
        local: &impl Nodes,
    ) -> Result<Vec<Pending>, CompareError> {
        let NodeRequest {
            id, level, down, ..
        } = *request;
        let width = 1_usize << down;
        if reply.level != level - down || reply.nodes.len() != asked.len() * width {
            return Err(CompareError::Shape(id));
        }
        let mut differing = Vec::new();
        for (node, theirs) in asked.iter().zip(reply.nodes.chunks(width)) {
            self.check_node(node, reply.level, theirs)?;
            let ours = local.below(level, node.index, down)?;
            for ((theirs, ours), child) in theirs.iter().zip(&ours).zip(0_u64..) {
                if theirs != ours {
                    let index = (node.index << down) + child;
                    differing.push(Pending {
                        level: reply.level,
                        index,
                        remote: *theirs,
                    });
                }
            }
        }
        Ok(differing)
    }

    fn check_node(&self, node: &Pending, from: u8, below: &[Digest]) -> Result<(), CompareError> {
        let mut nodes = below.to_vec();
        for level in from..node.level {
            nodes = nodes
                .chunks_exact(2)
                .map(|pair| parent(level, &pair[0], &pair[1]))
                .collect();
        }
        let computed = match nodes.first() {
            Some(top) if node.level == self.geometry.height() => Some(self.geometry.root(top)),
            other => other.copied(),
        };
        let (level, index) = (node.level, node.index);
        if computed == Some(node.remote) {
            Ok(())
        } else {
            Err(CompareError::Forged { level, index })
        }
    }

    fn file(&mut self, level: u8, found: Vec<Pending>) {
        self.asked_nodes += found.len() as u64;
        if level <= GROUP_LEVEL {
            let group = |node: Pending| Group {
                index: node.index,
                expected: node.remote,
            };
            self.groups.extend(found.into_iter().map(group));
        } else {
            self.stack.extend(found.into_iter().rev());
        }
    }

    /// Takes the groups that were found to differ since the last call.
    pub fn take_groups(&mut self) -> Vec<Group> {
        std::mem::take(&mut self.groups)
    }

    /// All requests under way are void, as after a reconnect; their nodes are asked about again.
    pub fn disconnected(&mut self) {
        for (_, asked) in std::mem::take(&mut self.in_flight) {
            self.stack.extend(asked.into_iter().rev());
        }
    }

    /// Whether nothing is left to ask.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.stack.is_empty() && self.in_flight.is_empty()
    }
}

#[cfg(test)]
mod tests;
