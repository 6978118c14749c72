//! What uses the mount while its server is killed: `tar`, `find`, a compiler, programs that run from it, readers of our
//! own, and clients of the socket. None of them may see an error or a wrong byte.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use compat_tests::Daemon;
use compat_tests::nar::{Tree, hex, sha256};
use compat_tests::subject::SOCKET;
use compat_tests::wire::Client;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::Setup;

/// Small files, headers, and the bytes of the large file.
const SMALL: usize = 400;
const HEADERS: usize = 60;
const LARGE: usize = 12 << 20;
/// Kills for each copy of the tree: what was read once comes from the kernel's memory, and tests nothing.
const KILLS_PER_COPY: usize = 4;

/// How many different things go on at once.
const WORKERS: usize = 5;

/// Uses one copy.
type Work<'a> = Box<dyn Fn(&Path) -> Result<(), String> + Sync + 'a>;

/// The load, not yet running.
pub(super) struct Load {
    /// Copies of one tree, each with inodes of its own.
    copies: Vec<PathBuf>,
    large: Vec<u8>,
    expected: Expected,
    scratch: PathBuf,
}

/// What each copy gives.
struct Expected {
    tar: String,
    listing: Vec<u8>,
    object: Vec<u8>,
    /// The digest of the large file.
    sum: String,
}

fn pseudo_random(count: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let words = (0..count / 8).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.collect()
}

fn tree(large: &[u8]) -> Tree {
    let named = |name: String, contents: String| (name.into_bytes(), Tree::File(contents.into_bytes()));
    let small = (0..SMALL).map(|n| named(format!("small-{n:03}"), format!("contents of {n}\n").repeat(n + 1)));
    let headers = (0..HEADERS).map(|n| {
        let body = format!("static inline int f{n}(int x) {{ return x * {n} + 1; }}\n");
        named(format!("h{n:02}.h"), body + &format!("/* {} */\n", "padding ".repeat(500)))
    });
    let includes: String = (0..HEADERS).map(|n| format!("#include \"h{n:02}.h\"\n")).collect();
    let sum: String = (0..HEADERS).map(|n| format!(" + f{n}(x)")).collect();
    let main = format!("{includes}int all(int x) {{ return 0{sum}; }}\n");
    let busybox = fs::read(if Path::new("/usr/bin/busybox").exists() { "/usr/bin/busybox" } else { "/bin/busybox" });
    let directory = |entries: Vec<_>| Tree::Directory(entries);
    directory(vec![
        (b"bin".to_vec(), directory(vec![(b"busybox".to_vec(), Tree::Program(busybox.unwrap()))])),
        (b"include".to_vec(), directory(headers.collect())),
        (b"large".to_vec(), Tree::File(large.to_vec())),
        (b"small".to_vec(), directory(small.collect())),
        (b"src".to_vec(), directory(vec![named("main.c".into(), main)])),
    ])
}

impl Load {
    /// Fills the store with enough for so many kills, and finds out what is right.
    pub(super) fn new(s: &Setup, daemon: &Daemon, kills: usize) -> Self {
        let large = pseudo_random(LARGE);
        let tree = tree(&large);
        let mut client = Client::new(daemon.connect().unwrap()).unwrap();
        let mut copies: Vec<PathBuf> = (0..kills / KILLS_PER_COPY + 4)
            .map(|n| PathBuf::from(client.add(&format!("copy-{n}"), &tree).unwrap()))
            .collect();
        let scratch = s.room.tmp("load");
        fs::create_dir_all(&scratch).unwrap();
        let first = copies.remove(0);
        let object = scratch.join("first.o");
        let expected = Expected {
            tar: tar(&first).unwrap(),
            listing: find(&first).unwrap(),
            object: compile(&first, &object).unwrap(),
            sum: hex(&sha256(&large)),
        };
        Self { copies, large, expected, scratch }
    }

    /// Runs everything until `disturb` is done, and then each once more.
    pub(super) fn during(&self, disturb: impl FnOnce()) {
        let over = AtomicBool::new(false);
        let working: [(&str, Work<'_>); WORKERS] = [
            ("tar", Box::new(|copy| expect("tar", &tar(copy)?, &self.expected.tar))),
            ("find", Box::new(|copy| expect("find", &find(copy)?, &self.expected.listing))),
            (
                "gcc",
                Box::new(|copy| expect("gcc", &compile(copy, &self.scratch.join("main.o"))?, &self.expected.object)),
            ),
            ("a program", Box::new(|copy| expect("the program", &program(copy)?, &self.expected.sum))),
            ("reads", Box::new(|copy| self.read_all_over(copy))),
        ];
        let passes: Vec<AtomicUsize> = working.iter().map(|_| AtomicUsize::new(0)).collect();
        let connections = AtomicUsize::new(0);
        thread::scope(|scope| {
            let mut threads = Vec::new();
            for (at, (name, work)) in working.iter().enumerate() {
                let (over, passes) = (&over, &passes[at]);
                threads.push(scope.spawn(move || {
                    // Each begins with another copy, so that all of them find something cold.
                    for turn in at * self.copies.len() / WORKERS.. {
                        let copy = &self.copies[turn % self.copies.len()];
                        let last = over.load(Ordering::SeqCst);
                        work(copy).map_err(|error| format!("{name} on {}: {error}", copy.display()))?;
                        passes.fetch_add(1, Ordering::SeqCst);
                        if last {
                            return Ok(());
                        }
                    }
                    Ok::<(), String>(())
                }));
            }
            threads.push(scope.spawn(|| connect(&over, &connections)));
            let long = scope.spawn(|| self.long_lived(&over));
            // Also when it fails, so that nothing goes on for ever.
            let disturbed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(disturb));
            over.store(true, Ordering::SeqCst);
            for thread in threads {
                thread.join().unwrap().unwrap();
            }
            long.join().unwrap();
            if let Err(panic) = disturbed {
                std::panic::resume_unwind(panic);
            }
        });
        for ((name, _), passes) in working.iter().zip(&passes) {
            println!("{name}: {} passes", passes.load(Ordering::SeqCst));
        }
        println!("{} connections", connections.load(Ordering::SeqCst));
    }

    /// Reads here and there in the large file, past the kernel's memory of it.
    fn read_all_over(&self, copy: &Path) -> Result<(), String> {
        let file = File::open(copy.join("large")).map_err(|e| e.to_string())?;
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).map_err(|e| e.to_string())?;
        let mut piece = vec![0; 70_000];
        for step in 0..100_usize {
            let at = step.wrapping_mul(7_654_321) % (LARGE - piece.len());
            file.read_exact_at(&mut piece, at as u64).map_err(|e| format!("at {at}: {e}"))?;
            if piece != self.large[at..at + piece.len()] {
                return Err(format!("wrong bytes at {at}"));
            }
        }
        for n in (0..SMALL).step_by(7) {
            let text = fs::read_to_string(copy.join(format!("small/small-{n:03}"))).map_err(|e| e.to_string())?;
            expect("a small file", &text, &format!("contents of {n}\n").repeat(n + 1))?;
        }
        Ok(())
    }

    /// A program that runs from the mount all the time, with its directory there.
    fn long_lived(&self, over: &AtomicBool) {
        let copy = &self.copies[0];
        let stop = self.scratch.join("stop");
        let _ = fs::remove_file(&stop);
        let script = "while ! [ -e \"$1\" ]; do busybox sha256sum ../large >/dev/null || exit 9; done; echo whole";
        let child = Command::new(copy.join("bin/busybox"))
            .args(["sh", "-c", script, "sh"])
            .arg(&stop)
            .current_dir(copy.join("bin"))
            .env_clear()
            .env("PATH", copy.join("bin"))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        while !over.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(20));
        }
        fs::write(&stop, "").unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.stdout, b"whole\n", "{output:?}");
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    }
}

fn expect<T: PartialEq + ?Sized>(what: &str, found: &T, expected: &T) -> Result<(), String> {
    if found == expected { Ok(()) } else { Err(format!("{what} saw something else than before")) }
}

/// Runs a command; whatever it says on standard error is an error.
fn output(command: &mut Command) -> Result<Vec<u8>, String> {
    let output = command.stdin(Stdio::null()).output().map_err(|e| e.to_string())?;
    if !output.status.success() || !output.stderr.is_empty() {
        return Err(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr)));
    }
    Ok(output.stdout)
}

fn tar(copy: &Path) -> Result<String, String> {
    Ok(hex(&sha256(&output(Command::new("tar").arg("-C").arg(copy).args(["-cf", "-", "."]))?)))
}

fn find(copy: &Path) -> Result<Vec<u8>, String> {
    output(Command::new("find").current_dir(copy).args([".", "-printf", "%P %y %m %s %T@ %n\\n"]))
}

fn compile(copy: &Path, object: &Path) -> Result<Vec<u8>, String> {
    let mut gcc = Command::new("gcc");
    gcc.current_dir(copy.join("src")).args(["-O1", "-I../include", "-c", "main.c", "-o"]).arg(object);
    output(&mut gcc)?;
    fs::read(object).map_err(|e| e.to_string())
}

/// Executes a program of the copy on a file of it.
fn program(copy: &Path) -> Result<String, String> {
    let sum = output(Command::new(copy.join("bin/busybox")).arg("sha256sum").arg(copy.join("large")))?;
    Ok(String::from_utf8_lossy(&sum).split_whitespace().next().unwrap_or_default().to_owned())
}

/// Connects again and again: nobody is ever refused. A session that a kill ends sees the end, not an error of the socket.
fn connect(over: &AtomicBool, connections: &AtomicUsize) -> Result<(), String> {
    while !over.load(Ordering::SeqCst) {
        let stream = UnixStream::connect(SOCKET).map_err(|e| format!("cannot connect: {e}"))?;
        stream.set_read_timeout(Some(Duration::from_secs(20))).map_err(|e| e.to_string())?;
        let mut copy = stream.try_clone().map_err(|e| e.to_string())?;
        match Client::new(stream) {
            Ok(mut client) => {
                let _ = client.is_valid("/nix/store/00000000000000000000000000000000-nothing");
                connections.fetch_add(1, Ordering::SeqCst);
            }
            // Killed in between: nothing more comes.
            Err(_) => match copy.read(&mut [0; 1]) {
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
                Err(error) => return Err(format!("a client is left waiting: {error}")),
            },
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
