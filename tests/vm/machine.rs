//! A virtual machine under QEMU: a Debian kernel, the initramfs of `prepare.sh`, disks of all kinds
//! as files of the host, a serial line for commands, and one port that leads to the daemon's.
//!
//! **Invariant:** the machine ends with its [`Machine`]; its disks stay.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use hn4_replicad::quickstart::image::find_program;

use crate::common::disk::wait;
use crate::common::{missing, program, text};

/// Longest silence of the machine: it is emulated, and others work on the host.
const SILENCE: Duration = Duration::from_secs(300);

/// What the volume lies on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Backing {
    /// A namespace of an NVMe controller.
    Nvme,
    /// A SCSI disk that rotates.
    Hdd,
    /// Persistent memory.
    Pmem,
}

impl Backing {
    /// Its name in the machine.
    pub(crate) fn device(self) -> &'static str {
        match self {
            Self::Nvme => "/dev/nvme0n3",
            Self::Hdd => "/dev/sda",
            Self::Pmem => "/dev/pmem0",
        }
    }
}

/// Folder with kernel and initramfs, made once; `None`, said aloud, where that is not possible.
pub(crate) fn prepared() -> Option<&'static Path> {
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    FOLDER.get_or_init(prepare).as_deref()
}

fn prepare() -> Option<PathBuf> {
    let programs = [
        "qemu-system-x86_64",
        "busybox",
        "modprobe",
        "mke2fs",
        "nbd-client",
        "strip",
    ];
    for name in programs {
        if find_program(name).is_none() {
            missing(name);
            return None;
        }
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("vm");
    std::fs::create_dir_all(&folder).expect("a folder");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vm/prepare.sh");
    let output = Command::new("bash")
        .arg(script)
        .arg(&folder)
        .arg(program())
        .arg(program().with_file_name("hn4ctl"))
        .output()
        .expect("bash");
    if !output.status.success() {
        eprintln!("{}", text(&output));
        missing("what the virtual machine boots (tests/vm/prepare.sh)");
        return None;
    }
    Some(folder)
}

/// The disks of a machine, which outlive it.
pub(crate) struct Disks<'a> {
    /// Where their files are.
    pub(crate) folder: &'a Path,
    /// What the volume lies on.
    pub(crate) backing: Backing,
}

impl Disks<'_> {
    /// Makes the files: an ext4 for the daemon's state, a log, a backing.
    pub(crate) fn make(&self, log_mib: u64, backing_mib: u64) {
        for (name, mib) in [("state", 16), ("log", log_mib), ("backing", backing_mib)] {
            std::fs::File::create(self.file(name))
                .and_then(|file| file.set_len(mib << 20))
                .expect("a disk's file");
        }
        let mut mke2fs = Command::new(find_program("mke2fs").expect("looked for before"));
        let status = mke2fs.args(["-q", "-t", "ext4"]).arg(self.file("state"));
        assert!(status.status().expect("mke2fs").success());
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.img"))
    }

    fn arguments(&self) -> Vec<String> {
        let drive = |name: &str| {
            let file = self.file(name).display().to_string();
            format!(
                "if=none,id={name},file={file},format=raw,cache=none,aio=io_uring,discard=unmap"
            )
        };
        let mut all = vec!["-device".to_owned(), "nvme,id=nv,serial=hn4".to_owned()];
        let mut add = |option: &str, value: String| all.extend([option.to_owned(), value]);
        for (name, number) in [("state", 1), ("log", 2)] {
            add("-drive", drive(name));
            add(
                "-device",
                format!("nvme-ns,drive={name},bus=nv,nsid={number}"),
            );
        }
        match self.backing {
            Backing::Nvme => {
                add("-drive", drive("backing"));
                add("-device", "nvme-ns,drive=backing,bus=nv,nsid=3".to_owned());
            }
            Backing::Hdd => {
                add("-drive", drive("backing"));
                add("-device", "virtio-scsi-pci,id=scsi".to_owned());
                // A vendor of its own: that a QEMU disk rotates is not believed.
                let disk = "scsi-hd,drive=backing,bus=scsi.0,rotation_rate=7200,vendor=SPINNING";
                add("-device", disk.to_owned());
            }
            Backing::Pmem => {
                let file = self.file("backing");
                let bytes = std::fs::metadata(&file).expect("made before").len();
                let file = file.display();
                let object =
                    format!("memory-backend-file,id=pm,share=on,mem-path={file},size={bytes}");
                add("-object", object);
                add("-device", "nvdimm,id=nvdimm,memdev=pm".to_owned());
            }
        }
        all
    }
}

/// A running machine.
pub(crate) struct Machine {
    qemu: Child,
    line: BufReader<UnixStream>,
    /// Leads to the daemon's port for NBD.
    pub(crate) nbd: SocketAddr,
}

impl Machine {
    /// Boots. A port that was free may be taken when QEMU gets there: then it tries another one.
    pub(crate) fn boot(prepared: &Path, disks: &Disks<'_>) -> Self {
        for _ in 0..5 {
            let mut machine = Self::start(prepared, disks);
            while let Some(line) = machine.read() {
                if line.starts_with("=ready") {
                    return machine;
                }
            }
            let log = std::fs::read_to_string(disks.folder.join("qemu.log"));
            eprintln!("the machine ended before it was up: {log:?}");
        }
        panic!("the machine does not boot");
    }

    fn start(prepared: &Path, disks: &Disks<'_>) -> Self {
        let socket = disks.folder.join("line.sock");
        let _ = std::fs::remove_file(&socket);
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|port| port.local_addr());
        let nbd = port.expect("a free port");
        // KVM is there on some machines where it does not work.
        let accelerator = std::env::var("HN4_VM_ACCEL");
        let accelerator = accelerator.unwrap_or_else(|_| "tcg,thread=multi".to_owned());
        let console = disks.folder.join("console.log");
        let qemu = Command::new(find_program("qemu-system-x86_64").expect("looked for before"))
            .args(["-M", "q35,nvdimm=on", "-smp", "2"])
            .args(["-accel".to_owned(), accelerator])
            // What emulation does slowly.
            .args(["-cpu", "max,-cx16,-la57"])
            .args(["-m", "640M,slots=2,maxmem=4G", "-no-reboot"])
            .args(["-nodefaults", "-display", "none", "-monitor", "none"])
            .args(["-kernel".into(), prepared.join("vmlinuz")])
            .args(["-initrd".into(), prepared.join("initramfs")])
            .args(["-append", "console=ttyS0 quiet panic=-1 mitigations=off"])
            .args(["-serial", &format!("file:{}", console.display())])
            .args([
                "-chardev",
                &format!("socket,id=line,path={},server=on", socket.display()),
            ])
            .args(["-serial", "chardev:line"])
            .args([
                "-netdev",
                &format!("user,id=net,restrict=on,hostfwd=tcp:{nbd}-:10809"),
            ])
            .args(["-device", "virtio-net-pci,netdev=net,romfile="])
            .args(disks.arguments())
            .stdin(Stdio::null())
            .stderr(std::fs::File::create(disks.folder.join("qemu.log")).expect("a file"))
            .spawn()
            .expect("qemu");
        let mut stream = None;
        wait("qemu to listen", || {
            stream = UnixStream::connect(&socket).ok();
            stream.is_some()
        });
        let stream = stream.expect("it has been waited for");
        stream.set_read_timeout(Some(SILENCE)).expect("set");
        Self {
            qemu,
            line: BufReader::new(stream),
            nbd,
        }
    }

    /// The next line that it says; `None` when it has ended.
    pub(crate) fn read(&mut self) -> Option<String> {
        let mut line = String::new();
        let length = self
            .line
            .read_line(&mut line)
            .expect("it is not silent for so long");
        (length > 0).then(|| line.trim_end().to_owned())
    }

    /// Sends a command without waiting for its end.
    pub(crate) fn send(&mut self, command: &str) {
        let line = format!("{command}\n");
        self.line
            .get_mut()
            .write_all(line.as_bytes())
            .expect("the serial line");
    }

    /// Runs a command that must succeed, and gives what it said.
    pub(crate) fn run(&mut self, command: &str) -> String {
        let (status, said) = self.try_run(command);
        assert_eq!(status, "0", "{command}: {said}");
        said
    }

    /// Runs a command and gives its status and what it said.
    pub(crate) fn try_run(&mut self, command: &str) -> (String, String) {
        self.send(command);
        let mut said = String::new();
        loop {
            let line = self.read().expect("the machine goes on");
            if let Some(status) = line.strip_prefix("=done ") {
                return (status.to_owned(), said);
            }
            said += &line;
            said.push('\n');
        }
    }

    /// Resets it at once, as when the power fails for a moment. Gives what it still had said.
    pub(crate) fn cut_the_power(mut self) -> Vec<String> {
        self.send("echo b > /proc/sysrq-trigger");
        let mut said = Vec::new();
        while let Some(line) = self.read() {
            said.push(line);
        }
        self.qemu.wait().expect("reaped");
        said
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}
