//! A disk image worth keeping: an ext4 file system full of files, or, where `mkfs.ext4` is missing,
//! a pattern of which every block can be checked.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use hn4_engine::nbd::client::{Client, Submit};

use super::load::{Random, fetch};

/// Bytes of one write.
const PIECE_BYTES: usize = 1 << 20;
/// Writes in flight.
const DEPTH: usize = 16;

/// An image file.
#[derive(Clone, Debug)]
pub struct Image {
    /// Where it is.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// It is a file system with so many files; `None`: it is a pattern.
    pub files: Option<usize>,
    /// BLAKE3 of it.
    pub hash: blake3::Hash,
}

/// A program in `PATH`, or where system programs are that ordinary users have not in theirs.
#[must_use]
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    folders
        .map(|folder| folder.join(name))
        .find(|program| program.is_file())
}

/// Makes an image of so many MiB.
///
/// # Errors
/// If there is no space, or `mkfs.ext4` fails.
pub fn make(folder: &Path, mib: u64, seed: u64) -> Result<Image> {
    let path = folder.join("image");
    let bytes = mib << 20;
    let files = match find_program("mkfs.ext4") {
        Some(program) => Some(make_ext4(&program, folder, &path, mib, seed)?),
        None => {
            make_pattern(&path, bytes, seed)?;
            None
        }
    };
    ensure!(
        path.metadata()?.len() == bytes,
        "the image has a wrong size"
    );
    let hash = blake3::Hasher::new()
        .update_reader(File::open(&path)?)?
        .finalize();
    Ok(Image {
        path,
        bytes,
        files,
        hash,
    })
}

/// Fills two thirds of a file system with files of many sizes.
fn make_ext4(program: &Path, folder: &Path, image: &Path, mib: u64, seed: u64) -> Result<usize> {
    let tree = folder.join("tree");
    let mut random = Random::new(seed);
    let (mut left, mut files) = ((mib << 20) / 3 * 2, 0);
    let mut contents = vec![0; 4 << 20];
    contents
        .chunks_mut(8)
        .for_each(|part| part.copy_from_slice(&random.draw().to_le_bytes()));
    while left > 0 {
        let place = tree.join(format!("folder-{}", files / 24));
        std::fs::create_dir_all(&place)?;
        let largest = 1 << (8 + random.below(15));
        let length = (1 + random.below(largest)).min(left);
        let length = usize::try_from(length)?.min(contents.len());
        let start = usize::try_from(random.below((contents.len() - length + 1) as u64))?;
        std::fs::write(
            place.join(format!("file-{files}")),
            &contents[start..start + length],
        )?;
        left -= length as u64;
        files += 1;
    }
    let output = Command::new(program)
        .args([
            "-q",
            "-F",
            "-b",
            "4096",
            "-E",
            "lazy_itable_init=0,lazy_journal_init=0",
            "-d",
        ])
        .args([&tree, image])
        .arg(format!("{mib}M"))
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("running {}", program.display()))?;
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{}: {}: {words}",
        program.display(),
        output.status
    );
    std::fs::remove_dir_all(&tree)?;
    Ok(files)
}

fn make_pattern(path: &Path, bytes: u64, seed: u64) -> Result<()> {
    let mut random = Random::new(seed);
    let mut piece = vec![0; PIECE_BYTES];
    let mut image = Vec::with_capacity(usize::try_from(bytes)?);
    for _ in 0..bytes / PIECE_BYTES as u64 {
        piece
            .chunks_mut(8)
            .for_each(|part| part.copy_from_slice(&random.draw().to_le_bytes()));
        image.extend_from_slice(&piece);
    }
    std::fs::write(path, image).context("writing the image")
}

impl Image {
    /// Writes it to the start of the volume and flushes; tells how many bytes are done.
    ///
    /// # Errors
    /// If the server refuses or the connection breaks.
    pub fn upload(&self, client: &mut Client, mut progress: impl FnMut(u64)) -> Result<()> {
        let mut file = File::open(&self.path)?;
        let mut piece = vec![0; PIECE_BYTES];
        let (mut offset, mut done) = (0, 0);
        while done < self.bytes {
            while offset < self.bytes && client.in_flight() < DEPTH {
                file.read_exact(&mut piece)?;
                let request = if piece.iter().all(|&byte| byte == 0) {
                    let length = u32::try_from(PIECE_BYTES)?;
                    Submit::WriteZeroes {
                        offset,
                        length,
                        fua: false,
                        no_hole: false,
                    }
                } else {
                    Submit::Write {
                        offset,
                        data: &piece,
                        fua: false,
                    }
                };
                client.submit(request)?;
                offset += PIECE_BYTES as u64;
            }
            client.next_reply()?.result?;
            done += PIECE_BYTES as u64;
            progress(done);
        }
        Ok(client.flush()?)
    }

    /// Compares what the volume holds with the image, and lets `e2fsck` look at it if it is there.
    /// Gives what was checked, in words.
    ///
    /// # Errors
    /// If a byte differs, or the file system is damaged.
    pub fn compare(&self, client: &mut Client, folder: &Path) -> Result<String> {
        let found = fetch(client, 0, self.bytes)?;
        if blake3::hash(&found) != self.hash {
            let image = std::fs::read(&self.path)?;
            let at = image
                .iter()
                .zip(&found)
                .position(|(a, b)| a != b)
                .unwrap_or(image.len());
            bail!("the image on the volume differs from byte {at} on");
        }
        let same = format!("{} MiB are byte for byte the same", self.bytes >> 20);
        if self.files.is_none() {
            return Ok(same);
        }
        let Some(program) = find_program("e2fsck") else {
            return Ok(format!("{same}; e2fsck is not installed"));
        };
        let copy = folder.join("image.found");
        std::fs::write(&copy, &found)?;
        let output = Command::new(&program)
            .args(["-f", "-n"])
            .arg(&copy)
            .output()?;
        let words = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "e2fsck found damage: {words}");
        std::fs::remove_file(&copy)?;
        Ok(format!("{same}; e2fsck finds no fault"))
    }
}
