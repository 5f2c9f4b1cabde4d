//! `hn4-replicad quickstart`: two real daemons, real files, real kills, a table of what was lost.
//!
//! Nothing is simulated: the daemons are child processes of this program's own executable, clients
//! talk NBD to their sockets, and processes die by SIGKILL. That the machine goes on running means
//! that a power cut is not shown here; the tests do that.
//!
//! The volume has two parts: a file system image that is written once and compared at the end, and
//! behind it a part for random writes whose every sector an [`oracle`] knows. One volume rather
//! than two, so that the promise about prefixes spans both.

pub mod image;
pub mod load;
pub mod oracle;
pub mod rig;
mod show;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hn4_engine::device::create_preallocated;
use nix::sys::statvfs::statvfs;
use tokio::signal::unix::{SignalKind, signal};

use self::image::Image;
use self::load::{Load, LoadPlan, SharedOracle, check, lock};
use self::oracle::{Oracle, SECTOR_BYTES};
use self::rig::{Node, Plan, VOLUME, make_nodes, quiesce_and_compare};
use self::show::Bar;
use crate::control::Request;

const IMAGE_MIB: u64 = 256;
const LOAD_MIB: u64 = 32;
/// Image twice, two backings, two logs.
const SPACE_MIB: u64 = 4 * IMAGE_MIB + 2 * LOAD_MIB + 2 * LOG_MIB + 64;
const LOG_MIB: u64 = 128;
const LIMIT: Duration = Duration::from_secs(60);
/// Requests that are answered before a kill.
const REQUESTS: u64 = 4000;

/// How to run the quickstart.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Options {
    /// Folder for volumes and logs, new or empty; on a disk, not in memory. By default a temporary
    /// one beside the executable or in TMPDIR.
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// Leave everything there, to look at and to go on with.
    #[arg(long)]
    pub keep: bool,
}

/// Removes the folder at the end, unless it is to be kept.
struct Folder {
    path: PathBuf,
    keep: bool,
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !self.keep {
            // What cannot be removed stays; the outcome of the run is what counts.
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

/// What was measured.
#[derive(Default)]
struct Figures {
    upload: Duration,
    recovery: Duration,
    replayed_epochs: u64,
    replica_recovery: Duration,
    catch_up: Duration,
    promotion: Duration,
    missing_unanswered: u64,
    missing_answered: u64,
    hash: String,
    image: String,
}

/// Runs it.
///
/// # Errors
/// If anything that was promised does not hold, or the machine cannot run it.
pub fn run(options: &Options) -> Result<()> {
    let started = Instant::now();
    let folder = Folder {
        path: choose_folder(options)?,
        keep: options.keep,
    };
    clean_up_on_signals(&folder)?;
    let program = std::env::current_exe().context("finding this program")?;
    let mut nodes = prepare(&folder.path, &program)?;
    let [alpha, beta] = nodes.as_mut_slice() else {
        bail!("two nodes are needed")
    };
    let mut story = Story {
        folder: &folder.path,
        alpha,
        beta,
        oracle: Arc::new(Mutex::new(Oracle::new(1, sectors(LOAD_MIB)))),
        figures: Figures::default(),
        round: 0,
    };
    let image = story.write_image()?;
    story.kill_primary()?;
    story.kill_replica()?;
    story.compare_copies()?;
    story.lose_primary(&image)?;
    let counts = lock(&story.oracle).counts();
    show::table(&story.figures, &counts, started.elapsed());
    let missing = story.figures.missing_answered;
    ensure!(
        missing == 0,
        "{missing} writes that two nodes had acknowledged are gone"
    );
    if options.keep {
        show::how_to_go_on(&program, story.alpha, story.beta);
    }
    Ok(())
}

fn sectors(mib: u64) -> usize {
    usize::try_from((mib << 20) / SECTOR_BYTES).expect("a constant")
}

/// Finds a folder on a disk that can do direct writes and whose flush is worth something.
fn choose_folder(options: &Options) -> Result<PathBuf> {
    if let Some(folder) = &options.dir {
        std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        let folder = folder.canonicalize()?;
        let mut entries = std::fs::read_dir(&folder)?;
        ensure!(
            entries.next().is_none(),
            "{} is not empty; name another",
            folder.display()
        );
        is_fit(&folder)?;
        return Ok(folder);
    }
    let beside = std::env::current_exe().ok();
    let beside = beside.as_deref().and_then(Path::parent).map(Path::to_owned);
    let places = beside
        .into_iter()
        .chain([std::env::temp_dir(), PathBuf::from("/var/tmp")]);
    let mut why = Vec::new();
    for place in places {
        let folder = place.join(format!("hn4-quickstart-{}", std::process::id()));
        let result = std::fs::create_dir(&folder).map_err(anyhow::Error::from);
        match result.and_then(|()| is_fit(&folder)) {
            Ok(()) => return Ok(folder),
            Err(error) => why.push(format!("{}: {error:#}", place.display())),
        }
        // It was made for this and is empty.
        let _ = std::fs::remove_dir_all(&folder);
    }
    bail!(
        "no folder is fit for the quickstart; name one with --dir:\n  {}",
        why.join("\n  ")
    )
}

fn is_fit(folder: &Path) -> Result<()> {
    let probe = folder.join("probe");
    create_preallocated(&probe, 4096, false)?;
    std::fs::remove_file(&probe)?;
    let space = statvfs(folder)?;
    let free_mib = (space.blocks_available() * space.fragment_size()) >> 20;
    ensure!(
        free_mib > SPACE_MIB,
        "{SPACE_MIB} MiB are needed, {free_mib} are free"
    );
    Ok(())
}

/// Leaves nothing behind when it is interrupted; the daemons end with their parent.
fn clean_up_on_signals(folder: &Folder) -> Result<()> {
    let path = (!folder.keep).then(|| folder.path.clone());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (mut interrupt, mut terminate) = {
        let _entered = runtime.enter();
        (
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
        )
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        if let Some(path) = path {
            // Whatever remains is named by the path that was printed.
            let _ = std::fs::remove_dir_all(path);
        }
        std::process::exit(130);
    });
    Ok(())
}

fn prepare(folder: &Path, program: &Path) -> Result<Vec<Node>> {
    println!("Everything is in {}\n", folder.display());
    show::step("Certificates, logs and volumes for two nodes, alpha and beta");
    let plan = Plan {
        size_mib: IMAGE_MIB + LOAD_MIB,
        log_mib: LOG_MIB,
        overlay_mib: 96,
        ..Plan::default()
    };
    let mut nodes = make_nodes(folder, program, &plan)?;
    show::step(
        "Two daemons on loopback, QUIC between them; ack = \"durable\": flushes wait for both",
    );
    for node in &mut nodes {
        node.start()?;
    }
    nodes[0].wait_for_peer(LIMIT)?;
    nodes[1].wait_for("be seeded", LIMIT, |report| {
        use crate::control::api::CopyReport;
        report
            .state
            .as_ref()
            .is_some_and(|state| state.copy == CopyReport::Usable)
    })?;
    Ok(nodes)
}

struct Story<'a> {
    folder: &'a Path,
    alpha: &'a mut Node,
    beta: &'a mut Node,
    oracle: SharedOracle,
    figures: Figures,
    round: u64,
}

impl Story<'_> {
    const LOAD_OFFSET: u64 = IMAGE_MIB << 20;

    fn write_image(&mut self) -> Result<Image> {
        let image = image::make(self.folder, IMAGE_MIB, 7)?;
        match image.files {
            Some(files) => show::step(&format!("An ext4 image of {IMAGE_MIB} MiB, {files} files")),
            None => show::step(&format!(
                "mkfs.ext4 is not installed: a pattern of {IMAGE_MIB} MiB instead of a file system"
            )),
        }
        let started = Instant::now();
        let mut bar = Bar::new("   writing it over NBD", image.bytes);
        image.upload(&mut self.alpha.client()?, |done| bar.at(done))?;
        bar.end();
        self.figures.upload = started.elapsed();
        Ok(image)
    }

    fn load(&mut self) -> Result<Load> {
        self.round += 1;
        let plan = LoadPlan {
            offset: Self::LOAD_OFFSET,
            ..LoadPlan::mixed(self.round)
        };
        Load::start(self.alpha, &self.oracle, plan)
    }

    /// Counts what is missing, and goes on from what is there.
    fn look(&mut self, node_is_alpha: bool) -> Result<()> {
        let node = if node_is_alpha {
            &*self.alpha
        } else {
            &*self.beta
        };
        let seen = check(node, &self.oracle, Self::LOAD_OFFSET)?;
        self.figures.missing_answered += seen.missing_completed;
        self.figures.missing_unanswered += seen.missing - seen.missing_completed;
        lock(&self.oracle).settle(&seen);
        Ok(())
    }

    fn kill_primary(&mut self) -> Result<()> {
        show::step(
            "Random writes, flushes and TRIMs over six connections; SIGKILL for alpha in mid-load",
        );
        let load = self.load()?;
        load.wait_for_progress(REQUESTS, LIMIT)?;
        self.alpha.kill()?;
        load.was_cut()?;
        let started = Instant::now();
        let state = self.alpha.start()?;
        self.alpha.client()?.read(0, 4096)?;
        self.figures.recovery = started.elapsed();
        self.figures.replayed_epochs = state.recovery.replayed_epochs;
        self.look(true)?;
        show::fact(&format!(
            "serves again after {}, {} epochs read back from its log; every flushed write is there",
            show::time(self.figures.recovery),
            state.recovery.replayed_epochs
        ));
        Ok(())
    }

    fn kill_replica(&mut self) -> Result<()> {
        show::step("The load goes on; SIGKILL for beta");
        let load = self.load()?;
        load.wait_for_progress(REQUESTS, LIMIT)?;
        self.beta.kill()?;
        let before = load.answered();
        self.alpha
            .wait_for("notice that beta is gone", LIMIT, |report| {
                report.peers.iter().all(|peer| !peer.live)
            })?;
        let blocked = load.answered();
        show::fact(&format!(
            "clients wait: nothing is acknowledged that only one node has ({} answers since)",
            blocked - before
        ));
        let started = Instant::now();
        self.beta.start()?;
        self.figures.replica_recovery = started.elapsed();
        self.alpha.wait_for_peer(LIMIT)?;
        load.wait_for_progress(1, LIMIT)?;
        self.figures.catch_up = started.elapsed();
        show::fact(&format!(
            "beta is back after {}, follows again after {}, and the clients go on",
            show::time(self.figures.replica_recovery),
            show::time(self.figures.catch_up)
        ));
        load.wait_for_progress(REQUESTS, LIMIT)?;
        load.stop()
    }

    fn compare_copies(&mut self) -> Result<()> {
        show::step("Quiet: both nodes write everything back, the backing files are compared");
        self.figures.hash = quiesce_and_compare(self.alpha, self.beta, LIMIT)?;
        show::fact(&format!("b3sum of both: {}", self.figures.hash));
        Ok(())
    }

    fn lose_primary(&mut self, image: &Image) -> Result<()> {
        show::step("Load again; alpha is killed for good, beta is promoted");
        let load = self.load()?;
        load.wait_for_progress(REQUESTS, LIMIT)?;
        self.alpha.kill()?;
        load.was_cut()?;
        let started = Instant::now();
        self.beta.ask(&Request::Promote {
            volume: VOLUME.to_owned(),
            accept_loss: false,
        })?;
        self.beta.client()?.read(0, 4096)?;
        self.figures.promotion = started.elapsed();
        self.look(false)?;
        self.figures.image = image.compare(&mut self.beta.client()?, self.folder)?;
        show::fact(&format!(
            "beta serves after {}; every flushed write is there; the image: {}",
            show::time(self.figures.promotion),
            self.figures.image
        ));
        Ok(())
    }
}
