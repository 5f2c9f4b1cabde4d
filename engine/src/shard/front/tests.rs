//! A front, its clients and a stand-in for the thread that has the volume, in turns on one thread.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use zerocopy::IntoBytes;
use zerocopy::big_endian::{U16, U32, U64};

use super::*;
use crate::nbd::export::Export;
use crate::nbd::proto::{
    self, ExportNameReply, Greeting, OptionHeader, RequestHeader, SimpleReply,
};

/// Enough for a front to keep as much as it ever does.
const SLOTS: u32 = 16_384;
/// Of a request.
const BYTES: u32 = 128 * 1024;
/// What a client receives before the first reply: the greeting, size and flags of the export.
const HANDSHAKE_BYTES: usize = size_of::<Greeting>() + size_of::<ExportNameReply>();
const REPLY_BYTES: usize = size_of::<SimpleReply>();

/// A client that always has so many writes, or reads, on their way.
struct Peer {
    socket: UnixStream,
    out: Vec<u8>,
    asked: usize,
    received: usize,
    depth: usize,
    command: u16,
}

impl Peer {
    fn new(socket: UnixStream, depth: usize) -> Self {
        socket.set_nonblocking(true).expect("a socket");
        let mut out = Vec::new();
        let flags = proto::client_flag::FIXED_NEWSTYLE | proto::client_flag::NO_ZEROES;
        out.extend(U32::new(flags).as_bytes());
        let header = OptionHeader {
            magic: U64::new(proto::OPTION_MAGIC),
            option: U32::new(proto::option::EXPORT_NAME),
            length: U32::ZERO,
        };
        out.extend(header.as_bytes());
        Self {
            socket,
            out,
            asked: 0,
            received: 0,
            depth,
            command: proto::command::WRITE,
        }
    }

    fn answered(&self) -> usize {
        let reads = self.command == proto::command::READ;
        let reply = REPLY_BYTES + if reads { BYTES as usize } else { 0 };
        self.received.saturating_sub(HANDSHAKE_BYTES) / reply
    }

    fn ask(&mut self) {
        let header = RequestHeader {
            magic: U32::new(proto::REQUEST_MAGIC),
            flags: U16::ZERO,
            command: U16::new(self.command),
            cookie: U64::new(self.asked as u64),
            offset: U64::ZERO,
            length: U32::new(BYTES),
        };
        self.out.extend(header.as_bytes());
        if self.command == proto::command::WRITE {
            self.out.resize(self.out.len() + BYTES as usize, 7);
        }
        self.asked += 1;
    }

    fn receive(&mut self) {
        let mut bytes = [0; 65_536];
        loop {
            match self.socket.read(&mut bytes) {
                Ok(0) => break,
                Ok(count) => self.received += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// Sends and receives what can be now.
    fn go_on(&mut self) {
        self.receive();
        while self.asked < self.answered() + self.depth {
            self.ask();
        }
        while !self.out.is_empty() {
            match self.socket.write(&self.out) {
                Ok(count) => drop(self.out.drain(..count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

/// The other thread: whatever it is asked it answers at once, and what is written is destaged.
struct Owner {
    arena: Arena,
    mail: Mail<ToFront>,
    from: rtrb::Consumer<ToOwner>,
    wants: [Option<(usize, usize)>; 2],
    answers: usize,
    /// For its waker.
    _ring: Ring,
}

impl Owner {
    fn take(&mut self, message: ToOwner) {
        match message {
            ToOwner::Request { id, request, lent } => {
                let slots = self.arena.borrow(lent);
                let read = matches!(request, Request::Read { .. });
                let (back, used) = if read {
                    (slots, Vec::new())
                } else {
                    (Vec::new(), slots)
                };
                used.into_iter().for_each(|slot| self.arena.free(slot));
                let (result, lent) = (Ok(()), self.arena.lend(back));
                self.mail.push(ToFront::Answer { id, result, lent });
                self.answers += 1;
            }
            ToOwner::Want { what, least, most } => {
                self.wants[what as usize] = Some((least, most));
            }
            ToOwner::Return(lent) => {
                let slots = self.arena.borrow(lent);
                slots.into_iter().for_each(|slot| self.arena.free(slot));
            }
            ToOwner::Extents(_) | ToOwner::Left => {}
        }
    }

    /// One turn. `gives`: how many of the least and the most that are wanted.
    fn turn(&mut self, gives: fn(usize, usize) -> usize) {
        while let Ok(message) = self.from.pop() {
            self.take(message);
        }
        for what in [Use::Write, Use::Read] {
            if let Some((least, most)) = self.wants[what as usize].take() {
                let count = gives(least, most);
                let slots: Vec<_> = (0..count).filter_map(|_| self.arena.alloc()).collect();
                assert_eq!(slots.len(), count, "the memory suffices");
                let lent = self.arena.lend(slots);
                self.mail.push(ToFront::Slots(what, lent));
            }
        }
        self.mail.flush();
    }
}

/// A front with so many clients that have so many writes on their way.
fn served(clients: usize, depth: usize) -> (Front, Owner, Vec<Peer>) {
    let (queue, inbox) = rtrb::RingBuffer::new(QUEUE);
    let (to_owner, from) = rtrb::RingBuffer::new(QUEUE);
    let small = RingConfig {
        operations: 1,
        ..RingConfig::default()
    };
    let ring = Ring::new(small, Arena::new(1).expect("a page")).expect("a ring");
    let arena = Arena::new(SLOTS).expect("memory");
    let front = Front::open(FrontSetup {
        inbox,
        queue: to_owner,
        waker: ring.waker(),
        arena: arena.share(),
        kept: Kept::new(SLOTS as usize, 4096, 1),
        cpu: None,
    })
    .expect("a front");
    let mut mail = Mail::new(queue, front.waker());
    mail.push(ToFront::Accepts(Ok(())));
    let exports = ExportList::new(vec![Export::new("", 1 << 30)]).and_then(|l| l.with_default(0));
    let exports = Arc::new(exports.expect("a list"));
    let mut peers = Vec::new();
    for _ in 0..clients {
        let (here, there) = UnixStream::pair().expect("sockets");
        mail.push(ToFront::Client(there.into(), Arc::clone(&exports)));
        peers.push(Peer::new(here, depth));
    }
    let owner = Owner {
        arena,
        mail,
        from,
        wants: [None; 2],
        answers: 0,
        _ring: ring,
    };
    (front, owner, peers)
}

/// What each client is answered in so many turns.
fn answers(turns: usize, gives: fn(usize, usize) -> usize) -> Vec<usize> {
    let (mut front, mut owner, mut peers) = served(16, 4);
    let mut completions = Vec::new();
    for _ in 0..turns {
        peers.iter_mut().for_each(Peer::go_on);
        owner.turn(gives);
        assert!(front.turn(0, &mut completions).expect("a ring"));
    }
    peers.iter().map(Peer::answered).collect()
}

fn assert_fair(answers: &[usize]) {
    let (least, most) = (answers.iter().min(), answers.iter().max());
    let (least, most) = (*least.expect("clients"), *most.expect("clients"));
    assert!(most > 8 && least * 2 >= most, "{answers:?}");
}

#[test]
fn clients_that_want_more_than_is_kept_are_served_alike() {
    assert_fair(&answers(400, |_, most| most));
}

#[test]
fn clients_are_served_alike_where_there_is_room_for_one_at_a_time() {
    assert_fair(&answers(1600, |least, _| least));
}

#[test]
fn what_was_answered_last_reaches_its_client_although_the_volume_has_ended() {
    let (mut front, mut owner, mut peers) = served(1, 1);
    let mut completions = Vec::new();
    while owner.answers == 0 {
        peers[0].go_on();
        assert!(front.turn(0, &mut completions).expect("a ring"));
        owner.turn(|_, most| most);
    }
    peers[0].receive();
    assert_eq!(peers[0].answered(), 0, "it is on its way still");
    drop(owner);
    assert!(!front.turn(0, &mut completions).expect("a ring"));
    peers[0].receive();
    assert_eq!(peers[0].answered(), 1);
}

#[test]
fn clients_that_have_fallen_silent_take_no_slots_along() {
    let (mut front, mut owner, mut peers) = served(2, 4);
    let mut completions = Vec::new();
    peers
        .iter_mut()
        .for_each(|peer| peer.command = proto::command::READ);
    let mut least_free = SLOTS as usize;
    for turn in 0..400 {
        if turn == 200 {
            peers.iter_mut().for_each(|peer| peer.depth = 0);
        }
        peers.iter_mut().for_each(Peer::go_on);
        owner.turn(|_, most| most);
        assert!(front.turn(0, &mut completions).expect("a ring"));
        least_free = least_free.min(owner.arena.free_slots());
    }
    assert!(peers.iter().all(|peer| peer.answered() == peer.asked));
    let Kept { writes, reads } = front.desk.kept;
    let away = SLOTS as usize - owner.arena.free_slots();
    assert!(away <= writes + reads, "{away} slots");
    assert!(
        least_free + writes + reads < SLOTS as usize,
        "there were more of them"
    );
}
