//! The connection below a client: the stream, and the haggling over options.

use std::io::{self, BufReader, IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{Address, ClientError, ExportInfo, READ_BYTES_MAX};
use crate::nbd::proto::{
    Greeting, INIT_MAGIC, InfoBlockSize, InfoExport, OPTION_MAGIC, OPTION_REPLY_MAGIC,
    OptionHeader, OptionReplyHeader, client_flag, handshake_flag, info, option, option_reply,
};

/// Longest answer to an option that is read into memory.
const OPTION_REPLY_BYTES_MAX: u32 = 64 * 1024;
/// Answers to one option before the server is given up.
const OPTION_REPLIES_MAX: usize = 64;

pub(super) enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(buf),
            Self::Tcp(stream) => stream.read(buf),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(buf),
            Self::Tcp(stream) => stream.write(buf),
        }
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write_vectored(bufs),
            Self::Tcp(stream) => stream.write_vectored(bufs),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream {
    pub(super) fn connect(address: &Address, timeout: Option<Duration>) -> io::Result<Self> {
        match address {
            Address::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(timeout)?;
                stream.set_write_timeout(timeout)?;
                Ok(Self::Unix(stream))
            }
            Address::Tcp(address) => {
                let stream = match timeout {
                    Some(timeout) => TcpStream::connect_timeout(address, timeout)?,
                    None => TcpStream::connect(address)?,
                };
                stream.set_read_timeout(timeout)?;
                stream.set_write_timeout(timeout)?;
                stream.set_nodelay(true)?;
                Ok(Self::Tcp(stream))
            }
        }
    }
}

pub(super) fn receive<T: FromBytes + IntoBytes + Immutable + KnownLayout>(
    stream: &mut BufReader<Stream>,
    doing: &'static str,
) -> Result<T, ClientError> {
    let mut value = T::new_zeroed();
    stream
        .read_exact(value.as_mut_bytes())
        .map_err(ClientError::io(doing))?;
    Ok(value)
}

pub(super) fn send(stream: &mut BufReader<Stream>, bytes: &[u8]) -> Result<(), ClientError> {
    stream
        .get_mut()
        .write_all(bytes)
        .map_err(ClientError::io("sending"))
}

/// Sends a queue and a long payload without copying the payload.
pub(super) fn send_two(
    stream: &mut Stream,
    first: &[u8],
    second: &[u8],
) -> Result<(), ClientError> {
    let mut sent = 0;
    while sent < first.len() {
        let parts = [IoSlice::new(&first[sent..]), IoSlice::new(second)];
        match stream.write_vectored(&parts) {
            Ok(0) => return Err(ClientError::io("sending")(io::ErrorKind::WriteZero.into())),
            Ok(bytes) => sent += bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(ClientError::io("sending")(error)),
        }
    }
    stream
        .write_all(&second[sent - first.len()..])
        .map_err(ClientError::io("sending"))
}

/// From the server's greeting to the client's flags.
pub(super) fn greet(stream: &mut BufReader<Stream>) -> Result<(), ClientError> {
    let greeting: Greeting = receive(stream, "waiting for the greeting")?;
    if greeting.magic.get() != INIT_MAGIC || greeting.option_magic.get() != OPTION_MAGIC {
        return Err(ClientError::Protocol(
            "its greeting is not that of newstyle NBD",
        ));
    }
    if greeting.flags.get() & handshake_flag::FIXED_NEWSTYLE == 0 {
        return Err(ClientError::Protocol("it does not offer fixed newstyle"));
    }
    let mut flags = client_flag::FIXED_NEWSTYLE;
    if greeting.flags.get() & handshake_flag::NO_ZEROES != 0 {
        flags |= client_flag::NO_ZEROES;
    }
    send(stream, U32::new(flags).as_bytes())
}

fn send_option(
    stream: &mut BufReader<Stream>,
    option: u32,
    data: &[u8],
) -> Result<(), ClientError> {
    let length = u32::try_from(data.len()).map_err(|_| ClientError::Protocol("a name is long"))?;
    let header = OptionHeader {
        magic: U64::new(OPTION_MAGIC),
        option: U32::new(option),
        length: U32::new(length),
    };
    send(stream, &[header.as_bytes(), data].concat())
}

/// Reads an answer to an option: its type and data.
fn option_answer(
    stream: &mut BufReader<Stream>,
    option: u32,
) -> Result<(u32, Vec<u8>), ClientError> {
    let header: OptionReplyHeader = receive(stream, "waiting for the answer to an option")?;
    if header.magic.get() != OPTION_REPLY_MAGIC || header.option.get() != option {
        return Err(ClientError::Protocol(
            "its answer belongs to no option that was sent",
        ));
    }
    if header.length.get() > OPTION_REPLY_BYTES_MAX {
        return Err(ClientError::Protocol("its answer to an option is too long"));
    }
    let mut data = vec![0; header.length.get() as usize];
    stream
        .read_exact(&mut data)
        .map_err(ClientError::io("reading the answer to an option"))?;
    Ok((header.reply_type.get(), data))
}

pub(super) fn ask_structured(stream: &mut BufReader<Stream>) -> Result<bool, ClientError> {
    send_option(stream, option::STRUCTURED_REPLY, &[])?;
    let (kind, _) = option_answer(stream, option::STRUCTURED_REPLY)?;
    Ok(kind == option_reply::ACK)
}

pub(super) fn go(
    stream: &mut BufReader<Stream>,
    export: &str,
    structured_replies: bool,
) -> Result<ExportInfo, ClientError> {
    let name_bytes = u32::try_from(export.len()).map_err(|_| ClientError::Protocol("long name"))?;
    let mut data = U32::new(name_bytes).as_bytes().to_vec();
    data.extend_from_slice(export.as_bytes());
    data.extend_from_slice(U16::new(1).as_bytes());
    data.extend_from_slice(U16::new(info::BLOCK_SIZE).as_bytes());
    send_option(stream, option::GO, &data)?;
    let mut found: Option<(u64, u16)> = None;
    let mut blocks = (1, READ_BYTES_MAX);
    for _ in 0..OPTION_REPLIES_MAX {
        let (code, data) = option_answer(stream, option::GO)?;
        match code {
            option_reply::ACK => {
                let missing = ClientError::Protocol("it did not say how large the export is");
                let (size_bytes, flags) = found.ok_or(missing)?;
                let (min_block_bytes, max_block_bytes) = blocks;
                return Ok(ExportInfo {
                    size_bytes,
                    flags,
                    min_block_bytes,
                    max_block_bytes,
                    structured_replies,
                });
            }
            option_reply::INFO => {
                if let Ok(info) = InfoExport::read_from_bytes(&data)
                    && info.info_type.get() == info::EXPORT
                {
                    found = Some((info.size.get(), info.flags.get()));
                } else if let Ok(info) = InfoBlockSize::read_from_bytes(&data)
                    && info.info_type.get() == info::BLOCK_SIZE
                {
                    blocks = (info.minimum.get(), info.maximum.get());
                }
            }
            code => {
                let text = String::from_utf8_lossy(&data).into_owned();
                return Err(ClientError::Refused {
                    option: option::GO,
                    code,
                    text,
                });
            }
        }
    }
    Err(ClientError::Protocol("its answer to one option has no end"))
}
