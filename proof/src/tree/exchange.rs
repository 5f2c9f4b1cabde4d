//! What state trees say to each other: so that damaged blocks are repaired from good copies, and so
//! that two trees are compared before a full copy.
//!
//! A copy asks for the contents that hash to a leaf of its own tree. So an answer needs no trust,
//! no term and no epoch: what hashes to the leaf is what was written there, whoever says it.
//!
//! A primary that is to send a full copy asks for the root of the copy that wants it, and then for
//! nodes below it ([`compare`](super::compare)).

use super::TreeError;
use super::compare::{NodeReply, NodeRequest};
use crate::blocks::{BLOCK, Block};
use crate::codec::{DecodeError, Reader, Writer};
use crate::hash::Digest;

/// Most blocks in a message, so that none exceeds 60 KiB.
pub const MAX_BLOCKS: usize = 12;
/// Most damaged blocks in a [`Standing`].
pub const MAX_DAMAGED: usize = 4096;
/// Most bytes of an embedded message.
const MAX_BYTES: usize = 60 << 10;
const VERSION: u8 = 1;
const ASK: u8 = 1;
const GIVE: u8 = 2;
const COMPARE: u8 = 3;
const ROOT: u8 = 4;
const NODES: u8 = 5;
const GIVEN: u8 = 6;

/// A copy that can be compared with another one.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Standing {
    /// Root of its tree, which describes all of its backing.
    pub root: Digest,
    /// Blocks that are known not to be what the tree says. No others are.
    pub damaged: Vec<u64>,
}

/// A message between two trees.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TreeMessage {
    /// Asks for the contents of blocks that have these leaves.
    Ask(Vec<(u64, Digest)>),
    /// Contents of blocks. What was asked for and is not here is not to be had from this copy now.
    Give(Vec<(u64, Box<Block>)>),
    /// Asks a copy how it stands, so that it can be compared. All that follows has this id.
    Compare {
        /// Chosen by the asker.
        id: u64,
    },
    /// Answer to the two questions below and above: `None` if this copy cannot be compared now, or
    /// not any more.
    Root {
        /// Of the question.
        id: u64,
        /// How it stands.
        standing: Option<Standing>,
    },
    /// Asks for nodes below the root.
    Nodes {
        /// Of the comparison.
        id: u64,
        /// Which.
        request: NodeRequest,
    },
    /// Nodes.
    Given {
        /// Of the comparison.
        id: u64,
        /// The nodes.
        reply: NodeReply,
    },
}

impl TreeMessage {
    /// The encoding: version, kind; then a count, and for each block its number and its leaf or
    /// contents; or an id, and what belongs to the kind.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        writer.u8(VERSION);
        match self {
            Self::Ask(blocks) => {
                writer.u8(ASK).count(blocks.len());
                for (block, leaf) in blocks {
                    writer.u64(*block).digest(leaf);
                }
            }
            Self::Give(blocks) => {
                writer.u8(GIVE).count(blocks.len());
                for (block, contents) in blocks {
                    writer.u64(*block).bytes(&contents[..]);
                }
            }
            Self::Compare { id } => _ = writer.u8(COMPARE).u64(*id),
            Self::Root { id, standing } => {
                writer.u8(ROOT).u64(*id).u8(standing.is_some().into());
                if let Some(Standing { root, damaged }) = standing {
                    writer.digest(root).count(damaged.len());
                    damaged.iter().for_each(|block| _ = writer.u64(*block));
                }
            }
            Self::Nodes { id, request } => {
                let request = request.encode();
                writer.u8(NODES).u64(*id).count(request.len());
                writer.bytes(&request);
            }
            Self::Given { id, reply } => {
                let reply = reply.encode();
                writer.u8(GIVEN).u64(*id).count(reply.len());
                writer.bytes(&reply);
            }
        }
        writer.finish()
    }

    /// Reads an encoding.
    ///
    /// # Errors
    /// [`DecodeError`] if it is not one.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new("tree message", bytes);
        reader.version(VERSION)?;
        let message = match reader.u8()? {
            kind @ COMPARE..=GIVEN => Self::decode_comparison(kind, &mut reader)?,
            kind => Self::decode_repair(kind, &mut reader)?,
        };
        reader.finish()?;
        Ok(message)
    }

    fn decode_comparison(kind: u8, reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let id = reader.u64()?;
        if kind == COMPARE {
            return Ok(Self::Compare { id });
        }
        if kind == ROOT {
            let standing = match reader.u8()? {
                0 => None,
                1 => {
                    let root = reader.digest()?;
                    let count = reader.count(MAX_DAMAGED, "damaged blocks")?;
                    let damaged = (0..count).map(|_| reader.u64());
                    let damaged = damaged.collect::<Result<_, _>>()?;
                    Some(Standing { root, damaged })
                }
                _ => return Err(reader.invalid("standing")),
            };
            return Ok(Self::Root { id, standing });
        }
        let count = reader.count(MAX_BYTES, "bytes")?;
        let bytes = reader.take(count)?;
        Ok(match kind {
            NODES => Self::Nodes {
                id,
                request: NodeRequest::decode(bytes)?,
            },
            _ => Self::Given {
                id,
                reply: NodeReply::decode(bytes)?,
            },
        })
    }

    fn decode_repair(kind: u8, reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let count = reader.count(MAX_BLOCKS, "blocks")?;
        Ok(match kind {
            ASK => {
                let read = (0..count).map(|_| Ok((reader.u64()?, reader.digest()?)));
                Self::Ask(read.collect::<Result<_, DecodeError>>()?)
            }
            GIVE => {
                let read =
                    (0..count).map(|_| Ok((reader.u64()?, Box::new(reader.array::<BLOCK>()?))));
                Self::Give(read.collect::<Result<_, DecodeError>>()?)
            }
            _ => return Err(reader.invalid("kind")),
        })
    }
}

/// Answers [`TreeMessage::Ask`]: `read` gives the contents of a block.
pub fn answer(
    asked: &[(u64, Digest)],
    mut read: impl FnMut(u64) -> Result<Box<Block>, TreeError>,
) -> TreeMessage {
    let found = asked.iter().filter_map(|(block, leaf)| {
        let contents = read(*block).ok()?;
        (crate::blocks::leaf(&contents) == *leaf).then_some((*block, contents))
    });
    TreeMessage::Give(found.collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::blocks;

    fn contents(number: u8) -> Box<Block> {
        Box::new([number; BLOCK])
    }

    #[test]
    fn only_what_was_asked_for_is_given() {
        let leaf = |number: u8| blocks::leaf(&contents(number));
        let asked = [(1, leaf(1)), (2, leaf(9)), (3, leaf(3))];
        let given = answer(&asked, |block| match block {
            3 => Err(TreeError::Size(0)),
            _ => Ok(contents(u8::try_from(block).unwrap())),
        });
        assert_eq!(given, TreeMessage::Give(vec![(1, contents(1))]));
    }

    #[test]
    fn the_largest_message_fits_into_one_of_a_session() {
        let give = TreeMessage::Give((0..12).map(|block| (block, contents(1))).collect());
        assert!(give.encode().len() <= 60 << 10);
        let more = TreeMessage::Give((0..13).map(|block| (block, contents(1))).collect());
        assert!(TreeMessage::decode(&more.encode()).is_err());
    }

    proptest! {
        #[test]
        fn messages_read_back_and_no_bytes_panic(
            asks in prop::collection::vec((any::<u64>(), any::<[u8; 32]>()), 0..12),
            gives in prop::collection::vec((any::<u64>(), any::<u8>()), 0..12),
            cut in 0_usize..60_000, bytes in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let asks = asks.into_iter().map(|(block, leaf)| (block, Digest(leaf)));
            let gives = gives.into_iter().map(|(block, number)| (block, contents(number)));
            let asks: Vec<_> = asks.collect();
            let id = 9;
            let request = NodeRequest { id: 4, level: 9, down: 2, indexes: vec![7, 8] };
            let nodes = vec![Digest([5; 32]); 8];
            let standing = asks.first().map(|(block, root)| Standing {
                root: *root,
                damaged: vec![*block, 3],
            });
            let messages = [
                TreeMessage::Ask(asks),
                TreeMessage::Give(gives.collect()),
                TreeMessage::Compare { id },
                TreeMessage::Root { id, standing },
                TreeMessage::Nodes { id, request },
                TreeMessage::Given { id, reply: NodeReply { id: 4, level: 7, nodes } },
            ];
            for message in messages {
                let whole = message.encode();
                let read = TreeMessage::decode(&whole);
                prop_assert_eq!(read.as_ref(), Ok(&message));
                let cut = cut.min(whole.len() - 1);
                prop_assert!(TreeMessage::decode(&whole[..cut]).is_err());
            }
            let _ = TreeMessage::decode(&bytes);
        }
    }
}
