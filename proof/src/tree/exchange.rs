//! What state trees say to each other so that damaged blocks are repaired from good copies.
//!
//! A copy asks for the contents that hash to a leaf of its own tree. So an answer needs no trust,
//! no term and no epoch: what hashes to the leaf is what was written there, whoever says it.

use super::TreeError;
use crate::blocks::{BLOCK, Block};
use crate::codec::{DecodeError, Reader, Writer};
use crate::hash::Digest;

/// Most blocks in a message, so that none exceeds 60 KiB.
pub const MAX_BLOCKS: usize = 12;
const VERSION: u8 = 1;
const ASK: u8 = 1;
const GIVE: u8 = 2;

/// A message between two trees.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum TreeMessage {
    /// Asks for the contents of blocks that have these leaves.
    Ask(Vec<(u64, Digest)>),
    /// Contents of blocks. What was asked for and is not here is not to be had from this copy now.
    Give(Vec<(u64, Box<Block>)>),
}

impl TreeMessage {
    /// The encoding: version, kind, count, then for each block its number and its leaf or contents.
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
        let kind = reader.u8()?;
        let count = reader.count(MAX_BLOCKS, "blocks")?;
        let message = match kind {
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
        };
        reader.finish()?;
        Ok(message)
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
            let messages = [TreeMessage::Ask(asks.collect()), TreeMessage::Give(gives.collect())];
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
