//! Telling a stream of requests that ended from one that was cut off.
//!
//! To a handler tonic shows both as the end of the stream: a call that the client cancels is answered to nobody, and
//! its handler is about to be dropped. But a blob of which half arrived must not be stored in the meantime, so the body
//! of every request is watched for the difference.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http;

/// Whether the body of a request broke off; in the request's extensions.
#[derive(Clone, Debug, Default)]
pub(crate) struct CutOff(Arc<AtomicBool>);

impl CutOff {
    /// Watches the body of `request` from now on.
    pub(crate) fn watch(mut request: http::Request<Body>) -> http::Request<Body> {
        let cut_off = CutOff::default();
        request.extensions_mut().insert(cut_off.clone());
        request.map(|body| Body::new(Watched { body, cut_off }))
    }

    /// An error if the stream, now at its end, was cut off there.
    pub(crate) fn check(&self) -> Result<(), Status> {
        if self.0.load(Ordering::Acquire) { Err(Status::cancelled("the stream was cut off")) } else { Ok(()) }
    }
}

struct Watched {
    body: Body,
    cut_off: CutOff,
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = Pin::new(&mut self.body).poll_frame(context);
        if let Poll::Ready(Some(Err(_))) = frame {
            self.cut_off.0.store(true, Ordering::Release);
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
