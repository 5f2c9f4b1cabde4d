//! Other runtimes for io_uring as targets: what each costs on a raw file, with the same load.
//!
//! Each is behind a feature of this crate, so that a build without them knows nothing of them:
//! `cargo build --release -p hn4-bench --features tokio-uring,glommio`. A runtime that fails on
//! this kernel ends the run, and the error has its errno.
//!
//! **Not here:** `verify`, and more than one clone on one thread.

#[cfg(feature = "glommio")]
mod glommio;
#[cfg(feature = "tokio-uring")]
mod tokio;

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::Result;
#[cfg(not(all(feature = "tokio-uring", feature = "glommio")))]
use anyhow::bail;

use crate::job::Job;
use crate::target::Lane;

/// A runtime.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Runtime {
    /// The crate `tokio-uring`.
    TokioUring,
    /// The crate `glommio`.
    Glommio,
}

impl Runtime {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::TokioUring, Self::Glommio];

    /// What a target of it starts with, and the feature's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::TokioUring => "tokio-uring",
            Self::Glommio => "glommio",
        }
    }

    /// Whether this program was built with it.
    #[must_use]
    pub fn is_built_in(self) -> bool {
        match self {
            Self::TokioUring => cfg!(feature = "tokio-uring"),
            Self::Glommio => cfg!(feature = "glommio"),
        }
    }
}

impl fmt::Display for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A file or device, by way of a runtime.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Baseline {
    /// The runtime.
    pub runtime: Runtime,
    /// The file or device.
    pub path: PathBuf,
}

impl Baseline {
    /// What `--target` says, if it names a runtime.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let named = |runtime: &Runtime| {
            let path = text.strip_prefix(runtime.name())?.strip_prefix(':')?;
            Some(Self {
                runtime: *runtime,
                path: PathBuf::from(path),
            })
        };
        Runtime::ALL.iter().find_map(named)
    }

    /// A way to it for the calling thread.
    ///
    /// # Errors
    /// If the feature is missing, or the runtime or the kernel refuses.
    pub fn lane(&self, job: &Job) -> Result<Box<dyn Lane>> {
        anyhow::ensure!(!job.verify, "verify works with raw:, nbd: and engine: only");
        open(self.runtime, &self.path, job)
    }
}

fn open(runtime: Runtime, path: &Path, job: &Job) -> Result<Box<dyn Lane>> {
    #[cfg(not(any(feature = "tokio-uring", feature = "glommio")))]
    let _ = (path, job);
    match runtime {
        #[cfg(feature = "tokio-uring")]
        Runtime::TokioUring => Ok(Box::new(tokio::TokioLane::open(path, job)?)),
        #[cfg(feature = "glommio")]
        Runtime::Glommio => Ok(Box::new(glommio::GlommioLane::open(path, job)?)),
        #[cfg(not(all(feature = "tokio-uring", feature = "glommio")))]
        _ => bail!(
            "this program was built without {runtime}: \
             cargo build --release -p hn4-bench --features {runtime}"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::make_file;
    use crate::job::JobFile;

    #[test]
    fn a_target_names_its_runtime() {
        let found = Baseline::parse("glommio:/dev/sdz").expect("a runtime");
        assert_eq!(found.runtime, Runtime::Glommio);
        assert_eq!(found.path, PathBuf::from("/dev/sdz"));
        assert_eq!(Baseline::parse("raw:/dev/sdz"), None);
        assert_eq!(Baseline::parse("glommio/dev/sdz"), None);
    }

    #[test]
    fn each_runtime_that_is_built_in_runs_a_job_or_names_its_errno() {
        let folder = crate::test_folder();
        let folder = tempfile::tempdir_in(folder).expect("a folder");
        let path = folder.path().join("file");
        make_file(&path, 4 << 20).expect("a file");
        let text = "[a]\nrw=randrw\nbs=4k\niodepth=8\nfsync=16\n";
        let jobs = JobFile::parse(text).expect("a job").jobs;
        for runtime in Runtime::ALL {
            let target = format!("{runtime}:{}", path.display());
            let target = target.parse().expect("a target");
            let target = crate::target::Target::open(&target).expect("a target");
            let outcome = crate::drive::run(&jobs, &target, None);
            match outcome {
                Ok(outcomes) => {
                    assert!(runtime.is_built_in());
                    assert_eq!(outcomes[0].stats[0].ios(), 1024, "{runtime}");
                }
                Err(error) if runtime.is_built_in() => {
                    let text = format!("{error:#}");
                    assert!(text.contains("os error"), "{runtime}: {text}");
                    println!("{runtime}: {text}");
                }
                Err(error) => assert!(format!("{error:#}").contains("built without")),
            }
        }
    }
}
