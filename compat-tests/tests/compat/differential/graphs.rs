//! The same graph of paths, drawn at random, in stock's store and in castored's: derivations with and without their
//! outputs, other paths, references among all of them, and roots of every kind. What is alive, what is dead, and what is
//! left after a collection have to be the same, with each combination of `keep-outputs` and `keep-derivations`.
//!
//! `CASTORED_GRAPHS=n` draws n graphs, `CASTORED_GRAPHS_SEED=s` begins with this one.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::symlink;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use compat_tests::load::{self, Connection, Offer};
use compat_tests::machine::{self, Machine};
use compat_tests::nar::Tree;
use compat_tests::wire::{Client, Request};
use compat_tests::{Call, Daemon, Room, Subject, Who};

use crate::builds::wait_until;

/// Graphs drawn unless told otherwise.
const GRAPHS: u64 = 8;
/// The first of them.
const FIRST_SEED: u64 = 1;
/// Links of clients lie here.
const LINKS: &str = "/nix/links";
/// For what a client that is gone leaves behind.
const PATIENCE: Duration = Duration::from_secs(10);
/// Where roots are.
const STATE: &str = "/nix/var/nix";
/// What [`load`]'s connections speak.
const MINOR: u64 = 38;

/// Numbers that follow from a seed.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 11
    }

    fn below(&mut self, bound: usize) -> usize {
        self.next() as usize % bound
    }

    /// Whether something that happens so many times in a hundred does.
    fn in_hundred(&mut self, times: u64) -> bool {
        self.next() % 100 < times
    }

    fn some<T: Clone>(&mut self, of: &[T], at_most: usize) -> Vec<T> {
        let count = self.below(at_most + 1);
        (0..count).filter(|_| !of.is_empty()).map(|_| of[self.below(of.len())].clone()).collect()
    }
}

/// What a daemon said of a graph, by the question.
type Answers = BTreeMap<String, BTreeSet<String>>;

/// A graph in a store, with what keeps parts of it alive.
struct Drawn {
    /// Held for its temporary roots.
    _client: Client,
    process: Child,
}

/// An expression for derivations that depend on each other at random.
fn expression(random: &mut Random, seed: u64, count: usize) -> String {
    let mut lines = String::new();
    for n in 0..count {
        let inputs: Vec<usize> = (0..n).collect();
        let mut needs: Vec<String> = random
            .some(&inputs, 3)
            .into_iter()
            .map(|d| if d % 3 == 0 && random.in_hundred(50) { format!("${{d{d}.dev}}") } else { format!("${{d{d}}}") })
            .collect();
        if random.in_hundred(40) {
            needs.push(format!("${{builtins.toFile \"source-{seed}-{}\" \"source {n}\"}}", random.below(count)));
        }
        // Every third has a second output.
        let outputs = if n % 3 == 0 { "outputs = [ \"out\" \"dev\" ];" } else { "" };
        lines.push_str(&format!(
            "d{n} = derivation {{ name = \"graph-{seed}-{n}\"; system = \"x86_64-linux\"; builder = \"/bin/sh\"; needs = \
             \"{}\"; {outputs} }};\n",
            needs.join(" ")
        ));
    }
    let all: Vec<String> = (0..count).map(|n| format!("d{n}")).collect();
    format!("let {lines} in [ {} ]", all.join(" "))
}

/// The paths of a derivation's outputs, from its text.
fn outputs(text: &str) -> Vec<String> {
    let list = text.strip_prefix("Derive([").unwrap().split("],").next().unwrap();
    list.split('"').filter(|part| part.starts_with("/nix/store/")).map(str::to_owned).collect()
}

/// Puts a path into the store under its name.
fn add(connection: &mut Connection, path: &str, references: Vec<String>, deriver: &str) {
    let references: Vec<String> = references.into_iter().collect::<BTreeSet<_>>().into_iter().collect();
    let archive = Tree::File(format!("{path} {references:?}").into_bytes()).archive();
    let offer = Offer { path: path.to_owned(), references, deriver: deriver.to_owned(), signatures: vec![], archive };
    connection.call(&offer.add_nar()).unwrap();
}

fn draw(room: &Room, daemon: &Daemon, machine: &Machine, seed: u64) -> Drawn {
    let mut random = Random::new(seed);
    let count = 6 + random.below(20);
    let file = room.write(&format!("graph-{seed}.nix"), expression(&mut random, seed, count)).unwrap();
    let call = Call::nix(room, Who::Root, machine.newest(), "nix-instantiate").arg(&file).quiet();
    let derivations: BTreeSet<String> = call.ok().unwrap().lines().into_iter().collect();
    let mut connection = Connection::over(daemon.connect().unwrap(), MINOR).unwrap();
    let mut all: Vec<String> = derivations.iter().cloned().collect();
    for drv in &derivations {
        for output in outputs(&fs::read_to_string(drv).unwrap()) {
            if random.in_hundred(60) {
                let mut references = random.some(&all, 3);
                if random.in_hundred(20) {
                    references.push(output.clone());
                }
                let deriver = if random.in_hundred(80) { drv } else { "" };
                add(&mut connection, &output, references, deriver);
                all.push(output);
            }
        }
    }
    for n in 0..random.below(30) {
        let path = load::made_up_path(&format!("graph {seed} {n}"), "other");
        let references = random.some(&all, 4);
        add(&mut connection, &path, references, "");
        all.push(path);
    }
    drop(connection);
    roots(room, daemon, &mut random, &all)
}

/// Makes roots of all kinds for some of the paths.
fn roots(room: &Room, daemon: &Daemon, random: &mut Random, all: &[String]) -> Drawn {
    for dir in ["gcroots/auto", "gcroots/one/two", "profiles/per-user/somebody"] {
        fs::create_dir_all(format!("{STATE}/{dir}")).unwrap();
    }
    let mut client = Client::new(daemon.connect().unwrap()).unwrap();
    let mut environment = Vec::new();
    for (n, path) in random.some(all, 8).into_iter().enumerate() {
        let link = format!("{LINKS}/{n}");
        match random.below(14) {
            0 => symlink(&path, format!("{STATE}/gcroots/direct-{n}")).unwrap(),
            1 => symlink(format!("{path}/bin/something"), format!("{STATE}/gcroots/one/two/below-{n}")).unwrap(),
            2 => {
                symlink(&path, &link).unwrap();
                call(&mut client, Request::numbered(12).string(&link));
            }
            3 => {
                let generation = format!("{STATE}/profiles/per-user/somebody/profile-{n}-link");
                symlink(&path, &generation).unwrap();
                symlink(format!("profile-{n}-link"), generation.replace(&format!("-{n}-link"), &format!("{n}")))
                    .unwrap();
            }
            4 => fs::write(format!("{STATE}/gcroots/one/{}", path.rsplit('/').next().unwrap()), "").unwrap(),
            5 => {
                // One link too many.
                symlink(&path, &link).unwrap();
                symlink(&link, format!("{link}-again")).unwrap();
                symlink(format!("{link}-again"), format!("{STATE}/gcroots/far-{n}")).unwrap();
            }
            6 => {
                call(&mut client, Request::numbered(11).string(&path));
            }
            7 => environment.push(path),
            8 => {
                // Not directly to the path, and by a way that is not the shortest.
                symlink(&path, &link).unwrap();
                symlink(format!("../../../links/./{n}"), format!("{STATE}/gcroots/winding-{n}")).unwrap();
            }
            9 => {
                // Spelled in other ways, also by links that are one step away.
                let name = path.rsplit('/').next().unwrap();
                let spelled = ["/nix/store/../store/@", "/nix/store/./@", "/nix/store//@", "/nix//store/@"];
                let spelled = spelled.into_iter().chain([
                    "//nix/store/@",
                    "/nix/store/@/",
                    "/nix/store/@/..",
                    "/nix/store/@//bin",
                ]);
                let number = random.below(8);
                let target = spelled.clone().nth(number).unwrap().replace('@', name);
                if random.in_hundred(50) {
                    symlink(target, format!("{STATE}/gcroots/spelled-{n}-{number}")).unwrap();
                } else {
                    symlink(target, &link).unwrap();
                    symlink(&link, format!("{STATE}/gcroots/auto/spelled-{n}-{number}")).unwrap();
                }
            }
            10 => {
                // To a link that leads to the path, by its name in other spellings, also through a link to the directory.
                symlink(&path, &link).unwrap();
                symlink(LINKS, format!("{LINKS}/again-{n}")).unwrap();
                let spelled = ["@/../links/#", "@/./#", "@//#", "/@/#", "@/#/", "@/#/.", "@/#/..", "@/again-#/#"];
                let number = random.below(8);
                let target = spelled[number].replace('@', LINKS).replace('#', &n.to_string());
                symlink(target, format!("{STATE}/gcroots/one/two/way-{n}-{number}")).unwrap();
            }
            11 => {
                // Relative, from where it lies and from where it does not: to the path, and to a link that is relative.
                let name = path.rsplit('/').next().unwrap();
                symlink(format!("../store/{name}"), &link).unwrap();
                for (number, target) in ["../../../store/@", "../../store/@", "./../../..//store/@", "../../../links/#"]
                    .into_iter()
                    .enumerate()
                {
                    let target = target.replace('@', name).replace('#', &n.to_string());
                    symlink(target, format!("{STATE}/gcroots/relative-{n}-{number}")).unwrap();
                }
            }
            12 => {
                // Links to nothing, some of which stock removes, and one to itself.
                for (number, target) in
                    ["@/../links/none-#", "@//none-#", "../../../../links/none-#", "none-#", "/nix/store/../none-#"]
                        .into_iter()
                        .enumerate()
                {
                    let target = target.replace('@', LINKS).replace('#', &n.to_string());
                    symlink(&target, format!("{STATE}/gcroots/auto/nothing-{n}-{number}")).unwrap();
                    symlink(&target, format!("{STATE}/gcroots/nothing-{n}-{number}")).unwrap();
                }
                symlink(format!("self-{n}"), format!("{STATE}/gcroots/auto/self-{n}")).unwrap();
                symlink(format!("{path}/../none"), format!("{STATE}/gcroots/auto/beside-{n}")).unwrap();
            }
            _ => {
                symlink("/nowhere/at/all", format!("{STATE}/gcroots/auto/stale-{n}")).unwrap();
                symlink("/nowhere/at/all", format!("{STATE}/gcroots/broken-{n}")).unwrap();
                symlink(load::made_up_path("nobody", "has-this"), format!("{STATE}/gcroots/invalid-{n}")).unwrap();
                symlink("/etc/passwd", format!("{STATE}/gcroots/elsewhere-{n}")).unwrap();
                symlink(format!("{STATE}/gcroots"), format!("{STATE}/gcroots/one/round-{n}")).unwrap();
                symlink("/nix/store", format!("{STATE}/gcroots/itself-{n}")).unwrap();
            }
        }
    }
    let mut process = Command::new("/bin/sleep");
    process.arg("600").env_clear().env("WHAT", environment.join(":")).current_dir(room.dir());
    let process = process.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    // Its environment is ours until it has executed.
    while fs::read(format!("/proc/{}/comm", process.id())).unwrap() != b"sleep\n" {
        thread::yield_now();
    }
    Drawn { _client: client, process }
}

/// A request whose answer is a word.
fn call(client: &mut Client, request: Request) {
    client.send(&request.0).unwrap();
    client.finish().unwrap();
    client.word().unwrap();
}

/// Takes away all roots.
fn clear(drawn: Drawn) {
    let Drawn { _client, mut process } = drawn;
    process.kill().unwrap();
    process.wait().unwrap();
    for dir in [format!("{STATE}/gcroots"), format!("{STATE}/profiles"), LINKS.to_owned()] {
        for entry in fs::read_dir(dir).unwrap().flatten() {
            if entry.file_type().unwrap().is_dir() {
                fs::remove_dir_all(entry.path()).unwrap();
            } else {
                fs::remove_file(entry.path()).unwrap();
            }
        }
    }
}

/// The links where roots are, after what has no use was removed.
fn links() -> BTreeSet<String> {
    let (mut found, mut waiting) = (BTreeSet::new(), vec![format!("{STATE}/gcroots"), format!("{STATE}/profiles")]);
    while let Some(dir) = waiting.pop() {
        for entry in fs::read_dir(&dir).unwrap().flatten() {
            let path = entry.path().to_str().unwrap().to_owned();
            if entry.file_type().unwrap().is_dir() {
                waiting.push(path);
            } else {
                found.insert(path);
            }
        }
    }
    found
}

/// Hides the process in the name of what it uses, and the name of a set of temporary roots.
fn without_process(line: &str) -> String {
    let digits = |text: &str| text.trim_start_matches(|c: char| c.is_ascii_digit() || c == '-').to_owned();
    for begin in ["\"/proc/", "\"{temp:"] {
        if let Some(rest) = line.strip_prefix(begin) {
            return format!("{begin}{}", digits(rest));
        }
    }
    line.to_owned()
}

fn valid(daemon: &Daemon) -> BTreeSet<String> {
    Client::new(daemon.connect().unwrap()).unwrap().all_valid_paths().unwrap().into_iter().collect()
}

fn ask(room: &Room, daemon: &Daemon, machine: &Machine, seed: u64) -> Answers {
    let drawn = draw(room, daemon, machine, seed);
    let store = |args: &[&str]| {
        let call = Call::nix(room, Who::Root, machine.newest(), "nix-store").args(args).quiet();
        call.ok().unwrap().lines().into_iter().collect::<BTreeSet<_>>()
    };
    let mut answers = Answers::new();
    answers.insert("all".into(), valid(daemon));
    // The clients that made the graph are gone, and the daemon has noticed when it says the same twice.
    let listed = || store(&["--gc", "--print-roots"]);
    let roots = RefCell::new(listed());
    wait_until(PATIENCE, || roots.replace(listed()) == *roots.borrow());
    let roots = roots.into_inner();
    answers.insert("links".into(), links());
    answers.insert("roots".into(), roots.iter().map(|line| without_process(line)).collect());
    let combinations = [("false", "false"), ("false", "true"), ("true", "false"), ("true", "true")];
    let options =
        |(outputs, derivations)| ["--option", "keep-outputs", outputs, "--option", "keep-derivations", derivations];
    for combination in combinations {
        for what in ["--print-live", "--print-dead"] {
            let found = store(&[&["--gc", what][..], &options(combination)].concat());
            answers.insert(format!("{what}, keep outputs {}, derivations {}", combination.0, combination.1), found);
        }
    }
    let dead = |combination: (&str, &str)| {
        answers[&format!("--print-dead, keep outputs {}, derivations {}", combination.0, combination.1)].clone()
    };
    let combination = combinations[seed as usize % combinations.len()];
    let (before, dead) = (answers["all"].clone(), dead(combination));
    store(&[&["--gc"][..], &options(combination)].concat());
    let left = valid(daemon);
    assert_eq!(left, before.difference(&dead).cloned().collect(), "what was called dead is what goes (seed {seed})");
    answers.insert("left".into(), left);
    clear(drawn);
    // A client that is gone has its temporary roots until the daemon has noticed.
    wait_until(PATIENCE, || {
        store(&["--gc"]);
        valid(daemon).is_empty()
    });
    answers.insert("left without roots".into(), valid(daemon));
    answers
}

fn record(machine: &'static Machine, subject: Subject, name: &str, seeds: Vec<u64>) -> Vec<Answers> {
    let name = format!("graphs-{name}");
    let recorded = thread::spawn(move || {
        let room = Room::enter(&name).unwrap();
        fs::create_dir(LINKS).unwrap();
        let daemon = subject.start(&room).unwrap();
        let answers = seeds.into_iter().map(|seed| ask(&room, &daemon, machine, seed)).collect();
        daemon.stop().unwrap();
        answers
    });
    recorded.join().unwrap()
}

#[test]
fn of_a_random_graph_the_same_is_alive_and_dead_as_with_stock() {
    if let Some(reason) = machine::obstacle() {
        println!("SKIPPED: {reason}");
        return;
    }
    let machine = machine::prepare().unwrap();
    let number = |name: &str, or: u64| std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(or);
    let first = number("CASTORED_GRAPHS_SEED", FIRST_SEED);
    let seeds: Vec<u64> = (first..first + number("CASTORED_GRAPHS", GRAPHS)).collect();
    let stock = Subject::stock(machine.newest());
    // One after the other: both look for roots in all processes, and the paths are the same.
    let [stock, ours] = [(stock, "stock"), (Subject::from_environment().unwrap(), "ours")].map(|(subject, which)| {
        let start = Instant::now();
        let answers = record(machine, subject, which, seeds.clone());
        println!("{which}: {:.1} s", start.elapsed().as_secs_f64());
        answers
    });
    let mut wrong = 0;
    let (mut paths, mut dead, mut live) = (0, 0, 0);
    for ((seed, stock), ours) in seeds.iter().zip(&stock).zip(&ours) {
        paths += stock["all"].len();
        live += stock["left"].len();
        dead += stock["all"].len() - stock["left"].len();
        for (question, stock) in stock {
            let ours = &ours[question];
            if stock != ours {
                wrong += 1;
                let only = |one: &BTreeSet<String>, other: &BTreeSet<String>| {
                    one.difference(other).cloned().collect::<Vec<_>>().join("\n        ")
                };
                println!(
                    "seed {seed}, {question}:\n    only stock:\n        {}\n    only castored:\n        {}",
                    only(stock, ours),
                    only(ours, stock)
                );
            }
        }
        assert!(ours["left without roots"].is_empty(), "seed {seed}: {:?}", ours["left without roots"]);
    }
    println!("{} graphs, {paths} paths; of these {dead} deleted, {live} kept", seeds.len());
    assert_eq!(wrong, 0, "answers that differ");
    assert!(dead > 0 && live > 0, "too few to mean anything");
}
