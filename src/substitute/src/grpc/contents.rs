//! Contents of single files, for what was promised.

use std::sync::Arc;

use castore::{Digest, Node};
use nix_compat::nar::WriteError;
use rpc_client::ClientError;
use store::Store;
use store::nar_digest::NarDigest;

use super::flow::WHOLE;
use super::{Castore, Failure};
use crate::error::Error;
use crate::pipe::{Shared, pipe};

impl Castore {
    /// Fetches blobs into `store`, small ones all at once. Gives what became of each, in their order; an outage ends it for
    /// those that follow as well.
    pub(crate) fn fetch(&self, store: &Store, blobs: &[(Digest, u64)], shared: &Arc<Shared>) -> Vec<Result<(), Error>> {
        let asked = blobs.iter().map(|(digest, size)| (*size <= WHOLE).then(|| self.ahead.piece(*digest, *size)));
        let asked: Vec<_> = asked.collect();
        let mut session = self.here.session();
        let mut results = Vec::with_capacity(blobs.len());
        let mut outage = false;
        for ((digest, size), coming) in blobs.iter().zip(asked) {
            let result = match coming {
                _ if outage => Err(Error::Disabled(self.name.clone())),
                Some(coming) => {
                    let piece = coming.wait(&|| !shared.is_cancelled()).map_err(self.failed("fetch contents from"));
                    piece.and_then(|piece| {
                        session.put_blob_bytes(&piece).map_err(store::Error::from)?;
                        Ok(())
                    })
                }
                None => self.fetch_large(store, *digest, *size, shared),
            };
            outage |= matches!(&result, Err(error) if error.is_outage());
            results.push(result);
        }
        if let Err(error) = session.flush() {
            let reason = error.to_string();
            for result in results.iter_mut().filter(|result| result.is_ok()) {
                *result = Err(Error::Thread(reason.clone()));
            }
        }
        results
    }

    /// One that comes in chunks: those that are here are taken from here. What is put together must have its digest too.
    fn fetch_large(&self, store: &Store, digest: Digest, size: u64, shared: &Arc<Shared>) -> Result<(), Error> {
        let node = Node::File { digest, size, executable: false };
        let (sink, mut reader) = pipe(shared.clone(), None, None);
        let (written, imported) = std::thread::scope(|scope| {
            let writing = scope.spawn(|| {
                // With the sink goes the pipe's end.
                let mut sink = sink;
                self.write(&node, &mut sink)
            });
            let imported = store.import_nar(&mut reader, NarDigest::new(None, None));
            // Nobody reads any more, which ends who writes.
            drop(reader);
            (writing.join(), imported)
        });
        let written = written.map_err(|_| Error::Thread("a download panicked".to_owned()))?;
        match written {
            Err(Failure::Peer(error)) => return Err(self.failed("fetch contents from")(error)),
            // Who reads has failed, and says why.
            Err(Failure::Nar(WriteError::Io(_))) if imported.is_err() => {}
            Err(Failure::Nar(source)) => {
                return Err(Error::Tree { uri: self.name.clone(), path: digest.to_string(), source });
            }
            Ok(()) => {}
        }
        if imported?.node != node {
            let wrong = ClientError::WrongDigest { action: "read a blob", wanted: digest };
            return Err(self.failed("fetch contents from")(wrong));
        }
        Ok(())
    }
}
