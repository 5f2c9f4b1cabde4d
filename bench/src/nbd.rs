//! An NBD server as a target: one connection for each thread, requests in flight up to the depth.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hn4_engine::nbd::client::{Client, ClientError, ClientOptions, Submit};

use crate::contents::Contents;
use crate::job::Job;
use crate::pattern::Random;
use crate::target::{Io, Lane, NbdUri};

/// Between two attempts to reach a server that is starting.
const LOOK: Duration = Duration::from_millis(5);

/// One connection.
pub struct NbdLane {
    client: Client,
    contents: Contents,
    /// Which tag a ticket of the client belongs to, and what it is.
    tags: HashMap<u64, (u32, Io)>,
}

/// Connects.
///
/// # Errors
/// If the server is not there or refuses the export.
pub fn connect(uri: &NbdUri) -> Result<Client, ClientError> {
    Client::connect(&uri.address, &uri.export, ClientOptions::default())
}

/// Waits until a server that was just started takes connections.
///
/// # Errors
/// If it does not within the limit, or `alive` says why it never will.
pub fn connect_within(
    uri: &NbdUri,
    limit: Duration,
    mut alive: impl FnMut() -> Result<()>,
) -> Result<Client> {
    let deadline = Instant::now() + limit;
    loop {
        match connect(uri) {
            Ok(client) => return Ok(client),
            Err(error) if Instant::now() >= deadline => {
                return Err(error).with_context(|| format!("no server within {limit:?}"));
            }
            Err(_) => alive()?,
        }
        // Nothing announces that a server listens.
        std::thread::sleep(LOOK);
    }
}

/// Writes incompressible data over the first `bytes` of an export and flushes: reads then find
/// data, not holes.
///
/// # Errors
/// If the server fails.
pub fn fill(client: &mut Client, bytes: u64) -> Result<()> {
    let mut data = vec![0; 1 << 20];
    Random::new(bytes).fill(&mut data);
    let mut offset = 0;
    while offset < bytes {
        let length = (bytes - offset).min(data.len() as u64);
        let length = usize::try_from(length)?;
        // No two blocks alike: a server may look for equal ones.
        for (block, at) in (0..length).step_by(4096).zip(offset / 4096..) {
            if let Some(stamp) = data.get_mut(block..block + 8) {
                stamp.copy_from_slice(&at.to_le_bytes());
            }
        }
        let part = data.get(..length).context("a part of the buffer")?;
        client.write(offset, part, false)?;
        offset += length as u64;
    }
    client.flush()?;
    Ok(())
}

impl NbdLane {
    /// Connects, with structured replies where the server has them.
    ///
    /// # Errors
    /// If the server is not there or refuses the export.
    pub fn connect(uri: &NbdUri, job: &Job) -> Result<Self> {
        let client = connect(uri)?;
        Ok(Self {
            client,
            contents: Contents::new(job),
            tags: HashMap::new(),
        })
    }
}

impl Lane for NbdLane {
    fn size_bytes(&self) -> u64 {
        self.client.info().size_bytes
    }

    fn submit(&mut self, io: Io, tag: u32) -> Result<()> {
        let request = match io {
            Io::Read { offset, length } => Submit::Read { offset, length },
            Io::Write { offset, length } => Submit::Write {
                offset,
                data: self.contents.of_write(offset, length, tag),
                fua: false,
            },
            Io::Flush { .. } => Submit::Flush,
        };
        let ticket = self.client.submit(request)?;
        self.tags.insert(ticket, (tag, io));
        Ok(())
    }

    fn wait(&mut self, done: &mut Vec<u32>) -> Result<()> {
        // All answers that have arrived, so that what follows them goes out in one send too.
        loop {
            let answer = self.client.next_reply()?;
            let data = answer.result?;
            let known = self.tags.remove(&answer.ticket);
            let (tag, io) = known.context("an answer to no request")?;
            if let Io::Read { offset, .. } = io
                && self.contents.verifies()
            {
                self.contents.check(offset, [&data[..]].into_iter())?;
            }
            done.push(tag);
            if !self.client.has_arrived() {
                return Ok(());
            }
        }
    }
}
