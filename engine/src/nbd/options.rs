//! Reading the data of options and writing the replies to them. No state: what an option does is
//! decided in [`handshake`](super::handshake).

use zerocopy::IntoBytes;
use zerocopy::big_endian::{U16, U32, U64};

use super::export::Export;
use super::proto::{
    InfoBlockSize, InfoExport, MAX_STRING_BYTES, OPTION_REPLY_MAGIC, OptionReplyHeader, info,
    option_reply,
};

/// Data that does not have the form its option prescribes; the text says what is wrong.
pub(super) type Malformed = &'static str;

/// A cursor over the data of an option.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (head, tail) = self
            .0
            .split_at_checked(count)
            .ok_or("option data ends too early")?;
        self.0 = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (head, tail) = self
            .0
            .split_first_chunk()
            .ok_or("option data ends too early")?;
        self.0 = tail;
        Ok(*head)
    }

    fn u16(&mut self) -> Result<u16, Malformed> {
        Ok(U16::from_bytes(self.array()?).get())
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(U32::from_bytes(self.array()?).get())
    }

    fn string(&mut self) -> Result<&'a str, Malformed> {
        let length = self.u32()? as usize;
        text(self.bytes(length)?)
    }

    fn end(&self) -> Result<(), Malformed> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err("option data goes on after its last field")
        }
    }
}

/// A string as the protocol defines it: UTF-8, no NUL, at most 4096 bytes.
pub(super) fn text(bytes: &[u8]) -> Result<&str, Malformed> {
    if bytes.len() > MAX_STRING_BYTES {
        return Err("a string is longer than 4096 bytes");
    }
    let text = std::str::from_utf8(bytes).map_err(|_| "a string is not UTF-8")?;
    if text.contains('\0') {
        Err("a string holds a NUL")
    } else {
        Ok(text)
    }
}

/// Data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct InfoRequest<'a> {
    pub(super) name: &'a str,
    pub(super) wants_name: bool,
    pub(super) wants_description: bool,
}

impl<'a> InfoRequest<'a> {
    pub(super) fn parse(data: &'a [u8]) -> Result<Self, Malformed> {
        let mut fields = Fields(data);
        let mut request = Self {
            name: fields.string()?,
            wants_name: false,
            wants_description: false,
        };
        for _ in 0..fields.u16()? {
            match fields.u16()? {
                info::NAME => request.wants_name = true,
                info::DESCRIPTION => request.wants_description = true,
                // Sent without being asked for, or unknown and to be ignored.
                _ => {}
            }
        }
        fields.end()?;
        Ok(request)
    }
}

/// Data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct ContextQuery<'a> {
    pub(super) name: &'a str,
    /// No query was sent.
    pub(super) empty: bool,
    /// `base:allocation` was asked for by its name.
    pub(super) names_allocation: bool,
    /// The whole namespace `base:` was asked for.
    pub(super) names_base: bool,
}

impl<'a> ContextQuery<'a> {
    pub(super) fn parse(data: &'a [u8]) -> Result<Self, Malformed> {
        let mut fields = Fields(data);
        let name = fields.string()?;
        let count = fields.u32()?;
        let mut query = Self {
            name,
            empty: count == 0,
            names_allocation: false,
            names_base: false,
        };
        // Each round takes at least four bytes of the data or ends the loop, whatever `count` is.
        for _ in 0..count {
            match fields.string()? {
                super::proto::BASE_ALLOCATION => query.names_allocation = true,
                "base:" => query.names_base = true,
                other if !other.contains(':') => return Err("a query lacks its namespace"),
                _ => {}
            }
        }
        fields.end()?;
        Ok(query)
    }
}

/// Writes replies to one option.
pub(super) struct OptionReplies<'a> {
    pub(super) option: u32,
    pub(super) out: &'a mut Vec<u8>,
}

impl OptionReplies<'_> {
    fn reply(&mut self, reply_type: u32, parts: &[&[u8]]) {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        let header = OptionReplyHeader {
            magic: U64::new(OPTION_REPLY_MAGIC),
            option: U32::new(self.option),
            reply_type: U32::new(reply_type),
            length: U32::new(u32::try_from(length).expect("names and texts are short")),
        };
        self.out.extend_from_slice(header.as_bytes());
        parts
            .iter()
            .for_each(|part| self.out.extend_from_slice(part));
    }

    pub(super) fn ack(&mut self) {
        self.reply(option_reply::ACK, &[]);
    }

    /// An error reply with text for people.
    pub(super) fn error(&mut self, reply_type: u32, why: &str) {
        self.reply(reply_type, &[why.as_bytes()]);
    }

    pub(super) fn server(&mut self, export: &Export) {
        let length = U32::new(u32::try_from(export.name.len()).expect("names are short"));
        let (name, description) = (export.name.as_bytes(), export.description.as_bytes());
        self.reply(
            option_reply::SERVER,
            &[length.as_bytes(), name, description],
        );
    }

    pub(super) fn meta_context(&mut self, id: u32, name: &str) {
        self.reply(
            option_reply::META_CONTEXT,
            &[U32::new(id).as_bytes(), name.as_bytes()],
        );
    }

    /// What an export is: always its size, flags and block sizes; texts when asked for.
    pub(super) fn describe(&mut self, export: &Export, flags: u16, wants: InfoRequest<'_>) {
        let size = InfoExport {
            info_type: U16::new(info::EXPORT),
            size: U64::new(export.size_bytes),
            flags: U16::new(flags),
        };
        self.reply(option_reply::INFO, &[size.as_bytes()]);
        let blocks = InfoBlockSize {
            info_type: U16::new(info::BLOCK_SIZE),
            minimum: U32::new(export.min_block_bytes),
            preferred: U32::new(export.preferred_block_bytes),
            maximum: U32::new(export.max_block_bytes),
        };
        self.reply(option_reply::INFO, &[blocks.as_bytes()]);
        let texts = [
            (wants.wants_name, info::NAME, &export.name),
            (
                wants.wants_description && !export.description.is_empty(),
                info::DESCRIPTION,
                &export.description,
            ),
        ];
        for (_, kind, text) in texts.into_iter().filter(|(wanted, ..)| *wanted) {
            self.reply(
                option_reply::INFO,
                &[U16::new(kind).as_bytes(), text.as_bytes()],
            );
        }
    }
}
