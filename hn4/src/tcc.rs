//! Decoding of TCC, HN4's block compression.
//!
//! Output is bounded by the caller; every violation is an error. There is no encoder: streams are
//! never unique, and nothing here has to write compressed blocks.
//= HN4_SPEC 7

/// The dictionary of the reference.
pub const LEXICON: [&str; 64] = [
    "{\"id\":",
    "http://",
    "https://",
    "error",
    "false",
    "true",
    "null",
    "value",
    "timestamp",
    " <div class=\"",
    "background",
    "function",
    "return",
    "success",
    "jsonrpc",
    "application",
    "\":\"",
    "\",\"",
    "{\"name\":",
    "{\"type\":",
    "content-type",
    "authorization",
    "bearer ",
    "user-agent",
    "response",
    "status",
    "message",
    "token",
    "created_at",
    "updated_at",
    "const ",
    "struct ",
    "localhost",
    "127.0.0.1",
    "192.168.",
    "[INFO] ",
    "[WARN] ",
    "[ERROR] ",
    "[DEBUG] ",
    "exception",
    "stacktrace",
    "undefined",
    "timeout",
    "connection",
    "database",
    "server",
    "client",
    "password",
    "00000000",
    "ffffff",
    "0000000000000000",
    "FFFFFFFFFFFFFFFF",
    "\\u00",
    "0x",
    "class ",
    "import ",
    "public ",
    "private ",
    "void ",
    "string",
    "uint64_t",
    "uint32_t",
    "<tbody>",
    "</span>",
];

/// The longest length that a token can carry.
pub const MAX_TOKEN_LENGTH: usize = 8223;
const LONG_LENGTH: usize = 63;
const RUN_BONUS: usize = 4;

/// What is wrong with a stream, and at which byte of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TccError {
    /// It ends inside a token.
    #[error("a stream that ends inside a token at byte {0}")]
    Truncated(usize),
    /// It would write more than the block holds.
    #[error("more output than fits, at byte {0}")]
    TooLong(usize),
    /// A length above 8223, or one that the operation cannot have.
    #[error("an impossible length at byte {0}")]
    BadLength(usize),
    /// A gradient that does not move or leaves the byte.
    #[error("an impossible gradient at byte {0}")]
    BadGradient(usize),
    /// Spare mask bits that are set.
    #[error("spare mask bits set at byte {0}")]
    BadMask(usize),
    /// An escape that nobody defined.
    #[error("an unknown escape at byte {0}")]
    BadEscape(usize),
    /// A stride that reaches before the output or over the end.
    #[error("an impossible stride at byte {0}")]
    BadStride(usize),
}

struct Decoder<'a> {
    input: &'a [u8],
    at: usize,
    output: Vec<u8>,
    limit: usize,
}

/// Decodes a stream into at most `limit` bytes.
///
/// # Errors
/// Names the byte of the stream that violates the format.
pub fn decode(input: &[u8], limit: usize) -> Result<Vec<u8>, TccError> {
    let mut decoder = Decoder {
        input,
        at: 0,
        output: Vec::new(),
        limit,
    };
    while decoder.at < input.len() {
        decoder.token()?;
    }
    Ok(decoder.output)
}

impl Decoder<'_> {
    fn byte(&mut self) -> Result<u8, TccError> {
        let byte = *self
            .input
            .get(self.at)
            .ok_or(TccError::Truncated(self.at))?;
        self.at += 1;
        Ok(byte)
    }

    fn bytes(&mut self, count: usize) -> Result<&[u8], TccError> {
        let start = self.at;
        let end = start.checked_add(count).ok_or(TccError::Truncated(start))?;
        let bytes = self
            .input
            .get(start..end)
            .ok_or(TccError::Truncated(start))?;
        self.at = end;
        Ok(bytes)
    }

    fn room(&self, count: usize) -> Result<(), TccError> {
        let fits = self
            .output
            .len()
            .checked_add(count)
            .is_some_and(|end| end <= self.limit);
        if fits {
            Ok(())
        } else {
            Err(TccError::TooLong(self.at))
        }
    }

    /// A length whose first part is `start`: 63 goes on, each byte is added, 255 goes on.
    fn length(&mut self, start: usize) -> Result<usize, TccError> {
        let mut length = start;
        if start == LONG_LENGTH {
            loop {
                let more = self.byte()?;
                length += usize::from(more);
                if length > MAX_TOKEN_LENGTH {
                    return Err(TccError::BadLength(self.at));
                }
                if more != u8::MAX {
                    break;
                }
            }
        }
        Ok(length)
    }

    fn token(&mut self) -> Result<(), TccError> {
        let token = self.byte()?;
        let start = usize::from(token & 0x3F);
        match token & 0xC0 {
            0x00 if start == 0 => self.escape(),
            0x00 => {
                let length = self.length(start)?;
                self.room(length)?;
                let literal = self.bytes(length)?.to_vec();
                self.output.extend_from_slice(&literal);
                Ok(())
            }
            0x40 => {
                let length = self.length(start)? + RUN_BONUS;
                let value = self.byte()?;
                self.room(length)?;
                self.output.resize(self.output.len() + length, value);
                Ok(())
            }
            0x80 => self.gradient(start),
            _ => self.bitmask(start),
        }
    }

    fn gradient(&mut self, start: usize) -> Result<(), TccError> {
        let length = self.length(start)? + RUN_BONUS;
        let mut value = i32::from(self.byte()?);
        let slope = i8::from_le_bytes([self.byte()?]);
        if slope == 0 || slope == i8::MIN {
            return Err(TccError::BadGradient(self.at));
        }
        self.room(length)?;
        for _ in 0..length {
            let byte = u8::try_from(value).map_err(|_| TccError::BadGradient(self.at))?;
            self.output.push(byte);
            value += i32::from(slope);
        }
        Ok(())
    }

    fn bitmask(&mut self, start: usize) -> Result<(), TccError> {
        let length = self.length(start)?;
        if length == 0 || length % 4 != 0 {
            return Err(TccError::BadLength(self.at));
        }
        self.room(length)?;
        let words = length / 4;
        let mask = self.bytes(words.div_ceil(8))?.to_vec();
        let is_set = |bit: usize| {
            mask.get(bit / 8)
                .is_some_and(|byte| byte >> (bit % 8) & 1 == 1)
        };
        if (words..mask.len() * 8).any(is_set) {
            return Err(TccError::BadMask(self.at));
        }
        for word in 0..words {
            let mut bytes = [0; 4];
            if is_set(word) {
                bytes.copy_from_slice(self.bytes(4)?);
            }
            self.output.extend_from_slice(&bytes);
        }
        Ok(())
    }

    fn escape(&mut self) -> Result<(), TccError> {
        match self.byte()? {
            1 => {
                let entry = usize::from(self.byte()?);
                let word = LEXICON.get(entry).ok_or(TccError::BadEscape(self.at))?;
                self.room(word.len())?;
                self.output.extend_from_slice(word.as_bytes());
                Ok(())
            }
            2 => self.predicted(),
            _ => Err(TccError::BadEscape(self.at)),
        }
    }

    fn predicted(&mut self) -> Result<(), TccError> {
        let stride = usize::from(self.byte()?);
        let length = self.varint()?;
        if stride == 0 || stride > length || stride > self.output.len() + length {
            return Err(TccError::BadStride(self.at));
        }
        self.room(length)?;
        let raw = self.bytes(stride)?.to_vec();
        self.output.extend_from_slice(&raw);
        for _ in stride..length {
            let delta = self.byte()?;
            let end = self.output.len();
            let left = self.output[end - 1];
            let above = self.output[end - stride];
            let sum = u16::from(left) + u16::from(above);
            self.output
                .push(delta.wrapping_add((sum >> 1).to_le_bytes()[0]));
        }
        Ok(())
    }

    /// A length in the form of added bytes, where 255 goes on.
    fn varint(&mut self) -> Result<usize, TccError> {
        let mut length = 0;
        loop {
            let more = self.byte()?;
            length += usize::from(more);
            if length > MAX_TOKEN_LENGTH {
                return Err(TccError::BadLength(self.at));
            }
            if more != u8::MAX {
                return Ok(length);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_ramps_and_words_decode() {
        assert_eq!(decode(&[0x40, 0x41], 10).as_deref(), Ok(&b"AAAA"[..]));
        assert_eq!(decode(&[0x80, 5, 1], 10).as_deref(), Ok(&[5, 6, 7, 8][..]));
        assert_eq!(decode(&[0, 1, 3], 10).as_deref(), Ok(&b"error"[..]));
        assert_eq!(decode(&[0x40, 0x41], 3), Err(TccError::TooLong(2)));
    }

    #[test]
    fn no_stream_makes_more_than_the_limit() {
        let mut state = 1_u64;
        for _ in 0..5000 {
            let mut input = Vec::new();
            for _ in 0..40 {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                input.push(state.to_le_bytes()[5]);
            }
            if let Ok(output) = decode(&input, 300) {
                assert!(output.len() <= 300);
            }
        }
    }
}
