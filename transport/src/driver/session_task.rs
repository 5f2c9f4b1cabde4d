//! One task for each volume and peer: runs session after session over the links it is given.
//!
//! The control stream is always read and always served first; the data stream is read while the
//! daemon keeps up. A dictionary that is due is trained on another thread. The daemon must take
//! outputs without waiting for anything that depends on this task; how much data may come to it is
//! what it granted credit for.

use std::sync::Arc;
use std::time::Duration;

use tokio::select;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::link::{Link, LinkEnd, Reads, SessionEnd};
use super::shelf::Shelf;
use super::{Clock, stopped};
use crate::session::{
    CloseReason, CompressionStatus, Config, Event, FromSession, Input, LocalState, Output, Session,
    SessionId, ToSession,
};
use crate::wire::Stream;

pub(crate) struct SessionTask {
    pub(crate) config: Config,
    pub(crate) clock: Clock,
    pub(crate) states: watch::Receiver<LocalState>,
    pub(crate) links: mpsc::Receiver<Link>,
    pub(crate) to: mpsc::Receiver<ToSession>,
    pub(crate) from: mpsc::Sender<FromSession>,
    pub(crate) stop: watch::Receiver<bool>,
    pub(crate) shelf: Shelf,
    pub(crate) compression: watch::Sender<CompressionStatus>,
    pub(crate) last_id: u64,
}

/// What one session's loop keeps beside the session.
struct Running {
    session: Session,
    id: SessionId,
    link: Link,
    end: SessionEnd,
    open: Open,
    replacement: Option<Link>,
}

/// Which of the link's queues have not ended.
struct Open {
    control_in: bool,
    data_in: bool,
    control_out: bool,
    data_out: bool,
}

impl SessionTask {
    /// Runs until stopped, or until the daemon has dropped its handle.
    pub(crate) async fn run(mut self) {
        let mut next = None;
        loop {
            let link = match next.take() {
                Some(link) => link,
                None => match self.next_link().await {
                    Some(link) => link,
                    None => return,
                },
            };
            next = self.session(link).await;
            if *self.stop.borrow() || self.from.is_closed() {
                return;
            }
        }
    }

    /// Waits for a link. What the daemon sends meanwhile is for nobody.
    async fn next_link(&mut self) -> Option<Link> {
        loop {
            select! {
                biased;
                () = stopped(&mut self.stop) => return None,
                link = self.links.recv() => return link,
                input = self.to.recv() => { input?; }
            }
        }
    }

    /// Runs one session to its end; gives the link that replaced it, if one did.
    async fn session(&mut self, link: Link) -> Option<Link> {
        self.last_id += 1;
        let now = (self.clock)();
        let state = self.states.borrow_and_update().clone();
        let mut session = Session::new(self.config.clone(), state, now);
        session.handle(
            now,
            Event::Connected {
                keys: link.keys.clone(),
            },
        );
        if let Some(shipment) = self.shelf.newest() {
            session.handle(now, Event::Dictionary(shipment));
        }
        let mut running = Running {
            session,
            id: SessionId(self.last_id),
            link,
            end: SessionEnd {
                was_established: false,
                was_refused: false,
                was_silent: false,
            },
            open: Open {
                control_in: true,
                data_in: true,
                control_out: true,
                data_out: true,
            },
            replacement: None,
        };
        while !running.is_over() {
            if !self.step(&mut running).await {
                break;
            }
            let compression = running.session.compression();
            self.compression.send_if_modified(|told| {
                let differs = *told != compression;
                *told = compression;
                differs
            });
            if let Some(samples) = running.session.take_samples() {
                self.shelf.train(samples);
            }
        }
        let Running {
            link,
            end,
            replacement,
            ..
        } = running;
        let Link {
            mut tasks,
            control_out,
            data_out,
            ended,
            ..
        } = link;
        drop((control_out, data_out));
        if *self.stop.borrow()
            && let Some(writer) = tasks.control_writer.take()
        {
            // Whoever stops us closes the connection next. A writer limits its own time.
            let _ = writer.await;
        }
        // The maker of the link may be gone together with its connection.
        let _ = ended.send(end);
        replacement
    }

    /// Handles the next thing that happens. False if the daemon is gone.
    async fn step(&mut self, running: &mut Running) -> bool {
        let wake = running.session.next_timeout().map(|at| self.instant(at));
        let Running {
            session,
            id,
            link,
            end,
            open,
            replacement,
        } = running;
        let clock = &self.clock;
        let is_open = !session.is_closed();
        let sends = |open, stream| open && session.has_transmit(stream);
        let sends_control = sends(open.control_out, Stream::Control);
        let sends_data = sends(open.data_out, Stream::Data);
        let reads_control = is_open && open.control_in;
        let reads_data = is_open && open.data_in && session.accepts_data();
        select! {
            biased;
            () = stopped(&mut self.stop), if is_open => {
                session.handle(clock(), Event::Daemon(Input::Close));
            }
            reads = link.control_in.recv(), if reads_control => {
                open.control_in = matches!(reads, Some(Ok(_)));
                take_reads(session, clock(), Stream::Control, reads);
            }
            permit = link.control_out.reserve(), if sends_control => match permit {
                Ok(permit) => if let Some(frame) = session.poll_transmit(Stream::Control) {
                    permit.send(frame);
                },
                // The reader knows why, and may hold the peer's last words.
                Err(_) => open.control_out = false,
            },
            permit = self.from.reserve(), if session.has_output() => {
                let Ok(permit) = permit else { return false };
                if let Some(output) = session.poll_output() {
                    note(end, &output);
                    permit.send(FromSession { session: *id, output });
                }
            }
            reads = link.data_in.recv(), if reads_data => {
                open.data_in = matches!(reads, Some(Ok(_)));
                take_reads(session, clock(), Stream::Data, reads);
            }
            permit = link.data_out.reserve(), if sends_data => match permit {
                Ok(permit) => if let Some(frame) = session.poll_transmit(Stream::Data) {
                    permit.send(frame);
                },
                Err(_) => open.data_out = false,
            },
            input = self.to.recv(), if session.accepts_input() => {
                let Some(ToSession { session: meant, input }) = input else { return false };
                if meant == *id {
                    session.handle(clock(), Event::Daemon(input));
                }
            }
            changed = self.states.changed(), if is_open => {
                if changed.is_err() {
                    return false;
                }
                let state = self.states.borrow_and_update().clone();
                session.handle(clock(), Event::Daemon(Input::LocalState(state)));
            }
            shipment = self.shelf.changed(), if is_open => {
                session.handle(clock(), Event::Dictionary(shipment));
            }
            newer = self.links.recv(), if replacement.is_none() => {
                let Some(newer) = newer else { return false };
                *replacement = Some(newer);
                session.handle(clock(), replaced());
            }
            () = sleep_until(wake), if wake.is_some() => session.handle_timeout(clock()),
        }
        true
    }

    /// The session's time as the runtime's.
    fn instant(&self, at: Duration) -> Instant {
        Instant::now() + at.saturating_sub((self.clock)())
    }
}

impl Running {
    /// Nothing is left to do: closed, the daemon knows, and the last frame is on its way.
    fn is_over(&self) -> bool {
        let has_last_words = self.open.control_out && self.session.has_transmit(Stream::Control);
        self.session.is_closed() && !self.session.has_output() && !has_last_words
    }
}

/// What of a session's outputs matters for reconnecting.
fn note(end: &mut SessionEnd, output: &Output) {
    match output {
        Output::PeerState(_) => end.was_established = true,
        Output::Closed {
            reason: CloseReason::Refused,
        } => end.was_refused = true,
        Output::Closed {
            reason: CloseReason::HeartbeatTimeout | CloseReason::HelloTimeout,
        } => {
            end.was_silent = true;
        }
        _ => {}
    }
}

fn replaced() -> Event {
    Event::Disconnected {
        why: "replaced by a newer connection of the peer".to_owned(),
    }
}

fn take_reads(session: &mut Session, now: Duration, stream: Stream, reads: Option<Reads>) {
    match reads {
        Some(Ok(read)) => {
            for bytes in read.chunks {
                session.handle(now, Event::Received { stream, bytes });
            }
        }
        Some(Err(LinkEnd::NotShared)) => session.handle(now, Event::NotShared),
        Some(Err(LinkEnd::Lost(why))) if stream == Stream::Control => {
            session.handle(now, Event::Disconnected { why });
        }
        None if stream == Stream::Control => {
            let why = "the peer ended the stream".to_owned();
            session.handle(now, Event::Disconnected { why });
        }
        // The end of the data stream alone says nothing; control follows it.
        Some(Err(LinkEnd::Lost(_))) | None => {}
    }
}

async fn sleep_until(wake: Option<Instant>) {
    if let Some(wake) = wake {
        tokio::time::sleep_until(wake).await;
    }
}

/// The clock of a running system: time since the first call of this function's result was made.
pub(crate) fn system_clock() -> Clock {
    let start = std::time::Instant::now();
    Arc::new(move || start.elapsed())
}
