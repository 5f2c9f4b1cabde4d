//! A tree whose files cannot be removed, or not be made.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use hn4::types::{BlockIndex, ChainHash, VolumeId};
use hn4_engine::core::event::Damaged;
use hn4_proof::blocks::{self, BLOCK};
use hn4_proof::sign::Algorithm;
use tempfile::TempDir;

use super::*;

const BLOCKS: u64 = 64;
/// Slices and portions of work until any tree of so few blocks is built.
const STEPS: u32 = 100;
const VOLUME: VolumeId = VolumeId([3; 16]);

/// A tree without a thread, and what it has said.
struct Bench {
    root: TempDir,
    worker: Worker,
    from: mpsc::UnboundedReceiver<FromTree>,
}

fn at(epoch: u64) -> Tip {
    Tip {
        epoch: Epoch(epoch),
        chain: ChainHash::default(),
    }
}

impl Bench {
    fn new() -> Self {
        let root = tempfile::tempdir().expect("a directory");
        fs::write(root.path().join("backing"), vec![1; BLOCK * 64]).expect("a backing");
        Self::with(root)
    }

    fn with(root: TempDir) -> Self {
        let (outbox, from) = mpsc::unbounded_channel();
        let state_dir = root.path().to_owned();
        let setup = TreeSetup {
            name: "vol0".to_owned(),
            state_dir: state_dir.clone(),
            backing: state_dir.join("backing"),
            identity: LogIdentity {
                volume: VOLUME,
                birth_nonce: [4; 16],
                size_bytes: BLOCKS * BLOCK_BYTES,
                sector_bytes: 512,
            },
            node: NodeId([5; 16]),
            ledger: LocalLedger {
                state_dir,
                algorithms: vec![Algorithm::MlDsa65],
            },
            rate: u64::MAX,
            verify_interval_h: 0,
            checks_reads: false,
        };
        let worker = Worker::new(setup, Arc::default(), outbox);
        Self { root, worker, from }
    }

    fn restarted(self) -> Self {
        Self::with(self.root)
    }

    fn folder(&self) -> PathBuf {
        Files::folder(self.root.path(), VOLUME)
    }

    fn aside(&self) -> PathBuf {
        self.root.path().join("aside")
    }

    /// The file system with the tree's files fails.
    fn breaks(&self) {
        fs::rename(self.folder(), self.aside()).expect("moved away");
        fs::write(self.folder(), "").expect("something in its place");
    }

    /// It is there again, with all that it held.
    fn recovers(&self) {
        fs::remove_file(self.folder()).expect("removed");
        fs::rename(self.aside(), self.folder()).expect("moved back");
    }

    fn write(&self, block: u64, byte: u8) {
        let backing = OpenOptions::new()
            .write(true)
            .open(&self.worker.setup.backing);
        let backing = backing.expect("a backing");
        let offset = block * BLOCK_BYTES;
        backing
            .write_all_at(&[byte; BLOCK], offset)
            .expect("written");
    }

    fn work(&mut self, work: TreeWork) {
        self.worker.take(TreeFeed::Work(work));
    }

    /// Time passes until everything is done that is to be done.
    fn settle(&mut self) {
        for _ in 0..STEPS {
            let now = Instant::now();
            (self.worker.next_slice, self.worker.next_work) = (now, now);
            self.worker.work_on();
        }
    }

    /// The pause is over after which a tree that was given up is tried again.
    fn retry(&mut self) {
        assert!(self.worker.retry.is_some(), "it was given up");
        self.worker.retry = Some(Instant::now());
        self.settle();
    }

    /// What the core was told.
    fn told(&mut self) -> Vec<TreeEvent> {
        let mut told = Vec::new();
        while let Ok(word) = self.from.try_recv() {
            if let FromTree::Core(event) = word {
                told.push(event);
            }
        }
        told
    }

    fn leaf(&self, block: u64) -> Digest {
        let tree = self.worker.tree.as_ref().expect("a tree");
        assert_eq!(tree.keeper.to_build(), None);
        let leaves = tree.keeper.leaves(block..block + 1).expect("leaves");
        leaves[0]
    }
}

#[test]
fn a_survey_that_could_not_be_removed_is_not_believed_when_its_files_are_there_again() {
    let mut bench = Bench::new();
    let (at, anew) = (at(7), false);
    bench.work(TreeWork::Survey { at, anew });
    bench.settle();
    assert_eq!(bench.told().last(), Some(&TreeEvent::Surveyed(true)));
    bench.breaks();
    bench.work(TreeWork::Discard);
    assert_eq!(bench.told(), [TreeEvent::Discarded]);
    bench.write(3, 2);
    bench.work(TreeWork::Survey { at, anew: true });
    assert_eq!(bench.told(), [TreeEvent::Surveyed(false)]);
    bench.recovers();
    bench.retry();
    assert_eq!(bench.told().last(), Some(&TreeEvent::Surveyed(true)));
    assert_eq!(bench.leaf(3), blocks::leaf(&[2; BLOCK]));
}

#[test]
fn after_three_surveys_that_failed_nobody_is_to_wait_for_one() {
    let mut bench = Bench::new();
    fs::create_dir(bench.root.path().join("tree")).expect("a folder");
    fs::write(bench.folder(), "").expect("no room for another");
    let anew = false;
    bench.work(TreeWork::Survey { at: at(7), anew });
    assert_eq!(bench.told(), [TreeEvent::Surveyed(false)]);
    bench.retry();
    assert_eq!(bench.told(), [TreeEvent::Surveyed(false)]);
    bench.retry();
    assert_eq!(bench.told(), [TreeEvent::NoSurvey]);
    let shown = bench.worker.state.notice.as_ref().expect("a notice");
    assert!(
        shown.contains("number 3 in a row, and all of the full copy"),
        "{shown}"
    );
    // Whoever has made room need not restart anything.
    fs::remove_file(bench.folder()).expect("removed");
    bench.retry();
    assert_eq!(bench.told().last(), Some(&TreeEvent::Surveyed(true)));
}

#[test]
fn damage_is_not_forgotten_with_a_tree_that_was_given_up_and_could_not_be_removed() {
    let mut bench = Bench::new();
    let (at, settled, anew) = (at(7), Epoch(7), false);
    bench.work(TreeWork::Start { at, settled, anew });
    bench.settle();
    bench.write(3, 2);
    bench.worker.asked = true;
    bench.settle();
    let bad = TreeEvent::Damage(BlockIndex(3), Some(Damaged::Sought));
    assert!(bench.told().contains(&bad));
    let mut bench = bench.restarted();
    bench.breaks();
    bench.work(TreeWork::Start { at, settled, anew });
    assert!(bench.told().is_empty(), "nothing can be read");
    bench.recovers();
    bench.retry();
    assert!(bench.told().contains(&bad));
    assert_ne!(bench.leaf(3), blocks::leaf(&[2; BLOCK]));
}
