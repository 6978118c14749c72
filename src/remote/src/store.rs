//! What a remote builder has to be able to do, whichever protocol it speaks.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix_compat::derivation::BasicDerivation;
use nix_compat::export::{END, MORE, Trailer, write_trailer};
use nix_compat::path_info::PathInfo;
use nix_compat::realisation::{DrvOutput, Realisation};
use nix_compat::serve::{self as serve_protocol, BuildOptions};
use nix_compat::store_path::{StoreDir, StorePath};
use nix_compat::store_uri::StoreUri;
use nix_compat::wire::Writer;
use nix_compat::worker::handshake::Trust;
use nix_compat::worker::stderr::{ActivityKind, Field, Message, ResultKind, Verbosity};
use nix_compat::worker::{
    AddToStoreNar, BuildMode, BuildResult, DerivedPath, Features, NEWEST_MINOR, OutputsSpec, Request, Response,
    write_path_info,
};
use parking_lot::Mutex;

use crate::error::{ClientError, Result};
use crate::process::{Process, Stopper};
use crate::ssh::{Kind, SshCommand};
use crate::wire::Limits;
use crate::{serve, worker};

/// Since this minor version paths can be added many at a time.
const ADD_MULTIPLE: u16 = 32;
/// Since this minor version of the serve protocol a path is added with all that is known of it.
const SERVE_ADD_NAR: u16 = 5;
/// Since this minor version the worker protocol has realisations.
const REALISATIONS: u16 = 27;
/// How long the other end may be silent while it is not building.
const PATIENCE: Duration = Duration::from_secs(300);

/// Takes what a build says.
pub trait BuildLog: Send {
    /// A piece of the builder's output.
    fn output(&mut self, bytes: &[u8]);
    /// The builder begins a phase.
    fn phase(&mut self, phase: &str);
    /// The machine has something to say that is not the builder's.
    fn note(&mut self, text: &str);
    /// The build downloads something.
    fn download(&mut self, news: Download);
}

/// What a build says of one of its downloads, under a number of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Download {
    /// It begins.
    Started {
        /// Its number.
        id: u64,
        /// Who is to see it.
        level: Verbosity,
        /// What is shown.
        text: String,
        /// The URL, as the protocol has it.
        fields: Vec<Field>,
    },
    /// How far it is: bytes done and expected, and two numbers that mean nothing here.
    Progress(u64, [u64; 4]),
    /// It, or another activity of that number, is over.
    Ended(u64),
}

/// A log that the process's standard error and the protocol both write to.
pub type SharedLog = Arc<Mutex<dyn BuildLog>>;

/// Another store, connected.
pub struct RemoteStore {
    // Before the process, whose end it would otherwise hinder.
    client: Client,
    process: Option<Process>,
    store_dir: StoreDir,
}

/// What a store calls outputs whose paths do not follow from their derivations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputNames {
    /// By the hash modulo of the derivation: Nix up to 2.34.
    ByHash,
    /// By the path of the derivation: since then.
    ByPath,
}

impl OutputNames {
    fn of(id: &DrvOutput) -> Self {
        match id {
            DrvOutput::Modulo { .. } => Self::ByHash,
            DrvOutput::Path { .. } => Self::ByPath,
        }
    }
}

enum Client {
    Worker(worker::Connection),
    Serve(serve::Connection),
}

impl std::fmt::Debug for RemoteStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RemoteStore").field("process", &self.process.is_some()).finish_non_exhaustive()
    }
}

/// How a store is reached.
enum Way<'a> {
    Socket(&'a Path),
    Command(Kind),
}

impl RemoteStore {
    /// Connects to a store, which may take no longer than `patience` to answer. `stopper` ends the conversation at any
    /// time.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn open(uri: &StoreUri, store_dir: &StoreDir, patience: Duration, stopper: &Stopper) -> Result<Self> {
        let limits = Limits { silence: Some(patience), deadline: None };
        let connect = |stream, kind| match kind {
            Kind::Worker => worker::Connection::over(stream, store_dir, NEWEST_MINOR, limits).map(Client::Worker),
            Kind::Serve => serve::Connection::over(stream, store_dir, limits).map(Client::Serve),
        };
        let mut store = match way(uri)? {
            Way::Socket(path) => {
                let no_daemon = |source| ClientError::NoDaemon { path: path.to_owned(), source };
                let stream = UnixStream::connect(path).map_err(no_daemon)?;
                stopper.watch(&stream)?;
                Self { client: connect(stream, Kind::Worker)?, process: None, store_dir: store_dir.clone() }
            }
            Way::Command(kind) => {
                let (process, stream) = Process::start(SshCommand::from_environment(uri, kind)?, stopper)?;
                let client = connect(stream, kind).map_err(|error| process.explain(error))?;
                Self { client, process: Some(process), store_dir: store_dir.clone() }
            }
        };
        store.set_limits(Limits { silence: Some(PATIENCE), deadline: None });
        Ok(store)
    }

    fn set_limits(&mut self, limits: Limits) {
        match &mut self.client {
            Client::Worker(connection) => connection.set_limits(limits),
            Client::Serve(connection) => connection.set_limits(limits),
        }
    }

    /// Whether the other end trusts us, as far as it says so.
    pub fn trust(&self) -> Trust {
        match &self.client {
            Client::Worker(connection) => connection.trust(),
            Client::Serve(_) => Trust::Unknown,
        }
    }

    /// Whether it can be asked for results of builds of derivations that lie in its store.
    pub fn builds_paths(&self) -> bool {
        matches!(self.client, Client::Worker(_))
    }

    /// Which of these paths it has, or can get when it is to `substitute`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn valid_paths(&mut self, paths: BTreeSet<StorePath>, substitute: bool) -> Result<BTreeSet<StorePath>> {
        let found = match &mut self.client {
            Client::Worker(connection) => {
                match connection.call(&Request::QueryValidPaths { paths, substitute }, nothing) {
                    Ok(Response::Paths(found)) => Ok(found),
                    other => Err(unexpected(other)),
                }
            }
            Client::Serve(connection) => {
                let request = serve_protocol::Request::QueryValidPaths { lock: true, substitute, paths };
                match connection.call(&request, nothing) {
                    Ok(serve_protocol::Response::Paths(found)) => Ok(found),
                    other => Err(unexpected(other)),
                }
            }
        };
        found.map_err(|error| self.explain(error))
    }

    /// Adds paths, each after those it refers to. `nar` writes the NAR of one.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn add(
        &mut self,
        infos: &[PathInfo],
        nar: &mut dyn FnMut(&PathInfo, &mut dyn Write) -> io::Result<()>,
    ) -> Result<()> {
        if infos.is_empty() {
            return Ok(());
        }
        let added = match &mut self.client {
            Client::Worker(connection) if connection.protocol().since(ADD_MULTIPLE) => {
                add_multiple(connection, infos, nar)
            }
            Client::Worker(connection) => infos.iter().try_for_each(|info| {
                let add = AddToStoreNar { info: info.clone(), repair: false, dont_check_sigs: true };
                connection.call(&Request::AddToStoreNar(add), |out| nar(info, out)).map(drop)
            }),
            Client::Serve(connection) if connection.protocol().since(SERVE_ADD_NAR) => {
                infos.iter().try_for_each(|info| {
                    let request = serve_protocol::Request::AddToStoreNar(info.clone());
                    done(connection.call(&request, |out| nar(info, out)), &self.store_dir.display(&info.path))
                })
            }
            Client::Serve(connection) => {
                let dir = &self.store_dir;
                let export = |out: &mut dyn Write| export(dir, infos, nar, out);
                done(connection.call(&serve_protocol::Request::ImportPaths, export), "the inputs")
            }
        };
        added.map_err(|error| self.explain(error))
    }

    /// Builds a derivation whose inputs are there.
    ///
    /// # Errors
    /// [`ClientError`] when it could not be asked; how the build ended is in the result.
    pub fn build(
        &mut self,
        drv_path: &StorePath,
        derivation: &BasicDerivation,
        options: &BuildOptions,
        limits: Limits,
        log: &SharedLog,
    ) -> Result<BuildResult> {
        let drv_path = drv_path.clone();
        let derivation = derivation.clone();
        self.building(limits, log, |client, log| match client {
            Client::Worker(connection) => {
                let request = Request::BuildDerivation { drv_path, derivation, mode: BuildMode::Normal };
                match watched(connection, &request, log) {
                    Ok(Response::BuildResult(result)) => Ok(result),
                    other => Err(unexpected(other)),
                }
            }
            Client::Serve(connection) => {
                let options = options.clone();
                let request = serve_protocol::Request::BuildDerivation { drv_path, derivation, options };
                match connection.call(&request, nothing) {
                    Ok(serve_protocol::Response::BuildResult(result)) => Ok(result),
                    other => Err(unexpected(other)),
                }
            }
        })
    }

    /// Builds all outputs of a derivation that lies in its store; only the worker protocol can.
    ///
    /// # Errors
    /// As for [`RemoteStore::build`].
    pub fn build_stored(&mut self, drv_path: &StorePath, limits: Limits, log: &SharedLog) -> Result<BuildResult> {
        let paths = vec![DerivedPath::Built { drv: drv_path.clone(), outputs: OutputsSpec::All }];
        self.building(limits, log, |client, log| {
            let Client::Worker(connection) = client else {
                return Err(ClientError::Protocol("it cannot build derivations of its own store".to_owned()));
            };
            let request = Request::BuildPathsWithResults { paths, mode: BuildMode::Normal };
            match watched(connection, &request, log) {
                Ok(Response::KeyedBuildResults(mut results)) if results.len() == 1 => Ok(results.remove(0).1),
                other => Err(unexpected(other)),
            }
        })
    }

    /// Has a build's log passed on while it runs.
    fn building(
        &mut self,
        limits: Limits,
        log: &SharedLog,
        build: impl FnOnce(&mut Client, &SharedLog) -> Result<BuildResult>,
    ) -> Result<BuildResult> {
        self.set_limits(limits);
        // The serve protocol has no other place for it.
        let serve = matches!(self.client, Client::Serve(_));
        if let Some(process) = self.process.as_ref().filter(|_| serve) {
            let log = log.clone();
            process.set_sink(Some(Box::new(move |bytes| log.lock().output(bytes))));
        }
        let result = build(&mut self.client, log);
        if let Some(process) = self.process.as_ref().filter(|_| serve) {
            process.settle();
            process.set_sink(None);
        }
        self.set_limits(Limits { silence: Some(PATIENCE), deadline: None });
        result.map_err(|error| self.explain(error))
    }

    /// What it knows of paths; those that are not valid are left out.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn path_infos(&mut self, paths: &BTreeSet<StorePath>) -> Result<Vec<PathInfo>> {
        let infos = match &mut self.client {
            Client::Worker(connection) => {
                let query = |path: &StorePath| match connection.call(&Request::QueryPathInfo(path.clone()), nothing) {
                    Ok(Response::PathInfo(info)) => Ok(info),
                    other => Err(unexpected(other)),
                };
                paths.iter().map(query).filter_map(Result::transpose).collect()
            }
            Client::Serve(connection) => {
                match connection.call(&serve_protocol::Request::QueryPathInfos(paths.clone()), nothing) {
                    Ok(serve_protocol::Response::PathInfos(infos)) => Ok(infos),
                    other => Err(unexpected(other)),
                }
            }
        };
        infos.map_err(|error| self.explain(error))
    }

    /// By which names it knows outputs; `None` where the protocol has no words for what they turned out to be.
    pub fn output_names(&self) -> Option<OutputNames> {
        let Client::Worker(connection) = &self.client else { return None };
        let protocol = connection.protocol();
        match protocol.has(Features::REALISATION_WITH_PATH) {
            true => Some(OutputNames::ByPath),
            false => protocol.since(REALISATIONS).then_some(OutputNames::ByHash),
        }
    }

    /// What an output turned out to be there; nothing for a name that it does not know outputs by.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn realisation(&mut self, id: &DrvOutput) -> Result<Option<Realisation>> {
        if self.output_names() != Some(OutputNames::of(id)) {
            return Ok(None);
        }
        let Client::Worker(connection) = &mut self.client else { return Ok(None) };
        let found = match connection.call(&Request::QueryRealisation(id.clone()), nothing) {
            Ok(Response::Realisation(found)) => Ok(found),
            other => Err(unexpected(other)),
        };
        found.map_err(|error| self.explain(error))
    }

    /// Tells it what an output turned out to be: a valid path there.
    ///
    /// # Errors
    /// [`ClientError`]; [`ClientError::Refused`] also for a name that it does not know outputs by.
    pub fn register(&mut self, realisation: &Realisation) -> Result<()> {
        let names = self.output_names();
        let done = match &mut self.client {
            Client::Worker(connection) if names == Some(OutputNames::of(&realisation.id)) => {
                connection.call(&Request::RegisterDrvOutput(realisation.clone()), nothing).map(drop)
            }
            _ => Err(ClientError::Refused(format!("the protocol has no name for the output '{}'", realisation.id))),
        };
        done.map_err(|error| self.explain(error))
    }

    /// The NAR of a path: `read` has to take all of it, and not a byte more. When it has not, the connection is of no
    /// use any more.
    ///
    /// # Errors
    /// [`ClientError`] when there is none, or when the connection broke before its end, whatever `read` made of that.
    pub fn nar<T>(&mut self, path: &StorePath, read: impl FnOnce(&mut dyn Read) -> T) -> Result<T> {
        let asked = match &mut self.client {
            Client::Worker(connection) => connection.call(&Request::NarFromPath(path.clone()), nothing).map(drop),
            Client::Serve(connection) => {
                connection.call(&serve_protocol::Request::DumpStorePath(path.clone()), nothing).map(drop)
            }
        };
        asked.map_err(|error| self.explain(error))?;
        let payload: &mut dyn Read = match &mut self.client {
            Client::Worker(connection) => connection.payload(),
            Client::Serve(connection) => connection.payload(),
        };
        let mut payload = Payload { payload, broken: None };
        let value = read(&mut payload);
        match payload.broken {
            None => Ok(value),
            Some(error) => Err(self.explain(ClientError::Broken(error))),
        }
    }

    fn explain(&self, error: ClientError) -> ClientError {
        match &self.process {
            Some(process) if !matches!(error, ClientError::Refused(_)) => process.explain(error),
            _ => error,
        }
    }
}

/// What is received beside messages. Its reader may say of a connection that breaks what it likes.
struct Payload<'a> {
    payload: &'a mut dyn Read,
    broken: Option<io::Error>,
}

impl Read for Payload<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.payload.read(buf);
        match &read {
            Ok(0) if !buf.is_empty() => self.broken = Some(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                self.broken = Some(io::Error::new(error.kind(), error.to_string()));
            }
            _ => {}
        }
        read
    }
}

fn way(uri: &StoreUri) -> Result<Way<'_>> {
    Ok(match (uri.scheme.as_str(), uri.authority.as_str()) {
        ("ssh", _) => Way::Command(Kind::Serve),
        ("ssh-ng", _) => Way::Command(Kind::Worker),
        ("unix", path) if path.starts_with('/') => Way::Socket(Path::new(path)),
        _ => {
            let reason = "castored knows ssh-ng://, ssh:// and unix:// with a socket's path".to_owned();
            return Err(ClientError::Uri { uri: uri.to_string(), reason });
        }
    })
}

fn nothing(_: &mut dyn Write) -> io::Result<()> {
    Ok(())
}

/// An answer of another kind. Requests say which kind they get, so this is no error of the other end.
fn unexpected<T: std::fmt::Debug>(answer: Result<T>) -> ClientError {
    match answer {
        Err(error) => error,
        Ok(answer) => ClientError::Protocol(format!("unexpected answer {answer:?}")),
    }
}

fn done(answer: Result<serve_protocol::Response>, what: &str) -> Result<()> {
    match answer {
        Ok(serve_protocol::Response::Done(true)) => Ok(()),
        Ok(_) => Err(ClientError::Refused(format!("failed to add {what}"))),
        Err(error) => Err(error),
    }
}

fn add_multiple(
    connection: &mut worker::Connection,
    infos: &[PathInfo],
    nar: &mut dyn FnMut(&PathInfo, &mut dyn Write) -> io::Result<()>,
) -> Result<()> {
    let protocol = connection.protocol().clone();
    let request = Request::AddMultipleToStore { repair: false, dont_check_sigs: true };
    connection
        .call(&request, |out| {
            let mut writer = Writer::new();
            writer.count(infos.len());
            for info in infos {
                write_path_info(info, &protocol, &mut writer);
                out.write_all(&writer.take())?;
                nar(info, out)?;
            }
            Ok(())
        })
        .map(drop)
}

fn export(
    dir: &StoreDir,
    infos: &[PathInfo],
    nar: &mut dyn FnMut(&PathInfo, &mut dyn Write) -> io::Result<()>,
    out: &mut dyn Write,
) -> io::Result<()> {
    for info in infos {
        out.write_all(&MORE.to_le_bytes())?;
        nar(info, out)?;
        let (path, references, deriver) = (info.path.clone(), info.references.clone(), info.deriver.clone());
        let mut writer = Writer::new();
        write_trailer(dir, &Trailer { path, references, deriver }, &mut writer);
        out.write_all(writer.as_bytes())?;
    }
    out.write_all(&END.to_le_bytes())
}

fn watched(connection: &mut worker::Connection, request: &Request, log: &SharedLog) -> Result<Response> {
    let mut listener = Listener { log, held: None };
    let answer = connection.call_watching(request, nothing, &mut |message| listener.hear(message));
    listener.finish();
    answer
}

/// Takes a daemon's messages during a build. What it says of its own activities is left out, but for the builder's words
/// and downloads.
struct Listener<'a> {
    log: &'a SharedLog,
    /// Nix 2.3 says a line twice, the first time as a message of its own.
    held: Option<String>,
}

impl Listener<'_> {
    fn hear(&mut self, message: Message) {
        match message {
            Message::Result { kind: ResultKind::BuildLogLine, fields, .. } => {
                let Some(Field::Text(line)) = fields.first() else { return };
                if self.held.as_ref().is_some_and(|held| held.as_bytes() == line) {
                    self.held = None;
                }
                self.finish();
                let mut log = self.log.lock();
                log.output(line);
                log.output(b"\n");
            }
            Message::Result { kind: ResultKind::SetPhase, fields, .. } => {
                self.finish();
                if let Some(Field::Text(phase)) = fields.first() {
                    self.log.lock().phase(&String::from_utf8_lossy(phase));
                }
            }
            Message::StartActivity { id, level, kind: ActivityKind::FileTransfer, text, fields, .. } => {
                let text = String::from_utf8_lossy(&text).into_owned();
                self.log.lock().download(Download::Started { id, level, text, fields });
            }
            Message::Result { id, kind: ResultKind::Progress, fields } => {
                // Clients take for granted that what they are told has all its fields.
                let [Field::Int(done), Field::Int(expected), Field::Int(running), Field::Int(failed)] = fields[..]
                else {
                    return;
                };
                self.log.lock().download(Download::Progress(id, [done, expected, running, failed]));
            }
            Message::StopActivity(id) => self.log.lock().download(Download::Ended(id)),
            Message::Next(text) => {
                self.finish();
                let text = String::from_utf8_lossy(&text).trim_end().to_owned();
                self.held = Some(text).filter(|text| !text.is_empty());
            }
            _ => {}
        }
    }

    /// What was held is no line of the build's.
    fn finish(&mut self) {
        if let Some(text) = self.held.take() {
            self.log.lock().note(&text);
        }
    }
}
