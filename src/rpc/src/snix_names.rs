//! Every service under its second name.
//!
//! `snix.castore.v1` and `snix.store.v1` differ from the `tvix` packages in the names of types only; their messages
//! are the same bytes. So a call to one is a call to the other, and renaming the request's path is all there is to do.

use tonic::codegen::http::{Request, Uri, uri::PathAndQuery};

/// Package prefixes as clients of snix spell them, and the name the services here are registered under.
const RENAMED: [(&str, &str); 2] = [("/snix.castore.v1.", "/tvix.castore.v1."), ("/snix.store.v1.", "/tvix.store.v1.")];

/// Directs a call to a `snix` service to the `tvix` service of the same name; leaves every other call alone.
pub(crate) fn to_tvix<B>(mut request: Request<B>) -> Request<B> {
    if let Some(uri) = renamed(request.uri()) {
        *request.uri_mut() = uri;
    }
    request
}

fn renamed(uri: &Uri) -> Option<Uri> {
    let path = uri.path();
    let (method, package) = RENAMED.iter().find_map(|(from, to)| path.strip_prefix(from).map(|method| (method, to)))?;
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = Some(PathAndQuery::try_from(format!("{package}{method}")).ok()?);
    Uri::from_parts(parts).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path_after(uri: &str) -> String {
        to_tvix(Request::builder().uri(uri).body(()).unwrap()).uri().to_string()
    }

    #[test]
    fn snix_packages_become_tvix_packages() {
        assert_eq!(path_after("/snix.castore.v1.BlobService/Put"), "/tvix.castore.v1.BlobService/Put");
        assert_eq!(
            path_after("http://localhost:8000/snix.store.v1.PathInfoService/Get"),
            "http://localhost:8000/tvix.store.v1.PathInfoService/Get"
        );
    }

    #[test]
    fn other_paths_stay() {
        for path in ["/tvix.castore.v1.BlobService/Put", "/grpc.health.v1.Health/Check", "/snix.castore.v2.X/Y", "/"] {
            assert_eq!(path_after(path), path);
        }
    }
}
