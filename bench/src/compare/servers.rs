//! Servers of the comparison: started here, on unix sockets, and stopped here.
//!
//! **Invariant:** a server does not outlive its [`Server`]. Where setpriv(1) is there, it does not
//! outlive this program either, however that ends.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::rows::Peer;
use crate::nbd::connect_within;
use crate::slow;
use crate::target::NbdUri;

/// A server that does not serve by then never will.
const START_LIMIT: Duration = Duration::from_secs(30);
/// A server that has not ended by then is killed.
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// Between two looks at something that is waited for.
const LOOK: Duration = Duration::from_millis(5);

/// The name of our volume.
const VOLUME: &str = "bench";

/// MiB of each file and export, of our overlay and of our log: in a whole comparison, and in a
/// quick one.
pub const SIZES: [[u64; 3]; 2] = [[1024, 512, 2048], [256, 256, 512]];

/// Where everything is, and how large.
#[derive(Debug)]
pub struct Place {
    /// Data, on the disk that is measured.
    pub data: PathBuf,
    /// Sockets: their names must be short.
    pub sockets: PathBuf,
    /// Size of each file and export.
    pub size_mib: u64,
    /// Memory of our overlay.
    pub overlay_mib: u64,
    /// Size of our log.
    pub log_mib: u64,
    /// hn4-replicad.
    pub daemon: PathBuf,
}

/// Looks a program up in PATH and where systems keep theirs.
#[must_use]
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).collect::<Vec<_>>();
    let usual = ["/usr/sbin", "/usr/bin", "/sbin"].map(PathBuf::from);
    let all = folders.into_iter().chain(usual);
    all.map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

/// What a peer needs and is not there.
#[must_use]
pub fn missing(peer: Peer, place: &Place) -> Option<String> {
    let program = match peer {
        Peer::Ours => {
            let there = place.daemon.is_file() && place.control().is_file();
            return (!there).then(|| {
                let daemon = place.daemon.display();
                format!("{daemon} or hn4ctl beside it: build them, or name one with --daemon")
            });
        }
        Peer::Qemu => "qemu-storage-daemon",
        Peer::NbdkitFile | Peer::NbdkitMemory => "nbdkit",
        Peer::NbdServer => "nbd-server",
        Peer::Fio | Peer::SlowFio => "fio",
        Peer::SlowEngine => "nbdfuse",
        Peer::Engine | Peer::Ring => return None,
    };
    let slow = matches!(peer, Peer::SlowEngine | Peer::SlowFio);
    let delayer = slow.then(slow::missing_tool).flatten();
    let gone = delayer.or_else(|| find_program(program).is_none().then_some(program))?;
    Some(format!("{gone} is not installed"))
}

impl Place {
    fn control(&self) -> PathBuf {
        self.daemon.with_file_name("hn4ctl")
    }

    /// The file that a peer works on.
    #[must_use]
    pub fn file(&self, peer: Peer) -> PathBuf {
        self.data.join(match peer {
            Peer::Ours => "ours/backing",
            Peer::Qemu => "qemu.img",
            Peer::NbdkitFile | Peer::NbdkitMemory => "nbdkit.img",
            Peer::NbdServer => "nbd-server.img",
            Peer::Engine => "engine",
            Peer::Ring | Peer::Fio => "raw.img",
            Peer::SlowEngine => "slow-engine",
            Peer::SlowFio => "slow.img",
        })
    }

    fn config(&self) -> PathBuf {
        self.data.join("ours/config.toml")
    }

    fn socket(&self, peer: Peer) -> PathBuf {
        self.sockets.join(match peer {
            Peer::Ours => "ours.sock",
            Peer::Qemu => "qemu.sock",
            Peer::NbdServer => "nbd-server.sock",
            _ => "nbdkit.sock",
        })
    }

    /// Writes our configuration, for the next start. Data that `rests` stays in the overlay; else
    /// it is written back when it should be.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn configure_ours(&self, rests: bool) -> Result<()> {
        let text = format!(
            "[node]\nname = \"bench\"\nstate_dir = \"state\"\ncontrol_socket = {:?}\n\n\
             [[volume]]\nname = \"{VOLUME}\"\nbacking = \"backing\"\nlog = \"log\"\n\
             listen = [{:?}]\noverlay_mib = {}\ndestage_delay_ms = {}\n",
            self.sockets.join("ctl.sock"),
            format!("unix:{}", self.socket(Peer::Ours).display()),
            self.overlay_mib,
            if rests { 3_600_000 } else { 1000 }
        );
        Ok(std::fs::write(self.config(), text)?)
    }

    /// Makes our configuration and volume.
    ///
    /// # Errors
    /// If hn4ctl refuses, most likely because of the file system.
    pub fn create_ours(&self) -> Result<()> {
        std::fs::create_dir_all(self.data.join("ours"))?;
        self.configure_ours(false)?;
        let (size, log) = (self.size_mib.to_string(), self.log_mib.to_string());
        let create = [
            "volume",
            "create",
            VOLUME,
            "--size-mib",
            &size,
            "--log-mib",
            &log,
        ];
        self.hn4ctl(&create).map(drop)
    }

    /// Has our daemon write everything back, and tells how long that took.
    ///
    /// # Errors
    /// If it does not run or refuses.
    pub fn drain_ours(&self) -> Result<Duration> {
        let start = Instant::now();
        self.hn4ctl(&["drain", VOLUME])?;
        Ok(start.elapsed())
    }

    fn hn4ctl(&self, arguments: &[&str]) -> Result<String> {
        let program = self.control();
        let output = Command::new(&program)
            .arg("--config")
            .arg(self.config())
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("starting {}", program.display()))?;
        ensure!(
            output.status.success(),
            "hn4ctl {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// A running server. Killed when dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
    journal: PathBuf,
    peer: Peer,
    /// Where it serves.
    pub uri: NbdUri,
}

impl Server {
    /// Starts a server and waits until it serves.
    ///
    /// # Errors
    /// If it ends instead; the error has its last words.
    pub fn start(peer: Peer, place: &Place) -> Result<Self> {
        let socket = place.socket(peer);
        // A server that was killed leaves its socket.
        if let Err(error) = std::fs::remove_file(&socket)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            return Err(error).context("removing an old socket");
        }
        let export = match peer {
            Peer::Ours | Peer::Qemu | Peer::NbdServer => VOLUME,
            _ => "",
        };
        let journal = place.data.join(format!("{peer:?}.log"));
        let mut command = bound_to_us(command(peer, place, &socket)?);
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&journal)?)
            .spawn()
            .with_context(|| format!("starting {}", peer.label()))?;
        let uri = format!("nbd+unix:///{export}?socket={}", socket.display());
        let mut server = Self {
            child,
            journal,
            peer,
            uri: uri.parse()?,
        };
        if peer.serves_once() {
            server.wait_until_it_listens(&socket)?;
            return Ok(server);
        }
        let uri = server.uri.clone();
        connect_within(&uri, START_LIMIT, || server.check())
            .with_context(|| peer.label())?
            .disconnect()?;
        Ok(server)
    }

    /// Without a connection, which would be its only one.
    fn wait_until_it_listens(&mut self, socket: &Path) -> Result<()> {
        let deadline = Instant::now() + START_LIMIT;
        while !listens(&std::fs::read_to_string("/proc/net/unix")?, socket) {
            self.check()?;
            let label = self.peer.label();
            ensure!(Instant::now() < deadline, "{label}: no server in time");
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn check(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            let words = std::fs::read_to_string(&self.journal).unwrap_or_default();
            let mut last: Vec<&str> = words.lines().rev().take(5).collect();
            last.reverse();
            bail!(
                "{} ended ({status}): {}",
                self.peer.label(),
                last.join("\n")
            );
        }
        Ok(())
    }

    /// SIGTERM, and the end of the process.
    ///
    /// # Errors
    /// If it does not end in time; it is killed then.
    pub fn stop(mut self) -> Result<()> {
        let pid = i32::try_from(self.pid()).context("a process id")?;
        kill(Pid::from_raw(pid), Signal::SIGTERM)?;
        let deadline = Instant::now() + STOP_LIMIT;
        while self.child.try_wait()?.is_none() {
            ensure!(
                Instant::now() < deadline,
                "{} does not stop within {STOP_LIMIT:?}",
                self.peer.label()
            );
            std::thread::sleep(LOOK);
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail only if it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether somebody listens on a unix socket, by the kernel's list of them.
fn listens(list: &str, socket: &Path) -> bool {
    let is_it = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        // Only sockets that listen have this bit, `__SO_ACCEPTCON`.
        let flags = fields
            .nth(3)
            .and_then(|it| u32::from_str_radix(it, 16).ok());
        let name = fields.nth(3).map(Path::new);
        name == Some(socket) && flags.is_some_and(|flags| flags & 0x1_0000 != 0)
    };
    list.lines().any(is_it)
}

fn command(peer: Peer, place: &Place, socket: &Path) -> Result<Command> {
    let program = |name: &str| {
        find_program(name)
            .map(Command::new)
            .with_context(|| format!("{name} is not installed"))
    };
    let file = place.file(peer);
    Ok(match peer {
        Peer::Ours => {
            let mut command = Command::new(&place.daemon);
            command.args(["run", "--config"]).arg(place.config());
            command
        }
        Peer::Qemu => {
            let mut command = program("qemu-storage-daemon")?;
            command.arg("--blockdev").arg(format!(
                "driver=file,node-name=disk,filename={},cache.direct=on,aio=io_uring",
                file.display()
            ));
            let server = format!("addr.type=unix,addr.path={}", socket.display());
            command.args(["--nbd-server", &server, "--export"]);
            command.arg(format!(
                "type=nbd,id=export,node-name=disk,name={VOLUME},writable=on"
            ));
            command
        }
        Peer::NbdkitFile | Peer::NbdkitMemory => {
            let mut command = program("nbdkit")?;
            command.args(["-f", "--exit-with-parent", "-U"]).arg(socket);
            if peer == Peer::NbdkitFile {
                command.arg("file").arg(file);
            } else {
                command.arg("memory").arg(format!("{}M", place.size_mib));
            }
            command
        }
        Peer::NbdServer => {
            let config = place.data.join("nbd-server.conf");
            let text = format!(
                "[generic]\nunixsock = {}\n[{VOLUME}]\nexportname = {}\nfilesize = {}\n\
                 flush = true\nfua = true\n",
                socket.display(),
                file.display(),
                place.size_mib << 20
            );
            std::fs::write(&config, text)?;
            let mut command = program("nbd-server")?;
            command.args(["-d", "-C"]).arg(config);
            command
        }
        Peer::Engine | Peer::Ring | Peer::Fio | Peer::SlowEngine | Peer::SlowFio => {
            bail!("{} is no server", peer.label())
        }
    })
}

/// The same command, killed by the kernel when this program ends.
fn bound_to_us(command: Command) -> Command {
    let Some(setpriv) = find_program("setpriv") else {
        return command;
    };
    let mut bound = Command::new(setpriv);
    bound
        .args(["--pdeathsig", "KILL"])
        .arg(command.get_program());
    bound.args(command.get_args());
    bound
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_that_was_left_behind_or_is_only_connected_does_not_listen() {
        let list = "Num       RefCount Protocol Flags    Type St Inode Path\n\
                    0000000096528071: 00000002 00000000 00010000 0001 01 24403 /tmp/a.sock\n\
                    0000000096528072: 00000003 00000000 00000000 0001 03 24404 /tmp/b.sock\n\
                    0000000096528073: 00000003 00000000 00000000 0001 03 24405\n";
        assert!(listens(list, Path::new("/tmp/a.sock")));
        for other in ["/tmp/b.sock", "/tmp/c.sock", "/tmp/a.soc"] {
            assert!(!listens(list, Path::new(other)), "{other}");
        }
    }
}
