//! The questions: every operation that is served, well asked and badly asked.

use compat_tests::nar::{Tree, hex, sha256};
use compat_tests::raw::Shape::{Each, Nar, Optional, Pairs, Some, Text, Texts, Word};
use compat_tests::raw::{Question, Shape, nix32, shapes, store_path};
use compat_tests::wire::Request;

use super::world::{LINKS, SIGNATURE, SIGNED, World};

/// A well-formed store path that no store has.
pub(super) const UNKNOWN: &str = "/nix/store/zyxwvsrqpnmlkjihgfdcba9876543210-unknown";
/// The same, of a derivation.
const UNKNOWN_DRV: &str = "/nix/store/zyxwvsrqpnmlkjihgfdcba9876543210-unknown.drv";

/// One question with what surrounds it.
#[derive(Debug, Clone)]
pub(super) struct Case {
    /// The operation's number and what is special.
    pub name: String,
    /// Asked before it on the same connection.
    pub before: Vec<Question>,
    /// What is compared.
    pub question: Question,
    /// Paths whose infos are compared afterwards.
    pub infos: Vec<String>,
    /// Whether it only clears the way for others, and is not compared.
    pub silent: bool,
}

/// What the name of a case says of the references it gives.
fn with_references(refs: &[&str]) -> &'static str {
    match refs {
        [] => "",
        [UNKNOWN] => " and an unknown reference",
        _ => " and a reference",
    }
}

impl Case {
    fn after(&mut self, request: Request, shape: Vec<Shape>) -> &mut Self {
        self.before.push(Question::new(request, shape));
        self
    }

    fn info(&mut self, path: impl Into<String>) -> &mut Self {
        self.infos.push(path.into());
        self
    }

    fn silent(&mut self) -> &mut Self {
        self.silent = true;
        self
    }

    fn on_demand(&mut self, payload: Vec<u8>) -> &mut Self {
        self.question.on_demand = payload;
        self
    }

    /// Nothing follows the request; what is cut off stays cut off.
    fn ends(&mut self) -> &mut Self {
        self.question.ends = true;
        self
    }
}

/// The cases of one session: a minor, and who asks.
pub(super) struct Cases<'a> {
    world: &'a World,
    minor: u64,
    /// In the names of everything that the session adds, so that it is new.
    tag: String,
    pub list: Vec<Case>,
}

fn op(number: u64) -> Request {
    Request::numbered(number)
}

/// An operation with one string.
fn about(number: u64, path: &str) -> Request {
    op(number).string(path)
}

fn paths() -> Vec<Shape> {
    vec![Texts("paths")]
}

fn one() -> Vec<Shape> {
    vec![Word("one")]
}

/// A path info as AddToStoreNar and AddMultipleToStore take it.
#[derive(Debug, Clone)]
struct Claim {
    path: String,
    deriver: String,
    hash: String,
    references: Vec<String>,
    time: u64,
    size: u64,
    ultimate: u64,
    signatures: Vec<String>,
    ca: String,
    archive: Vec<u8>,
}

impl Claim {
    /// Content-addressed, all of it true.
    fn source(name: &str, contents: &str) -> Self {
        let archive = Tree::File(contents.into()).archive();
        let digest = sha256(&archive);
        Self {
            path: store_path("source", digest, name),
            ca: format!("fixed:r:sha256:{}", nix32(&digest)),
            ..Self::unsigned("", archive)
        }
    }

    /// At a path of its own choice.
    fn unsigned(path: &str, archive: Vec<u8>) -> Self {
        Self {
            path: path.to_owned(),
            deriver: String::new(),
            hash: hex(&sha256(&archive)),
            references: vec![],
            time: 0,
            size: archive.len() as u64,
            ultimate: 0,
            signatures: vec![],
            ca: String::new(),
            archive,
        }
    }

    fn append(&self, request: Request) -> Request {
        let request = request.string(&self.path).string(&self.deriver).string(&self.hash).strings(&self.references);
        let request = request.word(self.time).word(self.size).word(self.ultimate);
        request.strings(&self.signatures).string(&self.ca)
    }
}

impl<'a> Cases<'a> {
    /// All cases of a session, in the order in which they must be asked.
    pub(super) fn of(world: &'a World, minor: u64, tag: &str) -> Vec<Case> {
        let mut cases = Cases { world, minor, tag: tag.to_owned(), list: vec![] };
        cases.malformed();
        cases.queries();
        if minor >= 25 {
            cases.add();
        } else {
            cases.add_old();
        }
        cases.add_text();
        cases.add_nar();
        cases.add_multiple();
        cases.builds();
        cases.derived();
        cases.build_derivation();
        cases.roots();
        cases.upkeep();
        cases.garbage();
        cases.divergent();
        cases.list
    }

    /// Whether what hardly depends on the minor is asked as well.
    fn thorough(&self) -> bool {
        [21, 38].contains(&self.minor)
    }

    /// The operations that 2.34 has removed, for an older daemon.
    pub(super) fn removed(world: &'a World, minor: u64, tag: &str) -> Vec<Case> {
        let mut cases = Cases { world, minor, tag: tag.to_owned(), list: vec![] };
        for (what, path) in [("source", world.source.as_str()), ("signed", SIGNED), ("unknown", UNKNOWN)] {
            cases.case(&format!("3 {what}"), about(3, path), vec![Word("has")]);
            cases.case(&format!("4 {what}"), about(4, path), vec![Text("hash")]);
            cases.case(&format!("5 {what}"), about(5, path), paths());
            cases.case(&format!("16 {what}"), about(16, path).word(0), one());
        }
        for number in [3, 4, 5] {
            cases.case(&format!("{number} bad path"), about(number, "/etc"), vec![]);
        }
        cases.case("16 sign", about(16, &world.text).word(1), one());
        // An export stream: each path's archive and what is said of it.
        let record = |path: &str, archive: &[u8], references: &[&str]| {
            let record = Request(1u64.to_le_bytes().to_vec()).bytes(archive).word(0x4558_494e);
            record.string(path).strings(references).string("").word(0).0
        };
        let end = 0u64.to_le_bytes();
        let own = cases.invented("imported");
        let archive = Tree::File(cases.name("imported").into()).archive();
        let one = record(&own, &archive, &[&world.source]);
        let shape = || vec![Texts("paths")];
        let source = Claim::source(&cases.name("addressed"), tag);
        let addressed = record(&source.path, &source.archive, &[]);
        cases.case("27", op(27), shape()).on_demand([&one[..], &end].concat()).info(&own);
        cases.case("27 again", op(27), shape()).on_demand([&one[..], &end].concat()).info(&own);
        cases
            .case("27 where its contents put it", op(27), shape())
            .on_demand([&addressed[..], &end].concat())
            .info(&source.path);
        cases.case("27 nothing", op(27), shape()).on_demand(end.to_vec());
        let late = cases.invented("imported-late");
        let unknown = record(&late, &archive, &[UNKNOWN]);
        cases.case("27 unknown reference", op(27), shape()).on_demand([&unknown[..], &end].concat()).info(&late);
        let mut bad = record(&late, &archive, &[]);
        bad[archive.len() + 8] ^= 1;
        cases.case("27 bad mark", op(27), shape()).on_demand([&bad[..], &end].concat()).info(&late);
        cases.list
    }

    fn case(&mut self, name: &str, request: Request, shape: Vec<Shape>) -> &mut Case {
        let question = Question::new(request, shape);
        self.list.push(Case { name: name.to_owned(), before: vec![], question, infos: vec![], silent: false });
        self.list.last_mut().unwrap()
    }

    /// A name that only this session uses.
    fn name(&self, stem: &str) -> String {
        format!("{stem}-{}", self.tag)
    }

    /// A path made of a stem: always the same 32 characters for the same session and stem.
    fn invented(&self, stem: &str) -> String {
        let name = self.name(stem);
        store_path("invented", sha256(name.as_bytes()), &name)
    }

    fn drv(&self, name: &str) -> String {
        self.world.drv(name, &self.tag)
    }

    fn out(&self, name: &str) -> String {
        self.world.output(name, &self.tag, "out")
    }

    fn malformed(&mut self) {
        if !self.thorough() {
            return;
        }
        let source = self.world.source.clone();
        let base = &source["/nix/store/".len()..];
        let (hash, _) = base.split_at(32);
        let long = |n: usize| format!("/nix/store/{hash}-{}", "n".repeat(n));
        for (what, path) in [
            ("not in the store", "/etc/passwd".to_owned()),
            ("relative", base.to_owned()),
            ("empty", String::new()),
            ("the store itself", "/nix/store".to_owned()),
            ("below a path", format!("{source}/file")),
            ("slash at the end", format!("{source}/")),
            ("two slashes", source.replace("store/", "store//")),
            ("dots", source.replace("/nix/", "/nix/../nix/./")),
            ("short", "/nix/store/abc".to_owned()),
            ("no name", format!("/nix/store/{hash}-")),
            ("no hyphen", format!("/nix/store/{hash}x")),
            ("bad digit", "/nix/store/eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee-x".to_owned()),
            ("bad character", format!("/nix/store/{hash}-a b")),
            ("leading dot", format!("/nix/store/{hash}-.a")),
            ("name of a dot", format!("/nix/store/{hash}-.")),
            ("name of dot and hyphen", format!("/nix/store/{hash}-.-a")),
            ("name of two dots and hyphen", format!("/nix/store/{hash}-..-a")),
            ("name of 211", long(211)),
            ("name of 212", long(212)),
            ("not text", format!("/nix/store/{hash}-\u{e9}")),
            ("zero byte", format!("/nix/store/{hash}-a\0b")),
        ] {
            self.case(&format!("1 path: {what}"), about(1, &path), vec![Word("valid")]);
        }
        self.case("1 huge string", op(1).word(1 << 62), vec![Word("valid")]);
        self.case("1 padding", op(1).word(1).bytes(b"xyyyyyyy"), vec![Word("valid")]);
        self.case("1 cut off", op(1).word(40).bytes(b"/nix/sto"), vec![Word("valid")]).ends();
        self.case("6 bad path", about(6, "/etc"), paths());
        self.case("10 bad path", about(10, "/etc"), one());
        self.case("11 bad path", about(11, "/etc"), one());
        self.case("26 bad path", about(26, "/etc"), vec![]);
        self.case("31 bad path", op(31).strings(&["/etc"]).word(0), paths());
        self.case("31 huge count", op(31).word(1 << 61), paths()).ends();
        self.case("35 bool of 2", op(35).word(2).word(0), vec![Word("errors")]);
        for number in [0, 2, 15, 17, 24, 25, 48, 49, 50, 51, 99, 1000, 1001, u64::from(u32::MAX)] {
            self.case(&format!("{number} unknown"), op(number), vec![]);
        }
        self.case("2^32 unknown", op(1 << 32), vec![]);
        for removed in [3, 4, 5] {
            self.case(&format!("{removed} removed"), about(removed, &source), vec![]);
        }
        self.case("16 removed", about(16, &source).word(0), vec![]);
        self.case("27 removed", op(27), vec![]);
    }

    fn queries(&mut self) {
        let world = self.world;
        let (source, text, flat) = (&world.source, &world.text, &world.flat);
        let drv = self.drv("multi");
        let info = || vec![Optional("known", shapes::info())];
        for (what, path) in [("directory", source), ("text", text), ("flat", flat), ("signed", &world.signed)] {
            self.case(&format!("26 {what}"), about(26, path), info());
        }
        self.case("26 derivation", about(26, &drv), info());
        self.case("26 unknown", about(26, UNKNOWN), info());
        self.case("1 valid", about(1, source), vec![Word("valid")]);
        self.case("1 unknown", about(1, UNKNOWN), vec![Word("valid")]);
        for (what, path) in [("source", source.as_str()), ("text", text), ("signed", SIGNED), ("unknown", UNKNOWN)] {
            self.case(&format!("6 {what}"), about(6, path), paths());
            self.case(&format!("18 {what}"), about(18, path), vec![Text("path")]);
            self.case(&format!("33 {what}"), about(33, path), paths());
            self.case(&format!("38 {what}"), about(38, path), vec![Nar("archive")]);
        }
        let infos = vec![Text("deriver"), Texts("references"), Word("downloadSize"), Word("narSize")];
        self.case("21 valid", about(21, source), vec![Optional("info", infos.clone())]);
        self.case("21 unknown", about(21, UNKNOWN), vec![Optional("info", infos.clone())]);
        for (what, path) in [("derivation", drv.as_str()), ("not a derivation", source), ("unknown", UNKNOWN_DRV)] {
            self.case(&format!("22 {what}"), about(22, path), paths());
            self.case(&format!("28 {what}"), about(28, path), vec![Texts("names")]);
            self.case(&format!("41 {what}"), about(41, path), vec![Each("outputs", vec![Text("name"), Text("path")])]);
        }
        self.case("23", op(23), paths());
        let part = &source["/nix/store/".len()..][..32];
        for (what, part) in [
            ("valid", part),
            ("unknown", &UNKNOWN["/nix/store/".len()..][..32]),
            ("short", &part[..31]),
            ("long", &format!("{part}a")),
            ("prefix", &part[..4]),
            ("bad digit", "eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee"),
            ("empty", ""),
        ] {
            self.case(&format!("29 {what}"), about(29, part), vec![Text("path")]);
        }
        let infos = vec![Each("infos", [vec![Text("path")], infos].concat())];
        let asked = [source.as_str(), UNKNOWN];
        if self.minor >= 22 {
            let request = op(30).word(2).string(source).string("").string(UNKNOWN).string("");
            self.case("30 two", request, infos.clone());
            let bad = op(30).word(1).string(source).string("fixed:what");
            self.case("30 bad content address", bad, infos);
        } else {
            self.case("30 two", op(30).strings(&asked), infos);
        }
        for substitute in [0, 1, 2] {
            let request = op(31).strings(&[source.as_str(), UNKNOWN, text]);
            let request = if self.minor >= 27 { request.word(substitute) } else { request };
            self.case(&format!("31 substitute {substitute}"), request, paths());
            if self.minor < 27 {
                break;
            }
        }
        let nothing: [&str; 0] = [];
        let request = op(31).strings(&nothing);
        self.case("31 nothing", if self.minor >= 27 { request.word(0) } else { request }, paths());
        self.case("32", op(32).strings(&asked), paths());
        self.case("32 nothing", op(32).strings(&nothing), paths());
    }

    /// AddToStore since 1.25.
    fn add(&mut self) {
        let world = self.world;
        let (source, tag) = (world.source.clone(), self.tag.clone());
        let file = format!("file {tag}\n");
        let directory = Tree::Directory(vec![
            (b"a".to_vec(), Tree::Program(file.clone().into())),
            (b"b".to_vec(), Tree::Link(b"a".to_vec())),
        ])
        .archive();
        let archive = Tree::File(file.clone().into()).archive();
        let shape = shapes::added(self.minor);
        let request = |name: &str, method: &str, refs: &[&str]| op(7).string(name).string(method).strings(refs).word(0);
        let source = source.as_str();
        for (method, refs) in [
            ("fixed:r:sha256", vec![]),
            ("fixed:r:sha256", vec![source]),
            ("fixed:r:sha256", vec![UNKNOWN]),
            ("fixed:r:sha1", vec![]),
            ("fixed:r:sha1", vec![source]),
            ("fixed:r:md5", vec![]),
            ("fixed:r:sha512", vec![]),
            ("fixed:r:blake3", vec![]),
            ("fixed:git:sha1", vec![]),
        ] {
            let name = self.name(&format!("{}-{}", method.replace(':', "-"), refs.len()));
            let with = with_references(&refs);
            let request = request(&name, method, &refs).framed(&directory);
            self.case(&format!("7 {method}{with}"), request, shape.clone());
        }
        for (method, refs) in [
            ("fixed:sha256", vec![]),
            ("fixed:sha1", vec![]),
            ("fixed:md5", vec![]),
            ("fixed:sha512", vec![]),
            ("fixed:sha256", vec![source]),
            ("text:sha256", vec![]),
            ("text:sha256", vec![source]),
            ("text:sha256", vec![UNKNOWN]),
            ("text:sha1", vec![]),
            ("text:", vec![]),
            ("fixed:", vec![]),
            ("fixed:x:sha256", vec![]),
            ("fixed:sha3", vec![]),
            ("fixed:r:sha256:", vec![]),
            ("sha256", vec![]),
            ("", vec![]),
        ] {
            let name = self.name(&format!("{}-{}", method.replace(':', "-"), refs.len()));
            let with = with_references(&refs);
            let request = request(&name, method, &refs).framed(file.as_bytes());
            self.case(&format!("7 {method}{with}"), request, shape.clone());
        }
        let names = ["", ".", "..", "a b", ".hidden", "a/b", "\u{e9}", &"n".repeat(212)];
        for name in names.into_iter().filter(|_| self.thorough()).collect::<Vec<_>>() {
            let shown = name.get(..8).unwrap_or(name);
            let request = request(name, "fixed:r:sha256", &[]).framed(&archive);
            self.case(&format!("7 name '{shown}'"), request, shape.clone());
        }
        let recursive = |stem: &str| request(&format!("{stem}-{tag}"), "fixed:r:sha256", &[]);
        self.case("7 again", request("source", "fixed:r:sha256", &[]).framed(&archive), shape.clone());
        let again = request("source", "fixed:r:sha256", &[]).framed(&archive);
        self.case("7 a second time", again, shape.clone());
        let repair = op(7).string(self.name("repair")).string("fixed:r:sha256").word(0).word(1).framed(&archive);
        self.case("7 repair", repair, shape.clone());
        let odd = op(7).string("source").string("fixed:r:sha256").word(0).word(2).framed(&archive);
        self.case("7 repair of 2", odd, shape.clone());
        let bytewise = archive.iter().fold(recursive("bytewise"), |request, b| request.word(1).bytes(&[*b])).word(0);
        self.case("7 frames of one byte", bytewise, shape.clone());
        let short = &archive[..archive.len() - 8];
        self.case("7 short archive", recursive("short").framed(short), shape.clone());
        self.case("7 not an archive", recursive("raw").framed(file.as_bytes()), shape.clone());
        self.case("7 no frames", recursive("none").framed(b""), shape.clone());
        self.case("7 empty flat", request(&self.name("empty"), "fixed:sha256", &[]).framed(b""), shape.clone());
        let program = Tree::Program(file.into()).archive();
        self.case("7 program", recursive("program").framed(&program), shape.clone());
        let link = Tree::Link(b"/nowhere".to_vec()).archive();
        self.case("7 link", recursive("link").framed(&link), shape.clone());
        let huge = recursive("huge").word(1 << 40).bytes(&archive);
        self.case("7 frame of 2^40", huge, shape.clone()).ends();
        let cut = recursive("cut").word(archive.len() as u64).bytes(&archive[..24]);
        self.case("7 frame cut off", cut, shape).ends();
    }

    /// AddToStore below 1.25.
    fn add_old(&mut self) {
        let tag = self.tag.clone();
        let file = Tree::File(format!("file {tag}\n").into()).archive();
        let program = Tree::Program(format!("program {tag}\n").into()).archive();
        let directory = Tree::Directory(vec![(b"a".to_vec(), Tree::File(tag.clone().into()))]).archive();
        let shape = shapes::added(self.minor);
        for (what, fixed, recursive, algorithm, archive) in [
            ("recursive", 0, 1, "sha256", &directory),
            ("fixed 0 and the rest ignored", 0, 0, "sha1", &directory),
            ("fixed 1 recursive sha256", 1, 1, "sha256", &file),
            ("recursive sha1", 1, 1, "sha1", &directory),
            ("flat", 1, 0, "sha256", &file),
            ("flat sha1", 1, 0, "sha1", &file),
            ("flat md5", 1, 0, "md5", &file),
            ("flat sha512", 1, 0, "sha512", &file),
            ("flat program", 1, 0, "sha256", &program),
            ("recursive program", 0, 1, "sha256", &program),
            ("flat directory", 1, 0, "sha256", &directory),
            ("unknown algorithm", 1, 1, "sha3", &file),
            ("recursive 2", 1, 2, "sha256", &file),
        ] {
            let name = self.name(&what.replace(' ', "-"));
            let request = op(7).string(name).word(fixed).word(recursive).string(algorithm).bytes(archive);
            self.case(&format!("7 old {what}"), request, shape.clone());
        }
        // With what is there already: stock refuses it.
        let two = op(7).string(self.name("recursive")).word(2).word(1).string("sha256").bytes(&directory);
        self.case("7 old fixed 2", two, shape.clone());
        let old = |name: &str| op(7).string(name).word(0).word(1).string("sha256");
        self.case("7 old again", old("source").bytes(&file), shape.clone());
        self.case("7 old a second time", old("source").bytes(&file), shape.clone());
        for name in ["", "a b", ".hidden", "a/b"] {
            self.case(&format!("7 old name '{name}'"), old(name).bytes(&file), shape.clone());
        }
        let mut padded = Tree::File(b"x".to_vec()).archive();
        let contents = padded.windows(8).rposition(|w| w == b"x\0\0\0\0\0\0\0").unwrap();
        padded[contents + 7] = 1;
        self.case("7 old padding", old(&self.name("padding")).bytes(&padded), shape.clone());
        self.case("7 old cut off", old(&self.name("cut")).bytes(&file[..32]), shape.clone()).ends();
        let unsorted =
            Tree::Directory(vec![(b"b".to_vec(), Tree::File(b"".to_vec())), (b"a".to_vec(), Tree::File(b"".to_vec()))]);
        self.case("7 old out of order", old(&self.name("order")).bytes(&unsorted.archive()), shape);
    }

    fn add_text(&mut self) {
        let text = format!("text {}\n", self.tag);
        let source = self.world.source.clone();
        let shape = || vec![Text("path")];
        let request = |name: &str, refs: &[&str]| op(8).string(name).string(&text).strings(refs);
        self.case("8", request(&self.name("text"), &[]), shape());
        if !self.thorough() {
            return;
        }
        self.case("8 again", request(&self.name("text"), &[]), shape());
        self.case("8 reference", request(&self.name("text-refs"), &[&source]), shape());
        self.case("8 unknown reference", request(&self.name("text-unknown"), &[UNKNOWN]), shape());
        self.case("8 name", request("a b", &[]), shape());
        self.case("8 empty name", request("", &[]), shape());
        self.case("8 derivation that is none", request(&self.name("text.drv"), &[]), shape());
        self.case("8 name of a derivation", request(&format!("text-{}.drv", self.tag), &[]), shape());
        let drv = format!(
            "Derive([(\"out\",\"{}\",\"\",\"\")],[],[],\"x86_64-linux\",\"/bin/sh\",[],[(\"out\",\"{}\")])",
            SIGNED, SIGNED
        );
        let wrong = op(8).string(format!("wrong-{}.drv", self.tag)).string(drv).word(0);
        self.case("8 derivation with a wrong output", wrong, shape());
    }

    /// AddToStoreNar, with its payload as the minor wants it.
    fn nar_case(&mut self, what: &str, claim: &Claim, flags: [u64; 2]) -> &mut Case {
        let request = claim.append(op(39)).word(flags[0]).word(flags[1]);
        let (minor, name) = (self.minor, format!("39 {what}"));
        let archive = claim.archive.clone();
        let case = match minor {
            23.. => self.case(&name, request.framed(&archive), vec![]),
            21.. => self.case(&name, request, vec![]).on_demand(archive),
            _ => self.case(&name, request.bytes(&archive), vec![]),
        };
        case.info(&claim.path)
    }

    /// The same with an archive that is none; where it ends only the archive could tell.
    fn bad_nar_case(&mut self, what: &str, claim: &Claim) {
        let inline = self.minor < 21;
        let case = self.nar_case(what, claim, [0, 1]);
        if inline {
            case.ends();
        }
    }

    fn add_nar(&mut self) {
        let source = self.world.source.clone();
        let claim = |cases: &Self, stem: &str| Claim::source(&cases.name(stem), &format!("{stem} {}", cases.tag));
        let unsigned = |cases: &Self, stem: &str| {
            Claim::unsigned(&cases.invented(stem), Tree::File(cases.name(stem).into()).archive())
        };
        let mut addressed = claim(self, "addressed");
        addressed.time = 1_234_567;
        addressed.ultimate = 1;
        self.nar_case("content-addressed", &addressed, [0, 0]);
        self.nar_case("content-addressed again", &addressed, [0, 0]);
        self.nar_case("repair", &claim(self, "repair-nar"), [1, 0]);
        self.nar_case("repair of what is there", &addressed, [1, 0]);
        self.nar_case("flags of 2", &addressed, [2, 2]);

        let mut other = unsigned(self, "unsigned");
        other.references = vec![source.clone(), other.path.clone()];
        other.deriver = UNKNOWN_DRV.to_owned();
        other.signatures = vec![SIGNATURE.to_owned()];
        other.ultimate = 1;
        self.nar_case("unsigned", &other, [0, 0]);
        self.nar_case("unsigned, not to be checked", &other, [0, 1]);
        let mut unknown = unsigned(self, "unknown-reference");
        unknown.references = vec![UNKNOWN.to_owned()];
        self.nar_case("unknown reference", &unknown, [0, 1]);
        for (what, hash) in [
            ("hash of something else", hex(&sha256(b"else"))),
            ("hash in base 32", String::new()),
            ("hash with its algorithm", "sha256:".to_owned()),
            ("hash of md5", format!("md5:{}", "0".repeat(32))),
            ("hash too short", "00".to_owned()),
            ("no hash", "-".to_owned()),
        ] {
            let mut claim = claim(self, &what.replace(' ', "-"));
            claim.hash = match hash.as_str() {
                "" => nix32(&sha256(&claim.archive)),
                "sha256:" => format!("sha256:{}", claim.hash),
                "-" => String::new(),
                other => other.to_owned(),
            };
            self.nar_case(what, &claim, [0, 0]);
        }
        for (what, more) in [("size too large", 8i64), ("size too small", -8)] {
            let mut claim = claim(self, &what.replace(' ', "-"));
            claim.size = claim.size.saturating_add_signed(more);
            self.nar_case(what, &claim, [0, 0]);
        }
        for (what, ca) in [
            ("content address of something else", format!("fixed:r:sha256:{}", nix32(&sha256(b"else")))),
            ("content address that does not parse", "fixed:r:sha256".to_owned()),
            ("content address of an unknown kind", "what:sha256:00".to_owned()),
            ("content address of a text", format!("text:sha256:{}", nix32(&sha256(b"else")))),
        ] {
            let mut claim = claim(self, &what.replace(' ', "-"));
            claim.ca = ca;
            self.nar_case(what, &claim, [0, 0]);
            self.nar_case(&format!("{what}, not to be checked"), &claim, [0, 1]);
        }
        let mut signature = unsigned(self, "signature");
        signature.signatures = vec!["no signature at all".to_owned()];
        self.nar_case("signature that does not parse", &signature, [0, 1]);
        let mut deriver = unsigned(self, "deriver");
        deriver.deriver = source.clone();
        self.nar_case("deriver that is no derivation", &deriver, [0, 1]);
        deriver = unsigned(self, "bad-deriver");
        deriver.deriver = "what".to_owned();
        self.nar_case("deriver that does not parse", &deriver, [0, 1]);
        let bad = Claim::unsigned(&self.invented("bad"), b"this is not an archive, however long".to_vec());
        self.bad_nar_case("not an archive", &bad);
        let unsorted =
            Tree::Directory(vec![(b"b".to_vec(), Tree::File(b"".to_vec())), (b"a".to_vec(), Tree::File(b"".to_vec()))]);
        self.bad_nar_case("out of order", &Claim::unsigned(&self.invented("order"), unsorted.archive()));
        let drv = Claim::unsigned(&self.invented("no-derivation.drv"), Tree::File(b"Derive(".to_vec()).archive());
        self.nar_case("derivation that is none", &drv, [0, 1]);
        let dotted = unsigned(self, "dotted");
        let dotted = Claim { path: dotted.path.replace("-dotted", "-.dotted"), ..dotted };
        self.nar_case("leading dot", &dotted, [0, 1]);
    }

    fn add_multiple(&mut self) {
        let claim = |cases: &Self, stem: &str| Claim::source(&cases.name(stem), &format!("{stem} {}", cases.tag));
        let request = |flags: [u64; 2], count: u64, claims: &[&Claim]| {
            let start = Request(count.to_le_bytes().to_vec());
            let payload = claims.iter().fold(start, |r, claim| claim.append(r).bytes(&claim.archive)).0;
            op(44).word(flags[0]).word(flags[1]).framed(&payload)
        };
        let first = claim(self, "first");
        let mut second = Claim::unsigned(&self.invented("second"), Tree::File(self.name("2").into()).archive());
        second.references = vec![first.path.clone()];
        self.case("44 unsigned", request([0, 0], 2, &[&first, &second]), vec![]).info(&first.path).info(&second.path);
        self.case("44 not to be checked", request([0, 1], 2, &[&first, &second]), vec![])
            .info(&first.path)
            .info(&second.path);
        self.case("44 again", request([1, 1], 2, &[&first, &second]), vec![]).info(&second.path);
        self.case("44 nothing", request([0, 0], 0, &[]), vec![]);
        let (third, mut fourth) = (claim(self, "third"), claim(self, "fourth"));
        self.case("44 the same twice", request([0, 0], 2, &[&third, &third]), vec![]).info(&third.path);
        fourth.hash = hex(&sha256(b"else"));
        let fifth = claim(self, "fifth");
        self.case("44 a wrong hash between", request([0, 0], 3, &[&third, &fourth, &fifth]), vec![])
            .info(&fourth.path)
            .info(&fifth.path);
        let sixth = claim(self, "sixth");
        self.case("44 count too large", request([0, 0], 2, &[&sixth]), vec![]).info(&sixth.path);
        let seventh = claim(self, "seventh");
        self.case("44 count too small", request([0, 0], 1, &[&seventh, &sixth]), vec![]).info(&seventh.path);
        let mut bad = claim(self, "bad");
        bad.path = "/etc/passwd".to_owned();
        self.case("44 bad path", request([0, 0], 1, &[&bad]), vec![]);
        self.case("44 no frames", op(44).word(0).word(0).framed(b""), vec![]);
        self.case("44 huge count", op(44).word(0).word(0).framed(&(1u64 << 61).to_le_bytes()), vec![]);
    }

    /// `drv` in the form that builds it at this minor.
    fn all_of(&self, drv: &str) -> String {
        if self.minor >= 30 { format!("{drv}!*") } else { drv.to_owned() }
    }

    fn options(timeout: &str) -> Request {
        let options = [0, 0, 0, 3, 1, 0, 1, 7, 0, 0, 1, 1].into_iter().fold(op(19), Request::word);
        options.word(1).string("timeout").string(timeout)
    }

    /// Builds by path, with and without results.
    fn builds(&mut self) {
        let world = self.world;
        let tag = self.tag.clone();
        let out = |name: &str| world.output(name, &tag, "out");
        let results = shapes::build_results(self.minor);
        let each = |number: u64| if number == 9 { one() } else { results.clone() };
        let request = |number: u64, paths: &[String], mode: u64| op(number).strings(paths).word(mode);
        let missing =
            || vec![Texts("willBuild"), Texts("willSubstitute"), Texts("unknown"), Word("download"), Word("nar")];
        let (plain, multi, user) = (self.drv("plain"), self.drv("multi"), self.drv("user"));
        for (what, path) in [
            ("all outputs", self.all_of(&user)),
            ("one output", format!("{multi}!dev")),
            ("an unknown output", format!("{multi}!what")),
            ("a bare derivation", multi.clone()),
            ("a valid path", world.source.clone()),
            ("an unknown path", UNKNOWN.to_owned()),
            ("an unknown derivation", format!("{UNKNOWN_DRV}!out")),
            ("a foreign system", format!("{}!out", self.drv("foreign"))),
        ] {
            self.case(&format!("40 {what}"), op(40).strings(&[path]), missing());
        }
        let nothing: [&str; 0] = [];
        self.case("40 nothing", op(40).strings(&nothing), missing());
        self.case("40 no outputs", op(40).strings(&[format!("{multi}!")]), missing());
        self.case("40 bad output", op(40).strings(&[format!("{multi}!a b")]), missing());
        self.case("40 output of an output", op(40).strings(&[format!("{multi}!out!out")]), missing());

        self.case("9 all outputs", request(9, &[self.all_of(&plain)], 0), one()).info(out("plain"));
        self.case("46 all outputs", request(46, &[self.all_of(&self.drv("other"))], 0), each(46)).info(out("other"));
        self.case("46 one output", request(46, &[format!("{multi}!dev")], 0), each(46))
            .info(out("multi"))
            .info(world.output("multi", &tag, "dev"));
        self.case("46 an input first", request(46, &[self.all_of(&user)], 0), each(46)).info(out("user"));
        self.case("10 built", about(10, &self.out("plain")), one());
        let two = vec![self.all_of(&plain), format!("{multi}!out"), world.source.clone(), self.all_of(&plain)];
        for number in [9, 46] {
            let each = || each(number);
            self.case(&format!("{number} several"), request(number, &two, 0), each());
            self.case(&format!("{number} nothing"), request(number, &[], 0), each());
            self.case(&format!("{number} again, check"), request(number, &[self.all_of(&plain)], 2), each());
            self.case(&format!("{number} repair"), request(number, &[self.all_of(&plain)], 1), each());
            self.case(&format!("{number} mode of 3"), request(number, &[self.all_of(&plain)], 3), each());
            self.case(&format!("{number} bare derivation"), request(number, &[self.drv("user")], 0), each());
            self.case(&format!("{number} valid path"), request(number, std::slice::from_ref(&world.source), 0), each());
            self.case(&format!("{number} unknown path"), request(number, &[UNKNOWN.to_owned()], 0), each());
            let unknown = format!("{UNKNOWN_DRV}!out");
            self.case(&format!("{number} unknown derivation"), request(number, &[unknown], 0), each());
            let unknown = format!("{multi}!what");
            self.case(&format!("{number} unknown output"), request(number, &[unknown], 0), each());
            self.case(&format!("{number} no outputs"), request(number, &[format!("{multi}!")], 0), each());
            self.case(&format!("{number} bad path"), request(number, &["/etc!out".to_owned()], 0), each());
            let failing = self.all_of(&self.drv("failing"));
            self.case(&format!("{number} failure"), request(number, std::slice::from_ref(&failing), 0), each())
                .info(out("failing"));
            if !self.thorough() {
                continue;
            }
            let needs = self.all_of(&self.drv("needs"));
            self.case(&format!("{number} dependency"), request(number, &[needs], 0), each());
            let nothing = self.all_of(&self.drv("nothing"));
            self.case(&format!("{number} no output made"), request(number, &[nothing], 0), each());
            let forbidden = self.all_of(&self.drv("forbidden"));
            self.case(&format!("{number} forbidden reference"), request(number, &[forbidden], 0), each());
            let foreign = self.all_of(&self.drv("foreign"));
            self.case(&format!("{number} foreign system"), request(number, &[foreign], 0), each());
        }
        if !self.thorough() {
            return;
        }
        self.case("9 two failures", request(9, &[self.all_of(&self.drv("failing")), UNKNOWN.to_owned()], 0), one());
        self.case(
            "46 a failure and a success",
            request(46, &[self.all_of(&self.drv("failing")), self.all_of(&plain)], 0),
            each(46),
        );
        self.case("46 fixed output", request(46, &[self.all_of(&self.drv("cafixed"))], 0), each(46))
            .info(out("cafixed"));
        let random = self.all_of(&self.drv("random"));
        self.case("46 random", request(46, std::slice::from_ref(&random), 0), vec![]);
        self.case("46 random, check", request(46, std::slice::from_ref(&random), 2), each(46));
        self.case("9 random, check", request(9, &[random], 2), one());
        let slow = self.all_of(&self.drv("slow"));
        self.case("46 timeout", request(46, std::slice::from_ref(&slow), 0), each(46))
            .after(Self::options("1"), vec![]);
        self.case("9 timeout", request(9, &[slow], 0), one()).after(Self::options("1"), vec![]);
    }

    /// What follows from builds.
    fn derived(&mut self) {
        let built = self.out("user");
        let info = vec![Optional("known", shapes::info())];
        self.case("26 built", about(26, &built), info);
        self.case("6 built", about(6, &self.out("plain")), paths());
        self.case("18 built", about(18, &built), vec![Text("path")]);
        self.case("33 built", about(33, &built), paths());
        self.case("38 built", about(38, &built), vec![Nar("archive")]);
        let outputs = || vec![Each("outputs", vec![Text("name"), Text("path")])];
        self.case("41 built", about(41, &self.drv("multi")), outputs());
        self.case("10 unknown", about(10, UNKNOWN), one());
        self.case("10 unknown derivation", about(10, UNKNOWN_DRV), one());
        self.case("10 valid", about(10, &self.world.source.clone()), one());
        let id = format!("sha256:{}!out", "0".repeat(64));
        self.case("43 unknown", about(43, &id), vec![Texts("realisations")]);
        self.case("43 bad", about(43, "what"), vec![Texts("realisations")]);
        let base = &self.world.source["/nix/store/".len()..].to_owned();
        if self.minor >= 31 {
            let json = format!(r#"{{"dependentRealisations":{{}},"id":"{id}","outPath":"{base}","signatures":[]}}"#);
            self.case("42", about(42, &json), vec![]);
            self.case("42 bad", about(42, "{}"), vec![]);
        } else {
            self.case("42", about(42, &id).string(base), vec![]);
        }
    }

    /// BuildDerivation.
    fn build_derivation(&mut self) {
        let tag = self.tag.clone();
        let shape = shapes::build_result(self.minor);
        let env = |name: &str, out: &str, more: &[(&str, &str)]| -> Vec<(String, String)> {
            let own = [("builder", "/bin/sh"), ("name", name), ("out", out), ("system", "x86_64-linux")];
            own.iter().chain(more).map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
        };
        let request = |drv: &str, output: [&str; 3], script: &str, env: &[(String, String)], mode: u64| {
            let request =
                op(36).string(drv).word(1).string("out").string(output[0]).string(output[1]).string(output[2]);
            let request = request.word(0).string("x86_64-linux").string("/bin/sh").strings(&["-c", script]);
            let request = request.word(env.len() as u64);
            env.iter().fold(request, |request, (k, v)| request.string(k).string(v)).word(mode)
        };
        let (drv, out) = (self.drv("basic"), self.out("basic"));
        let script = format!("echo {tag} > $out");
        let name = self.name("basic");
        let plain = env(&name, &out, &[]);
        self.case("36", request(&drv, [&out, "", ""], &script, &plain, 0), shape.clone()).info(&out);
        self.case("36 again", request(&drv, [&out, "", ""], &script, &plain, 0), shape.clone());
        self.case("36 check", request(&drv, [&out, "", ""], &script, &plain, 2), shape.clone());
        self.case("36 repair", request(&drv, [&out, "", ""], &script, &plain, 1), shape.clone());
        self.case("36 mode of 3", request(&drv, [&out, "", ""], &script, &plain, 3), shape.clone());
        let not = request(&self.world.source.clone(), [&out, "", ""], &script, &plain, 0);
        self.case("36 not a derivation", not, shape.clone());
        let failing = self.invented("direct");
        let environment = env(&self.name("direct"), &failing, &[]);
        let direct = self.invented("direct.drv");
        self.case("36 failure", request(&direct, [&failing, "", ""], "exit 1", &environment, 0), shape.clone());
        let unset = env(&self.name("direct"), "", &[]);
        self.case("36 out not set", request(&direct, [&failing, "", ""], "exit 1", &unset, 0), shape.clone());
        let floating = env(&self.name("direct"), "", &[]);
        self.case("36 floating", request(&direct, ["", "r:sha256", ""], "exit 1", &floating, 0), shape.clone());
        self.case("36 deferred", request(&direct, ["", "", ""], "exit 1", &floating, 0), shape.clone());
        self.case("36 impure", request(&direct, ["", "r:sha256", "impure"], "exit 1", &floating, 0), shape.clone());
        self.case(
            "36 bad algorithm",
            request(&direct, [&failing, "sha3", "00"], "exit 1", &floating, 0),
            shape.clone(),
        );
        let (drv, out) = (self.drv("cabasic"), self.out("cabasic"));
        let right = hex(&sha256(b"fixed\n"));
        let name = self.name("cabasic");
        let more = [("outputHash", right.as_str()), ("outputHashAlgo", "sha256"), ("outputHashMode", "flat")];
        let environment = env(&name, &out, &more);
        let fixed = request(&drv, [&out, "sha256", &right], "echo fixed > $out", &environment, 0);
        self.case("36 fixed", fixed, shape.clone()).info(&out);
        let wrong = hex(&sha256(b"other\n"));
        let elsewhere = self.invented("elsewhere");
        let environment = env(&name, &elsewhere, &more);
        let fixed = request(&drv, [&elsewhere, "sha256", &wrong], "echo fixed > $out", &environment, 0);
        self.case("36 fixed elsewhere", fixed, shape).info(&elsewhere);
    }

    fn roots(&mut self) {
        let world = self.world;
        let roots = || vec![Pairs("roots")];
        let tag = self.tag.clone();
        self.case("11 valid", about(11, &world.source), one());
        self.case("11 unknown", about(11, UNKNOWN), one());
        self.case("14", op(14), roots());
        let plain = self.out("plain");
        self.case("14 temporary", op(14), roots()).after(about(11, &plain), one());
        self.case("12", about(12, &format!("{LINKS}/{tag}")), one());
        self.case("12 nothing there", about(12, &format!("{LINKS}/nothing-{tag}")), one());
        self.case("12 relative", about(12, &format!("relative-{tag}")), one());
        self.case("12 in the store", about(12, &world.source), one());
        self.case("12 empty", about(12, ""), one());
        self.case("13", op(13), one());
        self.case("14 indirect", op(14), roots());
        let link = || vec![Text("link")];
        let perm = format!("{LINKS}/perm-{tag}");
        self.case("47", about(47, &world.flat).string(&perm), link());
        self.case("47 again", about(47, &world.text).string(&perm), link());
        self.case("47 unknown path", about(47, UNKNOWN).string(format!("{perm}-unknown")), link());
        self.case("47 in the store", about(47, &world.flat).string(format!("{}/link", world.source)), link());
        self.case("47 a file is there", about(47, &world.flat).string(format!("{LINKS}/file")), link());
        self.case("47 not canonical", about(47, &world.flat).string(format!("{LINKS}/./../links/dots-{tag}")), link());
        self.case("47 relative", about(47, &world.flat).string(format!("dots-{tag}")), link());
        self.case("14 permanent", op(14), roots());
    }

    fn upkeep(&mut self) {
        let world = self.world;
        self.case("19", Self::options("0"), vec![]);
        let options = [0, 0, 0, 3, 1, 0, 1, 7, 0, 0, 1, 1].into_iter().fold(op(19), Request::word);
        let more = [("what", "is this"), ("timeout", "often"), ("sandbox", "perhaps"), ("substituters", "file:///x")];
        let request = more.iter().fold(options.clone().word(4), |r, (k, v)| r.string(k).string(v));
        self.case("19 strange settings", request, vec![]);
        self.case("19 large numbers", [u64::MAX; 12].into_iter().fold(op(19), Request::word).word(0), vec![]);
        for (check, repair) in [(0, 0), (1, 0), (1, 1)] {
            self.case(&format!("35 {check} {repair}"), op(35).word(check).word(repair), vec![Word("errors")]);
        }
        let info = || vec![Optional("known", shapes::info())];
        let signed = |path: &str, signatures: &[&str]| about(37, path).strings(signatures);
        let other = SIGNATURE.replace("test", &self.tag);
        self.case("37", signed(&world.flat, &[&other]), one()).info(&world.flat);
        self.case("37 again", signed(&world.flat, &[&other]), one());
        self.case("37 none", signed(&world.flat, &[]), one());
        self.case("37 no signature", signed(&world.flat, &["what"]), one());
        self.case("37 short", signed(&world.flat, &["test-1:AAAA"]), one());
        self.case("37 unknown path", signed(UNKNOWN, &[SIGNATURE]), one());
        let base = self.drv("other")["/nix/store/".len()..].to_owned();
        self.case("45", about(45, &base).framed(b"a log\n"), one());
        self.case("45 full path", about(45, &self.drv("other")).framed(b"a log\n"), one());
        self.case("45 not a derivation", about(45, &world.source["/nix/store/".len()..]).framed(b"a log\n"), one());
        self.case("45 unknown", about(45, &UNKNOWN_DRV["/nix/store/".len()..]).framed(b"a log\n"), one());
        self.case("26 flat, signed", about(26, &world.flat), info());
    }

    fn garbage(&mut self) {
        let world = self.world;
        let shape = || vec![Texts("paths"), Some("bytesFreed"), Word("obsolete")];
        let request = |action: u64, paths: &[&str], ignore: u64, max: u64| {
            op(20).word(action).strings(paths).word(ignore).word(max).word(0).word(0).word(0)
        };
        let (plain, user, other) = (self.out("plain"), self.out("user"), self.out("other"));
        self.case("23 before", op(23), paths());
        self.case("20 live", request(0, &[], 0, u64::MAX), shape());
        self.case("20 dead", request(1, &[], 0, u64::MAX), shape());
        self.case("20 dead with paths", request(1, &[&other], 0, u64::MAX), shape());
        self.case("20 ignoring liveness", request(2, &[], 1, u64::MAX), shape());
        self.case("20 action of 4", request(4, &[], 0, u64::MAX), shape());
        self.case("20 live path", request(3, &[&world.source], 0, u64::MAX), shape());
        self.case("20 unknown path", request(3, &[UNKNOWN], 0, u64::MAX), shape());
        self.case("20 no paths", request(3, &[], 0, u64::MAX), shape());
        self.case("20 referred to", request(3, &[&plain], 0, u64::MAX), shape()).info(&plain);
        self.case("20 own temporary root", request(3, &[&other], 0, u64::MAX), shape())
            .after(about(11, &other), one())
            .info(&other);
        self.case("20 one path", request(3, &[&other], 0, u64::MAX), shape()).info(&other);
        self.case("20 a path and what it needs", request(3, &[&plain, &user], 0, u64::MAX), shape()).info(&plain);
        self.case("20 max 0", request(2, &[], 0, 0), shape());
        self.case("20 max 1", request(1, &[], 0, 1), shape());
        self.case("20 delete", request(2, &[], 0, u64::MAX), shape());
        self.case("23 after", op(23), paths());
        self.case("20 dead after", request(1, &[], 0, u64::MAX), shape());
    }

    /// What leaves the stores different comes last, and is cleared away.
    fn divergent(&mut self) {
        let world = self.world;
        let source = |stem: &str| Claim::source(&format!("{stem}-{}", self.tag), &format!("{stem} {}", self.tag));
        let eighth = source("eighth");
        let late = Claim { references: vec![eighth.path.clone()], ..source("late") };
        let late = Claim { path: self.invented("late"), ca: String::new(), ..late };
        let zero = Claim { size: 0, ..source("zero") };
        let start = Request(2u64.to_le_bytes().to_vec());
        let payload = [&late, &eighth].iter().fold(start, |r, claim| claim.append(r).bytes(&claim.archive)).0;
        self.case("44 references after", op(44).word(0).word(1).framed(&payload), vec![])
            .info(&late.path)
            .info(&eighth.path);
        self.nar_case("size of zero", &zero, [0, 0]);
        if self.minor >= 25 {
            let archive = Tree::File(self.name("trailing").into()).archive();
            let request = op(7).string(self.name("trailing")).string("fixed:r:sha256").word(0).word(0);
            let request = request.framed(&[&archive[..], b"trailing"].concat());
            self.case("7 trailing bytes", request, shapes::added(self.minor));
            // In older transports what follows the archive is the next request.
            let mut longer = Claim::unsigned(&self.invented("longer"), archive);
            longer.archive.extend(b"trailing");
            self.nar_case("trailing bytes", &longer, [0, 1]);
            longer.path = self.invented("much-longer");
            longer.size = longer.archive.len() as u64;
            longer.hash = hex(&sha256(&longer.archive));
            self.nar_case("trailing bytes in the size", &longer, [0, 1]);
        }
        if self.thorough() {
            let wrong = self.all_of(&self.drv("cawrong"));
            let results = shapes::build_results(self.minor);
            self.case("9 hash mismatch", op(9).strings(&[&wrong]).word(0), one());
            self.case("46 hash mismatch", op(46).strings(&[&wrong]).word(0), results);
        }
        self.case("34", op(34), one());
        let delete = |paths: &[&str]| op(20).word(2).strings(paths).word(0).word(u64::MAX).word(0).word(0).word(0);
        let shape = || vec![Texts("paths"), Some("bytesFreed"), Word("obsolete")];
        self.case("20 delete with paths", delete(&[&world.source]), shape());
        self.case("20 clear", delete(&[]), shape()).silent();
        self.case("23 cleared", op(23), paths());
    }
}
