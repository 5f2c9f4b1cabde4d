//! Between QUIC streams and links.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hn4::types::VolumeId;
use quinn::{Connection, ConnectionError, ReadError, RecvStream, SendStream, VarInt};
use tokio::sync::{mpsc, oneshot};
use zerocopy::byteorder::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::driver::link::{
    Link, LinkEnd, LinkEnds, LinkTasks, READS_IN, Read, Reads, SessionEnd, link,
};
use crate::tls::{Side, session_keys};
use crate::wire::{Stream, WireFrame};

/// Code of a reset that says: this volume is not shared with you.
pub(super) const NOT_SHARED: VarInt = VarInt::from_u32(2);
/// Chunks that are taken from a stream in one read.
const CHUNKS_PER_READ: usize = 64;
/// Time for the last frame of a session to be acknowledged by the peer's transport.
const LAST_WORDS: Duration = Duration::from_secs(2);
const MAGIC: [u8; 8] = *b"HN4WORM1";

/// The first bytes of a stream.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawPreamble {
    magic: [u8; 8],
    volume: [u8; 16],
    kind: u8,
    zero: [u8; 7],
    channel: U64,
}

/// What a stream is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Preamble {
    pub(super) volume: VolumeId,
    pub(super) stream: Stream,
    pub(super) channel: u64,
}

impl Preamble {
    fn encode(self) -> Vec<u8> {
        let raw = RawPreamble {
            magic: MAGIC,
            volume: self.volume.0,
            kind: u8::from(self.stream == Stream::Data),
            zero: [0; 7],
            channel: self.channel.into(),
        };
        raw.as_bytes().to_vec()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let raw = RawPreamble::read_from_bytes(bytes).ok()?;
        let stream = match raw.kind {
            0 => Stream::Control,
            1 => Stream::Data,
            _ => return None,
        };
        (raw.magic == MAGIC && raw.zero == [0; 7]).then_some(Self {
            volume: VolumeId(raw.volume),
            stream,
            channel: raw.channel.get(),
        })
    }

    /// Reads the preamble of a stream that the peer opened. None if it is no preamble.
    pub(super) async fn read(receive: &mut RecvStream) -> Option<Self> {
        let mut bytes = [0; size_of::<RawPreamble>()];
        receive.read_exact(&mut bytes).await.ok()?;
        Self::decode(&bytes)
    }
}

/// One bidirectional stream.
pub(super) type Both = (SendStream, RecvStream);

/// Opens the streams of a volume, on the dialer's side.
pub(super) async fn open(
    connection: &Connection,
    volume: VolumeId,
) -> Result<(Link, oneshot::Receiver<SessionEnd>), String> {
    let text = |error: ConnectionError| error.to_string();
    let mut control = connection.open_bi().await.map_err(text)?;
    let mut data = connection.open_bi().await.map_err(text)?;
    let channel = u64::from(VarInt::from(control.0.id()));
    for (both, stream) in [(&mut control, Stream::Control), (&mut data, Stream::Data)] {
        let preamble = Preamble {
            volume,
            stream,
            channel,
        };
        both.0
            .write_all(&preamble.encode())
            .await
            .map_err(|error| error.to_string())?;
    }
    join(connection, Side::Dialer, volume, channel, control, data)
}

/// Makes a link of the two streams of a volume.
pub(super) fn join(
    connection: &Connection,
    side: Side,
    volume: VolumeId,
    channel: u64,
    control: Both,
    data: Both,
) -> Result<(Link, oneshot::Receiver<SessionEnd>), String> {
    let keys = session_keys(side, volume, channel, |key, label, context| {
        connection.export_keying_material(key, label, context)
    })
    .map_err(|_| "the connection gives no keys".to_owned())?;
    // Control goes first on the wire as well.
    let _ = control.0.set_priority(1);
    Ok(link(keys, READS_IN, |ends: LinkEnds| {
        let guard = Arc::new(connection.clone());
        let control_writer = tokio::spawn(write(control.0, ends.control_out, guard.clone()));
        tokio::spawn(write(data.0, ends.data_out, guard));
        LinkTasks {
            readers: vec![
                tokio::spawn(read(control.1, ends.control_in)).abort_handle(),
                tokio::spawn(read(data.1, ends.data_in)).abort_handle(),
            ],
            control_writer: Some(control_writer),
        }
    }))
}

/// Writes frames until the session has no more, then waits until the peer has them. Holds the
/// connection open meanwhile.
async fn write(
    mut stream: SendStream,
    mut frames: mpsc::Receiver<WireFrame>,
    _connection: Arc<Connection>,
) {
    while let Some(frame) = frames.recv().await {
        let mut parts = [frame.head, frame.body, frame.tail];
        if stream.write_all_chunks(&mut parts).await.is_err() {
            return;
        }
    }
    if stream.finish().is_ok() {
        // If it takes longer, the peer learns of the end by other means.
        let _ = tokio::time::timeout(LAST_WORDS, stream.stopped()).await;
    }
}

async fn read(mut stream: RecvStream, reads: mpsc::Sender<Reads>) {
    loop {
        let mut chunks = [const { Bytes::new() }; CHUNKS_PER_READ];
        let result = match stream.read_chunks(&mut chunks).await {
            Ok(Some(count)) => Ok(Read {
                chunks: chunks.into_iter().take(count).collect(),
                _room: None,
            }),
            Ok(None) => Err(LinkEnd::Lost("the peer ended the stream".to_owned())),
            Err(ReadError::Reset(code)) if code == NOT_SHARED => Err(LinkEnd::NotShared),
            Err(ReadError::ConnectionLost(error)) => Err(LinkEnd::Lost(error.to_string())),
            Err(error) => Err(LinkEnd::Lost(error.to_string())),
        };
        let is_end = result.is_err();
        if reads.send(result).await.is_err() || is_end {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_preamble_reads_back_and_anything_else_is_refused() {
        let preamble = Preamble {
            volume: VolumeId([3; 16]),
            stream: Stream::Data,
            channel: 1 << 40,
        };
        let bytes = preamble.encode();
        assert_eq!(Preamble::decode(&bytes), Some(preamble));
        for position in (0..8).chain(24..32) {
            let mut damaged = bytes.clone();
            damaged[position] ^= 0x80;
            assert_eq!(Preamble::decode(&damaged), None, "byte {position}");
        }
        assert_eq!(Preamble::decode(&bytes[1..]), None);
    }
}
