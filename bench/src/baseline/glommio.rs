//! `glommio`: a task for each request, on an executor of the calling thread.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::rc::Rc;

use anyhow::{Context, Result, ensure};
use glommio::channels::local_channel::{LocalReceiver, LocalSender, new_unbounded};
use glommio::io::{DmaFile, OpenOptions};
use glommio::{LocalExecutor, LocalExecutorBuilder};

use crate::files::size_of;
use crate::job::Job;
use crate::target::{Io, Lane};

type Answers = Rc<RefCell<VecDeque<(u32, io::Result<usize>)>>>;

/// See the module.
pub(super) struct GlommioLane {
    file: Rc<DmaFile>,
    size_bytes: u64,
    ios: Vec<Option<Io>>,
    queued: Vec<u32>,
    answers: Answers,
    /// Something may be in `answers`.
    news: LocalReceiver<()>,
    tell: Rc<LocalSender<()>>,
    executor: LocalExecutor,
}

impl GlommioLane {
    pub(super) fn open(path: &Path, job: &Job) -> Result<Self> {
        let looked = std::fs::File::open(path);
        let size_bytes = size_of(&looked.with_context(|| format!("{}", path.display()))?)?;
        let executor = LocalExecutorBuilder::default()
            .make()
            .map_err(io::Error::from)
            .context("glommio: its executor")?;
        let opened = executor.run(async {
            let mut options = OpenOptions::new();
            options.read(true).write(true);
            options.dma_open(path).await
        });
        let file = opened
            .map_err(io::Error::from)
            .context("glommio: opening")?;
        let (tell, news) = new_unbounded();
        Ok(Self {
            file: Rc::new(file),
            size_bytes,
            ios: vec![None; job.depth as usize],
            queued: Vec::with_capacity(job.depth as usize),
            answers: Rc::default(),
            news,
            tell: Rc::new(tell),
            executor,
        })
    }
}

impl Lane for GlommioLane {
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
            ios,
            queued,
            answers,
            news,
            tell,
            executor,
            ..
        } = self;
        executor.run(async {
            for tag in queued.drain(..) {
                let io = ios.get(tag as usize).copied().flatten();
                let io = io.context("a request of that tag")?;
                let (file, answers) = (Rc::clone(file), Rc::clone(answers));
                let tell = Rc::clone(tell);
                glommio::spawn_local(async move {
                    let result = carry_out(&file, io).await;
                    answers.borrow_mut().push_back((tag, result));
                    // Nobody listens only if the run has failed.
                    let _ = tell.try_send(());
                })
                .detach();
            }
            while answers.borrow().is_empty() {
                // News of answers that were taken already may be left.
                news.recv().await.context("glommio: a task is left")?;
            }
            for (tag, result) in answers.borrow_mut().drain(..) {
                let io = ios.get_mut(tag as usize).and_then(Option::take);
                let io = io.context("an answer to no request")?;
                let moved = result.with_context(|| format!("glommio: {io:?}"))?;
                ensure!(
                    moved == io.length() as usize,
                    "glommio: {io:?} moved {moved}"
                );
                done.push(tag);
            }
            Ok(())
        })
    }
}

/// Buffers are made for each request: glommio gives them out of memory that it has registered.
async fn carry_out(file: &DmaFile, io: Io) -> io::Result<usize> {
    match io {
        Io::Read { offset, length } => {
            let read = file.read_at_aligned(offset, length as usize).await?;
            Ok(read.len())
        }
        Io::Write { offset, length } => {
            let mut buffer = file.alloc_dma_buffer(length as usize);
            buffer.as_bytes_mut().fill(0x5A);
            Ok(file.write_at(buffer, offset).await?)
        }
        Io::Flush { .. } => {
            file.fdatasync().await?;
            Ok(0)
        }
    }
}
