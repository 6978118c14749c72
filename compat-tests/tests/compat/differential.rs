//! The same requests, byte for byte, to stock's daemon and to castored; the replies compared field by field.
//!
//! Every difference must be listed in [`known`], with its reason, and every listed one must occur.

mod cases;
mod graphs;
mod known;
mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::thread;
use std::time::Instant;

use compat_tests::machine::{self, Machine};
use compat_tests::raw::{ENDING, Question, Reply, Shape, shapes};
use compat_tests::subject::default_conf;
use compat_tests::wire::{Client, Request};
use compat_tests::{Daemon, Room, Subject, Who};

use self::cases::{Case, Cases};
use self::known::Known;
use self::world::World;

/// The minors spoken, which are those of all releases from 2.0 on.
const MINORS: [u64; 7] = [18, 21, 32, 34, 35, 37, 38];

/// Where in the comparison a reply belongs: minor, who, and the case's name.
type Place = (u64, Who, String);

/// A session with one daemon: everything asked at one minor by one user.
#[derive(Debug, Clone, Copy)]
struct Session {
    minor: u64,
    who: Who,
    /// Keeps the paths of one test from those of another that runs at the same time.
    prefix: &'static str,
}

impl Session {
    fn tag(self) -> String {
        format!("{}{}{}", self.prefix, self.minor, if self.who == Who::Root { "r" } else { "u" })
    }
}

/// The questions of a session.
type Questions = fn(&World, u64, &str) -> Vec<Case>;

/// All replies of a daemon.
struct Recording {
    world: World,
    replies: Vec<(Place, Reply)>,
}

/// A difference in one field.
#[derive(Debug)]
struct Difference {
    place: Place,
    field: String,
    stock: String,
    ours: String,
}

/// Starts the daemon in a room of its own, on a thread of its own, and asks everything.
fn record(
    machine: &'static Machine,
    subject: Subject,
    name: &str,
    sessions: Vec<Session>,
    questions: Questions,
) -> thread::JoinHandle<Recording> {
    let name = format!("differential-{name}");
    thread::spawn(move || {
        let room = Room::enter(&name).unwrap();
        let mut conf = default_conf();
        if subject.is_stock() {
            // Stock kills every process of a build user before and after it builds, and other rooms have the same ones.
            conf.push_str("build-users-group =\n");
        }
        let daemon = subject.start_with(&room, &conf).unwrap();
        let tags: Vec<_> = sessions.iter().map(|s| s.tag()).collect();
        let world = World::make(&room, &daemon, machine.newest(), &tags);
        let mut replies = Vec::new();
        for session in sessions {
            replies.push(((session.minor, session.who, "handshake".to_owned()), greet(&room, &daemon, session)));
            for case in questions(&world, session.minor, &session.tag()) {
                let reply = ask(&room, &daemon, session, &case, &world);
                if !case.silent {
                    replies.push(((session.minor, session.who, case.name), reply));
                }
            }
        }
        daemon.stop().unwrap();
        Recording { world, replies }
    })
}

fn connect(room: &Room, daemon: &Daemon, session: Session) -> Client {
    let root = session.who == Who::Root;
    let stream = if root { daemon.connect().unwrap() } else { daemon.connect_as(room, session.who).unwrap() };
    Client::with_minor(stream, session.minor).unwrap_or_else(|error| panic!("{session:?}: {error}\n{}", daemon.log()))
}

/// What the daemon says of itself.
fn greet(room: &Room, daemon: &Daemon, session: Session) -> Reply {
    let greeting = connect(room, daemon, session).greeting;
    let mut reply = Reply::default();
    reply.set("version", greeting.version);
    reply.set("features", greeting.features.join(" "));
    reply.set("trust", format!("{:?}", greeting.trust));
    // What follows the number is free.
    reply.set("nix", greeting.nix_version.unwrap_or_default().split(' ').next().unwrap_or_default());
    reply
}

/// One case on a connection of its own.
fn ask(room: &Room, daemon: &Daemon, session: Session, case: &Case, world: &World) -> Reply {
    let mut client = connect(room, daemon, session);
    // What stock leaves of failed imports and its locks is no object; castored leaves nothing.
    let valid = case.question.request.0.starts_with(&20u64.to_le_bytes()).then(|| {
        let mut client = Client::new(daemon.connect().unwrap()).unwrap();
        client.all_valid_paths().unwrap().into_iter().chain([cases::UNKNOWN.to_owned()]).collect::<BTreeSet<_>>()
    });
    let mut before = Vec::new();
    for question in &case.before {
        before.push(question.ask(&mut client));
    }
    let mut reply = case.question.ask(&mut client);
    for (n, earlier) in before.into_iter().enumerate() {
        reply.adopt(&format!("before[{n}]"), earlier);
    }
    if !case.question.ends && reply.get(ENDING) != "silent" {
        let probe = Question::new(Request::numbered(1).string(&world.source), vec![Shape::Word("valid")]);
        let usable = probe.ask(&mut client).get("valid") == "1";
        reply.set("usable", if usable { "yes" } else { "no" });
    }
    let _ = client.shut_down_sending();
    if client.closed().is_err() {
        reply.set("closes", "no");
    }
    let mut on_the_side = None;
    let added = Some(reply.get("path")).filter(|p| p.starts_with("/nix/store/") && session.minor < 25);
    for (n, path) in
        added.into_iter().map(str::to_owned).chain(case.infos.iter().cloned()).enumerate().collect::<Vec<_>>()
    {
        let client = on_the_side.get_or_insert_with(|| Client::new(daemon.connect().unwrap()).unwrap());
        let info = Question::new(Request::numbered(26).string(path), vec![Shape::Optional("known", shapes::info())]);
        reply.adopt(&format!("info[{n}]"), info.ask(client));
    }
    for (field, value) in &mut reply.fields {
        let kept = value.lines().filter(|line| field != "paths" || valid.as_ref().is_none_or(|v| v.contains(*line)));
        *value = kept.map(masked).collect::<Vec<_>>().join("\n");
    }
    reply
}

/// Hides what differs between any two daemons.
fn masked(line: &str) -> String {
    match line.strip_prefix("{temp:").and_then(|line| line.split_once('}')) {
        Some((_, rest)) => format!("{{temp:PID}}{rest}"),
        None => line.to_owned(),
    }
}

/// What differs. Where two replies ended differently, or one path is known and the other is not, that is the difference,
/// and not what therefore came or did not come.
fn compare(stock: &Recording, ours: &Recording) -> Vec<Difference> {
    assert_eq!(stock.world, ours.world, "the same contents must have the same paths");
    assert_eq!(stock.replies.len(), ours.replies.len());
    let (mut differences, mut fields) = (Vec::new(), 0);
    for ((place, stock), (_, ours)) in stock.replies.iter().zip(&ours.replies) {
        if std::env::var_os("CASTORED_DIFFERENTIAL_ALL").is_some() {
            println!("{} {:?} `{}`\n    {stock:?}\n    {ours:?}", place.0, place.1, place.2);
        }
        let differs = |field: &str| stock.fields.get(field) != ours.fields.get(field);
        let all: BTreeSet<_> = stock.fields.keys().chain(ours.fields.keys()).collect();
        fields += all.len();
        for field in all.into_iter().filter(|field| differs(field)) {
            let follows = match field.split_once('.') {
                Some((info, "ending")) if info.starts_with("info[") => true,
                Some((info, rest)) if info.starts_with("info[") => rest != "known" && differs(&format!("{info}.known")),
                _ => ![ENDING, "usable", "closes"].contains(&field.as_str()) && differs(ENDING),
            };
            if !follows {
                let (stock, ours) = apart(stock.get(field), ours.get(field));
                differences.push(Difference { place: place.clone(), field: field.clone(), stock, ours });
            }
        }
    }
    println!("{} replies of each daemon, {fields} fields, {} differ", ours.replies.len(), differences.len());
    differences
}

/// Of two lists, what is only in one.
fn apart(stock: &str, ours: &str) -> (String, String) {
    if !stock.contains('\n') && !ours.contains('\n') {
        return (stock.to_owned(), ours.to_owned());
    }
    let only = |one: &str, other: &str| {
        let other: BTreeSet<_> = other.lines().collect();
        one.lines().filter(|line| !other.contains(line)).collect::<Vec<_>>().join(", ")
    };
    (only(stock, ours), only(ours, stock))
}

/// Holds the differences against the list.
fn judge(differences: &[Difference], recording: &Recording, list: &[Known]) {
    let mut wrong = 0;
    for difference in differences {
        if !list.iter().any(|known| known.explains(difference)) {
            wrong += 1;
            let Difference { place: (minor, who, case), field, stock, ours } = difference;
            println!("NOT LISTED 1.{minor} {who:?} `{case}` {field}:\n    stock:    {stock}\n    castored: {ours}");
        }
    }
    for known in list {
        let mut places = recording.replies.iter().filter(|(place, _)| known.concerns(place)).peekable();
        if places.peek().is_none() {
            wrong += 1;
            println!("NO SUCH CASE {known:?}");
        }
        for (place, _) in places {
            if !differences.iter().any(|d| d.place == *place && known.explains(d)) {
                wrong += 1;
                println!("DID NOT OCCUR 1.{} {:?} `{}`: {known:?}", place.0, place.1, place.2);
            }
        }
    }
    assert_eq!(wrong, 0, "differences that are not as listed");
}

/// Shows where the two daemons say the same in different words.
fn texts(stock: &Recording, ours: &Recording) {
    let (mut same, mut seen) = (0, BTreeMap::new());
    for (((minor, who, case), stock), (_, ours)) in stock.replies.iter().zip(&ours.replies) {
        let both = !stock.text.is_empty() && !ours.text.is_empty();
        let (stock, ours) = (plain(&stock.text), plain(&ours.text));
        if both && stock == ours {
            same += 1;
        } else if both {
            seen.entry((case.clone(), stock, ours)).or_insert_with(Vec::new).push(format!("1.{minor} {who:?}"));
        }
    }
    println!("error texts: {same} the same; in other words:");
    for ((case, stock, ours), places) in seen {
        println!(
            "  `{case}` ({} times, first {})\n    stock:    {stock}\n    castored: {ours}",
            places.len(),
            places[0]
        );
    }
}

/// A text without what only old clients are sent.
fn plain(text: &str) -> String {
    text.strip_prefix("error: ").unwrap_or(text).lines().map(str::trim).collect::<Vec<_>>().join(" | ")
}

/// Both recordings.
fn both(name: &str, version: &str, sessions: &[Session], questions: Questions) -> Option<(Recording, Recording)> {
    if let Some(reason) = machine::obstacle() {
        println!("SKIPPED: {reason}");
        return None;
    }
    let machine = machine::prepare().unwrap();
    let subject = Subject::from_environment().unwrap();
    let stock = Subject::stock(machine.release(version).unwrap());
    // One after the other: both look for roots in all processes, and the paths are the same.
    let [stock, ours] = [(stock, "stock"), (subject, "ours")].map(|(subject, which)| {
        let start = Instant::now();
        let recording = record(machine, subject, &format!("{name}-{which}"), sessions.to_vec(), questions);
        let recording = recording.join().unwrap();
        println!("{which}: {:.1} s", start.elapsed().as_secs_f64());
        recording
    });
    Some((stock, ours))
}

#[test]
fn every_operation_is_answered_as_stock_answers_it() {
    let Some((stock, ours)) = both("all", "2.34.8", &sessions(&MINORS, ""), |w, m, t| Cases::of(w, m, t)) else {
        return;
    };
    let differences = compare(&stock, &ours);
    texts(&stock, &ours);
    judge(&differences, &ours, known::LIST);
}

#[test]
fn what_newer_daemons_have_removed_is_answered_as_older_ones_answer_it() {
    let sessions = sessions(&[18, 21, 32, 35, 38], "old");
    let Some((stock, ours)) = both("removed", "2.26.3", &sessions, |w, m, t| Cases::removed(w, m, t)) else { return };
    let differences = compare(&stock, &ours);
    texts(&stock, &ours);
    judge(&differences, &ours, known::REMOVED_LIST);
}

/// Every minor, as root and as an untrusted user.
fn sessions(minors: &[u64], prefix: &'static str) -> Vec<Session> {
    minors.iter().flat_map(|&minor| [Who::Root, Who::User].map(|who| Session { minor, who, prefix })).collect()
}
