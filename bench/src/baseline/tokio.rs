//! `tokio-uring`: a task for each request, on a runtime of the calling thread.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::rc::Rc;

use anyhow::{Context, Result, ensure};
use nix::fcntl::OFlag;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio_uring::Runtime;
use tokio_uring::buf::BoundedBuf as _;
use tokio_uring::fs::File;

use crate::files::size_of;
use crate::job::Job;
use crate::pattern::Random;
use crate::target::{Io, Lane};

/// Direct I/O wants its memory aligned to this at most.
const ALIGN: usize = 4096;

/// What comes back: the tag, what was moved, and the buffer.
type Answer = (u32, io::Result<usize>, Vec<u8>);

/// See the module.
pub(super) struct TokioLane {
    // Before the runtime, as its tasks hold the file too.
    file: Rc<File>,
    size_bytes: u64,
    buffers: Vec<Vec<u8>>,
    ios: Vec<Option<Io>>,
    queued: Vec<u32>,
    answers: UnboundedReceiver<Answer>,
    answer: UnboundedSender<Answer>,
    runtime: Runtime,
}

impl TokioLane {
    pub(super) fn open(path: &Path, job: &Job) -> Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        options.custom_flags(OFlag::O_DIRECT.bits());
        let file = options.open(path);
        let file = file.with_context(|| format!("{}", path.display()))?;
        let size_bytes = size_of(&file)?;
        let mut builder = tokio_uring::builder();
        builder.entries((job.depth * 2).next_power_of_two());
        let runtime = Runtime::new(&builder).context("tokio-uring: its runtime")?;
        let mut random = Random::new(job.seed);
        let mut buffer = || {
            let mut bytes = vec![0; job.block_bytes as usize + ALIGN];
            random.fill(&mut bytes);
            bytes
        };
        let (answer, answers) = unbounded_channel();
        Ok(Self {
            file: Rc::new(File::from_std(file)),
            size_bytes,
            buffers: (0..job.depth).map(|_| buffer()).collect(),
            ios: vec![None; job.depth as usize],
            queued: Vec::with_capacity(job.depth as usize),
            answers,
            answer,
            runtime,
        })
    }
}

impl Lane for TokioLane {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn submit(&mut self, io: Io, tag: u32) -> Result<()> {
        let place = self.ios.get_mut(tag as usize);
        *place.context("a tag below the depth")? = Some(io);
        self.queued.push(tag);
        Ok(())
    }

    fn wait(&mut self, done: &mut Vec<u32>) -> Result<()> {
        let Self {
            file,
            buffers,
            ios,
            queued,
            answers,
            answer,
            runtime,
            ..
        } = self;
        runtime.block_on(async {
            for tag in queued.drain(..) {
                let io = ios.get(tag as usize).copied().flatten();
                let io = io.context("a request of that tag")?;
                let buffer = buffers
                    .get_mut(tag as usize)
                    .context("a buffer of that tag")?;
                let work = carry_out(Rc::clone(file), io, std::mem::take(buffer));
                let answer = answer.clone();
                tokio_uring::spawn(async move {
                    let (result, buffer) = work.await;
                    // Nobody listens only if the run has failed.
                    let _ = answer.send((tag, result, buffer));
                });
            }
            let mut next = answers.recv().await;
            while let Some((tag, result, buffer)) = next {
                let io = ios.get_mut(tag as usize).and_then(Option::take);
                let io = io.context("an answer to no request")?;
                let moved = result.with_context(|| format!("tokio-uring: {io:?}"))?;
                ensure!(
                    moved == io.length() as usize,
                    "tokio-uring: {io:?} moved {moved}"
                );
                if let Some(place) = buffers.get_mut(tag as usize) {
                    *place = buffer;
                }
                done.push(tag);
                next = answers.try_recv().ok();
            }
            Ok(())
        })
    }
}

async fn carry_out(file: Rc<File>, io: Io, buffer: Vec<u8>) -> (io::Result<usize>, Vec<u8>) {
    let start = buffer.as_ptr().align_offset(ALIGN);
    let part = start..start + io.length() as usize;
    match io {
        Io::Read { offset, .. } => {
            let (result, slice) = file.read_at(buffer.slice(part), offset).await;
            (result, slice.into_inner())
        }
        Io::Write { offset, .. } => {
            let (result, slice) = file.write_at(buffer.slice(part), offset).submit().await;
            (result, slice.into_inner())
        }
        Io::Flush { data_only } => {
            let result = match data_only {
                true => file.sync_data().await,
                false => file.sync_all().await,
            };
            (result.map(|()| 0), buffer)
        }
    }
}
