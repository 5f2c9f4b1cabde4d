//! Between a WebSocket and a link.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

use crate::driver::link::{Link, LinkEnd, LinkEnds, LinkTasks, Read, Reads, SessionEnd, link};
use crate::wire::{SessionKeys, Stream, WireFrame, stream_of};

/// Bytes of data frames that wait for the session, before reading stops altogether. A daemon that
/// grants less credit than this never lets it come to that.
const DATA_BUFFER_BYTES: usize = 96 << 20;
/// As many data frames as the peer may have unacknowledged.
const DATA_BUFFER_FRAMES: usize = 1024;
/// The buffer is counted in units of this many bytes.
const UNIT_BYTES: usize = 1024;
/// Time for the last frame of a session to be written and read.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Makes a link of an open WebSocket.
pub(super) fn start<S>(
    socket: WebSocketStream<S>,
    keys: SessionKeys,
) -> (Link, oneshot::Receiver<SessionEnd>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (sink, stream) = socket.split();
    link(keys, DATA_BUFFER_FRAMES, |ends: LinkEnds| {
        let writer = tokio::spawn(write(sink, ends.control_out, ends.data_out));
        // The reader ends by itself, after it has read what the peer still had to say: a socket
        // that is closed with unread bytes takes back what was written last.
        tokio::spawn(read(stream, ends.control_in, ends.data_in));
        LinkTasks {
            readers: Vec::new(),
            control_writer: Some(writer),
        }
    })
}

/// A link that only says that the peer does not share the volume.
pub(super) fn not_shared(keys: SessionKeys) -> (Link, oneshot::Receiver<SessionEnd>) {
    link(keys, 1, |ends: LinkEnds| {
        // The queue is new and has room.
        let _ = ends.control_in.try_send(Err(LinkEnd::NotShared));
        LinkTasks {
            readers: Vec::new(),
            control_writer: None,
        }
    })
}

async fn write<S>(
    mut sink: SplitSink<WebSocketStream<S>, Message>,
    mut control: mpsc::Receiver<WireFrame>,
    mut data: mpsc::Receiver<WireFrame>,
) where
    S: AsyncRead + AsyncWrite + Unpin,
{
    loop {
        let next = tokio::select! {
            biased;
            frame = control.recv() => frame,
            Some(frame) = data.recv() => Some(frame),
        };
        // The session drops both queues at once; what it put into control before is written.
        let Some(frame) = next else { break };
        if sink.feed(Message::Binary(frame.to_bytes())).await.is_err() {
            return;
        }
        if control.is_empty() && data.is_empty() && sink.flush().await.is_err() {
            return;
        }
    }
    // If it takes longer, the peer learns of the end by other means.
    let _ = tokio::time::timeout(LAST_WORDS, sink.close()).await;
}

async fn read<S>(
    mut stream: SplitStream<WebSocketStream<S>>,
    control: mpsc::Sender<Reads>,
    data: mpsc::Sender<Reads>,
) where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let units = Semaphore::new(DATA_BUFFER_BYTES / UNIT_BYTES);
    let room = Arc::new(units);
    loop {
        let message = tokio::select! {
            message = stream.next() => message,
            () = control.closed() => return drain(stream).await,
        };
        let end = match message {
            Some(Ok(Message::Binary(frame))) => {
                match deliver(frame, &control, &data, &room).await {
                    Ok(()) => continue,
                    Err(end) => end,
                }
            }
            // Pings are answered by the library.
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => continue,
            Some(Ok(Message::Close(_))) | None => lost("the peer closed the WebSocket"),
            Some(Ok(_)) => lost("the peer sent a message that is not binary"),
            Some(Err(error)) => LinkEnd::Lost(error.to_string()),
        };
        if control.send(Err(end)).await.is_err() {
            drain(stream).await;
        }
        return;
    }
}

async fn deliver(
    frame: Bytes,
    control: &mpsc::Sender<Reads>,
    data: &mpsc::Sender<Reads>,
    room: &Arc<Semaphore>,
) -> Result<(), LinkEnd> {
    let gone = |_| lost("the session has ended");
    match stream_of(&frame) {
        None => Err(lost("the peer sent a message that is no frame")),
        Some(Stream::Control) => {
            let read = Read {
                chunks: vec![frame],
                _room: None,
            };
            control.send(Ok(read)).await.map_err(gone)
        }
        Some(Stream::Data) => {
            let units = u32::try_from(frame.len().div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX);
            let permit = room.clone().acquire_many_owned(units).await;
            let permit = permit.map_err(|_| lost("the session has ended"))?;
            let read = Read {
                chunks: vec![frame],
                _room: Some(permit),
            };
            data.send(Ok(read)).await.map_err(gone)
        }
    }
}

fn lost(why: &str) -> LinkEnd {
    LinkEnd::Lost(why.to_owned())
}

/// Reads what still comes after the end of the session, for a short while.
async fn drain<S>(mut stream: SplitStream<WebSocketStream<S>>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let rest = async { while let Some(Ok(_)) = stream.next().await {} };
    let _ = tokio::time::timeout(LAST_WORDS, rest).await;
}
